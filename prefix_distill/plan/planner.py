"""Puts the plan together: which programs to compile, and what to make of it."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
import re

import rich.console

from prefix_distill.config import Config
from prefix_distill.distill import prefix_length
from prefix_distill.errors import ConfigError
from prefix_distill.plan import build
from prefix_distill.plan import estimate
from prefix_distill.plan import machines
from prefix_distill.plan import measure
from prefix_distill.plan import show
from prefix_distill.plan.estimate import Assumptions
from prefix_distill.plan.machines import Machine
from prefix_distill.plan.measure import Measured
from prefix_distill.specs import MeshSpec
from prefix_distill.train.compile import Stage

# Cheap programs first; the cut moves a few tokens.
_ORDER = ("layout", "apply", "score", "prefill", "decode", "gradient")
# Batches that are tried, each half, double, or what the last one's memory says.
_TRIES = 6
# Searches, each at the longest length at which something does not fit.
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


def _read_mesh(text: str) -> MeshSpec:
  if not re.fullmatch(r"\d+x\d+x\d+", text):
    raise ConfigError(
        f"--mesh={text} is not data x fsdp x tensor; use --mesh=1x16x1 or the"
        " like."
    )
  return MeshSpec(*map(int, text.split("x")))


def _choose_mesh(question: Question) -> tuple[Config, str]:
  """Returns the config with a mesh that fills the machine, and a note."""
  config, machine = question.config, question.machine
  if question.mesh:
    mesh, note = _read_mesh(question.mesh), "as asked for"
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
    )
  return dataclasses.replace(config, mesh=mesh), f"Mesh: {note}."


def _lengths(question: Question) -> tuple[int, ...]:
  """Returns the buckets to compile for.

  Raises:
    ConfigError: a length is longer than the run's longest prefix.
  """
  needed = prefix_length.needed(question.config)
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


@dataclasses.dataclass(frozen=True)
class _Job:
  """A program to look at."""

  plan: build.Plan
  stage: Stage
  bucket: int


def _jobs(plan: build.Plan, buckets: Sequence[int]) -> Iterator[_Job]:
  """Yields the programs to compile, cheap ones first.

  Of the decoders that lead up to a bucket it is the last that takes most; what
  does not depend on the bucket is looked at once.
  """
  jobs = []
  for i, bucket in enumerate(buckets):
    by_name = {stage.name: stage for stage in plan.stages(bucket)}
    for name, stage in by_name.items():
      if name in _ORDER and (i == 0 or name not in ("layout", "apply")):
        jobs.append(_Job(plan, stage, bucket))
  yield from sorted(
      jobs, key=lambda j: (_ORDER.index(j.stage.name), j.bucket)
  )


def _measure(
    jobs: Sequence[_Job], machine: Machine, console: rich.console.Console
) -> list[Measured]:
  """Compiles programs, and says how it goes."""
  out = []
  for i, job in enumerate(jobs):
    label = f"[{i + 1}/{len(jobs)}] {job.stage.name} at P = {job.bucket:,}"
    with console.status(f"{label}: compiling"):
      found = measure.compile_stage(
          job.plan, job.stage, job.bucket, machine,
          estimate.planned(job.plan),
      )  # fmt: skip
    size = found.refused or f"{found.memory / 2**30:.1f} GiB"
    console.print(f"{label}: {size} ({found.seconds:.0f} s)", markup=False)
    out.append(found)
  return out


def _updates(
    plan: build.Plan,
    buckets: Sequence[int],
    compiled: Sequence[Measured],
    question: Question,
) -> list[show.Update]:
  """Reckons updates; what was not compiled sends what its like do."""
  machine, updates = question.machine, []
  for bucket in buckets:
    seconds, limits, flops = {}, {}, 0.0
    for stage in plan.stages(bucket):
      if stage.name not in _ORDER:
        continue
      one = measure.reckon(stage, bucket)
      like = [c for c in compiled if c.name == stage.name and not c.refused]
      if like:
        near = min(like, key=lambda c: abs(c.bucket - bucket))
        one = dataclasses.replace(one, sent=near.sent)
      time, why = estimate.seconds(
          one, machine, question.assumptions, machine.size
      )
      seconds[stage.name] = seconds.get(stage.name, 0.0) + time
      limits[stage.name] = why
      flops += one.times * one.flops
    updates.append(show.Update(bucket, seconds, limits, flops))
  return updates


def _with_tokens(config: Config, name: str, tokens: int) -> Config:
  part = dataclasses.replace(getattr(config, name), batch_tokens=tokens)
  return dataclasses.replace(config, **{name: part})


def _search(
    question: Question,
    config: Config,
    devices: list,
    bucket: int,
    console: rich.console.Console,
) -> tuple[Config, list[str]]:
  """Finds the largest batches that fit at a bucket, by halving and doubling.

  Returns:
    The config with them, and sentences that say so.
  """
  said = []
  for field, names in (
      ("optimizer", ("gradient", "score")), ("rollout", ("decode", "prefill")),
  ):  # fmt: skip
    for name in names:
      config, sentence = _fit(
          question, config, devices, bucket, field, name, console
      )
      said.append(sentence)
  return config, [sentence for sentence in said if sentence]


def _fit(
    question: Question,
    config: Config,
    devices: list,
    bucket: int,
    field: str,
    name: str,
    console: rich.console.Console,
) -> tuple[Config, str]:
  """Lowers one limit until one program fits; raises it if asked to search."""
  length = config.data.max_prompt_len + bucket
  start = getattr(config, field).batch_tokens
  if not start:
    start = 2 ** (config.rollouts_per_step * length - 1).bit_length()
  tokens, best, rows, previous = start, 0, None, None
  for _ in range(_TRIES):
    plan = build.build(_with_tokens(config, field, tokens), devices)
    jobs = [j for j in _jobs(plan, [bucket]) if j.stage.name == name]
    rows = measure.rows_of(jobs[0].stage)
    if rows == previous:  # One row a device, or all of them.
      break
    (found,) = _measure(jobs, question.machine, console)
    fits, previous = found.verdict(question.machine), rows
    if fits:
      best = max(best, tokens)
      if tokens < start or not question.search:
        break
      tokens *= 2
    elif best:
      break
    else:
      # Memory grows with the rows at most.
      excess = found.memory / question.machine.chip.memory
      tokens //= 2 ** max(1, math.floor(math.log2(max(excess, 1))))
  if not best:
    return config, (
        f"{name} at P = {bucket:,} does not fit with {rows} rows at a time"
        " either, a prompt's rollouts for each shard of the batch; use more"
        " devices, --mesh with more tensor shards, fewer rollouts a prompt,"
        " student.remat='full', or offload."
    )
  if best == start and not question.search:
    return config, ""
  return _with_tokens(config, field, best), (
      f"--config.{field}.batch_tokens={best} fits {name} at P = {bucket:,}."
  )


def _settings(
    asked: Config, found: Config, said: Sequence[str]
) -> list[str]:
  """Returns the settings that were found, and what could not be."""
  flags = [
      f"--config.{name}.batch_tokens={getattr(found, name).batch_tokens}"
      for name in ("rollout", "optimizer")
      if getattr(found, name) != getattr(asked, name)
  ]
  failed = [sentence for sentence in said if "does not fit" in sentence]
  return ([" ".join(flags)] if flags else []) + failed


def plan(question: Question, console: rich.console.Console) -> show.Result:
  """Answers a question.

  Raises:
    UserError: the config, the machine or the question is wrong.
    TooLargeError: not even the weights fit.
  """
  config, note = _choose_mesh(question)
  buckets = _lengths(question)
  devices = machines.devices(question.machine)
  built = build.build(config, devices)
  estimate.check_weights(built, question.machine)
  notes = [note]
  for spec in (config.student, config.teacher):
    if not build.architecture(spec.path)[1]:
      notes.append(
          f"{spec.path} could not be read; its architecture is known."
      )
  compiled = _measure(
      list(_jobs(built, buckets)), question.machine, console
  )
  advice, mended = [], []
  latest, tried = compiled, config
  for _ in range(_ROUNDS):
    broken = [c.bucket for c in latest if not c.verdict(question.machine)]
    if not broken and not (question.search and not mended):
      break
    at = max(broken, default=buckets[-1])
    tried, advice = _search(question, config, devices, at, console)
    if tried == config:
      break
    config, built = tried, build.build(tried, devices)
    jobs = list(_jobs(built, buckets))
    latest = mended = _measure(jobs, question.machine, console)
  needed = prefix_length.needed(config)
  compiled_best = mended or compiled
  updates = _updates(built, needed, compiled_best, question)
  seconds = {update.bucket: update.total for update in updates}
  whole = dataclasses.replace(config, method="full")
  if config.longest_prefix < whole.longest_prefix:
    full_plan = build.build(whole, devices)
    lengths = prefix_length.needed(whole)
    (full,) = _updates(full_plan, lengths[-1:], compiled_best, question)
  else:
    full = updates[-1]
  hours = {
      "This run": estimate.run_seconds(config, seconds) / 3600,
      f"Full distillation, all answers of {full.bucket:,} tokens":
      config.steps * full.total / 3600,
  }  # fmt: skip
  return show.Result(
      question.machine, dict(built.setup.mesh.shape), notes,
      estimate.held(built), compiled, mended, updates, hours,
      estimate.least_sent(built), _settings(question.config, config, advice),
      question.assumptions,
  )  # fmt: skip
