"""What this machine is, and can do at most: bytes and products a second.

As a script it is the first stage of `accelerator.py`.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import accelerator
import child
from child import Measurement
import jax
import jax.numpy as jnp

from prefix_distill.plan import programs

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


def _machine(bench: child.Bench) -> Iterator[Measurement]:
  """What the device is, and what it can do at most."""
  yield Measurement("device", functools.partial(_device, bench))
  yield Measurement("ceilings", functools.partial(_ceilings, bench.args.cpu))


def _device(bench: child.Bench) -> dict[str, Any]:
  device, cpu = bench.device, bench.args.cpu
  kind = f"{device.device_kind} (rehearsal)" if cpu else device.device_kind
  found = {
      "device": kind,
      "platform": device.platform,
      "compute_capability": getattr(device, "compute_capability", None),
      "topology": next(
          (
              name
              for name, chip in programs.CHIPS.items()
              if chip.platform == "gpu" and name.upper() in kind.upper()
          ),
          "",
      ),
      "memory": _memory_limit(device),
      "driver": _driver(),
      "jax": jax.__version__,
      "jaxlib": jax.lib.__version__,
      "cudnn": _version("nvidia-cudnn-cu13") or _version("nvidia-cudnn-cu12"),
      "python": platform.python_version(),
      "processor": child.proc("/proc/cpuinfo", "model name"),
      "cores": len(os.sched_getaffinity(0)),
      "date": datetime.date.today().isoformat(),
      "commit": bench.args.commit,
  }
  memory = found["memory"]
  shown = f"{memory / child.GIB:.1f} GiB" if memory else "the host's memory"
  capability = found["compute_capability"]
  if capability:
    shown += f", compute capability {capability}"
  return found | {"shown": shown}


def _memory_limit(device: jax.Device) -> float:
  return (device.memory_stats() or {}).get("bytes_limit", 0)


def _driver() -> str:
  query = ("--query-gpu=driver_version", "--format=csv,noheader")
  command = ["nvidia-smi", *query]
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return found.stdout.strip().partition("\n")[0] if not found.returncode else ""


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _rate(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
  """Returns the median seconds of a call, of many in a row."""
  calls, times = 10, []
  jax.block_until_ready(run(x))
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(calls):
      out = run(x)
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls)
  return statistics.median(times)


def _ceilings(cpu: bool) -> dict[str, Any]:
  size, side = (2**24, 256) if cpu else (2**31, 8192)
  x = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
  copy = 2 * x.nbytes / _rate(jax.jit(lambda x: x + 1), x)
  read = x.nbytes / _rate(jax.jit(jnp.max), x)
  a = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
  product = 2 * side**3 / _rate(jax.jit(lambda a: a @ a), a)
  return {
      "copy_bandwidth": copy,
      "read_bandwidth": read,
      "matrix_flops": product,
      "shown": (
          f"copies {copy / 1e9:,.0f} GB/s, reads {read / 1e9:,.0f} GB/s,"
          f" bfloat16 products {product / 1e12:,.1f} TFLOP/s"
      ),
  }


def _check_device(bench: child.Bench) -> None:
  """Ends the process if there is no accelerator, or not the one of before."""
  if not bench.args.cpu and bench.device.platform == "cpu":
    sys.exit(accelerator.NO_ACCELERATOR)
  known = bench.machine.get("device")
  if known and known != _device(bench)["device"]:
    sys.exit(accelerator.ANOTHER_DEVICE)


def main() -> None:
  bench = child.start(child.Bench)
  _check_device(bench)
  # The device always: it says when and with what the rest was measured.
  child.measure(bench, _machine(bench), always="device")


if __name__ == "__main__":
  main()
