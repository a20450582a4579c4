"""Reads JSON that may be damaged; whatever is wrong with it has a reason.

Python's parser takes more than JSON (NaN, Infinity, 1e999), and it ends with
errors of many kinds: for bytes that are not UTF-8, for integers of thousands of
digits, and for brackets in brackets, which may also fail only later, when the
value is compared or shown.
"""

import json
import math
import pathlib
from typing import Any
from typing import NoReturn

# Brackets in brackets; and digits of an integer, so that it fits into a float.
_DEEPEST, _DIGITS = 100, 300


class JsonError(ValueError):
  """A text that is no JSON; the message is the reason, without a stop."""


def _constant(name: str) -> NoReturn:
  raise JsonError(f"it has {name}, which is no number of JSON's")


def _float(digits: str) -> float:
  found = float(digits)
  if not math.isfinite(found):
    raise JsonError("it has a number that is too large")
  return found


def _int(digits: str) -> int:
  if len(digits) > _DIGITS:
    raise JsonError(f"it has a number of {len(digits)} digits")
  return int(digits)


def _check_depth(value: Any) -> None:
  """Raises JsonError if lists and objects are nested too deep."""
  level, depth = [value], 0
  while level := [
      inner
      for outer in level
      if isinstance(outer, (dict, list))
      for inner in (outer.values() if isinstance(outer, dict) else outer)
  ]:
    depth += 1
    if depth > _DEEPEST:
      raise JsonError("it has brackets in brackets, too deep to read")


_FINITE = {
    "parse_constant": _constant,
    "parse_float": _float,
    "parse_int": _int,
}


def parse(text: str | bytes, finite: bool = True) -> Any:
  """Returns the value of a JSON text; bytes are UTF-8.

  Args:
    text: the whole of it.
    finite: whether to refuse numbers that are not finite, or have more than 300
      digits. Other people's records may have them in fields that nobody reads.

  Raises:
    JsonError: it is none, has such numbers, or more than 100 brackets in
      brackets.
  """
  try:
    if isinstance(text, bytes):
      text = text.decode()
    found = json.loads(text, **(_FINITE if finite else {}))
    _check_depth(found)
  except JsonError:
    raise
  except UnicodeDecodeError as error:
    raise JsonError(f"it is not UTF-8: {error.reason}") from error
  except json.JSONDecodeError as error:
    raise JsonError(error.msg) from error
  except RecursionError as error:
    raise JsonError("it has brackets in brackets, too deep to read") from error
  except ValueError as error:  # An integer of thousands of digits.
    raise JsonError("it has a number of too many digits") from error
  return found


def read(file: pathlib.Path, finite: bool = True) -> Any:
  """Returns the value of a JSON file; see `parse`.

  Raises:
    JsonError: it cannot be read, as a directory, or see `parse`.
  """
  try:
    text = file.read_bytes()
  except OSError as error:
    raise JsonError(str(error.strerror)) from error
  return parse(text, finite)
