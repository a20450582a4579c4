"""Records from JSONL, Parquet, a Hugging Face data set or the math task."""

from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import json
import pathlib
from typing import Any

from prefix_distill.config import DatasetSpec
from prefix_distill.config import FIELD
from prefix_distill.data import guided_task
from prefix_distill.data import math_task
from prefix_distill.errors import UserError


class DataError(UserError):
  """Records that cannot be read, or lack a field."""


def field(record: Mapping[str, Any], name: str) -> Any:
  """Looks a dotted name up: "conversations.0.value" goes into lists too.

  Raises:
    KeyError: there is no such field, or it is null.
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
    DataError: this record lacks it, though the first one had it.
  """
  _check_fields(record, [name], where)
  return field(record, name)


def text(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns a field as text; see `value`."""
  return str(value(record, name, where))


def lot(*parts: str | int) -> bytes:
  """Draws a sort key for what the parts name.

  It is a hash, and so the same on every machine and in every version of a
  library: the records of a benchmark must not change with those.
  """
  return hashlib.sha256(json.dumps(parts).encode()).digest()


def _check_fields(
    record: Mapping[str, Any], names: Sequence[str], where: str
) -> None:
  for name in names:
    try:
      field(record, name)
    except KeyError as error:
      if name in record:  # It is null, as "None" in a .csv file is read.
        raise DataError(
            f"{where} has nothing in its field {name!r}; fill it in a local"
            " copy, or name another field in the config."
        ) from error
      raise DataError(
          f"{where} has no field {name!r}; it has {', '.join(record)}, so name"
          " one of these in the config."
      ) from error


def _read_jsonl(
    path: pathlib.Path, names: Sequence[str]
) -> list[dict[str, Any]]:
  """Reads and checks all lines, since each may have other fields."""
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
      _check_fields(record, names, f"{path} line {number}")
      out.append(record)
  return out


def _read_parquet(path: pathlib.Path) -> list[dict[str, Any]]:
  import pyarrow.parquet  # Takes a second that most runs need not pay.

  return pyarrow.parquet.read_table(path).to_pylist()


def _cache_of(directory: pathlib.Path, root: str) -> str:
  """Returns where to cache a local data set in its present state.

  `datasets` knows a directory with a card by its last name alone: it would
  go on with the old records after a change, and with those of another place.
  """
  parts = []
  for path in sorted(directory.rglob("*")):
    inner = path.relative_to(directory).parts
    if path.is_file() and not any(x.startswith(".") for x in inner):
      parts += [str(path), path.stat().st_size, path.stat().st_mtime_ns]
  return str(pathlib.Path(root) / f"local-{lot(*parts).hex()[:16]}")


def _read_dataset(
    spec: DatasetSpec, first: bool = False
) -> Sequence[dict[str, Any]]:
  """Loads a data set, or a list of its first record, which is streamed."""
  import datasets  # Takes seconds that most runs need not pay.

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
        return guided_task.GuidedTask(spec.split, spec.size)
      return math_task.MathTask(spec.split, spec.size, spec.subset or "clean")
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
    return _read_parquet(path)
  except DataError:
    raise
  except (OSError, ValueError) as error:
    raise DataError(
        f"{path} cannot be read as {path.suffix[1:]}"
        f" ({str(error).splitlines()[0]}); write it again."
    ) from error


def fill(record: Mapping[str, Any], template: str, where: str) -> str:
  """Puts a record's fields in the place of their names in braces.

  Raises:
    DataError: the record lacks one.
  """
  return FIELD.sub(lambda match: text(record, match[1], where), template)


class Records(Sequence):
  """Some records of a source.

  Attributes:
    numbers: which ones, from 0.
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
  order = sorted(range(count), key=lambda number: lot(spec.seed, number))
  return sorted(order[: spec.size])


def read(
    spec: DatasetSpec, first: bool = False, more: Sequence[str] = ()
) -> Records:
  """Reads the records and checks that each has the fields that are named.

  Args:
    spec: where from, and which.
    first: whether the first record is enough; then no data set is downloaded
      whole.
    more: names of fields that the records need besides those of `spec`.

  Raises:
    DataError: the source is missing, unreadable or empty, or a record lacks a
      field; files name the line.
  """
  fields = (
      spec.question, spec.answer, spec.completion, *spec.choices, *more,
  )  # fmt: skip
  names = [name for name in dict.fromkeys(fields) if name]
  records = _read(spec, names, first)
  if len(records) == 0:
    raise DataError(
        f"{spec.source} has no records; check its contents and the split."
    )
  # Records of a table share their fields, so the first stands for all.
  _check_fields(records[0], names, f"{spec.source} record 1")
  return Records(spec.source, records, _numbers(spec, len(records)))
