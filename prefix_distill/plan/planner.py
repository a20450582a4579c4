"""Answers what a run takes on a machine, and finds settings with which it fits.

An update takes as long at least as its products, its memory traffic or what it
sends do, whichever is the most, at a share of the data sheet's numbers.

The search first tries smaller batches, which cost little. Where one row for
each shard is still too much, it tries what costs time: layers are computed
again; moments, layers' inputs or the teacher wait in the host's memory; and
more tensor shards split what a row takes.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
import re

import rich.console

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import records
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.errors import ConfigError
from prefix_distill.errors import counted
from prefix_distill.errors import parse_json
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models import lora
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_adapters
from prefix_distill.models.config import num_params
from prefix_distill.models.config import num_trained
from prefix_distill.plan import programs
from prefix_distill.plan.programs import Look
from prefix_distill.plan.programs import Machine
from prefix_distill.plan.programs import Measured
from prefix_distill.plan.programs import Plan
from prefix_distill.plan.programs import Stage

# How many searches there are; each mends what the last one's settings do not.
_ROUNDS = 3
# How many batches are tried. Each is half or double the last one, or as small
# as the last one's memory says.
_TRIES = 6
# The settings that bound a program's memory, and those programs.
_LIMITS = {
    ("optimizer", "batch_tokens"): ("gradient", "score", programs.SCORING),
    ("rollout", "batch_tokens"): (
        "decode",
        "prefill",
        *programs.REWRITING_ROWS,
    ),
    ("evaluation", "batch_size"): programs.ANSWERING,
}
# Parts of the config that a search may change.
_PARTS = ("mesh", "rollout", "optimizer", "student", "teacher", "evaluation")
_GIB, _FLOAT32 = 2**30, 4
# Shares of a device's memory that the choice of a mesh allows: for weights,
# moments and gradients on one host, and for the longest decoding with all that
# lies beside it.
_HELD, _DECODING = 0.6, 0.85


class TooLargeError(UserError):
  """A run whose weights alone do not fit the machine."""


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What seconds are reckoned with.

  Attributes:
    utilization: share of the peak FLOPs that products reach.
    reach: share of the memory's bandwidth. An H200 reached 0.56 to 0.58 while
      it decoded (docs/results/accelerator.md).
    links: share of the links' bandwidth.
    price: of a device and hour, in any currency; 0 for none.
    source: where utilization or reach was measured; empty if both are assumed.
    missing: which of the two the source lacks, so that it is assumed.
  """

  utilization: float = 0.5
  reach: float = 0.6
  links: float = 0.8
  price: float = 0.0
  source: str = ""
  missing: str = ""


def measured(file: pathlib.Path, price: float = 0.0) -> Assumptions:
  """Reads what `benchmarks/accelerator.py` measured on one device.

  Utilization is that of all scores and gradients together. The memory's share
  is that of the rollouts with the most rows. Both are shares of that device's
  data sheet, so they can be used for another kind of device. A share that the
  file lacks is assumed.

  Args:
    file: the benchmark's results.jsonl.
    price: see `Assumptions`.

  Raises:
    ConfigError: the file cannot be read, or lacks both shares.
  """
  try:
    texts = file.read_bytes().splitlines()
    lines = [parse_json(text) for text in texts]
    done = [one for one in lines if one.get("status") == "done"]
  except (OSError, ValueError, AttributeError) as error:
    raise ConfigError(
        f"--measured={file} cannot be read ({error}); give the results.jsonl"
        " of benchmarks/accelerator.py."
    ) from error
  name = next((str(one["device"]) for one in done if "device" in one), "")
  kind = next((k for k in programs.CHIPS if k in name.lower()), None)
  updates = [
      one
      for one in done
      if one.get("stage") == "update"
      and one["name"].endswith((" score", " gradient"))
  ]
  rollouts = [one for one in done if "least_bytes" in one]
  kinds = f"a device of a known kind ({', '.join(programs.CHIPS)})"
  for found, wanted in (
      (kind, kinds),
      (updates or rollouts, "a rollout, of score or of gradient"),
  ):
    if not found:
      raise ConfigError(
          f"--measured={file} holds no line of {wanted}; run"
          " benchmarks/accelerator.py to its end, or leave --measured out."
      )
  chip, found, missing = programs.CHIPS[kind], {}, ""
  if updates:
    flops, spent = (sum(one[k] for one in updates) for k in ("flops", "phase"))
    found["utilization"] = flops / spent / chip.flops
  else:
    missing = "the products"
  if rollouts:
    most = max(one["rows"] for one in rollouts)
    rollouts = [one for one in rollouts if one["rows"] == most]
    read = sum(one["least_bytes"] for one in rollouts)
    times = ((one["new"] - 1) * one["ms_per_token"] / 1e3 for one in rollouts)
    found["reach"] = read / sum(times) / chip.bandwidth
  else:
    missing = "the memory"
  source = f"{name}, {file}"
  return Assumptions(**found, price=price, source=source, missing=missing)


