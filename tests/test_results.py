import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from prefix_distill import config as config_lib
from prefix_distill.experiments import analyze
from prefix_distill.experiments import reproduce


def row(cell, seed, step, accuracy, flops, student="capable"):
  return {
      "student": student, "cell": cell, "seed": seed, "step": step,
      "accuracy": accuracy, "flops": flops, "problems": 100,
      "finish_rate": 1.0, "mean_length": 9.0, "repetition": 0.0,
  }  # fmt: skip


ROWS = pd.DataFrame([
    *(row("full", seed, 0, 0.2, 0.0) for seed in (0, 1, 2)),
    *(row("full", seed, 10, 0.5, 50.0) for seed in (0, 1, 2)),
    *(row("full", seed, 50, 0.9, 100.0) for seed in (0, 1, 2)),
    row("short", 0, 10, 0.6, 10.0),
    row("short", 0, 20, 0.9, 20.0),
    # Which ended earlier.
    row("short", 1, 10, 0.9, 10.0),
])


def test_an_interval_is_at_least_that_of_the_problems():
  same = [row("a", seed, 1, 0.9, 1.0) for seed in range(3)]
  mean, low, high = analyze.interval(pd.DataFrame(same))
  half = 1.96 * (0.9 * 0.1 / 300) ** 0.5
  assert (mean, low, high) == pytest.approx((0.9, 0.9 - half, 0.9 + half))


def test_an_interval_knows_how_seeds_differ():
  apart = [row("a", i, 1, x, 1.0) for i, x in enumerate((0.7, 0.8, 0.9))]
  mean, low, high = analyze.interval(pd.DataFrame(apart))
  half = 4.303 * 0.1 / 3**0.5
  assert (mean, low) == pytest.approx((0.8, 0.8 - half))
  assert high == 1.0  # And no further.


def test_a_seed_that_ended_stays_where_it_ended():
  points = analyze.curve(ROWS, "capable", "short")
  assert [sorted(at["accuracy"]) for at in points] == [
      [0.6, 0.9], [0.9, 0.9],
  ]  # fmt: skip
  assert analyze.curve(ROWS, "weak", "short") == []


def test_full_accuracy_is_reached_at_the_lower_end_of_its_interval():
  # 0.9 - 1.96 sqrt(0.09 / 300) is 0.866.
  assert analyze.reached(ROWS, "capable", "short") == 15.0
  assert analyze.reached(ROWS, "capable", "full") == 100.0
  assert analyze.reached(ROWS[:9], "capable", "none") is None
  assert analyze.reached(ROWS[9:], "capable", "short") is None


def test_the_runs_are_gathered_from_their_workdirs(tmp_path, capsys):
  for cell, seed, done in (("full", 0, True), ("linear", 0, False)):
    place = tmp_path / "runs" / "capable" / cell / str(seed)
    place.mkdir(parents=True)
    if done:
      (place / "export").mkdir()
    lines = [
        {"step": 1, "kl": 0.1},
        row(cell, seed, 1, 0.5, 7e10)
        | {"mode": "sampled", "model": "student"},
        row(cell, seed, 1, 0.9, 7e10) | {"mode": "greedy", "model": "student"},
        row(cell, seed, 1, 0.9, 7e10) | {"mode": "sampled", "model": "teacher"},
    ]
    (place / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
  out = tmp_path / "out"
  names = {"full": "everything", "linear": "the paper's"}
  analyze.gather(tmp_path / "runs", names, out)
  (kept,) = map(json.loads, (out / "results.jsonl").read_text().splitlines())
  assert (kept["cell"], kept["seed"], kept["accuracy"]) == ("full", 0, 0.5)
  table = (out / "tables.md").read_text()
  assert "everything | 1 | 1 | 50.0" in table
  assert "the paper's" not in table  # It has not finished.
  assert (out / "accuracy_flops.png").stat().st_size > 5_000
  assert "everything" in capsys.readouterr().out


def test_nothing_to_gather_is_said(tmp_path, capsys):
  analyze.gather(tmp_path, {"full": ""}, tmp_path / "out")
  assert "No finished runs" in capsys.readouterr().out
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("student", reproduce.STUDENTS)
@pytest.mark.parametrize("name", reproduce.CELLS)
def test_every_cell_is_a_config(student, name, tmp_path):
  line = reproduce.command(student, name, 3, tmp_path)
  settings = [a for a in line if a.startswith("--config.")]
  assert "--config.seed=3" in settings
  file, _, _ = line[3].removeprefix("--config=").rpartition(":")
  assert pathlib.Path(file).is_file()
  for setting in settings:
    config_lib.check_field(setting.removeprefix("--config.").split("=")[0])


def test_a_table_needs_no_more_than_one_seed():
  text = analyze.table(ROWS[:9], "capable", {"full": "everything"})
  assert np.char.count(text, "\n") == 5
  assert "| 90.0 (86.6-93.4) |" in text
