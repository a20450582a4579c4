"""`samples/`: which texts a run keeps, and their files; no jax.

`rollouts.jsonl` has a line for each rollout that is kept, and `answers.jsonl`
one for each evaluation, set, mode and problem. A line is a JSON object with the
`step` that it is of, and is written before the metrics of that step. Fields of
a rollout:

  step, source      the update, and whose tokens they are
  record            the number of the prompt's record
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
of an answer: `step`, `model`, `set`, `mode`, `problem` (its number), `prompt`
and `text` (segments), `answer` (the right one), `length`, `finished`, `right`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from prefix_distill.report import report

DIRECTORY = "samples"
_ROLLOUT = {
    "step",
    "source",
    "record",
    "prompt",
    "length",
    "finished",
    "measure",
    "ids",
    "texts",
    "special",
    "divergence",
    "student",
    "alternatives",
}
_ANSWER = {
    "step",
    "model",
    "set",
    "mode",
    "problem",
    "prompt",
    "answer",
    "text",
    "length",
    "finished",
    "right",
}
Line = dict[str, Any]


def spread(values: Sequence[int], most: int) -> set[int]:
  """Returns at most so many of the values, evenly: the ends among them."""
  at = np.linspace(0, len(values) - 1, min(len(values), most))
  return {values[int(i)] for i in np.round(at)}


def updates(steps: int, most: int) -> set[int]:
  """Returns the updates, counted from 1, whose rollouts are kept."""
  return spread(range(1, steps + 1), most)


def evaluations(steps: int, every: int, most: int) -> set[int]:
  """Returns the updates after which the evaluations' answers are kept.

  Args:
    steps: of the run.
    every: updates between two evaluations; 0 for the first and last only.
    most: how many evaluations.
  """
  due = {0, steps, *(range(0, steps, every) if every else ())}
  return spread(sorted(due), most)


def read(workdir: pathlib.Path) -> tuple[list[Line], list[Line]]:
  """Returns a run's rollouts and answers, without damaged lines."""

  def lines(name: str, fields: set[str]) -> list[Line]:
    found = report.read_metrics(workdir / DIRECTORY / f"{name}.jsonl")
    return [line for line in found if fields <= line.keys()]

  return lines("rollouts", _ROLLOUT), lines("answers", _ANSWER)


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
      rollouts, answers = read(workdir)
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
    return report.LineWriter(workdir / DIRECTORY / f"{name}.jsonl", kept)