def least_sent(plan: Plan) -> float:
  """Returns the bytes that a device has to send in one run of `gradient`.

  Layers are gathered over fsdp twice, forward and backward, in the compute
  dtype. The output head is gathered once, and for an exact loss so is the
  teacher's. Gradients are scattered once and then summed over data: those of
  the layers in the compute dtype, the head's in float32. With adapters theirs
  are the only ones; half of an adapter's numbers, about, are split over fsdp,
  and all are counted. What is looked up of the embeddings travels too and is
  not counted here.
  """
  setup, sizes = plan.models, plan.models.mesh.shape
  n, data, tensor = sizes["fsdp"], sizes["data"], sizes["tensor"]
  width, c = setup.student.dtype.itemsize, setup.student.config
  table = c.vocab_size * c.dim
  weights = num_params(c) + num_adapters(c) - table * (1 if c.tied else 2)
  gathered = width * (2 * weights + table)
  scattered = width * weights + _FLOAT32 * table
  if c.lora is not None:
    scattered = width * num_adapters(c)
  if setup.teacher is not None and isinstance(setup.loss, ExactLoss):
    t = setup.teacher.config
    gathered += setup.teacher.dtype.itemsize * t.vocab_size * t.dim
  around = (n - 1) / n * (gathered + scattered) / tensor
  # The gradient of a separate embedding table is in parts from the start.
  apart = c.lora is None and not c.tied
  summed = scattered + (_FLOAT32 * table if apart else 0)
  return around + 2 * (data - 1) / data * summed / tensor / n


def least_seconds(
    one: Measured, machine: Machine, assumptions: Assumptions
) -> tuple[float, str]:
  """Returns how long all runs of a program in an update take, and why.

  It is the longest of what the products, the memory and the links take.
  """
  chip, a = machine.chip, assumptions
  parts = {
      "FLOPs": one.flops / machine.size / (chip.flops * a.utilization),
      "memory": one.moved / (chip.bandwidth * a.reach),
      "links": sum(s / (chip.link * a.links) for s in one.sent.values()),
  }
  why = max(parts, key=parts.__getitem__)
  return one.times * parts[why], why


