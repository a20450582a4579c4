"""One run at a time has a workdir, with its settings and what it read."""

from concurrent import futures
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import toys

from prefix_distill import config as config_lib
from prefix_distill import model_commands
from prefix_distill.config import CheckpointSpec
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError
from prefix_distill.report import report
from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import workdir as workdir_lib
from prefix_distill.train.workdir import Holder
from prefix_distill.train.workdir import Lock
from prefix_distill.train.workdir import WorkdirError

_HOLD = """
import pathlib, sys, time
from prefix_distill.train.workdir import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def _hold(workdir: pathlib.Path) -> subprocess.Popen:
  """Starts a process that holds a workdir."""
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
  }
  process = subprocess.Popen(
      [sys.executable, "-c", _HOLD, str(workdir)],
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == "held\n"
  return process


def _refusal(workdir: pathlib.Path) -> str:
  with pytest.raises(WorkdirError) as caught:
    Lock(workdir)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def _write(workdir: pathlib.Path, **changes) -> Holder:
  holder = dataclasses.replace(Holder.here(), token="other", **changes)
  (workdir / "lock").write_text(holder.line())
  return holder


def test_a_lock_is_held_and_released(tmp_path):
  lock = Lock(tmp_path / "run")
  holder = Holder.read(lock.path)
  assert (holder.pid, holder.host) == (os.getpid(), socket.gethostname())
  assert f"in use by process {os.getpid()} on" in _refusal(tmp_path / "run")
  lock.check()
  lock.release()
  assert not lock.path.exists()
  Lock(tmp_path / "run").release()


def test_another_process_is_named_and_a_killed_one_leaves_the_workdir(
    tmp_path,
):
  process = _hold(tmp_path)
  sentence = _refusal(tmp_path)
  assert f"process {process.pid} on {socket.gethostname()}" in sentence
  assert "since 20" in sentence and "choose another --workdir" in sentence
  os.kill(process.pid, signal.SIGKILL)
  time.sleep(0.2)  # It is a zombie now, and was not waited for.
  start = time.monotonic()
  Lock(tmp_path).release()
  assert time.monotonic() - start < 5
  process.wait()


def test_a_process_id_that_was_used_again_is_another_process(tmp_path):
  _write(tmp_path, start="1")  # This process started at another time.
  Lock(tmp_path).release()


def test_a_holder_elsewhere_lives_while_it_counts(tmp_path, monkeypatch):
  holder = _write(tmp_path, machine="elsewhere", host="node7")
  slept = []

  def sleep(seconds):
    slept.append(seconds)
    if len(slept) == 3:
      other = dataclasses.replace(holder, count=1)
      (tmp_path / "lock").write_text(other.line())

  monkeypatch.setattr(time, "sleep", sleep)
  assert "on node7 since" in _refusal(tmp_path)
  assert len(slept) == 3


def test_a_holder_elsewhere_is_dead_once_it_counts_no_more(
    tmp_path, monkeypatch, capsys
):
  _write(tmp_path, machine="elsewhere", host="node7")
  monkeypatch.setattr(workdir_lib, "_SILENCE", 0.1)
  Lock(tmp_path).release()
  assert "held by a run on node7; it is dead if" in capsys.readouterr().err
  # Ten minutes by the clocks are enough.
  monkeypatch.setattr(workdir_lib, "_SILENCE", 600)
  _write(tmp_path, machine="elsewhere", beat=time.time() - 601)
  Lock(tmp_path).release()


_DEEP, _DIGITS = b"[" * 100_000, b"9" * 5_000
_HOLDER = json.dumps(dataclasses.asdict(Holder.here())).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"pid": 1}',
        b"\0",
        b"\xff\xfe",
        _DEEP,
        b'{"pid": ' + _DIGITS + b"}",
        re.sub(rb'"beat": [^,}]*', b'"beat": NaN', _HOLDER),
        re.sub(rb'"beat": [^,}]*', b'"beat": "now"', _HOLDER),
        re.sub(rb'"pid": \d+', b'"pid": ' + b"9" * 30, _HOLDER),
        re.sub(rb'"pid": \d+', b'"pid": 0', _HOLDER),
        re.sub(rb'"token": "\w+"', b'"token": []', _HOLDER),
    ],
    ids=range(14),
)
def test_a_lock_that_says_nothing_is_nobodys(text, tmp_path):
  (tmp_path / "lock").write_bytes(text)
  Lock(tmp_path).release()


def test_places_where_no_lock_can_be(tmp_path):
  (tmp_path / "file").write_text("")
  assert "cannot be written to" in _refusal(tmp_path / "file")
  assert "cannot be written to" in _refusal(tmp_path / "file" / "run")
  assert "cannot be written to" in _refusal(tmp_path / ("x" * 300))
  (tmp_path / "run" / "lock").mkdir(parents=True)
  assert "lock is a directory" in _refusal(tmp_path / "run")


def test_a_holder_that_stood_still_learns_that_it_lost(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, "_BEAT", 0.01)
  lock = Lock(tmp_path)
  other = _write(tmp_path, pid=123)
  deadline = time.monotonic() + 10
  while not lock._lost and time.monotonic() < deadline:
    time.sleep(0.01)
  with pytest.raises(WorkdirError, match="in use by process 123"):
    lock.check()
  lock.release()  # And leaves the other's lock alone.
  assert Holder.read(lock.path) == other


def test_the_count_grows(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, "_BEAT", 0.01)
  lock = Lock(tmp_path)
  deadline = time.monotonic() + 10
  while time.monotonic() < deadline:
    holder = Holder.read(lock.path)
    if holder and holder.count > 3:
      break
  assert holder.count > 3 and holder.token == lock._mine.token
  lock.release()


@pytest.mark.parametrize("left", [False, True])
def test_of_many_starts_at_once_one_holds(left, tmp_path):
  if left:  # By a run that was killed.
    _write(tmp_path, start="1")
  together = threading.Barrier(8)

  def start(_) -> Lock | None:
    together.wait()
    try:
      return Lock(tmp_path)
    except WorkdirError:
      return None

  with futures.ThreadPoolExecutor(8) as pool:
    (lock,) = filter(None, pool.map(start, range(8)))
  lock.check()
  lock.release()


# Settings and contents.


def _config(**changes) -> config_lib.Config:
  config = toys.run_config("bundled:capable", "bundled:teacher")
  return dataclasses.replace(config, **changes)


def _claim(workdir, config, contents=None) -> str:
  """Returns the refusal, if it is one; the lock is free afterwards."""
  try:
    with workdir_lib.claimed(config, workdir, contents or {"data": "1"}):
      assert (workdir / "lock").is_file()
      return ""
  except WorkdirError as error:
    assert "\n" not in str(error)
    return str(error)
  finally:
    assert not (workdir / "lock").is_file()


def test_the_same_settings_may_come_again(tmp_path):
  for _ in range(2):
    assert not _claim(tmp_path, _config())
  assert workdir_lib.read_config(tmp_path) == _config()


def test_other_settings_are_refused(tmp_path):
  assert not _claim(tmp_path, _config())
  before = (tmp_path / "config.json").read_bytes()
  assert "seed = 0, and this one has 7" in _claim(tmp_path, _config(seed=7))
  fewer = _claim(tmp_path, _config(steps=2))
  assert "steps = 3" in fewer and "--config.steps" not in fewer
  more = _claim(tmp_path, _config(steps=4, seed=7))
  assert "seed = 0" in more and "add --config.steps=4 to its first" in more
  assert (tmp_path / "config.json").read_bytes() == before


def test_steps_may_be_raised(tmp_path):
  assert not _claim(tmp_path, _config())
  (tmp_path / "export").mkdir()
  assert not _claim(tmp_path, _config(steps=9))
  assert workdir_lib.read_config(tmp_path).steps == 9
  assert (tmp_path / "export-3").is_dir()
  assert not (tmp_path / "export").exists()
  assert "steps = 9" in _claim(tmp_path, _config())


@pytest.mark.parametrize("method", ["cosine", "seqkd"])
def test_steps_that_decided_the_past_are_not_raised(method, tmp_path):
  config = _config()
  if method == "cosine":
    optimizer = dataclasses.replace(config.optimizer, decay="cosine")
    config = dataclasses.replace(config, optimizer=optimizer)
  else:
    rollout = dataclasses.replace(config.rollout, per_prompt=1)
    config = dataclasses.replace(config, method="seqkd", rollout=rollout)
  assert not _claim(tmp_path, config)
  sentence = _claim(tmp_path, dataclasses.replace(config, steps=9))
  assert "steps = 3, and this one has 9, but" in sentence
  assert workdir_lib.read_config(tmp_path).steps == 3


@pytest.mark.parametrize("name", ["config.json", "contents.json"])
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        None,
        _DEEP,
        b"[" * 900 + b"]" * 900,
        b'{"seed": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"seed": ' + _DIGITS + b"}",
        b'{"seed": 1e999}',
        b'{"seed": -Infinity}',
        b'{"data.train": NaN}',
    ],
    ids=range(13),
)
def test_damaged_files_of_a_workdir_are_named(name, text, tmp_path):
  assert not _claim(tmp_path, _config())
  (tmp_path / name).unlink()
  if text is None:
    (tmp_path / name).mkdir()
  else:
    (tmp_path / name).write_bytes(text)
  sentence = _claim(tmp_path, _config())
  assert f"{tmp_path / name} is not JSON of a run" in sentence


def test_other_contents_are_refused(tmp_path):
  old = {"student/config.json": "1", "data.train": "2"}
  assert not _claim(tmp_path, _config(), old)
  for new, said in (
      (old | {"data.train": "3"}, "read data.train with 2, and there is now 3"),
      (old | {"student/x": "4"}, "read student/x with nothing, and there is"),
      ({"data.train": "2"}, "config.json with 1, and there is now nothing"),
  ):
    assert said in _claim(tmp_path, _config(), new)
  assert not _claim(tmp_path, _config(), old)


def test_a_fingerprint_sees_changes(tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_bytes(bytes(1000))
  seen = {workdir_lib.fingerprint(file)}
  file.write_bytes(bytes(999) + b"\1")
  seen.add(workdir_lib.fingerprint(file))
  file.write_bytes(bytes(1001))
  seen.add(workdir_lib.fingerprint(file))
  assert len(seen) == 3
  # Of a large file the size, the ends and some places between.
  monkeypatch.setattr(workdir_lib, "_SMALL", 500)
  monkeypatch.setattr(workdir_lib, "_END", 50)
  monkeypatch.setattr(workdir_lib, "_BLOCK", 2)
  data = bytearray(1000)
  file.write_bytes(data)
  seen = {workdir_lib.fingerprint(file)}
  for place in (0, 49, 50, 948, 950, 999):
    changed = bytearray(data)
    changed[place] = 1
    file.write_bytes(changed)
    seen.add(workdir_lib.fingerprint(file))
  file.write_bytes(bytes(1001))
  seen.add(workdir_lib.fingerprint(file))
  assert len(seen) == 8
  with pytest.raises(UserError, match="cannot be read"):
    workdir_lib.fingerprint(tmp_path)


# Runs.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  student = toys.write_model(root / "student", 0, "capable")
  return student, toys.write_model(root / "teacher", 1, "teacher")


def _run(models, workdir, **changes):
  config = toys.run_config(*models, **changes)
  loop.train(config, workdir)
  lines = report.read_metrics(workdir / "metrics.jsonl")
  return {line["step"]: line["kl"] for line in lines if "kl" in line}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
  """A run of five updates that was to have three."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  spec = CheckpointSpec(every=1, keep=2, keep_every=3, best="heldout")
  config = toys.run_config(*models)
  evaluation = dataclasses.replace(config.evaluation, every=1)
  changes = {"checkpoint": spec, "evaluation": evaluation}
  return workdir, _run(models, workdir, **changes), changes


