"""Writes a checkpoint as a Hugging Face model directory.

  python -m prefix_distill.export --workdir=runs/math --step=20 --to=DIR

`--step` is a number, `last`, or `best` for the one that `checkpoint.best`
chooses. Only the student's weights are read, into the host's memory: no
accelerator is used, so that the run may go on beside it.
"""

import pathlib
import re
import sys

from absl import app
from absl import flags
from absl import logging
import jax

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import MeshSpec
from prefix_distill.errors import check
from prefix_distill.errors import check_path
from prefix_distill.errors import one_line
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.train import checkpoint
from prefix_distill.train import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")
_STEP = flags.DEFINE_string(
    "step", "last", "The checkpoint's update: a number, last or best."
)
_TO = flags.DEFINE_string("to", None, "The new model directory.")


def parse(argv: list[str]) -> list[str]:
  """Parses flags, or exits with one sentence; for `absl.app.run`."""
  try:
    rest = flags.FLAGS(argv)
    for flag in (_WORKDIR, _TO):
      check(bool(flag.value), f"--{flag.name} is missing; set it.")
      check_path(flag.name, flag.value)
    check(
        re.fullmatch("last|best|[0-9]{1,10}", _STEP.value) is not None,
        f"--step is {shown(_STEP.value)}; give a number, last or best.",
    )
    check(len(rest) == 1, f"{shown(rest[-1])} is no flag; leave it out.")
    return rest
  except UserError as error:
    sys.exit(f"error: {error}")
  except flags.Error as error:
    sys.exit(f"error: {one_line(error)}; see --help.")


def choose(workdir: pathlib.Path, config: Config, text: str) -> int:
  """Returns the step of the checkpoint that `--step` names.

  Raises:
    UserError: there is no such checkpoint.
  """
  steps = checkpoint.listed(workdir)
  there = f"it has {', '.join(map(str, sorted(steps))) or 'none'}"
  check(bool(steps), f"{workdir} has no checkpoints; give another --workdir.")
  if text == "last":
    return steps[0]
  if text == "best":
    name = config.checkpoint.best
    check(
        bool(name),
        "--step=best needs a run with checkpoint.best set; give a number:"
        f" {there}.",
    )
    found = checkpoint.best(workdir, name, steps)
    check(
        found is not None,
        f"No checkpoint in {workdir} was evaluated on {name!r} yet; give a"
        f" number: {there}.",
    )
    return found
  known = text.isascii() and text.isdecimal() and int(text) in steps
  check(known, f"{workdir} has no checkpoint of --step={text}; {there}.")
  return int(text)


def export(workdir: pathlib.Path, step: str, to: pathlib.Path) -> int:
  """Writes the model; returns the step.

  Raises:
    UserError: a flag or the run does not allow it.
  """
  config = workdir_lib.read_config(workdir)
  number = choose(workdir, config, step)
  try:
    empty = not to.exists() or (to.is_dir() and not any(to.iterdir()))
    check(empty, f"--to={to} is there already; give a new directory.")
    spec = config.student
    model = Model(hf.read_config(spec.path))
    mesh = sharding.make_mesh(MeshSpec(fsdp=1), jax.devices("cpu")[:1])
    abstract = sharding.with_shardings(model.abstract_params(), mesh)
    params = checkpoint.read_params(workdir, number, abstract)
    hf.export(
        params, spec.path, spec.tokenizer_path, to.absolute(), spec.param_dtype
    )
  except OSError as error:
    raise UserError(
        f"--to={to} cannot be written ({error.strerror}); give another place."
    ) from error
  return number


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_platforms", "cpu")
  try:
    workdir, to = pathlib.Path(_WORKDIR.value), pathlib.Path(_TO.value)
    number = export(workdir, _STEP.value, to)
  except UserError as error:
    sys.exit(f"error: {error}")
  print(f"Written: the student after update {number} to {to}.")


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
