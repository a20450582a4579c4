"""Prefill and decode: the student's answers, up to a cap.

Pure functions, each a program of its own. `prefill` reads the prompts and draws
every row's first token; `decode` draws so many more. A rollout for training is
a prefill and a decode for each size of the cache; in evaluation, rows that have
ended are given to new prompts until none is left (`slots`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from prefix_distill.models import kv_cache
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import decode_state
from prefix_distill.rollout import token_choice
from prefix_distill.rollout.decode_state import DecodeState
from prefix_distill.rollout.decode_state import Draw
from prefix_distill.rollout.decode_state import SamplerConfig
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout


def repeat_prompts(times: int, batch: PromptBatch) -> PromptBatch:
  """Repeats each prompt for its rollouts, neighbours together: [B * times]."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), batch)


def prefill(
    model: Model,
    config: SamplerConfig,
    columns: int,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    draw: Draw,
) -> DecodeState:
  """Reads each prompt once, fans it out and draws the first tokens.

  A row's draws depend on the key, the record's index and the rollout's number
  alone, not on its batch. Static: model, config, columns.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    columns: M, of the cache, more than S.
    params: the weights.
    batch: prompts [B, S].
    key: of this update.
    draw: see `Draw`.

  Returns:
    B * per_prompt rows, those of one prompt next to each other.
  """
  rows, n = batch.tokens.shape[0], config.per_prompt
  hidden, cache = model.prefill(
      params, batch.tokens, batch.mask, columns, config.cache_dtype
  )
  numbers = jnp.concatenate(
      [
          jnp.repeat(batch.index.reshape(rows, -1), n, axis=0),
          jnp.tile(jnp.arange(n), rows)[:, None],
      ],
      axis=1,
  )
  shape = (rows * n, columns)
  state = DecodeState(
      tokens=jnp.full(shape, config.pad_id, jnp.int32),
      log_probs=jnp.zeros(shape),
      choice_log_probs=jnp.zeros(shape),
      count=jnp.zeros(rows * n, jnp.int32),
      live=jnp.ones(rows * n, bool),
      keys=token_choice.row_keys(key, numbers),
      cache=kv_cache.repeat(cache, n),
  )
  distribution = _distribution(model, config, params, hidden, draw)
  distribution = jnp.repeat(distribution, n, axis=0)
  return _append(model, config, state, distribution, draw)


def decode(
    model: Model,
    config: SamplerConfig,
    params: Params,
    state: DecodeState,
    draw: Draw,
    steps: jax.Array,
) -> DecodeState:
  """Draws more tokens; ends early when every row has ended.

  To be jitted with the state donated. Static: model, config.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    params: the weights, in `Model.decode_layout`.
    state: what was drawn so far, in a ring with room for more.
    draw: see `Draw`.
    steps: int32 [], how many tokens to draw at most.
  """
  def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
    done, state = carry
    return (done < steps) & jnp.any(state.live)

  def step(carry: tuple[jax.Array, DecodeState]):
    done, state = carry
    column = state.cache.written % state.cache.columns
    newest = jax.lax.dynamic_slice_in_dim(state.tokens, column, 1, axis=1)
    hidden, cache = model.decode(
        params, newest, state.live[:, None], state.cache
    )
    distribution = _distribution(model, config, params, hidden[:, 0], draw)
    state = dataclasses.replace(state, cache=cache)
    return done + 1, _append(model, config, state, distribution, draw)

  start = (jnp.zeros((), jnp.int32), state)
  return jax.lax.while_loop(go_on, step, start)[1]


def sample(
    model: Model,
    config: SamplerConfig,
    length: int,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    draw: Draw,
) -> Rollout:
  """Samples rollouts [B * per_prompt, length] as one pure function.

  `prefill`, `decode` and `rollout` in turn, for when one program is wanted
  rather than one for each size of the cache. Static: model, config, length.
  """
  prompt = batch.tokens.shape[1]
  state = prefill(model, config, prompt + length, params, batch, key, draw)
  state = decode(
      model, config, model.decode_layout(params), state, draw,
      jnp.minimum(draw.cap, length) - 1,
  )  # fmt: skip
  return decode_state.rollout(state, prompt, length)


def _distribution(
    model: Model,
    config: SamplerConfig,
    params: Params,
    hidden: jax.Array,
    draw: Draw,
) -> jax.Array:
  """Returns the next token's log-probabilities [B, V]."""
  logits = model.logits(params, hidden)
  return token_choice.log_probs(logits, draw.temperature, config.num_tokens)


def _append(
    model: Model,
    config: SamplerConfig,
    state: DecodeState,
    distribution: jax.Array,
    draw: Draw,
) -> DecodeState:
  """Draws each live row's next token and writes it down."""
  keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
  allowed = token_choice.truncate(distribution, config.truncation)
  token = token_choice.choose(keys, allowed, draw.greedy, model.mesh)
  live, column = state.live, state.cache.written % state.cache.columns

  def put(array: jax.Array, values: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        array, values[:, None], column, axis=1
    )

  count = state.count + live
  is_stop = jnp.isin(token, jnp.array(config.stop_ids, jnp.int32))
  return dataclasses.replace(
      state,
      tokens=put(state.tokens, jnp.where(live, token, config.pad_id)),
      log_probs=put(
          state.log_probs, token_choice.log_prob_of(token, distribution)
      ),
      choice_log_probs=put(
          state.choice_log_probs, token_choice.log_prob_of(token, allowed)
      ),
      count=count,
      live=live & ~is_stop & (count < draw.cap),
  )
