r"""Answers held-out problems to the end; names the paper's benchmarks.

`SETS` says where each benchmark's data set is, and how it is graded. The
protocol (arXiv 2602.15260): zero-shot, temperature 1, top-p 1, up to 16,384
new tokens. MATH500, GPQA and MMLU-Pro are means of 4 samples a problem, AIME24
and AIME25 of 16. GPQA (diamond) and MATH500 are taken whole, and 500 questions
of MMLU-Pro at random. The paper also chose its checkpoint by AIME24, so that
score is biased upwards. Free-form answers are graded by math-verify, multiple
choice by the letter in \boxed{}.

The paper does not state four things, which are chosen here: which 500 questions
(those that `records.lot` draws with seed 0), the order of GPQA's options (the
same seed; the data set has the right one first), the prompt of multiple choice
(`data/records.py`), and the longest prompt, since some are long. HMMT (February
2025) and AMC (AMC 23) are not the paper's; they are sampled as AIME is.

Each set is read through `datasets` from the hub. A local copy can take its
place, `--config.evaluation.sets.gpqa.source=PATH`: a clone of the data set's
repository, or a .jsonl or .parquet file with the same fields. A directory of
bare files knows no subset, so it needs `...gpqa.subset=''` as well. GPQA asks
for an account on the hub: accept its terms there and log in.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
import zlib

import jax
import numpy as np

from prefix_distill import sharding
from prefix_distill.config import DatasetSpec
from prefix_distill.config import EvaluationSpec
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data.tokenizer import Chat
from prefix_distill.evaluate import grading
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import report
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.rollout.sampling import Truncation
from prefix_distill.structs import PromptBatch

# Settings of EvaluationSpec.
PROTOCOL = {
    "max_len": 16_384,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "greedy": False,
}

# No set should lose a problem that is long (figures in MATH500 are drawn by
# code, and GPQA has sequences of bases). Rows are only as long as the longest
# prompt that there is.
_ROOM = 8192


def _math(
    source: str, split: str, samples: int, question: str = "problem"
) -> DatasetSpec:
  return DatasetSpec(
      source,
      split,
      question=question,
      answer="answer",
      samples=samples,
      max_prompt_len=_ROOM,
  )


# Problems of a set, by its source, for those who cannot look.
PROBLEMS: Mapping[str, int] = {
    "HuggingFaceH4/MATH-500": 500,
    "HuggingFaceH4/aime_2024": 30,
    "math-ai/aime25": 30,
    "Idavidrein/gpqa": 198,
    "MathArena/hmmt_feb_2025": 30,
    "math-ai/amc23": 40,
}

SETS: Mapping[str, DatasetSpec] = {
    "math500": _math("HuggingFaceH4/MATH-500", "test", 4),
    "aime24": _math("HuggingFaceH4/aime_2024", "train", 16),
    "aime25": _math("math-ai/aime25", "test", 16),
    "gpqa": DatasetSpec(
        "Idavidrein/gpqa",
        "train",
        subset="gpqa_diamond",
        question="Question",
        answer="Correct Answer",
        choices=(
            "Correct Answer",
            "Incorrect Answer 1",
            "Incorrect Answer 2",
            "Incorrect Answer 3",
        ),
        samples=4,
        max_prompt_len=_ROOM,
    ),
    "mmlu_pro": DatasetSpec(
        "TIGER-Lab/MMLU-Pro",
        "test",
        question="question",
        answer="answer",
        choices=("options",),
        size=500,
        random=True,
        samples=4,
        max_prompt_len=_ROOM,
    ),
    "hmmt": _math("MathArena/hmmt_feb_2025", "train", 16),
    "amc": _math("math-ai/amc23", "test", 16, question="question"),
}

# Rows of a set with a length of its own are cut to a multiple of this.
_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class Problems:
  """One evaluation set, encoded.

  Attributes:
    name: of the set.
    batch: NumPy prompts of all problems.
    answers: the right answers.
    samples: how many answers to sample per problem.
    dropped: problems that were longer than the static prompt length.
    grading: which of `grading.GRADERS` tells right from wrong.
  """

  name: str
  batch: PromptBatch
  answers: list[str]
  samples: int
  dropped: int
  grading: str = "math"


@dataclasses.dataclass(frozen=True)
class Completions:
  """Answers to a set of problems.

  Attributes:
    texts: [problems][samples], without the stop tokens.
    lengths: int [problems, samples], in tokens, with the stop token.
    finished: bool [problems, samples], whether each stopped by itself; the
      others were cut at the longest length.
    repetition: float [problems, samples], see `report.repetition`.
  """

  texts: Sequence[Sequence[str]]
  lengths: np.ndarray
  finished: np.ndarray
  repetition: np.ndarray


def _read_problem(
    source: records.Records, number: int, spec: DatasetSpec
) -> tuple[records.Question, str]:
  """Returns what is asked and the right answer."""
  record, where = source[number], source.where(number)
  if spec.choices:
    return records.multiple_choice(record, spec, where)
  return (
      records.question(record, spec.question, where),
      records.gold(record, spec.answer, where),
  )


def _stack(
    rows: Sequence[tuple[int, np.ndarray, np.ndarray]], cut: bool
) -> PromptBatch:
  """Makes a batch of numbers, tokens and masks, cut to the longest or not."""
  numbers, tokens, masks = (np.stack(x) for x in zip(*rows, strict=True))
  length = masks.shape[1]
  if cut:
    longest = int(masks.sum(axis=1).max())
    length = min(-(-longest // _COLUMNS) * _COLUMNS, length)
  return PromptBatch(
      tokens[:, -length:], masks[:, -length:], numbers.astype(np.int32)
  )


def load_problems(
    name: str, spec: DatasetSpec, chat: Chat, max_prompt_len: int, suffix: str
) -> Problems:
  """Reads and encodes a set.

  Args:
    name: of the set.
    spec: where from.
    chat: the tokenizer.
    max_prompt_len: S, unless the set has its own.
    suffix: after the chat template's generation prompt.

  Raises:
    DataError: the records cannot be read, lack a field, hold what cannot be
      used, or are all too long.
  """
  rows, answers = [], []
  source = records.read(spec)
  room = spec.max_prompt_len or max_prompt_len
  for number in range(len(source)):
    question, answer = _read_problem(source, number, spec)
    encoded = prompts.encode_problem(
        chat, question, room, suffix, source.where(number)
    )
    if encoded is not None:
      rows.append((number, *encoded))
      answers.append(answer)
  if not rows:
    own = f"evaluation.sets.{name}.max_prompt_len"
    setting = own if spec.max_prompt_len else "data.max_prompt_len"
    raise records.DataError(
        f"evaluation.sets.{name}: all {len(source)} prompts are longer than"
        f" {setting} {room}; raise it."
    )
  return Problems(
      name,
      _stack(rows, cut=spec.max_prompt_len > 0),
      answers,
      spec.samples,
      len(source) - len(answers),
      spec.grading,
  )


def complete(
    engine: continuous_batching.Engine,
    chat: Chat,
    problems: Problems,
    samples: int,
    seed: int,
    draw: generate.Draw,
) -> Completions:
  """Decodes every answer to its end.

  Args:
    engine: the model, laid out for decoding.
    chat: the tokenizer.
    problems: what to answer.
    samples: answers a problem.
    seed: the same for every evaluation of a run, so that two evaluations
      differ by their weights alone.
    draw: the longest answer, temperature, greedy.
  """
  key = jax.random.key(seed)
  key = jax.random.fold_in(key, zlib.crc32(problems.name.encode()))
  count = len(problems.answers)
  batch = jax.tree.map(lambda x: np.repeat(x, samples, 0), problems.batch)
  number = np.tile(np.arange(samples, dtype=np.int32), count)
  batch = dataclasses.replace(
      batch, index=np.stack([batch.index, number], axis=1)
  )
  texts = [[""] * samples for _ in range(count)]
  lengths = np.zeros((count, samples), int)
  finished = np.zeros((count, samples), bool)
  repetition = np.zeros((count, samples))
  for answer, tokens, stopped in engine.answers(batch, key, draw):
    at = divmod(answer, samples)
    texts[at[0]][at[1]] = chat.answer(tokens, np.ones(len(tokens), bool))
    lengths[at], finished[at] = len(tokens), stopped
    repetition[at] = report.repetition(tokens)
  return Completions(texts, lengths, finished, repetition)


def summarize(
    completions: Completions, answers: Sequence[str], kind: str = "math"
) -> dict[str, float]:
  """Grades completions; returns flat metrics, shares between 0 and 1.

  Args:
    completions: of all problems.
    answers: the right ones.
    kind: how to grade, one of `grading.GRADERS`.
  """
  finished, is_right = completions.finished, grading.GRADERS[kind]
  correct = np.array([
      [is_right(text, answer) for text in row]
      for row, answer in zip(completions.texts, answers, strict=True)
  ])
  low, high = grading.interval(correct)
  return {
      "accuracy": float(correct.mean()),
      "accuracy_low": low,
      "accuracy_high": high,
      "accuracy_finished": float(correct[finished].mean())
      if finished.any()
      else 0.0,
      **report.finish_shares(finished),
      "mean_length": float(completions.lengths.mean()),
      "length_p95": report.length_p95(completions.lengths),
      "repetition": float(completions.repetition.mean()),
      "problems": len(answers),
      "samples": correct.shape[1],
  }


def sampler_config(
    chat: Chat, spec: EvaluationSpec, stop_ids: tuple[int, ...]
) -> generate.SamplerConfig:
  """Returns how answers are sampled."""
  return generate.SamplerConfig(
      stop_ids=stop_ids,
      pad_id=chat.pad_id,
      num_tokens=chat.num_tokens,
      truncation=Truncation(spec.top_k, spec.top_p),
  )


def longest_prompt(sets: Mapping[str, Problems]) -> int:
  """Returns S of the set whose prompts are longest; 0 without sets."""
  return max((one.batch.tokens.shape[1] for one in sets.values()), default=0)


def evaluate(
    model: Model,
    params: Params,
    chat: Chat,
    spec: EvaluationSpec,
    sets: Mapping[str, Problems],
    stop_ids: tuple[int, ...],
    rows: int,
    seed: int,
    write: Callable[[dict[str, Any]], None],
) -> None:
  """Evaluates on every set, sampled (mean@k) and greedy.

  Args:
    model: the architecture, on the mesh of sampling.
    params: the weights.
    chat: the tokenizer.
    spec: lengths and temperature.
    sets: the problems, by name.
    stop_ids: tokens that end an answer.
    rows: answers decoded at a time, at most.
    seed: see `complete`.
    write: takes each set's metrics, with `set`, `mode`, `grading` and the
      number of problems that were `dropped`.
  """
  modes = ("sampled", "greedy") if spec.greedy else ("sampled",)
  config = sampler_config(chat, spec, stop_ids)
  # No more rows than answers.
  shards = sharding.batch_shards(model.mesh)
  most = max(len(one.answers) * one.samples for one in sets.values())
  rows = min(rows, -(-most // shards) * shards)
  engine = continuous_batching.Engine(model, config, params, rows)
  for name, problems in sets.items():
    for mode in modes:
      greedy = mode == "greedy"
      samples = 1 if greedy else problems.samples
      draw = generate.Draw.of(spec.max_len, spec.temperature, greedy)
      completions = complete(engine, chat, problems, samples, seed, draw)
      result = summarize(completions, problems.answers, problems.grading)
      write({
          "set": name,
          "mode": mode,
          "grading": problems.grading,
          "dropped": problems.dropped,
          **result,
      })
