"""Trains a student, or goes on with a run.

  prefix-distill train --config=configs/math.py
  python -m prefix_distill.main --config=configs/math.py

A config file may take an argument, as configs/math.py:tiny-weak does; its
docstring says which. --config.GROUP.FIELD=VALUE changes any setting.
"""

import functools
import json
import os
import pathlib
import sys

from absl import app
from absl import logging
import jax
import rich.console

from prefix_distill import command_line
from prefix_distill import config as config_lib
from prefix_distill import distributed
from prefix_distill.errors import hide_secrets
from prefix_distill.errors import UserError


def keep_compiled_programs() -> None:
  """Lets a second start find its programs; JAX's own settings come first."""
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = pathlib.Path(home).expanduser() / "prefix_distill"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _train() -> str:
  """Trains; returns why it stopped before the end, if it did."""
  keep_compiled_programs()
  # `plan` counts on so much of a GPU's memory; JAX alone takes three quarters.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  config = command_line.config()
  traced = command_line.traced(config)
  with distributed.joined(command_line.processes()):
    # Takes seconds, which what is wrong so far need not wait for.
    from prefix_distill.train import loop

    try:
      loop.train(
          config,
          command_line.workdir(sys.argv),
          traced,
          command_line.NOTICE.value,
          command_line.TRACKER.value,
      )
    except loop.Stopped as stopped:  # All processes stop together.
      return str(stopped)
  return ""


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  hide_secrets()
  stopped = ""
  try:
    if command_line.PRINT_CONFIG.value:
      settings = config_lib.plain(command_line.config())
      print(json.dumps(settings, indent=2))
    elif command_line.PREFLIGHT.value:
      config = command_line.config()
      from prefix_distill import preflight

      preflight.run(config, rich.console.Console())
    else:
      stopped = _train()
  except UserError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    stopped = (
        "Interrupted; the same command goes on from the last checkpoint."
    )
  if stopped:
    print(stopped, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is saved. Another thread may be compiling, which Python's own end
    # would not survive.
    os._exit(130)


def start() -> None:
  """Reads the command line and runs."""
  parse = functools.partial(command_line.parse, about=__doc__)
  app.run(main, flags_parser=parse)


if __name__ == "__main__":
  start()
