"""The benchmark of what the guard and the checksums cost."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import toys

_ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT / "benchmarks"))

import safety  # noqa: E402

_NUMBER = r"-?[\d.e+-]+"
_SPREAD = rf"{_NUMBER} {{}} \({_NUMBER} to {_NUMBER}\)"


def _start(directory, *flags):
  return subprocess.run(
      [
          sys.executable,
          "benchmarks/safety.py",
          f"--directory={directory}",
          *flags,
          "--",
          *toys.SMALL_RUN,
          "--config.steps=2",
      ],
      cwd=_ROOT,
      env=os.environ | {"PYTHONPATH": str(_ROOT)},
      text=True,
      check=True,
      timeout=900,
      stdout=subprocess.PIPE,
  ).stdout


def _checksums(workdir):
  file = workdir / "checkpoints" / "2" / "host" / "metadata"
  return json.loads(file.read_text())["checksums"]


def test_one_command_prints_the_share_of_a_run(tmp_path):
  out = _start(tmp_path, "--rounds=5")
  assert "the run: 2 updates, 2 saves" in out
  for name in ("time", "work"):
    ms = _SPREAD.format("ms")
    found = re.search(rf"{name}: the guard adds {ms} to an update,"
                      rf" checksums {ms} to a save", out)
    assert found, out
    assert re.search(rf"{name}: {_SPREAD.format('%')} of the run", out), out
  # And a run that is finished is not done again.
  files = sorted(tmp_path.rglob("*"))
  again = _start(tmp_path, "--rounds=2", f"--workdir={tmp_path / 'run'}")
  assert "the run: 2 updates, 2 saves" in again
  assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.slow
def test_whole_runs_are_compared_in_pairs(tmp_path):
  out = _start(tmp_path, "--whole=1")
  assert len(re.findall("pair 1: with both .* with neither", out)) == 1
  for name in ("time", "work"):
    assert re.search(rf"{name}: {_SPREAD.format('%')} more", out), out
  assert len(_checksums(tmp_path / "0-safe")) > 10
  assert _checksums(tmp_path / "0-unsafe") == {}


def test_both_are_off_in_the_run_without():
  shown = {}
  with safety._unsafe():
    shown["sums"] = safety.checkpoint.checksums_of({"a": 1})
    shown["kept"] = safety.step_lib.guarded(False, "new", "old")
  assert shown == {"sums": ({}, []), "kept": "new"}
  assert safety.step_lib.guarded(False, 1.0, 2.0) == 2
  assert safety.checkpoint.checksums_of({"a": safety.jnp.ones(3)})[0]


def test_saves_are_counted():
  config = toys.run_config("bundled:weak", "bundled:teacher")
  replace = safety.config_lib.dataclasses.replace
  for saved, evaluated, count in ((2, 0, 4), (5, 0, 2), (3, 2, 5), (9, 9, 2)):
    config = replace(
        config,
        checkpoint=replace(config.checkpoint, every=saved),
        evaluation=replace(config.evaluation, every=evaluated),
    )
    assert safety.saves(config, 5) == count
