"""The main job, which notes the phase that it is in: phases.py FILE FLAGS.

Each line of the file is a time on `time.monotonic`'s clock and the phase that
begins then.
"""

import functools
import os
import runpy
import sys
import time

_FILE = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def _note(phase: str) -> None:
  os.write(_FILE, f"{time.monotonic()} {phase}\n".encode())


def _noted(phase: str, function):
  @functools.wraps(function)
  def wrapper(*args, **kwargs):
    _note(phase)
    try:
      return function(*args, **kwargs)
    finally:
      _note("between")

  return wrapper


_note("loading")
# Imported now, after the first line, since that takes most of the loading.
from prefix_distill.evaluate import evaluator  # noqa: E402
from prefix_distill.models import huggingface  # noqa: E402
from prefix_distill.report import page  # noqa: E402
from prefix_distill.train import checkpoint  # noqa: E402
from prefix_distill.train import loop  # noqa: E402
from prefix_distill.train import update  # noqa: E402

_PHASES = {"sample": "sampling", "score": "scoring", "update": "update"}


class _Clock(update.Clock):

  @property
  def current(self) -> str:
    return self._current

  @current.setter
  def current(self, name: str) -> None:
    self._current = name
    _note(_PHASES.get(name, "between"))


update.Clock = _Clock
evaluator.evaluate = _noted("evaluation", evaluator.evaluate)
huggingface.export = _noted("export", huggingface.export)
page.write = _noted("report", page.write)
checkpoint.Checkpointer.save = _noted("saving", checkpoint.Checkpointer.save)
loop.Run.__init__ = _noted("loading", loop.Run.__init__)

sys.argv[:] = ["prefix_distill/main.py", *sys.argv[2:]]
runpy.run_module("prefix_distill.main", run_name="__main__")
