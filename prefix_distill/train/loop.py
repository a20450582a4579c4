"""The run: sample, score, update; evaluate, save, report.

The order is a contract. After update k: its metrics line, then the checkpoint
if one is due, then the evaluation if one is due, before which there always is a
checkpoint. A run that was killed anywhere goes on from its last checkpoint,
after cutting what was written past it, and so ends with the numbers of a run
that was never stopped. An evaluation keeps the answers that it has.

Before the first update of SeqKD the teacher answers each prompt once.
"""

import collections
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import signal
import statistics
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import tqdm

from prefix_distill import config as config_lib
from prefix_distill import distributed
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import DatasetSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import gym
from prefix_distill.data import prompts as prompts_lib
from prefix_distill.data import records
from prefix_distill.data.prompts import Asking
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.distill import prefix_schedule
from prefix_distill.errors import counted
from prefix_distill.errors import one_line
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models import lora
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import flops
from prefix_distill.report import page
from prefix_distill.report import report
from prefix_distill.report import trackers
from prefix_distill.report.flops import Bought
from prefix_distill.report.flops import Lengths
from prefix_distill.report.flops import Prices
from prefix_distill.report.flops import Totals
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.train import microbatch
from prefix_distill.train import samples
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib
from prefix_distill.train import update as update_lib
from prefix_distill.train import workdir as workdir_lib
from prefix_distill.train.checkpoint import Checkpointer
from prefix_distill.train.step import TrainState
from prefix_distill.train.update import Programs


class Stop:
  """Turns Ctrl-C or a preemption into a wish to stop after the update.

  Attributes:
    wanted: whether a signal came.
    notice: seconds between a SIGTERM and the end of the process.
    deadline: when the process ends, on `time.monotonic`'s clock; infinite but
      after a SIGTERM.
  """

  wanted = False
  deadline = math.inf

  def __init__(self, notice: float = math.inf):
    """Notes how many seconds a SIGTERM leaves to the process."""
    self.notice = notice

  def ask(self, number: int, *_: Any) -> None:
    self.wanted = True
    if number == signal.SIGTERM:
      self.deadline = min(self.deadline, time.monotonic() + self.notice)
    if not _ignored(signal.SIGINT):
      # A second Ctrl-C does not wait.
      signal.signal(signal.SIGINT, signal.default_int_handler)
    print("\nSaving and stopping ...", file=sys.stderr, flush=True)


def _ignored(number: signal.Signals) -> bool:
  return signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def stop_on_signal(notice: float = math.inf) -> Iterator[Stop]:
  """Waits for Ctrl-C and SIGTERM; see `Stop`.

  A run that was started with SIGINT ignored, as a script's background job is,
  is not stopped by a Ctrl-C that is meant for another program.
  """
  stop, numbers = Stop(notice), [signal.SIGTERM]
  if not _ignored(signal.SIGINT):
    numbers.append(signal.SIGINT)
  try:
    before = [signal.signal(number, stop.ask) for number in numbers]
  except ValueError:  # Not the main thread, as in some notebooks.
    yield stop
    return
  try:
    yield stop
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)


_NOTHING = Bought()
# Seconds that are kept free before a deadline, besides twice a save.
_MARGIN = 3.0
# Seconds between two tries to save a state after which nothing comes.
_RETRY = 20.0
# Polls of an update between two questions to the other processes.
_EVERY = 8
# An update is slow if it takes so many times the others, and so many seconds.
_SLOW, _SLOW_SECONDS = 10, 10.0
# Answers of an evaluation that a tracker gets.
_TEXTS = 4
# What a disk that is full or read-only raises.
_DISK_ERRORS = (OSError, safetensors.SafetensorError)
# Updates after which their time is known; the first ones compile.
_KNOWN = 5
# The teacher's answers of SeqKD; their columns of lengths, and the key of the
# lengths of unended answers.
_ANSWERS, _UNFINISHED = "answers.parquet", "unfinished/teacher-answers.jsonl"
_LENGTHS, _UNENDED = ["prompt_tokens", "tokens"], b"unended"


class Stopped(Exception):
  """The user stopped the run; the same command goes on with it."""


class Abandoned(Exception):
  """An update that would not end in time."""


class NotFiniteError(UserError):
  """Numbers that stay infinite or NaN."""


class SaveError(UserError):
  """A state that could not be saved in time."""


class AnswersError(UserError):
  """Answers that cannot be written."""


