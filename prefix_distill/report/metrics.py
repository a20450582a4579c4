"""`metrics.jsonl`, one flat JSON object a line, and how answers end.

A distilled student may forget how to stop: its loss looks good, its answers are
right when they end, and fewer and fewer of them end.
"""

from collections.abc import Sequence
import json
import math
import pathlib
from typing import Any

import numpy as np


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines; one that a kill cut short is left out."""
  if not path.is_file():
    return []
  out = []
  for line in path.read_text().splitlines():
    try:
      out.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return out


class Writer:
  """Appends lines, each whole on the disk before the next step starts."""

  def __init__(self, path: pathlib.Path, resume_step: int | None):
    """Opens the file.

    Args:
      path: the file.
      resume_step: keep lines up to this step, for later ones will be written
        again; None to start anew.
    """
    kept = []
    if resume_step is not None:
      # The teacher is evaluated after the last checkpoint, so once more.
      kept = [
          line
          for line in read(path)
          if line["step"] <= resume_step and line.get("model") != "teacher"
      ]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_line(values) for values in kept))
    partial.rename(path)
    self._path = path

  def write(self, values: dict[str, Any]) -> None:
    with self._path.open("a") as file:
      file.write(_line(values))


def _line(values: dict[str, Any]) -> str:
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      values = {**values, name: None}  # JSON has no NaN.
  return json.dumps(values) + "\n"


# Tokens in a run of them that repetition counts.
GRAM = 4


def repetition(tokens: Sequence[int]) -> float:
  """Returns how much of an answer was there before.

    repetition = 1 - (distinct 4-grams) / (all 4-grams)

  That is 0 if no run of four tokens occurs twice, and goes to 1 in an answer
  that says the same over and over.

  Args:
    tokens: of one answer; 0 is returned for fewer than four.
  """
  tokens = np.asarray(tokens).tolist()
  grams = list(zip(*(tokens[i:] for i in range(GRAM)), strict=False))
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def length_p95(lengths: np.ndarray) -> int:
  """Returns the least length that 95 % of the answers do not exceed.

  It is the length of one of the answers, so it equals the cap as soon as more
  than 5 % of them run into it.
  """
  return int(np.percentile(lengths, 95, method="inverted_cdf"))


def shares(finished: np.ndarray) -> dict[str, float]:
  """Returns the share of answers that stopped, and of those that were cut.

  Nothing but a stop token or the cap ends an answer, so the two add up to 1.
  An answer whose last token under the cap is a stop token was not cut, though
  it is as long as those that were.

  Args:
    finished: bool, whether each answer ended with a stop token.
  """
  return {
      "finish_rate": float(np.mean(finished)),
      "cut": float(np.mean(~finished)),
  }


def of_rollouts(
    tokens: np.ndarray, mask: np.ndarray, stop_ids: Sequence[int]
) -> dict[str, float]:
  """Returns what an update's metrics say of its rollouts' ends.

  Args:
    tokens: int [B, P], sampled.
    mask: bool [B, P], true up to and including the stop token.
    stop_ids: tokens that end a rollout.
  """
  # No token follows a stop token, so one anywhere is the last.
  finished = np.any(np.isin(tokens, stop_ids) & mask, axis=1)
  repeated = [repetition(t[m]) for t, m in zip(tokens, mask, strict=True)]
  return shares(finished) | {
      "rollout_len_p95": length_p95(mask.sum(1)),
      "repetition": float(np.mean(repeated)),
  }