def test_a_finished_run_goes_on_with_more_steps(models, finished, tmp_path):
  workdir, first, changes = finished
  more = _run(models, workdir, steps=5, **changes)
  whole = _run(models, tmp_path / "whole", steps=5, **changes)
  assert list(more) == [1, 2, 3, 4, 5]
  assert more == whole
  assert {k: more[k] for k in first} == first
  assert workdir_lib.is_finished(workdir)
  assert (workdir / "export-3" / "config.json").is_file()
  ours, theirs = (
      (w / "export" / "model.safetensors").read_bytes()
      for w in (workdir, tmp_path / "whole")
  )
  assert ours == theirs


def test_any_checkpoint_is_exported(models, finished, tmp_path, capsys):
  workdir, _, _ = finished
  assert model_commands.export(workdir, "last", tmp_path / "last") >= 3
  for file in (workdir / "export").iterdir():
    assert (tmp_path / "last" / file.name).read_bytes() == file.read_bytes()
  assert model_commands.export(workdir, "3", tmp_path / "3") == 3
  assert model_commands.export(workdir, "best", tmp_path / "best") in range(6)

  def refusal(workdir, step, to) -> str:
    with pytest.raises(UserError) as caught:
      model_commands.export(workdir, step, to)
    return str(caught.value)

  assert "is there already" in refusal(workdir, "3", tmp_path / "3")
  assert "no checkpoint of --step=77" in refusal(workdir, "77", tmp_path / "x")
  assert "no checkpoint of --step=-1" in refusal(workdir, "-1", tmp_path / "x")
  assert "no run is there" in refusal(tmp_path, "3", tmp_path / "x")
  (tmp_path / "file").write_text("")
  assert "cannot be written" in refusal(workdir, "3", tmp_path / "file" / "x")