class Run:
  """One run in one workdir."""

  def __init__(
      self,
      setup: setup_lib.Setup,
      workdir: pathlib.Path,
      bought: Bought = _NOTHING,
      stop: Stop | None = None,
      lock: workdir_lib.Lock | None = None,
      tracker: str = "none",
  ):
    """Starts or goes on.

    Args:
      setup: what the run needs besides weights.
      workdir: of the run.
      bought: answers that were made before the first update.
      stop: says when the user or the machine wants the run to stop.
      lock: the workdir's lock, in the process that holds it.
      tracker: what `trackers.check` returned.
    """
    self.tracker = trackers.Tracker()
    self._tracker_name = tracker
    models, self.lock = setup.models, lock
    self.setup, self.models, self.workdir = setup, models, workdir
    self.config = config = models.config
    self.programs = Programs(models)
    self._scoring = setup.scoring and Programs(setup.scoring)
    self.checkpointer = Checkpointer(workdir, config.checkpoint)
    self.schedule = prefix_schedule.make(config)
    self.prices = Prices(
        models.student.config,
        models.teacher and models.teacher.config,
        models.student.remat,
        compares=config.method == "prefix",
        bought=bought,
        sees=bool(self.schedule.sees),
    )
    self.totals = Totals(self.schedule.start())
    self.key = jax.random.key(config.seed)
    self.teacher_params: Params | None = None
    # The student's weights beside adapters, which nothing changes.
    self.base: Params | None = None
    self.stop = stop or Stop()
    # Seconds of the last updates, and of the slowest save.
    self._durations: collections.deque[float] = collections.deque(maxlen=9)
    self._save_seconds, self._polls = 0.0, 0
    # Seconds of an answer in the last evaluation.
    self._answer_seconds = 0.0
    self._recent: collections.deque = collections.deque(maxlen=11)
    self._alarms = {"skipped"}  # Each skipped update is said at once.
    self.writes = jax.process_index() == 0
    if self.writes:
      workdir.mkdir(parents=True, exist_ok=True)
    self.state = self._start()
    self.programs.compile_ahead()

  def _start(self) -> TrainState:
    """Restores the last whole checkpoint, or loads the student."""
    models = self.models
    has_adapters = models.student.config.lora is not None
    found = self.checkpointer.restore(
        self.programs.abstract_state(), self.programs.abstract_teacher()
    )
    self.last_saved = step = found and found.step
    if found is None:
      workdir_lib.check_not_lost(self.workdir)
      if has_adapters:
        params = setup_lib.load_adapters(self.config, models.student)
      else:
        params = self._load(self.config.student, models.student)
      state = self.programs.init(params)
    else:
      state, self.totals = found.state, found.totals
      self.setup.data.set_state(found.data)
      print(f"Resuming after update {step} of {self.config.steps}.")
    lines = []
    if self.writes:
      self.writer = report.MetricsWriter(self.workdir / "metrics.jsonl", step)
      lines = self.writer.kept
      self.tracker = trackers.make(
          self._tracker_name,
          self.workdir,
          config_lib.plain(self.config),
          step,
      )
    # Evaluations that are done: model, set, mode; and their answers' length.
    self.evaluated, self.answer_len = distributed.from_first(
        "evaluations", _evaluations(lines, step)
    )
    if has_adapters:
      self.base = self._load(self.config.student, models.student)
    self.keeper = samples.Keeper(
        self.config,
        self.setup.tokenizer,
        models.stop_ids,
        samples.Writer(self.workdir, step, self.evaluated)
        if self.writes
        else None,
    )
    if found is not None and found.teacher is not None:
      self.teacher_params = found.teacher
    elif models.shares_weights:
      self.teacher_params = self.base
    elif models.teacher is not None:
      self.teacher_params = self._load(self.config.teacher, models.teacher)
    return state

  def _load(self, spec: ModelSpec, model: Model) -> Params:
    poll = functools.partial(_poll, self.stop, "while weights were read")
    return setup_lib.load_model(
        spec, model, self.models.mesh, self.config.seed, poll
    )

  @property
  def student_params(self) -> Params:
    """The student's weights, adapters included."""
    return lora.join(self.base, self.state.params)

  @property
  def cap(self) -> int:
    """The next update's cap in tokens; 0 if the schedule ends the run."""
    return self.schedule.cap(self.totals.schedule)

  def is_last(self, step: int) -> bool:
    """Whether no update comes after update `step`, counted from 1."""
    return step == self.config.steps or self.cap == 0

  def is_due(self, step: int) -> bool:
    """Whether the student is evaluated after update `step`."""
    every = self.config.evaluation.every
    return not step or self.is_last(step) or bool(every and step % every == 0)

  def seconds_left(self, step: int) -> float:
    """Guesses how long the run takes after update `step`, evaluations too.

    An evaluation that is due after this very update is still to come. The guess
    assumes that updates last as the last ones did, and answers as those of the
    last evaluation.
    """
    steps = range(step, self.config.steps + 1)
    evaluated = [self._sets(one) for one in steps if self.is_due(one)]
    if self.models.teacher is not None and self.config.evaluation.teacher:
      evaluated.append(self.setup.problems)
    answers = sum(map(self._count, evaluated))
    update = statistics.median(self._durations) if self._durations else 0.0
    return (self.config.steps - step) * update + answers * self._answer_seconds

  def _count(self, sets: dict[str, evaluator.Problems]) -> int:
    """Returns how many answers an evaluation of some sets has."""
    greedy = int(self.config.evaluation.greedy)
    return sum(len(x.answers) * (x.samples + greedy) for x in sets.values())

  def write(self, values: dict[str, Any]) -> None:
    if self.lock is not None:
      self.lock.check()
    if self.writes:
      self.writer.write(values)
      self.tracker.write(values)

  def save(self, must: bool = False) -> None:
    """Saves; if the disk fails, the run goes on with the last checkpoint.

    Args:
      must: whether nothing comes after. Then it tries until there is room, or
        until the deadline of a preemption.
    """
    if self.lock is not None:
      self.lock.check()
    start, step = time.perf_counter(), int(self.state.step)
    while True:
      try:
        self.checkpointer.save(
            self.state,
            self.setup.data.get_state(),
            self.totals,
            self.teacher_params if self.totals.teacher_update else None,
        )
      except UserError:
        raise
      except Exception as error:  # Orbax and TensorStore raise many kinds.
        self.checkpointer.reopen()
        reason, last = one_line(error), self.last_saved
        good = "there is no checkpoint" if last is None else (
            f"the last good one is that of update {last}"
        )
        text = f"The state after update {step} could not be saved ({reason})"
        if time.monotonic() + _RETRY > self.stop.deadline:
          raise SaveError(f"{text}; {good}.") from error
        then = f"tries again in {_RETRY:g} s" if must else "goes on"
        tqdm.tqdm.write(f"Warning: {text}; {good}. The run {then}.")
        if not must:
          return
        time.sleep(_RETRY)
      else:
        break
    self.last_saved = step
    passed = time.perf_counter() - start
    self._save_seconds = max(self._save_seconds, passed)

  def warn(self, line: dict[str, Any]) -> None:
    """Prints the report's alarms, each kind once."""
    self._recent.append(line)
    for kind, text in report.alarms(self._recent).items():
      if self.writes and kind not in self._alarms:
        tqdm.tqdm.write(text)
      self._alarms.add(kind)

  def stops(self) -> bool:
    """Whether any process wants to stop: a signal may reach only one."""
    return _any_process(self.stop.wanted)

  def _poll_update(self, begin: float) -> None:
    """Raises Abandoned if the update and a save would not end in time.

    Args:
      begin: when the update began, on `time.monotonic`'s clock.
    """
    self._polls += 1
    if jax.process_count() > 1 and self._polls % _EVERY:
      return  # The processes ask each other only now and then.
    deadline = self.stop.deadline - 2 * self._save_seconds - _MARGIN
    expected = time.monotonic()
    if self._durations:
      expected = max(expected, begin + statistics.median(self._durations))
    if _any_process(expected > deadline):
      raise Abandoned

  def _tell_of_notice(self) -> None:
    """Says once that an update and a save take longer than the notice."""
    notice = self.stop.notice
    if len(self._durations) == _KNOWN and self.writes:
      update = statistics.median(self._durations)
      if update + self._save_seconds > notice:
        tqdm.tqdm.write(
            f"An update takes {update:.0f} s and a save"
            f" {self._save_seconds:.0f} s, more than the {notice:g} s between a"
            " SIGTERM and the end (--notice): a preemption loses the"
            " update that it interrupts."
        )

  def _refresh(self, step: int) -> None:
    """Copies the student to the teacher if update `step`, from 0, needs that.

    A copy that no update would see is not made: after the last update the
    teacher is the one that scored it.
    """
    every = self.config.teacher.refresh if self.models.teacher else 0
    if every and step and step % every == 0:
      self.teacher_params = self.programs.refresh(
          self.state.params, self.teacher_params
      )
      self.totals = dataclasses.replace(self.totals, teacher_update=step)

  def _teacher_update(self) -> dict[str, int]:
    """Returns what lines say of a teacher that is refreshed."""
    if not (self.models.teacher and self.config.teacher.refresh):
      return {}
    return {"teacher_update": self.totals.teacher_update}

  def evaluate(self, step: int, which: str = "student") -> None:
    """Evaluates the student or the teacher on all sets.

    A teacher that is refreshed is the one of the last update, and its lines
    say after which update it was the student.
    """
    setup, models = self.setup, self.models
    model, params = models.student, self.student_params
    stop_ids = models.stop_ids
    if which == "teacher":
      model = models.teacher
      params = self.programs.on_device(self.teacher_params)
      stop_ids = models.teacher_stop_ids
    start = time.perf_counter()

    def file(name: str, mode: str) -> pathlib.Path | None:
      if [which, name, mode] in self.evaluated:
        return None
      file = f"step-{step}-{which}-{name}-{mode}.jsonl"
      return self.workdir / "unfinished" / file.replace("/", "_")

    def write(
        values: dict[str, Any], completions: evaluator.Completions
    ) -> None:
      self.keeper.write_answers(
          step,
          which,
          values["mode"],
          sets[values["set"]],
          completions,
          values["verdicts"],
          shown,
      )
      verdicts = values["verdicts"][:: values["samples"]]
      graded = zip(completions.texts, verdicts, strict=True)
      self.tracker.text(
          f"{which}/{values['set']}/{values['mode']}",
          "\n\n".join(
              f"[{'right' if right == '1' else 'wrong'}] {texts[0]}"
              for texts, right in itertools.islice(graded, _TEXTS)
          ),
          step,
      )
      if which == "student" and values["mode"] == "sampled":
        self.answer_len = values["mean_length"]
        if spec.scored:
          problems = sets[values["set"]]
          values = values | self._divergence(problems, completions)
      if which == "teacher":
        values = values | self._teacher_update()
      self.write({
          "step": step,
          "model": which,
          "flops": self.totals.flops,
          **values,
          "seconds_evaluate": time.perf_counter() - start,
      })
      if self.writes:
        tqdm.tqdm.write(report.evaluation_line(which, step, values))

    spec, model = self.config.evaluation, models.for_sampling(model)
    sets = self._sets(step)
    if not sets:
      return
    shown = self.keeper.problems(step, self.is_last(step))
    sampler = evaluator.sampler_config(
        spec, stop_ids, models.pad_id, models.num_tokens
    )
    rows = microbatch.answers(
        models,
        model,
        sampler,
        self.programs.resting(),
        evaluator.longest_prompt(sets),
    )
    evaluator.evaluate(
        model,
        params,
        setup.tokenizer,
        spec,
        sets,
        sampler,
        rows,
        self.config.seed,
        write,
        file,
        functools.partial(_poll, self.stop, "during an evaluation"),
        (shown, spec.scored),
    )
    passed = time.perf_counter() - start
    self._answer_seconds = passed / max(self._count(sets), 1)

  def _divergence(
      self, problems: evaluator.Problems, completions: evaluator.Completions
  ) -> dict[str, Any]:
    """Returns how far from the teacher the student's whole answers are."""
    count = self.config.evaluation.scored
    numbers = sorted(report.spread(range(len(problems.answers)), count))
    prompts = jax.tree.map(lambda x: x[np.array(numbers)], problems.batch)
    programs, teacher = self.programs, self.teacher_params
    if self._scoring is not None:  # Updates have the teacher's memory.
      programs, models = self._scoring, self.setup.scoring
      teacher = self.base
      if not models.shares_weights:
        teacher = self._load(self.config.teacher, models.teacher)
    nats = programs.divergences(
        self.student_params,
        programs.on_device(teacher),
        prompts,
        [completions.tokens[number] for number in numbers],
    )
    return report.divergence(nats)

  def _sets(self, step: int) -> dict[str, evaluator.Problems]:
    """Returns the sets to evaluate after update `step`."""
    between, sets = self.config.evaluation.between, self.setup.problems
    if self.is_last(step) or not between:
      return sets
    return {name: sets[name] for name in between}

  def update(self, step: int) -> dict[str, Any]:
    """Does update number `step` (from 0) and returns its metrics line."""
    begin, clock, config = time.perf_counter(), update_lib.Clock(), self.config
    poll = functools.partial(self._poll_update, time.monotonic())
    self.evaluated = []
    self._refresh(step)
    cap, source = self.cap, prefix_schedule.source(config, step)
    place = self.setup.data.get_state()
    prompts, completions = next(self.setup.data)
    asking = None
    if source == "rewrite":
      questions = self.setup.data.questions(prompts.index)
      asking = Asking(self.setup.rewriting, questions, prompts.index)
    request = update_lib.Request(
        cap,
        jax.random.fold_in(self.key, step),
        None if config.is_supervised else source,
        self.schedule.threshold(self.totals.schedule),
        config.loss.refines(step),
        poll,
        self.keeper.wants_rollouts(step + 1),
        asking,
    )
    try:
      with self._watched(step + 1, clock):
        self.state, done = self.programs.update(
            self.state,
            self.teacher_params,
            *sharding.global_batch((prompts, completions), self.models.mesh),
            request,
            clock,
            self.base,
        )
    except Abandoned:
      self.setup.data.set_state(place)
      raise
    if done.inspected is not None:
      self.keeper.write_rollouts(
          step + 1, request.source or "data", done.inspected
      )
    lengths = _lengths(prompts, done, config)
    totals = self.prices.charge(
        self.totals, lengths, source, self.answer_len, step
    )
    totals = self._after(step, prompts, done, totals)
    line = {"step": step + 1, "prefix_len": cap}
    line |= self._line(request, source, done, totals)
    passed = time.perf_counter() - begin
    self._durations.append(passed)
    self._tell_of_notice()
    self.totals = dataclasses.replace(
        totals, seconds=totals.seconds + passed
    )
    return line | {
        **self.setup.data.counts(),
        **self.programs.compilations(),
        "seconds": self.totals.seconds,
        **clock.seconds,
        "tokens_per_second": lengths.drawn / passed,
    }

  def _after(
      self,
      step: int,
      prompts: PromptBatch,
      done: update_lib.Outcome,
      totals: Totals,
  ) -> Totals:
    """Returns the totals after update `step`, from 0, finite or skipped."""
    if done.metrics["finite"]:
      stats = prefix_schedule.stats(done.metrics, done.mask, done.minima)
      state = self.schedule.next(totals.schedule, stats)
      return dataclasses.replace(totals, schedule=state, skipped_running=0)
    self._report_skipped(step + 1, prompts, done)
    return dataclasses.replace(
        totals,
        skipped=totals.skipped + 1,
        skipped_running=totals.skipped_running + 1,
    )

  def _line(
      self,
      request: update_lib.Request,
      source: str,
      done: update_lib.Outcome,
      totals: Totals,
  ) -> dict[str, Any]:
    """Returns what an update showed, as its metrics line has it."""
    config, mask = self.config, done.mask
    line = _flatten(done.metrics, config) | {"skipped": totals.skipped}
    line |= self._teacher_update()
    line |= {"rollout_len": float(mask.sum(1).mean())} | totals.line()
    if config.rollout.source != "student":
      line["source"] = source
    if done.rewritten is not None:
      line |= done.rewritten.metrics()
    if "least_entropy" in done.metrics:
      line["phase"] = "refinement" if request.refines else "exploration"
    if done.minima is not None:
      line["trained_len"] = float(done.trained.sum(1).mean())
    if not config.is_supervised:
      stops = {*self.models.stop_ids}
      if done.rewritten is not None:
        stops |= {*self.models.teacher_stop_ids}
      line |= report.rollout_metrics(done.tokens, mask, [*stops])
    return line

  @contextlib.contextmanager
  def _watched(self, step: int, clock: update_lib.Clock) -> Iterator[None]:
    """Says what an update waits for if it takes far longer than the others."""
    if len(self._durations) < _KNOWN:
      yield
      return
    usual = statistics.median(self._durations)
    limit = max(_SLOW * usual, _SLOW_SECONDS)

    def tell() -> None:
      tqdm.tqdm.write(
          f"Process {jax.process_index()}: update {step} has taken"
          f" {limit:.0f} s, the others {usual:.0f} s; it is in the phase"
          f" {clock.current or 'gather'!r}. It may compile, or wait"
          " for another process or for the disk."
      )

    timer = threading.Timer(limit, tell)
    timer.daemon = True
    timer.start()
    try:
      yield
    finally:
      timer.cancel()

  def _report_skipped(
      self, step: int, prompts: PromptBatch, done: update_lib.Outcome
  ) -> None:
    """Says which phase had numbers that are not finite; keeps the batch."""
    self.cause = step_lib.first_not_finite(done.metrics)
    if not self.writes:
      return
    file = self.workdir / "skipped" / f"step-{step}.safetensors"
    kept = f"Its batch is in {file}."
    try:
      file.parent.mkdir(exist_ok=True)
      safetensors.numpy.save_file(
          {
              "prompt_tokens": prompts.tokens,
              "prompt_mask": prompts.mask,
              "record": prompts.index,
              "tokens": done.tokens,
              "mask": done.mask,
          },
          file,
      )
    except _DISK_ERRORS as error:
      kept = f"{file} cannot be written ({one_line(error)})."
    tqdm.tqdm.write(
        f"Update {step} was skipped: numbers of {self.cause} are not finite."
        f" {kept}"
    )

  def check_skipped(self, step: int) -> None:
    """Raises NotFiniteError if too many updates in a row were skipped."""
    running, last = self.totals.skipped_running, self.last_saved
    if running >= self.config.optimizer.max_skipped:
      raise NotFiniteError(
          f"The run skipped its last {counted(running, 'update')}, up to"
          f" {step}, because numbers of {self.cause} are not finite; the"
          f" batches are in {self.workdir / 'skipped'}, and the last good"
          f" checkpoint is that of update {last}. Lower"
          " optimizer.learning_rate, or look at the models and at those"
          " batches."
      )


