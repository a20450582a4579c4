"""`samples/`: which texts a run keeps, and how tokens become lines of text.

`rollouts.jsonl` has a line for each rollout that is kept, and `answers.jsonl`
one for each evaluation, set, mode and problem. A line is a JSON object with its
`step`, and is written before the metrics of that step. Fields of a rollout:

  step, source      the update, and whose tokens they are
  record            the number of the prompt's record, from 0
  prompt            segments: [text, 1 for a special token or else 0]
  teacher_prompt    segments, if the teacher reads another prompt
  length            tokens of the whole rollout
  finished          whether it ended with a stop token; else it was cut
  measure           "reverse_kl", or "cross_entropy" without a teacher
  ids, texts        the kept tokens, and what each of them reads
  special           positions of special tokens
  divergence        nats at each token; null for what was not finite
  student, teacher  probabilities of each token
  alternatives      of each position the most probable tokens of the teacher,
                    or without one of the student: [text, probability]

A character that several tokens make up is the text of the first of them. Fields
of an answer: `step`, `model`, `set`, `mode`, `problem` (from 0), `prompt`
and `text` (segments), `answer` (the right one), `length`, `finished`, `right`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from prefix_distill.config import Config
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.evaluate.evaluator import Completions
from prefix_distill.evaluate.evaluator import Problems
from prefix_distill.report import report
from prefix_distill.report.report import Line
from prefix_distill.structs import PromptBatch

# A character of UTF-8 has four bytes at most.
_MOST_BYTES = 4
_BROKEN = "\ufffd"
# Characters of a right answer; those of reasoning-gym hold whole records.
_LONGEST_ANSWER = 1000


@dataclasses.dataclass(frozen=True)
class Inspected:
  """A few rollouts of an update, on the host.

  Attributes:
    prompts: NumPy prompts [B, S].
    tokens: int32 [B, P].
    mask: bool [B, P].
    found: what `loss.inspect` says of the first columns.
  """

  prompts: PromptBatch
  tokens: np.ndarray
  mask: np.ndarray
  found: dict[str, np.ndarray]


def segments(
    tokenizer: Tokenizer, tokens: Sequence[int]
) -> list[tuple[str, int]]:
  """Returns stretches of text, and each special token, which has a 1."""
  special, out, text = set(tokenizer.special_ids), [], []
  for token in tokens:
    if token not in special:
      text.append(token)
      continue
    if text:
      out.append((tokenizer.decode(text), 0))
    out.append((tokenizer.decode([token]), 1))
    text = []
  return [*out, (tokenizer.decode(text), 0)] if text else out


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """Returns what each token reads; together they are the whole text.

  Bytes that are no characters may be more or fewer signs than in the whole.
  The tokens that make up one character have its text in the first of them, and
  nothing in the others.
  """
  out, before, tokens = [], [], [int(token) for token in tokens]
  while len(out) < len(tokens):
    rest = tokens[len(out) : len(out) + _MOST_BYTES]
    # Some tokenizers drop a space at the beginning of a text.
    head = tokenizer.decode(before) if before else ""
    for count in range(1, len(rest) + 1):
      text = tokenizer.decode(before + rest[:count])
      if not text.startswith(head):
        head, text = "", tokenizer.decode(rest[:count])
      if not text.endswith(_BROKEN):
        break
    else:  # Bytes that are no character, whatever follows.
      count, head, text = 1, "", tokenizer.decode(rest[:1])
    out += [text[len(head) :]] + [""] * (count - 1)
    before = rest[:count]
  return out


def _rounded(values: np.ndarray) -> list[float | None]:
  return [
      float(f"{x:.4g}") if math.isfinite(x) else None
      for x in values.astype(float)
  ]


def updates(steps: int, most: int) -> set[int]:
  """Returns the updates, counted from 1, whose rollouts are kept."""
  return report.spread(range(1, steps + 1), most)


def evaluations(steps: int, every: int, most: int) -> set[int]:
  """Returns the updates after which the evaluations' answers are kept.

  Args:
    steps: of the run.
    every: updates between two evaluations; 0 for the first and last only.
    most: how many evaluations.
  """
  due = {0, steps, *(range(0, steps, every) if every else ())}
  return report.spread(sorted(due), most)


class Writer:
  """Appends to both files, and goes on with those of a run that was stopped."""

  def __init__(
      self,
      workdir: pathlib.Path,
      resume_step: int | None,
      evaluated: Sequence[Sequence[str]],
  ):
    """Opens the files.

    Args:
      workdir: of the run.
      resume_step: keeps what was written up to this update; the run writes the
        rest again. None starts with empty files.
      evaluated: model, set and mode of the evaluations after that update which
        are done; the others are done again.

    Raises:
      UserError: they cannot be written.
    """
    rollouts, answers = [], []
    if resume_step is not None:
      rollouts, answers = report.read_samples(workdir)
    done = [tuple(names) for names in evaluated]

    def is_done(line: Line) -> bool:
      names = tuple(line.get(name) for name in ("model", "set", "mode"))
      return line["step"] < resume_step or (
          line["step"] == resume_step and names in done
      )

    self.rollouts = self._open(
        workdir, "rollouts", rollouts, lambda x: x["step"] <= resume_step
    )
    self.answers = self._open(workdir, "answers", answers, is_done)

  def _open(
      self,
      workdir: pathlib.Path,
      name: str,
      lines: list[Line],
      keeps: Callable[[Line], bool],
  ) -> report.LineWriter:
    kept = [line for line in lines if keeps(line)]
    return report.LineWriter(workdir / report.SAMPLES / f"{name}.jsonl", kept)


class Keeper:
  """Decides which texts are kept, and writes them in the first process."""

  def __init__(
      self,
      config: Config,
      tokenizer: Tokenizer,
      stop_ids: Sequence[int],
      writer: Writer | None,
  ):
    """Takes the settings of a run.

    Args:
      config: of the run.
      tokenizer: the student's.
      stop_ids: tokens that end a rollout.
      writer: of `samples/`; None in all processes but the first.
    """
    spec, evaluation = config.samples, config.evaluation
    self._spec, self._writer = spec, writer
    self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
    self._updates, self._evaluations = set(), set()
    if spec.rollouts:
      self._updates = updates(config.steps, spec.updates)
    if spec.problems:
      self._evaluations = evaluations(
          config.steps, evaluation.every, spec.updates
      )

  def wants_rollouts(self, step: int) -> bool:
    """Whether rollouts of this update, counted from 1, are kept."""
    return step in self._updates

  def problems(self, step: int, is_last: bool) -> int:
    """Returns of how many problems a set's answers are kept."""
    wanted = step in self._evaluations or is_last
    return self._spec.problems if wanted else 0

  def write_rollouts(
      self, step: int, source: str, inspected: Inspected
  ) -> None:
    """Writes the rollouts of an update."""
    if self._writer is None:
      return
    # A rewriting that failed has no tokens.
    rows = np.flatnonzero(inspected.mask.any(axis=1))
    for row in rows[: self._spec.rollouts]:
      head = {"step": step, "source": source}
      self._writer.rollouts.write(head | self._rollout(inspected, row))

  def _rollout(self, inspected: Inspected, row: int) -> Line:
    prompts, decode = inspected.prompts, self._tokenizer.decode
    tokens = inspected.tokens[row][inspected.mask[row]].tolist()
    ids = tokens[: self._spec.max_tokens]
    found = {
        name: values[row, : len(ids)]
        for name, values in inspected.found.items()
    }
    text = {int(i): decode([int(i)]) for i in np.unique(found["best"])}
    line: dict[str, Any] = {
        "record": int(np.ravel(prompts.index[row])[0]),
        "length": len(tokens),
        "finished": tokens[-1] in self._stop_ids,
        "measure": "reverse_kl" if "teacher" in found else "cross_entropy",
        "prompt": self._prompt(prompts.tokens[row], prompts.mask[row]),
    }
    if prompts.teacher_tokens is not None:
      line["teacher_prompt"] = self._prompt(
          prompts.teacher_tokens[row], prompts.teacher_mask[row]
      )
    special = set(self._tokenizer.special_ids)
    line |= {
        "ids": ids,
        "texts": pieces(self._tokenizer, ids),
        "special": [at for at, i in enumerate(ids) if i in special],
        "divergence": _rounded(found["divergence"]),
    }
    for name in ("student", "teacher"):
      if name in found:
        line[name] = _rounded(np.exp(found[name]))
    line["alternatives"] = [
        [[text[i], p] for i, p in zip(best, _rounded(probs), strict=True)]
        for best, probs in zip(
            found["best"].tolist(), np.exp(found["best_log_probs"]), strict=True
        )
    ]
    return line

  def _prompt(
      self, tokens: np.ndarray, mask: np.ndarray
  ) -> list[tuple[str, int]]:
    return segments(self._tokenizer, tokens[mask].tolist())

  def write_answers(
      self,
      step: int,
      model: str,
      mode: str,
      problems: Problems,
      completions: Completions,
      verdicts: str,
      shown: int,
  ) -> None:
    """Writes the answers to some problems of a set, the first to each.

    Args:
      step: the update after which the model answered.
      model: "student" or "teacher".
      mode: "sampled" or "greedy".
      problems: the set.
      completions: with the tokens of the answers that are kept.
      verdicts: see `evaluator.summarize`.
      shown: of how many problems.
    """
    if self._writer is None:
      return
    samples_each = completions.lengths.shape[1]
    batch = problems.batch
    for number in sorted(report.spread(range(len(problems.answers)), shown)):
      tokens = completions.tokens[number]
      self._writer.answers.write(
          {
              "step": step,
              "model": model,
              "set": problems.name,
              "mode": mode,
              "problem": number,
              "prompt": self._prompt(batch.tokens[number], batch.mask[number]),
              "answer": problems.answers[number][:_LONGEST_ANSWER],
              "text": segments(self._tokenizer, tokens.tolist()),
              "length": int(completions.lengths[number, 0]),
              "finished": bool(completions.finished[number, 0]),
              "right": verdicts[number * samples_each] == "1",
          }
      )
