"""Rows in the middle of their answers, and what is done to all of them.

Nothing here runs the model; `sampler` does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.models import kv_cache
from prefix_distill.models.config import ModelConfig
from prefix_distill.rollout.token_choice import Truncation
from prefix_distill.structs import Rollout


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
    cache_dtype: what keys and values are kept in; empty for the model's
      compute dtype.
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

  The newest token of every row is not in the cache yet: the next step feeds
  it, to column `cache.written`, where `tokens` has it already.

  Attributes:
    tokens: int32 [B, M], aligned with the cache's ring; columns of the prompts
      are not filled in.
    log_probs: float32 [B, M], under the model's distribution at the
      temperature.
    choice_log_probs: float32 [B, M], under the distribution that was drawn
      from, which truncation makes another one.
    count: int32 [B], tokens that the row has drawn.
    live: bool [B], false after a stop token or the cap.
    keys: [B], one key a row.
    cache: the prompt and all but the newest token.
  """

  tokens: jax.Array
  log_probs: jax.Array
  choice_log_probs: jax.Array
  count: jax.Array
  live: jax.Array
  keys: jax.Array
  cache: kv_cache.KVCache


def state_shardings(
    num_kv_heads: int, mesh: jax.sharding.Mesh
) -> DecodeState:
  """Returns where a state lies: rows over the batch axes, and the cache's
  heads over `tensor`, if that divides them.
  """
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  heads = "tensor" if num_kv_heads % mesh.shape["tensor"] == 0 else None
  spec = sharding.PartitionSpec(sharding.BATCH_AXES, heads)
  cache = jax.sharding.NamedSharding(mesh, spec)
  return DecodeState(
      tokens=rows,
      log_probs=rows,
      choice_log_probs=rows,
      count=rows,
      live=rows,
      keys=rows,
      cache=kv_cache.KVCache(cache, cache, rows, whole),
  )


def count(steps: int) -> np.ndarray:
  """Makes a traced argument of a number of steps."""
  return np.asarray(steps, np.int32)


def empty(
    model: ModelConfig,
    dtype: jnp.dtype,
    shape: tuple[int, int],
    prompt: int,
    key: jax.Array,
) -> DecodeState:
  """Returns rows that have ended, to be given to prompts by `insert`.

  Args:
    model: the architecture.
    dtype: of the cache.
    shape: B and M.
    prompt: S, columns that the ring has behind it.
    key: any.
  """
  c, (rows, columns) = model, shape
  heads = (rows, c.num_kv_heads)
  return DecodeState(
      tokens=jnp.zeros(shape, jnp.int32),
      log_probs=jnp.zeros(shape),
      choice_log_probs=jnp.zeros(shape),
      count=jnp.zeros(rows, jnp.int32),
      live=jnp.zeros(rows, bool),
      keys=jax.random.split(key, rows),
      cache=kv_cache.KVCache(
          keys=tuple(
              jnp.zeros((*heads, c.head_dim, columns), dtype)
              for _ in range(c.num_layers)
          ),
          values=tuple(
              jnp.zeros((*heads, columns, c.head_dim), dtype)
              for _ in range(c.num_layers)
          ),
          mask=jnp.zeros(shape, bool),
          written=jnp.array(prompt, jnp.int32),
      ),
  )


