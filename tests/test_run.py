"""Whole runs through the command line: same numbers, stopped or not."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from damage import DAMAGES
import pytest
import toys

from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib

_ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def _start(workdir, cache, *flags):
  environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
      toys.interruptible(
          sys.executable,
          "-m",
          "prefix_distill.main",
          f"--workdir={workdir}",
          *toys.SMALL_RUN,
          *flags,
      ),
      cwd=_ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
  )


def _finish(process):
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def _metrics(workdir):
  """Lines without what depends on the clock and on warm caches."""
  timed = ("seconds", "tokens_per_second", "compilations")
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
      {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
      for line in lines
  ]


def _wait_for_lines(workdir, count):
  """Waits until the run has made so many updates."""
  file, deadline = workdir / "metrics.jsonl", time.time() + 240
  while time.time() < deadline:
    if file.is_file() and file.read_text().count("prefix_len") >= count:
      return
    time.sleep(0.02)
  raise TimeoutError(f"{file} has not reached {count} updates.")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
  """A run that was never stopped."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  code, out, err = _finish(_start(workdir, cache))
  assert code == 0, err
  return workdir, out, err


def test_the_bar_says_what_is_left_until_nothing_is(whole):
  *before, last = re.findall(r"prefix: .*?]", whole[2])
  assert "left=" in "".join(before)
  assert "6/6" in last and "kl=" in last and "left=" not in last


def test_a_run_leaves_what_the_readme_promises(whole):
  workdir, out, _ = whole
  for name in (
      "config.json",
      "metrics.jsonl",
      "checkpoints/6",
      "report/report.html",
      "report/accuracy_flops.svg",
      "report/kl_step.svg",
      "report/kl_position.svg",
      "report/termination.svg",
      "samples/rollouts.jsonl",
      "samples/answers.jsonl",
      "export/model.safetensors",
      "export/config.json",
      "export/tokenizer.json",
      "export/chat_template.jinja",
  ):
    assert (workdir / name).exists(), name
  assert "before" in out and "teacher" in out and "FLOPs" in out
  updates = [m for m in _metrics(workdir) if "kl" in m]
  assert [m["step"] for m in updates] == [1, 2, 3, 4, 5, 6]
  assert [m["prefix_len"] for m in updates] == [1, 4, 7, 10, 13, 16]
  spent = [m["flops"] for m in updates]
  assert spent == sorted(set(spent))


def test_every_line_says_which_answers_end(whole):
  lines = _metrics(whole[0])
  updates = [m for m in lines if "prefix_len" in m]
  assert [m["rollout_len_p95"] for m in updates] == [1, 4, 7, 10, 13, 16]
  assert len(lines) > len(updates)
  for line in lines:
    assert line["finish_rate"] + line["cut"] == pytest.approx(1)
    assert 0 <= line["repetition"] < 1
    if line not in updates:
      assert 0 < line["length_p95"] <= 24


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    whole, cache, tmp_path
):
  compiled = _programs(cache)
  for seed, same in ((0, True), (1, False)):
    workdir = tmp_path / str(seed)
    # Nor does a trace of some updates change a number.
    code, _, err = _finish(
        _start(workdir, cache, f"--config.seed={seed}", "--trace=2,5")
    )
    assert code == 0, err
    assert (_metrics(workdir) == _metrics(whole[0])) is same
    assert len(list(workdir.glob("trace/**/*.xplane.pb"))) == 2
  # And every program was found in the cache.
  assert len(compiled) > 10
  assert _programs(cache) == compiled


@pytest.mark.parametrize("steps", ["0", "7", "one", "2,-1"])
def test_a_trace_of_what_is_no_update_is_refused(steps, cache, tmp_path):
  workdir = tmp_path / "run"
  code, _, err = _finish(_start(workdir, cache, f"--trace={steps}"))
  assert code == 1 and not workdir.exists()
  (sentence,) = err.strip().splitlines()
  assert sentence.startswith(f"error: --trace={steps} ")
  assert "1 to 6" in sentence


def _programs(cache):
  return {file.name for file in cache.iterdir() if file.suffix != ".lock"
          and not file.name.endswith("-atime")}


@pytest.mark.parametrize("updates", [1, 4])
def test_a_killed_run_ends_as_one_that_was_never_stopped(
    whole, cache, tmp_path, updates
):
  process = _start(tmp_path / "run", cache)
  _wait_for_lines(tmp_path / "run", updates)
  process.kill()
  process.communicate()
  code, _, err = _finish(_start(tmp_path / "run", cache))
  assert code == 0, err
  assert _metrics(tmp_path / "run") == _metrics(whole[0])
  weights = "export/model.safetensors"
  assert (tmp_path / "run" / weights).read_bytes() == (
      whole[0] / weights
  ).read_bytes()


def test_ctrl_c_saves_and_the_same_command_goes_on(whole, cache, tmp_path):
  process = _start(tmp_path / "run", cache)
  _wait_for_lines(tmp_path / "run", 3)
  process.send_signal(signal.SIGINT)
  code, _, err = _finish(process)
  assert code == 130
  assert "the same command goes on" in err.splitlines()[-1]
  assert not (tmp_path / "run" / "export").exists()
  code, out, err = _finish(_start(tmp_path / "run", cache))
  assert code == 0, err
  assert "Resuming after update" in out
  assert _metrics(tmp_path / "run") == _metrics(whole[0])


