r"""Right or wrong, by math-verify or by letter; how sure a mean of those is.

An answer is what the last \boxed{} holds after the last finished `</think>`. It
is cleaned as the right one is (`cleaning`). Numbers and words are compared
here, and all else by math-verify (`judge`), with a time limit.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import fractions
import math
import re

import numpy as np

from prefix_distill.data import gym
from prefix_distill.evaluate import cleaning
from prefix_distill.evaluate import judge

_JUDGE = judge.Judge()

_STATED = re.compile(
    r"(?<!incorrect )(?<!wrong )\banswer\s*(?:is\b|:)"
    r"|\b(?:correct|right|best)\s+(?:option|choice|letter)\s*(?:is\b|:)",
    re.IGNORECASE,
)
# "option (C) is correct"; but "option (C) is not", and "(C) is incorrect".
_IS_RIGHT = re.compile(
    r"(?:(?i:\b(?:option|choice|answer)\s+)[(\[\s]*([a-zA-Z])[\s)\]]*"
    r"|(?<!or )[(\[]\s*([a-zA-Z])\s*[)\]]|(?<![\w'.-])(?<!or )([B-HJ-Z]))"
    r"\s+is\s+(?:indeed\s+|therefore\s+|thus\s+)?(?:the\s+)?"
    r"(?:correct|right|best|answer)\b(?!\s+(?:that|to|if|only|for)\b)"
)
# What only changes how a letter looks.
_MARKUP = re.compile(
    r"\\(?:boxed|fbox|boldsymbol|mbox"
    r"|(?:text|math)(?:bf|it|normal|rm|sf|tt)?)(?![a-z])"
    r"|\\[()\[\],;:! ]|[{}$*`~]"
)
# A letter that is set apart from the text of its option.
_SET_APART = re.compile(
    r"(?<![a-zA-Z\\])([A-Z])([)\]}.]*)(?:\\[,;: ]|~|\s)*"
    r"(?:\\q?quad(?![a-z])|\\\\|\\newline(?![a-z])"
    r"|\\(?:text|math)[a-z]*\s*\{(?!\s*(?:and|or)\b))"
)
# A letter in brackets, or one that is no word: "a gas" and "I think" are not
# answers, and neither are two letters.
_LETTER = re.compile(
    r"""
    (?:(?:the|answer|option|choice|is)\b | [\s:])*
    (?:
      [(\[] \s* ([a-z]) \s* [)\]]
      | ([a-z]) (?= \s* (?: $ | [,;:)\]] | \.(?!\w) | (?:as|because|since)\b
          | [\u2013\u2014] | (?<=\s)-+\s (?!\s*[a-z]\s*$)
          | = \s* (?: [-+]?[\d.] | \\ | [a-z]{3} )
          | \s*\\(?: approx | (?:right)?arrow | to ) (?![a-z])
          | \s+\(\s* [\d\\a-z] [^()\s] ))
    )
    (?! \s* (?:[,;/&] | and\b | or\b) \s* (?:and\b | or\b)?
        \s* [(\[]? [a-z] \s* (?: $ | [.,;:)\]] ))
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_WHOLE_TEXT = re.compile(r"\\text(?:bf|it|normal|rm|tt)?\{([^{}]*)\}")
_LINE = re.compile(
    r"^[ \t>#*_-]*(?:the\s+)?(?:final\s+)?answer[ \t*_]*[:\uff1a][ \t*_]*"
    r"(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)


def _boxed(text: str) -> str:
  return f"\\boxed{{{text}}}"


def _equal(answer: str, found: str, verbatim: bool = True) -> bool:
  """Whether an answer that was cut out is the right one.

  Args:
    answer: the right one.
    found: the other.
    verbatim: whether the same characters are enough.
  """
  gold, given = cleaning.clean(answer), cleaning.clean(found)
  if not gold or not given:
    return False
  if verbatim and cleaning.squeezed(gold) == cleaning.squeezed(given):
    return True
  gold, given = cleaning.values(gold, given)
  for compare in (_compare_bases, _compare_marks, _compare_words):
    verdict = compare(gold, given)
    if verdict is not None:
      return verdict
  gold, given = cleaning.without_unit(gold), cleaning.without_unit(given)
  if verbatim and cleaning.squeezed(gold) == cleaning.squeezed(given):
    return True
  numbers = cleaning.number(gold), cleaning.number(given)
  if all(numbers):
    return _same_number(*numbers)
  return _JUDGE.equal(_boxed(gold), _boxed(given))


def _compare_bases(gold: str, given: str) -> bool | None:
  """Compares numbers of which one has a base at least; None for others."""
  (right, base), (digits, other) = map(cleaning.based, (gold, given))
  if not base and not other:
    return None
  if base and other:
    return (right, base) == (digits, other)
  plain = cleaning.squeezed(given if base else gold).upper()
  return (plain.lstrip("0") or "0") == (right or digits)


def _compare_marks(gold: str, given: str) -> bool | None:
  """Compares what math-verify does not look at; None if it does not differ."""
  if cleaning.is_bound(gold) != cleaning.is_bound(given):
    return False
  for marks in (cleaning.bases, cleaning.half_day):
    right, other = marks(gold), marks(given)
    if right and other and right != other:
      return False
  return None


def _compare_words(gold: str, given: str) -> bool | None:
  """Compares words; None if they may be variables that are equal."""
  right, other = cleaning.words(gold), cleaning.words(given)
  if not right or not other:
    return None
  marked = cleaning.is_text(gold)
  sure = marked or cleaning.is_text(given) or gold == given or len(gold) > 2
  if right == other and sure:
    return True
  return False if marked else None


def _same_number(
    right: tuple[fractions.Fraction, bool],
    other: tuple[fractions.Fraction, bool],
) -> bool:
  """Compares as math-verify does, but for tiny numbers.

  Args:
    right: a number, and whether it is written as a decimal.
    other: another.
  """
  (gold, is_decimal), (given, also) = right, other
  if gold == given:
    return True
  if not (is_decimal or also):
    return False
  places = judge.digits(float(max(abs(gold), abs(given))))
  return round(gold, places) == round(given, places)


def _is_boxed(final: str, answer: str) -> bool | None:
  """Grades the last box; None if there is none."""
  found = cleaning.boxes(final)
  if not found:
    return None
  if _equal(answer, found[-1][2]):
    return True
  # Some write the values of a list into a box each.
  several = cleaning.joined(final, found) if cleaning.is_list(answer) else ""
  return bool(several) and _equal(answer, several)


def is_correct(completion: str, answer: str) -> bool:
  """Grades a completion against the right answer.

  Only what follows the last `</think>` counts, where there is one: the last
  box, or else what math-verify finds in the text.
  """
  final = cleaning.final(completion)
  verdict = _is_boxed(final, answer)
  if verdict is not None:
    return verdict
  if re.search(r"\d", answer) and not re.search(r"\d", final):
    return False  # Most answers of a model that has not learned to answer.
  if not final.strip():
    return False
  text = cleaning.spelled(final)
  golds = dict.fromkeys((answer, cleaning.without_unit(cleaning.clean(answer))))
  return any(_JUDGE.equal(_boxed(gold), text) for gold in golds if gold)


def _stated(final: str) -> str:
  """Returns what the last line says that begins with "Answer:"."""
  lines = _LINE.findall(final)
  if not lines:
    return ""
  found = cleaning.boxes(lines[-1])
  return found[-1][2] if found else lines[-1].strip(" *_`")


def is_correct_either(completion: str, answer: str) -> bool:
  """Grades by the dual-path rule: the last box, or the last "Answer:" line.

  Either may be right, after the last `</think>`, and no other text counts.
  """
  final = cleaning.final(completion)
  line = _stated(final)
  if _is_boxed(final, answer):
    return True
  return bool(line) and _equal(answer, line)


def _letter(text: str) -> str:
  """Returns the letter that a text begins with, or nothing."""
  text = _SET_APART.sub(r"\1\2: ", text)
  found = _LETTER.match(_MARKUP.sub(" ", text))
  return (found[1] or found[2]).upper() if found else ""


def _stated_letter(final: str) -> str:
  """Returns the last letter that the text calls the answer, or nothing."""
  found = []
  final = _MARKUP.sub(" ", _SET_APART.sub(r"\1\2: ", final))
  for match in _STATED.finditer(final):
    # The end of the statement is near, and answers may repeat it for pages.
    found.append((match.end(), _letter(final[match.end() : match.end() + 80])))
  for match in _IS_RIGHT.finditer(final):
    found.append((match.end(), (match[1] or match[2] or match[3]).upper()))
  return ([letter for _, letter in sorted(found) if letter] or [""])[-1]


def _boxed_letter(final: str) -> str:
  found = cleaning.boxes(final)
  return _letter(found[-1][2]) if found else ""


def is_letter(completion: str, answer: str) -> bool:
  r"""Grades a completion against the letter of the right option.

  Only what follows the last `</think>` counts, where there is one: the letter
  in the last \boxed{}, or else that of the last "The answer is (C)" or "option
  (C) is correct". Any other text is wrong, whatever letters are in it.
  """
  final = cleaning.final(completion)
  found = _boxed_letter(final) or _stated_letter(final)
  return bool(found) and found == answer


def is_letter_either(completion: str, answer: str) -> bool:
  """Grades a letter by the dual-path rule; see `is_correct_either`."""
  final = cleaning.final(completion)
  found = {_boxed_letter(final), _letter(_stated(final))}
  return bool(answer) and answer in found


def final_answer(completion: str) -> str:
  r"""Returns the answer that a verifier of reasoning-gym is to read.

  Only what follows the last `</think>` counts, where there is one: what the
  last <answer> and </answer> enclose, or else all; and of that what the last
  \boxed{} holds, without \text{}, or else all.
  """
  text = cleaning.final(completion)
  before, closed, _ = text.rpartition("</answer>")
  if closed and "<answer>" in before:
    text = before.rpartition("<answer>")[2]
  found = cleaning.boxes(text)
  text = found[-1][2] if found else text
  plain = _WHOLE_TEXT.fullmatch(text.strip())
  return (plain[1] if plain else text).strip()


def verified(completion: str, reference: str) -> float:
  """Returns what the verifier of a task of reasoning-gym gives, from 0 to 1.

  Args:
    completion: the answer of a model.
    reference: a record's, see `gym`.
  """
  answer = final_answer(completion)
  return gym.score(reference, answer) if answer else 0.0


# The rule of a set, by what it asks for; below 1 is wrong.
GRADERS: Mapping[str, Callable[[str, str], float]] = {
    "math": is_correct,
    "letter": is_letter,
    "dual_math": is_correct_either,
    "dual_letter": is_letter_either,
    "gym": verified,
}


def unreadable_golds(answers: Sequence[str], kind: str) -> list[int]:
  """Returns the numbers of the right answers that are not equal to themselves.

  The same answer in other words would be marked wrong.

  Args:
    answers: the right ones of a set.
    kind: how they are graded, one of `GRADERS`.
  """
  if kind == "gym":
    return []  # Its verifiers say what is right.
  if kind.endswith("letter"):
    return [
        i for i, x in enumerate(answers) if not GRADERS[kind](_boxed(x), x)
    ]
  out = []
  for i, answer in enumerate(answers):
    found = cleaning.boxes(_boxed(answer))
    if len(found) != 1 or not _equal(answer, found[0][2], verbatim=False):
      out.append(i)
  return out


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
