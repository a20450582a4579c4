"""Runs an experiment: `python -m prefix_distill.main --config=FILE[:ARG]`."""

import pathlib
import re
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from prefix_distill import config as config_lib
from prefix_distill.train import loop

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a file, and an argument after a colon."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run is kept; the same command on it goes on with the run."
    " Default: runs/ and the name of the config.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether this is one of several processes (a pod)."
)


def _default_workdir(argv: list[str]) -> str:
  """Returns runs/math-tiny for --config=configs/math.py:tiny."""
  given = next(
      (b if a.endswith("config") else a.partition("=")[2])
      for a, b in zip(argv, [*argv[1:], ""], strict=True)
      if re.match(r"--?config(=|$)", a)
  )
  file, _, argument = given.partition(":")
  name = f"{pathlib.Path(file).stem}-{argument}"
  return f"runs/{re.sub(r'[^A-Za-z0-9_.]+', '-', name).strip('-')}"


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; one sentence if that fails."""
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is None:
      sys.exit("error: --config is missing; try --config=configs/math.py.")
    _CONFIG.value.to_dict()  # Fails now if the file could not be loaded.
    return rest
  except config_lib.UserError as error:
    sys.exit(f"error: {error}")
  except (flags.Error, OSError) as error:
    sys.exit(f"error: {' '.join(str(error).split())}")
  except (AttributeError, KeyError) as error:
    _explain_override(argv)
    sys.exit(f"error: an override of the config names no field ({error}).")


def _explain_override(argv: list[str]) -> None:
  """Exits with a sentence about the first override that is no field."""
  for argument in argv:
    if argument.startswith("--config."):
      try:
        config_lib.check_field(re.split("[=:]", argument[9:])[0])
      except config_lib.UserError as unknown:
        sys.exit(f"error: {unknown}")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  workdir = _WORKDIR.value or _default_workdir(sys.argv)
  try:
    config = config_lib.from_dict(_CONFIG.value.to_dict())
    loop.train(config, pathlib.Path(workdir))
  except loop.Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(130)
  except config_lib.UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
