"""The devices, their mesh, and one table that shards the parameters."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
import os
import pathlib
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
import numpy as np

from prefix_distill.config import MeshSpec
from prefix_distill.errors import ConfigError

PartitionSpec = jax.sharding.PartitionSpec

# Both axes split batches: fsdp shards weights *and* batch (ZeRO-3).
BATCH_AXES = ("data", "fsdp")

# Parameter path -> the mesh axes of its dimensions. The first match counts. The
# first dimension of a layer's parameter is the stack of layers. A dimension is
# not split if the mesh axis does not divide it, such as 2 key/value heads on
# tensor=4.
RULES = (
    (r"(embed|head)/weight$", ("tensor", "fsdp")),
    (r"attention/(query|key|value)$", (None, "tensor", None, "fsdp")),
    (r"attention/(query|key|value)_bias$", (None, "tensor", None)),
    (r"attention/out$", (None, "fsdp", "tensor", None)),
    (r"mlp/(gate|up)$", (None, "tensor", "fsdp")),
    (r"mlp/down$", (None, "fsdp", "tensor")),
    # Adapters, along the axes of the product that they belong to.
    (r"(attention/(query|key|value)|mlp/(gate|up))_a$", (None, None, "fsdp")),
    (r"attention/(query|key|value)_b$", (None, "tensor", None, None)),
    (r"mlp/(gate|up)_b$", (None, "tensor", None)),
    (r"attention/out_a$", (None, None, "tensor", None)),
    (r"mlp/down_a$", (None, None, "tensor")),
    (r"(attention/out|mlp/down)_b$", (None, "fsdp", None)),
    (r"norm/scale$", ()),
)

# NVIDIA's Ampere. Turing (T4, 7.5) and Volta (V100, 7.0) lack bfloat16 and
# cuDNN's flash attention.
_AMPERE = (8, 0)
# As PCI knows Google, whose network cards are among its devices, and its TPUs:
# v3, v4, v5p, v5e, v6e and 7x.
_GOOGLE = "0x1ae0"
_TPU_CARDS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
_HOST = "pinned_host"


def _compute_capability(device: jax.Device) -> tuple[int, int] | None:
  """Returns an NVIDIA GPU's compute capability; None for other devices.

  AMD's GPUs also have the platform "gpu", but a capability such as "gfx90a".
  The device may belong to a topology that is only compiled for.
  """
  if device.platform not in ("gpu", "cuda"):
    return None
  text = str(getattr(device, "compute_capability", ""))
  found = re.fullmatch(r"(\d+)\.(\d+)[a-z]?", text)
  return (int(found[1]), int(found[2])) if found else None


def has_bfloat16(device: jax.Device) -> bool:
  """Whether the device computes in bfloat16; True if that is unknown.

  XLA falls back to float32 on devices without bfloat16, which is correct but
  slow. So an unknown device keeps the user's setting and its memory use.
  """
  capability = _compute_capability(device)
  return capability is None or capability >= _AMPERE


def has_cudnn_attention(device: jax.Device) -> bool:
  """Whether the device runs cuDNN's flash attention; False if unknown.

  Without it a program that uses it does not compile; plain XLA always does.
  """
  capability = _compute_capability(device)
  return capability is not None and capability >= _AMPERE


def first_without(
    has: Callable[[jax.Device], bool], mesh: jax.sharding.Mesh
) -> jax.Device | None:
  """Returns the first device of a mesh for which `has` is false; or None."""
  return next((d for d in mesh.devices.flat if not has(d)), None)


def describe_device(device: jax.Device) -> str:
  """Returns "Tesla T4 (compute capability 7.5)"."""
  capability = _compute_capability(device)
  if capability is None:
    return device.device_kind
  major, minor = capability
  return f"{device.device_kind} (compute capability {major}.{minor})"


def describe_devices() -> str:
  """Returns what all processes compute on: "8 x NVIDIA H100"."""
  devices = jax.devices()
  return f"{len(devices)} x {describe_device(devices[0])}"


def unused_accelerator(root: pathlib.Path = pathlib.Path("/")) -> str:
  """Says that an accelerator of this machine is idle; empty if none is.

  JAX without the plugin of a GPU or TPU computes on the CPU and says nothing.

  Args:
    root: of the file system that is looked at.
  """
  asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
  if asked or jax.default_backend() != "cpu":
    return ""
  if (root / "proc/driver/nvidia/version").exists():
    name, extra = "an NVIDIA GPU", "cuda13] or [cuda12"
  elif (root / "dev/accel0").exists() or _has_tpu_card(root):
    name, extra = "a TPU", "tpu"
  else:
    return ""
  return (
      f"This machine has {name}, but JAX does not see it and computes on the"
      f" CPU; install the extra [{extra}], with one version of jax, jaxlib and"
      " the plugin (JAX_PLATFORMS=cpu if the CPU is meant)."
  )


def _has_tpu_card(root: pathlib.Path) -> bool:
  """Returns whether a PCI device is a TPU; newer TPUs lack /dev/accel0."""
  return any(
      _GOOGLE in file.read_text()
      and (file.parent / "device").read_text().strip() in _TPU_CARDS
      for file in root.glob("sys/bus/pci/devices/*/vendor")
  )


def make_mesh(
    spec: MeshSpec, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Builds the `(data, fsdp, tensor)` mesh over all devices.

  The network between the slices of a TPU pod is slow, and the data axis sends
  little. So only the data axis crosses slices; fsdp and tensor stay inside one.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or the
      data axis does not split over the slices.
  """
  devices = jax.devices() if devices is None else devices
  count, full = len(devices), spec.filled(len(devices))
  shape = (full.data, full.fsdp, full.tensor)
  if math.prod(shape) != count:
    raise ConfigError(
        f"mesh data x fsdp x tensor is {spec.data} x {spec.fsdp} x"
        f" {spec.tensor}, which does not fill the {count} devices here; change"
        " mesh so that the product is the number of devices (-1 takes those"
        " that the other two leave)."
    )
  names, kinds = ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
  # GPUs also have a slice index, one for each host, but their order suffices.
  slices = {
      getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"
  }
  if len(slices) > 1:
    grid = _over_slices(shape, len(slices), devices)
    return jax.sharding.Mesh(grid, names, axis_types=kinds)
  return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def _over_slices(
    shape: tuple[int, int, int], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
  """Returns the grid of devices, with the slices along the data axis."""
  data, fsdp, tensor = shape
  if data % slices:
    raise ConfigError(
        f"mesh data x fsdp x tensor is {data} x {fsdp} x {tensor} on {slices}"
        " slices, and the data axis has to split evenly over them; make"
        f" mesh.data a multiple of {slices}, so that mesh.fsdp x mesh.tensor"
        f" fits into the {len(devices) // slices} devices of a slice."
    )
  return mesh_utils.create_hybrid_device_mesh(
      (data // slices, fsdp, tensor),
      (slices, 1, 1),
      devices,
      allow_split_physical_axes=True,
  )


def sampling_mesh(
    mesh: jax.sharding.Mesh, spec: MeshSpec
) -> jax.sharding.Mesh:
  """Returns the mesh of sampling: the same devices in the same order.

  Its tensor axis has `mesh.sampling_tensor` devices, and its fsdp axis has the
  other devices of a replica.
  """
  tensor = spec.sampling_tensor or mesh.shape["tensor"]
  grid = mesh.devices.reshape(mesh.shape["data"], -1, tensor)
  return jax.sharding.Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)


def check_batch(name: str, rows: int, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError unless a batch splits evenly over the mesh."""
  shards = batch_shards(mesh)
  if rows % shards:
    raise ConfigError(
        f"{name} is {rows}, which is not divisible by {shards} (mesh data x"
        f" fsdp = {shards}); set it to {math.ceil(rows / shards) * shards}."
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of a batch: rows over the data and fsdp axes."""
  return jax.sharding.NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
  """Returns "layers/mlp/up" for a tree path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(
    name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> PartitionSpec:
  """Returns a parameter's partition by `RULES`.

  Raises:
    KeyError: no rule matches.
  """
  for pattern, axes in RULES:
    if re.search(pattern, name):
      # A single layer lacks the dimension of the stack.
      axes = axes[max(len(axes) - len(shape), 0) :]
      return PartitionSpec(*(
          axis if axis and shape[i] % mesh.shape[axis] == 0 else None
          for i, axis in enumerate(axes)
      ))
  raise KeyError(f"No sharding rule matches the parameter {name}.")


def param_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns a tree of shardings for a tree of parameter shapes.

  Trees that contain the parameters, such as an optimizer's moments, also work,
  since rules match the end of a path. Scalars are replicated.
  """

  def sharding(path, leaf):
    spec = PartitionSpec()
    if leaf.ndim:
      spec = partition(path_name(path), leaf.shape, mesh)
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, abstract)


def with_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Adds `param_shardings` to a tree of shapes."""
  return placed(abstract, param_shardings(abstract, mesh))


def of(tree: Any) -> Any:
  """Returns the shardings of a tree of arrays, or of their shapes."""
  return jax.tree.map(lambda x: x.sharding, tree)


def placed(shapes: Any, places: Any) -> Any:
  """Adds shardings; their tree may be a prefix of the tree of shapes."""

  def place_all(place, tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )

  return jax.tree.map(place_all, places, shapes)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
  return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(
    mesh: jax.sharding.Mesh, spec: PartitionSpec, x: jax.Array
) -> jax.Array:
  """Gathers a weight over `fsdp`, and scatters its gradient.

  Without this rule the partitioner gathers the weight twice in the backward
  pass: for the layer's recomputation and for its derivative. It may also sum
  whole gradients before it splits them.
  """
  place = jax.sharding.NamedSharding(mesh, _without_fsdp(spec))
  return jax.lax.with_sharding_constraint(x, place)


def _scatter(
    mesh: jax.sharding.Mesh, spec: PartitionSpec, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
  place = jax.sharding.NamedSharding(mesh, spec)
  return (jax.lax.with_sharding_constraint(gradient, place),)


_gather.defvjp(lambda mesh, spec, x: (_gather(mesh, spec, x), None), _scatter)


def gather_layer(layer: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Gathers one layer's weights over `fsdp`.

  Args:
    layer: the layer's parameters in the dtype to send, without the dimension of
      the stack.
    mesh: the device mesh; None for one device.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return layer

  def gather(path, x):
    spec = partition(path_name(path), x.shape, mesh)
    return _gather(mesh, spec, x) if "fsdp" in spec else x

  return jax.tree_util.tree_map_with_path(gather, layer)


def decode_params(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the weights' shardings in decoding: not split over `fsdp`.

  A token needs all weights. Gathering them takes longer than using them, so
  they are gathered once per rollout and not once per token.
  """

  def gathered(sharding: jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(mesh, _without_fsdp(sharding.spec))

  return jax.tree.map(gathered, param_shardings(abstract, mesh))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Returns the number of shards of a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def on_host(shardings: Any) -> Any:
  """Returns the same shardings in the memory of the devices' hosts."""
  return jax.tree.map(lambda s: s.with_memory_kind(_HOST), shardings)


def is_on_host(sharding: jax.sharding.Sharding) -> bool:
  """Whether an array lies in the memory of the devices' hosts."""
  return sharding.memory_kind == _HOST


def on_device(shardings: Any) -> Any:
  """Returns the same shardings in the devices' own memory."""
  return jax.tree.map(
      lambda s: jax.sharding.NamedSharding(s.mesh, s.spec), shardings
  )


def moved(move: Callable[[Any], Any], abstract: Any) -> Any:
  """Applies `on_host` or `on_device` to a tree of shapes with shardings."""
  return placed(abstract, move(of(abstract)))


def is_abstract(tree: Any) -> bool:
  """Whether a tree holds shapes and not arrays."""
  return any(
      isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)
  )


def put(tree: Any, places: Any) -> Any:
  """Moves arrays to other places; of shapes, says that they lie there."""
  if is_abstract(tree):
    return placed(tree, places)
  return jax.device_put(tree, places)


def replicate_key(key: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Puts a key that all processes have, or its shape, onto all devices."""
  if is_abstract(key):
    return placed(key, replicated(mesh))
  data = np.asarray(jax.random.key_data(key))
  everywhere = jax.make_array_from_callback(
      data.shape, replicated(mesh), lambda index: data[index]
  )
  return jax.random.wrap_key_data(everywhere, impl=jax.random.key_impl(key))


def global_batch(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Makes global arrays of batches that every process has whole.

  Each device takes its rows. So the number of processes does not matter, nor
  which mesh axes cross processes.

  Args:
    tree: arrays [B, ...], the same in all processes; or their shapes.
    mesh: the device mesh; rows lie over its data and fsdp axes.
  """
  rows = batch_sharding(mesh)
  if is_abstract(tree):
    return placed(tree, rows)

  def spread(x: Any) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, rows, lambda i: x[i])

  return jax.tree.map(spread, tree)


def to_host(tree: Any) -> Any:
  """Brings whole arrays to every process, as NumPy; every process calls it."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  everywhere = jax.tree.map(
      lambda x: jax.sharding.NamedSharding(
          x.sharding.mesh, PartitionSpec(), memory_kind=x.sharding.memory_kind
      ),
      tree,
  )
  # One program for all, and the same one for the same shapes.
  tree = jax.jit(_identity, out_shardings=everywhere)(tree)
  return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def _identity(tree: Any) -> Any:
  return tree


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes of arrays or shapes on each device.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`; without a sharding, a device has the
      whole array.
  """

  def size(x) -> int:
    place = getattr(x, "sharding", None)
    shape = place.shard_shape(x.shape) if place else x.shape
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def memory(mesh: jax.sharding.Mesh) -> float | None:
  """Returns the bytes that programs may use on a device; None for no limit."""
  every = list(mesh.devices.flat)
  mine = [d for d in every if d.process_index == jax.process_index()]
  device = (mine or every)[0]
  stats = None if device.platform == "cpu" else device.memory_stats()
  return float(stats["bytes_limit"]) if stats else None
