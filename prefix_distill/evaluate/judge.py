"""Asks math-verify in a process of its own, which is ended if it takes long.

math-verify's own time limits are signals, which work in the main thread alone
and wait for a long product of whole numbers. A process can be killed from any
thread, whatever it computes.

This file is also the program of that process: it reads a JSON line for each
question and writes one for each verdict. So it imports nothing of the package.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
from typing import Any

# Seconds for one question, and for the process to start.
LIMIT = 5.0
_START = 120.0
# Bytes of memory that the process may take; powers of powers want more.
_MEMORY = 4 * 2**30
# Text in which a number below 0.001 may be.
_TINY = re.compile(r"\^|0\.000")


class Judge:
  """Says whether a text has the right answer, in any thread."""

  def __init__(self, limit: float = LIMIT):
    self._limit = limit
    self._lock = threading.Lock()
    self._process: subprocess.Popen | None = None
    atexit.register(self.close)

  def equal(self, gold: str, found: str) -> bool:
    """Returns whether math-verify finds the right answer in a text.

    Args:
      gold: the right answer, as LaTeX in a box.
      found: the text; what takes longer than the limit is wrong.
    """
    with self._lock:
      for _ in range(2):
        if self._process is None:
          self._process = self._start()
        try:
          self._write({"gold": gold, "found": found})
        except OSError:  # It ended since the last question.
          self._stop()
          continue
        answer = self._read(self._limit)
        if answer is None:
          self._stop()
        return answer == "1"
    return False

  def close(self) -> None:
    """Ends the process; another question starts it again."""
    with self._lock:
      self._stop()

  def _start(self) -> subprocess.Popen:
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-P", os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": paths},
        # Ctrl-C is for the run, which ends this process when it ends.
        start_new_session=True,
    )
    self._process = process
    if self._read(_START) is None:
      self._stop()
      raise RuntimeError("the process that runs math-verify did not start")
    return process

  def _write(self, question: dict[str, Any]) -> None:
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


def digits(size: float) -> int:
  """Returns how many decimals of a number count: 6, or more if it is tiny."""
  places = 6
  while 0 < size < 1e-3 and places < 400:
    size, places = size * 10, places + 1
  return places


def _leaves(expression: Any) -> list[float]:
  """Returns the sizes of the numbers that an expression is made of."""
  if getattr(expression, "is_number", False):
    try:
      return [abs(complex(expression.evalf()))]
    except (OverflowError, TypeError, ValueError):
      return []
  inner = getattr(expression, "args", ())
  return sorted(size for part in inner for size in _leaves(part))


def _same_size(gold: Any, given: Any) -> bool:
  """Whether tiny numbers are alike, all of which math-verify takes for 0."""
  sizes = _leaves(gold), _leaves(given)
  if len(sizes[0]) != len(sizes[1]):
    return True
  for one, other in zip(*sizes, strict=True):
    places = digits(max(one, other))
    if places > 6 and round(one, places) != round(other, places):
      return False
  return True


def _verify(math_verify: Any, parse: Any, gold: str, found: str) -> bool:
  right = parse(gold)
  given = math_verify.parse(found, parsing_timeout=None)
  if not math_verify.verify(right, given, timeout_seconds=None):
    return False
  if not (_TINY.search(gold) or _TINY.search(found)):
    return True
  return not right or not given or _same_size(right[0], given[0])


def _main() -> None:
  import logging
  import resource

  import math_verify

  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  soft = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
  with contextlib.suppress(ValueError):  # Not every system has this limit.
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  # It warns when its time limits are off.
  logging.getLogger("math_verify").setLevel(logging.ERROR)

  @functools.lru_cache(4096)
  def parse(text):
    return math_verify.parse(text, parsing_timeout=None)

  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # Nothing but verdicts may be printed.
  print("ready", file=replies, flush=True)
  for line in sys.stdin:
    question = json.loads(line)
    try:
      right = _verify(math_verify, parse, question["gold"], question["found"])
    except (Exception, RecursionError, MemoryError):
      right = False
    print(int(bool(right)), file=replies, flush=True)


if __name__ == "__main__":
  _main()
