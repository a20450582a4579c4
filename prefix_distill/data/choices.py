r"""Multiple-choice records: what is asked, and the right option's letter.

The paper does not state its prompt for these. Here it is the question, a line
for each option, and a request for the letter in \boxed{}:

  Which of these is a noble gas?

  A. Nitrogen
  B. Neon

  Reason step by step, and put the letter of the right option in \boxed{}.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import string
from typing import Any

from prefix_distill.config import DatasetSpec
from prefix_distill.data import records
from prefix_distill.data.records import DataError

LETTERS = tuple(string.ascii_uppercase)
_REQUEST = (
    "Reason step by step, and put the letter of the right option in \\boxed{}."
)


def _options(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> Sequence[str]:
  """Returns the options as the record has them."""
  if len(spec.choices) > 1:
    return [records.text(record, name, where) for name in spec.choices]
  (name,) = spec.choices
  found = records.value(record, name, where)
  texts = isinstance(found, list) and all(isinstance(x, str) for x in found)
  if texts and 2 <= len(found) <= len(LETTERS):
    return found
  shown = repr(found)
  shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
  raise DataError(
      f"{where} has {shown} in field {name!r}, which is not a list of 2 to"
      f" {len(LETTERS)} texts; name the field that lists the options, or one"
      " field for each option."
  )


def _letter(
    record: Mapping[str, Any], name: str, count: int, where: str
) -> str:
  """Returns the letter that a field holds."""
  found = records.text(record, name, where).strip()
  if found.upper() not in LETTERS[:count]:
    raise DataError(
        f"{where} has {found!r} in field {name!r}, which is none of the letters"
        f" A to {LETTERS[count - 1]} of its {count} options; name the field"
        " that holds the right option's letter, or a field of dataset.choices"
        " that always holds the right option."
    )
  return found.upper()


def _order(spec: DatasetSpec, question: str) -> list[int]:
  """Returns the order of the options; it depends on the question alone."""
  return sorted(
      range(len(spec.choices)),
      key=lambda option: records.lot(spec.seed, question, option),
  )


def problem(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> tuple[str, str]:
  """Returns what a model is asked, and the right option's letter.

  Args:
    record: of a data set with `choices`.
    spec: the names of its fields.
    where: the record's name in a sentence.

  Raises:
    DataError: the record lacks a field, or one holds something else.
  """
  question = records.text(record, spec.question, where)
  options = _options(record, spec, where)
  if spec.answer in spec.choices:
    order = _order(spec, question)
    options = [options[i] for i in order]
    letter = LETTERS[order.index(spec.choices.index(spec.answer))]
  else:
    letter = _letter(record, spec.answer, len(options), where)
  lines = "\n".join(
      f"{name}. {option.strip()}"
      for name, option in zip(LETTERS, options, strict=False)
  )
  return f"{question.strip()}\n\n{lines}\n\n{_REQUEST}", letter
