"""Joins the processes of a run: --distributed and its flags."""

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

from prefix_distill import lost_process
from prefix_distill.errors import check
from prefix_distill.errors import ConfigError
from prefix_distill.errors import one_line
from prefix_distill.errors import redacted
from prefix_distill.errors import shown
from prefix_distill.errors import UserError

# Seconds between two checks whether another process has failed.
_POLL = 1.0
# Seconds that a failed process waits until the others have read its message.
_LINGER = 10
# Seconds that processes wait for the slowest one, which downloads or plots.
_PATIENCE = 3600
# The longest time that a flag may give, in seconds, and the most processes.
_DAY, _MOST = 86_400, 2**20
_FAILURES = "prefix_distill/failures/"
# jax.process_index() reads this state, but first waits for all devices.
_STATE = jax_distributed.global_state


class DistributedError(UserError):
  """Processes that cannot connect, or lose their connection."""


def _is_lost(error: BaseException) -> bool:
  """Whether an error says that another process is gone."""
  return isinstance(error, jax.errors.JaxRuntimeError) and bool(
      re.search("gloo|closed by peer|reset by peer", str(error), re.IGNORECASE)
  )


class FailureWatch:
  """Reports this process's failure, and ends this process if another fails."""

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
        continue  # The coordinator is gone, so JAX ends this process.
      if failures:
        self._lock.acquire()
        self._leave(f"error: {failures[0][1]}", 1)

  def _leave(self, text: str, code: int, told: str = "") -> NoReturn:
    """Prints why, tells the other processes, and exits."""
    try:
      # Print first: JAX aborts this process if the coordinator is gone.
      with contextlib.suppress(OSError, ValueError):  # The pipe may be closed.
        sys.stderr.flush()
        # Past Python, so that `lost_process` knows that this was said.
        os.write(2, f"{text}\n".encode())
        sys.stdout.flush()
      if told:
        self._client.key_value_set(f"{_FAILURES}{_STATE.process_id}", told)
      self._client.wait_at_barrier(_FAILURES, _LINGER * 1000)
      if _STATE.process_id == 0:
        time.sleep(1)  # The coordinator's exit aborts whoever is still there.
    finally:
      os._exit(code)

  def fail(self, error: BaseException) -> NoReturn:
    """Ends all processes because of an error in this one."""
    self._lock.acquire()
    sentence, code, trace = str(error), 1, ""
    if isinstance(error, KeyboardInterrupt):
      sentence, code = "Interrupted.", 130
    elif _is_lost(error):
      sentence = (
          f"The connection to another process broke ({one_line(error)}); see"
          " which process ended first, and why. The same command goes on from"
          " the last checkpoint."
      )
    elif not isinstance(error, UserError):
      sentence = (
          f"{type(error).__name__}: {one_line(error)}; if nothing has to be"
          " mended, the same command goes on from the last checkpoint."
      )
      trace = "".join(traceback.format_exception(error))
    where = f"process {_STATE.process_id} on {socket.gethostname()}"
    sentence = redacted(sentence)
    text = f"{redacted(trace)}error: {sentence}"
    self._leave(text, code, f"{where}: {sentence}")

  def close(self) -> None:
    self._done.set()
    self._thread.join()


_used: dict[str, int] = {}


def _key(name: str) -> str:
  """Returns a new key; the n-th call for a name agrees in all processes."""
  _used[name] = _used.get(name, 0) + 1
  return f"prefix_distill/{name}/{_used[name]}"


