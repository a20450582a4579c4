"""SeqKD's data: the teacher answers each prompt once; answers are kept."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from prefix_distill import distributed
from prefix_distill.config import Config
from prefix_distill.config import DatasetSpec
from prefix_distill.data import gym
from prefix_distill.data import prompts as prompts_lib
from prefix_distill.data import records
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.errors import one_line
from prefix_distill.errors import UserError
from prefix_distill.report import flops
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.train import microbatch
from prefix_distill.train import setup as setup_lib

FILE = "answers.parquet"
_UNFINISHED = "unfinished/teacher-answers.jsonl"
# The columns of lengths, and the key of the lengths of unended answers.
_LENGTHS, _UNENDED = ["prompt_tokens", "tokens"], b"unended"


class AnswersError(UserError):
  """Answers that cannot be written."""


def with_answers(
    setup: setup_lib.Setup, workdir: pathlib.Path, poll: Callable[[], None]
) -> tuple[setup_lib.Setup, flops.Bought]:
  """Returns the supervised part's setup; makes the answers if need be.

  Only answers that end by themselves are kept. All of the run's prompts are
  answered, each once: `steps * data.batch_size`, or as many as there are.

  Args:
    setup: of the run, with the teacher.
    workdir: keeps the answers so far, so that a run that was stopped or killed
      goes on with them.
    poll: called every few seconds; it may raise to stop.

  Returns:
    The setup, and what the answers cost, unended ones included.

  Raises:
    DataError: no answer ended within `rollout.max_len` tokens.
    AnswersError: the answers cannot be written.
  """
  path, unfinished = workdir / FILE, workdir / _UNFINISHED
  if path.is_dir():
    raise AnswersError(
        f"{path} is a directory, but the run writes the teacher's answers to a"
        " file of that name; remove the directory."
    )
  if not distributed.from_first("answers", path.is_file()):
    rows = list(_answers(setup, unfinished, poll))
    if not any(row["ended"] for row in rows):
      raise records.DataError(
          f"None of the teacher's answers ended within rollout.max_len"
          f" {setup.models.config.rollout.max_len} tokens; raise it."
      )
    if jax.process_index() == 0:
      _write(rows, path)
  distributed.wait("answers")
  continuous_batching.forget_answers(unfinished)
  spec = DatasetSpec(
      str(path), question="question", completion="completion"
  )
  config = setup.models.config
  data = PromptIterator(
      dataclasses.replace(config.data, train=spec),
      setup.tokenizer,
      seed=config.seed,
      completion_len=config.rollout.max_len,
  )
  table = pq.read_table(path, columns=_LENGTHS)
  lengths = np.stack([np.asarray(table[name]) for name in _LENGTHS], axis=1)
  others = json.loads(table.schema.metadata[_UNENDED])
  lengths = np.concatenate([lengths, np.reshape(others, (-1, 2))])
  spent = flops.answers(setup.models.teacher.config, *lengths.T)
  models = dataclasses.replace(setup.models, teacher=None)
  bought = flops.Bought(spent, table.num_rows / config.data.batch_size)
  return dataclasses.replace(setup, data=data, models=models), bought


def _write(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Writes the answers, whole or not at all; of the unended only lengths."""
  partial = path.with_suffix(".partial")
  unended = [[row[x] for x in _LENGTHS] for row in rows if not row["ended"]]
  table = pa.Table.from_pylist([row for row in rows if row["ended"]])
  table = table.drop_columns("ended")
  table = table.replace_schema_metadata({_UNENDED: json.dumps(unended)})
  try:
    pq.write_table(table, partial)
    partial.rename(path)
  except OSError as error:
    raise AnswersError(
        f"{path} could not be written ({one_line(error)}); make"
        " room or make it writable, and the same command goes on with the"
        " answers."
    ) from error


def _questions(config: Config) -> list[records.Question]:
  source = records.read(config.data.train)
  count = min(config.steps * config.data.batch_size, len(source))
  order = np.random.default_rng(config.seed).permutation(len(source))[:count]
  name, found = config.data.train.question, []
  for i in order:
    with contextlib.suppress(gym.NotMade):
      found.append(records.question(source[int(i)], name, f"record {i + 1}"))
  return found


def _answers(
    setup: setup_lib.Setup, file: pathlib.Path, poll: Callable[[], None]
) -> Iterator[dict[str, Any]]:
  """Samples the teacher's answers; yields records in the prompts' order."""
  models, tokenizer = setup.models, setup.tokenizer
  config, kept = models.config, []
  for question in _questions(config):
    row = prompts_lib.encode_prompt(
        tokenizer, question, config.data.max_prompt_len, config.data.suffix
    )
    if row is not None and not setup.data.is_asked(*row):
      kept.append((question, row))
  batch = prompts_lib.stack([row for _, row in kept], range(len(kept)))
  model = models.for_sampling(models.teacher)
  sampler_config = generate.SamplerConfig(
      stop_ids=models.teacher_stop_ids,
      pad_id=tokenizer.pad_id,
      num_tokens=tokenizer.num_tokens,
  )
  params = setup_lib.load_model(
      config.teacher, models.teacher, models.mesh, config.seed, poll
  )
  rows = microbatch.answers(
      models,
      model,
      sampler_config,
      params,
      batch.tokens.shape[1],
      config.rollout.max_len,
  )
  engine = continuous_batching.Engine(model, sampler_config, params, rows)
  draw = generate.Draw.of(
      config.rollout.max_len, config.rollout.temperature
  )
  answers = tqdm.tqdm(
      continuous_batching.kept_answers(
          engine, batch, jax.random.key(config.seed), draw, file, poll
      ),
      total=len(kept),
      desc="teacher's answers",
      disable=jax.process_index() > 0,
      mininterval=1,
  )
  # The order in which answers end depends on where a run was stopped.
  for number, tokens, stopped in sorted(answers, key=lambda found: found[0]):
    yield {
        "question": kept[number][0],
        "completion": tokenizer.decode([int(t) for t in tokens[:-1]]),
        "prompt_tokens": int(batch.mask[number].sum()),
        "tokens": len(tokens),
        "ended": stopped,
    }
