"""Prefill and decode: the student's answers, up to a cap.

Pure functions, each a program of its own. `prefill` reads the prompts and draws
every row's first token; `decode` draws a segment of so many more. No step looks
at what the device has computed: a segment's length is static, and the host
looks at the rows between segments. In evaluation, rows that have ended are then
given to new prompts until none is left (`slots`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from prefix_distill import sharding
from prefix_distill.models import attention
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

# Tokens between two looks at the rows. On a CPU to look costs nothing; on an
# accelerator the device waits meanwhile.
_SEGMENT = 64
_CPU_SEGMENT = 8


def segment(model: Model) -> int:
  """Returns how many tokens are drawn between two looks at the rows."""
  platform = attention.platform(model.mesh)
  return _CPU_SEGMENT if platform == "cpu" else _SEGMENT


@functools.cache
def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Returns the compiler's options for `decode` that it knows on a mesh.

  A GPU's products with few rows are split along what they sum over by default,
  and each then takes a second kernel to add up the parts. Whole, the residual
  is added in the product's own kernel.

  CUDA graphs need no option: XLA makes one of a loop's body by itself if no
  step of it looks at what the device has computed.
  """
  if attention.platform(mesh) not in ("gpu", "cuda"):
    return {}
  options = {"xla_gpu_experimental_force_split_k": 1}
  known = jax.jit(lambda x: x, compiler_options=options)
  number = jax.ShapeDtypeStruct((), jnp.float32)
  try:
    known.trace(sharding.placed(number, sharding.replicated(mesh))).lower(
    ).compile()
  except jax.errors.JaxRuntimeError:
    return {}  # An experimental option of one version may be gone in the next.
  return options


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
) -> tuple[DecodeState, Rollout]:
  """Reads each prompt once, fans it out and draws the first tokens.

  A row's draws depend on the key, the record's index and the rollout's number
  alone, not on its batch. Static: model, config, columns.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    columns: M, of the cache, S at least; see `decode_state.columns`.
    params: the weights.
    batch: prompts [B, S].
    key: of this update.
    draw: see `Draw`.

  Returns:
    B * per_prompt rows, those of one prompt next to each other, and their first
    tokens [B * per_prompt, 1].
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
  count = jnp.zeros(rows * n, jnp.int32)
  state = DecodeState(
      newest=count,
      count=count,
      live=jnp.ones(rows * n, bool),
      keys=token_choice.row_keys(key, numbers),
      cache=kv_cache.repeat(cache, n),
  )
  distribution = _distribution(model, config, params, hidden, draw)
  distribution = jnp.repeat(distribution, n, axis=0)
  state, first = _draw(model, config, state, distribution, draw)
  return state, jax.tree.map(lambda x: x[:, None], first)


def decode(
    model: Model,
    config: SamplerConfig,
    steps: int,
    params: Params,
    state: DecodeState,
    draw: Draw,
) -> tuple[DecodeState, Rollout]:
  """Draws a segment of tokens; a row that has ended gets padding.

  To be jitted with the state donated. Static: model, config, steps.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    steps: n, tokens of the segment.
    params: the weights, in `Model.decode_layout`.
    state: what was drawn so far, in a cache with room for n more, or for what
      the cap leaves.
    draw: see `Draw`.

  Returns:
    The rows, and the segment [B, n].
  """

  def step(state: DecodeState, _: None) -> tuple[DecodeState, Rollout]:
    hidden, cache = model.decode(
        params, state.newest, state.live, state.cache
    )
    distribution = _distribution(model, config, params, hidden, draw)
    state = dataclasses.replace(state, cache=cache)
    return _draw(model, config, state, distribution, draw)

  state, drawn = jax.lax.scan(step, state, None, length=steps)
  return state, jax.tree.map(lambda x: x.T, drawn)


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

  `prefill` and `decode` in turn, for when one program is wanted rather than one
  for each size of the cache. Static: model, config, length.
  """
  columns = decode_state.columns(
      model, config, batch.tokens.shape[1] + length
  )
  state, first = prefill(model, config, columns, params, batch, key, draw)
  _, drawn = decode(
      model, config, length - 1, model.decode_layout(params), state, draw
  )
  return jax.tree.map(
      lambda x, y: jnp.concatenate([x, y], axis=1), first, drawn
  )


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


def _draw(
    model: Model,
    config: SamplerConfig,
    state: DecodeState,
    distribution: jax.Array,
    draw: Draw,
) -> tuple[DecodeState, Rollout]:
  """Draws each live row's next token; returns it as a rollout of [B]."""
  keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
  allowed = token_choice.truncate(distribution, config.truncation)
  token = token_choice.choose(keys, allowed, draw.greedy, model.mesh)
  live = state.live
  token = jnp.where(live, token, config.pad_id)
  drawn = Rollout(
      token,
      live,
      *(
          jnp.where(live, token_choice.log_prob_of(token, x), 0.0)
          for x in (distribution, allowed)
      ),
  )
  count = state.count + live
  is_stop = jnp.isin(token, jnp.array(config.stop_ids, jnp.int32))
  state = dataclasses.replace(
      state,
      newest=token,
      count=count,
      live=live & ~is_stop & (count < draw.cap),
  )
  return state, drawn
