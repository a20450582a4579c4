"""Errors that only the user can fix."""

class UserError(Exception):
  """A mistake of the user; the message says in one sentence how to fix it."""


class ConfigError(UserError):
  """A setting that cannot work."""


def check(ok: bool, message: str) -> None:
  """Raises ConfigError with the message unless `ok`."""
  if not ok:
    raise ConfigError(message)
