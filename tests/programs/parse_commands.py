"""Parses command lines of the package without running them.

Reads a JSON list of lists of arguments from standard input, each of which
begins with `prefix-distill` or `python -m MODULE`. Prints a JSON list of
{"error": the sentence or traceback, "" if there is none, "reads": the models
that the command would read, without those of the package, and the processes
that it would wait for}.

Each is parsed in a fork, since flags are global, of a process that has read the
libraries once.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from typing import Any

from absl import app
from absl import flags

from prefix_distill import command_line
from prefix_distill import commands

# Most commands import it; so each fork has it.
from prefix_distill.train import setup  # noqa: F401

# Of a step that srun started.
_STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


class _Parsed(BaseException):
  """The command line was accepted; the command would start now."""


def _only_parse(main: Any, argv: Any = None, flags_parser: Any = None) -> None:
  """Takes the place of `app.run`."""
  flags_parser(sys.argv if argv is None else argv)
  if flags.FLAGS.config is None:
    raise _Parsed([])
  config = command_line.config()
  if "topology" in flags.FLAGS or command_line.PRINT_CONFIG.value:
    raise _Parsed([])
  paths = (config.student.path, config.teacher.path)
  read = [x for x in paths if x and not x.startswith("bundled:")]
  raise _Parsed(read + [x for x in [command_line.processes().method] if x])


_parse_args = argparse.ArgumentParser.parse_args


def _parse_args_only(self, args=None, namespace=None):
  _parse_args(self, args, namespace)
  raise _Parsed([])


def _parse(arguments: list[str]) -> dict[str, Any]:
  """Returns what the command says to its arguments."""
  app.run = _only_parse
  argparse.ArgumentParser.parse_args = _parse_args_only
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      if arguments[0] == "prefix-distill":
        commands.main(arguments[1:])
      else:
        sys.argv = [arguments[2], *arguments[3:]]
        runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
  except _Parsed as parsed:
    return {"error": "", "reads": parsed.args[0]}
  except SystemExit as end:
    if end.code not in (0, None):
      return {"error": f"{said.getvalue()}{end}", "reads": []}
  except BaseException:  # Whatever it is, the parent is told.
    return {"error": traceback.format_exc(), "reads": []}
  return {"error": "", "reads": []}


def _in_a_fork(arguments: list[str]) -> dict[str, Any]:
  """Parses in a process of its own."""
  reader, writer = os.pipe()
  sys.stdout.flush()
  child = os.fork()
  if not child:
    if "--distributed=slurm" in arguments:
      os.environ.update(_STEP)
    with os.fdopen(writer, "w") as file:
      json.dump(_parse(arguments), file)
    os._exit(0)
  os.close(writer)
  with os.fdopen(reader) as file:
    text = file.read()
  os.waitpid(child, 0)
  return json.loads(text)


if __name__ == "__main__":
  print(json.dumps([_in_a_fork(given) for given in json.load(sys.stdin)]))