def _lengths(
    prompts: PromptBatch, done: update_lib.Outcome, config: Config
) -> Lengths:
  """Returns the actual lengths of an update's sequences."""
  rewriting = done.rewritten and done.rewritten.lengths
  read = prompts.for_teacher().mask.sum(1)
  if rewriting and config.rollout.rewrite.scored_in == "rewriting":
    read = rewriting.prompts
  return Lengths(
      prompts.mask.sum(1),
      done.mask.sum(1),
      read,
      done.trained.sum(1),
      rewriting,
  )


def _flatten(metrics: dict[str, Any], config: Config) -> dict[str, float]:
  """Makes flat JSON of the update's metrics.

  Bins of positions and special tokens that no token belonged to are left out,
  and so are a threshold that is off and the statistics that only the schedule
  reads.
  """
  out = {}
  width = step_lib.bin_width(config.rollout.max_len)
  for name, value in metrics.items():
    if name in ("kl_position", "sampler", "finite"):
      continue
    if name.startswith(prefix_schedule.SHOWN):
      continue
    if np.ndim(value) == 0:
      optional = name in ("kl_special", "least_entropy")
      if not optional or np.isfinite(value):
        out[name] = float(value)
      continue
    for i, part in enumerate(value):
      if np.isfinite(part):
        out[f"{name}_{i * width}"] = float(part)
  return out


