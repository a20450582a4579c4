"""Many processes, one run: what they tell one another, and how they end.

JAX's coordination service holds a few strings that all processes can read.
Whatever one process cannot do, it tells the others there, and they end with its
sentence instead of waiting for it in a collective; a process that is killed is
missed by JAX's heartbeats. In a run of one process nothing here does anything.

The service's client has no public name (`multihost_utils` offers collectives
alone, which carry no text and have no time limit), so it is taken from
`jax._src.distributed`, as Orbax takes it.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any
from typing import NoReturn

import jax
from jax._src import distributed as jax_distributed

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
