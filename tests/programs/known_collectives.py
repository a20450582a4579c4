"""Compiles programs whose collectives are known: known_collectives.py PLATFORM.

For cpu, which is here, or for tpu or gpu, which need not be. Eight devices, as
data x fsdp x tensor = 2 x 2 x 2.
"""

import collections
import os
import sys

from prefix_distill.plan import ENVIRONMENT

# Read when jax is imported.
os.environ |= ENVIRONMENT
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from prefix_distill.plan import cost  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402

PLATFORM = sys.argv[1]
P = jax.sharding.PartitionSpec
ROWS = ("data", "fsdp")
SUMS = ("reduce-scatter", "all-reduce")
# Layers, width, hidden width, and rows and positions of the input.
L, D, F, B, T = 5, 256, 512, 16, 128
# A CPU multiplies in float32 alone, a TPU makes bfloat16 of it by itself.
DTYPE = jnp.dtype("float32" if PLATFORM == "cpu" else "bfloat16")


def devices() -> list[jax.Device]:
  if PLATFORM == "cpu":
    return jax.devices()
  if PLATFORM == "tpu":
    return programs.devices(programs.parse_machine("v5e:2x4"))
  return programs.devices(programs.parse_machine("h100:8"))


MESH = jax.sharding.Mesh(
    np.array(devices()).reshape(2, 2, 2),
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
)


def array(shape, *spec, dtype=jnp.float32):
  place = jax.sharding.NamedSharding(MESH, P(*spec))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def found(function, *args, trips=None, **settings):
  compiled = jax.jit(function, **settings).trace(*args).lower().compile()
  return cost.collectives(compiled.as_text(), MESH.shape, trips)


def totals(items) -> dict:
  """Bytes of arrays times executions, by kind and axes."""
  sums = collections.Counter()
  for item in items:
    assert item.exact, item
    sums[item.kind, item.axes] += item.bytes * item.times
  return dict(sums)


def by_hand() -> None:
  """One collective of each kind, three times."""

  def step(x, _):
    x = jnp.sin(jax.lax.all_gather(x, "fsdp", tiled=True))
    x = jnp.sin(jax.lax.psum_scatter(x, "fsdp", tiled=True))
    x = jnp.sin(jax.lax.psum(x, ("data", "tensor")))
    x = jnp.sin(jax.lax.all_to_all(x, "data", 0, 0, tiled=True))
    x = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
    return jnp.sin(x), None

  def local(x):
    return jax.lax.scan(step, x, length=3)[0]

  every = P(("data", "fsdp", "tensor"))
  function = jax.shard_map(
      local, mesh=MESH, in_specs=every, out_specs=every, check_vma=False
  )
  items = found(function, array((8 * 256, 128), *every))
  size = 256 * 128 * 4
  assert totals(items) == {
      ("all-gather", ("fsdp",)): 3 * 2 * size,
      ("reduce-scatter", ("fsdp",)): 3 * 2 * size,
      ("all-reduce", ("data", "tensor")): 3 * size,
      ("all-to-all", ("data",)): 3 * size,
      ("collective-permute", ("tensor",)): 3 * size,
  }, items
  sent = {item.kind: item.total for item in items}
  assert sent == {
      "all-gather": 3 * size,
      "reduce-scatter": 3 * size,
      "all-reduce": 3 * 2 * 3 / 4 * size,
      "all-to-all": 3 * size / 2,
      "collective-permute": 3 * size,
  }, items


def layer(x, weights):
  return x + jnp.maximum(x @ weights["up"], 0) @ weights["down"], None


def loss(weights, x):
  y, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
  return jnp.sum(y**2)


WEIGHTS = {
    "up": array((L, D, F), None, "fsdp", "tensor", dtype=DTYPE),
    "down": array((L, F, D), None, "tensor", "fsdp", dtype=DTYPE),
}
INPUT = array((B, T, D), ROWS, dtype=DTYPE)
# A matrix as a device uses it, and the rows of a device.
MATRIX = D * F // 2 * DTYPE.itemsize
ACTIVATIONS = B // 4 * T * D * DTYPE.itemsize


