"""Injects faults into runs of the command line, and says what held.

  python tests/injection.py [--kinds=kill,hosts] [--count=3]

Each trial runs the main job on the bundled models and does one fault to it.
The promise of most: the same command then ends with the metrics (without
times) and the export, byte for byte, of a run that was never stopped. A trial
that is done is not done again by the next call in the same --directory. The
table goes to --output, which is docs/faults.md in the repository.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time

from damage import DAMAGES
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import toys

from prefix_distill import assets
from prefix_distill.train import checkpoint

_ROOT = pathlib.Path(__file__).parent.parent
_WATCHED = _ROOT / "tests" / "programs" / "phases.py"
PHASES = (
    "loading",
    "sampling",
    "scoring",
    "update",
    "saving",
    "evaluation",
    "export",
    "report",
)
_HOST_PHASES = ("loading", "sampling", "saving", "evaluation")
# What depends on the clock and on how often a run was started.
_VARIABLE = ("seconds", "tokens_per_second", "compilations")
# Seconds: --distributed_timeout, --distributed_heartbeat, and what a process
# may take beyond them to end.
_TIMEOUT, _HEARTBEAT, _SPARE = 20, 10, 15
# Seconds after which a run hangs.
_LONG = 400
# Seconds from a SIGTERM to the end, by --notice.
_NOTICES = {600: 60, 0.1: 15}
# Bytes of the disk: nothing fits, settings do, one checkpoint does, two do,
# and all do but not the export beside them.
_SIZES = (64 << 10, 1 << 20, 6 << 20, 13 << 20, 17 << 20)
_ROOM = 128 << 20
_DUMP = ("*** Check failure", "stack trace", "terminate called")


@dataclasses.dataclass(frozen=True)
class Trial:
  """One fault.

  Attributes:
    kind: of faults, as in the table.
    name: no other trial has it.
    do: does it; returns what happened.
  """

  kind: str
  name: str
  do: Callable[[], str]


class Broken(Exception):
  """A promise that does not hold."""


def _check(condition: bool, text: str) -> None:
  if not condition:
    raise Broken(text)


@dataclasses.dataclass(frozen=True)
class Job:
  """A process of a run, whose output goes to files.

  Attributes:
    process: None for a run that an earlier call has done.
    workdir: of the run.
    log: the files of its output, without their suffixes.
    phases: the file of `programs/phases.py`.
  """

  process: subprocess.Popen | None
  workdir: pathlib.Path
  log: pathlib.Path
  phases: pathlib.Path

  @property
  def out(self) -> str:
    return self.log.with_suffix(".out").read_text(errors="replace")

  @property
  def err(self) -> str:
    return self.log.with_suffix(".err").read_text(errors="replace")

  def wait(self, seconds: float = _LONG) -> int:
    """Returns the exit status."""
    try:
      return self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.kill()
      raise Broken(f"it hangs: no end in {seconds:g} s ({self.log})") from None

  def kill(self) -> None:
    self.process.kill()
    self.process.wait()

  def events(self) -> list[tuple[float, str]]:
    """Returns when each phase began."""
    if not self.phases.is_file():
      return []
    lines = self.phases.read_text().split("\n")[:-1]
    return [(float(x.split()[0]), x.split()[1]) for x in lines]

  def wait_for(self, phase: str, number: int) -> bool:
    """Waits until a phase begins, counted from 0; False if the run ends."""
    deadline = time.monotonic() + _LONG
    while time.monotonic() < deadline:
      if sum(name == phase for _, name in self.events()) > number:
        return True
      if self.process.poll() is not None:
        return False
      time.sleep(0.003)
    self.kill()
    raise Broken(f"it hangs before {phase} ({self.log})")

  def sentence(self) -> str:
    """Returns the last line of the errors that is one of ours."""
    lines = [x.strip() for x in self.err.splitlines() if x.strip()]
    ours = [x for x in lines if re.match("error: |Stopped|Interrupted", x)]
    return (ours or lines or ["(nothing)"])[-1]


def _metrics(workdir: pathlib.Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
      {k: v for k, v in json.loads(x).items() if not k.startswith(_VARIABLE)}
      for x in lines
  ]


def _export(workdir: pathlib.Path) -> dict[str, bytes]:
  files = (workdir / "export").iterdir()
  return {file.name: file.read_bytes() for file in files}


def _leaves(tree) -> dict[str, np.ndarray]:
  found = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(k): np.asarray(x) for k, x in found}


def _all_finite(arrays: dict[str, np.ndarray], where: str) -> None:
  for name, x in arrays.items():
    if np.issubdtype(x.dtype, np.inexact) or x.dtype.kind == "V":
      good = np.isfinite(x.astype(np.float32)).all()
      _check(good, f"{where} holds a non-finite value in {name}")


def _read_state(step: pathlib.Path):
  return ocp.PyTreeCheckpointHandler().restore(step / "state")


def _check_finite(workdir: pathlib.Path) -> None:
  """Checks that no checkpoint and no export has a value that is not finite."""
  for step in checkpoint.listed(workdir):
    arrays = _leaves(_read_state(workdir / "checkpoints" / str(step)))
    _all_finite(arrays, f"checkpoint {step}")
  for file in workdir.glob("export*/*.safetensors"):
    _all_finite(safetensors.numpy.load_file(file), "the export")


class Bench:
  """Starts runs in one directory."""

  def __init__(self, directory: pathlib.Path, seed: int):
    self.directory, self.seed = directory, seed
    directory.mkdir(parents=True, exist_ok=True)
    flags = os.environ.get("XLA_FLAGS", "")
    alone = "--xla_force_host_platform_device_count=1"
    self._environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(_ROOT),
        "XLA_FLAGS": f"{flags} {alone}",
    }

  def random(self, name: str) -> random.Random:
    return random.Random(f"{self.seed} {name}")

  def start(
      self,
      workdir: pathlib.Path,
      *flags: str,
      watched: bool = False,
      limit: int | None = None,
  ) -> Job:
    """Starts one process; `limit` is of the bytes of each file it writes."""
    logs = self.directory / "logs"
    logs.mkdir(exist_ok=True)
    names = (logs / f"{workdir.name}-{n}" for n in itertools.count(1))
    log = next(x for x in names if not x.with_suffix(".out").exists())
    phases = log.with_suffix(".phases")
    program = [_WATCHED, phases] if watched else ["-m", "prefix_distill.main"]
    before = None
    if limit is not None:
      size = (limit, limit)
      before = functools.partial(
          resource.setrlimit, resource.RLIMIT_FSIZE, size
      )
    with (
        log.with_suffix(".out").open("w") as out,
        log.with_suffix(".err").open("w") as err,
    ):
      process = subprocess.Popen(
          [
              sys.executable,
              *program,
              *toys.SMALL_RUN,
              f"--workdir={workdir}",
              *flags,
          ],
          cwd=_ROOT,
          env=self._environment,
          stdout=out,
          stderr=err,
          preexec_fn=before,
      )
    return Job(process, workdir, log, phases)

  def pair(self, workdir: pathlib.Path, watched: bool = False) -> list[Job]:
    """Starts a run of two processes."""
    address = f"--distributed=localhost:{toys.free_port()}"
    return [
        self.start(
            workdir,
            address,
            "--num_processes=2",
            f"--process_id={i}",
            f"--distributed_timeout={_TIMEOUT}",
            f"--distributed_heartbeat={_HEARTBEAT}",
            watched=watched,
        )
        for i in range(2)
    ]

  @functools.cached_property
  def whole(self) -> Job:
    """A run of one process that was never stopped, with warm caches."""
    return self._reference("whole", lambda x: [self.start(x, watched=True)])

  @functools.cached_property
  def whole_pair(self) -> Job:
    """The same of two processes."""
    return self._reference("pair", lambda x: self.pair(x, watched=True))

  def _reference(self, name: str, start: Callable) -> Job:
    path = self.directory / name
    phases = path / "phases"
    if not phases.is_file():  # By an earlier call.
      for _ in range(2):  # The second one's times are the usual ones.
        jobs = start(self.fresh(name))
        codes = [job.wait() for job in jobs]
        assert not any(codes), jobs[0].err[-3000:]
      shutil.copy(jobs[0].phases, phases)
    return Job(None, path, path, phases)

  def fresh(self, name: str) -> pathlib.Path:
    path = self.directory / re.sub(r"\W+", "-", name)
    shutil.rmtree(path, ignore_errors=True)
    return path

  def moments(self, whole: Job, phase: str) -> list[tuple[int, float]]:
    """Returns a phase's numbers and seconds, where it takes any."""
    events, found, number = whole.events(), [], 0
    ends = [time for time, _ in events[1:]] + [events[-1][0]]
    for (begin, name), end in zip(events, ends, strict=True):
      if name == phase:
        if end - begin > 0.004:
          found.append((number, end - begin))
        number += 1
    return found

  def strike(
      self,
      name: str,
      whole: Job,
      jobs: Sequence[Job],
      victim: int,
      phase: str,
      number: signal.Signals,
  ) -> str:
    """Sends a signal at a random moment of a phase; returns where it came."""
    chance, job = self.random(name), jobs[victim]
    which, seconds = chance.choice(self.moments(whole, phase))
    arrived = job.wait_for(phase, which)
    if arrived:
      time.sleep(chance.random() * seconds)
    if job.process.poll() is not None:
      return ""
    job.process.send_signal(number)
    return job.events()[-1][1]

  def goes_on(self, workdir: pathlib.Path, *flags: str) -> Job:
    """Starts the same command, which must end as the whole run did."""
    job = self.start(workdir, *flags)
    self.ended(job)
    return job

  def ended(self, job: Job) -> None:
    code = job.wait()
    _check(code == 0, f"exit {code}: {job.sentence()}")
    _check("Traceback" not in job.err + job.out, f"a traceback in {job.log}")
    self.same(job.workdir, self.whole)

  def same(self, workdir: pathlib.Path, whole: Job) -> None:
    ours, theirs = _metrics(workdir), _metrics(whole.workdir)
    _check(len(ours) == len(theirs), "metrics have other lines")
    for x, y in zip(ours, theirs, strict=True):
      names = [k for k in x.keys() | y.keys() if x.get(k) != y.get(k)]
      _check(not names, f"metrics differ at step {y['step']}: {names}")
    _check(_export(workdir) == _export(whole.workdir), "the export differs")

  # What can be done.

  def kill(self, name: str, phase: str) -> str:
    """A SIGKILL."""
    for attempt in range(4):  # The run may have ended before it came.
      job = self.start(self.fresh(name), watched=True)
      where = self.strike(
          f"{name} {attempt}", self.whole, [job], 0, phase, signal.SIGKILL
      )
      code = job.wait()
      if where:
        break
    _check(code == -signal.SIGKILL, f"it was never hit: exit {code}")
    self.goes_on(job.workdir)
    return f"killed ({where}); the same command ended as the whole run"

  def stop(self, name: str, phase: str, notice: float) -> str:
    """A SIGTERM."""
    for attempt in range(4):
      job = self.start(
          self.fresh(name), f"--notice={notice:g}", watched=True
      )
      where = self.strike(
          f"{name} {attempt}", self.whole, [job], 0, phase, signal.SIGTERM
      )
      begin = time.monotonic()
      code = job.wait()
      if where:
        break
    passed, limit = time.monotonic() - begin, _NOTICES[notice]
    _check(passed < limit, f"it ended {passed:.0f} s after the SIGTERM")
    _check("Traceback" not in job.err + job.out, f"a traceback in {job.log}")
    _check(code in (0, 130, -signal.SIGTERM), f"exit {code}: {job.sentence()}")
    if code == 130:
      _check("the same command goes on" in job.sentence(), job.sentence())
    self.goes_on(job.workdir)
    said = {
        0: "it ended anyway",
        130: "it saved and said so",
        -signal.SIGTERM: "it ended at once",
    }[code]
    return f"{said}; the same command ended as the whole run"

  def damage(self, name: str, damage) -> str:
    """A damaged checkpoint."""
    workdir = self.fresh(name)
    shutil.copytree(self.whole.workdir, workdir)
    shutil.rmtree(workdir / "export")
    damage.do(workdir / "checkpoints" / "6")
    job = self.goes_on(workdir)
    moved = (workdir / "damaged").exists()
    warned = "warning: The checkpoint of step 6 is damaged" in job.err
    _check(moved == warned, f"moved: {moved}, but warned: {warned}")
    if not moved:
      return "no harm; ended as the whole run"
    return "named in a warning, the one before taken; ended as the whole run"

  def disk(self, name: str, size: int, mounts: bool) -> str:
    """A full disk, with room again once the run says that it is full."""
    if not mounts:
      return self._limited(name, size)
    place = self.fresh(name)
    place.mkdir()
    _mount(place, f"size={size}")
    try:
      job = self.start(place / place.name)
      deadline = time.monotonic() + _LONG
      while job.process.poll() is None and "tries again" not in job.out:
        _check(time.monotonic() < deadline, f"it hangs ({job.log})")
        time.sleep(0.1)
      code, waited = job.process.poll(), "tries again" in job.out
      kept = checkpoint.listed(job.workdir)
      _mount(place, f"remount,size={_ROOM}")
      said = self._after_full(job, code, waited)
      return f"{said} (checkpoints on the full disk: {kept or 'none'})"
    finally:
      if job.process.poll() is None:
        job.kill()
      subprocess.run(["umount", place], check=True)

  def _limited(self, name: str, size: int) -> str:
    job = self.start(self.fresh(name), limit=size)
    deadline = time.monotonic() + _LONG
    while job.process.poll() is None and "tries again" not in job.out:
      _check(time.monotonic() < deadline, f"it hangs ({job.log})")
      time.sleep(0.1)
    code = job.process.poll()
    if code is None:
      job.kill()  # Its limit cannot be lifted from here.
      self.goes_on(job.workdir)
      return "it waited; without the limit it ended as the whole run"
    return self._after_full(job, code, False)

  def _after_full(self, job: Job, code: int | None, waited: bool) -> str:
    """Checks how a run on a full disk ended, or goes on with room again."""
    if code is None:
      self.ended(job)
      return "it waited; with room again it ended as the whole run"
    _check("Traceback" not in job.err + job.out, f"a traceback in {job.log}")
    if code == 0:
      self.ended(job)
      return "a warning; it ended as the whole run"
    _check(code == 1, f"exit {code}: {job.sentence()}")
    _check(job.sentence().startswith("error: "), job.sentence())
    self.goes_on(job.workdir)
    return "a sentence; with room again the same command ended as the whole run"

  def numbers(self, name: str, source: "Source") -> str:
    """Numbers that are not finite."""
    workdir = self.fresh(name)
    if source.plants:
      shutil.copytree(self.whole.workdir, workdir)
      shutil.rmtree(workdir / "export")
      _plant(workdir / "checkpoints" / "6", source.tensor, source.value)
      job = self.goes_on(workdir)
      _check("not finite" in job.err, f"no warning of it in {job.log}")
      _check_finite(workdir)
      return "named in a warning, the one before taken; ended as the whole run"
    flags = list(source.flags)
    if source.role:
      model = self.fresh(f"{name} model")
      _spoil(source, model)
      flags += [
          f"--config.{source.role}.path={model}",
          f"--config.{source.role}.tokenizer={_MODELS[source.role]}",
      ]
    job = self.start(workdir, *flags)
    code, sentence = job.wait(), job.sentence()
    if workdir.exists():
      _check_finite(workdir)
    _check("Traceback" not in job.err + job.out, f"a traceback in {job.log}")
    if code == 0:
      skipped = _metrics(workdir)[-1].get("skipped", 0)
      return f"it ended, {skipped} skipped; all that it wrote is finite"
    _check(code == 1, f"exit {code}: {sentence}")
    _check(sentence.startswith("error: "), sentence)
    _check(not (workdir / "export").exists(), "there is an export")
    if "skipped because" in sentence:
      return "skipped and counted, then ended with a sentence; no export"
    named = not source.tensor or source.tensor in sentence
    _check(named, f"the tensor is not named: {sentence}")
    return f"refused by name ({'the tensor' if source.tensor else 'setting'})"

  def two_runs(self, name: str, phase: str) -> str:
    """A second run in a workdir."""
    workdir = self.fresh(name)
    first = self.start(workdir, watched=True)
    if phase:
      first.wait_for(phase, 0)
    second = self.start(workdir)
    jobs = [first, second]
    codes = [job.wait() for job in jobs]
    _check(sorted(codes) == [0, 1], f"exits {codes}: {second.sentence()}")
    won, lost = (jobs[codes.index(x)] for x in (0, 1))
    says = f"in use by process {won.process.pid} on"
    _check(says in lost.sentence(), lost.sentence())
    _check(len(lost.err.strip().splitlines()) == 1, f"see {lost.log}")
    self.ended(won)
    return "refused, with who holds it; the other ended as the whole run"

  def host(
      self, name: str, phase: str, how: signal.Signals, victim: int
  ) -> str:
    """One of two processes that dies or freezes."""
    workdir = self.fresh(name)
    for attempt in range(4):
      shutil.rmtree(workdir, ignore_errors=True)
      jobs = self.pair(workdir, watched=True)
      where = self.strike(
          f"{name} {attempt}", self.whole_pair, jobs, victim, phase, how
      )
      if where:
        break
      for job in jobs:
        job.wait()
    begin, other = time.monotonic(), jobs[1 - victim]
    together = _HEARTBEAT + _SPARE
    limit = together + (_TIMEOUT if phase == "loading" else 0)
    try:
      code = other.wait(limit)
    finally:
      jobs[victim].kill()
    passed = time.monotonic() - begin
    text = other.err + other.out
    _check(code != 0, "the other ended with exit 0")
    problem = [x for x in (*_DUMP, "Traceback") if x in text]
    _check(not problem, f"a dump, {problem[:1]}, after {passed:.0f} s")
    count = len(re.findall(r"^\s*error: ", text, re.MULTILINE))
    _check(count == 1, f"{count} sentences in {other.log}")
    jobs = self.pair(workdir)
    codes = [job.wait() for job in jobs]
    _check(codes == [0, 0], f"then exits {codes}: {jobs[0].sentence()}")
    self.same(workdir, self.whole_pair)
    return "the other ended with one sentence; both then ended as the whole run"