def evaluations(config: Config) -> Iterator[tuple[str, Sequence[str], int]]:
  """Yields a run's evaluations: the model, names of sets, how often."""
  spec = config.evaluation
  if not spec.sets:
    return
  every = tuple(spec.sets)
  # One before the first update, and the others between updates.
  between = 1 + (max(config.steps - 1, 0) // spec.every if spec.every else 0)
  yield "student", spec.between or every, between
  yield "student", every, 1
  if spec.teacher and not config.is_supervised:
    yield "teacher", every, 1


def num_answers(spec: EvaluationSpec, names: Sequence[str]) -> int:
  """Returns how many answers an evaluation of some sets writes.

  Raises:
    UserError: a set cannot be read, and its size is not known.
  """
  return sum(
      num_problems(spec, name) * (spec.sets[name].samples + int(spec.greedy))
      for name in names
  )


def num_problems(spec: EvaluationSpec, name: str) -> int:
  """Returns how many problems a set has; raises what `num_answers` does."""
  one = spec.sets[name]
  number = one.size or evaluator.PROBLEMS.get(one.source)
  if number is not None:
    return number
  try:
    return len(records.read(one))
  except UserError as error:
    raise ConfigError(
        f"{str(error)[:-1]}. A plan needs the number of its problems alone:"
        f" set evaluation.sets.{name}.size."
    ) from error


def suggest_mesh(
    config: Config,
    student: ModelConfig,
    teacher: ModelConfig,
    machine: Machine,
) -> MeshSpec:
  """Chooses a mesh: as little tensor parallelism as the memory allows.

  Weights, moments and gradients are split over fsdp. That sends less than
  tensor shards do, as long as there is a prompt for each device. The weights
  that decode are split over sampling_tensor alone. So are keys and values; a
  device holds at least those of one prompt's rollouts, and those of one answer
  if the teacher is evaluated. Slices are replicas, and so are the hosts of GPUs
  if one host holds the weights.
  """
  budget = machine.chip.memory
  inside = machine.size // machine.slices
  trained, held = num_trained(student), 0
  if student.lora is not None:
    held += _width(config.student.param_dtype) * num_params(student)
  if not config.shares_weights:
    held += _width(config.teacher.param_dtype) * num_params(teacher)
  held += 4 * _FLOAT32 * trained
  if machine.chip.platform == "gpu":
    host = min(machine.chip.host, inside)
    if held / host <= _HELD * budget:
      inside = host
  prompt = config.data.max_prompt_len
  longest = prompt + prefix_schedule.longest(config)
  rollouts = config.rollout.per_prompt * longest
  decoding = _decoding(config.student, student, rollouts)
  if config.evaluation.sets and config.evaluation.teacher:
    answer = prompt + config.evaluation.max_len
    decoding = max(decoding, _decoding(config.teacher, teacher, answer))
  resting = held - _FLOAT32 * trained  # Gradients come later.
  most = min(inside, student.num_kv_heads)
  tensor = 1
  while tensor < most and config.data.batch_size % (machine.size // tensor):
    tensor *= 2
  sampling, room = tensor, _DECODING * budget - resting / inside
  while sampling < most and decoding / sampling > room:
    sampling *= 2
  return MeshSpec(
      machine.size // inside,
      inside // tensor,
      tensor,
      sampling_tensor=sampling if sampling != tensor else 0,
  )


def _width(dtype: str) -> int:
  return 2 if dtype == "bfloat16" else 4


def _decoding(spec: ModelSpec, model: ModelConfig, tokens: int) -> int:
  """Returns bytes of a model's weights and of some tokens' keys and values."""
  pair = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  return _width(spec.compute_dtype) * (num_params(model) + pair * tokens)


def check_weights(plan: Plan, machine: Machine) -> None:
  """Raises TooLargeError if not even weights and the like fit.

  While the student is differentiated its weights, their gradient and the
  teacher's weights lie side by side, and the moments unless they are offloaded.
  To check that takes no compiler.
  """
  parts, state = bytes_held(plan), plan.programs.abstract_state()
  parts["gradient"] = float(sharding.bytes_per_device(state.params))
  config, offload = plan.models.config, ", or optimizer.offload=True"
  if config.optimizer.offload:
    del parts["moments"]
    offload = ""
  total, limit = sum(parts.values()), machine.chip.memory
  if total <= limit:
    return
  listed = ", ".join(f"{k} {v / _GIB:.1f}" for k, v in parts.items())
  replicas = plan.models.mesh.shape["data"]
  least = math.ceil(total / limit * machine.size / replicas)
  raise TooLargeError(
      f"a device of {machine.name} would hold {total / _GIB:.1f} of"
      f" {limit / _GIB:.2f} GiB before the first activation ({listed}); use"
      f" {least} devices or more with mesh.data=1{offload}."
  )


def bytes_held(plan: Plan) -> dict[str, float]:
  """Returns bytes on a device of what a run keeps throughout.

  A teacher that shares the student's weights adds none.
  """
  state = plan.programs.abstract_state()
  size = sharding.bytes_per_device
  held = {
      "student": float(size(plan.student_params)),
      "moments": float(size(state.opt_state)),
  }
  if plan.models.teacher is not None:
    shared = plan.models.shares_weights
    held["teacher"] = 0.0 if shared else float(size(plan.teacher_params))
  return held


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked.

  Attributes:
    config: the run's config.
    machine: the machine to run on.
    lengths: prefix lengths to compile for; empty for a choice.
    mesh: such as "1x16x1"; empty for a choice.
    assumptions: what seconds are reckoned with.
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
  if not all(re.fullmatch("[1-9][0-9]{0,9}", text) for text in given):
    raise ConfigError(
        f"--prefix={shown(','.join(given))[1:-1]} is no list of lengths; use"
        " --prefix=256,2048 or the like."
    )
  return tuple(sorted({int(text) for text in given}))


def _choose_mesh(question: Question) -> tuple[Config, str]:
  """Returns the config with a mesh that fills the machine, and a note.

  An fsdp axis that takes all devices is kept inside one host; of a larger
  machine the mesh is chosen.

  Raises:
    ConfigError: the mesh that was asked for is none.
  """
  config, machine = question.config, question.machine
  given = config.mesh
  if text := question.mesh:
    if not re.fullmatch("[0-9]{1,9}x[0-9]{1,9}x[0-9]{1,9}", text):
      raise ConfigError(
          f"--mesh={shown(text)[1:-1]} is not data x fsdp x tensor; use"
          " --mesh=1x16x1 or the like."
      )
    mesh = MeshSpec(
        *map(int, text.split("x")), sampling_tensor=given.sampling_tensor
    )
    return dataclasses.replace(config, mesh=mesh), "Mesh: as asked for."
  if given.fsdp != -1 or machine.size <= machine.chip.host:
    full = given.filled(machine.size)
    if full.data * full.fsdp * full.tensor == machine.size:
      return dataclasses.replace(config, mesh=full), "Mesh: the config's."
  student, teacher = (
      programs.architecture(spec.path)[0]
      for spec in (config.student, config.teacher)
  )
  student = lora.adapted(student, config)
  mesh = suggest_mesh(config, student, teacher, machine)
  note = (
      "Mesh: chosen; that of the config is for other machines. Use"
      f" --config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp}"
      f" --config.mesh.tensor={mesh.tensor}"
      f" --config.mesh.sampling_tensor={mesh.sampling_tensor}."
  )
  return dataclasses.replace(config, mesh=mesh), note


def _lengths(question: Question) -> list[int]:
  """Returns the buckets to compile for.

  If none were asked for these are the first, the one nearest to 2048, and the
  last.

  Raises:
    ConfigError: a length is longer than the run's longest prefix.
  """
  needed = prefix_schedule.needed(question.config)
  if not question.lengths:
    middle = min(needed, key=lambda b: abs(b - 2048))
    return sorted({needed[0], middle, needed[-1]})
  longest = max(question.lengths)
  if longest > needed[-1]:
    raise ConfigError(
        f"--prefix={longest} is longer than the run's longest prefix,"
        f" {needed[-1]}; ask for that at most."
    )
  return sorted({min(b for b in needed if b >= n) for n in question.lengths})


@dataclasses.dataclass(frozen=True)
class Update:
  """An update whose cap ends in a bucket.

  Attributes:
    bucket: P.
    seconds: least time, by program.
    limits: what limits each program's time.
    flops: FLOPs in all.
  """

  bucket: int
  seconds: dict[str, float]
  limits: dict[str, str]
  flops: float

  @property
  def total(self) -> float:
    return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Result:
  """The whole plan.

  Attributes:
    machine: the machine that was planned for.
    mesh: sizes of the axes.
    notes: what was assumed, in sentences.
    held: bytes on a device that a run keeps throughout.
    programs: the programs that were compiled.
    mended: the programs with other settings, if the first do not fit or larger
      batches were looked for.
    updates: one for each bucket.
    hours: least time of the run's updates; for prefixes also of full
      distillation's.
    answers: hours in which the teacher answers the prompts before the first
      update, by their number; empty but for SeqKD.
    evaluation: hours of a run's evaluations, by what is evaluated.
    each: seconds of each of the run's updates, in order.
    saved_every: updates from one checkpoint to the next.
    least_sent: bytes that one run of `gradient` has to send.
    advice: the settings of `mended`, or what cannot be made to fit.
    assumptions: what seconds are reckoned with.
  """

  machine: Machine
  mesh: dict[str, int]
  notes: list[str]
  held: dict[str, float]
  programs: list[Measured]
  mended: list[Measured]
  updates: list[Update]
  hours: dict[str, float]
  answers: dict[str, float]
  evaluation: dict[str, float]
  each: list[float]
  saved_every: int
  least_sent: float
  advice: list[str]
  assumptions: Assumptions

  @property
  def fits(self) -> bool:
    return all(one.verdict(self.machine) for one in self.programs)

  @property
  def total_hours(self) -> float:
    """Of the run's updates, and of all else."""
    return sum(self.each) / 3600 + self._other_hours

  @property
  def _other_hours(self) -> float:
    return sum((*self.answers.values(), *self.evaluation.values()))

  @property
  def unsaved_hours(self) -> float:
    """The longest time between two checkpoints, without evaluation."""
    every = self.saved_every
    parts = [
        sum(self.each[i : i + every]) for i in range(0, len(self.each), every)
    ]
    return max(parts, default=0.0) / 3600

  def affordable(self, hours: float) -> int:
    """Returns how many updates fit into so many hours.

    Evaluations and the teacher's answers are taken as they are; what is left
    is for updates.
    """
    left, count = (hours - self._other_hours) * 3600, 0
    for seconds in self.each:
      left -= seconds
      if left < 0:
        break
      count += 1
    return count


def turns(
    result: Result, limit: float, notice: float, budget: float
) -> list[str]:
  """Says how often the run starts, what a kill costs, and what is affordable.

  Args:
    result: the plan.
    limit: hours of a turn; 0 for no limit.
    notice: seconds between a SIGTERM and the end of the process.
    budget: hours or a sum; 0 for none.
  """
  total, unsaved = result.total_hours, result.unsaved_hours
  price = result.assumptions.price * result.machine.size
  cost = f" ({price * unsaved:,.0f})" if price else ""
  lines, graded = [], sum(result.evaluation.values())
  if graded > total / 2:
    lines.append(
        f"Evaluation takes {graded:.1f} of {total:.1f} h if every answer is as"
        " long as it may be: fewer sets or samples, a larger evaluation.every"
        " or a smaller evaluation.max_len shorten it."
    )
  if limit:
    turns = math.ceil(total / limit)
    lines.append(
        f"A time limit of {limit:g} h cuts {total:.1f} h into {turns} turns;"
        " each goes on from the one before."
        if turns > 1
        else f"It ends within a time limit of {limit:g} h."
    )
  longest = max(result.each, default=0.0)
  if longest > notice:
    lines.append(
        f"The longest update takes {longest:,.0f} s, more than the notice of"
        f" {notice:g} s (--notice): a preemption gives that update up, and the"
        " state before it is saved."
    )
  lines.append(
      f"Without notice a kill costs up to {unsaved:.1f} h{cost}: a checkpoint"
      f" comes every {counted(result.saved_every, 'update')}"
      " (checkpoint.every)."
  )
  if budget:
    hours = budget / price if price else budget
    count, steps = result.affordable(hours), len(result.each)
    unit = f"{budget:,.0f}" if price else f"{budget:g} h"
    text = f"{unit} pays for {count} of {counted(steps, 'update')}"
    text += ", evaluation included"
    if count < steps and count:
      text += f": --config.steps={count}"
    lines.append(f"{text}.")
  return lines


class _Reckoner:
  """Reckons what updates and evaluations take; traces each program once."""

  def __init__(
      self, plan: Plan, compiled: Sequence[Measured], question: Question
  ):
    """Starts with nothing traced.

    Args:
      plan: the run on the machine.
      compiled: what was compiled; a program that was not sends what the
        program of the nearest length does.
      question: has the machine and the assumptions.
    """
    self._plan, self._compiled, self._question = plan, compiled, question
    self._known: dict[tuple, Measured] = {}

  def _run(self, stage: Stage, bucket: int) -> tuple[float, str, float]:
    """Returns seconds of all runs in an update, what limits them, FLOPs."""
    # Decoding with one size of the cache differs only in what it reads.
    key = (stage.name, stage.variant)
    if key not in self._known:
      one = programs.reckon(stage, bucket)
      same = [c for c in self._compiled if c.name == one.name and not c.refused]
      if same:
        near = min(same, key=lambda c: abs(c.bucket - bucket))
        one = dataclasses.replace(one, sent=near.sent)
      self._known[key] = one
    one = dataclasses.replace(
        self._known[key], times=stage.times, moved=programs.moved(stage)
    )
    machine, assumptions = self._question.machine, self._question.assumptions
    seconds, why = least_seconds(one, machine, assumptions)
    return seconds, why, one.times * one.flops

  def update(self, cap: int) -> Update:
    """Returns an update whose rollouts all reach a cap."""
    config = self._plan.models.config
    bucket = min(b for b in prefix_schedule.buckets(config) if b >= cap)
    seconds, limits, flops = {}, {}, 0.0
    for stage in self._plan.stages(cap):
      if stage.name not in programs.ORDER or stage.name == "refresh":
        continue  # A refresh moves weights once in many updates.
      time, limits[stage.name], work = self._run(stage, bucket)
      seconds[stage.name] = seconds.get(stage.name, 0.0) + time
      flops += work
    return Update(cap, seconds, limits, flops)

  def evaluation(self) -> dict[str, float]:
    """Returns hours of evaluation, if every answer is as long as may be.

    Prompts are not counted.

    Raises:
      UserError: the size of a set is not known.
    """
    config = self._plan.models.config
    spec, hours, often = config.evaluation, {}, collections.Counter()
    for model, sets, times in evaluations(config):
      often[model, num_answers(spec, sets)] += times
    stages = self._plan.evaluation()
    for (model, number), times in often.items():
      name = programs.EVALUATION[model]
      found = [stage for stage in stages if stage.name == name]
      seconds = self._decoding(found, spec.max_len, number)
      shown = f"{times} x " if times > 1 else ""
      hours[f"{model}, {shown}{number:,} answers"] = times * seconds / 3600
    return hours

  def scoring(self) -> dict[str, float]:
    """Returns hours in which the teacher scores evaluation's answers."""
    config = self._plan.models.config
    spec, stages = config.evaluation, self._plan.scoring()
    if not stages:
      return {}
    at_a_time = config.data.batch_size * config.rollout.per_prompt
    seconds = sum(self._run(stage, spec.max_len)[0] for stage in stages)
    sizes = {x: min(spec.scored, num_problems(spec, x)) for x in spec.sets}
    number = batches = 0
    for model, names, times in evaluations(config):
      if model == "student":
        number += times * sum(sizes[x] for x in names)
        batches += times * sum(-(-sizes[x] // at_a_time) for x in names)
    return {f"student, {number:,} answers scored": batches * seconds / 3600}

  def answers(self) -> dict[str, float]:
    """Returns hours of the teacher's answers to the prompts of SeqKD.

    Each prompt is answered once, as long as may be.
    """
    stages, config = self._plan.answers(), self._plan.models.config
    if not stages:
      return {}
    number = config.steps * config.data.batch_size
    number = min(number, config.data.train.size or number)
    seconds = self._decoding(stages, config.rollout.max_len, number)
    return {f"The teacher's {number:,} answers": seconds / 3600}

  def _decoding(
      self, stages: Sequence[Stage], length: int, number: int
  ) -> float:
    """Returns seconds of a number of answers, all of one length."""
    return sum(
        self._run(stage, length)[0] * max(number / stage.rows, 1.0)
        for stage in stages
    )


def plan(question: Question, console: rich.console.Console) -> Result:
  """Answers a question.

  Args:
    question: what is asked.
    console: for the progress.

  Raises:
    UserError: the config, the machine or the question is wrong.
    TooLargeError: not even the weights fit.
  """
  config, note = _choose_mesh(question)
  machine, buckets = question.machine, _lengths(question)
  # Before the work: the size of a set may not be known.
  num_answers(config.evaluation, [*config.evaluation.sets])
  look = Look(machine, programs.devices(machine), console)
  check_weights(look.build(config), machine)
  notes = [note]
  if config.is_supervised:
    note = (
        "The teacher answers all prompts before the first update, and is gone"
        " while the student learns"
    )
    if config.evaluation.scored:
      note += "; evaluations read it again, to score answers"
    notes.append(f"{note}.")
  elif config.shares_weights:
    notes.append("The teacher's weights are those beside the adapters.")
  for path in dict.fromkeys((config.student.path, config.teacher.path)):
    if not programs.architecture(path)[1]:
      notes.append(f"{path} could not be read; its architecture is known.")
  compiled = latest = look.at(config, buckets)
  found, mended = Found(config), []
  for _ in range(_ROUNDS):
    broken = [c for c in latest if not c.verdict(machine)]
    if question.search and not mended:
      broken = latest
    before = found.config
    found = search(look, found, broken, question.search)
    if found.config == before:
      break
    latest = mended = look.at(found.config, buckets)
  settled = found.config
  built = look.build(settled)
  reckoner = full = _Reckoner(built, latest, question)
  caps = [prefix_schedule.cap(settled, step) for step in range(settled.steps)]
  totals = {cap: reckoner.update(cap).total for cap in set(caps)}
  each = [totals[cap] for cap in caps]
  hours = {"This run's updates": sum(each) / 3600}
  if settled.method == "prefix":
    whole = dataclasses.replace(settled, method="full")
    longest = prefix_schedule.longest(whole)
    if prefix_schedule.longest(settled) < longest:
      full = _Reckoner(look.build(whole), latest, question)
    every = f"Full distillation's, all answers of {longest:,} tokens"
    hours[every] = settled.steps * full.update(longest).total / 3600
  return Result(
      machine,
      dict(built.models.mesh.shape),
      notes,
      bytes_held(built),
      compiled,
      mended,
      [reckoner.update(bucket) for bucket in prefix_schedule.needed(settled)],
      hours,
      reckoner.answers(),
      reckoner.evaluation() | reckoner.scoring(),
      each,
      settled.checkpoint.every,
      least_sent(built),
      advice(dataclasses.replace(question.config, mesh=config.mesh), found),
      question.assumptions,
  )


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search found.

  Attributes:
    config: with the settings that were found.
    failed: a sentence for each program that does not fit with any settings.
  """

  config: Config
  failed: tuple[str, ...] = ()


def search(
    look: Look, found: Found, broken: Sequence[Measured], largest: bool
) -> Found:
  """Changes settings until programs fit, one program after the other.

  Args:
    look: compiles programs.
    found: what earlier searches found.
    broken: the programs, as measured with the config of `found`.
    largest: whether to look for the largest batches that fit.
  """
  config, failed = found.config, list(found.failed)
  longest = {one.name: one for one in broken}  # The last is the longest.
  bounded = {name: s for s, names in _LIMITS.items() for name in names}
  rest = sorted(longest.keys() - bounded.keys())
  for name in [*(name for name in bounded if name in longest), *rest]:
    one = longest[name]
    wanted = _Wanted(look, one, found.config, bounded.get(name), largest)
    better = map(wanted.largest_batch, _remedies(config, name))
    better = next((c for c in better if c is not None), None)
    if better is None:
      failed.append(
          f"{name} at P = {one.bucket:,} does not fit with the smallest"
          " batches either; use more devices, or fewer rollouts a prompt."
      )
    else:
      config = better
  return Found(config, tuple(dict.fromkeys(failed)))


def _with(config: Config, part: str, **fields) -> Config:
  return dataclasses.replace(
      config, **{part: dataclasses.replace(getattr(config, part), **fields)}
  )


def _remedies(config: Config, name: str) -> Iterator[Config]:
  """Yields the config, then with one remedy more at a time."""
  yield config

  def change(part: str, **fields) -> Callable[[Config], Config]:
    return functools.partial(_with, part=part, **fields)

  steps: list[Callable[[Config], Config]] = []
  if name == "gradient" and config.student.remat != "offload":
    steps.append(change(part="student", remat="full"))
  steps.append(change(part="optimizer", offload=True))
  if name == "gradient":
    steps.append(change(part="student", remat="offload"))
  heads = programs.architecture(config.student.path)[0].num_kv_heads
  split = _split_training
  if name not in ("gradient", "score", "apply"):
    split = _split_sampling
    steps.append(change(part="teacher", offload=True))
  steps += [functools.partial(split, most=heads)] * int(math.log2(heads))
  for step in steps:
    try:
      changed = step(config)
    except ConfigError:
      continue  # Batches or axes that do not divide.
    if changed != config:
      yield changed
    config = changed


def _split_training(config: Config, most: int) -> Config:
  mesh = config.mesh
  sampling, tensor = mesh.sampling_tensor or mesh.tensor, 2 * mesh.tensor
  if tensor > most or mesh.fsdp % 2:
    return config
  sampling = 0 if sampling == tensor else sampling
  fsdp = mesh.fsdp // 2
  return _with(
      config, "mesh", fsdp=fsdp, tensor=tensor, sampling_tensor=sampling
  )


def _split_sampling(config: Config, most: int) -> Config:
  mesh = config.mesh
  sampling = 2 * (mesh.sampling_tensor or mesh.tensor)
  if sampling > most or mesh.fsdp * mesh.tensor % sampling:
    return config
  return _with(config, "mesh", sampling_tensor=sampling)


@dataclasses.dataclass(frozen=True)
class _Wanted:
  """A program that is to fit.

  Attributes:
    look: compiles the program.
    measured: what the program takes with `config`.
    config: the config before the search.
    setting: part and field that bound the program's batch; None if none does.
    largest: whether the largest batch that fits is asked for.
  """

  look: Look
  measured: Measured
  config: Config
  setting: tuple[str, str] | None
  largest: bool

  def largest_batch(self, config: Config) -> Config | None:
    """Lowers one limit until the program fits; raises it if asked to.

    Returns:
      The config with that limit; None if the program does not fit with any.
    """
    if self.setting is None:
      one = self._measure(config)
      return config if one.verdict(self.look.machine) else None
    part, field = self.setting
    start = getattr(getattr(config, part), field)
    if not start:  # As many rows as it was measured with.
      start = self.measured.rows
      if field == "batch_tokens":
        asked = self.measured.name in programs.REWRITING_ROWS
        prompt = config.data.max_prompt_len
        prompt = config.rollout.rewrite.max_prompt_len if asked else prompt
        start *= prompt + self.measured.bucket
      start = 2 ** (start - 1).bit_length()
    limit, best, previous = start, None, None
    for _ in range(_TRIES):
      try:
        one = self._measure(_with(config, part, **{field: limit}), previous)
      except ConfigError:
        break  # Fewer rows than shards.
      if one is None:  # One row a device, or all of them.
        break
      previous = one.rows
      if one.verdict(self.look.machine):
        best = limit
        if limit < start or not self.largest:
          break
        limit *= 2
      elif best is not None:
        break
      else:
        # Memory grows with the rows at most.
        excess = max(one.memory / self.look.machine.chip.memory, 1)
        limit //= 2 ** max(1, math.floor(math.log2(excess)))
    if best is None:
      return None
    return config if best == start else _with(config, part, **{field: best})

  def _measure(
      self, config: Config, previous: int | None = None
  ) -> Measured | None:
    """Measures the program; None if it has as many rows as the last one."""
    job = self.look.job(config, self.measured.name, self.measured.bucket)
    if job.rows == previous:
      return None
    return self.measured if config == self.config else self.look.measure(job)


def advice(asked: Config, found: Found) -> list[str]:
  """Returns the settings that were found as flags, and what did not fit."""
  flags = []
  for part in _PARTS:
    old, new = getattr(asked, part), getattr(found.config, part)
    for field in dataclasses.fields(new):
      value = getattr(new, field.name)
      if value != getattr(old, field.name):
        flags.append(f"--config.{part}.{field.name}={value}")
  return ([" ".join(flags)] if flags else []) + list(found.failed)
