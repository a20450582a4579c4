"""A run's running sums of FLOPs and tokens, for each metrics line."""

import dataclasses
from typing import Any

import numpy as np

from prefix_distill.report import flops
from prefix_distill.report.flops import Lengths
from prefix_distill.report.flops import StepFlops
from prefix_distill.train import setup as setup_lib


class Ledger:
  """Adds up what the updates cost; the sums lie in the running totals."""

  def __init__(
      self,
      setup: setup_lib.Setup,
      totals: dict[str, Any],
      spent: StepFlops,
  ):
    """Starts, or goes on from what a checkpoint's totals hold.

    Args:
      setup: of the run.
      totals: of the run. Their `answer_len` is the mean length of whole
        answers, from which the cost of full distillation is estimated.
      spent: before the first update. The paper's formula does not count that.
    """
    self._setup, self._totals = setup, totals
    for phase, value in dataclasses.asdict(spent).items():
      totals.setdefault(f"flops_{phase}", value)
    totals.setdefault("flops", spent.total)
    for name in ("flops_paper", "flops_full", "tokens"):
      totals.setdefault(name, 0)

  def add(self, lengths: Lengths, source: str = "student") -> dict[str, Any]:
    """Adds an update and returns its part of the metrics line: the sums.

    Args:
      lengths: of its sequences.
      source: who sampled the answers, as `flops.distillation` takes it.
    """
    totals, cost = self._totals, self._cost(lengths, source)
    for phase, value in dataclasses.asdict(cost).items():
      totals[f"flops_{phase}"] += value
    totals["flops"] += cost.total
    totals["flops_paper"] += self._paper(lengths, source)
    totals["tokens"] += int(lengths.sampled.sum())
    names = ("tokens", "flops", "flops_paper")
    line = {"rollout_len": float(lengths.sampled.mean())}
    line |= {name: totals[name] for name in names}
    line |= {f"flops_{name}": totals[f"flops_{name}"] for name in flops.PHASES}
    if self._setup.config.method == "prefix":
      line["flops_full_estimate"] = self._add_full(lengths)
    return line

  def _cost(self, lengths: Lengths, source: str) -> StepFlops:
    student, teacher = self._setup.student, self._setup.teacher
    if teacher is None:
      return flops.supervised(student.config, lengths, student.remat)
    return flops.distillation(
        student.config, teacher.config, lengths, source, student.remat
    )

  def _paper(self, lengths: Lengths, source: str) -> float:
    student, teacher = self._setup.student, self._setup.teacher
    if teacher is None:
      return flops.paper_supervised(student.config, lengths)
    return flops.paper_distillation(
        student.config, teacher.config, lengths, source
    )

  def _add_full(self, lengths: Lengths) -> float:
    """Adds what the same update would cost with whole answers."""
    whole = np.full(len(lengths.sampled), self._totals["answer_len"])
    full = dataclasses.replace(lengths, sampled=whole, trained=None)
    self._totals["flops_full"] += self._cost(full, "student").total
    return self._totals["flops_full"]
