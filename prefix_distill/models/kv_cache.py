"""The keys and values of the positions seen so far."""

import dataclasses

import jax
import jax.numpy as jnp

from prefix_distill.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of all layers.

  Column m of every row was written at the same time, so one index serves the
  whole batch; columns not yet written are masked by causality, and padding by
  `mask`.

  Attributes:
    keys: [L, B, M, K, H], with rotary positions applied.
    values: [L, B, M, K, H].
    mask: bool [B, M], true at columns that hold a token.
    length: int32 [], columns written so far.
  """

  keys: jax.Array
  values: jax.Array
  mask: jax.Array
  length: jax.Array


def empty(
    config: ModelConfig, batch: int, columns: int, dtype: jnp.dtype
) -> KVCache:
  """Returns a cache with room for `columns` positions and none written."""
  c = config
  shape = (c.num_layers, batch, columns, c.num_kv_heads, c.head_dim)
  return KVCache(
      keys=jnp.zeros(shape, dtype),
      values=jnp.zeros(shape, dtype),
      mask=jnp.zeros((batch, columns), bool),
      length=jnp.zeros((), jnp.int32),
  )


def repeat(cache: KVCache, times: int) -> KVCache:
  """Fans every row out to `times` neighbouring rows."""
  return KVCache(
      keys=jnp.repeat(cache.keys, times, axis=1),
      values=jnp.repeat(cache.values, times, axis=1),
      mask=jnp.repeat(cache.mask, times, axis=0),
      length=cache.length,
  )