def test_an_export_that_is_not_whole_is_no_end(models, finished, capsys):
  workdir, _, changes = finished
  weights = workdir / "export" / "model.safetensors"
  before = weights.read_bytes()
  steps = workdir_lib.read_config(workdir).steps
  weights.unlink()
  capsys.readouterr()
  _run(models, workdir, steps=steps, **changes)
  assert "export is not whole" in capsys.readouterr().err
  assert weights.read_bytes() == before


def test_a_changed_file_is_named(models, tmp_path):
  data = tmp_path / "data.jsonl"
  record = {"question": "How many pens?", "answer": "7"}
  data.write_text(f"{json.dumps(record)}\n" * 10)
  config = toys.run_config(*models)
  train = config_lib.DatasetSpec(str(data), answer="answer")
  config = dataclasses.replace(
      config, data=dataclasses.replace(config.data, train=train)
  )

  def contents():
    return setup_lib.prepare(config, tmp_path).contents

  old = contents()
  assert workdir_lib.contents_difference(old, contents()) == ""
  assert {"student/model.safetensors", "teacher/tokenizer.json"} <= set(old)
  data.write_text(f"{json.dumps(record | {'answer': '8'})}\n" * 10)
  assert "read data.train with 460 bytes" in workdir_lib.contents_difference(
      old, contents()
  )


def test_lost_checkpoints_are_not_a_new_run(tmp_path):
  workdir_lib.check_not_lost(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  workdir_lib.check_not_lost(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 7}\n')
  with pytest.raises(WorkdirError, match="updates up to 7, but no checkpoint"):
    workdir_lib.check_not_lost(tmp_path)


@pytest.mark.parametrize(
    ("spec", "every", "between", "said"),
    [
        ({"best": "none"}, 1, (), "use heldout"),
        ({"best": "heldout"}, 0, (), "evaluation.every above 0"),
        ({"best": "heldout", "every": 2}, 3, (), "no multiple of"),
        ({"every": 2, "keep_every": 3}, 1, (), "no multiple of"),
    ],
)
def test_retention_that_cannot_work_is_refused(spec, every, between, said):
  config = _config()
  evaluation = dataclasses.replace(
      config.evaluation, every=every, between=between
  )
  with pytest.raises(ConfigError, match=said):
    _config(checkpoint=CheckpointSpec(**spec), evaluation=evaluation)