def wait(name: str) -> None:
  """Waits until every process calls this.

  Args:
    name: the name of the barrier, for the message.

  Raises:
    DistributedError: another process does not come within an hour.
  """
  if _STATE.num_processes == 1:
    return
  client = _STATE.client
  try:
    client.wait_at_barrier(_key(name), _PATIENCE * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise DistributedError(
        f"Not all {_STATE.num_processes} processes reached {name!r} within"
        f" {_PATIENCE} s ({one_line(error)}); see what the others do."
    ) from error


def _said(name: str, key: str, process: int) -> Any:
  """Waits for the value that a process sends under a key."""
  client = _STATE.client
  try:
    return json.loads(client.blocking_key_value_get(key, _PATIENCE * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise DistributedError(
        f"Process {process} did not say {name!r} within {_PATIENCE} s"
        f" ({one_line(error)}); see what it does."
    ) from error


def from_first(name: str, value: Any) -> Any:
  """Returns the value of process 0 in every process, sent as JSON.

  Args:
    name: the name of the value, for the message.
    value: this process's value.

  Raises:
    DistributedError: process 0 sends no value within an hour.
  """
  if _STATE.num_processes == 1:
    return value
  client, key = _STATE.client, _key(name)
  if _STATE.process_id == 0:
    client.key_value_set(key, json.dumps(value))
    return value
  return _said(name, key, 0)


def from_all(name: str, value: Any) -> list[Any]:
  """Returns each process's value in every process, sent as JSON.

  Args:
    name: the name of the value, for the message.
    value: this process's value.

  Raises:
    DistributedError: a process sends no value within an hour.
  """
  if _STATE.num_processes == 1:
    return [value]
  client, key = _STATE.client, _key(name)
  client.key_value_set(f"{key}/{_STATE.process_id}", json.dumps(value))
  processes = range(_STATE.num_processes)
  return [_said(name, f"{key}/{process}", process) for process in processes]


# The variables of a SLURM step that JAX reads.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


@dataclasses.dataclass(frozen=True)
class Spec:
  """How this process finds the other processes.

  Attributes:
    method: "auto", "slurm", or "HOST:PORT" of process 0. "off" is a run of one
      process; "" is the same, but refuses an environment of several processes.
    num_processes: the number of processes; None unless method is HOST:PORT.
    process_id: this process's number; None unless method is HOST:PORT.
    timeout: seconds until all processes must have connected.
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
      ConfigError: they contradict each other, or SLURM's variables.
    """
    for flag, value, low in (
        ("distributed_timeout", self.timeout, 1),
        ("distributed_heartbeat", self.heartbeat, 5),
    ):
      check(
          low <= value <= _DAY,
          f"--{flag} is {shown(value)} seconds; set it to {low} or more, up to"
          f" {_DAY}.",
      )
    numbers = {
        "--num_processes": self.num_processes,
        "--process_id": self.process_id,
    }
    given = [f"{k}={v}" for k, v in numbers.items() if v is not None]
    if self.method in ("", "off", "auto", "slurm"):
      method = f"--distributed={self.method}" if self.method else "none"
      check(
          not given,
          f"{' and '.join(given)} needs --distributed=HOST:PORT, the address"
          f" of process 0, and there is {method}; set it, or leave"
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
        1 <= self.num_processes <= _MOST,
        f"--num_processes is {shown(self.num_processes)}; set it to 1 or more,"
        f" up to {_MOST}.",
    )
    check(
        0 <= self.process_id < self.num_processes,
        f"--process_id is {shown(self.process_id)} of --num_processes"
        f" {self.num_processes}; number them from 0 to"
        f" {self.num_processes - 1}.",
    )

  def _check_address(self) -> None:
    host, _, port = self.method.rpartition(":")
    given = shown(self.method)[1:-1]
    wrong = None
    if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]", host):
      wrong = "is neither auto, slurm, off nor HOST:PORT"
    elif not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
      wrong = f"has the port {shown(port)}, which is none of 1 to 65535"
    check(
        wrong is None,
        f"--distributed={given} {wrong}; give the address of process 0,"
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
  """Yields signs that this process is one of several, and the flag to set."""
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
  """Refuses an environment of several processes that are not connected.

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
  # The runtime of a Cloud TPU pod already knows the other hosts.
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
  """Explains why the processes did not connect in time."""
  address = _STATE.coordinator_address
  if address is None:
    return (
        f"--distributed={spec.method} found no coordinator within"
        f" {spec.timeout} s (--distributed_timeout); see whether process 0 is"
        " started, or use --distributed=HOST:PORT."
    )
  count = spec.num_processes or _STATE.num_processes
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
  """Connects to the other processes; ends this process after the timeout.

  Raises:
    DistributedError: JAX cannot connect.
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
      # One process per node takes all GPUs; JAX would take the first only.
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
  # JAX's own timeout aborts the process with a stack trace (LOG(FATAL) in C++),
  # so this timer ends the process earlier.
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
    reason = one_line(error)
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
  """Connects the processes for the body; all end together, or fail together.

  If the body raises in one process, that process prints its error and exits
  with status 1 (130 after Ctrl-C). Within seconds the other processes do the
  same, with "process 1 on HOST: " before the error.

  Raises:
    ConfigError: --distributed is missing.
    DistributedError: the processes cannot connect.
  """
  if spec.method in ("", "off"):
    if not spec.method:
      _check_alone()
    yield
    return
  lost_process.watch_errors(spec.heartbeat)
  _join(spec)
  watch = FailureWatch()
  try:
    yield
    wait("end")
  except BaseException as error:  # pylint: disable=broad-except
    watch.fail(error)
  watch.close()
