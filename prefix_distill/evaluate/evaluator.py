"""Answers held-out problems to the end, whatever the training cap."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data.chat import Chat
from prefix_distill.evaluate import grading
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import sampler
from prefix_distill.specs import DatasetSpec
from prefix_distill.specs import EvaluationSpec
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout


@dataclasses.dataclass(frozen=True)
class Problems:
  """One evaluation set, encoded.

  Attributes:
    name: of the set.
    batch: NumPy prompts of all problems.
    answers: the right answers.
    samples: how many answers to sample per problem.
    dropped: problems that were longer than the static prompt length.
  """

  name: str
  batch: PromptBatch
  answers: list[str]
  samples: int
  dropped: int


def load_problems(
    name: str, spec: DatasetSpec, chat: Chat, max_prompt_len: int, suffix: str
) -> Problems:
  """Reads and encodes a set.

  Raises:
    DataError: the records cannot be read, lack a field, or are all too long.
  """
  tokens, masks, numbers, answers = [], [], [], []
  source = records.read(spec)
  for number in range(len(source)):
    record = source[number]
    where = f"{spec.source} record {number + 1}"
    question = records.text(record, spec.question, where)
    encoded = prompts.encode_prompt(chat, question, max_prompt_len, suffix)
    if encoded is None:
      continue
    tokens.append(encoded[0])
    masks.append(encoded[1])
    numbers.append(number)
    answers.append(records.text(record, spec.answer, where))
  if not tokens:
    raise records.DataError(
        f"evaluation.sets.{name}: all {len(source)} prompts are longer than"
        f" data.max_prompt_len {max_prompt_len}; raise it."
    )
  batch = PromptBatch(
      np.stack(tokens), np.stack(masks), np.array(numbers, np.int32)
  )
  return Problems(
      name, batch, answers, spec.samples, len(source) - len(answers)
  )


def _batches(
    problems: Problems, rows: int
) -> Iterator[tuple[PromptBatch, int]]:
  """Yields batches of `rows` prompts and how many of them are real."""
  total = len(problems.answers)
  for start in range(0, total, rows):
    # The last batch wraps around, so that all have one shape.
    index = np.arange(start, start + rows) % total
    yield (
        jax.tree.map(lambda x, index=index: x[index], problems.batch),
        min(rows, total - start),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(
    model: Model,
    config: sampler.SamplerConfig,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
) -> Rollout:
  cap = jnp.asarray(config.length)
  return sampler.sample(model, config, params, batch, key, cap)


def to_host(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Brings whole arrays to every process."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  place = sharding.replicated(mesh)
  tree = jax.jit(lambda x: x, out_shardings=place)(tree)
  return jax.tree.map(
      lambda x: multihost_utils.global_array_to_host_local_array(
          x, mesh, jax.sharding.PartitionSpec()
      ),
      tree,
  )


def _local_rows(batch: PromptBatch) -> PromptBatch:
  index, count = jax.process_index(), jax.process_count()
  size = batch.tokens.shape[0] // count
  return jax.tree.map(lambda x: x[index * size : (index + 1) * size], batch)


def complete(
    model: Model,
    params: Params,
    chat: Chat,
    problems: Problems,
    config: sampler.SamplerConfig,
    mesh: jax.sharding.Mesh,
    seed: int,
    rows: int,
) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
  """Decodes every answer to its end.

  Args:
    model: the architecture.
    params: the weights.
    chat: whose stop tokens end an answer.
    problems: what to answer.
    config: how to sample; `per_prompt` answers a problem.
    mesh: the device mesh.
    seed: the same for every evaluation of a run, so that two evaluations
      differ by their weights alone.
    rows: completions decoded at a time.

  Returns:
    Texts [problems][samples]; lengths in tokens and whether each answer
    stopped by itself, both [problems, samples].
  """
  key = jax.random.key(seed)
  key = jax.random.fold_in(key, zlib.crc32(problems.name.encode()))
  n = config.per_prompt
  texts, lengths, finished = [], [], []
  for batch, real in _batches(problems, max(rows // n, 1)):
    batch = sharding.global_batch(_local_rows(batch), mesh)
    rollout = to_host(_sample(model, config, params, batch, key), mesh)
    masks = rollout.mask[: real * n]
    last = masks.sum(axis=1) - 1
    ends = rollout.tokens[np.arange(len(masks)), last]
    finished.append(np.isin(ends, config.stop_ids).reshape(real, n))
    lengths.append(masks.sum(axis=1).reshape(real, n))
    answers = [
        chat.answer(t, m)
        for t, m in zip(rollout.tokens[: real * n], masks, strict=True)
    ]
    texts += [answers[i * n : (i + 1) * n] for i in range(real)]
  return texts, np.concatenate(lengths), np.concatenate(finished)


def summarize(
    texts: Sequence[Sequence[str]],
    answers: Sequence[str],
    lengths: np.ndarray,
    finished: np.ndarray,
) -> dict[str, float]:
  """Grades completions; returns flat metrics, shares between 0 and 1."""
  correct = np.array([
      [grading.is_correct(text, answer) for text in row]
      for row, answer in zip(texts, answers, strict=True)
  ])
  low, high = grading.interval(correct)
  return {
      "accuracy": float(correct.mean()),
      "accuracy_low": low,
      "accuracy_high": high,
      "accuracy_finished": float(correct[finished].mean())
      if finished.any()
      else 0.0,
      "finish_rate": float(finished.mean()),
      "mean_length": float(lengths.mean()),
      "problems": len(answers),
      "samples": correct.shape[1],
  }


def evaluate(
    model: Model,
    params: Params,
    chat: Chat,
    spec: EvaluationSpec,
    sets: Mapping[str, Problems],
    mesh: jax.sharding.Mesh,
    stop_ids: tuple[int, ...],
    seed: int,
    write: Callable[[dict[str, Any]], None],
) -> None:
  """Evaluates on every set, sampled (mean@k) and greedy.

  Args:
    model: the architecture.
    params: the weights.
    chat: the tokenizer.
    spec: lengths, temperature, batch size.
    sets: the problems, by name.
    mesh: the device mesh.
    stop_ids: tokens that end an answer.
    seed: see `complete`.
    write: takes each set's metrics, with `set` and `mode`.
  """
  modes = ("sampled", "greedy") if spec.greedy else ("sampled",)
  for name, problems in sets.items():
    for mode in modes:
      greedy = mode == "greedy"
      config = sampler.SamplerConfig(
          length=spec.max_len,
          stop_ids=stop_ids,
          pad_id=chat.pad_id,
          num_tokens=chat.num_tokens,
          per_prompt=1 if greedy else problems.samples,
          temperature=spec.temperature,
          greedy=greedy,
      )
      texts, lengths, finished = complete(
          model, params, chat, problems, config, mesh, seed, spec.batch_size
      )
      result = summarize(texts, problems.answers, lengths, finished)
      write({"set": name, "mode": mode, **result})
