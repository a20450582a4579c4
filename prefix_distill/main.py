"""Trains a student, or goes on with a run.

  prefix-distill train --config=configs/math.py
  python -m prefix_distill.main --config=configs/math.py

A config file may take an argument, as configs/math.py:tiny-weak does; its
docstring says which. --config.GROUP.FIELD=VALUE changes any setting.
"""

import json
import os
import sys

import rich.console

from prefix_distill import command_line
from prefix_distill import compilation
from prefix_distill import config as config_lib
from prefix_distill import distributed


def _train() -> str:
  """Trains; returns why it stopped before the end, if it did."""
  compilation.keep_programs()
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


def main() -> None:
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
  except KeyboardInterrupt:
    stopped = "Interrupted; the same command goes on from the last checkpoint."
  if stopped:
    print(stopped, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is saved. Another thread may be compiling, which Python's own end
    # would not survive.
    os._exit(130)


def start() -> None:
  """Reads the command line and runs."""
  command_line.run(main, __doc__)


if __name__ == "__main__":
  start()
