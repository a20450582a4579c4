"""The command line: flags, and one sentence for each mistake in them."""

import copy
import math
import pathlib
import re
import sys
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags
import rich.console
import rich.padding
import rich.text

from prefix_distill import config as config_lib
from prefix_distill import distributed
from prefix_distill import reference
from prefix_distill.config import Config
from prefix_distill.errors import check
from prefix_distill.errors import check_path
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
    " runs/ and the name of the config.",
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
  path = pathlib.Path(name)
  if path.suffix not in (".py", ".json"):
    path = path.with_name(f"{path.name}.py")
  places = [pathlib.Path(name), path, *(d / path.name for d in _CONFIGS)]
  if path.parent.name not in ("", "configs"):
    places = places[:2]
  return str(next((p for p in places if p.is_file()), name))


def print_help(about: str) -> None:
  """Prints what a command does, its flags, and every setting."""
  console = rich.console.Console(highlight=False)
  console.print(about.strip(), markup=False)
  console.print("\nFlags", style="bold")
  known = flags.FLAGS.flags_by_module_dict()
  for module, defined in known.items():
    if not module.startswith(("prefix_distill", "__main__")):
      continue
    for flag in defined:
      value = "" if flag.default in (None, "", []) else f" ({flag.default})"
      console.print(f"  --{flag.name}{value}", style="cyan", markup=False)
      console.print(
          rich.padding.Padding(rich.text.Text(flag.help), (0, 0, 0, 6))
      )
  console.print("\nSettings", style="bold")
  reference.show(console)


def parse(argv: list[str], about: str = "") -> list[str]:
  """Parses flags, or exits with one sentence; for `absl.app.run`.

  Args:
    argv: the program's name and its flags.
    about: what `--help` says of the command.
  """
  if any(argument in _HELP for argument in argv[1:]):
    print_help(about)
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
    _CONFIG.value.to_dict()  # Fails if the file could not be loaded.
    return rest
  except UserError as error:
    sys.exit(f"error: {error}")
  except flags.Error as error:
    sys.exit(f"error: {redacted(flag_sentence(error))}")
  except OSError as error:
    reason = redacted(one_line(error))
    sys.exit(f"error: --config: {reason}; give a file that is there.")
  except (MemoryError, RecursionError):  # Thousands of brackets, say.
    name = max(argv, key=len).partition("=")[0]
    sys.exit(
        f"error: {shown(name)[1:-1]} has a value of too many brackets or signs;"
        " write it shorter."
    )


def flag_sentence(error: flags.Error) -> str:
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
    UserError: there is none, or its argument cannot be.
    OSError: there is no such file.
  """
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


def workdir(argv: list[str]) -> pathlib.Path:
  """Returns --workdir, or runs/math-tiny for --config=configs/math.py:tiny."""
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value)
  given = next(
      (b if a.endswith("config") else a.partition("=")[2])
      for a, b in zip(argv, [*argv[1:], ""], strict=True)
      if re.match(r"--?config(=|$)", a)
  )
  file, _, argument = given.partition(":")
  name = f"{pathlib.Path(file).stem}-{argument}"
  return pathlib.Path("runs", re.sub(r"[^\w.]+", "-", name).strip("-"))
