import dataclasses
import json

import numpy as np
import pytest
import toys

from prefix_distill.report import flops
from prefix_distill.report.flops import Bought
from prefix_distill.report.flops import Lengths
from prefix_distill.report.flops import Prices
from prefix_distill.report.flops import Totals

STUDENT = toys.model_config()
TEACHER = toys.model_config(dim=64)
THESE = Lengths(
    np.array([3, 5]), np.array([4, 9]), np.array([8, 8]), np.array([4, 2])
)
PRICES = Prices(STUDENT, TEACHER, compares=True)
START = Totals({"step": 0})


def test_lines_hold_sums_of_both_accountings_by_phase():
  first = PRICES.charge(START, THESE)
  second = PRICES.charge(first, THESE, "teacher")
  costs = [
      flops.distillation(STUDENT, TEACHER, THESE, source)
      for source in ("student", "teacher")
  ]
  lines = first.line(), second.line()
  for phase in flops.PHASES:
    values = [getattr(cost, phase) for cost in costs]
    assert lines[0][f"flops_{phase}"] == values[0]
    assert lines[1][f"flops_{phase}"] == sum(values)
  parts = sum(lines[1][f"flops_{phase}"] for phase in flops.PHASES)
  assert lines[1]["flops"] == pytest.approx(parts)
  assert lines[1]["flops_paper"] == sum(
      flops.paper_distillation(STUDENT, TEACHER, THESE, source)
      for source in ("student", "teacher")
  )
  assert lines[1]["tokens"] == 2 * 13


def test_full_distillation_is_estimated_from_whole_answers():
  whole = Lengths(THESE.prompts, np.full(2, 20.0), THESE.teacher_prompts)
  wanted = flops.distillation(STUDENT, TEACHER, whole).total
  line = PRICES.charge(START, THESE, whole=20.0).line()
  assert line["flops_full_estimate"] == wanted
  line = PRICES.charge(START, THESE, whole=0.0).line()
  assert "flops_full_estimate" not in line  # Nothing was evaluated.
  alone = dataclasses.replace(PRICES, compares=False)
  line = alone.charge(START, THESE, whole=20.0).line()
  assert "flops_full_estimate" not in line


def test_sums_go_on_from_a_checkpoint():
  prices = Prices(STUDENT, None)
  before = prices.charge(START, THESE)
  restored = Totals.from_json(json.loads(json.dumps(before.to_json())))
  assert restored == before
  after = prices.charge(restored, THESE)
  step = flops.supervised(STUDENT, THESE).total
  assert (before.flops, after.flops) == (step, 2 * step)
  assert after.flops_paper == 2 * flops.paper_supervised(STUDENT, THESE)


def test_answers_are_paid_for_as_they_are_used():
  cost = flops.answers(TEACHER, THESE.prompts, THESE.sampled)
  # Two updates and a half use each answer once; the fourth pays nothing.
  prices = Prices(STUDENT, None, bought=Bought(cost, 2.5))
  step, totals, paid = flops.supervised(STUDENT, THESE), START, []
  for number in range(4):
    totals = prices.charge(totals, THESE, step=number)
    paid.append(totals.flops - (number + 1) * step.total)
  np.testing.assert_allclose(
      paid, np.array([0.4, 0.8, 1.0, 1.0]) * cost.total
  )
  assert totals.phases.decode == pytest.approx(cost.decode)
  assert totals.phases.total == pytest.approx(totals.flops)


def test_what_is_computed_again_is_counted():
  plain, again = (
      Prices(STUDENT, TEACHER, remat).charge(START, THESE).line()
      for remat in ("none", "full")
  )
  assert plain["flops_backward"] < again["flops_backward"]
  assert plain["flops_paper"] == again["flops_paper"]