def read(
    state: DecodeState, first: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns what the host looks at between two segments.

  Args:
    state: the rows.
    first: int32 [], the first column to return, counted without wrapping.
    width: of how many columns.

  Returns:
    Tokens [B, width], how many each row has drawn and whether it is live [B],
    and the number of the newest column.
  """
  columns = (first + jnp.arange(width)) % state.cache.columns
  tokens = jnp.take(state.tokens, columns, axis=1)
  return tokens, state.count, state.live, state.cache.written


def resize(state: DecodeState, columns: int) -> DecodeState:
  """Moves the rows to a ring of another size; see `Resizer`."""
  ring = state.cache.columns
  source = kv_cache.newest_numbers(state.cache.written, columns) % ring
  tokens, log_probs, choices = (
      jnp.take(x, source, axis=1)
      for x in (state.tokens, state.log_probs, state.choice_log_probs)
  )
  return dataclasses.replace(
      state,
      tokens=tokens,
      log_probs=log_probs,
      choice_log_probs=choices,
      cache=kv_cache.resize(state.cache, columns),
  )


class Resizer:
  """Moves rows to a ring of another size, one layer after the other.

  So there is never more than one layer of the cache in both sizes, where one
  program for all of it would hold the old cache beside the new one.
  """

  def __init__(self, place: DecodeState):
    """Jits the parts.

    Args:
      place: see `state_shardings`.
    """
    self._place = place
    keys, values = place.cache.keys, place.cache.values
    self._layer = jax.jit(
        kv_cache.resize_layer, static_argnums=0, out_shardings=(keys, values)
    )
    self._rest = jax.jit(resize, static_argnums=1, out_shardings=place)

  def shapes(self, state: DecodeState, columns: int) -> DecodeState:
    """Returns shapes of the rows, from shapes, in such a ring."""
    sizes = jax.eval_shape(lambda s: resize(s, columns), state)
    return sharding.placed(sizes, self._place)

  def __call__(self, state: DecodeState, columns: int) -> DecodeState:
    """Returns the rows in a ring of so many columns; the old are deleted."""
    cache = state.cache
    if cache.columns == columns:
      return state
    layers = []
    for pair in zip(cache.keys, cache.values, strict=True):
      layers.append(self._layer(columns, cache.written, *pair))
      for array in pair:
        array.delete()
    rest = dataclasses.replace(cache, keys=(), values=())
    state = self._rest(dataclasses.replace(state, cache=rest), columns)
    cache = dataclasses.replace(
        state.cache,
        keys=tuple(keys for keys, _ in layers),
        values=tuple(values for _, values in layers),
    )
    return dataclasses.replace(state, cache=cache)


def insert(
    state: DecodeState, prompts: DecodeState, slots: jax.Array
) -> DecodeState:
  """Gives rows to new prompts; to be jitted with `state` donated.

  Args:
    state: B rows.
    prompts: R rows, straight from `prefill` with S + 1 columns.
    slots: int32 [R], the rows to replace; B or more for a prompt that is not
      to be inserted.
  """
  column = state.cache.written % state.cache.columns
  first = prompts.tokens.shape[1] - 1

  def newest(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[slots, column].set(new[:, first], mode="drop")

  def row(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[slots].set(new, mode="drop")

  # Its last column is for the first token, which is not in the cache yet.
  size = prompts.cache.columns - 1
  prompt_cache = dataclasses.replace(
      prompts.cache,
      keys=tuple(x[..., :size] for x in prompts.cache.keys),
      values=tuple(x[:, :, :size] for x in prompts.cache.values),
      mask=prompts.cache.mask[:, :size],
  )
  return DecodeState(
      tokens=newest(state.tokens, prompts.tokens),
      log_probs=newest(state.log_probs, prompts.log_probs),
      choice_log_probs=newest(
          state.choice_log_probs, prompts.choice_log_probs
      ),
      count=row(state.count, prompts.count),
      live=row(state.live, prompts.live),
      keys=row(state.keys, prompts.keys),
      cache=kv_cache.insert(state.cache, prompt_cache, slots),
  )


def rollout(state: DecodeState, prompt: int, length: int) -> Rollout:
  """Cuts the answers out of rows that all started together.

  Args:
    state: never resized to fewer columns than were written.
    prompt: S, the prompts' columns.
    length: P of the result.
  """
  mask = jnp.arange(length) < state.count[:, None]

  def cut(x: jax.Array) -> jax.Array:
    return x[:, prompt : prompt + length]

  return Rollout(
      tokens=cut(state.tokens),
      mask=mask,
      log_probs=jnp.where(mask, cut(state.log_probs), 0),
      choice_log_probs=jnp.where(mask, cut(state.choice_log_probs), 0),
  )


