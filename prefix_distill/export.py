"""Writes a checkpoint as a Hugging Face model directory.

  python -m prefix_distill.export --workdir=runs/math --step=20 --to=DIR

`--step` is a number, `last`, or `best` for the one that `checkpoint.best`
chooses. Only the student's weights are read, into the host's memory: no
accelerator is used, so that the run may go on beside it.
"""

import argparse
import pathlib
import re
import sys
from typing import NoReturn

from absl import logging
import jax

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import MeshSpec
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import check
from prefix_distill.errors import check_path
from prefix_distill.errors import one_line
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf
from prefix_distill.models import lora
from prefix_distill.models.transformer import Model
from prefix_distill.train import checkpoint
from prefix_distill.train import setup
from prefix_distill.train import workdir as workdir_lib


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
    mesh = sharding.make_mesh(MeshSpec(fsdp=1), jax.devices("cpu")[:1])
    model = Model(lora.adapted(hf.read_config(spec.path), config), mesh=mesh)
    abstract, base = model.abstract_params(), None
    if config.lora.rank:
      beside = setup.adapter_directory(to)
      check(not beside.exists(), f"{beside} is there already; remove it.")
      _, abstract = lora.split(abstract)
      base = setup.load_model(spec, model, mesh, config.seed)
    abstract = sharding.with_shardings(abstract, mesh)
    params = checkpoint.read_params(workdir, number, abstract)
    params = lora.join(base, params)
    specs = [spec] if config.method == "sft" else [spec, config.teacher]
    tokenizers = [tokenizer_lib.load(one.tokenizer_path) for one in specs]
    stops, _ = setup.stop_ids(config, tokenizers)
    setup.export_student(config, params, stops, to.absolute())
  except OSError as error:
    raise UserError(
        f"--to={to} cannot be written ({error.strerror}); give another place."
    ) from error
  return number


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one sentence, without the usage."""

  def error(self, message: str) -> NoReturn:
    sys.exit(f"error: {one_line(ValueError(message))}; see --help.")


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses flags, or exits with one sentence.

  Args:
    argv: the program's name and its flags.
  """
  parser = _Parser(
      prog="python -m prefix_distill.export",
      description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
  )
  parser.add_argument("--workdir", default="", help="Where the run is kept.")
  parser.add_argument(
      "--step", default="last", help="A number, last or best. Default: last."
  )
  parser.add_argument("--to", default="", help="The new directory.")
  found = parser.parse_args(argv[1:])
  try:
    for name in ("workdir", "to"):
      path = getattr(found, name)
      check(bool(path), f"--{name} is missing; set it.")
      check_path(name, path)
    check(
        re.fullmatch("last|best|[0-9]{1,10}", found.step) is not None,
        f"--step is {shown(found.step)}; give a number, last or best.",
    )
  except UserError as error:
    sys.exit(f"error: {error}")
  return found


def main() -> None:
  flags = parse(sys.argv)
  workdir, to = pathlib.Path(flags.workdir), pathlib.Path(flags.to)
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_platforms", "cpu")
  try:
    number = export(workdir, flags.step, to)
  except UserError as error:
    sys.exit(f"error: {error}")
  print(f"Written: the student after update {number} to {to}.")


if __name__ == "__main__":
  main()
