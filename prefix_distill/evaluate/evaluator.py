r"""Answers held-out problems to the end, and names the paper's benchmarks.

`SETS` says where the data set of each benchmark is, and how its answers are
graded. The paper's protocol (arXiv 2602.15260) is zero-shot, with temperature
1, top-p 1 and up to 16,384 new tokens. MATH500, GPQA and MMLU-Pro are means of
4 samples a problem, AIME24 and AIME25 of 16. GPQA (diamond) and MATH500 are
whole, and MMLU-Pro is 500 random questions. The paper chose its checkpoint by
AIME24, so that score is biased upwards. Free-form answers are graded by
math-verify, and multiple choice by the letter in \boxed{}.

The paper leaves four things open. The 500 questions are those that
`records.random_key` draws with seed 0. The same seed orders the options of
GPQA, where the data set puts the right option first. `data/records.py` has the
prompt of multiple choice. Prompts may have 8192 tokens, since some are long.
HMMT (February 2025) and AMC (AMC 23) are not the paper's; they are sampled as
AIME is.

`datasets` reads each set from the hub. A local copy can take its place with
`--config.evaluation.sets.gpqa.source=PATH`: a clone of the data set's
repository, or a .jsonl or .parquet file with the same fields. A directory of
bare files has no subset, so it also needs `...gpqa.subset=''`. GPQA needs an
account on the hub: accept its terms there and log in.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any
import zlib

import jax
import numpy as np

from prefix_distill import sharding
from prefix_distill.config import DatasetSpec
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import FIELD
from prefix_distill.data import gym
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.evaluate import grading
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import report
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.rollout.generate import Truncation
from prefix_distill.structs import PromptBatch

# Settings of EvaluationSpec.
PROTOCOL = {
    "max_len": 16_384,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "greedy": False,
}

# The longest prompt. It keeps long problems (figures drawn by code in MATH500,
# sequences of bases in GPQA). Rows are only as long as a set's longest prompt.
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


# The number of problems of a source, for `plan`, which reads no data set.
PROBLEMS: Mapping[str, int] = {
    "HuggingFaceH4/MATH-500": 500,
    "HuggingFaceH4/aime_2024": 30,
    "math-ai/aime25": 30,
    "Idavidrein/gpqa": 198,
    "cais/mmlu": 14_042,
    "MathArena/hmmt_feb_2025": 30,
    "math-ai/amc23": 40,
    # In each language; of the second at each level.
    "masakhane/afrimgsm": 250,
    "Qwen/PolyMath": 125,
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

# A set with its own prompt length is cut to a multiple of this many columns.
_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class Problems:
  """One evaluation set, encoded.

  Attributes:
    name: the set's name.
    batch: NumPy prompts of all problems.
    answers: the right answers, or what the verifiers of reasoning-gym need.
    samples: how many answers to sample per problem.
    dropped: how many problems were longer than the static prompt length, or
      could not be made by reasoning-gym.
    grading: the grader, a key of `grading.GRADERS`.
    opening: what the prompts end with, such as `<think>`, up to the first field
      of a record in it: the grader has to see that it was opened.
  """

  name: str
  batch: PromptBatch
  answers: list[str]
  samples: int
  dropped: int
  grading: str = "math"
  opening: str = ""


@dataclasses.dataclass(frozen=True)
class Completions:
  """Answers to a set of problems.

  Attributes:
    texts: [problems][samples], without stop tokens.
    lengths: int [problems, samples], in tokens, with the stop token.
    finished: bool [problems, samples], whether the answer ended with a stop
      token; the others were cut at the longest length.
    repetition: float [problems, samples], see `report.repetition`.
    tokens: of the first answer to each problem that was asked for, with the
      stop token.
  """

  texts: Sequence[Sequence[str]]
  lengths: np.ndarray
  finished: np.ndarray
  repetition: np.ndarray
  tokens: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


def _read_problem(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> tuple[records.Question, str]:
  """Returns what is asked and the right answer."""
  if spec.choices:
    return records.multiple_choice(record, spec, where)
  return (
      records.question(record, spec.question, where),
      records.gold(record, "reference" if spec.is_gym else spec.answer, where),
  )


def load_problems(
    name: str,
    spec: DatasetSpec,
    tokenizer: Tokenizer,
    max_prompt_len: int,
    suffix: str,
) -> Problems:
  """Reads and encodes a set.

  Args:
    name: the set's name.
    spec: the set's records.
    tokenizer: the tokenizer.
    max_prompt_len: S, unless the set has its own.
    suffix: what follows the chat template's generation prompt; it may be a
      template over the records' fields.

  Raises:
    DataError: the records cannot be read, lack a field, hold what cannot be
      used, or are all too long.
  """
  rows, numbers, answers = [], [], []
  source = records.read(
      spec, more=dict.fromkeys(FIELD.findall(suffix), "data.suffix")
  )
  room = spec.max_prompt_len or max_prompt_len
  for number in range(len(source)):
    where = source.where(number)
    try:
      record = source[number]
    except gym.NotMade:
      continue
    question, answer = _read_problem(record, spec, where)
    filled = records.fill(record, suffix, where)
    encoded = prompts.encode_problem(
        tokenizer, question, room, filled, where
    )
    if encoded is not None:
      rows.append(encoded)
      numbers.append(number)
      answers.append(answer)
  if not rows:
    own = f"evaluation.sets.{name}.max_prompt_len"
    setting = own if spec.max_prompt_len else "data.max_prompt_len"
    raise records.DataError(
        f"evaluation.sets.{name}: all {len(source)} prompts are longer than"
        f" {setting} {room}; raise it."
    )
  unreadable = grading.unreadable_golds(answers, spec.grading)
  if unreadable and jax.process_index() == 0:
    shown = ", ".join(repr(answers[i]) for i in unreadable[:5])
    print(
        f"Warning: evaluation.sets.{name}: {len(unreadable)} of"
        f" {len(answers)} right answers are not found equal to themselves, so"
        f" an answer in other words is marked wrong: {shown}"
        f"{', ...' if len(unreadable) > 5 else ''}.",
        flush=True,
    )
  batch = prompts.stack(rows, numbers)
  if spec.max_prompt_len:
    longest = int(batch.mask.sum(axis=1).max())
    length = min(-(-longest // _COLUMNS) * _COLUMNS, room)
    batch = prompts.cut(batch, length)
  return Problems(
      name,
      batch,
      answers,
      spec.samples,
      len(source) - len(answers),
      spec.grading,
      suffix[: FIELD.search(suffix + "{_}").start()],
  )


# (engine, prompts, key, draw) -> answers as they end.
Answers = Callable[..., Iterable[continuous_batching.Answer]]


def complete(
    engine: continuous_batching.Engine,
    tokenizer: Tokenizer,
    problems: Problems,
    samples: int,
    seed: int,
    draw: generate.Draw,
    answers: Answers = continuous_batching.Engine.answers,
    shown: Sequence[int] = (),
) -> Completions:
  """Decodes every answer to its end.

  Args:
    engine: the model, laid out for decoding.
    tokenizer: the tokenizer.
    problems: the problems to answer.
    samples: answers per problem.
    seed: the same for every evaluation of a run, so that two evaluations
      differ by their weights alone.
    draw: the longest answer, the temperature, and whether to decode greedily.
    answers: `Engine.answers`, or what keeps the answers too.
    shown: numbers of problems. Each number chooses so many problems, evenly
      over the set; the tokens of all that were chosen are returned.
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
  wanted = set().union(
      *(report.spread(range(count), most) for most in shown)
  )
  kept = {}
  for answer, tokens, stopped in answers(engine, batch, key, draw):
    at = divmod(answer, samples)
    texts[at[0]][at[1]] = tokenizer.answer(tokens, np.ones(len(tokens), bool))
    lengths[at], finished[at] = len(tokens), stopped
    repetition[at] = report.repetition(tokens)
    if at[0] in wanted and at[1] == 0:
      kept[at[0]] = tokens
  return Completions(texts, lengths, finished, repetition, kept)


