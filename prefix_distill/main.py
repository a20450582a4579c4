"""Runs an experiment: `python -m prefix_distill.main --config=FILE[:ARG]`."""

import os
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
    " Default: runs/ and the config's name and argument.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether this is one of several processes (a pod)."
)


def _default_workdir() -> str:
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  argument = sys.argv
  text = next(
      (a.partition("=")[2] for a in argument if a.startswith("--config=")),
      name,
  )
  stem, _, rest = text.partition(":")
  slug = re.sub(r"[^\w.]+", "-", f"{pathlib.Path(stem).stem}-{rest}")
  return os.path.join("runs", slug.strip("-"))


def _use_compilation_cache() -> None:
  """Keeps compiled programs, so that a second start is quick."""
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    jax.config.update(
        "jax_compilation_cache_dir", os.path.join(home, "prefix_distill")
    )


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  _use_compilation_cache()
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  try:
    config = config_lib.from_dict(_CONFIG.value.to_dict())
    loop.train(config, pathlib.Path(_WORKDIR.value or _default_workdir()))
  except loop.Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(130)
  except config_lib.UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
