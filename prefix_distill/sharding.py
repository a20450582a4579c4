"""The device mesh, and the one table that says how parameters lie on it."""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
import numpy as np

from prefix_distill.errors import ConfigError
from prefix_distill.specs import MeshSpec

PartitionSpec = jax.sharding.PartitionSpec

# Batches are split over both: fsdp shards weights *and* batch (ZeRO-3).
BATCH_AXES = ("data", "fsdp")

# Parameter path -> how its axes are split. The first match counts; the layers'
# leading axis is the stack of layers. An axis that a dimension does not divide
# is left whole (2 key/value heads on tensor=4, say).
RULES = (
    (r"(embed|head)/weight$", ("tensor", "fsdp")),
    (r"attention/(query|key|value)$", (None, "tensor", None, "fsdp")),
    (r"attention/(query|key|value)_bias$", (None, "tensor", None)),
    (r"attention/out$", (None, "fsdp", "tensor", None)),
    (r"mlp/(gate|up)$", (None, "tensor", "fsdp")),
    (r"mlp/down$", (None, "fsdp", "tensor")),
    (r"norm/scale$", ()),
)


def make_mesh(
    spec: MeshSpec, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Builds the `(data, fsdp, tensor)` mesh over all devices.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count, rest = len(devices), spec.fsdp * spec.tensor
  data = count // rest if spec.data == -1 else spec.data
  if data * rest != count:
    raise ConfigError(
        f"mesh data x fsdp x tensor is {spec.data} x {spec.fsdp} x"
        f" {spec.tensor}, which does not fill the {count} devices here; change"
        " mesh so that the product is the number of devices."
    )
  return jax.make_mesh(
      (data, spec.fsdp, spec.tensor),
      ("data", "fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
      devices=devices,
  )


def check_batch(
    name: str, rows: int, mesh: jax.sharding.Mesh, accumulation: int = 1
) -> None:
  """Raises ConfigError unless a batch splits evenly over the mesh."""
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * accumulation
  if rows % shards:
    parts = f"mesh data x fsdp = {shards // accumulation}"
    if accumulation > 1:
      parts += f" times optimizer.accumulation = {accumulation}"
    raise ConfigError(
        f"{name} is {rows}, which is not divisible by {shards} ({parts});"
        f" set it to {math.ceil(rows / shards) * shards}."
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Rows over the data and fsdp axes."""
  return jax.sharding.NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
  """Returns "layers/mlp/up" for a tree path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(
    name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> PartitionSpec:
  """Looks a parameter up in `RULES`.

  Raises:
    KeyError: no rule matches, so the table lacks one.
  """
  for pattern, axes in RULES:
    if re.search(pattern, name):
      # A layer apart from the stack lacks the first axis.
      axes = axes[max(len(axes) - len(shape), 0) :]
      return PartitionSpec(*(
          axis if axis and shape[i] % mesh.shape[axis] == 0 else None
          for i, axis in enumerate(axes)
      ))
  raise KeyError(f"No sharding rule matches the parameter {name}.")


def param_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns a tree of shardings for a tree of parameter shapes.

  Trees that contain the parameters, such as an optimizer's moments, work too,
  for rules match the end of a path; scalars are replicated.
  """

  def sharding(path, leaf):
    spec = PartitionSpec()
    if leaf.ndim:
      spec = partition(path_name(path), leaf.shape, mesh)
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, abstract)


def with_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Adds `param_shardings` to a tree of shapes."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract,
      param_shardings(abstract, mesh),
  )


def decode_params(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns where weights lie while decoding: not split over `fsdp`.

  A token needs all weights, and to gather them for every token would take
  longer than to use them; so they are gathered once a rollout.
  """

  def gathered(sharding: jax.sharding.NamedSharding):
    axes = (None if axis == "fsdp" else axis for axis in sharding.spec)
    return jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree.map(gathered, param_shardings(abstract, mesh))


def replicate_key(key: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Puts a key that all processes have onto all devices."""
  data = np.asarray(jax.random.key_data(key))
  everywhere = jax.make_array_from_callback(
      data.shape, replicated(mesh), lambda index: data[index]
  )
  return jax.random.wrap_key_data(everywhere, impl=jax.random.key_impl(key))


def global_batch(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Makes global arrays of each process's own rows, in process order."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
          sharding, np.asarray(x)
      ),
      tree,
  )
