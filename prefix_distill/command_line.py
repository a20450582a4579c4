"""The command line: flags, one sentence for each mistake in them, and --help.

  python -m prefix_distill.command_line > docs/configuration.md

`--help` and docs/configuration.md describe the settings. All of that is read
from `config.py`: the docstring of each group, its fields' types with their
limits, and their defaults.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import math
import os
import pathlib
import re
import sys
import types
import typing
from typing import Any
from typing import Literal

from absl import app
from absl import flags
from absl import logging
import annotated_types
import ml_collections
from ml_collections import config_flags
import pydantic.fields
import rich.console
import rich.padding
from rich.text import Text

from prefix_distill import config as config_lib
from prefix_distill import distributed
from prefix_distill.config import Config
from prefix_distill.errors import check
from prefix_distill.errors import check_path
from prefix_distill.errors import hide_secrets
from prefix_distill.errors import JsonError
from prefix_distill.errors import one_line
from prefix_distill.errors import read_json
from prefix_distill.errors import redacted
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.report import trackers

# The longest notice before a process ends, in seconds: a day.
_DAY = 86_400
# Where an installed package and a clone have the config files.
_CONFIGS = (
    pathlib.Path(__file__).parent / "configs",
    pathlib.Path(__file__).parents[1] / "configs",
)
# Characters of a config's argument that a run's directory is named after.
_LONG_ARGUMENT = 48
# Limits as large as this are those of int32, which say nothing.
_HUGE = 2**31 - 1
_SIGNS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_PAGE = """# Settings

Every setting of a run, with its type, its default and what it does. A config
file in `configs/` sets them; `--config.NAME=VALUE` on the command line changes
one. Groups of schedules and loss forms that are not in use keep their defaults.

