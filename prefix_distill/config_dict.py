"""Nested plain values, as a ConfigDict or JSON has them, to settings and back.

A ConfigDict from the command line ends here; behind it are the frozen
dataclasses of `config`.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import types
import typing
from typing import Any

from prefix_distill import errors
from prefix_distill.config import Config


def _convert(value: Any, kind: Any, name: str) -> Any:
  """Turns a plain value into a field's type, or raises ConfigError."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    return _convert(value, next(a for a in args if a is not type(None)), name)
  if dataclasses.is_dataclass(kind):
    errors.check(
        isinstance(value, Mapping),
        f"{name} is {value!r}, but it is a group of fields; set its fields.",
    )
    return _build(kind, value, name + ".")
  if origin is tuple:
    errors.check(
        isinstance(value, (list, tuple)),
        f"{name} is {value!r}; give a list of {args[0].__name__}s.",
    )
    return tuple(_convert(v, args[0], name) for v in value)
  if origin is not None:  # A mapping of names.
    errors.check(
        isinstance(value, Mapping),
        f"{name} is {value!r}, but it is a group of names; set NAME.FIELD.",
    )
    return {
        k: _convert(v, args[1], f"{name}.{k}") for k, v in value.items()
    }
  right_type = isinstance(value, kind)
  if isinstance(value, bool):  # Which Python takes for an int.
    right_type = kind is bool
  elif kind is float and isinstance(value, int):
    value, right_type = float(value), True
  errors.check(
      right_type,
      f"{name} is {value!r}, a {type(value).__name__}; give a"
      f" {kind.__name__}.",
  )
  return value


def _check_known(cls: type, name: str, prefix: str) -> None:
  hints = typing.get_type_hints(cls)
  if name in hints:
    return
  close = difflib.get_close_matches(name, hints, 1)
  mend = f"the fields here are {', '.join(hints)}."
  if close:
    mend = f"did you mean {prefix}{close[0]}?"
  raise errors.ConfigError(f"{prefix}{name} is not a field; {mend}")


def check_field(name: str) -> None:
  """Raises ConfigError if a dotted name, "data.batch_size", is no field."""
  cls: Any = Config
  prefix = ""
  for part in name.split("."):
    if dataclasses.is_dataclass(cls):
      _check_known(cls, part, prefix)
      cls = typing.get_type_hints(cls)[part]
    elif typing.get_origin(cls) not in (None, tuple):
      cls = typing.get_args(cls)[1]  # A mapping of names.
    else:
      raise errors.ConfigError(
          f"{prefix}{part} is not a field; {prefix[:-1]} is one."
      )
    if typing.get_origin(cls) is types.UnionType:
      cls = next(a for a in typing.get_args(cls) if a is not type(None))
    prefix += part + "."


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    _check_known(cls, name, prefix)
  for field in dataclasses.fields(cls):
    required = (
        field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    if required and field.name not in values:
      raise errors.ConfigError(f"{prefix}{field.name} is missing; set it.")
  return cls(**{
      name: _convert(value, hints[name], prefix + name)
      for name, value in values.items()
  })


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds and validates a run's settings from nested plain values.

  Raises:
    ConfigError: an unknown or missing field, a wrong type, or values that do
      not work together.
  """
  return _build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the settings as nested plain values; `from_dict` inverts it."""
  return dataclasses.asdict(config)
