"""A run's directory: who holds it, its settings and inputs, whether it is done.

One run at a time has a workdir. Process 0 holds `lock`, a file that it creates
exclusively, which works on shared file systems where `flock` does not, and
writes a new count into it every ten seconds. A holder that was killed leaves
the file behind, so the next start finds out whether it is dead:

- In the same boot of the same machine, by its process id and that process's
  start: at once.
- Elsewhere, by its count: if that stands still for two minutes, or was written
  ten minutes ago by the clocks, the holder is dead.

A resumed run reads the same as before: `contents.json` has fingerprints of what
it read. Files are named there by the setting that they belong to and not by
their place, so that another host may have them elsewhere.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import typing
from typing import Any
import uuid

import jax
import numpy as np

from prefix_distill import config as config_lib
from prefix_distill import distributed
from prefix_distill.config import Config
from prefix_distill.config import DatasetSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import gym
from prefix_distill.errors import JsonError
from prefix_distill.errors import one_line
from prefix_distill.errors import read_json
from prefix_distill.errors import UserError
from prefix_distill.evaluate.evaluator import Problems
from prefix_distill.models import huggingface as hf
from prefix_distill.models import lora
from prefix_distill.report import report
from prefix_distill.train import checkpoint

_CONFIG, _CONTENTS, _LOCK = "config.json", "contents.json", "lock"
# Seconds that a shared file system may take to show a new file.
_SHARING = 30
# Seconds between two counts of a holder; without one for so long it is dead;
# and if its last one is as old as this by the clocks, that is not waited for.
_BEAT, _SILENCE, _AGE = 10, 120, 600
# Seconds after a lock was taken over in which another start may do the same.
_SETTLE = 0.3
# The setting, and for one of several files its name -> the fingerprint.
Contents = dict[str, str]
# Files up to this size are hashed whole.
_SMALL = 2**23
# Larger ones are hashed at either end, and in blocks at even distances.
_END, _BLOCK, _BLOCKS = 2**20, 2**16, 64
_RECORDS = 64
_MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")


class WorkdirError(UserError):
  """A workdir that is in use, or belongs to another run."""


def _text(path: str) -> str:
  """Returns what a file of /proc says; "" where there is none."""
  try:
    return pathlib.Path(path).read_text().strip()
  except OSError:
    return ""


def _machine() -> str:
  """Names this boot of this machine, and its space of process ids."""
  boot = _text("/proc/sys/kernel/random/boot_id")
  try:
    space = os.readlink("/proc/self/ns/pid")
  except OSError:
    space = ""
  return f"{socket.gethostname()} {boot} {space}"


def _process_start(pid: int) -> str:
  """Returns when a process started; "" if it is dead or cannot be asked."""
  # After the name in brackets, which may have spaces: the state, and 19 fields
  # later the start in ticks since the boot.
  fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
  if len(fields) < 20 or fields[0] in "ZX":
    return ""
  return fields[19]


def _lives(pid: int, start: str) -> bool:
  """Whether a process of this machine is the one that started then."""
  if start:
    return _process_start(pid) == start
  try:  # Without /proc.
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # Another user's.
  return True


@dataclasses.dataclass(frozen=True)
class Holder:
  """Who holds a workdir.

  Attributes:
    token: a random name of this hold.
    host: its name.
    machine: see `_machine`.
    pid: of process 0.
    start: of that process, see `_process_start`.
    since: the time of the hold, UTC.
    count: grows while the holder lives.
    beat: seconds since 1970 when the count was written.
  """

  token: str
  host: str
  machine: str
  pid: int
  start: str
  since: str
  count: int
  beat: float

  @classmethod
  def here(cls) -> "Holder":
    now = datetime.datetime.now(datetime.UTC)
    return cls(
        uuid.uuid4().hex,
        socket.gethostname(),
        _machine(),
        os.getpid(),
        _process_start(os.getpid()),
        f"{now:%Y-%m-%d %H:%M:%S} UTC",
        0,
        time.time(),
    )

  @classmethod
  def read(cls, path: pathlib.Path) -> "Holder | None":
    """Returns who holds a lock; None if nobody, or nothing readable."""
    try:
      holder = cls(**read_json(path))
    except (JsonError, TypeError):
      return None
    return holder if holder._is_sound else None

  @property
  def _is_sound(self) -> bool:
    """Whether each field is of its kind, and the process id can be one."""
    kinds = typing.get_type_hints(type(self)) | {"beat": (int, float)}
    sound = all(isinstance(getattr(self, n), k) for n, k in kinds.items())
    return sound and 0 < self.pid < 2**31

  @property
  def is_dead(self) -> bool | None:
    """Whether it is dead; None if that cannot be told from here at once."""
    if self.machine == _machine():
      return not _lives(self.pid, self.start)
    return True if time.time() - self.beat > _AGE else None

  def line(self) -> str:
    # All lines have one length, so that no end of a longer one is left.
    return json.dumps(dataclasses.asdict(self)).ljust(600) + "\n"


class Lock:
  """The lock of a workdir, in process 0.

  Attributes:
    path: the file.
  """

  def __init__(self, workdir: pathlib.Path):
    """Takes the lock.

    Raises:
      WorkdirError: another run has it, or the workdir cannot be written to.
    """
    self.path = workdir / _LOCK
    self._mine = Holder.here()
    self._lost = ""
    self._done = threading.Event()
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      while not self._create():
        self._take_over()
    except OSError as error:
      raise WorkdirError(
          f"{workdir} cannot be written to ({error.strerror}); make it a"
          " directory with room that you may write to, or choose another"
          " --workdir."
      ) from error
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def _create(self) -> bool:
    """Creates the file; whether there was none."""
    try:
      file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      # Ours, if it was taken over.
      holder = Holder.read(self.path)
      return holder is not None and holder.token == self._mine.token
    with open(file, "w") as out:
      out.write(self._mine.line())
    return True

  def _take_over(self) -> None:
    """Takes the lock of a dead holder.

    Raises:
      WorkdirError: the holder lives.
    """
    if self.path.is_dir():
      raise WorkdirError(
          f"{self.path} is a directory, and the run's lock would be there;"
          " remove it."
      )
    holder = self._settled()
    if holder is not None and not self._is_dead(holder):
      raise WorkdirError(self._refusal(holder))
    partial = self.path.with_name(f"{_LOCK}.{self._mine.token}")
    partial.write_text(self._mine.line())
    # Nobody else took it over in the meantime, and nobody does afterwards.
    now = Holder.read(self.path)
    if (now and now.token) != (holder and holder.token):
      partial.unlink()
      return
    partial.replace(self.path)
    time.sleep(_SETTLE)

  def _settled(self) -> Holder | None:
    """Reads the holder, who may just be writing it."""
    for _ in range(10):
      holder = Holder.read(self.path)
      if holder is not None or not self.path.exists():
        return holder
      time.sleep(0.1)
    return None  # It was killed there: a file that says nothing.

  def _is_dead(self, holder: Holder) -> bool:
    if holder.is_dead is not None:
      return holder.is_dead
    print(
        f"{self.path.parent} is held by a run on {holder.host}; it is dead if"
        f" it gives no sign of life for {_SILENCE} s.",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + _SILENCE
    while time.monotonic() < deadline:
      time.sleep(1)
      now = Holder.read(self.path)
      if now is None:
        return not self.path.exists()  # It ended.
      if (now.token, now.count) != (holder.token, holder.count):
        return False
    return True

  def _refusal(self, holder: Holder) -> str:
    return (
        f"{self.path.parent} is in use by process {holder.pid} on"
        f" {holder.host} since {holder.since}, and two runs in one workdir"
        " would spoil each other; wait for it or stop it, or choose another"
        " --workdir."
    )

  def _beat(self) -> None:
    while not self._done.wait(_BEAT):
      with contextlib.suppress(OSError):  # A full disk, say: the next may go.
        self._write_count()

  def _write_count(self) -> None:
    holder = Holder.read(self.path)
    if holder is not None and holder.token != self._mine.token:
      self._lost = self._refusal(holder)
      self._done.set()
    elif holder is not None:
      count = self._mine.count + 1
      self._mine = dataclasses.replace(
          self._mine, count=count, beat=time.time()
      )
      # In place, which needs no room on a full disk.
      with self.path.open("r+") as file:
        file.write(self._mine.line())

  def check(self) -> None:
    """Checks that the lock is still held.

    Raises:
      WorkdirError: another run took it, while this one stood still.
    """
    if self._lost:
      raise WorkdirError(self._lost)

  def release(self) -> None:
    """Lets the next run have the workdir."""
    self._done.set()
    self._thread.join()
    holder = Holder.read(self.path)
    if holder is not None and holder.token == self._mine.token:
      with contextlib.suppress(OSError):  # The workdir may be gone.
        self.path.unlink()


def _samples(size: int) -> Iterator[tuple[int, int]]:
  """Yields where to read, and how much."""
  if size <= _SMALL:
    yield 0, size
    return
  yield 0, _END
  for start in np.linspace(_END, size - _END - _BLOCK, _BLOCKS):
    yield int(start), _BLOCK
  yield size - _END, _END


def fingerprint(path: pathlib.Path) -> str:
  """Returns a file's size and a SHA-256: of a large file, of samples.

  A large file is read at its ends, where safetensors and Parquet have their
  headers, and at 64 places between: 16 GB of weights take a second. A change of
  a few bytes elsewhere is not seen.

  Raises:
    UserError: it cannot be read.
  """
  digest = hashlib.sha256()
  try:
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      for start, count in _samples(size):
        file.seek(start)
        digest.update(file.read(count))
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error
  return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"


def _model_files(name: str, spec: ModelSpec) -> Iterator[tuple[str, str]]:
  """Yields the files of a model, and of its tokenizer if that is another's."""
  places = {name: spec.path}
  if spec.tokenizer:
    places[f"{name}.tokenizer"] = spec.tokenizer
  for place, path in places.items():
    weights = place == name and not spec.random_init
    directory = hf.resolve(path, weights)
    patterns = (*_MODEL_FILES, "*.safetensors") if weights else _MODEL_FILES
    for pattern in patterns:
      for file in sorted(directory.glob(pattern)):
        yield f"{place}/{file.name}", fingerprint(file)


