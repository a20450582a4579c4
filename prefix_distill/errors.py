"""What only the user can mend, and the checks that say so."""

from collections.abc import Mapping


class UserError(Exception):
  """Something only the user can mend; its one sentence says what and how."""


class ConfigError(UserError):
  """A setting that cannot work."""


def check(ok: bool, message: str) -> None:
  """Raises ConfigError with the message unless all is well."""
  if not ok:
    raise ConfigError(message)


def at_least(owner: str, values: Mapping[str, float], low: float) -> None:
  """Raises ConfigError if one of the named values is below `low`."""
  for name, value in values.items():
    check(
        value >= low,
        f"{owner}.{name} is {value}, which is below {low}; set it to {low} or"
        " more.",
    )
