"""The programs to compile for a plan, in order, with what is found of them."""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

import rich.console

from prefix_distill.config import Config
from prefix_distill.plan import build
from prefix_distill.plan import estimate
from prefix_distill.plan import measure
from prefix_distill.plan.machines import Machine
from prefix_distill.plan.measure import Measured
from prefix_distill.train.compile import Stage

# Cheap programs first; the cut moves a few tokens.
ORDER = (
    "move", "layout", "apply", "score", "prefill", *build.EVALUATION.values(),
    "decode", "gradient",
)  # fmt: skip
# The same at all lengths.
_ONCE = ("move", "layout", "apply")


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to look at."""

  plan: build.Plan
  stage: Stage
  bucket: int

  @property
  def rows(self) -> int:
    return self.stage.rows


def jobs(plan: build.Plan, buckets: Sequence[int]) -> Iterator[Job]:
  """Yields the programs to compile, cheap ones first.

  Of the decoders that lead up to a bucket it is the last that takes most; what
  does not depend on the bucket is looked at once.
  """
  longest = plan.setup.config.evaluation.max_len
  last = {stage.name: stage for stage in plan.evaluation()}
  found = [Job(plan, stage, longest) for stage in last.values()]
  for i, bucket in enumerate(buckets):
    by_name = {stage.name: stage for stage in plan.stages(bucket)}
    for name, stage in by_name.items():
      if name in ORDER and (i == 0 or name not in _ONCE):
        found.append(Job(plan, stage, bucket))
  yield from sorted(
      found, key=lambda j: (ORDER.index(j.stage.name), j.bucket)
  )


@dataclasses.dataclass(frozen=True)
class Look:
  """Compiles programs for a machine, and says how it goes.

  Attributes:
    machine: to compile for.
    devices: of it.
    console: for the progress.
  """

  machine: Machine
  devices: list
  console: rich.console.Console

  def at(self, config: Config, buckets: Sequence[int]) -> list[Measured]:
    """Compiles all programs of a config."""
    plan = build.build(config, self.devices, self.machine.chip.memory)
    todo = list(jobs(plan, buckets))
    return [
        self.measure(job, f"[{i}/{len(todo)}] ")
        for i, job in enumerate(todo, 1)
    ]

  def job(self, config: Config, name: str, bucket: int) -> Job:
    """Returns one program of a config."""
    plan = build.build(config, self.devices, self.machine.chip.memory)
    found = jobs(plan, (bucket,))
    return next(job for job in found if job.stage.name == name)

  def measure(self, job: Job, number: str = "") -> Measured:
    """Compiles a program, and says so; a number goes before its name."""
    label = f"{number}{job.stage.name} at P = {job.bucket:,}"
    label += f", {job.rows:,} rows" if job.rows else ""
    with self.console.status(f"{label}: compiling"):
      found = measure.compile_stage(
          job.plan, job.stage, job.bucket, self.machine,
          estimate.planned(job.plan, job.stage.name),
      )  # fmt: skip
    size = found.refused or f"{found.memory / 2**30:.1f} GiB"
    seconds = f"({found.seconds:.0f} s)"
    self.console.print(f"{label}: {size} {seconds}", markup=False)
    return found