def _hash(values: Any) -> str:
  # What JSON lacks, such as a picture, counts by its kind alone.
  text = json.dumps(values, sort_keys=True, default=lambda x: str(type(x)))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(records: Any, number: int) -> dict[str, Any]:
  try:
    return dict(records[number])
  except gym.NotMade:
    return {}


def _sampled(records: Any) -> str:
  """Returns the number of records, and a hash of some of them."""
  count = len(records)
  numbers = np.unique(np.linspace(0, count - 1, _RECORDS).astype(int))
  found = [_record(records, int(number)) for number in numbers]
  return f"{count} records, sha256 {_hash(found)} of {len(found)}"


def _data_files(
    name: str, spec: DatasetSpec, records: Any
) -> Iterator[tuple[str, str]]:
  """Yields the files of a data set, or else some of its records."""
  path = pathlib.Path(spec.source)
  if path.is_file():
    yield name, fingerprint(path)
  elif path.is_dir():
    for file in sorted(path.rglob("*")):
      inner = file.relative_to(path)
      if file.is_file() and not any(x.startswith(".") for x in inner.parts):
        yield f"{name}/{inner}", fingerprint(file)
  else:  # Of the hub, or made by the package.
    yield name, _sampled(records)


def _problems(found: Problems) -> str:
  """Returns the number of problems, and a hash of prompts and answers."""
  digest = hashlib.sha256(np.ascontiguousarray(found.batch.tokens).tobytes())
  digest.update(_hash([str(answer) for answer in found.answers]).encode())
  count = len(found.answers)
  return f"{count} problems, sha256 {digest.hexdigest()[:16]}"


