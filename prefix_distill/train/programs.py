"""The compiled programs of an update: prefill, decode, score, gradient, apply.

Each compiles once for each prefix bucket, ahead of time in another thread.
"""

from collections.abc import Iterator
import dataclasses
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill import prefix_schedule
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import generate
from prefix_distill.rollout.sampling import Truncation
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores
from prefix_distill.train import capacity
from prefix_distill.train import optimizer
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib
from prefix_distill.train.compile import abstract
from prefix_distill.train.compile import Program
from prefix_distill.train.compile import Segments
from prefix_distill.train.compile import Stage
from prefix_distill.train.microbatch import Rows
from prefix_distill.train.step import Gradient
from prefix_distill.train.step import TrainState


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
    self.config = generate.SamplerConfig(
        stop_ids=setup.stop_ids,
        pad_id=setup.chat.pad_id,
        num_tokens=setup.chat.num_tokens,
        per_prompt=spec.per_prompt,
        truncation=Truncation(spec.top_k, spec.top_p),
        cache_dtype=spec.cache_dtype,
    )
    self._segment = generate.segment(model)
    place = generate.state_shardings(model, self.config)
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
    self._prefill = Program(generate.prefill, 3, out_shardings=(place, rows))
    # A cache is written on.
    self._decode = Program(
        generate.decode,
        3,
        out_shardings=(place, rows),
        donate_argnums=4,
        compiler_options=generate.compiler_options(self.mesh),
    )
    self._resize = generate.Resizer(place)
    self._start = Program(generate.start, 2, out_shardings=rows)
    self._append = Program(
        generate.append, out_shardings=rows, donate_argnums=0
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
    room = min(self._buckets[0], generate.LEAST_STEP)
    return generate.columns(self.model, self.config, prompt + room)

  def _sizes(self, prompt: int, bucket: int) -> Iterator[tuple[int, int]]:
    """Yields caches: columns behind the prompts, and columns in all."""
    model, config = self.model, self.config
    for room in generate.rooms(model, config, prompt, bucket):
      yield room, generate.columns(model, config, prompt + room)

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
    draw = generate.Draw.of(cap, self._temperature)
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
    bucket, draw = self._bucket(cap), generate.Draw.of(cap)
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
    kernel = model.cache_kernel(generate.cache_dtype(model, config))
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


class Programs:
  """The phases of one run; each compiles once for each prefix bucket."""

  def __init__(self, setup: setup_lib.Setup):
    config = setup.config
    self._setup = setup
    self._tx = optimizer.make(config.optimizer, config.steps)
    self._buckets = prefix_schedule.buckets(config)
    self._thread: threading.Thread | None = None
    self._closed = threading.Event()
    rows = sharding.batch_sharding(setup.mesh)
    self._replicated = sharding.replicated(setup.mesh)
    state = self.abstract_state()
    self._resting = jax.tree.map(lambda x: x.sharding, state)
    self._working = working = sharding.on_device(self._resting)
    self._sampling = {
        "student": Sampling(setup, setup.student, self._buckets)
    }
    if config.rollout.source == "teacher":
      self._sampling["teacher"] = Sampling(
          setup, setup.teacher, self._buckets
      )
    self.rows = Rows(
        setup,
        self._buckets,
        None if setup.memory is None else functools.cache(self.capacity),
    )
    self._score = Program(loss_lib.score, 2, out_shardings=rows)
    self._init = jax.jit(
        functools.partial(step_lib.init_state, tx=self._tx),
        out_shardings=working,
        donate_argnums=0,
    )
    totals = Gradient(working.params, self._replicated, self._replicated)
    gradient = functools.partial(step_lib.gradient, self._loss())
    self._gradient = Program(gradient, out_shardings=totals, donate_argnums=3)
    self._zeros = Program(
        functools.partial(_zeros_of, gradient), out_shardings=totals
    )
    normalize = "tokens" if config.is_supervised else config.loss.normalize
    self._apply = Program(
        functools.partial(step_lib.apply, self._tx, normalize),
        out_shardings=(working, self._replicated),
        donate_argnums=0,
    )

  def _loss(self) -> step_lib.LossFn:
    setup = self._setup
    loss = setup.loss
    if setup.teacher is None:
      return functools.partial(
          step_lib.supervised_loss, setup.student, loss.dist, loss.memory
      )
    config = setup.config
    watch = step_lib.Watch(
        config.rollout.max_len,
        setup.chat.special_ids,
        prefix_schedule.make(config),
    )
    window = step_lib.Window(config.loss.window_start, config.loss.window_end)
    return functools.partial(
        step_lib.distillation_loss, setup.student, loss, watch, window
    )

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state: one tree for everything."""
    shapes = jax.eval_shape(
        functools.partial(step_lib.init_state, tx=self._tx),
        self._setup.student.abstract_params(),
    )
    state = sharding.with_shardings(shapes, self._setup.mesh)
    if not self._setup.config.optimizer.offload:
      return state
    return dataclasses.replace(
        state, opt_state=sharding.moved(sharding.on_host, state.opt_state)
    )

  def abstract_teacher(self) -> Params | None:
    """Shapes, dtypes and shardings of the teacher on the device, if any."""
    setup = self._setup
    if setup.teacher is None:
      return None
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, setup.config.teacher.param_dtype
        ),
        setup.teacher.abstract_params(),
    )
    return sharding.with_shardings(shapes, setup.mesh)

  def resting(self) -> Any:
    """Returns shapes of what lies in the memory while answers are sampled."""
    teacher = self.abstract_teacher()
    if teacher is not None and self._setup.config.teacher.offload:
      teacher = sharding.moved(sharding.on_host, teacher)
    return self.abstract_state(), teacher

  def capacity(self, prompt: int, length: int) -> int:
    """Returns how many rollouts a device samples at a time.

    Args:
      prompt: S.
      length: P.
    """
    return min(
        capacity.rollouts(
            self._setup, sampling.model, sampling.config, self.resting(),
            prompt, length, 1 / sampling.config.per_prompt,
        )
        for sampling in self._sampling.values()
    )  # fmt: skip

  def init(self, params: Params) -> TrainState:
    """Builds the first state; the parameters are donated."""
    return self._rest(self._init(params))

  def _rest(self, state: TrainState) -> TrainState:
    """Moves the moments to where they wait for the next update."""
    return self._move_moments(state, self._resting.opt_state)

  def _move_moments(self, state: TrainState, places: Any) -> TrainState:
    if not self._setup.config.optimizer.offload:
      return state
    moved = jax.device_put(state.opt_state, places)
    return dataclasses.replace(state, opt_state=moved)

  def on_device(self, params: Params) -> Params:
    """Brings weights that rest on the host, as the teacher's may."""
    places = jax.tree.map(lambda x: x.sharding, params)
    if all(s.memory_kind != "pinned_host" for s in jax.tree.leaves(places)):
      return params
    return jax.device_put(params, sharding.on_device(places))

  def sample(
      self,
      params: Params,
      batch: PromptBatch,
      key: jax.Array,
      cap: int,
      source: str = "student",
  ) -> Rollout:
    """Samples prefixes; see `Sampling`, of which `source` has one."""
    return self._sampling[source].sample(params, batch, key, cap)

  def score(
      self, params: Params, batch: PromptBatch, rollout: Rollout
  ) -> TeacherScores:
    """Scores prefixes with the teacher."""
    setup = self._setup
    return self._score(
        setup.teacher, setup.loss, params, batch, rollout
    )

  def gradient(
      self,
      params: Params,
      teacher_params: Params | None,
      batch: PromptBatch,
      rollout: Rollout,
      scores: TeacherScores | None,
      before: Gradient | None = None,
  ) -> Gradient:
    """Adds a micro-batch's gradient to `before`, which is donated."""
    head = self._teacher_head(teacher_params, scores)
    inputs = (batch, rollout, scores)
    return self._gradient(params, head, inputs, before)

  def zeros(self, *args: Any) -> Gradient:
    """What `gradient(*args)` is to be added to if it is the first of many.

    So that one program adds up all of them.
    """
    params, teacher_params, *inputs = args
    head = self._teacher_head(teacher_params, inputs[-1])
    return self._zeros(params, head, tuple(inputs))

  def apply(
      self, state: TrainState, total: Gradient
  ) -> tuple[TrainState, dict[str, Any]]:
    """Takes one optimizer step; the state is donated."""
    state = self._move_moments(state, self._working.opt_state)
    state, metrics = self._apply(state, total)
    return self._rest(state), metrics

  def update(
      self,
      state: TrainState,
      teacher_params: Params | None,
      batch: PromptBatch,
      rollout: Rollout,
      scores: TeacherScores | None,
  ) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step with all rollouts at a time; the state is donated."""
    total = self.gradient(
        state.params, teacher_params, batch, rollout, scores
    )
    return self.apply(state, total)

  def _teacher_head(
      self, params: Params | None, scores: TeacherScores | None
  ) -> Any:
    if scores is None or scores.hidden is None:
      return None
    return self._setup.teacher.head(params)

  def compile_ahead(self, teacher_params: Params | None) -> None:
    """Compiles the programs of all buckets in another thread, in order.

    Args:
      teacher_params: None for supervised training.
    """
    if self._setup.teacher is None:
      return
    stages = self._all_stages(teacher_params)

    def compile_all() -> None:
      try:
        for stage in stages:
          stage.program.compile(*stage.args)
          if self._closed.is_set():
            return
      except Exception:  # pylint: disable=broad-except
        pass  # The update that needs the program raises it again, in place.

    self._thread = threading.Thread(target=compile_all, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Stops compiling ahead, after the program that is being compiled."""
    self._closed.set()
    if self._thread is not None:
      self._thread.join()

  def _abstract_batch(self, rows: int) -> PromptBatch:
    spec = self._setup.config.data
    place = sharding.batch_sharding(self._setup.sampling_mesh)

    def array(size: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(size, dtype, sharding=place)

    def prompts(length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
      return array((rows, length), jnp.int32), array((rows, length), bool)

    own = prompts(spec.teacher_prompt_len) if spec.teacher_prompt else ()
    return PromptBatch(
        *prompts(spec.max_prompt_len), array((rows,), jnp.int32), *own
    )

  def stages(self, cap: int, teacher_params: Params) -> Iterator[Stage]:
    """Yields the programs of an update, in order.

    All arguments are shapes; nothing is compiled, and the programs that only
    move rows about are left out.

    Args:
      cap: in tokens.
      teacher_params: shapes, on the device.
    """
    setup, config = self._setup, self._setup.config
    state = self.abstract_state()
    working = sharding.moved(sharding.on_device, state)
    whole = self._abstract_batch(config.data.batch_size)
    groups = self.rows.group_count(whole, self.rows.bucket(cap))
    prompts = self._abstract_batch(config.data.batch_size // groups)
    for stage in self._sampling["student"].stages(
        working.params, prompts, cap
    ):
      yield dataclasses.replace(stage, batches=groups)
    rollout = stage.program.shapes(*stage.args)
    batch, rollout, parts = self.rows.part_shapes(prompts, rollout)
    args = (setup.teacher, setup.loss, teacher_params, batch, rollout)
    parts, chunks = groups * parts, self._chunks(rollout)
    rows = len(rollout.tokens)
    yield Stage("score", self._score, args, parts, chunks, rows)
    scores = self._score.shapes(*args)
    head = self._teacher_head(teacher_params, scores)
    args = (working.params, head, (batch, rollout, scores))
    total = self._zeros.shapes(*args)
    before = total if parts > 1 else None
    args = (*args, before)
    yield Stage("gradient", self._gradient, args, parts, chunks, rows)
    yield Stage("apply", self._apply, (working, total))

  def _chunks(self, rollout: Rollout) -> int:
    """Returns in how many chunks the output head takes a part's tokens."""
    mesh, student = self._setup.mesh, self._setup.student.config
    split = mesh.shape["tensor"]
    rows = student.vocab_size // (1 if student.vocab_size % split else split)
    tokens = rollout.tokens.size // sharding.batch_shards(mesh)
    return chunked_head.chunks(tokens, rows, self._setup.loss.memory)[0]

  def _all_stages(self, teacher_params: Params) -> Iterator[Stage]:
    """The programs of all buckets that caps end in."""
    shapes = sharding.moved(sharding.on_device, abstract(teacher_params))
    for bucket in prefix_schedule.needed(self._setup.config):
      yield from self.stages(bucket, shapes)

  def compilations(self) -> dict[str, int]:
    """How many compiled programs each phase has used so far."""
    return {
        "compilations_sample": sum(
            sampling.used for sampling in self._sampling.values()
        ),
        "compilations_score": self._score.used,
        "compilations_update": self._gradient.used,
    }


def _zeros_of(function: Any, *args: Any) -> Any:
  """Zeros of the shapes that a function returns; it is not run."""
  return jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args)
  )
