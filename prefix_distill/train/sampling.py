"""The compiled programs of sampling: prefill, then decode bucket by bucket."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from prefix_distill import sharding
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import decode_state
from prefix_distill.rollout import sampler
from prefix_distill.rollout.token_choice import Truncation
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import setup as setup_lib
from prefix_distill.train.compile import Program
from prefix_distill.train.compile import Stage


class Sampling:
  """Samples prefixes with one model; compiles once for each bucket."""

  def __init__(
      self, setup: setup_lib.Setup, model: Model, buckets: tuple[int, ...]
  ):
    self._mesh, self._model, self._buckets = setup.mesh, model, buckets
    spec = setup.config.rollout
    self._temperature = spec.temperature
    self._config = decode_state.SamplerConfig(
        stop_ids=setup.stop_ids,
        pad_id=setup.chat.pad_id,
        num_tokens=setup.chat.num_tokens,
        per_prompt=spec.per_prompt,
        truncation=Truncation(spec.top_k, spec.top_p),
        cache_dtype=spec.cache_dtype,
    )
    place = decode_state.state_shardings(
        model.config.num_kv_heads, setup.mesh
    )
    params = sharding.with_shardings(model.abstract_params(), setup.mesh)
    layout = jax.eval_shape(model.decode_layout, params)
    self._layout = Program(
        model.decode_layout,
        out_shardings=sharding.decode_params(layout, setup.mesh),
    )
    self._prefill = Program(sampler.prefill, 3, out_shardings=place)
    # The cache of the prefill is written on; a longer one takes its place for
    # each bucket after the first.
    self._decode = Program(
        sampler.decode, 3, out_shardings=place, donate_argnums=4
    )
    self._grow = Program(sampler.decode, 3, out_shardings=place)
    self._cut = Program(
        _cut, 2, out_shardings=sharding.batch_sharding(setup.mesh)
    )
    self._any_live = jax.jit(
        lambda state: jnp.any(state.live),
        out_shardings=sharding.replicated(setup.mesh),
    )

  def sample(
      self, params: Params, batch: PromptBatch, key: jax.Array, cap: int
  ) -> Rollout:
    """Samples `per_prompt` prefixes of at most `cap` tokens.

    The prompts are prefilled once. The cache then grows from bucket to bucket
    as the prefixes do.

    Args:
      params: the model's.
      batch: prompts [B, S].
      key: of this update.
      cap: in tokens.

    Returns:
      Rollouts [B * per_prompt, P], P the smallest bucket that holds the cap,
      or all answers if they have ended before.

    Raises:
      ValueError: no bucket of the run holds the cap.
    """
    if cap > self._buckets[-1]:
      raise ValueError(
          f"The cap is {cap}, but the run's longest prefix is"
          f" {self._buckets[-1]}; sample with that at most."
      )
    model, config = self._model, self._config
    prompt = batch.tokens.shape[1]
    draw = decode_state.Draw.of(cap, self._temperature)
    key = sharding.replicate_key(key, self._mesh)
    state = self._prefill(
        model, config, prompt + self._buckets[0], params, batch, key, draw
    )
    layout, drawn = self._layout(params), 1
    for bucket in self._buckets:
      until = min(cap, bucket)
      if until > drawn:
        state = self._decoder(bucket)(
            model, config, prompt + bucket, layout, state, draw,
            decode_state.count(until - drawn),
        )  # fmt: skip
        drawn = until
      if cap <= bucket or not self._any_live(state):
        break
    return self._cut(prompt, bucket, state)

  def stages(
      self, params: Params, batch: PromptBatch, bucket: int
  ) -> Iterator[Stage]:
    """Yields the programs up to a bucket, the cut last.

    Args:
      params: shapes of the model's.
      batch: shapes of the prompts.
      bucket: the last one.
    """
    model, config = self._model, self._config
    prompt, draw = batch.tokens.shape[1], decode_state.Draw.of(1)
    key = sharding.abstract_key(self._mesh)
    args = (model, config, prompt + self._buckets[0], params, batch, key, draw)
    yield Stage("prefill", self._prefill, args)
    state = self._prefill.shapes(*args)
    yield Stage("layout", self._layout, (params,))
    layout = self._layout.shapes(params)
    drawn = 1
    for size in self._buckets:
      program = self._decoder(size)
      args = (model, config, prompt + size, layout, state, draw,
              decode_state.count(1))  # fmt: skip
      yield Stage("decode", program, args, trips=size - drawn)
      drawn = size
      state = program.shapes(*args)
      if size == bucket:
        yield Stage("cut", self._cut, (prompt, bucket, state))
        return

  def _decoder(self, bucket: int) -> Program:
    return self._decode if bucket == self._buckets[0] else self._grow

  @property
  def used(self) -> int:
    """How many compiled programs have been called."""
    return sum(p.used for p in (self._prefill, self._decode, self._grow))


def _cut(prompt: int, length: int, state: decode_state.DecodeState) -> Rollout:
  return decode_state.rollout(state, prompt, length)
