"""Right or wrong, by math-verify or by letter; how sure a mean of those is."""

import logging
import math
import re
import threading

import math_verify
import numpy as np

# math-verify warns once for each answer when its timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# What is in a box; braces in it are nested twice at most.
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_STATED = re.compile(
    r"(?<!incorrect )(?<!wrong )\banswer\s*(?:is\b|:)"
    r"|\b(?:correct|right|best)\s+(?:option|choice|letter)\s*(?:is\b|:)",
    re.IGNORECASE,
)
# What only changes how a letter looks.
_MARKUP = re.compile(
    r"\\(?:boxed|boldsymbol|(?:text|math)(?:bf|it|normal|rm|sf|tt)?)(?![a-z])"
    r"|\\[()\[\],;:! ]|[{}$*`]"
)
# A letter in brackets, or one that is no word: "a gas" and "I think" are not
# answers, and neither are two letters.
_LETTER = re.compile(
    r"""
    (?:(?:the|answer|option|choice|is)\b | [\s:])*
    (?:
      [(\[] \s* ([a-z]) \s* [)\]]
      | ([a-z]) (?= \s* (?: $ | [,;:)\]] | \.(?!\w) | (?:as|because|since)\b ))
    )
    (?! \s* (?:[,;/&] | and\b | or\b) \s* (?:and\b | or\b)?
        \s* [(\[]? [a-z] \s* (?: $ | [.,;:)\]] ))
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)


def _timeout() -> int | None:
  # Its timeouts are signals, which only the main thread may set.
  in_main = threading.current_thread() is threading.main_thread()
  return 5 if in_main else None


def _final(completion: str) -> str:
  return completion.rpartition("</think>")[2]


def is_correct(completion: str, answer: str) -> bool:
  """Grades a completion against the right answer.

  Only what follows the last `</think>` counts, where there is one: a boxed
  expression first, then any other.
  """
  timeout = _timeout()
  gold = math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout)
  found = math_verify.parse(_final(completion), parsing_timeout=timeout)
  return bool(math_verify.verify(gold, found, timeout_seconds=timeout))


def _letter(text: str) -> str:
  """Returns the letter that a text begins with, or nothing."""
  found = _LETTER.match(_MARKUP.sub(" ", text))
  return (found[1] or found[2]).upper() if found else ""


def is_letter(completion: str, answer: str) -> bool:
  r"""Grades a completion against the letter of the right option.

  Only what follows the last `</think>` counts, where there is one: the letter
  in the last \boxed{}, or else that of the last "The answer is (C)". Any other
  text is wrong, whatever letters are in it.
  """
  final = _final(completion)
  boxes = _BOX.findall(final)
  found = _letter(boxes[-1]) if boxes else ""
  if not found:
    # The end of the statement is near, and answers may repeat it for pages.
    stated = (final[m.end() : m.end() + 80] for m in _STATED.finditer(final))
    found = ([x for x in map(_letter, stated) if x] or [""])[-1]
  return found == answer


GRADERS = {"math": is_correct, "letter": is_letter}


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
  # Rounding must not leave the mean outside: 0 of 6 right gives a low of 3e-17.
  low, high = min(centre - half, mean), max(centre + half, mean)
  return max(float(low), 0.0), min(float(high), 1.0)