def test_a_preemption_that_leaves_no_time_ends_within_the_update(
    whole, cache, tmp_path
):
  workdir = tmp_path / "run"
  # So short that no update ends in it.
  process = _start(workdir, cache, "--notice=0.1")
  _wait_for_lines(workdir, 3)
  process.send_signal(signal.SIGTERM)
  code, _, err = _finish(process)
  assert code == 130
  assert "Stopped in update" in err.splitlines()[-1]
  code, _, err = _finish(_start(workdir, cache))
  assert code == 0, err
  assert _metrics(workdir) == _metrics(whole[0])


# Flags, the file that keeps the answers, and what is said.
_EVALUATES = (
    ("--config.evaluation.sets.heldout.size=120", "--config.steps=2"),
    "step-2-student-heldout-sampled.jsonl",
    "Stopped during an evaluation",
)
_TEACHER_ANSWERS = (
    (
        "--config.method=seqkd",
        "--config.rollout.per_prompt=1",
        "--config.steps=15",
        "--config.data.batch_size=8",
        "--config.rollout.max_len=250",
        "--config.evaluation.every=0",
    ),
    "teacher-answers.jsonl",
    "Stopped while the teacher answers",
)


@pytest.fixture(scope="module", params=[_EVALUATES, _TEACHER_ANSWERS])
def phase(request, cache, tmp_path_factory):
  """A phase, and a run that was not stopped in it."""
  place = tmp_path_factory.mktemp("phase") / "whole"
  code, _, err = _finish(_start(place, cache, *request.param[0]))
  assert code == 0, err
  return place, *request.param


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_phase_goes_on_with_the_answers_that_it_has(
    cache, tmp_path, phase, how
):
  whole, flags, name, said = phase
  workdir = tmp_path / "run"
  process, deadline = _start(workdir, cache, *flags), time.time() + 240
  file = workdir / "unfinished" / name
  while not file.is_file() or file.read_text().count("\n") < 30:
    assert time.time() < deadline and process.poll() is None
    time.sleep(0.01)
  process.send_signal(how)
  start = time.time()
  code, _, err = _finish(process)
  assert time.time() - start < 20
  if how == signal.SIGTERM:
    assert code == 130
    assert said in err.splitlines()[-1]
  kept = file.read_text()
  assert 30 <= kept.count("\n") < 120
  process, began = _start(workdir, cache, *flags), ""
  while file.is_file():  # Answers are added to those that were there.
    with contextlib.suppress(FileNotFoundError):  # It ends in between.
      began = file.read_text() or began
    time.sleep(0.02)
  code, _, err = _finish(process)
  assert code == 0, err
  assert began.startswith(kept[: kept.rindex("\n") + 1])
  assert _metrics(workdir) == _metrics(whole)
  for path in ("answers.parquet", "export/model.safetensors"):
    if (whole / path).exists():
      assert (workdir / path).read_bytes() == (whole / path).read_bytes()
  assert not file.parent.exists()


def test_a_signal_is_heard_between_the_tensors_of_a_model(tmp_path):
  config = toys.run_config("bundled:capable", "bundled:teacher")
  setup = setup_lib.prepare(config, tmp_path)
  stop = loop.Stop()
  stop.wanted = True
  with pytest.raises(loop.Stopped, match="while weights were read"):
    loop.Run(setup, tmp_path, stop=stop)
  assert not list(tmp_path.glob("checkpoints/*"))


def test_a_finished_run_reports_again_and_changes_nothing(whole, cache):
  workdir, *_ = whole
  before = (workdir / "metrics.jsonl").read_bytes()
  code, out, err = _finish(_start(workdir, cache))
  assert code == 0, err
  assert "after" in out and "repeats" in out
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_on_the_workdir_is_refused(whole, cache):
  workdir, *_ = whole
  before = (workdir / "metrics.jsonl").read_bytes()
  code, _, err = _finish(_start(workdir, cache, "--config.seed=7"))
  assert code != 0
  message = err.strip().splitlines()[-1]
  assert "seed = 0" in message and "7" in message and "--workdir" in message
  assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_run_whose_last_checkpoint_is_damaged_ends_as_any_other(
    damage, whole, cache, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(whole[0], workdir)
  shutil.rmtree(workdir / "export")
  damage.do(workdir / "checkpoints" / "6")
  code, _, err = _finish(_start(workdir, cache))
  assert code == 0, err
  assert "Traceback" not in err and "Exception" not in err
  moved = (workdir / "damaged").exists()
  assert ("warning: The checkpoint of step 6 is damaged" in err) is moved
  assert _metrics(workdir) == _metrics(whole[0])
  weights = "export/model.safetensors"
  assert (workdir / weights).read_bytes() == (whole[0] / weights).read_bytes()


def test_a_second_run_in_the_workdir_is_refused(whole, cache, tmp_path):
  workdir = tmp_path / "run"
  long = "--config.steps=500"
  first = _start(workdir, cache, long)
  _wait_for_lines(workdir, 1)
  code, _, err = _finish(_start(workdir, cache, long))
  assert code == 1
  (sentence,) = err.strip().splitlines()
  assert f"in use by process {first.pid} on" in sentence
  first.kill()
  first.communicate()
  assert (workdir / "lock").is_file()
