"""Errors that only the user can fix, in one sentence each.

No message may show a secret, so all of them are redacted.

JSON from elsewhere may be damaged, and `read_json` has a reason for whatever is
wrong with it. Python's parser takes more than JSON (NaN, Infinity, 1e999), and
it ends with errors of many kinds: for bytes that are not UTF-8, for integers of
thousands of digits, and for brackets in brackets, which may also fail only
later, when the value is compared or shown.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
import traceback
from typing import Any
from typing import NoReturn

# Characters of a value that a sentence shows, of a library's words, and of a
# path.
_SHOWN, _LINE, _PATH = 200, 600, 1000
# The user and password of a URL; `pathlib` makes one slash of two.
_LOGIN = re.compile(r"(?<=\w:)(//?)[^/\s@'\"]+@")
# A parameter of a URL that gives access; and a token of the hub's.
_PARAMETER = re.compile(
    r"([?&][^=&\s]*(?:token|key|secret|passw|pwd|auth|sig)[^=&\s]*=)"
    r"[^&\s'\")]+",
    re.IGNORECASE,
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Names of environment variables whose values are secret, and not paths.
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|KEY)$", re.IGNORECASE)
_SHORTEST = 8
# Brackets in brackets; and digits of an integer, so that it fits into a float.
_DEEPEST, _DIGITS = 100, 300


def redacted(text: str) -> str:
  """Returns a text without passwords and tokens.

  They are those of URLs (`https://USER:PASSWORD@HOST`, `?token=TOKEN`), tokens
  of the hub, and values of environment variables such as HF_TOKEN.
  """
  text = _LOGIN.sub(r"\1***@", text)
  text = _PARAMETER.sub(r"\1***", text)
  text = _HUB_TOKEN.sub("hf_***", text)
  for name, value in os.environ.items():
    secret = _VARIABLE.search(name) and not value.startswith("/")
    if secret and len(value) >= _SHORTEST:
      text = text.replace(value, "***")
  return text


def hide_secrets() -> None:
  """Lets no traceback that ends the program show a password or a token."""

  def hook(kind: type, error: BaseException, trace: Any) -> None:
    lines = traceback.format_exception(kind, error, trace)
    print(redacted("".join(lines)), end="", file=sys.stderr, flush=True)

  sys.excepthook = hook


class UserError(Exception):
  """A mistake of the user; the message says in one sentence how to fix it."""

  def __init__(self, message: str = ""):
    super().__init__(redacted(message))


class ConfigError(UserError):
  """A setting that cannot work."""


def shown(value: Any) -> str:
  """Returns what a sentence shows of a value: one line, not too long."""
  try:
    text = " ".join(repr(value).splitlines())
  except (ValueError, RecursionError):  # Thousands of digits, or of brackets.
    return f"a value that is too long to be shown ({type(value).__name__})"
  if len(text) > _SHOWN:
    return f"{text[: _SHOWN - 30]}...{text[-20:]}"
  return text


def counted(number: int, noun: str) -> str:
  """Returns a number and what it counts, such as "1 update" or "2 updates"."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException) -> str:
  """Returns what an error says: one line, not too long, without its stop.

  An error that says nothing is named by its kind.
  """
  text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
  text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
  if len(text) > _LINE:
    text = f"{text[: _LINE - 200]}...{text[-150:]}"
  return text


def check(ok: bool, message: str) -> None:
  """Raises ConfigError with the message unless `ok`."""
  if not ok:
    raise ConfigError(message)


def check_path(flag: str, path: str) -> None:
  """Refuses what can be no local path, so that nothing is written elsewhere.

  Raises:
    ConfigError: it is none.
  """
  check(
      path.isprintable() and "://" not in path and len(path) <= _PATH,
      f"--{flag}={shown(path)[1:-1]} is no local path of at most {_PATH}"
      " characters; give one on a file system that is mounted here (a bucket"
      " through gcsfuse or the like).",
  )


class ArgumentParser(argparse.ArgumentParser):
  """The flags of a command; says what is wrong in one sentence, no usage."""

  def __init__(self, command: str, about: str):
    super().__init__(
        prog=f"prefix-distill {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

  def error(self, message: str) -> NoReturn:
    sys.exit(f"error: {one_line(ValueError(message))}; see --help.")


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


def parse_json(text: str | bytes, finite: bool = True) -> Any:
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


def read_json(file: pathlib.Path, finite: bool = True) -> Any:
  """Returns the value of a JSON file; see `parse_json`.

  Raises:
    JsonError: it cannot be read, as a directory, or see `parse_json`.
  """
  try:
    text = file.read_bytes()
  except OSError as error:
    raise JsonError(str(error.strerror)) from error
  return parse_json(text, finite)
