"""Errors that only the user can fix."""

from typing import Any

# Characters of a value that a sentence shows, of a library's words, and of a
# path.
_SHOWN, _LINE, _PATH = 200, 600, 1000


class UserError(Exception):
  """A mistake of the user; the message says in one sentence how to fix it."""


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
