"""Questions that reasoning-gym makes, and its verifiers (arXiv 2505.24760).

`reasoning_gym:NAME?OPTION=VALUE&OPTION=VALUE` is a source of records. A value
is JSON or as Python writes it, and what is neither is text:

  reasoning_gym:chain_sum?min_terms=4&max_terms=6
  reasoning_gym:basic_arithmetic?operators=["+","-"]&format_style=natural

A record has a `question`, `metadata`, an `answer` unless the task has none, and
a `reference`, from which the verifier's process makes the record again.

The library draws entry `i` from the seed `seed + i`, so that the entries of two
seeds overlap. Here the three splits take every third seed each, whatever
`DatasetSpec.seed` is: no entry is in two splits. (The same question may be, in
a task that has few. `data/prompts.py` leaves those out of training.) Each
`DatasetSpec.seed` has a block of seeds of its own, the same on every machine.

The library runs in a process of its own: sets have the same order there in
every run, which questions depend on, and it may be ended. It does not keep
what an answer says from being run, since some verifiers call `eval`.

This file is also the program of that process, see `worker`.
"""

import ast
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import difflib
import functools
from importlib import metadata
import importlib.util
import json
import random
import re
import typing
from typing import Any

import numpy as np
import pydantic

from prefix_distill import worker
from prefix_distill.config import DatasetSpec
from prefix_distill.config import GYM
from prefix_distill.config import GYM_SPLITS
from prefix_distill.errors import one_line
from prefix_distill.errors import shown
from prefix_distill.errors import UserError

_WORKER = worker.Worker(__file__)
# Seconds to make a data set or an entry, and to verify an answer.
_MAKING, _VERIFYING = 60.0, 5.0
# Entries of a split. Two tasks make all entries, or bound their number.
_MOST = 1_000_000
_FEWER = {"acre": 2_000, "word_ladder": 5_000}
# Records of a split without a `size`.
_DEFAULT = {"train": 100_000, "validation": 500, "test": 500}
# NumPy's seeds are below 2**32.
_BLOCKS = 2**30


class GymError(UserError):
  """A task that there is not, or that cannot be made."""


class NotMade(GymError):
  """An entry that the library fails to make, or takes too long for."""


def version() -> str:
  """Returns the version of reasoning-gym.

  Raises:
    GymError: it is not installed.
  """
  if importlib.util.find_spec("reasoning_gym") is None:
    raise GymError(
        f"A source that begins with {GYM!r} needs the package reasoning-gym;"
        " install it with: pip install 'prefix_distill[gym]' (in a clone: pip"
        " install -e '.[gym]')."
    )
  return metadata.version("reasoning-gym")


class Entries(Sequence):
  """The records of a split, each made when it is asked for."""

  def __init__(self, spec: DatasetSpec):
    """Makes the task.

    Raises:
      GymError: reasoning-gym is missing, or there is no such task, option or
        value.
    """
    self._source, self._task = spec.source, spec.source.removeprefix(GYM)
    most = _FEWER.get(self._task.partition("?")[0], _MOST)
    self._size = spec.size or min(_DEFAULT[spec.split], most)
    self._split = GYM_SPLITS.index(spec.split)
    self._seed = len(GYM_SPLITS) * (spec.seed * _MOST % _BLOCKS)
    if self._size > most:
      raise GymError(
          f"{spec.source} has {most} records in each split, and its size is"
          f" {spec.size}; set the size to {most} or less."
      )
    version()
    made = _WORKER.ask(self._question(0) | {"make": True}, _MAKING)
    if made is None:
      raise GymError(
          f"{spec.source} is not made by reasoning-gym within {_MAKING:g}"
          " seconds; choose another task, or other options."
      )
    if made:
      raise GymError(f"{spec.source} {made}")

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    """Makes a record.

    Raises:
      NotMade: the library fails, or takes too long.
    """
    question = self._question(index)
    entry = _WORKER.ask(question, _MAKING)
    if entry is None:
      raise NotMade(
          f"{self._source} record {index + 1} is not made by reasoning-gym: it"
          f" fails, or takes more than {_MAKING:g} seconds; choose other"
          " options or another seed."
      )
    return entry | {"reference": json.dumps(question)}

  def _question(self, index: int) -> dict[str, Any]:
    number = len(GYM_SPLITS) * index + self._split
    return {"task": self._task, "seed": self._seed, "number": number}