def _mount(place: pathlib.Path, options: str) -> None:
  subprocess.run(
      ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place],
      check=True,
      capture_output=True,
  )


def _mounts(directory: pathlib.Path) -> bool:
  """Whether a disk of a certain size can be made here."""
  place = directory / "probe"
  place.mkdir(parents=True, exist_ok=True)
  try:
    _mount(place, "size=65536")
  except (OSError, subprocess.CalledProcessError):
    return False
  subprocess.run(["umount", place], check=True)
  return True


_MODELS = {"student": "bundled:weak", "teacher": "bundled:teacher"}


@dataclasses.dataclass(frozen=True)
class Source:
  """Where numbers come from that are not finite.

  Attributes:
    name: says so.
    flags: of the run.
    role: of a model whose weights are changed.
    tensor: of that model, or of the checkpoint's state.
    value: what one of its numbers becomes.
    plants: whether it is in a checkpoint, whose checksums are right.
  """

  name: str
  flags: tuple[str, ...] = ()
  role: str = ""
  tensor: str = ""
  value: float = 0.0
  plants: bool = False


_RATE = "--config.optimizer.learning_rate={}"
_LAYER = "model.layers.0."
SOURCES = (
    Source("learning rate 1e30", (_RATE.format("1e30"),)),
    Source(
        "NaN in the teacher's embedding",
        role="teacher",
        tensor="model.embed_tokens.weight",
        value=math.nan,
    ),
    Source(
        "weights of the checkpoint",
        tensor="params",
        value=math.nan,
        plants=True,
    ),
    Source(
        "the teacher's norm, 3e38",
        role="teacher",
        tensor="model.norm.weight",
        value=3e38,
    ),
    Source(
        "infinity in the student's queries",
        role="student",
        tensor=f"{_LAYER}self_attn.q_proj.weight",
        value=math.inf,
    ),
    Source(
        "the student's MLP, 1e20",
        role="student",
        tensor=f"{_LAYER}mlp.gate_proj.weight",
        value=1e20,
    ),
    Source(
        "the student's norm, 3e38",
        role="student",
        tensor="model.norm.weight",
        value=3e38,
    ),
    Source(
        "-infinity in the teacher's MLP",
        role="teacher",
        tensor=f"{_LAYER}mlp.down_proj.weight",
        value=-math.inf,
    ),
    Source(
        "moments of the checkpoint",
        tensor="opt_state",
        value=math.inf,
        plants=True,
    ),
    Source(
        "NaN in the student's norm",
        role="student",
        tensor=f"{_LAYER}input_layernorm.weight",
        value=math.nan,
    ),
    Source(
        "the teacher's MLP, -3e38",
        role="teacher",
        tensor=f"{_LAYER}mlp.up_proj.weight",
        value=-3e38,
    ),
    Source(
        "a learning rate of 1 without clipping",
        (_RATE.format("1"), "--config.optimizer.clip_norm=0.0"),
    ),
)


