"""Rows in the middle of their answers, and what is done to all of them.

Nothing here runs the model; `sampler` does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.models import kv_cache
from prefix_distill.models.transformer import Model
from prefix_distill.rollout.token_choice import Truncation
from prefix_distill.structs import Rollout

# Columns: the least by which a cache grows. A power of two, of which a segment
# is a part.
LEAST_STEP = 128


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """What is static in a rollout; hashable.

  Attributes:
    stop_ids: tokens that end a row; each is sampled and kept, and is the last
      one that the mask covers.
    pad_id: what fills the columns after the end.
    num_tokens: real token ids; padded rows of the vocabulary are never drawn.
    per_prompt: rollouts for each prompt.
    truncation: which tokens may be drawn.
    cache_dtype: what keys and values are kept in, "float32", "bfloat16" or
      "int8"; empty for the model's compute dtype.
  """

  stop_ids: tuple[int, ...]
  pad_id: int
  num_tokens: int
  per_prompt: int = 1
  truncation: Truncation = Truncation()
  cache_dtype: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
  """What is traced in a rollout, so that another value does not compile again.

  Attributes:
    cap: int32 [], tokens after which a row ends; at least 1.
    temperature: float32 [], divides the logits.
    greedy: bool [], take the most probable token.
  """

  cap: jax.Array
  temperature: jax.Array
  greedy: jax.Array

  @classmethod
  def of(
      cls, cap: int, temperature: float = 1.0, greedy: bool = False
  ) -> "Draw":
    # NumPy's, so that a program may put them where it wants.
    return cls(
        np.asarray(cap, np.int32),
        np.asarray(temperature, np.float32),
        np.asarray(greedy),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Rows in the middle of their answers.

  Attributes:
    newest: int32 [B], the row's last token, which is not in the cache yet: the
      next step feeds it.
    count: int32 [B], tokens that the row has drawn.
    live: bool [B], false after a stop token or the cap.
    keys: [B], one key a row.
    cache: the prompt and all but the newest token.
  """

  newest: jax.Array
  count: jax.Array
  live: jax.Array
  keys: jax.Array
  cache: kv_cache.KVCache


def cache_dtype(model: Model, config: SamplerConfig) -> jnp.dtype:
  """Returns what keys and values are kept in."""
  return jnp.dtype(config.cache_dtype or model.dtype)


def columns(model: Model, config: SamplerConfig, needed: int) -> int:
  """Returns the columns of a cache that holds so many tokens a row."""
  unit = model.cache_kernel(cache_dtype(model, config)).unit
  return -(-needed // unit) * unit


def rooms(
    model: Model, config: SamplerConfig, prompt: int, length: int
) -> tuple[int, ...]:
  """Returns the sizes that a cache grows through as rows get longer.

  As columns behind the prompts. A kernel that reads all of the cache, however
  short the rows are, gets it in steps of an eighth; one that reads each row up
  to its length gets all of it at once.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    prompt: S.
    length: the longest answer.
  """
  kernel = model.cache_kernel(cache_dtype(model, config))
  sizes, room = [], LEAST_STEP
  while room < length and not kernel.reads_lengths:
    sizes.append(room)
    power = 2 ** ((prompt + room).bit_length() - 1)
    room += max(LEAST_STEP, power // 8)
  return (*sizes, length)


def empty(
    model: Model, config: SamplerConfig, rows: int, size: int, key: jax.Array
) -> DecodeState:
  """Returns rows that have ended, to be given to prompts by `insert`.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    rows: B.
    size: M, columns of the cache.
    key: any.
  """
  c, dtype = model.config, cache_dtype(model, config)
  return DecodeState(
      newest=jnp.zeros(rows, jnp.int32),
      count=jnp.zeros(rows, jnp.int32),
      live=jnp.zeros(rows, bool),
      keys=jax.random.split(key, rows),
      cache=kv_cache.empty(
          (rows, c.num_kv_heads, size, c.head_dim), c.num_layers, dtype,
          model.cache_kernel(dtype).layout,
      ),
  )  # fmt: skip


def state_shardings(model: Model, config: SamplerConfig) -> DecodeState:
  """Returns where a state lies on the model's mesh.

  Rows lie over the batch axes, and the cache's heads over `tensor`, if that
  divides them.
  """
  shapes = jax.eval_shape(
      lambda: empty(model, config, 1, 1, jax.random.key(0))
  )
  rows = sharding.batch_sharding(model.mesh)
  cache = model.cache_shardings(shapes.cache)
  return DecodeState(rows, rows, rows, rows, cache)


class Resizer:
  """Moves rows to a cache of another size, one layer after the other.

  So there is never more than one layer of the cache in both sizes, where one
  program for all of it would hold the old cache beside the new one.
  """

  def __init__(self, place: DecodeState):
    """Jits it.

    Args:
      place: see `state_shardings`.
    """
    self._place = place
    self._layer = jax.jit(
        kv_cache.resize_layer,
        static_argnums=(0, 1),
        out_shardings=place.cache.layers[0],
    )

  def shapes(self, state: DecodeState, size: int) -> DecodeState:
    """Returns shapes of the rows, from shapes, with so many columns."""
    cache = state.cache
    layers = tuple(
        jax.eval_shape(
            lambda x: kv_cache.resize_layer(cache.layout, size, x), layer
        )
        for layer in cache.layers
    )
    cache = dataclasses.replace(cache, layers=layers)
    state = dataclasses.replace(state, cache=cache)
    return sharding.placed(state, self._place)

  def __call__(self, state: DecodeState, size: int) -> DecodeState:
    """Returns the rows in a cache of so many columns; the old is deleted."""
    cache = state.cache
    if cache.columns == size:
      return state
    layers = []
    for layer in cache.layers:
      layers.append(self._layer(cache.layout, size, layer))
      for array in jax.tree.leaves(layer):
        array.delete()
    cache = dataclasses.replace(cache, layers=tuple(layers))
    return dataclasses.replace(state, cache=cache)


def insert(
    state: DecodeState, prompts: DecodeState, slots: jax.Array
) -> DecodeState:
  """Gives rows to new prompts; to be jitted with `state` donated.

  Args:
    state: B rows.
    prompts: R rows, straight from `prefill`, with at most as many columns.
    slots: int32 [R], the rows to replace; B or more for a prompt that is not
      to be inserted.
  """

  def row(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[slots].set(new, mode="drop")

  return DecodeState(
      newest=row(state.newest, prompts.newest),
      count=row(state.count, prompts.count),
      live=row(state.live, prompts.live),
      keys=row(state.keys, prompts.keys),
      cache=kv_cache.insert(state.cache, prompts.cache, slots),
  )


def start(length: int, pad_id: int, first: Rollout) -> Rollout:
  """Returns [B, length] that begins with the first tokens, then padding."""

  def lengthen(x: jax.Array, fill: int) -> jax.Array:
    room = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, room)), constant_values=fill)

  fills = Rollout(pad_id, False, 0, 0)
  return jax.tree.map(lengthen, first, fills)


def append(rollout: Rollout, drawn: Rollout, at: jax.Array) -> Rollout:
  """Writes a segment [B, n] to columns [at, at + n); the rollout is donated."""
  return jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=1),
      rollout, drawn,
  )  # fmt: skip
