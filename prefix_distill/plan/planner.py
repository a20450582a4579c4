"""Puts the plan together: which programs to compile, and what to make of it."""

from collections.abc import Sequence
import dataclasses
import re

import rich.console

from prefix_distill.config import Config
from prefix_distill.config import MeshSpec
from prefix_distill.distill import prefix_schedule
from prefix_distill.errors import ConfigError
from prefix_distill.plan import build
from prefix_distill.plan import estimate
from prefix_distill.plan import jobs
from prefix_distill.plan import machines
from prefix_distill.plan import measure
from prefix_distill.plan import search
from prefix_distill.plan import show
from prefix_distill.plan.estimate import Assumptions
from prefix_distill.plan.machines import Machine
from prefix_distill.plan.measure import Measured
from prefix_distill.train.compile import Stage

# Searches, each for what the last one's settings still do not fit.
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked.

  Attributes:
    config: of the run.
    machine: to run on.
    lengths: to compile for; empty for a choice.
    mesh: "1x16x1"; empty for a choice.
    assumptions: behind the seconds.
    search: whether to look for the largest batches.
  """

  config: Config
  machine: Machine
  lengths: tuple[int, ...] = ()
  mesh: str = ""
  assumptions: Assumptions = Assumptions()
  search: bool = False


def read_lengths(given: Sequence[str]) -> tuple[int, ...]:
  """Reads --prefix.

  Raises:
    ConfigError: it is no list of lengths.
  """
  if not all(re.fullmatch(r"[1-9]\d*", text) for text in given):
    raise ConfigError(
        f"--prefix={','.join(given)} is no list of lengths; use"
        " --prefix=256,2048 or the like."
    )
  return tuple(sorted({int(text) for text in given}))


def _read_mesh(text: str, given: MeshSpec) -> MeshSpec:
  """Reads --mesh; how sampling takes it is the config's to say."""
  if not re.fullmatch(r"\d+x\d+x\d+", text):
    raise ConfigError(
        f"--mesh={text} is not data x fsdp x tensor; use --mesh=1x16x1 or the"
        " like."
    )
  sizes = map(int, text.split("x"))
  return MeshSpec(*sizes, sampling_tensor=given.sampling_tensor)


def _choose_mesh(question: Question) -> tuple[Config, str]:
  """Returns the config with a mesh that fills the machine, and a note."""
  config, machine = question.config, question.machine
  if question.mesh:
    mesh, note = _read_mesh(question.mesh, config.mesh), "as asked for"
  else:
    given = config.mesh
    rest = given.fsdp * given.tensor
    data = machine.size // rest if given.data == -1 else given.data
    if data * rest == machine.size:
      return config, "Mesh: the config's."
    student, teacher = (
        build.architecture(spec.path)[0]
        for spec in (config.student, config.teacher)
    )
    mesh = estimate.suggest_mesh(config, student, teacher, machine)
    note = (
        "chosen; that of the config does not fill the machine. Use"
        f" --config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp}"
        f" --config.mesh.tensor={mesh.tensor}"
        f" --config.mesh.sampling_tensor={mesh.sampling_tensor}"
    )
  return dataclasses.replace(config, mesh=mesh), f"Mesh: {note}."


def _lengths(question: Question) -> tuple[int, ...]:
  """Returns the buckets to compile for.

  Raises:
    ConfigError: a length is longer than the run's longest prefix.
  """
  needed = prefix_schedule.needed(question.config)
  if not question.lengths:
    return estimate.choose_buckets(question.config)
  longest = max(question.lengths)
  if longest > needed[-1]:
    raise ConfigError(
        f"--prefix={longest} is longer than the run's longest prefix,"
        f" {needed[-1]}; ask for that at most."
    )
  return tuple(sorted({
      min(b for b in needed if b >= length) for length in question.lengths
  }))  # fmt: skip