def _any_process(wanted: bool) -> bool:
  """Returns whether any process wants something; every process must ask."""
  if jax.process_count() == 1:
    return wanted
  return bool(np.any(multihost_utils.process_allgather(np.array(wanted))))


def _poll(stop: Stop, when: str) -> None:
  """Raises Stopped if any process wants to stop; every process must ask."""
  if _any_process(stop.wanted):
    raise Stopped(f"Stopped {when}; the same command goes on from there.")


@contextlib.contextmanager
def _trace(directory: pathlib.Path, step: int) -> Iterator[None]:
  """Writes what the host and the devices do inside, for xprof and Perfetto."""
  with (
      jax.profiler.trace(directory / "trace"),
      jax.profiler.StepTraceAnnotation("update", step_num=step),
  ):
    yield


def _evaluations(
    lines: list[dict[str, Any]], step: int | None
) -> tuple[list[list[str]], float]:
  """Returns what was evaluated after a step, and the answers' last length."""
  found = [line for line in lines if "mode" in line]
  done = [
      [line["model"], line["set"], line["mode"]]
      for line in found
      if line["step"] == step
  ]
  lengths = [
      line["mean_length"]
      for line in found
      if line["model"] == "student" and line["mode"] == "sampled"
  ]
  return done, lengths[-1] if lengths else 0.0


