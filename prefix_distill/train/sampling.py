"""The compiled programs of sampling: prefill, then decode segment by segment.

They run on the mesh that sampling wants; prompts come to it, and rollouts leave
it for the mesh of training.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

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
from prefix_distill.train.compile import Segments
from prefix_distill.train.compile import Stage


class Sampling:
  """Samples prefixes with one model.

  Attributes:
    mesh: where prompts have to lie.
    model: on that mesh.
    config: how it samples.
  """

  def __init__(
      self, setup: setup_lib.Setup, model: Model, buckets: tuple[int, ...]
  ):
    self.mesh, self._buckets = setup.sampling_mesh, buckets
    self.model = model = setup.for_sampling(model)
    spec = setup.config.rollout
    self._temperature = spec.temperature
    self.config = decode_state.SamplerConfig(
        stop_ids=setup.stop_ids,
        pad_id=setup.chat.pad_id,
        num_tokens=setup.chat.num_tokens,
        per_prompt=spec.per_prompt,
        truncation=Truncation(spec.top_k, spec.top_p),
        cache_dtype=spec.cache_dtype,
    )
    self._segment = sampler.segment(model)
    place = decode_state.state_shardings(model, self.config)
    rows = sharding.batch_sharding(self.mesh)
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
    self._prefill = Program(sampler.prefill, 3, out_shardings=(place, rows))
    # A cache is written on.
    self._decode = Program(
        sampler.decode,
        3,
        out_shardings=(place, rows),
        donate_argnums=4,
        compiler_options=sampler.compiler_options(self.mesh),
    )
    self._resize = decode_state.Resizer(place)
    self._start = Program(decode_state.start, 2, out_shardings=rows)
    self._append = Program(
        decode_state.append, out_shardings=rows, donate_argnums=0
    )
    self._cut = Program(
        _cut, 1, out_shardings=sharding.batch_sharding(setup.mesh)
    )
    self._look = jax.jit(
        lambda state: (jnp.any(state.live), jnp.max(state.count)),
        out_shardings=sharding.replicated(self.mesh),
    )

  def _bucket(self, length: int) -> int:
    return min(b for b in self._buckets if b >= length)

  def _first(self, prompt: int) -> int:
    """Returns the columns of a cache that prompts are read into.

    They are few, so that one program reads the prompts of all lengths.
    """
    room = min(self._buckets[0], decode_state.LEAST_STEP)
    return decode_state.columns(self.model, self.config, prompt + room)

  def _sizes(self, prompt: int, bucket: int) -> Iterator[tuple[int, int]]:
    """Yields caches: columns behind the prompts, and columns in all."""
    model, config = self.model, self.config
    for room in decode_state.rooms(model, config, prompt, bucket):
      yield room, decode_state.columns(model, config, prompt + room)

  def sample(
      self, params: Params, batch: PromptBatch, key: jax.Array, cap: int
  ) -> Rollout:
    """Samples `per_prompt` prefixes of at most `cap` tokens.

    The prompts are prefilled once. The cache then grows as the prefixes do.

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
    model, config, segment = self.model, self.config, self._segment
    bucket = self._bucket(cap)
    prompt = batch.tokens.shape[1]
    sizes = self._sizes(prompt, bucket)
    draw = decode_state.Draw.of(cap, self._temperature)
    key = sharding.replicate_key(key, self.mesh)
    if self._move:
      params = self._move(params)
    state, first = self._prefill(
        model, config, self._first(prompt), params, batch, key, draw
    )
    layout, drawn = self._layout(params), 1
    del params  # Those that were moved are not needed any more.
    rollout = self._start(self._whole(bucket), config.pad_id, first)
    live, longest = map(np.asarray, self._look(state))
    for room, columns in sizes:
      while live and drawn < cap and drawn <= room:
        state = self._resize(state, columns)
        state, new = self._decode(model, config, segment, layout, state, draw)
        rollout = self._append(rollout, new, np.int32(drawn))
        drawn += segment
        live, longest = map(np.asarray, self._look(state))
    length = bucket if live else self._bucket(int(longest))
    return self._cut(length, rollout)

  def _whole(self, bucket: int) -> int:
    """Returns a length that holds the first token and whole segments."""
    return 1 + -(-(bucket - 1) // self._segment) * self._segment

  def stages(
      self, params: Params, batch: PromptBatch, cap: int
  ) -> Iterator[Stage]:
    """Yields the programs that sample up to a cap, the cut last.

    Args:
      params: shapes of the model's, where they lie in training.
      batch: shapes of the prompts, on `mesh`.
      cap: in tokens.
    """
    model, config, segment = self.model, self.config, self._segment
    bucket, draw = self._bucket(cap), decode_state.Draw.of(cap)
    prompt = batch.tokens.shape[1]
    key = sharding.abstract_key(self.mesh)
    if self._move:
      yield Stage("move", self._move, (params,))
      params = self._move.shapes(params)
    args = (model, config, self._first(prompt), params, batch, key, draw)
    yield Stage("prefill", self._prefill, args, rows=len(batch.tokens))
    state, first = self._prefill.shapes(*args)
    yield Stage("layout", self._layout, (params,))
    layout, drawn = self._layout.shapes(params), 1
    kernel = model.cache_kernel(decode_state.cache_dtype(model, config))
    for room, columns in self._sizes(prompt, bucket):
      state = self._resize.shapes(state, columns)
      segments = Segments(
          segment, -(-(room + 1 - drawn) // segment), drawn, prompt, columns,
          kernel.reads_lengths,
      ).until(cap)  # fmt: skip
      if segments.count:
        yield Stage(
            "decode",
            self._decode,
            (model, config, segment, layout, state, draw),
            rows=len(state.newest),
            segments=segments,
        )
        drawn += segments.count * segment
    args = (self._whole(bucket), config.pad_id, first)
    yield Stage("cut", self._cut, (bucket, self._start.shapes(*args)))

  @property
  def used(self) -> int:
    """How many compiled programs have been called."""
    return self._prefill.used + self._decode.used


def _cut(length: int, rollout: Rollout) -> Rollout:
  return jax.tree.map(lambda x: x[:, :length], rollout)
