"""Runs of several processes compute what one does, and end together."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

from damage import DAMAGES
import numpy as np
import pytest
import safetensors.numpy
import toys

from prefix_distill import distributed
from prefix_distill.errors import ConfigError
from prefix_distill.report import report

_CONFIG = pathlib.Path(__file__).parent / "programs" / "toy_config.py"
# What depends on the clock, and on how often a run was started.
VARIABLE = ("seconds", "tokens_per_second", "compilations")
STEPS = 12
_DAMAGES = ("no arrays", "a bit of the arrays at 25%", "half of the host")
# What srun sets for the first of two tasks.
_STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def lines(workdir: pathlib.Path) -> list[dict]:
  return [
      {k: v for k, v in line.items() if not k.startswith(VARIABLE)}
      for line in report.read_metrics(workdir / "metrics.jsonl")
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
      assert x[name] == wanted, (y["step"], name)


def wait_for(
    workdir: pathlib.Path, line: str, processes: list[subprocess.Popen]
) -> None:
  """Waits until the metrics hold a text."""
  file, deadline = workdir / "metrics.jsonl", time.monotonic() + 600
  while not (file.is_file() and line in file.read_text()):
    assert time.monotonic() < deadline, f"{file} lacks {line}."
    assert all(p.poll() is None for p in processes), toys.end(processes, 60)
    time.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class Toys:
  """Starts runs of two toy models.

  Attributes:
    root: where the models and the workdirs are.
    config: the flag that names the models.
  """

  root: pathlib.Path
  config: str

  def start(self, name: str, processes: int, devices: int, *flags, **options):
    return toys.start_run(
        self.config,
        f"--workdir={self.root / name}",
        f"--config.steps={STEPS}",
        *flags,
        processes=processes,
        devices=devices,
        **options,
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  root = tmp_path_factory.mktemp("processes")
  student = toys.write_model(root / "student", 0, "capable")
  teacher = toys.write_model(root / "teacher", 1, "teacher")
  return Toys(root, f"--config={_CONFIG}:{student},{teacher}")


@pytest.fixture(scope="module")
def whole(toy):
  """The workdir of a run of one process that was never stopped."""
  ((code, _, err),) = toys.end(toy.start("whole", 1, 4), 900)
  assert code == 0, err[-3000:]
  return toy.root / "whole"


@pytest.fixture(scope="module")
def parts(toy, whole):
  """A run of one process, then of two, then of one; and how each ended.

  Twice it is stopped by a signal, as at a preemption: the second time to the
  second of two processes alone.
  """
  workdir, ends = toy.root / "parts", []
  for processes, line in ((1, 3), (2, 6), (1, None)):
    started = toy.start("parts", processes, 4 // processes)
    if line:
      wait_for(workdir, f'"step": {line}, "prefix_len"', started)
      started[-1].send_signal(signal.SIGTERM)
    ends.append(toys.end(started, 900))
  return workdir, ends


def test_the_updates_were_more_than_nothing(whole):
  updates = [line for line in lines(whole) if "kl" in line]
  assert [line["step"] for line in updates] == list(range(1, STEPS + 1))
  assert updates[0]["tokens"] > 16 * 4
  assert updates[-1]["dropped"] == updates[-1]["dropped_long"] > 8
  assert updates[-1]["kl"] < 0.8 * updates[0]["kl"]


def test_a_run_goes_on_with_another_number_of_processes(parts, whole):
  """One, then two, then one; the lines are those of one, uninterrupted."""
  workdir, ends = parts
  assert [[code for code, _, _ in stage] for stage in ends] == [
      [130],
      [130, 130],
      [0],
  ]
  for stage in ends[1:]:
    assert "Resuming after update" in stage[0][1]
  assert_same_lines(lines(workdir), lines(whole))


def test_its_samples_are_those_of_one_process(parts, whole):
  for ours, theirs in zip(
      report.read_samples(parts[0]), report.read_samples(whole), strict=True
  ):
    assert len(ours) == len(theirs) > 12
    for x, y in zip(ours, theirs, strict=True):
      assert x.keys() == y.keys()
      for name, wanted in y.items():
        if name in ("divergence", "student", "teacher"):
          wanted = pytest.approx(wanted, rel=2e-3, abs=1e-5)
        if name != "alternatives":
          assert x[name] == wanted, (y["step"], name)


def test_its_export_is_that_of_one_process(parts, whole):
  ours, theirs = weights(parts[0]), weights(whole)
  assert ours.keys() == theirs.keys()
  for name, wanted in theirs.items():
    np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=2e-4)


def test_a_signal_to_one_process_stops_both_at_a_checkpoint(parts):
  last = [err.strip().splitlines()[-1] for _, _, err in parts[1][1]]
  assert last[0] == last[1]
  assert re.match(rf"Stopped after update \d+ of {STEPS}; the same", last[0])


def test_only_the_first_process_reports(parts):
  (_, first, _), (_, second, _) = parts[1][1]
  assert f"workdir {parts[0]}" in first
  assert "workdir" not in second


def test_what_one_process_cannot_do_ends_all_with_its_sentence(toy, tmp_path):
  """A file is missing on one of two hosts."""
  here, there = tmp_path / "0", tmp_path / "1"
  here.mkdir()
  there.mkdir()
  record = {"question": "How many pens?", "answer": "7"}
  (here / "prompts.jsonl").write_text(json.dumps(record) + "\n")
  ends = toys.end(
      toy.start(
          "failed",
          2,
          1,
          "--config.data.train.source=prompts.jsonl",
          "--config.data.train.size=0",
          "--config.mesh.fsdp=1",
          folders=[here, there],
      ),
      300,
  )
  assert [code for code, _, _ in ends] == [1, 1]
  first, second = (err.strip().splitlines() for _, _, err in ends)
  assert second[-1].startswith("error: The file prompts.jsonl does not")
  host, sentence = socket.gethostname(), second[-1].removeprefix("error: ")
  assert first[-1] == f"error: process 1 on {host}: {sentence}"
  assert not (toy.root / "failed" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [x for x in DAMAGES if x.name in _DAMAGES],
    ids=lambda damage: damage.name,
)
def test_processes_agree_on_a_damaged_checkpoint(toy, whole, damage):
  name = f"damaged {damage.name}"
  shutil.copytree(whole, toy.root / name)
  shutil.rmtree(toy.root / name / "export")
  damage.do(toy.root / name / "checkpoints" / str(STEPS))
  (first, second) = toys.end(toy.start(name, 2, 2), 900)
  assert (first[0], second[0]) == (0, 0), (first[2][-3000:], second[2][-3000:])
  assert f"The checkpoint of step {STEPS} is damaged" in first[2]
  assert "damaged" not in second[2]
  assert f"Resuming after update {STEPS - 2} of {STEPS}" in first[1]
  assert_same_lines(lines(toy.root / name), lines(whole))


@pytest.mark.slow
def test_processes_agree_on_records_that_are_drawn_from_a_stream(toy, tmp_path):
  """One process, not stopped; two that are stopped, and two that go on."""
  rows = [
      {
          "question": f"Ann has {i % 30} pens.",
          "answer": str(i % 30),
          "kind": "ab"[i % 4 == 3],
      }
      for i in range(240)
  ]
  source = tmp_path / "rows.jsonl"
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = (
      f"--config.data.train.source={source}",
      "--config.data.train.where=('kind=a',)",
      "--config.data.train.distinct=True",
      "--config.data.train.random=True",
      "--config.data.train.size=16",
  )
  ((code, _, err),) = toys.end(toy.start("drawn", 1, 4, *flags), 900)
  assert code == 0, err[-3000:]
  started = toy.start("drawn by two", 2, 2, *flags)
  wait_for(toy.root / "drawn by two", '"step": 5, "prefix_len"', started)
  started[1].send_signal(signal.SIGTERM)
  assert [code for code, _, _ in toys.end(started, 900)] == [130, 130]
  ends = toys.end(toy.start("drawn by two", 2, 2, *flags), 900)
  assert [code for code, _, _ in ends] == [0, 0], ends
  assert "Resuming after update" in ends[0][1]
  whole = lines(toy.root / "drawn")
  assert_same_lines(lines(toy.root / "drawn by two"), whole)
  assert len([line for line in whole if "kl" in line]) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_all_go_on(toy, whole, killed):
  name = f"killed-{killed}"
  started = toy.start(name, 2, 2, "--distributed_heartbeat=10")
  wait_for(toy.root / name, '"step": 3, "prefix_len"', started)
  started[killed].kill()
  began = time.monotonic()
  ends = toys.end(started, 90)
  # Ten seconds of heartbeats, and some for those who are told.
  assert time.monotonic() - began < 45
  assert ends[killed][0] == -signal.SIGKILL
  code, _, err = ends[1 - killed]
  assert code not in (0, 130)
  assert len(re.findall("^error: ", err, re.MULTILINE)) == 1, err
  assert "Check failure" not in err and "Traceback" not in err, err
  assert not (toy.root / name / "export").exists()
  ends = toys.end(toy.start(name, 2, 2), 900)
  assert [code for code, _, _ in ends] == [0, 0], ends
  assert_same_lines(lines(toy.root / name), lines(whole))
  ours, theirs = weights(toy.root / name), weights(whole)
  for tensor, wanted in theirs.items():
    np.testing.assert_allclose(ours[tensor], wanted, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(toy, tmp_path):
  for name in ("0", "1"):
    (tmp_path / name).mkdir()
  ends = toys.end(
      toy.start(
          "", 2, 1, "--workdir=run", folders=[tmp_path / "0", tmp_path / "1"]
      ),
      300,
  )
  assert [code for code, _, _ in ends] == [1, 1]
  for _, _, err in ends:
    assert "--workdir run lacks here what process 0 has written" in err


def test_a_process_whose_output_nobody_reads_tells_the_others():
  address = f"localhost:{toys.free_port()}"
  program = (
      "from prefix_distill import distributed, errors\n"
      "import sys\n"
      f"spec = distributed.Spec({address!r}, 2, int(sys.argv[1]))\n"
      "with distributed.joined(spec):\n"
      "  if spec.process_id == 0: raise errors.UserError('It is gone.')\n"
      "  distributed.wait('what never comes')\n"
  )
  first, second = (
      subprocess.Popen(
          [sys.executable, "-c", program, number],
          text=True,
          env=os.environ | {"JAX_PLATFORMS": "cpu"},
          stderr=subprocess.PIPE,
      )
      for number in "01"
  )
  first.stderr.close()
  ((code, _, err),) = toys.end([second], 900)
  assert code == 1
  sentence = f"error: process 0 on {socket.gethostname()}: It is gone."
  assert err.strip().splitlines()[-1] == sentence
  assert first.wait(60) == 1


def test_processes_with_different_settings_are_refused(toy):
  ends = toys.end(
      toy.start("different", 2, 1, own=[(), ("--config.data.batch_size=16",)]),
      300,
  )
  sentence = (
      "data.batch_size is 16 in this process, and 8 in process 0; start all"
      " with the same command, but for --process_id."
  )
  assert [code for code, _, _ in ends] == [1, 1]
  assert f"error: {sentence}" in ends[1][2]
  assert f"error: process 1 on {socket.gethostname()}: {sentence}" in ends[0][2]
  assert not (toy.root / "different").exists()


@pytest.mark.parametrize(
    "process, reason",
    [(1, "nothing listens there"), (0, "the others were all started")],
)
def test_processes_that_do_not_come_together_end_in_time(process, reason):
  address = f"localhost:{toys.free_port()}"
  program = (
      "from prefix_distill import distributed\n"
      f"spec = distributed.Spec({address!r}, 2, {process}, timeout=3)\n"
      "with distributed.joined(spec): raise AssertionError\n"
  )
  done = subprocess.run(
      [sys.executable, "-c", program],
      capture_output=True,
      text=True,
      timeout=300,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 1
  (sentence,) = (x for x in done.stderr.splitlines() if "error: " in x)
  for text in ("The 2 processes", address, "within 3 s", reason):
    assert text in sentence
  assert "stack trace" not in done.stderr


def test_the_tasks_of_a_slurm_step_find_one_another():
  """Each on a node of its own, so each with all the devices of its node."""
  program = (
      "from prefix_distill import distributed\n"
      "import jax\n"
      "with distributed.joined(distributed.Spec('slurm', timeout=200)):\n"
      "  got = distributed.from_first('name', f'of {jax.process_index()}')\n"
      "  print(got, jax.process_count(), jax.local_device_count())\n"
  )
  step = _STEP | {
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_STEP_NUM_NODES": "2",
      "JAX_COORDINATOR_PORT": str(toys.free_port()),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": toys.xla_flags(3),
  }
  started = [
      subprocess.Popen(
          [sys.executable, "-c", program],
          text=True,
          env=os.environ | step | {"SLURM_PROCID": number},
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
      )
      for number in ("0", "1")
  ]
  for out in toys.finish(started, 300):
    assert out.splitlines()[-1] == "of 0 2 3"


@pytest.mark.parametrize(
    "flags, texts",
    [
        ({"method": "pod"}, ("--distributed=pod", "slurm", "HOST:PORT")),
        ({"method": "host"}, ("--distributed=host", "HOST:PORT")),
        ({"method": "host:"}, ("port ''", "1 to 65535")),
        ({"method": "host:65536"}, ("port '65536'", "1 to 65535")),
        ({"method": "host:1e3"}, ("port '1e3'", "1 to 65535")),
        ({"method": "host:0"}, ("port '0'", "1 to 65535")),
        ({"method": "a b:1"}, ("--distributed=a b:1", "HOST:PORT")),
        ({"method": "h:1"}, ("needs --num_processes",)),
        ({"method": "h:1", "num_processes": 2}, ("needs --process_id",)),
        ({"method": "h:1", "process_id": 0}, ("needs --num_processes",)),
        (
            {"method": "h:1", "num_processes": 2, "process_id": 2},
            ("--process_id is 2", "--num_processes 2", "from 0 to 1"),
        ),
        (
            {"method": "h:1", "num_processes": 2, "process_id": -1},
            ("--process_id is -1", "from 0 to 1"),
        ),
        (
            {"method": "h:1", "num_processes": 0, "process_id": 0},
            ("--num_processes is 0", "1 or more"),
        ),
        (
            {"num_processes": 2},
            ("--num_processes=2 needs --distributed=HOST:PORT",),
        ),
        (
            {"method": "auto", "num_processes": 2, "process_id": 1},
            ("--num_processes=2 and --process_id=1", "--distributed=auto"),
        ),
        ({"method": "off", "process_id": 1}, ("--distributed=off",)),
        ({"timeout": 0}, ("--distributed_timeout is 0", "1 or more")),
        ({"heartbeat": 1}, ("--distributed_heartbeat is 1", "5 or more")),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, texts):
  with pytest.raises(ConfigError) as error:
    distributed.Spec(**flags)
  for text in texts:
    assert text in str(error.value)


def test_flags_that_fit_are_taken():
  for address in ("10.0.0.1:8476", "host-0.pod:1", "[::1]:65535"):
    distributed.Spec(address, 4, 3)
  for method in ("", "off", "auto"):
    distributed.Spec(method)


@pytest.fixture
def surroundings(monkeypatch):
  """Sets variables, with none of the others that say who started this."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "TPU_", "OMPI_", "MEGASCALE_")):
      monkeypatch.delenv(name)

  def change(variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return change


def test_slurm_needs_the_variables_of_a_step(surroundings):
  surroundings({k: _STEP[k] for k in ("SLURM_JOB_ID", "SLURM_NTASKS")})
  with pytest.raises(ConfigError) as error:
    distributed.Spec("slurm")
  for name in _STEP:
    assert (name in str(error.value)) is (
        name not in ("SLURM_JOB_ID", "SLURM_NTASKS")
    )
  assert "srun" in str(error.value)
  surroundings(_STEP | {"SLURM_PROCID": "x"})
  with pytest.raises(ConfigError, match="SLURM_PROCID is 'x'"):
    distributed.Spec("slurm")
  surroundings(_STEP)
  distributed.Spec("slurm")


@pytest.mark.parametrize(
    "variables, sign, method",
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b", "auto"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2", "auto"),
        (_STEP, "SLURM_NTASKS=2", "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2", "auto"),
    ],
)
def test_one_of_several_processes_needs_the_flag(
    surroundings, variables, sign, method
):
  surroundings(variables)
  with pytest.raises(ConfigError) as error:
    with distributed.joined(distributed.Spec()):
      raise AssertionError
  for text in ("is missing", sign, f"--distributed={method}", "=off"):
    assert text in str(error.value)
  with distributed.joined(distributed.Spec("off")):
    pass


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        # A job's script, before srun starts a step.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        _STEP | {"SLURM_NTASKS": "1"},
    ],
)
def test_a_process_of_its_own_needs_no_flag(surroundings, variables):
  surroundings(variables)
  with distributed.joined(distributed.Spec()):
    pass


def test_settings_are_checked_before_anything_else():
  """Before the config, which is wrong as well."""
  (process,) = toys.start_run(
      "--config=configs/none.py",
      "--process_id=1",
      devices=1,
  )
  ((code, _, err),) = toys.end([process], 900)
  assert code == 1
  assert err.startswith("error: --process_id=1 needs --distributed=HOST:PORT")
  assert len(err.strip().splitlines()) == 1