def _steps(run: Run, traced: Collection[int]) -> None:
  """Evaluates, then updates until the last step."""
  config, first, is_due = run.config, int(run.state.step), run.is_due
  if not first:
    run.save()
  if is_due(first):
    run.evaluate(first)
  bar = tqdm.tqdm(
      total=config.steps,
      initial=first,
      desc=config.method,
      unit="update",
      disable=not run.writes,
      # What tqdm takes for the time left knows no evaluations.
      bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
      # A log file gets a line now and then instead of a moving bar.
      mininterval=0.1 if sys.stderr.isatty() else 10,
  )
  with bar:
    for step in range(first, config.steps):
      if run.cap == 0:
        break
      try:
        with contextlib.ExitStack() as stack:
          if step + 1 in traced:
            stack.enter_context(_trace(run.workdir, step + 1))
          line = run.update(step)
      except Abandoned:
        run.save(must=True)
        raise Stopped(
            f"Stopped in update {step + 1} of {config.steps}, which would not"
            " have ended in time; the same command goes on from the one before."
        ) from None
      run.write(line)
      run.warn(line)
      run.check_skipped(step + 1)
      left = tqdm.tqdm.format_interval(run.seconds_left(step + 1))
      shown = {"left": left} | report.progress(line)
      bar.set_postfix(shown, refresh=step == first)
      bar.update()
      done, stopping = step + 1, run.stops()
      due = is_due(done)
      if due or stopping or done % config.checkpoint.every == 0:
        run.save(must=stopping or run.is_last(done))
      if stopping and not run.is_last(done):
        raise Stopped(
            f"Stopped after update {done} of {config.steps}; the same command"
            " goes on from there."
        )
      if due:
        run.evaluate(done)
      if run.is_last(done):  # Nothing is left.
        bar.set_postfix(report.progress(line), refresh=False)


