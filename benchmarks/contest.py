"""Contestants in processes of their own, that take turns.

A contestant is a script of `benchmarks/contestants`. It gets the model's
directory, loads it, and then answers each line of JSON that it reads with one.
Each may have an interpreter of its own, since not all packages live together.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

_SCRIPTS = pathlib.Path(__file__).parent / "contestants"
_MARK = "#answer "


class Contestant:
  """A process that holds a model."""

  def __init__(self, name: str, python: str, *args: str):
    self.name = name
    root = pathlib.Path(__file__).parent.parent
    paths = [str(root), str(root / "benchmarks")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    # No pipe: nobody reads it while an answer is awaited.
    self._errors = tempfile.TemporaryFile("w+")
    self._process = subprocess.Popen(
        [python, str(_SCRIPTS / f"{name}.py"), *args],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._errors,
        text=True,
    )

  def ask(self, **question: Any) -> dict[str, Any]:
    """Sends a question and waits for the answer.

    Raises:
      RuntimeError: the contestant ended; with the end of what it said.
    """
    try:
      self._process.stdin.write(json.dumps(question) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass
    for line in self._process.stdout:
      if line.startswith(_MARK):
        return json.loads(line.removeprefix(_MARK))
    self._process.wait()
    self._errors.seek(0)
    error = self._errors.read().strip().splitlines()
    raise RuntimeError(error[-1] if error else "it ended without a word")

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    self._errors.close()


def serve(answer: Callable[..., Any]) -> None:
  """Answers questions until there are no more; for a contestant's script.

  Args:
    answer: does the work; called once more than is timed, to warm up.
  """
  seen = set()
  for line in sys.stdin:
    if line not in seen:
      answer(**json.loads(line))
      seen.add(line)
    start = time.perf_counter()
    extra = answer(**json.loads(line)) or {}
    seconds = time.perf_counter() - start
    print(_MARK + json.dumps({"seconds": seconds} | extra), flush=True)


def start(
    names: Sequence[str], pythons: Mapping[str, str], *args: str
) -> list[Contestant]:
  """Starts contestants, each with its interpreter or with this one."""
  return [
      Contestant(name, pythons.get(name, sys.executable), *args)
      for name in names
  ]


def take_turns(
    contestants: list[Contestant], repeats: int, **question: Any
) -> dict[str, float]:
  """Asks everybody in turn; returns the median seconds of each.

  A contestant that cannot answer is taken off the list, with a word on why.
  """
  seconds = {contestant.name: [] for contestant in contestants}
  for _ in range(repeats):
    for contestant in list(contestants):
      try:
        answer = contestant.ask(**question)
      except RuntimeError as error:
        print(f"{contestant.name} is left out: {error}", file=sys.stderr)
        contestants.remove(contestant)
        continue
      seconds[contestant.name].append(answer["seconds"])
  return {n: statistics.median(s) for n, s in seconds.items() if s}
