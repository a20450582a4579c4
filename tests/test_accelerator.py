"""The benchmark for accelerators, rehearsed on a CPU."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

_BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(_BENCHMARKS))

import accelerator  # noqa: E402

_STAGES = tuple(accelerator.STAGES)
# Of one start, most of which is importing.
_PATIENCE = 240


def _start(out, *flags, **environment):
  return subprocess.Popen(
      [
          sys.executable,
          str(_BENCHMARKS / "accelerator.py"),
          f"--out={out}",
          *flags,
      ],
      env=os.environ | {"PYTHONPATH": str(_BENCHMARKS.parent)} | environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
  )


def _finish(process):
  try:
    out, err = process.communicate(timeout=_PATIENCE)
  finally:
    process.kill()
  return process.returncode, out, err


def _content(out):
  file = out / "results.jsonl"
  return file.read_bytes() if file.is_file() else b""


def _lines(out):
  whole = _content(out).rpartition(b"\n")[0]
  return [json.loads(line) for line in whole.splitlines()]


def _wait(process, found):
  """Waits until `found` gives something, while the process runs."""
  deadline = time.monotonic() + _PATIENCE
  while time.monotonic() < deadline:
    if value := found():
      return value
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  process.kill()
  raise AssertionError("waited in vain")


def _children(process):
  threads = pathlib.Path(f"/proc/{process.pid}/task")
  return [
      int(pid)
      for thread in threads.iterdir()
      for pid in (thread / "children").read_text().split()
  ]


def _alive(pid):
  stat = pathlib.Path(f"/proc/{pid}/stat")
  try:
    return stat.read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def _processor_seconds():
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
  """A rehearsal that is killed once in each stage, and then goes to its end."""
  out, kept = tmp_path_factory.mktemp("accelerator"), []
  before = _processor_seconds()
  for stage in _STAGES:
    process = _start(out, "--cpu", f"--stages={stage}")
    _wait(process, lambda s=stage: any(x["stage"] == s for x in _lines(out)))
    children = _children(process)
    process.kill()
    process.wait()
    while any(map(_alive, children)):
      time.sleep(0.05)
    kept.append(_content(out))
  end = _finish(_start(out, "--cpu"))
  # Three minutes on two cores, and a sixth more for what the kills have cost;
  # how long that takes here depends on what else runs.
  assert _processor_seconds() - before < 2 * 210
  return out, kept, end


def test_all_stages_are_rehearsed(rehearsed):
  out, _, (status, shown, errors) = rehearsed
  assert status == 0, errors
  lines = accelerator.Results(out, "").latest()
  assert {stage for stage, _ in lines} == {"machine", *_STAGES}
  text = (out / "accelerator.md").read_text()
  for (stage, name), line in lines.items():
    assert line["status"] in ("done", "skipped"), line
    assert line["status"] == "done" or line["error"]
    assert line.get("passed") is not False, line
    assert f"| {stage} | {name} |" in text and name in shown
  for words in ("commit", "jax", "rehearsal"):
    assert words in text and words in shown
  skipped = {s for (s, _), x in lines.items() if x["status"] == "skipped"}
  # Peers where torch is not installed; of right, what needs a GPU.
  assert skipped <= {"right", "peers"}


def test_finished_lines_survive_a_kill_and_are_not_measured_again(rehearsed):
  out, kept, _ = rehearsed
  whole = _content(out)
  for content in kept:
    finished = content[: content.rfind(b"\n") + 1]
    assert whole.startswith(finished)
  done = [
      (x["stage"], x["name"])
      for x in _lines(out)
      if x["status"] == "done" and x["name"] != "device"
  ]
  assert len(done) == len(set(done))
  assert len({x["run"] for x in _lines(out)}) == len(_STAGES) + 1
  assert not list(out.glob("running-*"))


def test_a_rollouts_numbers_fit_together(rehearsed):
  out, _, _ = rehearsed
  lines = [
      x for x in _lines(out) if x["stage"] == "rollout" and "new" in x
  ]
  assert {(x["rows"], "int8" in x["name"]) for x in lines} == {
      (4, False),
      (4, True),
      (12, False),
      (12, True),
  }
  for x in lines:
    tokens = x["rows"] * x["new"]
    assert x["tokens_per_second"] == pytest.approx(tokens / x["whole"])
    decode = x["ms_per_token"] * (x["new"] - 1) / 1e3
    assert decode + x["first"] == pytest.approx(x["whole"])
    # On a busy machine the first token may take as long as the whole.
    assert x["kernels"] > 10 and x["bandwidth_share"] * decode >= 0
    assert x["bandwidth_share"] < 1


def test_no_accelerator_is_a_sentence(tmp_path):
  status, _, errors = _finish(_start(tmp_path, JAX_PLATFORMS="cpu"))
  assert status == 2
  (sentence,) = errors.strip().splitlines()
  assert sentence.startswith("error: ") and "--cpu" in sentence


def test_at_the_limit_there_is_a_table_of_what_is_there(tmp_path):
  start = time.monotonic()
  status, shown, errors = _finish(
      _start(tmp_path, "--cpu", "--seconds=16", "--stages=right,learn")
  )
  assert status == 0, errors
  assert time.monotonic() - start < 60
  assert "limit" in shown and "ceilings" in shown
  limits = [x for x in _lines(tmp_path) if x["status"] == "limit"]
  assert {x["stage"] for x in limits} == {"right", "learn"}
  assert all(x["error"] for x in limits)


def test_too_little_memory_is_a_line_with_numbers(tmp_path):
  status, shown, errors = _finish(
      _start(tmp_path, "--cpu", "--memory=0.0001", "--stages=rollout")
  )
  assert status == 0, errors
  lines = [x for x in _lines(tmp_path) if x["stage"] == "rollout"]
  assert len(lines) == 12
  for line in lines:
    assert line["status"] == "skipped"
    assert line["needed"] > line["available"] > 0
    assert "needs" in line["error"] and "GiB" in line["error"]
  assert "needs" in shown


def test_a_crash_costs_one_measurement_and_a_signal_ends_with_a_table(tmp_path):
  process = _start(tmp_path, "--cpu", "--stages=rollout")
  _wait(
      process, lambda: any(x["stage"] == "rollout" for x in _lines(tmp_path))
  )
  (child,) = _children(process)
  os.killpg(child, signal.SIGKILL)
  crash = _wait(
      process,
      lambda: [x for x in _lines(tmp_path) if x["status"] == "failed"],
  )
  assert "SIGKILL" in crash[0]["error"]
  after = len(_lines(tmp_path))
  _wait(process, lambda: len(_lines(tmp_path)) > after)
  assert _lines(tmp_path)[after]["status"] == "done"
  process.terminate()
  status, _, errors = _finish(process)
  assert status == 0, errors
  text = (tmp_path / "accelerator.md").read_text()
  assert "SIGKILL" in text and "tokens/s" in text


def test_half_a_line_is_cut_off(tmp_path):
  results = accelerator.Results(tmp_path, "one")
  results.add("right", "a", "done", value=float("nan"))
  results.add("right", "b", "failed", error="why")
  with results.file.open("a") as file:
    file.write('{"run": "one", "sta')
  accelerator.Results(tmp_path, "another process")
  results = accelerator.Results(tmp_path, "two", mend=True)
  results.add("right", "b", "done")
  assert [x["name"] for x in results.lines()] == ["a", "b", "b"]
  assert results.lines()[0]["value"] is None
  assert results.settled("right") == {"a", "b"}
  assert accelerator.Results(tmp_path, "3").settled("right") == {"a", "b"}
  assert results.latest()["right", "b"]["run"] == "two"


def test_a_plan_is_read(tmp_path):
  import stages

  plan = {
      "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
      "advice": [
          "--config.rollout.batch_tokens=1024 --config.student.remat=offload"
      ],
      "programs": [{"name": "score", "memory": 9}],
      "mended": [{"name": "score", "memory": 5}],
  }
  file = tmp_path / "plan.json"
  file.write_text(json.dumps(plan))
  settings, programs = stages.read_plan(file)
  assert settings["rollout.batch_tokens"] == 1024
  assert settings["student.remat"] == "offload"
  assert settings["mesh.fsdp"] == 1
  assert programs == plan["mended"]