def _with_answers(
    setup: setup_lib.Setup, workdir: pathlib.Path, poll: Callable[[], None]
) -> tuple[setup_lib.Setup, Bought]:
  """Returns the setup of SeqKD's supervised part; makes the answers if need be.

  Only answers that end by themselves are kept. All of the run's prompts are
  answered, each once: `steps * data.batch_size`, or as many as there are.

  Args:
    setup: of the run, with the teacher.
    workdir: keeps the answers so far, so that a run that was stopped or killed
      goes on with them.
    poll: called every few seconds; it may raise to stop.

  Returns:
    The setup, and what the answers cost, unended ones included.

  Raises:
    DataError: no answer ended within `rollout.max_len` tokens.
    AnswersError: the answers cannot be written.
  """
  path, unfinished = workdir / _ANSWERS, workdir / _UNFINISHED
  if path.is_dir():
    raise AnswersError(
        f"{path} is a directory, but the run writes the teacher's answers to a"
        " file of that name; remove the directory."
    )
  if not distributed.from_first("answers", path.is_file()):
    rows = list(_teacher_answers(setup, unfinished, poll))
    if not any(row["ended"] for row in rows):
      raise records.DataError(
          f"None of the teacher's answers ended within rollout.max_len"
          f" {setup.models.config.rollout.max_len} tokens; raise it."
      )
    if jax.process_index() == 0:
      _write_answers(rows, path)
  distributed.wait("answers")
  continuous_batching.forget_answers(unfinished)
  spec = DatasetSpec(str(path), question="question", completion="completion")
  config = setup.models.config
  data = PromptIterator(
      dataclasses.replace(config.data, train=spec),
      setup.tokenizer,
      seed=config.seed,
      completion_len=config.rollout.max_len,
  )
  table = pq.read_table(path, columns=_LENGTHS)
  lengths = np.stack([np.asarray(table[name]) for name in _LENGTHS], axis=1)
  others = json.loads(table.schema.metadata[_UNENDED])
  lengths = np.concatenate([lengths, np.reshape(others, (-1, 2))])
  spent = flops.answers(setup.models.teacher.config, *lengths.T)
  learning = dataclasses.replace(
      setup,
      data=data,
      models=dataclasses.replace(setup.models, teacher=None),
      scoring=setup.models.scoring if config.evaluation.scored else None,
  )
  return learning, Bought(spent, table.num_rows / config.data.batch_size)


