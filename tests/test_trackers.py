"""What a tracker gets of a run, read back with the clients' own readers."""

import importlib.util
import pathlib
import sqlite3
import subprocess
import sys

import pytest
import toys

from prefix_distill.errors import ConfigError
from prefix_distill.report import report
from prefix_distill.report import trackers

_ROOT = pathlib.Path(__file__).parents[1]
_UPDATE = {
    "step": 3,
    "kl": 0.5,
    "loss": None,
    "prefix_len": 8,
    "source": "student",
}
_EVALUATION = {
    "step": 4,
    "set": "held",
    "mode": "greedy",
    "model": "student",
    "accuracy": 0.25,
    "verdicts": "0100",
    "grading": "math",
}


def _needs(client: str) -> pytest.MarkDecorator:
  missing = importlib.util.find_spec(client) is None
  return pytest.mark.skipif(missing, reason=f"{client} is not installed")


def test_only_numbers_are_scalars_and_have_a_place():
  assert trackers.scalars(_UPDATE) == {"train/kl": 0.5, "train/prefix_len": 8}
  assert trackers.scalars(_EVALUATION) == {
      "eval/held/student/greedy/accuracy": 0.25
  }


def test_an_unknown_tracker_is_refused():
  with pytest.raises(ConfigError, match="use one of auto, none, tensorboard"):
    trackers.check("comet")


def test_a_client_that_is_not_installed_is_refused(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert trackers.check("auto") == "none"
  with pytest.raises(ConfigError, match="pip install wandb"):
    trackers.check("wandb")


def test_mlflow_without_its_database_needs_a_server(monkeypatch):
  kept = {"mlflow": object(), "sqlalchemy": None}
  monkeypatch.setattr(importlib.util, "find_spec", kept.get)
  for store in ("", "sqlite:///kept.db", "mysql+pymysql://me@host/kept"):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(ConfigError, match="pip install mlflow, or set MLFLOW"):
      trackers.check("mlflow")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
  assert trackers.check("mlflow") == "mlflow"


def test_a_failing_tracker_is_told_once_and_left(tmp_path, capsys):
  (tmp_path / "tensorboard").write_text("in the way")
  tracker = trackers.make("tensorboard", tmp_path, {}, None)
  for _ in range(3):
    tracker.write(_UPDATE)
  tracker.close()
  assert capsys.readouterr().err.count("Warning: tensorboard") == 1


def test_no_client_is_loaded_unless_chosen():
  code = (
      "import sys; from prefix_distill import command_line;"
      "from prefix_distill.train import loop;"
      "names = {'tensorboardX', 'wandb', 'mlflow'} & {*sys.modules};"
      "sys.exit(', '.join(names) or 0)"
  )
  done = subprocess.run([sys.executable, "-c", code], check=False)
  assert done.returncode == 0


def _events(
    workdir: pathlib.Path,
) -> tuple[dict[str, dict[int, float]], set[str]]:
  """Reads what TensorBoard would show: later files replace what they purge.

  Returns:
    Scalars by name and step, and the names of all else.
  """
  from tensorboardX.proto import event_pb2

  found: dict[str, dict[int, float]] = {}
  others = set()
  for file in sorted((workdir / "tensorboard").iterdir()):
    data = file.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.session_log.status == event_pb2.SessionLog.START:
        for values in found.values():
          for step in [x for x in values if x >= event.step]:
            del values[step]
      for one in event.summary.value:
        if one.HasField("simple_value"):
          found.setdefault(one.tag, {})[event.step] = one.simple_value
        else:
          others.add(one.tag)
  return found, others


@_needs("tensorboardX")
def test_tensorboard_has_every_number_of_a_run_that_was_stopped(tmp_path):
  """The same as metrics.jsonl, once each, after a kill and a resume."""
  command = [
      sys.executable,
      "-m",
      "prefix_distill.main",
      *toys.SMALL_RUN,
      f"--workdir={tmp_path}",
      "--tracker=tensorboard",
  ]
  for steps in (3, 6):
    subprocess.run(
        [*command, f"--config.steps={steps}"], cwd=_ROOT, check=True
    )
  lines = report.read_metrics(tmp_path / "metrics.jsonl")
  found, others = _events(tmp_path)
  expected: dict[str, dict[int, float]] = {}
  for line in lines:
    for name, value in trackers.scalars(line).items():
      expected.setdefault(name, {})[line["step"]] = value
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    assert found[name] == pytest.approx(values, rel=1e-6), name
  assert {"accuracy_flops", "kl_step"} <= others  # Figures,
  assert "student/heldout/sampled/text_summary" in others  # and answers.


@_needs("wandb")
def test_wandb_offline_keeps_a_run(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  tracker = trackers.make("wandb", tmp_path, {"steps": 3}, None)
  tracker.write(_UPDATE)
  tracker.text("answers", "<b>7</b>", 3)
  tracker.close()
  assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@_needs("mlflow")
def test_mlflow_goes_on_with_a_run(tmp_path, monkeypatch):
  database = tmp_path / "kept.db"
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
  for step in (None, 3):
    tracker = trackers.make("mlflow", tmp_path, {"steps": 3}, step)
    tracker.write(_UPDATE | {"step": 3 if step is None else 4})
    tracker.close()
  rows = sqlite3.connect(database).execute(
      "select run_uuid, key, step from metrics where key = 'train/kl'"
  )
  runs, _, steps = zip(*rows, strict=True)
  assert len(set(runs)) == 1 and sorted(steps) == [3, 4]
