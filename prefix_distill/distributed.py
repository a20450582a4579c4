"""How a process finds the others of its run: --distributed and its flags."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from typing import Any
from typing import NoReturn

import jax
from jax._src import distributed as jax_distributed

from prefix_distill.errors import check
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError

# Seconds between two looks at whether another process has failed.
_POLL = 1.0
# Seconds that a failed process waits for the others to read why.
_LINGER = 10
# Seconds for the slowest process to get ready or to end: downloads, plots.
_PATIENCE = 3600
_FAILURES = "prefix_distill/failures/"
# What jax.process_index() and its like are made of; they would wait for the
# devices of all processes first.
_STATE = jax_distributed.global_state


class DistributedError(UserError):
  """Processes that do not come together, or do not stay so."""


def first_line(error: BaseException) -> str:
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".")


class Watch:
  """Tells the others of a failure here, and ends this process on theirs."""

  def __init__(self):
    self._client = _STATE.client
    self._lock = threading.Lock()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()

  def _look(self) -> None:
    while not self._done.wait(_POLL):
      try:
        failures = self._client.key_value_dir_get(_FAILURES)
      except jax.errors.JaxRuntimeError:
        continue  # The coordinator is gone; JAX ends this process for that.
      if failures:
        self._lock.acquire()
        self._leave(f"error: {failures[0][1]}", 1)

  def _leave(self, text: str, code: int, told: str = "") -> NoReturn:
    """Says why here, tells the others, and ends as soon as they know."""
    try:
      # Said first, for JAX aborts this process if the coordinator is gone.
      with contextlib.suppress(OSError, ValueError):  # If nobody reads it.
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
      if told:
        self._client.key_value_set(f"{_FAILURES}{_STATE.process_id}", told)
      self._client.wait_at_barrier(_FAILURES, _LINGER * 1000)
      if _STATE.process_id == 0:
        time.sleep(1)  # The service goes with it, and who is still there.
    finally:
      os._exit(code)

  def fail(self, error: BaseException) -> NoReturn:
    """Ends all processes because of an error in this one."""
    self._lock.acquire()
    sentence, code, trace = first_line(error) + ".", 1, ""
    if isinstance(error, KeyboardInterrupt):
      sentence, code = "Interrupted.", 130
    elif not isinstance(error, UserError):
      sentence = (
          f"{type(error).__name__}: {sentence[:-1]}; if nothing has to be"
          " mended, the same command goes on from the last checkpoint."
      )
      trace = "".join(traceback.format_exception(error))
    where = f"process {_STATE.process_id} on {socket.gethostname()}"
    self._leave(f"{trace}error: {sentence}", code, f"{where}: {sentence}")

  def close(self) -> None:
    self._done.set()
    self._thread.join()


_used: dict[str, int] = {}


def _key(name: str) -> str:
  """Returns a key for this use of a name; every process uses it as often."""
  _used[name] = _used.get(name, 0) + 1
  return f"prefix_distill/{name}/{_used[name]}"


def wait(name: str, seconds: int = _PATIENCE) -> None:
  """Waits until every process is here.

  Args:
    name: of the place, for the message.
    seconds: the limit.

  Raises:
    DistributedError: it is reached.
  """
  if _STATE.num_processes == 1:
    return
  client = _STATE.client
  try:
    client.wait_at_barrier(_key(name), seconds * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise DistributedError(
        f"Not all {_STATE.num_processes} processes reached {name!r} within"
        f" {seconds} s ({first_line(error)}); see what the others do."
    ) from error


def from_first(name: str, value: Any, seconds: int = _PATIENCE) -> Any:
  """Returns what process 0 gave, in every process; JSON.

  Args:
    name: of what is asked, for the message.
    value: of this process.
    seconds: the limit.

  Raises:
    DistributedError: process 0 gave nothing within it.
  """
  if _STATE.num_processes == 1:
    return value
  client, key = _STATE.client, _key(name)
  if _STATE.process_id == 0:
    client.key_value_set(key, json.dumps(value))
    return value
  try:
    return json.loads(client.blocking_key_value_get(key, seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise DistributedError(
        f"Process 0 did not say {name!r} within {seconds} s"
        f" ({first_line(error)}); see what it does."
    ) from error


def from_all(name: str, value: Any, seconds: int = _PATIENCE) -> list[Any]:
  """Returns what each process gave, in every process; JSON.

  Args:
    name: of what is asked, for the message.
    value: of this process.
    seconds: the limit.

  Raises:
    DistributedError: a process gave nothing within it.
  """
  if _STATE.num_processes == 1:
    return [value]
  client, key, found = _STATE.client, _key(name), []
  client.key_value_set(f"{key}/{_STATE.process_id}", json.dumps(value))
  for process in range(_STATE.num_processes):
    try:
      text = client.blocking_key_value_get(f"{key}/{process}", seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
      raise DistributedError(
          f"Process {process} did not say {name!r} within {seconds} s"
          f" ({first_line(error)}); see what it does."
      ) from error
    found.append(json.loads(text))
  return found


# What jax reads of a SLURM step.
_SLURM = (
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spec:
  """How this process finds the others.

  Attributes:
    method: "auto", "slurm", or "HOST:PORT" of process 0; "off" for a run of
      one process whatever the surroundings look like, and "" for one that
      checks them.
    num_processes: how many there are; None unless method is HOST:PORT.
    process_id: this one's number; None unless method is HOST:PORT.
    timeout: seconds for all to come together.
    heartbeat: seconds after which a silent process counts as dead.
  """

  method: str = ""
  num_processes: int | None = None
  process_id: int | None = None
  timeout: int = 300
  heartbeat: int = 100

  def __post_init__(self):
    """Checks the flags against each other.

    Raises:
      ConfigError: they do not fit together, or to SLURM's variables.
    """
    for flag, value, low in (
        ("distributed_timeout", self.timeout, 1),
        ("distributed_heartbeat", self.heartbeat, 5),
    ):
      check(
          value >= low,
          f"--{flag} is {value} seconds; set it to {low} or more.",
      )
    numbers = {
        "--num_processes": self.num_processes,
        "--process_id": self.process_id,
    }
    given = [f"{k}={v}" for k, v in numbers.items() if v is not None]
    if self.method in ("", "off", "auto", "slurm"):
      shown = f"--distributed={self.method}" if self.method else "none"
      check(
          not given,
          f"{' and '.join(given)} needs --distributed=HOST:PORT, the address"
          f" of process 0, and there is {shown}; set it, or leave"
          f" {'them' if len(given) > 1 else 'it'} out.",
      )
      if self.method == "slurm":
        _check_slurm()
      return
    self._check_address()
    for flag, value in numbers.items():
      check(
          value is not None,
          f"--distributed={self.method} needs {flag} as well; set it"
          " (--num_processes=N, and --process_id=0 to N-1, one each).",
      )
    check(
        self.num_processes >= 1,
        f"--num_processes is {self.num_processes}; set it to 1 or more.",
    )
    check(
        0 <= self.process_id < self.num_processes,
        f"--process_id is {self.process_id} of --num_processes"
        f" {self.num_processes}; number them from 0 to"
        f" {self.num_processes - 1}.",
    )

  def _check_address(self) -> None:
    host, _, port = self.method.rpartition(":")
    wrong = None
    if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]", host):
      wrong = "is neither auto, slurm, off nor HOST:PORT"
    elif not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
      wrong = f"has the port {port!r}, which is none of 1 to 65535"
    check(
        wrong is None,
        f"--distributed={self.method} {wrong}; give the address of process 0,"
        " such as --distributed=10.0.0.1:8476.",
    )


def _check_slurm() -> None:
  missing = [name for name in _SLURM if name not in os.environ]
  check(
      not missing,
      f"--distributed=slurm, but {', '.join(missing)}"
      f" {'are' if len(missing) > 1 else 'is'} not set, as in a step that srun"
      " started; start with srun, or use --distributed=HOST:PORT.",
  )
  for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"):
    check(
        os.environ[name].isdigit(),
        f"--distributed=slurm, but {name} is {os.environ[name]!r}, no number;"
        " start with srun, or use --distributed=HOST:PORT.",
    )


def _surroundings() -> Iterator[tuple[str, str]]:
  """Yields a sign that this process is one of several, and the flag for it."""
  environment = os.environ
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
  if "," in hosts:
    yield f"TPU_WORKER_HOSTNAMES={hosts}", "auto"
  for name, method, inside in (
      ("MEGASCALE_NUM_SLICES", "auto", "MEGASCALE_NUM_SLICES"),
      # A job has tasks before srun starts a step that runs them.
      ("SLURM_NTASKS", "slurm", "SLURM_STEP_NODELIST"),
      ("OMPI_COMM_WORLD_SIZE", "auto", "OMPI_COMM_WORLD_SIZE"),
  ):
    count = environment.get(name, "")
    if inside in environment and count.isdigit() and int(count) > 1:
      yield f"{name}={count}", method


def _check_alone() -> None:
  """Refuses to be one of several processes that do not know of each other.

  Raises:
    ConfigError: --distributed is missing.
  """
  mend = (
      "; without it every process would do the whole run into one workdir. Set"
      " --distributed={}, or --distributed=off if this is a run of its own."
  )
  for sign, method in _surroundings():
    raise ConfigError(
        f"--distributed is missing, and this is one of several processes"
        f" ({sign}){mend.format(method)}"
    )
  # On a Cloud TPU pod the runtime knows of the other hosts by itself.
  check(
      jax.process_count() == 1,
      "--distributed is missing, and this is one of"
      f" {jax.process_count()} hosts of a pod{mend.format('auto')}",
  )


def _listens(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
      return True
  except OSError:
    return False


def _not_together(spec: Spec) -> str:
  """Says what is known when time is up."""
  state = jax_distributed.global_state
  address = state.coordinator_address
  if address is None:
    return (
        f"--distributed={spec.method} found no coordinator within"
        f" {spec.timeout} s (--distributed_timeout); see whether process 0 is"
        " started, or use --distributed=HOST:PORT."
    )
  count = spec.num_processes or state.num_processes
  why = "nothing listens there, so see whether process 0 runs and the port is"
  why += " open to this host"
  if _listens(address):
    why = "process 0 is there, so see whether the others were all started, with"
    why += " the same address and number of processes"
  return (
      f"The {count} processes that the coordinator {address} expects did not"
      f" come together within {spec.timeout} s (--distributed_timeout); {why}."
  )


def _join(spec: Spec) -> None:
  """Connects to the others.

  Raises:
    DistributedError: JAX could not; or, when time is up, the process ends.
  """

  def give_up() -> None:
    print(f"error: {_not_together(spec)}", file=sys.stderr, flush=True)
    os._exit(1)

  options: dict[str, Any] = {}
  if spec.method in ("auto", "slurm"):
    if spec.method == "slurm":
      options["cluster_detection_method"] = "slurm"
    nodes = os.environ.get("SLURM_STEP_NUM_NODES")
    if nodes and nodes == os.environ.get("SLURM_NTASKS"):
      # A process a node takes all its GPUs; JAX would give it the first.
      options["local_device_ids"] = []
  else:
    options = {
        "coordinator_address": spec.method,
        "num_processes": spec.num_processes,
        "process_id": spec.process_id,
        "cluster_detection_method": "deactivate",
    }
  if jax.config.jax_cpu_collectives_implementation in (None, "none"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # At its own limit JAX aborts the process with a stack trace (LOG(FATAL) in
  # C++), so this one comes first.
  timer = threading.Timer(spec.timeout, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
        **options,
        initialization_timeout=spec.timeout + 60,
        heartbeat_timeout_seconds=spec.heartbeat,
        shutdown_timeout_seconds=spec.heartbeat,
    )
  except Exception as error:
    reason = first_line(error)
    if spec.method == "auto" and "should be defined" in reason:
      raise DistributedError(
          "--distributed=auto found neither a TPU pod's metadata nor SLURM,"
          " Open MPI or Kubernetes here; use --distributed=HOST:PORT with"
          " --num_processes and --process_id."
      ) from error
    raise DistributedError(
        f"--distributed={spec.method} did not bring the processes together"
        f" ({reason}); see whether the address is process 0's, its port is"
        " free, and every --process_id is used once."
    ) from error
  finally:
    timer.cancel()


@contextlib.contextmanager
def joined(spec: Spec) -> Iterator[None]:
  """Joins the other processes; all leave together, or fail together.

  If the body raises in one of several processes, that one ends with exit
  status 1 (130 after Ctrl-C) and its sentence, and within seconds so do the
  others, wherever they are, with "process 1 on HOST: " and the sentence.

  Raises:
    ConfigError: --distributed is missing.
    DistributedError: the processes do not come together.
  """
  if spec.method in ("", "off"):
    if not spec.method:
      _check_alone()
    yield
    return
  _join(spec)
  watch = Watch()
  try:
    yield
    wait("end")
  except BaseException as error:  # pylint: disable=broad-except
    watch.fail(error)
  watch.close()
