"""The key/value cache.

Every row is packed from the left: first its prompt, then its sampled tokens. So
the first `length` columns of a row are all that it attends to, rows of any
length share a batch, and a kernel needs only the lengths to skip the rest.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

_INT8_MAX = 127.0


@dataclasses.dataclass(frozen=True)
class Layout:
  """The order of a cache's axes, which its kernel chooses; hashable.

  Axes are letters as in an einsum: b rows, k key/value heads, m columns, h
  channels of a head.

  Attributes:
    keys, values: the axes of the keys and of the values.
  """

  keys: str
  values: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """One layer's keys and values; M columns.

  Attributes:
    keys, values: the axes B, K, M and H in the layout's order. An int8 entry
      times its scale is the number.
    key_scales, value_scales: float32 [B, K, M] for int8; None for other dtypes.
  """

  keys: jax.Array
  values: jax.Array
  key_scales: jax.Array | None = None
  value_scales: jax.Array | None = None

  def axes(self, layout: Layout) -> "LayerCache":
    """Returns the axes of each array, in the same tree."""
    scales = None if self.key_scales is None else "bkm"
    return LayerCache(layout.keys, layout.values, scales, scales)

  def map(
      self, layout: Layout, change: Callable[..., Any], *others: "LayerCache"
  ) -> "LayerCache":
    """Applies `change(axes, array, *other arrays)` to every array."""
    return jax.tree.map(change, self.axes(layout), self, *others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of all layers.

  Attributes:
    layers: a tuple, so that a loop over tokens writes each layer in place.
    lengths: int32 [B], how many columns of each row hold a token. The next
      token goes into the column with this number.
    layout: the order of the axes; static.
  """

  layers: tuple[LayerCache, ...]
  lengths: jax.Array
  layout: Layout = dataclasses.field(metadata={"static": True})

  @property
  def columns(self) -> int:
    return self.layers[0].keys.shape[self.layout.keys.index("m")]


def empty(
    shape: tuple[int, int, int, int],
    layers: int,
    dtype: jnp.dtype,
    layout: Layout,
) -> KVCache:
  """Returns a cache of empty rows; `shape` is (B, K, M, H)."""
  sizes = dict(zip("bkmh", shape, strict=True))

  def zeros(axes: str, dtype: jnp.dtype) -> jax.Array:
    return jnp.zeros([sizes[axis] for axis in axes], dtype)

  def layer() -> LayerCache:
    keys, values = (zeros(x, dtype) for x in (layout.keys, layout.values))
    if dtype != jnp.int8:
      return LayerCache(keys, values)
    scales = (zeros("bkm", jnp.float32) for _ in range(2))
    return LayerCache(keys, values, *scales)

  return KVCache(
      tuple(layer() for _ in range(layers)),
      jnp.zeros(shape[0], jnp.int32),
      layout,
  )


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rounds the last axis to int8: [..., H] to int8 [..., H] and scales [...].

  A scale for each head and position: the largest entry becomes 127.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX
  # The scale of all zeros is arbitrary.
  whole = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
  return whole.astype(jnp.int8), scale


def encode(
    keys: jax.Array, values: jax.Array, dtype: jnp.dtype
) -> LayerCache:
  """Converts keys and values [..., H] to the cache's dtype."""
  if dtype != jnp.int8:
    return LayerCache(keys.astype(dtype), values.astype(dtype))
  (keys, key_scales), (values, value_scales) = map(quantize, (keys, values))
  return LayerCache(keys, values, key_scales, value_scales)


def _lay_out(axes: str, block: jax.Array, given: str) -> jax.Array:
  """Transposes an array whose axes are `given` to the order of `axes`."""
  return jnp.transpose(block, [given.index(axis) for axis in axes])


def from_prefill(
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    columns: int,
    dtype: jnp.dtype,
    layout: Layout,
) -> KVCache:
  """Builds a cache from the keys and values of whole prompts.

  Args:
    keys: [L, B, S, K, H], each row's real tokens first.
    values: the same.
    lengths: int32 [B], the real tokens of each row.
    columns: M, at least S.
    dtype: the cache's dtype.
    layout: the cache's layout.
  """
  room = columns - keys.shape[2]

  def place(axes: str, block: jax.Array) -> jax.Array:
    block = _lay_out(axes, block, "bmkh"[: block.ndim])
    return jnp.pad(block, [(0, room if axis == "m" else 0) for axis in axes])

  def layer(i: int) -> LayerCache:
    kept = encode(keys[i], values[i], dtype)
    return kept.map(layout, place)

  layers = tuple(layer(i) for i in range(keys.shape[0]))
  return KVCache(layers, lengths.astype(jnp.int32), layout)