def sharded_layers() -> None:
  """Weights are gathered in each layer, and their gradients scattered."""

  def forward(weights, x):
    return jax.lax.scan(layer, x, weights)[0]

  assert totals(found(forward, WEIGHTS, INPUT)) == {
      ("all-gather", ("fsdp",)): L * 2 * MATRIX,
      ("all-reduce", ("tensor",)): L * ACTIVATIONS,
  }
  places = jax.tree.map(lambda w: w.sharding, WEIGHTS)
  sums = totals(found(jax.grad(loss), WEIGHTS, INPUT, out_shardings=places))
  # Forward, and again for the backward pass; there the product of `down` need
  # not be formed again, but the input's gradient is a sum like it.
  assert sums.pop(("all-gather", ("fsdp",))) == 2 * L * 2 * MATRIX
  assert sums.pop(("all-reduce", ("tensor",))) == 2 * L * ACTIVATIONS
  # What a device has of a gradient is split over fsdp, and its half summed over
  # data. Compilers differ in whether they scatter or reduce and cut.
  over_fsdp = [sums.pop((kind, ("fsdp",)), 0) for kind in SUMS]
  assert sum(over_fsdp) == L * 2 * MATRIX
  if PLATFORM != "cpu":
    assert over_fsdp[0]
  assert sums == {("all-reduce", ("data",)): L * MATRIX}


def product_in_a_loop() -> None:
  """A TPU gathers and scatters step by step, beside a product's parts."""
  mesh = jax.sharding.Mesh(
      MESH.devices.reshape(1, 8),
      ("data", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )

  def place(*spec):
    return jax.sharding.NamedSharding(mesh, P(*spec))

  def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place(*spec))

  def step(x, weights):
    y = jnp.maximum(x @ weights[0], 0) @ weights[1]
    return jax.lax.with_sharding_constraint(y, place("data", "tensor")), None

  compiled = (
      jax.jit(lambda x, *weights: jax.lax.scan(step, x, weights)[0])
      .trace(
          array((2, 2048, 4096), "data", "tensor"),
          array((3, 4096, 16384), None, None, "tensor"),
          array((3, 16384, 4096), None, "tensor"),
      )
      .lower()
      .compile()
  )
  items = cost.collectives(compiled.as_text(), mesh.shape)
  assert all(x.exact and x.axes == ("tensor",) for x in items), items
  assert "collective-permute" in {x.kind for x in items}, items
  # To gather the input and to scatter the output takes a ring seven steps; the
  # loops go both ways around, and each takes nine.
  steps = sum(x.total for x in items) / 3 / (2 * 2048 * 4096 * 2 / 8)
  assert 14 <= steps <= 18, items


def loops_and_branches() -> None:
  def sums(x, n, flag):
    total = lambda i, x: jnp.sin(jax.lax.psum(x, "data"))  # noqa: E731
    x = jax.lax.fori_loop(0, n, total, x)
    return jax.lax.cond(
        flag,
        lambda x: jnp.sin(jax.lax.psum(x, "tensor")),
        lambda x: jax.lax.fori_loop(
            0, 4, lambda i, x: jnp.sin(jax.lax.psum(x, "fsdp")), x
        ),
        x,
    )

  function = jax.shard_map(
      sums,
      mesh=MESH,
      in_specs=(P(ROWS), P(), P()),
      out_specs=P(ROWS),
      check_vma=False,
  )
  args = (
      array((4 * 64, 128), ROWS),
      array((), dtype=jnp.int32),
      array((), dtype=bool),
  )
  times = lambda items: [(x.axes, x.times, x.exact) for x in items]  # noqa: E731
  assert times(found(function, *args)) == [
      (("data",), 1, False),
      (("fsdp",), 4, True),
  ]
  assert times(found(function, *args, trips=9)) == [
      (("data",), 9, True),
      (("fsdp",), 4, True),
  ]


def replication() -> None:
  """From rows over two axes to columns over one of them and another.

  The partitioner replicates the whole array, or exchanges it somehow.
  """
  place = jax.sharding.NamedSharding(MESH, P(None, "tensor", "data"))

  def function(x):
    return jnp.sin(jax.lax.with_sharding_constraint(jnp.sin(x), place))

  x = array((8, 8, 8), ("data", "fsdp"))
  assert cost.audit(found(function, x, out_shardings=place), [], 0)
  assert not cost.audit(found(jnp.sin, x), [], 0)


if __name__ == "__main__":
  by_hand()
  sharded_layers()
  if PLATFORM == "tpu":
    product_in_a_loop()
  loops_and_branches()
  replication()
  print("OK")