def _write_answers(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Writes the answers, whole or not at all; of the unended only lengths."""
  partial = path.with_suffix(".partial")
  unended = [[row[x] for x in _LENGTHS] for row in rows if not row["ended"]]
  table = pa.Table.from_pylist([row for row in rows if row["ended"]])
  table = table.drop_columns("ended")
  table = table.replace_schema_metadata({_UNENDED: json.dumps(unended)})
  try:
    pq.write_table(table, partial)
    partial.rename(path)
  except OSError as error:
    raise AnswersError(
        f"{path} could not be written ({one_line(error)}); make"
        " room or make it writable, and the same command goes on with the"
        " answers."
    ) from error


def _questions(config: Config) -> list[records.Question]:
  source = records.read(config.data.train)
  count = min(config.steps * config.data.batch_size, len(source))
  order = np.random.default_rng(config.seed).permutation(len(source))[:count]
  name, found = config.data.train.question, []
  for i in order:
    with contextlib.suppress(gym.NotMade):
      found.append(records.question(source[int(i)], name, f"record {i + 1}"))
  return found


def _teacher_answers(
    setup: setup_lib.Setup, file: pathlib.Path, poll: Callable[[], None]
) -> Iterator[dict[str, Any]]:
  """Samples the teacher's answers; yields records in the prompts' order."""
  models, tokenizer = setup.models, setup.tokenizer
  config, kept = models.config, []
  for question in _questions(config):
    row = prompts_lib.encode_prompt(
        tokenizer, question, config.data.max_prompt_len, config.data.suffix
    )
    if row is not None and not setup.data.is_asked(*row):
      kept.append((question, row))
  batch = prompts_lib.stack([row for _, row in kept], range(len(kept)))
  model = models.for_sampling(models.teacher)
  sampler_config = generate.SamplerConfig(
      stop_ids=models.teacher_stop_ids,
      pad_id=tokenizer.pad_id,
      num_tokens=tokenizer.num_tokens,
  )
  # It is alone on the devices, so that nothing waits in the host's memory.
  params = setup_lib.load_model(
      dataclasses.replace(config.teacher, offload=False),
      models.teacher,
      models.mesh,
      config.seed,
      poll,
  )
  rows = microbatch.answers(
      models,
      model,
      sampler_config,
      params,
      batch.tokens.shape[1],
      config.rollout.max_len,
  )
  engine = continuous_batching.Engine(model, sampler_config, params, rows)
  draw = generate.Draw.of(config.rollout.max_len, config.rollout.temperature)
  answers = tqdm.tqdm(
      continuous_batching.kept_answers(
          engine, batch, jax.random.key(config.seed), draw, file, poll
      ),
      total=len(kept),
      desc="teacher's answers",
      disable=jax.process_index() > 0,
      mininterval=1,
  )
  # The order in which answers end depends on where a run was stopped.
  for number, tokens, stopped in sorted(answers, key=lambda found: found[0]):
    yield {
        "question": kept[number][0],
        "completion": tokenizer.decode([int(t) for t in tokens[:-1]]),
        "prompt_tokens": int(batch.mask[number].sum()),
        "tokens": len(tokens),
        "ended": stopped,
    }


def _write_report(workdir: pathlib.Path) -> None:
  """Writes the report; that it cannot be written does not fail the run."""
  try:
    page.write(workdir)
  except Exception as error:  # pylint: disable=broad-except
    print(
        f"Warning: the report could not be written ({error}); the model is in"
        f" {workdir / 'export'}, and the same command writes the report again.",
        flush=True,
    )


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    traced: Collection[int] = (),
    notice: float = math.inf,
    tracker: str = "none",
) -> None:
  """Runs to the last update, and writes the report and the export.

  Args:
    config: the settings.
    workdir: see the README.
    traced: updates, counted from 1, whose trace is written to workdir/trace.
    notice: seconds between a SIGTERM and the end of the process.
    tracker: one of `trackers.NAMES`.

  Raises:
    ValueError: a setting, file or model does not fit; see `setup.prepare`.
    Stopped: the user asked for it; the state is saved.
  """
  tracker, workdir = trackers.check(tracker), pathlib.Path(workdir)
  setup = setup_lib.prepare(config, workdir)
  with workdir_lib.claimed(config, workdir, setup.contents) as lock:
    _train(setup, workdir, traced, notice, lock, tracker)


def _train(
    setup: setup_lib.Setup,
    workdir: pathlib.Path,
    traced: Collection[int],
    notice: float,
    lock: workdir_lib.Lock | None,
    tracker: str,
) -> None:
  """Does what `train` says in a workdir that is held."""
  config, writes = setup.models.config, jax.process_index() == 0
  if not workdir_lib.is_finished(workdir):
    if writes:
      shape = setup.models.mesh.shape
      print(report.headline(config, shape, workdir), flush=True)
      print(f"on {sharding.describe_devices()}", flush=True)
      if idle := sharding.unused_accelerator():
        print(f"Warning: {idle}", file=sys.stderr, flush=True)
    bought = _NOTHING
    with stop_on_signal(notice) as stop:
      if config.method == "seqkd":
        poll = functools.partial(_poll, stop, "while the teacher answers")
        setup, bought = _with_answers(setup, workdir, poll)
      run = Run(setup, workdir, bought, stop, lock, tracker)
      try:
        _steps(run, traced)
        if setup.models.teacher is not None and config.evaluation.teacher:
          run.evaluate(int(run.state.step), "teacher")
      except Stopped:
        raise  # There may be no time to wait for what is being compiled.
      except BaseException:
        run.programs.close()
        raise
      else:
        if run.writes and tracker != "none":
          lines = report.read_metrics(workdir / "metrics.jsonl")
          trackers.show_figures(run.tracker, lines, config.method)
      finally:
        run.tracker.close()
    run.programs.close()
    run.checkpointer.close()
    try:
      setup_lib.export_student(
          config,
          run.student_params,
          setup.models.stop_ids,
          workdir / "export",
          workdir,
          int(run.state.step),
      )
    except _DISK_ERRORS as error:
      raise SaveError(
          f"{workdir / 'export'} could not be written"
          f" ({one_line(error)}); make room or make it writable,"
          " and the same command writes it from the last checkpoint."
      ) from error
  if writes:
    with contextlib.suppress(OSError):
      (workdir / "unfinished").rmdir()
    _write_report(workdir)
