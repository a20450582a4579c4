"""What this machine can do at most: bytes and multiplications per second."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

_MEGABYTES = 512
_SIZE = 2048
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Machine:
  """Measured limits of one process.

  Attributes:
    bytes_per_second: reading memory once, no cache holding it.
    flops_per_second: a square matrix product in float32.
  """

  bytes_per_second: float
  flops_per_second: float

  def seconds(self, num_bytes: float, flops: float) -> float:
    """The least time that moving and multiplying so much can take.

    Reading and computing may overlap, so it is the longer of the two.
    """
    return max(
        num_bytes / self.bytes_per_second, flops / self.flops_per_second
    )


def _median(run, *args) -> float:
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def measure() -> Machine:
  """Measures both limits, a few seconds each."""
  parts = 64
  big = jnp.ones((parts, _MEGABYTES * 2**20 // 4 // parts))
  # A matrix times a vector reads each number once; XLA runs it on all cores.
  vector = jnp.ones(big.shape[1])
  reading = _median(jax.jit(jnp.matmul), big, vector)
  square = jnp.ones((_SIZE, _SIZE))
  product = _median(jax.jit(jnp.matmul), square, square)
  return Machine(big.nbytes / reading, 2 * _SIZE**3 / product)