Made by `python -m prefix_distill.command_line`; the text is that of
`prefix_distill/config.py`.
"""
_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort", "-?")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment: a file, and an argument after a colon. A name without a"
    " file, such as math:tiny-weak, is that of a config that ships with the"
    " package; a run's config.json is a config as well.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The run's directory; the same command continues the run in it. Default:"
    " runs/ and the name of the config; of a long argument, its student and a"
    " hash.",
)
PREFLIGHT = flags.DEFINE_bool(
    "preflight",
    False,
    "Whether to only check and show what the models would read: the run reads"
    " no weights and writes nothing.",
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config",
    False,
    "Whether to only print all settings as JSON, a file of which is a config.",
)
NOTICE = flags.DEFINE_float(
    "notice",
    30.0,
    "Seconds between a SIGTERM and the end of the process, as whoever sends the"
    " signal promises. An update that would not end in that time is given up,"
    " and the state before it is saved.",
)
TRACKER = flags.DEFINE_string(
    "tracker",
    "auto",
    "Where the run is shown besides metrics.jsonl: tensorboard, wandb, mlflow"
    " or none; auto takes tensorboard if tensorboardX is installed.",
)
_TRACE = flags.DEFINE_list(
    "trace",
    [],
    "Updates, counted from 1, whose traces go to WORKDIR/trace for xprof and"
    " Perfetto, such as --trace=3,4. The first updates compile; later updates"
    " show the steady state.",
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "",
    "How this process finds the other processes of its run: auto (a TPU pod's"
    " metadata, or another cluster that JAX detects), slurm, or HOST:PORT of"
    " process 0. Default: the run has one process, and the environment must"
    " agree; off: the run has one process in any environment.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "With --distributed=HOST:PORT, the number of processes.",
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "With --distributed=HOST:PORT, this process's number, from 0.",
)
_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "Seconds until all processes must be connected."
)
_HEARTBEAT = flags.DEFINE_integer(
    "distributed_heartbeat",
    100,
    "Seconds after which a silent process counts as dead, and the others end.",
)


def config_file(name: str) -> str:
  """Returns the file of a config that is there, or that ships, by its name."""
  name = os.path.expanduser(name)
  path = pathlib.Path(name)
  if path.suffix not in (".py", ".json"):
    path = path.with_name(f"{path.name}.py")
  places = [pathlib.Path(name), path, *(d / path.name for d in _CONFIGS)]
  if path.parent.name not in ("", "configs"):
    places = places[:2]
  return str(next((p for p in places if p.is_file()), name))


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


def settings_page() -> str:
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


def _show_settings(console: rich.console.Console) -> None:
  """Prints every group and field."""
  for group in groups():
    title = f"--config.{group.name}.*" if group.name else "--config.*"
    console.print()
    console.print(Text(title, style="bold"), Text(group.about))
    for x in group.settings:
      line = Text(f"  --config.{x.name}", style="cyan")
      line.append(f"  {x.kind}; {x.default}", style="dim")
      console.print(line, soft_wrap=True)
      console.print(rich.padding.Padding(Text(x.about), (0, 0, 0, 6)))


def _print_help(about: str) -> None:
  """Prints what a command does, its flags, and every setting."""
  console = rich.console.Console(highlight=False)
  console.print(about.strip(), markup=False)
  console.print("\nFlags", style="bold")
  known = flags.FLAGS.flags_by_module_dict()
  # By `python -m`, absl calls the command's own module as the program.
  ours = ("prefix_distill", "__main__", sys.argv[0])
  for module, defined in known.items():
    if not module.startswith(ours):
      continue
    for flag in defined:
      value = "" if flag.default in (None, "", []) else f" ({flag.default})"
      console.print(f"  --{flag.name}{value}", style="cyan", markup=False)
      console.print(rich.padding.Padding(Text(flag.help), (0, 0, 0, 6)))
  console.print("\nSettings", style="bold")
  _show_settings(console)


def run(main: Callable[[], None], about: str) -> None:
  """Starts a command: reads the command line, and calls what the command does.

  A mistake of the user ends the process with one sentence.

  Args:
    main: the command; it reads the flags from here.
    about: what `--help` says of the command.
  """

  def started(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    hide_secrets()
    try:
      main()
    except UserError as error:
      sys.exit(f"error: {error}")

  app.run(started, flags_parser=functools.partial(parse, about=about))


def asks_help(argv: list[str]) -> bool:
  """Whether a command line asks what the command does."""
  return any(argument in _HELP for argument in argv[1:])


def parse(argv: list[str], about: str = "") -> list[str]:
  """Parses flags, or exits with one sentence.

  Args:
    argv: the program's name and its flags.
    about: what `--help` says of the command.
  """
  if asks_help(argv):
    _print_help(about)
    sys.exit(0)
  try:
    given = _overrides(argv)
    for name in given:
      _check_name(name)
    rest = flags.FLAGS(argv)
    check(
        len(rest) == 1,
        f"{shown(rest[-1])} is no flag; leave it out, or begin it with --.",
    )
    processes()
    _check_flags()
    if _CONFIG.value is None:
      sys.exit("error: --config is missing; try --config=configs/math.py.")
    if named := _named_config(argv):
      _check_file(named)
    _CONFIG.value.to_dict()  # Fails if the file could not be loaded.
    return rest
  except UserError as error:
    sys.exit(f"error: {error}")
  except flags.Error as error:
    sys.exit(f"error: {redacted(_flag_sentence(error))}")
  except OSError as error:
    reason = redacted(one_line(error))
    sys.exit(f"error: --config: {reason}; give a file that is there.")
  except (MemoryError, RecursionError):  # Thousands of brackets, say.
    name = max(argv, key=len).partition("=")[0]
    sys.exit(
        f"error: {shown(name)[1:-1]} has a value of too many brackets or signs;"
        " write it shorter."
    )


def _flag_sentence(error: flags.Error) -> str:
  """Says what absl refuses, and what the flag takes."""
  text = one_line(error)
  if text.endswith("?"):
    return text
  found = re.match(r"flag --([\w.]+)=", text)
  if not found or found[1] not in flags.FLAGS:
    return f"{text}; --help lists the flags."
  if "as a ConfigDict" in text:
    return f"--{found[1]} is a group of fields; set --{found[1]}.FIELD=VALUE."
  kind = flags.FLAGS[found[1]].flag_type()
  return f"{text}; give {'an' if kind[0] in 'aeiou' else 'a'} {kind}."


def _check_name(name: str) -> None:
  """Refuses what is no dotted name of a field.

  Raises:
    ConfigError: it is none.
  """
  taken = ml_collections.ConfigDict  # Its methods are no names.
  check(
      all(p.isidentifier() and not hasattr(taken, p) for p in name.split(".")),
      f"--config.{shown(name)[1:-1]} is not a field; give dotted names, such as"
      " --config.data.batch_size (for other names of evaluation sets, and for"
      " one value of a list, edit the file).",
  )
  config_lib.check_field(name)


def _check_flags() -> None:
  """Checks the flags that no other function reads.

  Raises:
    ConfigError: a value that cannot work.
  """
  notice = NOTICE.value
  check(
      math.isfinite(notice) and 0 <= notice <= _DAY,
      f"--notice={notice:g} is no number of seconds from 0 to {_DAY}; set it to"
      " what whoever sends the signal promises.",
  )
  check_path("workdir", _WORKDIR.value or "")
  trackers.check(TRACKER.value)


def _overrides(argv: list[str]) -> list[str]:
  """Returns the dotted names of the fields that flags set."""
  matches = (re.match(r"--?config\.([^=]*)", argument) for argument in argv)
  return [match[1] for match in matches if match]


def _with_types(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
  """Gives those of the named fields that are None a type, to be set by flags.

  Only texts are None in a config that is read from a file.
  """
  typed = copy.deepcopy(values)
  found = False
  for name in names:
    at, (*groups, last) = typed, name.split(".")
    for group in groups:
      at = at[group]
    if at[last] is None:
      at[last], found = ml_collections.config_dict.placeholder(str), True
  return typed if found else values


def _tuples(value: Any) -> Any:
  """Makes tuples of lists, whose values flags can then set."""
  if isinstance(value, dict):
    return {name: _tuples(inner) for name, inner in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_json(file: str) -> ml_collections.ConfigDict | None:
  """Reads a run's `config.json`; None for a config of another kind.

  Raises:
    ConfigError: it holds no settings.
  """
  if not file.endswith(".json"):
    return None
  try:
    values = read_json(pathlib.Path(file))
    reason = ""
    if not isinstance(values, dict) or "method" not in values:
      reason = "it has no field 'method'"
  except JsonError as error:
    reason = str(error)
  check(
      not reason,
      f"--config={file} holds no settings of a run ({reason}); give a config"
      " file, or the config.json of a run's directory.",
  )
  return ml_collections.ConfigDict(_tuples(values))


def _check_file(name: str) -> None:
  """Refuses a config that is neither here nor ships with the package.

  Raises:
    ConfigError: it is not there.
  """
  file = config_file(name.partition(":")[0])
  ships = {p.stem for directory in _CONFIGS for p in directory.glob("*.py")}
  near = difflib.get_close_matches(pathlib.Path(file).stem, ships, 1)
  mend = f"did you mean {near[0]}?" if near else "correct the path."
  check(
      pathlib.Path(file).is_file(),
      f"--config={shown(file)[1:-1]} is no file here, and the configs that ship"
      f" are {', '.join(sorted(ships - {'__init__'}))}; {mend}",
  )


class _ConfigParser(flags.ArgumentParser):
  """Reads a config file, and adds the new groups that flags name.

  So a flag can set `evaluation.sets.mine.source` in a file without that set.
  """

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, path: str) -> Any:
    file, colon, argument = path.partition(":")
    file = config_file(file)
    config = _read_json(file)
    if config is None:
      config = self._parser.parse(file + colon + argument)
    if not isinstance(config, ml_collections.ConfigDict):
      return config  # Its first use raises the error.
    values = plain = config.to_dict()
    names = _overrides(sys.argv)
    for name in names:
      values = config_lib.with_new_groups(values, name)
    typed = _with_types(values, names)
    if values == plain and typed is values:
      return config
    return ml_collections.ConfigDict(typed).lock()

  def flag_type(self) -> str:
    return self._parser.flag_type()


_FLAG = flags.FLAGS["config"]
_FLAG.parser = _ConfigParser(_FLAG.parser)


def load(name: str) -> ml_collections.ConfigDict:
  """Returns a config as --config names it, for notebooks: "math:tiny-weak".

  `config.from_dict(settings.to_dict())` makes a run's settings of it.

  Raises:
    UserError: there is no such config, or its argument cannot be.
  """
  _check_file(name)
  found = _FLAG.parser.parse(name)
  found.to_dict()  # Raises what went wrong.
  return found


def processes() -> distributed.Spec:
  """Returns how this process finds the other processes.

  Raises:
    ConfigError: the flags contradict each other.
  """
  return distributed.Spec(
      _DISTRIBUTED.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      _TIMEOUT.value,
      _HEARTBEAT.value,
  )


def traced(config: Config) -> frozenset[int]:
  """Returns the updates to trace, counted from 1.

  Raises:
    ConfigError: --trace has something else than updates of the run.
  """
  for text in _TRACE.value:
    # At most as many digits as a number of updates has.
    known = re.fullmatch("0*[1-9][0-9]{0,9}", text)
    check(
        known is not None and int(text) <= config.steps,
        f"--trace={shown(','.join(_TRACE.value))[1:-1]} names {shown(text)},"
        f" but the run's updates are 1 to {config.steps}; give some of those.",
    )
  return frozenset(map(int, _TRACE.value))


def config() -> Config:
  """Returns the settings; no ConfigDict goes further than this.

  Raises:
    ConfigError: the settings contradict each other.
  """
  values = _CONFIG.value.to_dict()
  given = _overrides(sys.argv)
  return config_lib.from_dict(config_lib.without_idle_groups(values, given))


def _named_config(argv: list[str]) -> str:
  """Returns what a command line gives as --config; of several the last."""
  given = [
      (b if a.endswith("config") else a.partition("=")[2])
      for a, b in zip(argv, [*argv[1:], ""], strict=True)
      if re.match(r"--?config(=|$)", a)
  ]
  return given[-1] if given else ""  # It may stand in a --flagfile.


def workdir(argv: list[str]) -> pathlib.Path:
  """Returns --workdir, or runs/math-tiny for --config=configs/math.py:tiny.

  A long argument is named by its student and a hash of all of it, so that two
  of them have two directories.
  """
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value).expanduser()
  file, _, argument = _named_config(argv).partition(":")
  if len(argument) > _LONG_ARGUMENT:
    digest = hashlib.sha256(argument.encode()).hexdigest()[:8]
    student = re.search(r"(?:^|,)student=([^,]*)", argument)
    about = re.split("[/:]", student[1].rstrip("/"))[-1] if student else ""
    argument = f"{(about or argument)[:_LONG_ARGUMENT]}-{digest}"
  name = f"{pathlib.Path(file).stem}-{argument}"
  return pathlib.Path("runs", re.sub(r"[^\w.]+", "-", name).strip("-"))


if __name__ == "__main__":
  sys.stdout.write(settings_page())