def summarize(
    completions: Completions,
    answers: Sequence[str],
    kind: str = "math",
    opening: str = "",
) -> dict[str, Any]:
  """Grades completions; returns flat metrics. Fractions are in [0, 1].

  `verdicts` has a character for each answer, problem by problem: 1 is right, 0
  wrong. Two evaluations of the same problems can so be compared in pairs.

  Args:
    completions: the answers to all problems.
    answers: the right answers.
    kind: the grader, a key of `grading.GRADERS`.
    opening: see `Problems`.
  """
  finished, grade = completions.finished, grading.GRADERS[kind]
  scores = np.array([
      [float(grade(opening + text, answer)) for text in row]
      for row, answer in zip(completions.texts, answers, strict=True)
  ])
  correct = scores >= 1 - 1e-9
  low, high = grading.interval(correct)
  right_if_finished = correct[finished].mean() if finished.any() else 0.0
  return {
      "accuracy": float(correct.mean()),
      "accuracy_low": low,
      "accuracy_high": high,
      "accuracy_finished": float(right_if_finished),
      **({"score": float(scores.mean())} if kind == "gym" else {}),
      **report.finish_shares(finished),
      "mean_length": float(completions.lengths.mean()),
      "length_p95": report.length_p95(completions.lengths),
      "repetition": float(completions.repetition.mean()),
      "problems": len(answers),
      "samples": correct.shape[1],
      "verdicts": "".join("1" if right else "0" for right in correct.flat),
  }


