"""The update: sample, score, differentiate, step; in microbatches if need be.

It is described once, as `Programs.update`. On arrays it trains. On shapes it
says which programs it would run, in which order and how often: so programs are
compiled ahead in the background, and planned for machines that are not there.

Answers are sampled by the student or the teacher, given, or rewritten: then the
student drafts, the teacher rewrites, and the update has two samplings.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import compilation
from prefix_distill import sharding
from prefix_distill.compilation import Program
from prefix_distill.data.prompts import Asking
from prefix_distill.data.prompts import REWRITING_FAILURES
from prefix_distill.data.prompts import Taken
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.prefix_schedule import Chosen
from prefix_distill.models import lora
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import flops
from prefix_distill.rollout import generate
from prefix_distill.rollout.generate import Truncation
from prefix_distill.structs import Limits
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores
from prefix_distill.train import microbatch
from prefix_distill.train import step as step_lib
from prefix_distill.train.microbatch import Microbatches
from prefix_distill.train.samples import Inspected
from prefix_distill.train.setup import Models
from prefix_distill.train.step import Gradient
from prefix_distill.train.step import Microbatch
from prefix_distill.train.step import TrainState

# The programs of the teacher's sampling, when it rewrites, begin with it.
REWRITE_ROLE = "rewrite_"
# Sets the teacher's draws apart from the student's.
_SALT = 1


class Clock:
  """Seconds of the phases of one update.

  Attributes:
    seconds: of the phases that have passed.
    current: the phase that the update is in; empty between two phases.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self.current = ""

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds the time that passes inside to a phase's."""
    self.current = name
    start, name = time.perf_counter(), f"seconds_{name}"
    yield
    self.current = ""
    passed = time.perf_counter() - start
    self.seconds[name] = self.seconds.get(name, 0.0) + passed


@dataclasses.dataclass(frozen=True)
class Request:
  """What an update is to do.

  Attributes:
    cap: in tokens.
    key: of the update's draws.
    source: whose answers it learns from: "student", "teacher", "data" or
      "rewrite"; None for supervised training, which learns from the given
      answers, whole.
    threshold: below which rollouts agree; None if they are not cut.
    refines: whether a relaxed loss is in its second phase.
    poll: called between segments and microbatches. It may raise: no state has
      been changed then.
    inspected: whether to look at a few rollouts token by token.
    asking: how the teacher is asked to rewrite, if the source is "rewrite".
  """

  cap: int
  key: jax.Array
  source: str | None = "student"
  threshold: float | None = None
  refines: bool = False
  poll: Callable[[], None] = lambda: None
  inspected: bool = False
  asking: Asking | None = None


