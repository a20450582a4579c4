"""Runs a library in a process of its own, which is ended if it takes long.

A time limit by signals works in the main thread alone, and waits for a long
product of whole numbers. A process can be killed from any thread, whatever it
computes. It reads a line of JSON for each question and writes one for each
reply.
"""

import atexit
from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import threading
from typing import Any

# Seconds for the process to start.
_START = 120.0
# Bytes of memory that the process may take; powers of powers want more.
_MEMORY = 4 * 2**30
_ROOT = str(pathlib.Path(__file__).parent.parent)
# Sets of strings have the same order in every process, and the libraries of
# linear algebra reserve no memory for each core.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


class Worker:
  """Asks a program that calls `serve`, from any thread."""

  def __init__(self, program: str):
    """Starts nothing yet.

    Args:
      program: the file of the program.
    """
    self._program = os.path.abspath(program)
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    atexit.register(self.close)

  def ask(self, question: Any, limit: float) -> Any:
    """Returns the reply; None if it failed, was late, or the process ended.

    Args:
      question: what JSON can hold.
      limit: the time for the reply in seconds.
    """
    with self._lock:
      for _ in range(2):
        if self._process is None:
          self._process = self._start()
        try:
          self._write(question)
        except OSError:  # It ended since the last question.
          self._stop()
          continue
        reply = self._read(limit)
        if reply is None:
          self._stop()
          return None
        return json.loads(reply)
    return None

  def close(self) -> None:
    """Ends the process; another question starts it again."""
    with self._lock:
      self._stop()

  def _start(self) -> subprocess.Popen:
    paths = os.pathsep.join([_ROOT, *(path for path in sys.path if path)])
    process = subprocess.Popen(
        [sys.executable, "-P", self._program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | _ENVIRONMENT | {"PYTHONPATH": paths},
        # Ctrl-C is for the run, which ends this process when it ends.
        start_new_session=True,
    )
    self._process = process
    if self._read(_START) is None:
      self._stop()
      raise RuntimeError(f"the process of {self._program} did not start")
    return process

  def _write(self, question: Any) -> None:
    line = json.dumps(question).encode() + b"\n"
    self._process.stdin.write(line)
    self._process.stdin.flush()

  def _read(self, seconds: float) -> str | None:
    """Returns the process's next line; None if it is late or has ended."""
    out = self._process.stdout
    if not select.select([out], [], [], seconds)[0]:
      return None
    line = out.readline()
    return line.decode().strip() if line.endswith(b"\n") else None

  def _stop(self) -> None:
    process, self._process = self._process, None
    if process is None:
      return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
      try:
        stream.close()
      except OSError:  # What was not written is lost with the process.
        pass


def _limit_memory() -> None:
  import resource

  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
  with contextlib.suppress(ValueError):  # Not every system has this limit.
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def serve(make: Callable[[], Callable[[Any], Any]]) -> None:
  """Answers the questions of a `Worker` until there are no more.

  Args:
    make: imports what is needed and returns the function from a question to a
      reply. Where the function raises, the reply is None.
  """
  _limit_memory()
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # Nothing but replies may be printed.
  answer = make()
  print("ready", file=replies, flush=True)
  for line in sys.stdin:
    try:
      reply = json.dumps(answer(json.loads(line)))
    except (Exception, RecursionError, MemoryError):
      reply = "null"
    print(reply, file=replies, flush=True)