def read_contents(
    config: Config, records: Any, problems: Mapping[str, Problems]
) -> Contents:
  """Returns the fingerprints of all that a run reads.

  Args:
    config: the settings.
    records: of the training data.
    problems: the evaluation sets.
  """
  out = dict(_model_files("student", config.student))
  if config.method != "sft":
    out |= _model_files("teacher", config.teacher)
  if config.lora.path:
    directory = hf.resolve(config.lora.path, weights=True)
    for name in (lora.CONFIG, lora.WEIGHTS):
      out[f"lora.path/{name}"] = fingerprint(directory / name)
  out |= _data_files("data.train", config.data.train, records)
  for name, found in problems.items():
    out[f"evaluation.sets.{name}"] = _problems(found)
  specs = (config.data.train, *config.evaluation.sets.values())
  if any(spec.is_gym for spec in specs):
    out["reasoning-gym"] = f"version {gym.version()}"
  return out


def contents_difference(old: Contents, new: Contents) -> str:
  """Returns the first difference, a predicate ("read X with A ..."), or ""."""
  for name in [*new, *(name for name in old if name not in new)]:
    before, after = old.get(name, "nothing"), new.get(name, "nothing")
    if before != after:
      return f"read {name} with {before}, and there is now {after}"
  return ""


@contextlib.contextmanager
def claimed(
    config: Config, workdir: pathlib.Path, contents: Contents
) -> Iterator[Lock | None]:
  """Holds a workdir for a run: nothing is written there before.

  Writes `config.json` and `contents.json`, or checks that those there are the
  same; `steps` may be larger than in a run that is there. Every process must
  call it.

  Args:
    config: the settings.
    workdir: of the run; made if need be.
    contents: fingerprints of what the run reads.

  Yields:
    The lock in process 0, and None in the others.

  Raises:
    WorkdirError: another run holds the workdir, or has other settings, or
      read other contents.
  """
  lock, refused = None, ""
  try:
    if jax.process_index() == 0:
      try:
        lock = Lock(workdir)
        _claim(config, workdir, contents)
      except WorkdirError as error:
        refused = str(error)
    refused = distributed.from_first("lock", refused)
    if refused:
      raise WorkdirError(refused)
    _check_shared(workdir)
    distributed.wait("workdir")
    yield lock
  finally:
    if lock is not None:
      lock.release()


