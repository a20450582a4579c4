"""What a run saves: its state, the data stream's place, and running sums."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from prefix_distill import distributed
from prefix_distill.config import CheckpointSpec
from prefix_distill.errors import UserError
from prefix_distill.models.config import ModelConfig
from prefix_distill.report import flops
from prefix_distill.report.flops import Lengths
from prefix_distill.report.flops import StepFlops
from prefix_distill.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the updates so far, and the schedule's state.

  Attributes:
    schedule: the state of the prefix schedule, JSON.
    seconds: time of the updates.
    tokens: sampled tokens.
    flops: all FLOPs, those before the first update included.
    phases: the same by phase.
    flops_paper: FLOPs by the paper's formula, of the updates alone.
    flops_full: an estimate of what the same updates would have cost with whole
      answers.
    skipped: updates that were skipped because numbers were not finite.
    skipped_running: how many of the last updates were skipped.
  """

  schedule: dict[str, Any]
  seconds: float = 0.0
  tokens: int = 0
  flops: float = 0.0
  phases: StepFlops = StepFlops()
  flops_paper: float = 0.0
  flops_full: float = 0.0
  skipped: int = 0
  skipped_running: int = 0

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "Totals":
    return cls(**values | {"phases": StepFlops(**values["phases"])})

  def line(self) -> dict[str, Any]:
    """Returns the sums as a metrics line has them."""
    line = {
        "tokens": self.tokens,
        "flops": self.flops,
        "flops_paper": self.flops_paper,
    }
    for phase, value in dataclasses.asdict(self.phases).items():
      line[f"flops_{phase}"] = value
    if self.flops_full:
      line["flops_full_estimate"] = self.flops_full
    return line


@dataclasses.dataclass(frozen=True)
class Prices:
  """What an update of certain models costs.

  Attributes:
    student: the student's architecture.
    teacher: the teacher's; None for supervised training.
    remat: what the student computes again, see `ModelSpec`.
    compares: whether full distillation's cost is estimated too.
  """

  student: ModelConfig
  teacher: ModelConfig | None
  remat: str = "none"
  compares: bool = False

  def charge(
      self,
      totals: Totals,
      lengths: Lengths,
      source: str = "student",
      whole: float = 0.0,
  ) -> Totals:
    """Adds an update to the sums.

    Args:
      totals: before the update.
      lengths: of the update's sequences.
      source: who sampled the answers, as `flops.distillation` takes it.
      whole: mean length of whole answers, for the estimate of full
        distillation's cost.
    """
    cost, before = self._cost(lengths, source), totals.phases
    phases = StepFlops(**{
        phase: getattr(before, phase) + getattr(cost, phase)
        for phase in flops.PHASES
    })
    full = 0.0
    if self.compares:
      answers = np.full(len(lengths.sampled), whole)
      answers = dataclasses.replace(lengths, sampled=answers, trained=None)
      full = self._cost(answers, "student").total
    return dataclasses.replace(
        totals,
        tokens=totals.tokens + int(lengths.sampled.sum()),
        flops=totals.flops + cost.total,
        phases=phases,
        flops_paper=totals.flops_paper + self._paper(lengths, source),
        flops_full=totals.flops_full + full,
    )

  def _cost(self, lengths: Lengths, source: str) -> StepFlops:
    if self.teacher is None:
      return flops.supervised(self.student, lengths, self.remat)
    return flops.distillation(
        self.student, self.teacher, lengths, source, self.remat
    )

  def _paper(self, lengths: Lengths, source: str) -> float:
    if self.teacher is None:
      return flops.paper_supervised(self.student, lengths)
    return flops.paper_distillation(
        self.student, self.teacher, lengths, source
    )


class CheckpointError(UserError):
  """A checkpoint that cannot be restored."""


class Checkpointer:
  """Saves and restores; a checkpoint appears whole or not at all."""

  def __init__(self, directory: pathlib.Path, spec: CheckpointSpec):
    self._manager = ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=spec.keep, enable_async_checkpointing=False
        ),
    )

  def latest_step(self) -> int | None:
    """Returns the last saved step, the one that process 0 sees."""
    return distributed.from_first("step", self._manager.latest_step())

  def save(self, state: TrainState, data: str, totals: Totals) -> None:
    """Saves after an update; every process must call it.

    Args:
      state: what the next update starts from.
      data: the position of the data stream, the same in all processes.
      totals: the running sums.
    """
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            host=ocp.args.JsonSave(
                {"data": data, "totals": totals.to_json()}
            ),
        ),
    )

  def restore(self, abstract: TrainState) -> tuple[TrainState, str, Totals]:
    """Restores the latest checkpoint straight into its shards.

    Args:
      abstract: shapes, dtypes and shardings of the state.

    Raises:
      CheckpointError: it is damaged.
    """
    step = self.latest_step()
    try:
      restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardRestore(abstract),
              host=ocp.args.JsonRestore(),
          ),
      )
    except Exception as error:
      raise CheckpointError(
          f"The checkpoint of step {step} in {self._manager.directory} cannot"
          f" be restored ({distributed.first_line(error)}); delete that step's"
          " directory to go back to the one before."
      ) from error
    totals = Totals.from_json(restored.host["totals"])
    return restored.state, restored.host["data"], totals

  def close(self) -> None:
    self._manager.close()
