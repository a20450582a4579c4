"""Ctrl-C and preemptions, turned into a wish to stop."""

from collections.abc import Iterator
import contextlib
import signal
import sys
from typing import Any


class Stop:
  """Turns Ctrl-C or a preemption into a wish to stop after the update."""

  wanted = False

  def ask(self, *_: Any) -> None:
    self.wanted = True
    if not _ignored(signal.SIGINT):
      # A second Ctrl-C does not wait.
      signal.signal(signal.SIGINT, signal.default_int_handler)
    print("\nStopping after this update ...", file=sys.stderr, flush=True)


def _ignored(number: signal.Signals) -> bool:
  return signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
  """Waits for Ctrl-C and SIGTERM.

  A run that was started with SIGINT ignored, as a script's background job is,
  is not stopped by a Ctrl-C that is meant for another program.
  """
  stop, numbers = Stop(), [signal.SIGTERM]
  if not _ignored(signal.SIGINT):
    numbers.append(signal.SIGINT)
  try:
    before = [signal.signal(number, stop.ask) for number in numbers]
  except ValueError:  # Not the main thread, as in some notebooks.
    yield stop
    return
  try:
    yield stop
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)
