import pathlib
import socket

import numpy as np
import pytest
import safetensors.numpy
import toys

from prefix_distill.report import metrics

# What depends on the clock, and on how often a run was started.
VARIABLE = ("seconds", "tokens_per_second", "compilations")


def free_port() -> str:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Workdirs of a run in one process of four devices, and in two of two."""
  root = tmp_path_factory.mktemp("processes")
  models = (
      toys.write_model(root / "student", 0, "capable"),
      toys.write_model(root / "teacher", 1, "teacher"),
  )
  program, port = "two_processes.py", free_port()
  one = toys.start(program, str(root / "one"), *models, devices=4)
  toys.finish([one], seconds=180)
  two = [
      toys.start(
          program, str(root / "two"), *models, port, index, devices=2
      )
      for index in ("0", "1")
  ]
  printed = toys.finish(two, seconds=180)
  return root / "one", root / "two", printed


def lines(workdir: pathlib.Path) -> list[dict]:
  return [
      {k: v for k, v in line.items() if not k.startswith(VARIABLE)}
      for line in metrics.read(workdir / "metrics.jsonl")
  ]


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(workdir / "export" / "model.safetensors")


def assert_same_lines(ours: list[dict], theirs: list[dict]) -> None:
  assert len(ours) == len(theirs)
  for x, y in zip(ours, theirs, strict=True):
    assert x.keys() == y.keys()
    for name, wanted in y.items():
      if not isinstance(wanted, str):
        wanted = pytest.approx(wanted, rel=1e-4, abs=1e-6)
      assert x[name] == wanted, name


def test_two_processes_write_what_one_does(runs):
  one, two, _ = runs
  kinds = [line.get("model", "update") for line in lines(one)]
  assert kinds == ["student", *["update"] * 3, "student", "teacher"]
  assert_same_lines(lines(two), lines(one))


def test_the_updates_were_more_than_nothing(runs):
  updates = [line for line in lines(runs[0]) if "kl" in line]
  assert [line["step"] for line in updates] == [1, 2, 3]
  assert updates[0]["tokens"] > 16 * 4
  assert updates[2]["dropped"] == 0
  assert updates[2]["kl"] < 0.95 * updates[0]["kl"]


def test_two_processes_export_the_weights_of_one(runs):
  ours, theirs = weights(runs[1]), weights(runs[0])
  assert ours.keys() == theirs.keys()
  for name, wanted in theirs.items():
    np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=2e-4)


def test_a_signal_to_one_process_stops_both_at_a_checkpoint(runs):
  for printed in runs[2]:
    assert "Stopped after update 1 of 3" in printed
  assert "Resuming after update 1 of 3" in runs[2][0]
  assert (runs[1] / "checkpoints" / "3").is_dir()


def test_only_the_first_process_reports(runs):
  first, second = runs[2]
  assert "Report in" in first
  assert "Report in" not in second
  assert "workdir" not in second
