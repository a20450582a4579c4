r"""Records from JSONL, Parquet, a Hugging Face data set or a bundled task.

The prompt of a multiple-choice record is the question, a line for each option,
and a request for the letter of the right option. The paper does not state its
prompt; this one is:

  Which of these is a noble gas?

  A. Nitrogen
  B. Neon

  Reason step by step, and put the letter of the right option in \boxed{}.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import json
import pathlib
import string
from typing import Any

from prefix_distill.config import DatasetSpec
from prefix_distill.config import FIELD
from prefix_distill.data import bundled_tasks
from prefix_distill.errors import UserError


class DataError(UserError):
  """Records that cannot be read, or lack a field."""


def field(record: Mapping[str, Any], name: str) -> Any:
  """Returns the field of a dotted name, such as "conversations.0.value".

  Raises:
    KeyError: the field is missing or null.
  """
  value: Any = record
  for part in name.split("."):
    try:
      value = value[int(part) if isinstance(value, list) else part]
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise KeyError(name) from error
  if value is None:
    raise KeyError(name)
  return value


def value(record: Mapping[str, Any], name: str, where: str) -> Any:
  """Returns a field.

  Raises:
    DataError: the record lacks the field; `where` names the record.
  """
  try:
    return field(record, name)
  except KeyError as error:
    if name in record:  # A "None" in a .csv file is read as null.
      raise DataError(
          f"{where} has nothing in its field {name!r}; fill it in a local copy,"
          " or name another field in the config."
      ) from error
    raise DataError(
        f"{where} has no field {name!r}; it has {', '.join(record)}, so name"
        " one of these in the config."
    ) from error


def text(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns a field as text; see `value`."""
  return str(value(record, name, where))


def random_key(*parts: str | int) -> bytes:
  """Returns a pseudo-random sort key.

  The key is a hash of the parts. So it is the same on every machine and with
  every version of a library, and the records of a benchmark never change.
  """
  return hashlib.sha256(json.dumps(parts).encode()).digest()


def _read_jsonl(
    path: pathlib.Path, names: Sequence[str]
) -> list[dict[str, Any]]:
  """Reads and checks all lines; each line may have other fields."""
  out = []
  with path.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {number} is not JSON ({error.msg}); repair it."
        ) from error
      if not isinstance(record, dict):
        raise DataError(
            f"{path} line {number} is not a JSON object; write one record a"
            " line."
        )
      for name in names:
        value(record, name, f"{path} line {number}")
      out.append(record)
  return out


def _cache_of(directory: pathlib.Path, root: str) -> str:
  """Returns the cache directory for a local data set in its present state.

  `datasets` identifies a directory with a card by its last name alone. So it
  would read old records after a change, or another directory's records.
  """
  parts = []
  for path in sorted(directory.rglob("*")):
    inner = path.relative_to(directory).parts
    if path.is_file() and not any(x.startswith(".") for x in inner):
      parts += [str(path), path.stat().st_size, path.stat().st_mtime_ns]
  return str(pathlib.Path(root) / f"local-{random_key(*parts).hex()[:16]}")


def _read_dataset(
    spec: DatasetSpec, first: bool = False
) -> Sequence[dict[str, Any]]:
  """Loads a data set; if `first`, streams its first record only."""
  import datasets  # The import takes seconds; most runs skip it.

  local, cache = pathlib.Path(spec.source), None
  if local.is_dir():
    cache = _cache_of(local.resolve(), datasets.config.HF_DATASETS_CACHE)
  try:
    loaded = datasets.load_dataset(
        spec.source,
        spec.subset or None,
        split=spec.split,
        cache_dir=cache,
        streaming=first,
    )
    return list(loaded.take(1)) if first else loaded
  except Exception as error:
    reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
    raise DataError(
        f"The data set {spec.source} (subset {spec.subset!r}, split"
        f" {spec.split!r}) cannot be loaded ({reason}); check the names, or"
        " give the path of a .jsonl or .parquet file."
    ) from error