class _Reckoner:
  """Reckons what updates and evaluations take; traces each program once."""

  def __init__(
      self, plan: build.Plan, compiled: Sequence[Measured], question: Question
  ):
    """Starts with nothing traced.

    Args:
      plan: the run on the machine.
      compiled: what was compiled; what was not sends what its like do.
      question: with the machine and the assumptions.
    """
    self._plan, self._compiled, self._question = plan, compiled, question
    self._known: dict[tuple, Measured] = {}
    self._stages: dict[int, list[Stage]] = {}

  def _run(self, stage: Stage, bucket: int) -> tuple[float, str, float]:
    """Returns seconds of all runs in an update, what limits them, FLOPs."""
    # Of one size of the cache, a segment differs in what it reads alone.
    size = stage.segments.columns if stage.segments else bucket
    key = (stage.name, size, stage.rows)
    if key not in self._known:
      one = measure.reckon(stage, bucket)
      like = [
          c for c in self._compiled if c.name == stage.name and not c.refused
      ]
      if like:
        near = min(like, key=lambda c: abs(c.bucket - bucket))
        one = dataclasses.replace(one, sent=near.sent)
      self._known[key] = one
    one = dataclasses.replace(self._known[key], times=stage.times)
    if stage.segments:
      one = dataclasses.replace(one, moved=measure.moved(stage))
    machine, assumed = self._question.machine, self._question.assumptions
    seconds, why = estimate.seconds(one, machine, assumed, machine.size)
    return seconds, why, one.times * one.flops

  def update(self, cap: int) -> show.Update:
    """Returns an update whose rollouts all reach a cap."""
    config = self._plan.setup.config
    bucket = min(b for b in prefix_schedule.buckets(config) if b >= cap)
    if bucket not in self._stages:
      self._stages[bucket] = self._plan.stages(bucket)
    seconds, limits, flops = {}, {}, 0.0
    for stage in self._stages[bucket]:
      stage = stage.until(cap)
      if stage.name not in jobs.ORDER or not stage.times:
        continue
      time, why, work = self._run(stage, bucket)
      seconds[stage.name] = seconds.get(stage.name, 0.0) + time
      limits[stage.name] = why
      flops += work
    return show.Update(cap, seconds, limits, flops)

  def evaluation(self) -> dict[str, float]:
    """Returns hours of evaluation, if every answer is as long as may be.

    Prompts are not counted. A set whose size is not known raises ConfigError.
    """
    config = self._plan.setup.config
    spec, hours = config.evaluation, {}
    stages = self._plan.evaluation()
    for name, sets, times in estimate.evaluations(config):
      seconds = 0.0
      number = estimate.answers(spec, sets)
      for stage in stages:
        if stage.name == name:
          time, _, _ = self._run(stage, spec.max_len)
          seconds += time * max(number / stage.rows, 1.0)
      which = "teacher" if name == build.EVALUATION["teacher"] else "student"
      often = f"{times} x " if times > 1 else ""
      shown = f"{which}, {often}{number:,} answers"
      hours[shown] = hours.get(shown, 0.0) + times * seconds / 3600
    return hours


def plan(question: Question, console: rich.console.Console) -> show.Result:
  """Answers a question.

  Raises:
    UserError: the config, the machine or the question is wrong.
    TooLargeError: not even the weights fit.
  """
  config, note = _choose_mesh(question)
  buckets = _lengths(question)
  devices = machines.devices(question.machine)
  memory = question.machine.chip.memory
  built = build.build(config, devices, memory)
  estimate.check_weights(built, question.machine)
  notes = [note]
  for spec in (config.student, config.teacher):
    if not build.architecture(spec.path)[1]:
      notes.append(
          f"{spec.path} could not be read; its architecture is known."
      )
  look = jobs.Look(question.machine, devices, console)
  compiled = latest = look.at(config, buckets)
  found = search.Found(config)
  mended = []
  for _ in range(_ROUNDS):
    broken = [c for c in latest if not c.verdict(question.machine)]
    if question.search and not mended:
      broken = latest
    if not broken:
      break
    before = found.config
    found = search.search(look, found, broken, question.search)
    if found.config == before:
      break
    latest = mended = look.at(found.config, buckets)
  settled = found.config
  built = build.build(settled, devices, memory)
  needed = prefix_schedule.needed(settled)
  reckoner = _Reckoner(built, latest, question)
  caps = [prefix_schedule.cap(settled, step) for step in range(settled.steps)]
  seconds = sum(reckoner.update(cap).total for cap in caps)
  evaluation = reckoner.evaluation()
  whole = dataclasses.replace(settled, method="full")
  full = reckoner
  length = prefix_schedule.longest(whole)
  if prefix_schedule.longest(settled) < length:
    full = _Reckoner(build.build(whole, devices, memory), latest, question)
  longest = full.update(length)
  hours = {
      "This run's updates": seconds / 3600,
      f"Full distillation's, all answers of {length:,} tokens":
      settled.steps * longest.total / 3600,
  }  # fmt: skip
  return show.Result(
      question.machine, dict(built.setup.mesh.shape), notes,
      estimate.held(built), compiled, mended,
      [reckoner.update(bucket) for bucket in needed], hours, evaluation,
      estimate.least_sent(built), search.advice(question.config, found),
      question.assumptions,
  )  # fmt: skip