def sampler_config(
    spec: EvaluationSpec,
    stop_ids: tuple[int, ...],
    pad_id: int,
    num_tokens: int,
) -> generate.SamplerConfig:
  """Returns the sampler's settings for evaluation."""
  return generate.SamplerConfig(
      stop_ids,
      pad_id,
      num_tokens,
      truncation=Truncation(spec.top_k, spec.top_p),
  )


def longest_prompt(sets: Mapping[str, Problems]) -> int:
  """Returns the largest S of all sets; 0 without sets."""
  return max((one.batch.tokens.shape[1] for one in sets.values()), default=0)


def evaluate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    spec: EvaluationSpec,
    sets: Mapping[str, Problems],
    sampler: generate.SamplerConfig,
    rows: int,
    seed: int,
    write: Callable[[dict[str, Any], Completions], None],
    files: Callable[[str, str], pathlib.Path | None],
    poll: Callable[[], None],
    shown: Sequence[int] = (),
) -> None:
  """Evaluates on every set, sampled (mean@k) and greedy.

  Args:
    model: the architecture, on the mesh of sampling.
    params: the weights.
    tokenizer: the tokenizer.
    spec: lengths and temperature.
    sets: the problems, by name.
    sampler: see `sampler_config`.
    rows: the most answers decoded at a time.
    seed: see `complete`.
    write: called with each set's metrics, and with its `set`, `mode`, `grading`
      and number of `dropped` problems; and with the answers.
    files: returns the file that keeps the answers of a set and a mode until
      `write` has been called; None if these were evaluated before.
    poll: see `Engine.answers`.
    shown: see `complete`.
  """
  modes = ("sampled", "greedy") if spec.greedy else ("sampled",)
  todo = [
      (name, mode, file)
      for name in sets
      for mode in modes
      if (file := files(name, mode)) is not None
  ]
  if not todo:
    return
  # More rows than answers would stay empty.
  shards = sharding.batch_shards(model.mesh)
  most = max(len(one.answers) * one.samples for one in sets.values())
  rows = min(rows, -(-most // shards) * shards)
  for name, mode, file in todo:
    engine = continuous_batching.Engine(model, sampler, params, rows)
    problems, greedy = sets[name], mode == "greedy"
    samples = 1 if greedy else problems.samples
    draw = generate.Draw.of(spec.max_len, spec.temperature, greedy)
    keep = functools.partial(
        continuous_batching.kept_answers, file=file, poll=poll
    )
    completions = complete(
        engine, tokenizer, problems, samples, seed, draw, keep, shown
    )
    del engine  # Scoring needs the memory of its copy of the weights.
    result = summarize(
        completions, problems.answers, problems.grading, problems.opening
    )
    values = {
        "set": name,
        "mode": mode,
        "grading": problems.grading,
        "dropped": problems.dropped,
        **result,
    }
    write(values, completions)
    continuous_batching.forget_answers(file)