def score(reference: str, answer: str) -> float:
  """Returns what the task's verifier says of an answer, from 0 to 1.

  Where the verifier fails or takes longer than 5 seconds, that is 0.

  Args:
    reference: a record's.
    answer: the final answer alone.
  """
  question = json.loads(reference)
  if _WORKER.ask(question, _MAKING) is None:  # Or the limit would be for both.
    return 0.0
  found = _WORKER.ask(question | {"answer": answer}, _VERIFYING)
  return min(max(0.0, found or 0.0), 1.0)  # In this order NaN is 0.


class _Refused(Exception):
  """Goes on after the source's name."""


def _nearest(name: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, known, 1)
  return f"did you mean {near[0]}?" if near else f"use {', '.join(known)}."


def _value(kind: Any, name: str, text: str) -> Any:
  """Reads an option's value."""
  value = text
  for parse in (ast.literal_eval, json.loads):
    try:
      value = parse(text)
      break
    except (ValueError, SyntaxError, RecursionError, MemoryError):
      pass
  try:
    as_json = json.dumps(value)  # Where a list may stand for a tuple.
    return pydantic.TypeAdapter(kind).validate_json(as_json, strict=True)
  except pydantic.ValidationError as error:
    raise _Refused(
        f"has {name}={text}, which is of another kind"
        f" ({error.errors()[0]['msg']}); give another value."
    ) from error


def _options(text: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
  """Reads OPTION=VALUE&OPTION=VALUE; a value may have an `&`."""
  out = {}
  for part in re.split(r"&(?=\w+=)", text) if text else ():
    name, _, value = part.partition("=")
    if name in ("seed", "size"):
      raise _Refused(f"has the option {name}; set {name} of the data set.")
    if name not in kinds:
      known = [kind for kind in kinds if kind not in ("seed", "size")]
      mend = _nearest(name, known)
      raise _Refused(f"has {shown(name)}, which is no option; {mend}")
    out[name] = _value(kinds[name], name, value)
  return out


@functools.lru_cache(16)
def _dataset(task: str, seed: int) -> Any:
  """Makes a data set of the library.

  Raises:
    _Refused: there is no such task, option or value.
  """
  from reasoning_gym import factory

  name, _, options = task.partition("?")
  if name not in factory.DATASETS:
    mend = _nearest(name, sorted(factory.DATASETS))
    raise _Refused(f"is no task of reasoning-gym; {mend}")
  kinds = typing.get_type_hints(factory.DATASETS[name][1])
  given = _options(options, kinds)
  size = len(GYM_SPLITS) * _FEWER.get(name, _MOST)
  try:
    return factory.create_dataset(name, seed=seed, size=size, **given)
  except (AssertionError, ValueError, TypeError) as error:
    because = one_line(error) or "its options do not fit together"
    raise _Refused(f"is refused by reasoning-gym: {because}.") from error


@functools.lru_cache(4096)
def _entry(task: str, seed: int, number: int) -> dict[str, Any]:
  # Some tasks draw from the generators that a whole process shares.
  random.seed(seed + number)
  np.random.seed(seed + number)
  return _dataset(task, seed)[number]


def _reply(asked: Mapping[str, Any]) -> Any:
  """Answers with an entry, a score, or what is wrong with a task."""
  task, seed, number = asked["task"], asked["seed"], asked["number"]
  if "make" in asked:
    try:
      _dataset(task, seed)
    except _Refused as refused:
      return str(refused)
    return ""
  entry = _entry(task, seed, number)
  if "answer" in asked:
    return float(_dataset(task, seed).score_answer(asked["answer"], entry))
  kept = {k: v for k, v in entry.items() if v is not None}
  return json.loads(json.dumps(kept, default=str))


def _make() -> Callable[[Mapping[str, Any]], Any]:
  import reasoning_gym  # noqa: F401, takes a second, and prints.

  return _reply


if __name__ == "__main__":
  worker.serve(_make)