def repeat(cache: KVCache, times: int) -> KVCache:
  """Repeats every row, as `times` neighbouring rows."""

  def fan(axes: str, x: jax.Array) -> jax.Array:
    return jnp.repeat(x, times, axis=axes.index("b"))

  return KVCache(
      tuple(layer.map(cache.layout, fan) for layer in cache.layers),
      jnp.repeat(cache.lengths, times),
      cache.layout,
  )


def resize_layer(
    layout: Layout, columns: int, layer: LayerCache
) -> LayerCache:
  """Adds columns at the end of a layer, or cuts columns off."""

  def change(axes: str, x: jax.Array) -> jax.Array:
    axis = axes.index("m")
    x = jax.lax.slice_in_dim(x, 0, min(columns, x.shape[axis]), axis=axis)
    room = columns - x.shape[axis]
    return jnp.pad(x, [(0, room if a == "m" else 0) for a in axes])

  return layer.map(layout, change)


def insert(cache: KVCache, prompts: KVCache, slots: jax.Array) -> KVCache:
  """Replaces rows by new prompts.

  Args:
    cache: the cache, with M columns.
    prompts: a cache from `from_prefill`, [R, ...], with S <= M columns.
    slots: int32 [R], the rows to replace; B or more drops the prompt.
  """

  def place(axes: str, old: jax.Array, new: jax.Array) -> jax.Array:
    size = new.shape[axes.index("m")]
    where = {"b": slots, "m": slice(0, size)}
    index = tuple(where.get(axis, slice(None)) for axis in axes)
    return old.at[index].set(new, mode="drop")

  layers = tuple(
      old.map(cache.layout, place, new)
      for old, new in zip(cache.layers, prompts.layers, strict=True)
  )
  lengths = cache.lengths.at[slots].set(prompts.lengths, mode="drop")
  return KVCache(layers, lengths, cache.layout)


def write(
    layout: Layout,
    layer: LayerCache,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
) -> LayerCache:
  """Writes one token per row after the tokens that are there.

  Args:
    layout: the cache's layout.
    layer: a layer with one device's rows and heads.
    keys: [B, K, H], of the new tokens.
    values: [B, K, H], of the new tokens.
    lengths: int32 [B]; a full row does not change.
  """
  rows = jnp.arange(len(lengths))
  block = encode(keys, values, layer.keys.dtype)

  def put(axes: str, old: jax.Array, new: jax.Array) -> jax.Array:
    if axes.endswith("mh"):
      new = _lay_out(axes.replace("m", ""), new, "bkh")
      return _put_lines(old, new, lengths, axes.index("b"))
    where = {"b": rows, "m": lengths}
    index = tuple(where.get(axis, slice(None)) for axis in axes)
    return old.at[index].set(
        new, mode="drop", indices_are_sorted=True, unique_indices=True
    )

  return layer.map(layout, put, block)


def _put_lines(
    cache: jax.Array, block: jax.Array, lengths: jax.Array, axis: int
) -> jax.Array:
  """Writes a column of each row as lines of one matrix [... M, H].

  A TPU copies the whole cache for each token if it has to index two axes.

  Args:
    cache: [B, K, M, H] or [K, B, M, H].
    block: the new entries, without the axis M.
    lengths: int32 [B], the column of each row.
    axis: the axis B, 0 or 1.
  """
  first, second, columns, size = cache.shape
  line = jnp.arange(first * second).reshape(first, second) * columns
  at = jnp.expand_dims(lengths, 1 - axis)
  # A full row gets a line past the end, which is dropped.
  line = jnp.where(at < columns, line + at, first * second * columns)
  lines = cache.reshape(-1, size).at[line.reshape(-1)].set(
      block.reshape(-1, size), mode="drop", unique_indices=True
  )
  return lines.reshape(cache.shape)
