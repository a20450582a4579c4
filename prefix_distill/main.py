"""Runs an experiment: `python -m prefix_distill.main --config=FILE[:ARG]`."""

import sys

from absl import app
from absl import logging
import jax

from prefix_distill import command_line
from prefix_distill.errors import UserError
from prefix_distill.train import loop


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  if command_line.DISTRIBUTED.value:
    jax.distributed.initialize()
  try:
    loop.train(command_line.config(), command_line.workdir(sys.argv))
  except UserError as error:
    sys.exit(f"error: {error}")
  except (loop.Stopped, KeyboardInterrupt) as stopped:
    print(
        str(stopped)
        or "Interrupted; the same command goes on from the last checkpoint.",
        file=sys.stderr,
    )
    sys.exit(130)


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
