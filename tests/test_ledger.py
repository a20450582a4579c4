import types

import numpy as np
import pytest
import toys

from prefix_distill.models.transformer import Model
from prefix_distill.report import flops
from prefix_distill.report.flops import Lengths
from prefix_distill.train.ledger import Ledger

STUDENT = toys.model_config()
TEACHER = toys.model_config(dim=64)
THESE = Lengths(
    np.array([3, 5]), np.array([4, 9]), np.array([8, 8]), np.array([4, 2])
)


def setup(method: str, teacher: bool = True, remat: str = "none"):
  return types.SimpleNamespace(
      config=types.SimpleNamespace(method=method),
      student=Model(STUDENT, remat=remat),
      teacher=Model(TEACHER) if teacher else None,
  )


def start() -> dict:
  return {"seconds": 0.0, "answer_len": 20.0}


def test_lines_hold_sums_of_both_accountings_by_phase():
  totals = start()
  ledger = Ledger(setup("prefix"), totals, flops.StepFlops())
  first, second = ledger.add(THESE), ledger.add(THESE, "teacher")
  costs = [
      flops.distillation(STUDENT, TEACHER, THESE, source)
      for source in ("student", "teacher")
  ]
  for phase in flops.PHASES:
    values = [getattr(cost, phase) for cost in costs]
    assert first[f"flops_{phase}"] == values[0]
    assert second[f"flops_{phase}"] == sum(values)
  parts = sum(second[f"flops_{phase}"] for phase in flops.PHASES)
  assert second["flops"] == pytest.approx(parts)
  assert second["flops_paper"] == sum(
      flops.paper_distillation(STUDENT, TEACHER, THESE, source)
      for source in ("student", "teacher")
  )
  assert (second["tokens"], second["rollout_len"]) == (2 * 13, 6.5)
  assert totals["flops"] == second["flops"]


def test_full_distillation_is_estimated_from_whole_answers():
  ledger = Ledger(setup("prefix"), start(), flops.StepFlops())
  whole = Lengths(THESE.prompts, np.full(2, 20.0), THESE.teacher_prompts)
  wanted = flops.distillation(STUDENT, TEACHER, whole).total
  assert ledger.add(THESE)["flops_full_estimate"] == wanted
  ledger = Ledger(setup("full"), start(), flops.StepFlops())
  assert "flops_full_estimate" not in ledger.add(THESE)


def test_it_goes_on_from_a_checkpoints_totals():
  totals = start()
  spent = flops.answers(TEACHER, THESE.prompts, THESE.sampled)
  student = setup("seqkd", teacher=False)
  before = Ledger(student, totals, spent).add(THESE)
  # What the first updates cost is not added once more.
  after = Ledger(student, dict(totals), spent).add(THESE)
  step = flops.supervised(STUDENT, THESE).total
  assert before["flops"] == spent.total + step
  assert after["flops"] == spent.total + 2 * step
  assert after["flops_decode"] == spent.decode
  assert after["flops_paper"] == 2 * flops.paper_supervised(STUDENT, THESE)


def test_what_is_computed_again_is_counted():
  lines = [
      Ledger(setup("full", remat=remat), start(), flops.StepFlops()).add(THESE)
      for remat in ("none", "full")
  ]
  assert lines[0]["flops_backward"] < lines[1]["flops_backward"]
  assert lines[0]["flops_paper"] == lines[1]["flops_paper"]