def _read(
    spec: DatasetSpec, names: Sequence[str], first: bool
) -> Sequence[dict[str, Any]]:
  if spec.source == "math_task":
    try:
      if spec.subset == "guided":
        return bundled_tasks.GuidedTask(spec.split, spec.size)
      style = spec.subset or "clean"
      return bundled_tasks.MathTask(spec.split, spec.size, style)
    except ValueError as error:
      raise DataError(str(error)) from error
  path = pathlib.Path(spec.source)
  if path.suffix not in (".jsonl", ".parquet"):
    return _read_dataset(spec, first)
  if not path.is_file():
    raise DataError(f"The file {path} does not exist; check data.*.source.")
  try:
    if path.suffix == ".jsonl":
      return _read_jsonl(path, names)
    from pyarrow import parquet  # The import takes a second; most runs skip it.

    return parquet.read_table(path).to_pylist()
  except DataError:
    raise
  except (OSError, ValueError) as error:
    raise DataError(
        f"{path} cannot be read as {path.suffix[1:]}"
        f" ({str(error).splitlines()[0]}); write it again."
    ) from error


def fill(record: Mapping[str, Any], template: str, where: str) -> str:
  """Replaces the names in braces by the record's fields.

  Raises:
    DataError: the record lacks a field.
  """
  return FIELD.sub(lambda match: text(record, match[1], where), template)


class Records(Sequence):
  """Some records of a source.

  Attributes:
    numbers: their numbers in the source, from 0.
  """

  def __init__(
      self, source: str, records: Sequence[Any], numbers: Sequence[int]
  ):
    self._source, self._records, self.numbers = source, records, numbers

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return self._records[self.numbers[index]]

  def where(self, index: int) -> str:
    """Names a record in a sentence, by its number in the source."""
    return f"{self._source} record {self.numbers[index] + 1}"


def _numbers(spec: DatasetSpec, count: int) -> Sequence[int]:
  if not spec.size or spec.size >= count:
    return range(count)
  if not spec.random:
    return range(spec.size)
  order = sorted(range(count), key=lambda number: random_key(spec.seed, number))
  return sorted(order[: spec.size])


def read(
    spec: DatasetSpec, first: bool = False, more: Sequence[str] = ()
) -> Records:
  """Reads the records and checks that each has the named fields.

  Args:
    spec: the source, its fields, and how many records.
    first: whether the first record is enough; then no whole data set is
      downloaded.
    more: names of fields that the records need besides those of `spec`.

  Raises:
    DataError: the source is missing, unreadable or empty, or a record lacks a
      field; the message names a file's line.
  """
  own = (spec.question, spec.answer, spec.completion)
  names = [name for name in dict.fromkeys((*own, *spec.choices, *more)) if name]
  records = _read(spec, names, first)
  if len(records) == 0:
    raise DataError(
        f"{spec.source} has no records; check its contents and the split."
    )
  # The records of a table share their fields, so checking the first is enough.
  for name in names:
    value(records[0], name, f"{spec.source} record 1")
  return Records(spec.source, records, _numbers(spec, len(records)))


LETTERS = tuple(string.ascii_uppercase)
_REQUEST = (
    "Reason step by step, and put the letter of the right option in \\boxed{}."
)


def _options(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> Sequence[str]:
  """Returns the options in the record's order."""
  if len(spec.choices) > 1:
    return [text(record, name, where) for name in spec.choices]
  (name,) = spec.choices
  found = value(record, name, where)
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
  """Returns the letter in a field."""
  found = text(record, name, where).strip()
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
      key=lambda option: random_key(spec.seed, question, option),
  )


def multiple_choice(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> tuple[str, str]:
  """Returns a model's question, and the letter of the right option.

  Args:
    record: a record of a data set with `choices`.
    spec: the names of the record's fields.
    where: the record's name in a sentence.

  Raises:
    DataError: the record lacks a field, or a field has the wrong content.
  """
  question = text(record, spec.question, where)
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
