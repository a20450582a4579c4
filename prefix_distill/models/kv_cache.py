"""The keys and values of the positions seen so far."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of all layers, a pair of arrays for each.

  A ring of M columns. All rows write the same column at the same time, so one
  number serves the whole batch, and a row that starts later has its prompt
  laid into the columns before. What a row may look at is what `mask` says:
  order does not matter, since rotary positions are already in the keys.

  Attributes:
    keys: L arrays [B, K, H, M].
    values: L arrays [B, K, M, H].
    mask: bool [B, M], true at columns that hold a token of the row.
    written: int32 [], columns written so far; the next one is that modulo M.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  mask: jax.Array
  written: jax.Array

  @property
  def columns(self) -> int:
    return self.mask.shape[1]


def from_prefill(
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    columns: int,
    dtype: jnp.dtype,
) -> KVCache:
  """Builds a cache from the keys and values of whole prompts.

  Args:
    keys: [L, B, S, K, H], each row's S' real tokens first.
    values: the same.
    mask: bool [B, S], true on the last S' columns: the prompts as they are
      padded, on the left.
    columns: M, at least S.
    dtype: what the cache is kept in.

  Returns:
    A cache whose first S columns are the prompts, padded on the left.
  """
  length = mask.shape[1]
  source = jnp.arange(length) - (length - mask.sum(axis=1, keepdims=True))
  source = jnp.maximum(source, 0)
  room = columns - length

  def lay_out(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    x = x.astype(dtype)
    x = jnp.take_along_axis(x, source[None, :, :, None, None], axis=2)
    x = x.transpose(0, *(axis + 1 for axis in axes))
    padding = [(0, room if axis == 1 else 0) for axis in axes]
    return tuple(jnp.pad(part, padding) for part in x)

  return KVCache(
      keys=lay_out(keys, (0, 2, 3, 1)),
      values=lay_out(values, (0, 2, 1, 3)),
      mask=jnp.pad(mask, ((0, 0), (0, room))),
      written=jnp.array(length, jnp.int32),
  )


def repeat(cache: KVCache, times: int) -> KVCache:
  """Fans every row out to `times` neighbouring rows."""
  rows = (cache.keys, cache.values, cache.mask)
  return KVCache(
      *jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), rows),
      cache.written,
  )


def newest_numbers(newest: jax.Array, columns: int) -> jax.Array:
  """Returns which column, counted without wrapping, each place of a ring holds.

  Args:
    newest: int32 [], the number of the newest column.
    columns: M, of the ring.
  """
  return newest - (newest - jnp.arange(columns)) % columns


def resize(cache: KVCache, columns: int) -> KVCache:
  """Moves the newest columns into a ring of another size.

  Every row's tokens must fit into the smaller of the two.
  """
  number = newest_numbers(cache.written - 1, columns)
  kept = (number >= cache.written - cache.columns) & (number >= 0)
  layers = [
      resize_layer(columns, cache.written, *pair)
      for pair in zip(cache.keys, cache.values, strict=True)
  ]
  return KVCache(
      keys=tuple(keys for keys, _ in layers),
      values=tuple(values for _, values in layers),
      mask=jnp.take(cache.mask, number % cache.columns, axis=1) & kept,
      written=cache.written,
  )


def resize_layer(
    columns: int, written: jax.Array, keys: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Does that to one layer's keys [B, K, H, M] and values [B, K, M, H]."""
  source = newest_numbers(written - 1, columns) % keys.shape[3]
  return jnp.take(keys, source, axis=3), jnp.take(values, source, axis=2)


def insert(cache: KVCache, prompts: KVCache, slots: jax.Array) -> KVCache:
  """Gives rows to new prompts, laid into the columns just written.

  Args:
    cache: with M columns.
    prompts: as `from_prefill` returns it, [R, ...], with S <= M columns.
    slots: int32 [R], the rows to replace; B or more for a prompt that is not
      to be inserted.
  """
  # Which column of the prompt lies in each place of the ring; below 0, none.
  start = cache.written - prompts.columns
  number = newest_numbers(cache.written - 1, cache.columns) - start
  source = jnp.maximum(number, 0)

  def place(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    rows = jnp.take(new, source, axis=axis)
    return old.at[slots].set(rows, mode="drop")

  pairs = zip(cache.keys, prompts.keys, strict=True)
  keys = tuple(place(old, new, 3) for old, new in pairs)
  pairs = zip(cache.values, prompts.values, strict=True)
  values = tuple(place(old, new, 2) for old, new in pairs)
  mask = jnp.take(prompts.mask, source, axis=1) & (number >= 0)
  return KVCache(
      keys, values, cache.mask.at[slots].set(mask, mode="drop"), cache.written
  )


def write(
    cache: jax.Array, block: jax.Array, column: jax.Array, axis: int
) -> jax.Array:
  """Writes [B, T, K, H] to a layer's keys (axis 3) or values (axis 2)."""
  order = (0, 2, 3, 1) if axis == 3 else (0, 2, 1, 3)
  return jax.lax.dynamic_update_slice_in_dim(
      cache, block.astype(cache.dtype).transpose(order), column, axis
  )
