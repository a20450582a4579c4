"""Right or wrong, by math-verify; and how sure a mean of those is."""

import logging
import math
import threading

import math_verify
import numpy as np

# math-verify warns once for each answer when its timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def _timeout() -> int | None:
  # Its timeouts are signals, which only the main thread may set.
  in_main = threading.current_thread() is threading.main_thread()
  return 5 if in_main else None


def is_correct(completion: str, answer: str) -> bool:
  """Grades a completion against the right answer.

  Only what follows the last `</think>` counts, where there is one: a boxed
  expression first, then any other.
  """
  final = completion.rpartition("</think>")[2]
  timeout = _timeout()
  gold = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout)
  found = math_verify.parse(final, parsing_timeout=timeout)
  return bool(math_verify.verify(gold, found, timeout_seconds=timeout))


def interval(correct: np.ndarray) -> tuple[float, float]:
  """Returns the 95 % Wilson interval of mean accuracy.

  Several samples of one problem are not independent, so the interval is that
  of as many independent trials as would have the same standard error.

  Args:
    correct: bool [problems, samples].
  """
  per_problem = correct.mean(axis=1)
  n, mean = len(per_problem), per_problem.mean()
  variance = per_problem.var() / n
  trials = float(n)
  if variance > 0:
    trials = min(mean * (1 - mean) / variance, float(correct.size))
  z = 1.959964
  centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
  half = (
      z
      / (1 + z * z / trials)
      * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
  )
  return max(centre - half, 0.0), min(centre + half, 1.0)
