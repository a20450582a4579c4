"""The settings in words: `--help` and docs/configuration.md are made of these.

  python -m prefix_distill.reference > docs/configuration.md

All of it is read from `config.py`: the docstring of each group, its fields'
types with their limits, and their defaults.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import inspect
import re
import sys
import types
import typing
from typing import Any
from typing import Literal

import annotated_types
import pydantic.fields
import rich.console
import rich.padding
from rich.text import Text

from prefix_distill import config as config_lib

# Limits as large as this are those of int32, which say nothing.
_HUGE = 2**31 - 1
_SIGNS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_PAGE = """# Settings

Every setting of a run, with its type, its default and what it does. A config
file in `configs/` sets them; `--config.NAME=VALUE` on the command line changes
one. Groups of schedules and loss forms that are not in use keep their defaults.

Made by `python -m prefix_distill.reference`; the text is that of
`prefix_distill/config.py`.
"""


@dataclasses.dataclass(frozen=True)
class Setting:
  """One field.

  Attributes:
    name: dotted, from the top.
    kind: its type and limits, in words.
    default: as it is written; "required" if there is none.
    about: what it does.
  """

  name: str
  kind: str
  default: str
  about: str


@dataclasses.dataclass(frozen=True)
class Group:
  """A group of settings.

  Attributes:
    name: dotted; empty for the run's own settings.
    about: what it is.
    settings: its fields, without those that are groups.
  """

  name: str
  about: str
  settings: tuple[Setting, ...]


def groups(cls: type = config_lib.Config, name: str = "") -> Iterator[Group]:
  """Yields all groups, each before the groups in it."""
  text = inspect.cleandoc(cls.__doc__)
  about, _, attributes = text.partition("\nAttributes:\n")
  said = _attributes(attributes)
  hints = typing.get_type_hints(cls, include_extras=True)
  settings, inner = [], []
  for field in dataclasses.fields(cls):
    at = f"{name}.{field.name}" if name else field.name
    kind = _without_none(hints[field.name])
    if dataclasses.is_dataclass(kind):
      inner.append((kind, at))
    elif typing.get_origin(kind) is Mapping:
      inner.append((typing.get_args(kind)[1], f"{at}.NAME"))
    else:
      default = "required"
      if field.default is not dataclasses.MISSING:
        default = repr(field.default)
      words = _kind(hints[field.name])
      settings.append(Setting(at, words, default, said[field.name]))
  yield Group(name, " ".join(about.split("\n\n")[0].split()), tuple(settings))
  for kind, at in inner:
    yield from groups(kind, at)


def _attributes(text: str) -> dict[str, str]:
  """Reads `name: sentence` of a docstring; a verb's subject is the name."""
  found = {}
  for match in re.finditer(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE):
    found[match[1]] = " ".join(match[2].split())
  return found


def _without_none(kind: Any) -> Any:
  """Returns the type of a field that may be None."""
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    return next(a for a in typing.get_args(kind) if a is not type(None))
  return kind


def _kind(kind: Any) -> str:
  """Says a type and its limits, such as "int, at least 1"."""
  if kind != _without_none(kind):
    return f"{_kind(_without_none(kind))}, or None"
  if typing.get_origin(kind) is typing.Annotated:
    inner, *extras = typing.get_args(kind)
    # The innermost limits come first, and the last one of a kind counts.
    limits = dict(pair for extra in extras for pair in _limits(extra))
    return ", ".join([_kind(inner), *filter(None, limits.values())])
  if typing.get_origin(kind) is Literal:
    return "one of " + ", ".join(map(repr, typing.get_args(kind)))
  if typing.get_origin(kind) is tuple:
    return f"list of {_kind(typing.get_args(kind)[0])}"
  return kind.__name__


def _limits(extra: Any) -> Iterator[tuple[str, str]]:
  """Yields what pydantic checks: the kind of limit, and words for it.

  The words are empty if the limit says nothing.
  """
  if isinstance(extra, pydantic.fields.FieldInfo):
    for one in extra.metadata:
      yield from _limits(one)
    return
  for limit, word in _SIGNS.items():
    value = getattr(extra, limit, None)
    if value is not None:
      yield limit, f"{word} {value:g}" if abs(value) < _HUGE else ""
  if isinstance(extra, annotated_types.MinLen):
    yield "length", "not empty"


def page() -> str:
  """Returns docs/configuration.md."""
  parts = [_PAGE]
  for group in groups():
    heading = group.name or "A run"
    parts.append(f"## {heading}\n\n{group.about}\n")
    if not group.settings:
      continue
    rows = [
        f"| `{x.name}` | {_cell(x.kind)} | `{x.default}` | {_cell(x.about)} |"
        for x in group.settings
    ]
    head = "| setting | type | default | what it does |\n|---|---|---|---|"
    parts.append("\n".join([head, *rows]) + "\n")
  return "\n".join(parts)


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


def show(console: rich.console.Console) -> None:
  """Prints every group and field, as `--help` does."""
  for group in groups():
    title = f"--config.{group.name}.*" if group.name else "--config.*"
    console.print()
    console.print(Text(title, style="bold"), Text(group.about))
    for x in group.settings:
      line = Text(f"  --config.{x.name}", style="cyan")
      line.append(f"  {x.kind}; {x.default}", style="dim")
      console.print(line, soft_wrap=True)
      console.print(rich.padding.Padding(Text(x.about), (0, 0, 0, 6)))


def main() -> None:
  sys.stdout.write(page())


if __name__ == "__main__":
  main()