@dataclasses.dataclass(frozen=True)
class Rewritten:
  """What an update's rewritings were, in NumPy arrays on every process.

  Attributes:
    lengths: of drafts, turns and rewritings.
    shortened: bool [rollouts], whether a draft's end was not shown.
    failed: of each rollout, one of `REWRITING_FAILURES`, or "".
  """

  lengths: flops.RewritingLengths
  shortened: np.ndarray
  failed: Sequence[str]

  def metrics(self) -> dict[str, float]:
    """Returns shares of the rollouts, and mean lengths in tokens.

    `rewritten` is the share that is learned, `rewritten_len` the mean length
    of those, before the cap; the other lengths are of all.
    """
    these, failed = self.lengths, np.array(self.failed)
    done = failed == ""
    line = {
        "rewritten": float(np.mean(done)),
        "draft_len": float(np.mean(these.drafts)),
        "rewriting_len": float(np.mean(these.written)),
        "rewritten_len": float(these.kept.sum() / max(done.sum(), 1)),
        "drafts_shortened": float(np.mean(self.shortened)),
    }
    shares = {r: float(np.mean(failed == r)) for r in REWRITING_FAILURES}
    return line | {f"rewrite_{r}": x for r, x in shares.items() if x}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What an update showed: whole arrays, in every process.

  Attributes:
    metrics: means over all rollouts; with a relaxed loss also `least_entropy`,
      at which tokens count, -inf in its first phase.
    tokens: int32 [rollouts, P], as they were sampled or given.
    mask: bool [rollouts, P].
    trained: bool [rollouts, P], what the schedule chose of the mask.
    minima: [rollouts], see `prefix_schedule.Chosen`.
    inspected: a few of the rollouts, as the models before the update see them;
      None if that was not asked for.
    rewritten: how the rollouts were rewritten; None if they were not.
  """

  metrics: dict[str, Any]
  tokens: np.ndarray
  mask: np.ndarray
  trained: np.ndarray
  minima: np.ndarray | None
  inspected: Inspected | None = None
  rewritten: Rewritten | None = None


class _Closed(Exception):
  """The run has ended, so nothing more is compiled ahead."""


def sampler(
    models: Models,
    model: Model,
    buckets: tuple[int, ...],
    stop_ids: tuple[int, ...] | None = None,
    per_prompt: int = 0,
    role: str = "",
) -> generate.Sampler:
  """Returns what samples with the student or the teacher.

  Args:
    models: of the run.
    model: the student's or the teacher's architecture.
    buckets: the lengths that rollouts may have.
    stop_ids: tokens that end a rollout; None for `models.stop_ids`.
    per_prompt: rollouts of a prompt; 0 for `rollout.per_prompt`.
    role: what the names of the model's programs begin with.
  """
  spec = models.config.rollout
  config = generate.SamplerConfig(
      stop_ids=models.stop_ids if stop_ids is None else stop_ids,
      pad_id=models.pad_id,
      num_tokens=models.num_tokens,
      per_prompt=per_prompt or spec.per_prompt,
      truncation=Truncation(spec.top_k, spec.top_p),
      cache_dtype=spec.cache_dtype,
      entropy=models.config.loss.form == "relaxed",
  )
  return generate.Sampler(
      models.for_sampling(model),
      config,
      spec.temperature,
      buckets,
      models.mesh,
      role,
  )


def abstract_weights(
    model: Model, dtype: str, mesh: jax.sharding.Mesh
) -> Params:
  """Shapes and shardings of a model's weights in one dtype."""
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.abstract_params()
  )
  return sharding.with_shardings(shapes, mesh)


