r"""Grades a model's answers to problems.

  prefix-distill eval --model=runs/math
  prefix-distill eval --model=Qwen/Qwen3-1.7B \
    --config=math:qwen3-1.7b,sets=math500+aime24

`--model` is a directory in Hugging Face format, a hub id, `bundled:NAME`, or
the directory of a run; `--step` chooses one of the run's checkpoints. --config
names the evaluation sets, the sampling and the suffix of the prompts; without
it a run's own settings count. --config.evaluation.sets.mine.source=FILE adds a
set.
"""

import dataclasses
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import rich.console
import rich.table
from rich.text import Text

from prefix_distill import command_line
from prefix_distill import main as main_lib
from prefix_distill import sharding
from prefix_distill import talk
from prefix_distill.config import Config
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.errors import check
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.report import report
from prefix_distill.train import microbatch
from prefix_distill.train import setup

_MODEL = flags.DEFINE_string("model", None, "The model; see above.")
_STEP = flags.DEFINE_string(
    "step", "", "Of a run: last (default), best or a number."
)
_JSON = flags.DEFINE_string(
    "json", None, "A file for the metrics, a line for each set and mode."
)
_HEADER = (
    "set",
    "mode",
    "accuracy, %",
    "problems x answers",
    "finish",
    "of those right",
    "tokens mean / 95 %",
)


def evaluate(
    path: str, config: Config, console: rich.console.Console
) -> list[dict[str, Any]]:
  """Evaluates a model on the sets of the settings; returns a line for each.

  Args:
    path: of the model.
    config: its `evaluation` and `data` say what is asked, and how.
    console: shows each result as it comes.

  Raises:
    UserError: the model or a set cannot be used.
  """
  spec = ModelSpec(path, compute_dtype=config.student.compute_dtype)
  config = dataclasses.replace(config, student=spec)
  mesh = _mesh(config)
  student, tokenizer, problems = setup.read_evaluation(config, mesh)
  models = setup.Models.of(
      config, mesh, student, None, [tokenizer], sharding.memory(mesh)
  )
  params = setup.load_model(spec, student, mesh, config.seed)
  model = models.for_sampling(student)
  sampler = evaluator.sampler_config(
      config.evaluation, models.stop_ids, models.pad_id, models.num_tokens
  )
  rows = microbatch.answers(
      models, model, sampler, params, evaluator.longest_prompt(problems)
  )
  lines = []

  def write(
      values: dict[str, Any], completions: evaluator.Completions
  ) -> None:
    del completions
    lines.append(values)
    console.print(
        Text(f"{values['set']}, {values['mode']}: {report.accuracy(values)}")
    )

  with tempfile.TemporaryDirectory() as directory:
    evaluator.evaluate(
        model,
        params,
        tokenizer,
        config.evaluation,
        problems,
        sampler,
        rows,
        config.seed,
        write,
        lambda name, mode: pathlib.Path(
            directory, f"{name}-{mode}.jsonl".replace("/", "_")
        ),
        lambda: None,
    )
  return lines


def _mesh(config: Config) -> jax.sharding.Mesh:
  """Returns the settings' mesh; or if it does not fit, all devices here."""
  try:
    mesh = sharding.make_mesh(config.mesh)
    setup.check_batches(config, mesh)
    return mesh
  except ConfigError:
    return sharding.make_mesh(MeshSpec())


def table(lines: list[dict[str, Any]], width: int) -> rich.table.Table:
  """Returns the results as a table for a terminal of so many columns."""
  rows = [
      (
          x["set"],
          x["mode"],
          report.accuracy(x),
          f"{x['problems']} x {x['samples']}",
          f"{x['finish_rate']:.1%}",
          f"{x['accuracy_finished']:.1%}",
          f"{x['mean_length']:.0f} / {x['length_p95']}",
      )
      for x in lines
  ]
  return report.table(_HEADER, rows, width)


def _parse(argv: list[str]) -> list[str]:
  """Lets a run's settings stand for a missing --config."""
  words = [re.match(r"--?(\w+)(?:=(.*))?$", a, re.DOTALL) for a in argv]
  given = {m[1]: m[2] for m in words if m}
  for i, match in enumerate(words[:-1]):
    if match and match[2] is None:
      given[match[1]] = argv[i + 1]
  model = given.get("model") or ""
  if "config" not in given and talk.is_run(model):
    argv = [*argv, f"--config={pathlib.Path(model, 'config.json')}"]
    sys.argv = argv
  return command_line.parse(argv, __doc__)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  main_lib.keep_compiled_programs()
  console = rich.console.Console(highlight=False)
  try:
    name, step = _MODEL.value or "", _STEP.value
    check(bool(name), "--model is missing; set it.")
    config = command_line.config()
    check(
        bool(config.evaluation.sets),
        "evaluation.sets is empty, so there is nothing to answer; give"
        " --config.evaluation.sets.NAME.source=FILE and its .answer.",
    )
    with talk.found(name, step) as (path, _):
      lines = evaluate(path, config, console)
  except UserError as error:
    sys.exit(f"error: {error}")
  console.print(table(lines, console.width))
  if _JSON.value:
    texts = [json.dumps(line) + "\n" for line in lines]
    pathlib.Path(_JSON.value).write_text("".join(texts))


def start() -> None:
  """Reads the command line and evaluates."""
  app.run(main, flags_parser=_parse)
