"""Writes a checkpoint as a Hugging Face model directory.

  prefix-distill export --workdir=runs/math --step=40 --to=DIR

`--step` is a number, `last`, or `best` for the one that `checkpoint.best`
chooses. Only the student's weights are read, into the host's memory: no
accelerator is used, so that the run may go on beside it. `--push=USER/NAME`
uploads the directory to the hub, as a private repository unless `--public` is
given; it needs HF_TOKEN or `hf auth login`. Without `--to` the directory is
gone afterwards.
"""

import argparse
import pathlib
import re
import sys
import tempfile

from absl import logging
import huggingface_hub
import jax

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import MeshSpec
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import ArgumentParser
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


def check_step(text: str) -> None:
  """Raises ConfigError unless --step can name a checkpoint."""
  check(
      re.fullmatch("last|best|[0-9]{1,10}", text) is not None,
      f"--step is {shown(text)}; give a number, last or best.",
  )


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
    setup.export_student(
        config, params, stops, to.absolute(), workdir, number
    )
  except OSError as error:
    raise UserError(
        f"--to={to} cannot be written ({error.strerror}); give another place."
    ) from error
  return number


def push(directory: pathlib.Path, name: str, private: bool) -> str:
  """Uploads a model's directory to the hub; returns its address.

  Raises:
    UserError: the hub refuses it, or is not there.
  """
  hub = huggingface_hub.HfApi()
  try:
    made = hub.create_repo(name, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=made.repo_id,
        folder_path=directory,
        commit_message="Upload a distilled student",
    )
  except Exception as error:  # Which library it sends with depends on it.
    raise UserError(
        f"--push={name} failed ({one_line(error)}); check the name, the network"
        " and HF_TOKEN (or `hf auth login`)."
    ) from error
  return str(made)


def parse(argv: list[str]) -> argparse.Namespace:
  """Parses flags, or exits with one sentence.

  Args:
    argv: the program's name and its flags.
  """
  parser = ArgumentParser("export", __doc__)
  parser.add_argument("--workdir", default="", help="Where the run is kept.")
  parser.add_argument(
      "--step", default="last", help="A number, last or best. Default: last."
  )
  parser.add_argument("--to", default="", help="The new directory.")
  parser.add_argument("--push", default="", help="USER/NAME on the hub.")
  parser.add_argument("--public", action="store_true", help="For all to see.")
  found = parser.parse_args(argv[1:])
  try:
    check(
        re.fullmatch(r"|[\w.-]{1,96}/[\w.-]{1,96}", found.push) is not None,
        f"--push is {shown(found.push)}; give USER/NAME.",
    )
    for name in ("workdir", "to"):
      path = getattr(found, name)
      needed = name == "workdir" or not found.push
      check(bool(path) or not needed, f"--{name} is missing; set it.")
      check_path(name, path)
    check_step(found.step)
  except UserError as error:
    sys.exit(f"error: {error}")
  return found


def start() -> None:
  """Does what the command line says, or exits with one sentence."""
  flags = parse(sys.argv)
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_platforms", "cpu")
  workdir = pathlib.Path(flags.workdir)
  with tempfile.TemporaryDirectory() as directory:
    to = pathlib.Path(flags.to or f"{directory}/model")
    try:
      number = export(workdir, flags.step, to)
      if flags.to:
        print(f"Written: the student after update {number} to {to}.")
      if flags.push:
        print(f"Uploaded to {push(to, flags.push, not flags.public)}.")
    except UserError as error:
      sys.exit(f"error: {error}")


if __name__ == "__main__":
  start()