@dataclasses.dataclass(frozen=True)
class _Writer:
  """Samples answers up to one length with one model.

  Attributes:
    sampler: has that length as its only bucket.
    microbatches: of its prompts.
  """

  sampler: generate.Sampler
  microbatches: Microbatches

  def write(
      self,
      params: Params,
      prompts: PromptBatch,
      key: jax.Array,
      poll: Callable[[], None],
  ) -> list[np.ndarray] | None:
    """Returns the tokens of each answer, on the host; None on shapes."""
    (length,) = self.sampler.buckets
    batches = self.microbatches.for_sampling(prompts, length)
    rollouts = [
        self.sampler.sample(params, batch, key, length, poll)
        for batch in batches
    ]
    shown = [(r.tokens, r.mask) for r in rollouts]
    if sharding.is_abstract(shown):
      return None
    found = sharding.to_host(shown)
    count = self.sampler.config.per_prompt
    tokens, mask = (
        microbatch.join(list(parts), count)
        for parts in zip(*found, strict=True)
    )
    return [row[kept] for row, kept in zip(tokens, mask, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Rewriter:
  """Samples the student's drafts, and the teacher's rewritings of them.

  Every process gets all answers on its host. Each makes the same turns for the
  teacher from the drafts and takes the same tokens from the teacher's text
  (`Rewriting`), so no process waits for another's text. A draw depends on the
  update's key, the record and the rollout's number alone, so neither
  microbatches, nor devices, nor a restart change what is learned.

  Called on shapes, both samplings and the prompts between them are shapes.

  Attributes:
    models: of the run.
    microbatches: of the update.
    drafter: samples with the student.
    writer: samples with the teacher.
  """

  models: Models
  microbatches: Microbatches
  drafter: _Writer
  writer: _Writer

  @property
  def used(self) -> int:
    """How many variants of prefill and decode have run."""
    return self.drafter.sampler.used + self.writer.sampler.used

  def rewrite(
      self,
      params: Params,
      prompts: PromptBatch,
      drafts: list[np.ndarray] | None,
      asking: Asking | None,
      key: jax.Array,
      cap: int,
      poll: Callable[[], None],
  ) -> tuple[tuple[PromptBatch, Rollout], Rewritten | None]:
    """Returns prompts and rollouts to learn from, on the mesh of training.

    A rollout has the beginning of a rewriting after the student's prompt; none
    of its tokens counts if the rewriting failed. Its static length is the
    bucket of the longest one, at most that of the cap.

    Args:
      params: the teacher's, on the devices.
      prompts: [B, S].
      drafts: the student's answers [prompts * per_prompt]; None on shapes.
      asking: the update's questions; None on shapes.
      key: of the update.
      cap: in tokens.
      poll: called before each segment; it may raise to stop.
    """
    mesh, bucket = self.models.mesh, self.microbatches.bucket
    turns = self._abstract_turns(prompts)
    if drafts is not None:
      asked = asking.ask(drafts)
      turns = asked.prompts
    turns = sharding.global_batch(turns, mesh)
    if not sharding.is_abstract(key):
      key = jax.random.fold_in(key, _SALT)
    written = self.writer.write(params, turns, key, poll)
    batch = self.microbatches.repeat(prompts)
    if self.models.config.rollout.rewrite.scored_in == "rewriting":
      batch = dataclasses.replace(
          batch, teacher_tokens=turns.tokens, teacher_mask=turns.mask
      )
    if written is None:
      shape = (len(batch.tokens), bucket(cap))
      rollout = Rollout(
          jax.ShapeDtypeStruct(shape, jnp.int32),
          jax.ShapeDtypeStruct(shape, bool),
      )
      return (batch, sharding.global_batch(rollout, mesh)), None
    taken = [
        Taken(failed="long") if long else asking.rewriting.take(tokens)
        for tokens, long in zip(written, asked.long, strict=True)
    ]
    kept = np.array([len(one.tokens) for one in taken])
    longest = max(int(kept.clip(max=cap).max()), 1)
    rollout = _filled(
        [one.tokens[:cap] for one in taken],
        (len(taken), bucket(longest)),
        self.models.pad_id,
    )
    shown = Rewritten(
        flops.RewritingLengths(
            drafts=np.array([len(x) for x in drafts]),
            prompts=asked.prompts.mask.sum(1),
            written=np.array([len(x) for x in written]),
            kept=kept,
        ),
        asked.shortened,
        [one.failed for one in taken],
    )
    return (batch, sharding.global_batch(rollout, mesh)), shown

  def _abstract_turns(self, prompts: PromptBatch) -> PromptBatch:
    """Shapes of the teacher's turns."""
    spec = self.models.config.rollout
    rows = len(prompts.tokens) * spec.per_prompt
    shape = (rows, spec.rewrite.max_prompt_len)
    return PromptBatch(
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, bool),
        jax.ShapeDtypeStruct((rows, 2), jnp.int32),
    )


class Programs:
  """The compiled programs of a run, and the update that chains them.

  Attributes:
    microbatches: splits batches.
    gradient: `step.gradient` of the run's loss.
    zeros: a zero accumulator, of the arguments of `gradient`, so that the
      first microbatch runs the same program as the others.
  """

  def __init__(self, models: Models):
    config = models.config
    self._models = models
    self._tx = step_lib.optimizer(config.optimizer, config.steps)
    self._thread: threading.Thread | None = None
    self._closed = threading.Event()
    rows = sharding.batch_sharding(models.mesh)
    replicated = sharding.replicated(models.mesh)
    state = self.abstract_state()
    self._resting = sharding.of(state)
    self._working = working = sharding.on_device(self._resting)
    buckets = prefix_schedule.buckets(config)
    self._samplers = {"student": sampler(models, models.student, buckets)}
    if config.rollout.source == "teacher":
      self._samplers["teacher"] = sampler(models, models.teacher, buckets)
    self.microbatches = Microbatches(
        models, [*self._samplers.values()], self.resting()
    )
    self._rewriter = None
    if config.rollout.source == "rewrite":
      self._rewriter = self._rewriting()
    self._score = Program("score", loss_lib.score, 2, out_shardings=rows)
    self._inspect = Program("inspect", loss_lib.inspect, 5, out_shardings=rows)
    self._init = Program(
        "init",
        functools.partial(step_lib.init_state, tx=self._tx),
        out_shardings=working,
        donate_argnums=0,
    )
    totals = Gradient(working.params, replicated, replicated, rows)
    gradient = functools.partial(step_lib.gradient, self._loss())
    self.gradient = Program(
        "gradient", gradient, out_shardings=totals, donate_argnums=3
    )
    self.zeros = Program(
        "zeros",
        functools.partial(_zeros_of, gradient),
        out_shardings=dataclasses.replace(totals, chosen=None),
    )
    self._refresh = self._refreshing()
    self._limits = Program(
        "limits",
        functools.partial(
            step_lib.limits,
            self._window,
            loss_lib.floor(config.loss.relaxed),
            config.loss.relaxed.entropy_share,
        ),
        out_shardings=replicated,
    )
    normalize = "tokens" if config.is_supervised else config.loss.normalize
    self._apply = Program(
        "apply",
        functools.partial(step_lib.apply, self._tx, normalize),
        out_shardings=(working, replicated),
        donate_argnums=0,
    )

  def _rewriting(self) -> _Rewriter:
    """Returns what drafts and rewrites, with a sampler for each."""
    models, spec = self._models, self._models.config.rollout
    *mine, teacher = resting = self.resting()
    drafter = sampler(models, models.student, (spec.draft_len,))
    writer = sampler(
        models,
        models.teacher,
        (spec.rewriting_len,),
        models.teacher_stop_ids,
        per_prompt=1,
        role=REWRITE_ROLE,
    )
    beside = (*mine, teacher and self.on_device(teacher))
    return _Rewriter(
        models,
        self.microbatches,
        _Writer(drafter, Microbatches(models, [drafter], resting)),
        _Writer(writer, Microbatches(models, [writer], beside)),
    )

  def _refreshing(self) -> Program | None:
    """Returns the program of `refresh`; None if there is no teacher."""
    teacher = self.abstract_teacher()
    if teacher is None:
      return None
    places = sharding.of(teacher)
    return Program(
        "refresh",
        functools.partial(
            step_lib.refreshed, self._models.config.teacher.param_dtype
        ),
        out_shardings=sharding.on_device(places),
        # The old weights are not read: their memory takes the new ones.
        donate_argnums=1,
        keep_unused=True,
    )

  def _loss(self) -> step_lib.LossFn:
    models, config = self._models, self._models.config
    loss = models.loss
    if models.teacher is None:
      return functools.partial(
          step_lib.supervised_loss, models.student, loss.dist, loss.memory
      )
    watch = step_lib.Watch(
        config.rollout.max_len,
        models.special_ids,
        prefix_schedule.make(config),
    )
    return functools.partial(
        step_lib.distillation_loss, models.student, loss, watch, self._window
    )

  @property
  def _window(self) -> step_lib.Window:
    spec = self._models.config.loss
    return step_lib.Window(
        spec.window_start, spec.window_end, spec.normalize == "length"
    )

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state between updates."""
    student = self._models.student
    params = student.abstract_params()
    if student.config.lora is not None:
      _, params = lora.split(params)
    shapes = jax.eval_shape(
        functools.partial(step_lib.init_state, tx=self._tx), params
    )
    state = sharding.with_shardings(shapes, self._models.mesh)
    if not self._models.config.optimizer.offload:
      return state
    return dataclasses.replace(
        state, opt_state=sharding.moved(sharding.on_host, state.opt_state)
    )

  def abstract_teacher(self) -> Params | None:
    """Shapes, dtypes and shardings of the teacher between updates, if any."""
    models = self._models
    if models.teacher is None:
      return None
    spec = models.config.teacher
    shapes = abstract_weights(models.teacher, spec.param_dtype, models.mesh)
    return sharding.moved(sharding.on_host, shapes) if spec.offload else shapes

  def abstract_base(self) -> Params | None:
    """Shapes, dtypes and shardings of the weights beside adapters, if any."""
    models = self._models
    if models.student.config.lora is None:
      return None
    dtype = models.config.student.param_dtype
    return abstract_weights(models.student.base, dtype, models.mesh)

  def resting(self) -> Any:
    """Returns shapes of what lies in the memory while answers are sampled."""
    shared = self._models.shares_weights
    teacher = None if shared else self.abstract_teacher()
    return self.abstract_state(), self.abstract_base(), teacher

  def init(self, params: Params) -> TrainState:
    """Builds the first state; the trained parameters are donated."""
    return self._move_moments(self._init(params), self._resting)

  def _move_moments(self, state: TrainState, places: TrainState) -> TrainState:
    if not self._models.config.optimizer.offload:
      return state
    moved = sharding.put(state.opt_state, places.opt_state)
    return dataclasses.replace(state, opt_state=moved)

  def on_device(self, params: Params) -> Params:
    """Brings weights that rest on the host, as the teacher's may."""
    places = sharding.of(params)
    if not any(map(sharding.is_on_host, jax.tree.leaves(places))):
      return params
    return sharding.put(params, sharding.on_device(places))

  def refresh(self, params: Params, teacher_params: Params) -> Params:
    """Makes the teacher a copy of the student.

    A teacher that rests on the host goes back there; meanwhile the devices
    hold as much as while it scores.

    Args:
      params: the student's.
      teacher_params: the old ones, where they rest; they are donated.

    Returns:
      The new ones, in the old ones' dtypes and places.
    """
    places = sharding.of(teacher_params)
    if not any(map(sharding.is_on_host, jax.tree.leaves(places))):
      return self._refresh(params, teacher_params)
    if not sharding.is_abstract(teacher_params):
      jax.tree.map(lambda x: x.delete(), teacher_params)
    return sharding.put(self._refresh(params, None), places)

  def sample(
      self,
      params: Params,
      batch: PromptBatch,
      key: jax.Array,
      cap: int,
      source: str = "student",
      poll: Callable[[], None] = lambda: None,
  ) -> Rollout:
    """Samples prefixes with the student or the teacher; see `Sampler`."""
    return self._samplers[source].sample(params, batch, key, cap, poll)

  def score(
      self, params: Params, batch: PromptBatch, rollout: Rollout
  ) -> TeacherScores:
    """Scores prefixes with the teacher."""
    models = self._models
    return self._score(models.teacher, models.loss, params, batch, rollout)

  def inspect(
      self,
      params: Params,
      teacher_params: Params | None,
      batch: PromptBatch,
      rollout: Rollout,
  ) -> Inspected:
    """Looks at a few rollouts token by token.

    There is one program for each length of the prompt, whatever the cap. Each
    batch shard looks at one rollout at least, so some come twice.

    Args:
      params: the student's.
      teacher_params: on the devices; None for supervised training.
      batch: prompts [B, S], one row for each rollout.
      rollout: [B, P].
    """
    models, spec = self._models, self._models.config.samples
    rollout = Rollout(rollout.tokens, rollout.mask)
    batch, rollout = sharding.to_host((batch, rollout))
    rows, shards = len(rollout.tokens), sharding.batch_shards(models.mesh)
    count = min(spec.rollouts, rows)
    picked = np.arange(count) * (rows // count)
    picked = np.resize(picked, -(-count // shards) * shards)
    batch, rollout = _rows((batch, rollout), picked)
    most = min(prefix_schedule.longest(models.config), spec.max_tokens)
    behind = max(most - rollout.tokens.shape[1], 0)
    fitted = jax.tree.map(
        lambda x: np.pad(x[:, :most], ((0, 0), (0, behind))), rollout
    )
    found = self._inspect(
        models.student,
        models.teacher,
        models.loss.dist,
        spec.alternatives,
        models.loss.memory,
        params,
        teacher_params,
        *sharding.global_batch((batch, fitted), models.mesh),
    )
    found = sharding.to_host(found)
    return Inspected(batch, rollout.tokens, rollout.mask, found)

  def divergences(
      self,
      params: Params,
      teacher_params: Params,
      prompts: PromptBatch,
      answers: Sequence[np.ndarray],
  ) -> list[np.ndarray]:
    """Returns the exact reverse KL at each token of whole answers, in nats.

    The answers are scored as many at a time as an update has rollouts, in
    microbatches if need be. There is one program for each length of prompts.

    Args:
      params: the student's.
      teacher_params: on the devices.
      prompts: NumPy prompts [N, S].
      answers: the tokens of each, up to `evaluation.max_len`.
    """
    config = self._models.config
    rows = config.data.batch_size * config.rollout.per_prompt
    found = []
    for first in range(0, len(answers), rows):
      part = answers[first : first + rows]
      # Prompts behind the last one repeat others; their answers are empty.
      which = np.resize(np.arange(first, first + len(part)), rows)
      batch = _rows(prompts, which)
      shape = (rows, config.evaluation.max_len)
      rollout = _filled(part, shape, self._models.pad_id)
      inputs = sharding.global_batch((batch, rollout), self._models.mesh)
      nats = self._divergences(params, teacher_params, *inputs)
      nats = microbatch.join(sharding.to_host(nats))
      found += [x[: len(y)] for x, y in zip(nats, part, strict=False)]
    return found

  def divergences_on_shapes(self, params: Params, prompt: int) -> None:
    """Calls the programs that score a batch of answers on shapes.

    `compilation.watching` sees these calls. A batch has as many answers as an
    update has rollouts.

    Args:
      params: shapes of the student's.
      prompt: S, the length of prompts.
    """
    config = self._models.config
    rows = functools.partial(
        self._abstract_rows, repeats=config.rollout.per_prompt
    )
    self._divergences(
        params,
        self.on_device(self.abstract_teacher()),
        PromptBatch(*rows(prompt), rows()[0]),
        Rollout(*rows(config.evaluation.max_len)),
    )

  def _divergences(
      self,
      params: Params,
      teacher_params: Params,
      batch: PromptBatch,
      rollout: Rollout,
  ) -> list[jax.Array]:
    """Returns nats of each token of rollouts [B, P], by microbatch."""
    models = self._models
    return [
        self._inspect(
            models.student,
            models.teacher,
            models.loss.dist,
            1,
            models.loss.memory,
            params,
            teacher_params,
            *part,
        )["divergence"]
        for part in self.microbatches.for_scoring(batch, rollout)
    ]

  def update(
      self,
      state: TrainState,
      teacher_params: Params | None,
      prompts: PromptBatch,
      given: Rollout | None,
      request: Request,
      clock: Clock,
      base: Params | None = None,
  ) -> tuple[TrainState, Outcome | None]:
    """Does one update; or on shapes, calls the same programs on shapes.

    Args:
      state: donated.
      teacher_params: where they rest; None for supervised training.
      prompts: [B, S].
      given: answers [B, C], if the source or supervised training wants them.
      request: see there.
      clock: gets the seconds of the phases sample, score and update, and of
        inspect if that is asked for.
      base: the student's weights beside adapters; None without any.

    Returns:
      The next state, and what the update showed; None on shapes.
    """
    microbatches, rewritten = self.microbatches, None
    student = lora.join(base, state.params)
    if request.source == "rewrite":
      sampled, rewritten, teacher = self._rewrite(
          student, teacher_params, prompts, request, clock
      )
    else:
      sampled = self._answers(
          student, teacher_params, prompts, given, request, clock
      )
      teacher = teacher_params and self.on_device(teacher_params)
    split = [
        part for batch in sampled for part in microbatches.for_scoring(*batch)
    ]
    total, shown, inspected = None, [], None
    if request.inspected:
      with clock.phase("inspect"):
        inspected = self.inspect(student, teacher, *split[0])
    del student
    limits = self._limits_of(sampled, request)
    threshold = request.threshold
    if threshold is not None:
      threshold = np.float32(threshold)
    for batch, rollout in split:
      request.poll()
      scores = None
      if request.source is not None:
        with clock.phase("score"):
          scores = self.score(teacher, batch, rollout)
          jax.block_until_ready(scores)
      with clock.phase("update"):
        head = self.teacher_head(teacher, scores)
        inputs = Microbatch(batch, rollout, scores, limits)
        if total is None and len(split) > 1:
          total = self.zeros(
              state.params, head, inputs, None, threshold, base
          )
        total = self.gradient(
            state.params, head, inputs, total, threshold, base
        )
        chosen = total.chosen or Chosen(rollout.mask)
        total = dataclasses.replace(total, chosen=None)
        shown.append(
            (rollout.tokens, rollout.mask, chosen.trained, chosen.minima)
        )
    with clock.phase("update"):
      if sharding.is_abstract(total):
        return self.apply(state, total)[0], None
      arrays = self._gather(shown, len(sampled))
      state, metrics = self.apply(state, total)
      if limits is not None:
        metrics["least_entropy"] = limits.entropy
      metrics = jax.device_get(metrics)
    return state, Outcome(metrics, *arrays, inspected, rewritten)

  def apply(
      self, state: TrainState, total: Gradient
  ) -> tuple[TrainState, dict[str, Any]]:
    """Takes the optimizer's step; the state is donated."""
    state = self._move_moments(state, self._working)
    state, metrics = self._apply(state, total)
    return self._move_moments(state, self._resting), metrics

  def _answers(
      self,
      params: Params,
      teacher_params: Params | None,
      prompts: PromptBatch,
      given: Rollout | None,
      request: Request,
      clock: Clock,
  ) -> list[tuple[PromptBatch, Rollout]]:
    """Samples prefixes, or takes given ones, in microbatches."""
    source, cap = request.source, request.cap
    if source is None:
      return [(prompts, given)]
    with clock.phase("sample"):
      if source == "data":
        return [(prompts, self.microbatches.shorten(given, cap))]
      if source == "teacher":
        params = self.on_device(teacher_params)
      batches = self.microbatches.for_sampling(prompts, cap)
      rollouts = [
          self.sample(
              params,
              batch.for_teacher() if source == "teacher" else batch,
              request.key,
              cap,
              source,
              request.poll,
          )
          for batch in batches
      ]
      rollouts = self.microbatches.lengthen(rollouts)
      jax.block_until_ready(rollouts)
      batches = [self.microbatches.repeat(batch) for batch in batches]
    return list(zip(batches, rollouts, strict=True))

  def _rewrite(
      self,
      params: Params,
      teacher_params: Params,
      prompts: PromptBatch,
      request: Request,
      clock: Clock,
  ) -> tuple[list[tuple[PromptBatch, Rollout]], Rewritten | None, Params]:
    """Samples, and has the teacher rewrite; returns its weights as well."""
    rewriter, key, poll = self._rewriter, request.key, request.poll
    with clock.phase("sample"):
      drafts = rewriter.drafter.write(params, prompts, key, poll)
      teacher = self.on_device(teacher_params)
      sampled, rewritten = rewriter.rewrite(
          teacher, prompts, drafts, request.asking, key, request.cap, poll
      )
      jax.block_until_ready(sampled)
    return [sampled], rewritten, teacher

  def _limits_of(
      self, sampled: list[tuple[PromptBatch, Rollout]], request: Request
  ) -> Limits | None:
    """Says which tokens of the whole update count; None for all."""
    if request.source is None or self._models.config.loss.form != "relaxed":
      return None
    rollouts = [rollout for _, rollout in sampled]
    return self._limits(np.bool_(request.refines), rollouts)

  def teacher_head(
      self, params: Params | None, scores: TeacherScores | None
  ) -> Any:
    """Returns the teacher's head if the loss forms the teacher's logits."""
    if scores is None or scores.hidden is None:
      return None
    return self._models.teacher.head(params)

  def _gather(
      self, shown: list[tuple], sampled: int
  ) -> list[np.ndarray | None]:
    """Brings what microbatches showed to the host, in the prompts' order."""
    found = sharding.to_host(shown)
    size = len(found) // sampled

    def whole(kind: int) -> np.ndarray | None:
      if found[0][kind] is None:
        return None
      arrays = [part[kind] for part in found]
      joined = [
          microbatch.join(arrays[first : first + size])
          for first in range(0, len(arrays), size)
      ]
      return microbatch.join(joined, self.microbatches.per_prompt)

    return [whole(kind) for kind in range(len(found[0]))]

  @property
  def sources(self) -> tuple[str, ...]:
    """The sources of answers that updates sample."""
    rollout = self._models.config.rollout
    if rollout.source == "rewrite":
      return ("rewrite", "student")[: 1 if rollout.source_share == 1 else 2]
    return tuple(self._samplers)

  def update_on_shapes(self, cap: int, source: str = "") -> None:
    """Calls an update's programs on shapes, for `compilation.watching`.

    Supervised training has given answers of `rollout.max_len` tokens.

    Args:
      cap: in tokens.
      source: see `Request`; empty for the first of `sources`.
    """
    state, config = self.abstract_state(), self._models.config
    teacher, given = self.abstract_teacher(), None
    wanted: str | None = source or self.sources[0]
    if teacher is None:
      wanted, given = None, self._abstract_answers()
    key = jax.eval_shape(lambda: jax.random.key(0))
    adaptive = prefix_schedule.make(config)
    threshold = adaptive.threshold(adaptive.start())
    if teacher is not None and config.teacher.refresh:
      teacher = self.refresh(state.params, teacher)
    self.update(
        state,
        teacher,
        self._abstract_prompts(),
        given,
        Request(cap, key, wanted, threshold),
        Clock(),
        self.abstract_base(),
    )

  def _abstract_rows(
      self, *length: int, repeats: int = 1
  ) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns shapes of tokens and of their mask, [B * repeats, length]."""
    place = sharding.batch_sharding(self._models.mesh)
    shape = (self._models.config.data.batch_size * repeats, *length)
    return tuple(
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for dtype in (jnp.int32, bool)
    )

  def _abstract_prompts(self) -> PromptBatch:
    spec, rows = self._models.config.data, self._abstract_rows
    own = rows(spec.teacher_prompt_len) if spec.teacher_prompt else ()
    return PromptBatch(*rows(spec.max_prompt_len), rows()[0], *own)

  def _abstract_answers(self) -> Rollout:
    return Rollout(*self._abstract_rows(self._models.config.rollout.max_len))

  def compile_ahead(self) -> None:
    """Compiles the updates of all buckets in another thread, in order."""
    config = self._models.config
    if self._models.teacher is None:
      return

    def compile_one(variant: compilation.Variant) -> None:
      if self._closed.is_set():
        raise _Closed
      variant.compiled()

    def compile_all() -> None:
      try:
        with compilation.watching(compile_one):
          for bucket in prefix_schedule.needed(config):
            for source in self.sources:
              self.update_on_shapes(bucket, source)
      except Exception:  # pylint: disable=broad-except
        pass  # The update that needs the program raises the error again.

    self._thread = threading.Thread(target=compile_all, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Stops compiling ahead, after the program that is being compiled."""
    self._closed.set()
    self.wait()

  def wait(self) -> None:
    """Waits until all that is compiled ahead is there."""
    if self._thread is not None:
      self._thread.join()

  def compilations(self) -> dict[str, int]:
    """Returns how many compiled programs of each phase have run."""
    sampled = sum(s.used for s in self._samplers.values())
    if self._rewriter is not None:
      sampled += self._rewriter.used
    return {
        "compilations_sample": sampled,
        "compilations_score": self._score.used,
        "compilations_update": self.gradient.used,
    }


def _filled(
    answers: Sequence[Sequence[int]], shape: tuple[int, int], pad_id: int
) -> Rollout:
  """Puts answers into NumPy rows [B, P]; those behind the last are empty."""
  tokens, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
  for row, answer in enumerate(answers):
    tokens[row, : len(answer)], mask[row, : len(answer)] = answer, True
  return Rollout(tokens, mask)


def _rows(tree: Any, which: np.ndarray) -> Any:
  return jax.tree.map(lambda x: x[which], tree)


def _zeros_of(gradient: Any, *args: Any) -> Gradient:
  """Returns a zero accumulator for `gradient(*args)`."""
  shapes = dataclasses.replace(jax.eval_shape(gradient, *args), chosen=None)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
