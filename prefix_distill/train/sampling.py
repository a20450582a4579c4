"""The compiled programs of sampling: prefill, then decode bucket by bucket.

They run on the mesh that sampling wants; prompts come to it, and rollouts leave
it for the mesh of training.
"""

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
  """Samples prefixes with one model; compiles once for each bucket.

  Attributes:
    mesh: where prompts have to lie.
  """

  def __init__(
      self, setup: setup_lib.Setup, model: Model, buckets: tuple[int, ...]
  ):
    self.mesh, self._buckets = setup.sampling_mesh, buckets
    self._model = model = setup.for_sampling(model)
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
    place = decode_state.state_shardings(model.config.num_kv_heads, self.mesh)
    params = model.abstract_params()
    layout = jax.eval_shape(model.decode_layout, params)
    # Weights change the mesh once a rollout, as small as they are sent.
    self._move = None
    if self.mesh != setup.mesh:
      self._move = Program(
          model.cast, out_shardings=sharding.param_shardings(params, self.mesh)
      )
    self._layout = Program(
        model.decode_layout,
        out_shardings=sharding.decode_params(layout, self.mesh),
    )
    self._prefill = Program(sampler.prefill, 3, out_shardings=place)
    # A cache is written on; a longer one takes its place for each bucket after
    # the first.
    self._decode = Program(
        sampler.decode, 2, out_shardings=place, donate_argnums=3
    )
    self._resize = decode_state.Resizer(place)
    self._cut = Program(
        _cut, 2, out_shardings=sharding.batch_sharding(setup.mesh)
    )
    self._any_live = jax.jit(
        lambda state: jnp.any(state.live),
        out_shardings=sharding.replicated(self.mesh),
    )

  def sample(
      self, params: Params, batch: PromptBatch, key: jax.Array, cap: int
  ) -> Rollout:
    """Samples `per_prompt` prefixes of at most `cap` tokens.

    The prompts are prefilled once. The cache then grows from bucket to bucket
    as the prefixes do.

    Args:
      params: the model's, where they lie in training.
      batch: prompts [B, S], on `mesh`.
      key: of this update.
      cap: in tokens.

    Returns:
      Rollouts [B * per_prompt, P], on the mesh of training. P is the smallest
      bucket that holds the cap, or all answers if they have ended before.

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
    key = sharding.replicate_key(key, self.mesh)
    if self._move:
      params = self._move(params)
    state = self._prefill(
        model, config, prompt + self._buckets[0], params, batch, key, draw
    )
    layout, drawn = self._layout(params), 1
    del params  # Those that were moved are not needed any more.
    for bucket in self._buckets:
      until = min(cap, bucket)
      if until > drawn:
        state = self._resize(state, prompt + bucket)
        state = self._decode(
            model, config, layout, state, draw,
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
      params: shapes of the model's, where they lie in training.
      batch: shapes of the prompts, on `mesh`.
      bucket: the last one.
    """
    model, config = self._model, self._config
    prompt, draw = batch.tokens.shape[1], decode_state.Draw.of(1)
    key = sharding.abstract_key(self.mesh)
    if self._move:
      yield Stage("move", self._move, (params,))
      params = self._move.shapes(params)
    args = (model, config, prompt + self._buckets[0], params, batch, key, draw)
    yield Stage("prefill", self._prefill, args)
    state = self._prefill.shapes(*args)
    yield Stage("layout", self._layout, (params,))
    layout = self._layout.shapes(params)
    drawn = 1
    for size in self._buckets:
      state = self._resize.shapes(state, prompt + size)
      args = (model, config, layout, state, draw, decode_state.count(1))
      yield Stage("decode", self._decode, args, trips=size - drawn)
      drawn = size
      if size == bucket:
        yield Stage("cut", self._cut, (prompt, bucket, state))
        return

  @property
  def used(self) -> int:
    """How many compiled programs have been called."""
    return self._prefill.used + self._decode.used


def _cut(prompt: int, length: int, state: decode_state.DecodeState) -> Rollout:
  return decode_state.rollout(state, prompt, length)
