"""Asks math-verify in a process of its own, which is ended if it takes long.

math-verify's own time limits are signals, which work in the main thread alone.
This file is also the program of that process, see `worker`.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

from prefix_distill import worker

# Seconds for one question.
LIMIT = 5.0
# Text in which a number below 0.001 may be.
_TINY = re.compile(r"\^|0\.000|\d{4}|!|binom")


class Judge(worker.Worker):
  """Says whether a text has the right answer, in any thread."""

  def __init__(self, limit: float = LIMIT):
    super().__init__(__file__)
    self._limit = limit

  def equal(self, gold: str, found: str) -> bool:
    """Returns whether math-verify finds the right answer in a text.

    Args:
      gold: the right answer, as LaTeX in a box.
      found: the text; what takes longer than the limit is wrong.
    """
    return self.ask({"gold": gold, "found": found}, self._limit) is True


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


def _make() -> Callable[[Any], bool]:
  import logging

  import math_verify

  # It warns when its time limits are off.
  logging.getLogger("math_verify").setLevel(logging.ERROR)

  @functools.lru_cache(4096)
  def parse(text):
    return math_verify.parse(text, parsing_timeout=None)

  return lambda asked: bool(
      _verify(math_verify, parse, asked["gold"], asked["found"])
  )


if __name__ == "__main__":
  worker.serve(_make)
