import dataclasses

import numpy as np
import pytest
import toys

from prefix_distill.experiments import paper_tables
from prefix_distill.experiments.paper_tables import TABLES
from prefix_distill.models.config import num_params
from prefix_distill.models.config import QWEN3_1_7B
from prefix_distill.models.config import QWEN3_8B
from prefix_distill.report import flops
from prefix_distill.report.flops import Convention
from prefix_distill.report.flops import Lengths


def test_training_equals_a_count_by_hand():
  config = toys.model_config(num_layers=2)
  layer = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 2 * 8 + 3 * 16 * 32 + 2 * 16
  wanted = 6 * (2 * layer + 16) * 7 + 12 * 2 * 4 * 8 * 7**2
  assert flops.paper_train(config, [7]) == wanted


@pytest.mark.parametrize("tied", [True, False])
def test_a_convention_says_what_n_counts(tied):
  config = toys.model_config(tied=tied)
  table = config.vocab_size * config.dim
  everything = Convention(head=True, table=True).params(config)
  assert everything == num_params(config)
  assert Convention(head=True).params(config) == everything - table * (not tied)
  assert Convention().params(config) == everything - table * (1 + (not tied))


def test_an_update_is_what_appendix_b_says():
  student, teacher = toys.model_config(), toys.model_config(dim=64)
  these = Lengths(np.array([3]), np.array([4, 9]))
  train, forward = (
      lambda c: flops.paper_train(c, [7, 12]),
      lambda c: flops.paper_train(c, [7, 12]) / 3,
  )
  wanted = train(student) + 2 * forward(student) + forward(teacher)
  cost = flops.paper_distillation
  assert cost(student, teacher, these) == pytest.approx(wanted)
  assert flops.paper_supervised(student, these) == train(student)
  given = cost(student, teacher, these, "data")
  assert given == pytest.approx(wanted - forward(student))
  theirs = cost(student, teacher, these, "teacher")
  assert theirs == pytest.approx(given + forward(teacher))


def test_a_longer_teacher_prompt_and_a_shorter_update_count():
  config = toys.model_config()
  these = Lengths(np.array([3]), np.array([4, 9]))
  base = flops.paper_distillation(config, config, these)
  longer = dataclasses.replace(these, teacher_prompts=np.array([8]))
  shorter = dataclasses.replace(these, trained=np.array([4, 2]))
  assert flops.paper_distillation(config, config, longer) > base
  assert flops.paper_distillation(config, config, shorter) < base


def test_the_papers_models_are_as_large_as_their_cards_say():
  small, large = QWEN3_1_7B, QWEN3_8B
  assert num_params(small) == pytest.approx(1.72e9, rel=0.002)
  assert num_params(large) == pytest.approx(8.19e9, rel=0.002)
  assert Convention().params(small) == pytest.approx(1.4e9, rel=0.01)
  assert Convention().params(large) == pytest.approx(6.95e9, rel=0.01)


@pytest.fixture(scope="module")
def prompt() -> int:
  return paper_tables.fit_prompt(paper_tables.FITTED)[0]


@pytest.fixture(params=TABLES, ids=lambda t: t.name)
def found(request, prompt):
  rows = list(paper_tables.rows(request.param, prompt))
  return {row.method: row for row in rows}


def test_fixed_prefixes_fit_with_one_prompt_length(found, prompt):
  assert 200 < prompt < 260
  for length in paper_tables.PREFIXES:
    row = found[f"prefix {length}"]
    assert row.fitted == pytest.approx(row.paper, rel=0.035)


def test_fixed_prefixes_do_not_fit_as_the_formula_is_written(found):
  for length in paper_tables.PREFIXES:
    row = found[f"prefix {length}"]
    assert 1.45 < row.written / row.paper < 1.95
  _, off = paper_tables.fit_prompt(paper_tables.WRITTEN)
  assert off > 1.5


def test_rollouts_that_run_to_their_caps_cost_at_least_the_total(found):
  for method, most in (("full, 10", 1.4), ("full", 1.2), ("schedule", 1.05)):
    row = found[method]
    assert 1 <= row.fitted / row.paper < most


def test_seqkd_fits_both_tables_only_roughly(found):
  for steps in (300, 1500):
    row = found[f"SeqKD, {steps}"]
    assert row.fitted == pytest.approx(row.paper, rel=0.045)
    assert row.written == row.fitted


def test_other_readings_fit_worse(prompt):
  _, best = paper_tables.fit_prompt(paper_tables.FITTED)
  for changes in ({"head": True}, {"head": True, "table": True}):
    reading = dataclasses.replace(paper_tables.FITTED, **changes)
    _, off = paper_tables.fit_prompt(reading)
    assert off - 1 > 2 * (best - 1)
  # Half of attention fits the prefixes as well, but then not even rollouts
  # that all run to their caps cost what the schedule did.
  half = dataclasses.replace(paper_tables.FITTED, attention=6)
  prompt, _ = paper_tables.fit_prompt(half)
  for table in TABLES:
    cost = paper_tables.rollouts(
        table.student, prompt, paper_tables.SCHEDULE, half
    )
    assert cost < 0.9 * table.totals["schedule"]


def test_the_command_prints_both_tables_and_what_is_inferred(capsys):
  paper_tables.main()
  out = capsys.readouterr().out
  for text in (
      "Qwen3-1.7B-Base",
      "Qwen3-8B-Base",
      "prefix 2048",
      "9.4e+17",
      "2.2e+20",
      "inferred",
      "not published",
  ):
    assert text in out
