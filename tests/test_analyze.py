"""Analyses of a student and a teacher: positions and gradients."""

import numpy as np
import pytest
import toys

from prefix_distill.config import ConfigError
from prefix_distill.experiments import analyze
from prefix_distill.experiments import results
from prefix_distill.report import report
from prefix_distill.train import setup as setup_lib

LENGTH = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return toys.write_models(tmp_path_factory.mktemp("models"))


def _setup(models, tmp_path) -> setup_lib.Setup:
  return setup_lib.prepare(toys.run_config(*models), tmp_path / "run")


def test_a_student_that_is_the_teacher_has_no_divergence(models, tmp_path):
  student, teacher = models
  found = analyze.position(_setup(models, tmp_path), [student, teacher], 2)
  rollouts = np.array(found[student]["rollouts"])
  assert rollouts[0] == 2 * 8 * 2 and len(rollouts) == LENGTH
  assert np.min(np.array(found[student]["kl"])[rollouts > 0]) > 1e-3
  same = np.array([found[teacher][x] for x in ("kl", "log_ratio")])
  np.testing.assert_allclose(same, 0, atol=1e-5)


def test_the_table_of_positions_adds_up_to_a_rollout():
  found = {
      "rollouts": [4] * 16 + [2] * 84,
      "kl": [0.5] * 16 + [0.25] * 84,
      "log_ratio": [1.0] * 100,
  }
  assert analyze.rows("position", found) == [
      ("0 to 16", "8", "16"),
      ("16 to 64", "6", "24"),
      ("64 to 100", "4.5", "18"),
  ]


def test_a_set_without_answers_of_that_length_has_an_empty_table():
  assert not analyze.rows("teacher_prefix", [])
  report.table(("length", "right"), [], 80)


def test_the_table_of_prefixes_has_intervals():
  row = {"length": 8, "problems": 30, "accuracy_alone": 0.1, "accuracy": 0.5}
  row |= {"accuracy_low": 0.4, "accuracy_high": 0.6}
  assert analyze.rows("teacher_prefix", [row]) == [
      ("8", "50.0 % (40.0-60.0)", "10.0", "30")
  ]


def test_bins_add_up_to_the_nats_of_a_rollout():
  values = {"rollouts": [4] * 16 + [2] * 84, "kl": [0.5] * 16 + [0.25] * 84}
  # Half of the rollouts go on behind the first 16 tokens.
  assert results.binned(values)["nats"] == [8.0, 48 * 0.125, 36 * 0.125]


def test_the_whole_prefix_has_the_whole_gradient(models, tmp_path):
  student, _ = models
  lengths = [4, 8, LENGTH]
  found = analyze.gradient(_setup(models, tmp_path), [student], 2, lengths)
  rows = found[student]["prefixes"]
  assert [row["length"] for row in rows] == lengths
  assert rows[-1]["cosine"] == pytest.approx(1, abs=1e-5)
  assert rows[-1]["norm"] == pytest.approx(1, abs=1e-5)
  cosines = [row["cosine"] for row in rows]
  assert cosines == sorted(cosines) and 0 < cosines[0] < 0.999
  assert 0 < found[student]["halves"] < 1
  assert found[student]["rollouts"] == 2 * 8 * 2
  table = analyze.rows("gradient", found[student])
  assert [row[0] for row in table] == ["4", "8", "16", "halves of all"]
  assert table[2][1:] == ("1.00", "1.00")


@pytest.mark.parametrize(
    "batches, lengths, words",
    [(1, [4], "--batches is 1"), (2, [], "--lengths")],
)
def test_what_cannot_be_compared_is_refused(
    batches, lengths, words, models, tmp_path
):
  with pytest.raises(ConfigError, match=words):
    analyze.gradient(_setup(models, tmp_path), [models[0]], batches, lengths)


def test_the_table_has_means_over_seeds():
  line = {"task": "chain", "what": "position"}
  lines = [
      line | {"cell": "before", "seed": 0, "nats": [1.0, 2.0, 3.0]},
      *(
          line | {"cell": "full", "seed": s, "nats": [0.1 * s, 0.0, 0.5]}
          for s in (1, 2, 3)
      ),
      {
          "task": "chain",
          "what": "gradient",
          "halves": 0.9,
          "rollouts": 24,
          "prefixes": [{"length": 8, "cosine": 0.5, "norm": 0.25}],
      },
  ]
  text = results.mechanism_tables(lines, "chain", {"full": "whole rollouts"})
  half = 0.1 / 3**0.5 * 4.303
  assert "| the student before | 1 | 1.00 | 2.00 | 3.00 |" in text
  assert f"| whole rollouts | 3 | 0.20 (0.00-{0.2 + half:.2f}) | 0.00" in text
  assert "| cosine | 0.50 |" in text and "is 0.90" in text
  assert "from 24 rollouts" in text
  assert results.mechanism_tables(lines, "weak", {}) == ""
