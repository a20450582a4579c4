"""What the report and the log say of a run that goes wrong."""

import numpy as np
import pytest

from prefix_distill.report import plots
from prefix_distill.report import report


def updates(loss=(), student=(), teacher=(), skipped=0):
  count = max(len(loss), len(student))
  lines = []
  for i in range(count):
    line = {"step": i + 1, "prefix_len": 4, "skipped": skipped}
    if i < len(loss):
      line["loss"] = loss[i]
    if i < len(student):
      line |= {"entropy_student": student[i], "entropy_teacher": teacher[i]}
    lines.append(line)
  return lines


def test_a_loss_that_explodes_is_told_once_and_where():
  lines = updates([0.3] * 12 + [5.0, 40.0])
  (text,) = report.alarms(lines).values()
  assert "exploded in update 13" in text and "5 nats" in text


@pytest.mark.parametrize(
    "loss",
    [
        [0.0, 5.1, 4.3, 3.1],  # The cap grows from one token.
        [0.01] * 12 + [0.5],  # Ten times more, and still small.
        [0.5] * 12 + [4.0],
        [None] * 12 + [4.0],
    ],
)
def test_a_loss_that_only_varies_is_not(loss):
  assert report.alarms(updates(loss)) == {}


def test_an_entropy_that_collapses_is_told():
  student = [0.5] * 5 + [0.01] * 5
  (text,) = report.alarms(
      updates(student=student, teacher=[0.4] * 10)
  ).values()
  assert "collapsed by update 10" in text
  # A teacher that is as sure teaches just that.
  sure = updates(student=student, teacher=[0.04] * 10)
  assert report.alarms(sure) == {}
  assert report.alarms(updates(student=student[:9], teacher=[0.4] * 9)) == {}


def test_skipped_updates_are_told():
  (text,) = report.alarms(updates([0.1], skipped=3)).values()
  assert text.startswith("Warning: the run skipped 3 updates because")


def _evaluations(name):
  return [
      {
          "step": step,
          "model": model,
          "set": name,
          "mode": "sampled",
          "flops": 1e9 * step,
          "accuracy": 0.5,
          "accuracy_low": 0.4,
          "accuracy_high": 0.6,
          "accuracy_finished": 0.5,
          "finish_rate": 1.0,
          "cut": 0.0,
          "mean_length": 9.0,
          "length_p95": 12,
          "repetition": 0.1,
      }
      for step, model in ((0, "student"), (3, "student"), (3, "teacher"))
  ]


@pytest.mark.parametrize(
    "name", ["[/bold]", "[red]x", "$\\frac{", "$x$", "50% \\$_^{"]
)
def test_any_name_of_a_set_is_shown_as_it_is(name, tmp_path, capsys):
  lines = updates([0.3] * 3) + _evaluations(name)
  assert "accuracy_flops.svg" in plots.draw(lines, tmp_path, "prefix")
  assert "could not be drawn" not in capsys.readouterr().out


def test_a_picture_that_fails_is_a_warning(tmp_path, capsys, monkeypatch):
  def fail(*_, **__):
    raise RuntimeError("no ink")

  monkeypatch.setattr(plots, "termination", fail)
  lines = updates([0.3] * 3) + _evaluations("heldout")
  drawn = plots.draw(lines, tmp_path, "prefix")
  assert "accuracy_flops.svg" in drawn and "termination.svg" not in drawn
  assert "termination.svg could not be drawn (no ink)" in (
      capsys.readouterr().out
  )
  assert np.all([(tmp_path / name).is_file() for name in drawn])