def _write(file: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes JSON, whole or not at all."""
  partial = file.with_name(f"{file.name}.partial")
  partial.write_text(json.dumps(values, indent=2) + "\n")
  partial.replace(file)


def read_config(workdir: pathlib.Path) -> Config:
  """Reads the settings of a run.

  Raises:
    WorkdirError: there is no run, or its settings are not readable.
    ConfigError: they do not fit this version.
  """
  # Also where the name is too long for the file system.
  if not os.path.isfile(workdir / _CONFIG):
    raise WorkdirError(
        f"{workdir} has no {_CONFIG}, so no run is there; give the --workdir of"
        " one."
    )
  return config_lib.from_dict(_read(workdir / _CONFIG))


def _read(file: pathlib.Path) -> dict[str, Any]:
  """Reads JSON of a workdir.

  Raises:
    WorkdirError: it is none.
  """
  try:
    found = read_json(file)
    reason = "" if isinstance(found, dict) else "it has no fields"
  except JsonError as error:
    reason = str(error)
  if reason:
    raise WorkdirError(
        f"{file} is not JSON of a run ({reason}); put a copy back, or choose"
        " another --workdir."
    )
  return found


def _claim(config: Config, workdir: pathlib.Path, contents: Contents) -> None:
  """Writes settings and fingerprints, or checks those there; in process 0."""
  try:
    if os.path.lexists(workdir / _CONTENTS):
      found = contents_difference(_read(workdir / _CONTENTS), contents)
      if found:
        raise WorkdirError(
            f"{workdir} holds a run that {found}; put that back as it was, or"
            " choose another --workdir."
        )
    _claim_config(config, workdir)
    if not os.path.lexists(workdir / _CONTENTS):
      _write(workdir / _CONTENTS, contents)
  except OSError as error:
    raise WorkdirError(
        f"{workdir} cannot be written to ({error.strerror}); make room or make"
        " it writable, or choose another --workdir."
    ) from error


def _claim_config(config: Config, workdir: pathlib.Path) -> None:
  file, mine = workdir / _CONFIG, config_lib.plain(config)
  if not os.path.lexists(file):
    _write(file, mine)
    return
  theirs = _read(file)
  if theirs == mine:
    return
  name, old, new = config_lib.first_difference(theirs, mine)
  if isinstance(old, int) and theirs | {"steps": new} == mine and new > old:
    _check_more_steps(config, workdir, old)
    # The export is of the fewer steps, so that the run is not finished.
    if os.path.lexists(workdir / "export"):
      place = checkpoint.free(workdir / f"export-{old}")
      (workdir / "export").rename(place)
    _write(file, mine)
    return
  same_steps = theirs | {"steps": mine["steps"]}
  more = ""
  if same_steps != mine:  # Other steps alone would be no reason.
    name, old, new = config_lib.first_difference(same_steps, mine)
    if mine["steps"] > theirs["steps"]:  # As of configs/own.py:steps=.
      more = " (for more steps alone, add"
      more += f" --config.steps={mine['steps']} to its first command)"
  raise WorkdirError(
      f"{workdir} holds a run with {name} = {old!r}, and this one has"
      f" {new!r}; choose another --workdir, or delete that one to start"
      f" over{more}."
  )


def _check_more_steps(config: Config, workdir: pathlib.Path, old: int) -> None:
  """Refuses more steps where they would have changed the updates so far."""
  reason = ""
  if config.optimizer.decay == "cosine":
    reason = (
        "optimizer.decay is 'cosine', which falls to the last step, so that the"
        " updates so far would have been others"
    )
  elif config.method == "seqkd":
    reason = "the teacher wrote its answers for so many"
  if reason:
    raise WorkdirError(
        f"{workdir} holds a run with steps = {old}, and this one has"
        f" {config.steps}, but {reason}; choose another --workdir."
    )


def _check_shared(workdir: pathlib.Path) -> None:
  """Checks that what process 0 writes is seen here.

  Raises:
    WorkdirError: it is not.
  """
  deadline = time.monotonic() + _SHARING
  while not (workdir / _CONFIG).is_file():
    if time.monotonic() > deadline:
      raise WorkdirError(
          f"--workdir {workdir} lacks here what process 0 has written there;"
          " put it on a file system that all hosts share."
      )
    time.sleep(0.5)


def _whole(export: pathlib.Path) -> bool:
  """Whether a model's directory has all files, and all of the weights."""
  if not os.path.lexists(export):
    return False
  try:
    if not export.is_dir():
      raise UserError("it is no directory")
    path = str(export.absolute())
    hf.check_weights(path, hf.read_config(path))
    names = {file.name for file in export.iterdir()}
    if not names & {"tokenizer.json", "tokenizer_config.json"}:
      raise UserError("it has no tokenizer")
  except (UserError, OSError) as error:
    reason = one_line(error)
    print(
        f"warning: {export} is not whole ({reason}), so the run goes on from"
        " its last checkpoint and writes it again.",
        file=sys.stderr,
        flush=True,
    )
    return False
  return True


def is_finished(workdir: pathlib.Path) -> bool:
  """Whether the run has its export, whole; process 0 says so for all.

  The export comes last. Once `steps` is raised, it has another name.
  """
  whole = jax.process_index() == 0 and _whole(workdir / "export")
  return distributed.from_first("finished", whole)


def check_not_lost(workdir: pathlib.Path) -> None:
  """Refuses to start over in a workdir whose checkpoints are gone.

  Raises:
    WorkdirError: there are updates in the metrics, but no checkpoint.
  """
  if checkpoint.listed(workdir):
    return
  lines = report.read_metrics(workdir / "metrics.jsonl")
  last = max((line.get("step", 0) for line in lines), default=0)
  if last > 0:
    raise WorkdirError(
        f"{workdir} has metrics of updates up to {last}, but no checkpoint; put"
        " a copy of its checkpoints back, or delete the workdir to start over."
    )
