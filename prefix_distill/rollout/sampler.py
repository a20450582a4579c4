"""Prefill and decode: the student's answers, up to a cap."""

import dataclasses

import jax
import jax.numpy as jnp

from prefix_distill.models import kv_cache
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import token_choice
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """What is static in a rollout; hashable.

  Attributes:
    length: P, columns of the result; the cap may be lower.
    per_prompt: rollouts for each prompt.
    temperature: divides the logits.
    greedy: take the most probable token.
    stop_ids: tokens that end a row; each is sampled and kept, and is the last
      one that the mask covers.
    pad_id: what fills the columns after the end.
    num_tokens: real token ids; padded rows of the vocabulary are never drawn.
  """

  length: int
  stop_ids: tuple[int, ...]
  pad_id: int
  num_tokens: int
  per_prompt: int = 1
  temperature: float = 1.0
  greedy: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """The loop's state after `step` tokens.

  Attributes:
    step: int32 [], columns of tokens written.
    tokens, log_probs, mask: [B, P]; columns from `step` on are padding.
    done: bool [B], whether the row has drawn a stop token.
    next_log_probs: [B, V], the distribution of column `step`.
    cache: holds the prompt and the columns before `step`.
  """

  step: jax.Array
  tokens: jax.Array
  log_probs: jax.Array
  mask: jax.Array
  done: jax.Array
  next_log_probs: jax.Array
  cache: kv_cache.KVCache


def repeat_prompts(batch: PromptBatch, times: int) -> PromptBatch:
  """Repeats each prompt for its rollouts, neighbours together: [B * times]."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), batch)


def sample(
    model: Model,
    config: SamplerConfig,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    cap: jax.Array,
) -> Rollout:
  """Samples answers; a pure function to be jitted with model, config static.

  The prompt is prefilled once and fanned out to its rollouts. Decoding ends at
  the cap or when every row has stopped. A row's draws depend on the key, the
  record's index and the rollout's number alone, not on its batch.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    params: the weights.
    batch: prompts [B, S].
    key: of this update.
    cap: int32 [], at most `config.length`: rows end after so many tokens. It
      is traced, so a new cap does not compile again.

  Returns:
    B * per_prompt rollouts [., P], those of one prompt next to each other.
  """
  rows, n = batch.tokens.shape[0], config.per_prompt
  columns = batch.tokens.shape[1] + config.length
  cache = kv_cache.empty(model.config, rows, columns, model.dtype)
  hidden, cache = model.apply(params, batch.tokens, batch.mask, cache)
  first = _next(model, config, params, hidden[:, -1])
  total = rows * n
  numbers = jnp.stack(
      [jnp.repeat(batch.index, n), jnp.tile(jnp.arange(n), rows)], axis=1
  )
  keys = token_choice.row_keys(key, numbers)
  stops = jnp.array(config.stop_ids, jnp.int32)

  def go_on(state: _State) -> jax.Array:
    return (state.step < cap) & ~jnp.all(state.done)

  def step(state: _State) -> _State:
    at = state.step
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
    token, log_prob = token_choice.choose(
        step_keys, state.next_log_probs, config.greedy
    )
    live = ~state.done
    token = jnp.where(live, token, config.pad_id)
    hidden, cache = model.apply(
        params, token[:, None], live[:, None], state.cache
    )
    return _State(
        step=at + 1,
        tokens=state.tokens.at[:, at].set(token),
        log_probs=state.log_probs.at[:, at].set(jnp.where(live, log_prob, 0)),
        mask=state.mask.at[:, at].set(live),
        done=state.done | jnp.isin(token, stops),
        next_log_probs=_next(model, config, params, hidden[:, -1]),
        cache=cache,
    )

  state = _State(
      step=jnp.zeros((), jnp.int32),
      tokens=jnp.full((total, config.length), config.pad_id, jnp.int32),
      log_probs=jnp.zeros((total, config.length)),
      mask=jnp.zeros((total, config.length), bool),
      done=jnp.zeros((total,), bool),
      next_log_probs=jnp.repeat(first, n, axis=0),
      cache=kv_cache.repeat(cache, n),
  )
  state = jax.lax.while_loop(go_on, step, state)
  return Rollout(state.tokens, state.mask, state.log_probs)


def _next(
    model: Model, config: SamplerConfig, params: Params, hidden: jax.Array
) -> jax.Array:
  """Returns the next token's log-probabilities [B, V]."""
  return token_choice.log_probs(
      model.logits(params, hidden), config.temperature, config.num_tokens
  )