def _spoil(source: Source, directory: pathlib.Path) -> None:
  """Writes a bundled model with numbers that are not finite, or overflow."""
  name = _MODELS[source.role].removeprefix("bundled:")
  shutil.copytree(assets.path(name), directory)
  (file,) = directory.glob("*.safetensors")
  tensors = safetensors.numpy.load_file(file)
  tensor = tensors[source.tensor].copy()
  if math.isfinite(source.value):
    tensor[...] = source.value  # One alone might not be met.
  else:
    tensor.flat[tensor.size // 2] = source.value
  tensors[source.tensor] = tensor
  safetensors.numpy.save_file(tensors, file, {"format": "pt"})


def _plant(step: pathlib.Path, group: str, value: float) -> None:
  """Writes a checkpoint again with one other number, and right checksums."""
  state = _read_state(step)
  leaves, structure = jax.tree.flatten(state[group])
  largest = max(range(len(leaves)), key=lambda i: np.size(leaves[i]))
  changed = np.array(leaves[largest])
  changed.flat[changed.size // 2] = value
  leaves[largest] = changed
  state[group] = jax.tree.unflatten(structure, leaves)
  state = jax.tree.map(jax.numpy.asarray, state)
  shutil.rmtree(step / "state")
  with ocp.StandardCheckpointer() as writer:
    writer.save(step.absolute() / "state", state)
  shutil.copy(step / "host" / "commit_success.txt", step / "state")
  file = step / "host" / "metadata"
  host = json.loads(file.read_text())
  host.pop("sha256")
  sums, _ = checkpoint.checksums_of(state)
  host["checksums"] = {k: sums.get(k, v) for k, v in host["checksums"].items()}
  file.write_text(json.dumps(checkpoint._sealed(host)))


def _spread(items: Sequence, count: int) -> list:
  """Returns so many of them, from all over."""
  count = min(count, len(items))
  return [items[i * len(items) // count] for i in range(count)]


def _kills(bench: Bench, count: int) -> Iterator[Trial]:
  for i in range(count):
    phase = PHASES[i % len(PHASES)]
    name = f"kill {i} {phase}"
    do = functools.partial(bench.kill, name, phase)
    yield Trial(f"SIGKILL in {phase}", name, do)


def _stops(bench: Bench, count: int) -> Iterator[Trial]:
  for i in range(count):
    notice = list(_NOTICES)[i % 2]
    phase = PHASES[(i // 2 * 3 + 1) % len(PHASES)]
    name = f"stop {i} {phase} {notice:g}"
    do = functools.partial(bench.stop, name, phase, notice)
    yield Trial(f"SIGTERM, --notice={notice:g}", name, do)


def _damages(bench: Bench, count: int) -> Iterator[Trial]:
  for damage in _spread(DAMAGES, count):
    name = f"damage {damage.name}"
    do = functools.partial(bench.damage, name, damage)
    yield Trial("damaged checkpoint", name, do)


def _disks(bench: Bench, count: int) -> Iterator[Trial]:
  mounts = _mounts(bench.directory)
  how = "tmpfs" if mounts else "RLIMIT_FSIZE"
  for size in _spread(_SIZES, count):
    name = f"disk {size} {how}"
    do = functools.partial(bench.disk, name, size, mounts)
    yield Trial(f"disk of {size / 2**20:g} MiB full ({how})", name, do)


def _numbers(bench: Bench, count: int) -> Iterator[Trial]:
  for source in SOURCES[:count]:
    name = f"numbers {source.name}"
    do = functools.partial(bench.numbers, name, source)
    yield Trial(f"not finite: {source.name}", name, do)


def _two_runs(bench: Bench, count: int) -> Iterator[Trial]:
  for i in range(count):
    phase = ("sampling", "", "evaluation", "saving")[i % 4]
    name = f"second {i} {phase}"
    do = functools.partial(bench.two_runs, name, phase)
    when = f"in {phase}" if phase else "at the same moment"
    yield Trial(f"second run in the workdir, {when}", name, do)


def _hosts(bench: Bench, count: int) -> Iterator[Trial]:
  """Kills and freezes, in turn, of either process, over all phases."""
  for i in range(count):
    how = (signal.SIGKILL, signal.SIGSTOP)[i % 2]
    phase = _HOST_PHASES[(i // 2 + i % 2) % 4]
    victim = (i // 2 + i // 8) % 2
    word = "killed" if how == signal.SIGKILL else "frozen"
    name = f"host {i} {word} {victim} {phase}"
    do = functools.partial(bench.host, name, phase, how, victim)
    yield Trial(f"process {victim} of 2 {word} in {phase}", name, do)


# How many of each are done if --count is not given.
KINDS = {
    "kill": (_kills, 50),
    "stop": (_stops, 20),
    "damage": (_damages, len(DAMAGES)),
    "disk": (_disks, len(_SIZES)),
    "numbers": (_numbers, len(SOURCES)),
    "runs": (_two_runs, 2),
    "hosts": (_hosts, 16),
}


def _run(trial: Trial) -> dict:
  begin = time.monotonic()
  try:
    held, said = True, trial.do()
  except Broken as broken:
    held, said = False, str(broken)
  return {
      "kind": trial.kind,
      "name": trial.name,
      "held": held,
      "said": said,
      "seconds": time.monotonic() - begin,
      "day": f"{datetime.date.today()}",
  }


def _read(file: pathlib.Path) -> dict[str, dict]:
  if not file.is_file():
    return {}
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  return {line["name"]: line for line in lines}


def run(
    directory: pathlib.Path, kinds: Sequence[str], count: int | None, seed: int
) -> list[dict]:
  """Does the trials that were not done; returns the results of all."""
  bench, file = Bench(directory, seed), directory / "results.jsonl"
  for kind in kinds:
    make, usual = KINDS[kind]
    _ = bench.whole_pair if kind == "hosts" else bench.whole  # Before trials.
    for trial in make(bench, usual if count is None else count):
      if trial.name in _read(file):
        continue
      result = _run(trial)
      with file.open("a") as out:
        out.write(json.dumps(result) + "\n")
      word = "held" if result["held"] else "NOT HELD"
      print(
          f"{word}: {trial.name}: {result['said']} ({result['seconds']:.0f} s)",
          flush=True,
      )
      if result["held"]:
        shutil.rmtree(bench.fresh(trial.name), ignore_errors=True)
  return list(_read(file).values())


def table(results: Sequence[dict]) -> str:
  """Returns the results as Markdown, one row for a kind."""
  groups: dict[str, list[dict]] = {}
  for result in results:
    groups.setdefault(result["kind"], []).append(result)
  rows = [
      "| kind | tried | held | what happened | seconds |",
      "|---|---|---|---|---|",
  ]
  for kind, group in groups.items():
    # Without the paths of logs.
    said = dict.fromkeys(re.sub(r" (in )?/\S+", "", x["said"]) for x in group)
    seconds = statistics.median(x["seconds"] for x in group)
    held = sum(x["held"] for x in group)
    rows.append(
        f"| {kind} | {len(group)} | {held} | {'; or '.join(said)} |"
        f" {seconds:.0f} |"
    )
  held = sum(x["held"] for x in results)
  rows.append(f"| all | {len(results)} | {held} | | |")
  return "\n".join(rows)


_INTRODUCTION = """# Faults

`python tests/injection.py` runs the main job on the bundled models, does one
fault to it, and starts the same command again. Where a row says "as the whole
run", metrics (without times) and export are, byte for byte, those of a run that
was never stopped. `pytest -m slow tests/test_injection.py` does a few of each
kind. Seconds are the median of a trial, starts included. The
moment in a phase is random, and in brackets is the phase in which the run was
when it was hit, which may be the next one on a busy machine. On a full disk,
room is made once the run says that it waits, or has ended.

One of two processes that dies or freezes ends the other within
`--distributed_heartbeat` ({heartbeat} s here) and {spare} s; before they have
met, within `--distributed_timeout` ({timeout} s here) more. The other one says
in one sentence what it lost. Its exit status is 1 if it finds out itself, and
134 if JAX does first: JAX then aborts the process from a thread of C++.

Measured {day} on {machine}, {cores} cores, with {versions}.

{table}
"""


def document(results: Sequence[dict]) -> str:
  days = sorted({x["day"] for x in results})
  return _INTRODUCTION.format(
      heartbeat=_HEARTBEAT,
      spare=_SPARE,
      timeout=_TIMEOUT,
      day=" to ".join(dict.fromkeys([days[0], days[-1]])),
      machine=f"{platform.system()} {platform.machine()}",
      cores=os.cpu_count(),
      versions=f"JAX {jax.__version__}",
      table=table(results),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kinds", default=",".join(KINDS))
  parser.add_argument("--count", type=int, help="of each kind")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
      "--directory", type=pathlib.Path, default=pathlib.Path("runs/faults")
  )
  parser.add_argument("--output", type=pathlib.Path)
  args = parser.parse_args()
  kinds = args.kinds.split(",")
  unknown = sorted(set(kinds) - KINDS.keys())
  if unknown:
    parser.error(f"--kinds has {unknown[0]}; choose from {', '.join(KINDS)}.")
  results = run(args.directory.absolute(), kinds, args.count, args.seed)
  print(table(results))
  if args.output:
    args.output.write_text(document(results))
  sys.exit(not all(x["held"] for x in results))


if __name__ == "__main__":
  main()
