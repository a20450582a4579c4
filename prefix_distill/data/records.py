r"""Records from a file, a Hugging Face data set, or a task that makes them.

What a field may hold:

  a question     text, or a list of messages that ends with the user's:
                 [{"role": "user", "content": "How many?"}]
  a completion   text, or a list of one message, the assistant's
  an answer      text or an integer, which stands for its digits
  an option      text

A message has the role "system" (the first one only), "user" or "assistant". Its
content is text, or a list of parts {"type": "text", "text": "How many?"}, which
are joined. All else (other lists, dictionaries, bytes, floats, booleans) is
refused with its record and field, since it would be read as Python writes it.

With `where` or `distinct` a source is read as a stream, and its records are
chosen on the way. A source may have millions of rows and many answers to each
question, as OpenThoughts3-1.2M does. Never more than `size` records are in
memory, each with only the fields that the run reads, however long the source
and however many its duplicates:

  in order   the first `size` that fit; the stream ends there
  random     those with the `size` smallest hashes of the seed and the question
             (without `distinct`, of the seed and the record's number)

Equal questions have equal hashes. So duplicates are found among the records
that are kept, since one that was given up never comes back, and which records
are chosen depends on the source and the seed alone.

The prompt of a multiple-choice record is the question, a line for each option,
and a request for the letter of the right option. The paper does not state its
prompt; this one is:

  Which of these is a noble gas?

  A. Nitrogen
  B. Neon

  Reason step by step, and put the letter of the right option in \boxed{}.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import heapq
import itertools
import json
import os
import pathlib
import re
import string
from typing import Any
from typing import TypeAlias

from prefix_distill.config import BUNDLED_TASKS
from prefix_distill.config import DatasetSpec
from prefix_distill.config import FIELD
from prefix_distill.data import bundled_tasks
from prefix_distill.data import gym
from prefix_distill.errors import JsonError
from prefix_distill.errors import parse_json
from prefix_distill.errors import shown
from prefix_distill.errors import UserError

# What a user asks: a text, or messages that end with the user's.
Message: TypeAlias = Mapping[str, str]
Question: TypeAlias = str | Sequence[Message]

# How many records are looked at before a run begins.
FIRST = 100
# A long source is searched for them in so many shards, and rows of each.
_SHARDS, _ROWS = 16, 200
# Rows of a .parquet file in memory at a time.
_BATCH = 256

_ROLES = ("system", "user", "assistant")
# Fields of a message that would be lost, and what to do about them.
_TOOLS = "take out records with calls of tools"
_MEDIA = "take out records that are not text alone"
_THOUGHTS = "write the thoughts into its content, between the model's own tags"
_EXTRAS = {
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "images": _MEDIA,
    "audios": _MEDIA,
    "videos": _MEDIA,
    "reasoning_content": _THOUGHTS,
    "reasoning": _THOUGHTS,
    "thinking": _THOUGHTS,
}
# White space, and signs of no width.
_BLANK = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]*")


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


def value(
    record: Mapping[str, Any], name: str, where: str, setting: str = ""
) -> Any:
  """Returns a field.

  Args:
    record: the record.
    name: the field's, dotted.
    where: the record's name in a sentence.
    setting: the one that names the field; empty for one of a data set's own.

  Raises:
    DataError: the record lacks the field.
  """
  named = f", which {setting} names" if setting else ""
  there = f"in {setting}" if setting else "in the config"
  try:
    return field(record, name)
  except KeyError as error:
    if name in record:  # A "None" in a .csv file is read as null.
      raise DataError(
          f"{where} has nothing in its field {shown(name)}{named}; fill it in a"
          f" local copy, or name another field {there}."
      ) from error
    raise DataError(
        f"{where} has no field {shown(name)}{named}; it has"
        f" {', '.join(record)}, so name one of these {there}."
    ) from error


def _refuse(found: Any, name: str, where: str, mend: str) -> DataError:
  shown = repr(found)
  shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
  return DataError(
      f"{where} has {shown} ({type(found).__name__}) in field {name!r}, which"
      f" is {mend}."
  )


_NO_TEXT = "no text; write it as text, or name another field in the config"


def text(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns a field that holds text; see `value`.

  Raises:
    DataError: it holds something else.
  """
  found = value(record, name, where)
  if not isinstance(found, str):
    raise _refuse(found, name, where, _NO_TEXT)
  return found


def answer(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns a field that holds text or an integer."""
  found = value(record, name, where)
  if isinstance(found, int) and not isinstance(found, bool):
    return str(found)
  return text(record, name, where)


def gold(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns a right answer; an evaluation has to have every one."""
  found = answer(record, name, where)
  check_sound(found, name, where)
  return found


def check_sound(found: str, name: str, where: str) -> None:
  """Refuses a text that an evaluation cannot use.

  Raises:
    DataError: see `fault`.
  """
  words = {
      "empty": "nothing but white space",
      "broken": "half of a character (a lone surrogate)",
  }
  wrong = fault(found)
  if wrong:
    raise DataError(
        f"{where} has {words[wrong]} in field {name!r}; repair it in a local"
        " copy, or take the record out."
    )


def completion(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns a field that holds text or a message of the assistant's."""
  found = value(record, name, where)
  if not _are_messages(found):
    return text(record, name, where)
  messages = _messages(found, name, where)
  if [message["role"] for message in messages] != ["assistant"]:
    raise _refuse(
        found,
        name,
        where,
        "not one message of the assistant's; name the field of the answer",
    )
  return messages[0]["content"]


def question(record: Mapping[str, Any], name: str, where: str) -> Question:
  """Returns a field that holds text or messages that end with the user's.

  A template, such as "{problem} Think aloud.", is filled; see `fill`.
  """
  if FIELD.search(name):
    return fill(record, name, where)
  found = value(record, name, where)
  if not _are_messages(found):
    return text(record, name, where)
  messages = _messages(found, name, where)
  roles = [message["role"] for message in messages]
  if roles[-1] != "user":
    raise _refuse(
        found,
        name,
        where,
        f"a list of messages that ends with the {roles[-1]}'s, not the user's;"
        " name a field that ends with the question",
    )
  if "system" in roles[1:]:
    raise _refuse(
        found,
        name,
        where,
        "a list of messages with a system message that is not the first one;"
        " put it first",
    )
  return messages


def last_turn(asked: Question) -> str:
  """Returns what the user says last."""
  return asked if isinstance(asked, str) else asked[-1]["content"]


def texts(asked: Question) -> list[str]:
  """Returns the text of every turn."""
  return [asked] if isinstance(asked, str) else [m["content"] for m in asked]


def fault(found: str) -> str:
  """Returns what makes a text useless: "empty", "broken" or nothing."""
  if _BLANK.fullmatch(found):
    return "empty"
  try:
    found.encode()
  except UnicodeEncodeError:
    return "broken"  # It has a lone surrogate, half of a character.
  return ""


def _are_messages(found: Any) -> bool:
  return (
      isinstance(found, list)
      and bool(found)
      and all(isinstance(x, dict) and "role" in x for x in found)
  )


def _messages(found: list[Any], name: str, where: str) -> list[Message]:
  """Returns messages with a role and a text each."""
  out = []
  for number, message in enumerate(found):
    at = f"{name}.{number}"
    role = message["role"]
    if role not in _ROLES:
      raise _refuse(
          role, f"{at}.role", where, f"none of the roles {', '.join(_ROLES)}"
      )
    for extra, mend in _EXTRAS.items():
      if message.get(extra):
        raise _refuse(
            message[extra], f"{at}.{extra}", where, f"not supported; {mend}"
        )
    content = _content(message.get("content"), f"{at}.content", where)
    out.append({"role": role, "content": content})
  return out


def _content(found: Any, name: str, where: str) -> str:
  """Returns a message's text, or that of its parts."""
  if isinstance(found, str):
    return found
  if not isinstance(found, list) or not found:
    raise _refuse(found, name, where, _NO_TEXT)
  for part in found:
    if not (
        isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ):
      raise _refuse(part, name, where, "no part of text; models here read text")
  return "".join(part["text"] for part in found)


def random_key(*parts: str | int) -> bytes:
  """Returns a pseudo-random sort key.

  The key is a hash of the parts. So it is the same on every machine and with
  every version of a library, and the records of a benchmark never change.
  """
  return hashlib.sha256(json.dumps(parts).encode()).digest()


def _parse(found: str, where: str) -> Any:
  """Parses JSON; one sentence for whatever is wrong with it."""
  try:
    return parse_json(found, finite=False)
  except JsonError as error:
    raise DataError(f"{where} is not JSON ({error}); repair it.") from error


# Records with their names in a sentence.
_Stream: TypeAlias = Iterator[tuple[str, dict[str, Any]]]


def _lines(path: pathlib.Path) -> _Stream:
  """Yields the records of a .jsonl file."""
  with path.open(encoding="utf-8-sig") as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      where = f"{path} line {number}"
      record = _parse(line, where)
      if not isinstance(record, dict):
        raise DataError(
            f"{where} is not a JSON object; write one record a line."
        )
      yield where, record


def _listed(path: pathlib.Path) -> _Stream:
  """Yields a .json file's list of records, or its lines as in .jsonl."""
  whole = path.read_text(encoding="utf-8-sig")
  if not whole.lstrip().startswith("["):
    yield from _lines(path)
    return
  for number, record in enumerate(_parse(whole, str(path)), 1):
    if not isinstance(record, dict):
      raise DataError(
          f"{path} record {number} is not a JSON object; write a list of"
          " objects."
      )
    yield f"{path} record {number}", record


def _rows(path: pathlib.Path) -> _Stream:
  """Yields the rows of a .parquet file, a few at a time."""
  import pyarrow.parquet  # Takes a second that most runs need not pay.

  number = 0
  with pyarrow.parquet.ParquetFile(path) as file:
    for batch in file.iter_batches(batch_size=_BATCH):
      for record in batch.to_pylist():
        number += 1
        yield f"{path} record {number}", record


_READERS = {".jsonl": _lines, ".json": _listed, ".parquet": _rows}


def _check(
    record: Mapping[str, Any],
    spec: DatasetSpec,
    names: Mapping[str, str],
    where: str,
) -> None:
  """Refuses a record that lacks a field, or whose fields hold other kinds.

  The module says what a field may hold.

  Args:
    record: the record.
    spec: with the names of some fields.
    names: of all fields, with the setting that names each; see `value`.
    where: the record's name in a sentence.
  """
  for name, setting in names.items():
    value(record, name, where, setting)
  question(record, spec.question, where)
  if spec.completion:
    completion(record, spec.completion, where)
  if spec.answer:
    answer(record, spec.answer, where)
  if len(spec.choices) > 1:
    for name in spec.choices:
      text(record, name, where)


def _read_file(
    path: pathlib.Path, spec: DatasetSpec, names: Mapping[str, str]
) -> list[dict[str, Any]]:
  """Reads and checks all records; each may have other fields."""
  out = []
  for where, record in _file(path):
    _check(record, spec, names, where)
    out.append(record)
  return out


def _file(path: pathlib.Path) -> _Stream:
  """Yields the records of a file of any kind.

  Raises:
    DataError: there is none, or it cannot be read.
  """
  kind = path.suffix.lower()
  if kind not in _READERS:
    raise DataError(
        f"{path} is a file of a kind that is not read; write it as"
        f" {', '.join(_READERS)}."
    )
  if not os.path.isfile(path):
    raise DataError(f"The file {path} does not exist; check data.*.source.")
  try:
    yield from _READERS[kind](path)
  except DataError:
    raise
  except Exception as error:  # pyarrow raises many kinds.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise DataError(
        f"{path} cannot be read as {kind[1:]} ({lines[0]}); write it again."
    ) from error


# More files than a data set's directory has; reading more would take minutes.
_MOST_FILES = 10_000


def _cache_of(directory: pathlib.Path, root: str) -> str:
  """Returns the cache directory for a local data set in its present state.

  `datasets` identifies a directory with a card by its last name alone. So it
  would read old records after a change, or another directory's records.
  """
  parts = []
  try:
    found = [*itertools.islice(directory.rglob("*"), _MOST_FILES + 1)]
    for path in sorted(found):
      inner = path.relative_to(directory).parts
      if path.is_file() and not any(x.startswith(".") for x in inner):
        parts += [str(path), path.stat().st_size, path.stat().st_mtime_ns]
  except OSError as error:
    raise DataError(
        f"{directory} cannot be read ({error.strerror}); give the directory of"
        " a data set, or the path of a .jsonl or .parquet file."
    ) from error
  if len(found) > _MOST_FILES:
    raise DataError(
        f"{directory} has more than {_MOST_FILES} files, as no data set has;"
        " give the directory of one, or the path of a .jsonl or .parquet file."
    )
  return str(pathlib.Path(root) / f"local-{random_key(*parts).hex()[:16]}")


def _load(spec: DatasetSpec, streaming: bool) -> Any:
  """Loads a data set, whole or as a stream."""
  import datasets  # Takes seconds that most runs need not pay.

  local, cache = pathlib.Path(spec.source), None
  if os.path.isdir(local):
    cache = _cache_of(local.resolve(), datasets.config.HF_DATASETS_CACHE)
  return datasets.load_dataset(
      spec.source,
      spec.subset or None,
      split=spec.split,
      cache_dir=cache,
      streaming=streaming,
  )


def _not_loaded(spec: DatasetSpec, error: Exception) -> DataError:
  reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
  return DataError(
      f"The data set {spec.source} (subset {spec.subset!r}, split"
      f" {spec.split!r}) cannot be loaded ({reason}); check the names, or"
      " give the path of a .jsonl or .parquet file."
  )


def _read_dataset(
    spec: DatasetSpec, names: Mapping[str, str], first: bool
) -> Sequence[dict[str, Any]]:
  """Loads a data set, or a list of its first records, which are streamed."""
  try:
    loaded = _load(spec, streaming=first)
    if first:
      return list(loaded.take(FIRST))
  except Exception as error:
    raise _not_loaded(spec, error) from error
  _check_nulls(loaded, spec.source, names)
  _check_rows(loaded, spec, names)
  return loaded


def _dataset_stream(spec: DatasetSpec, first: bool) -> _Stream:
  """Yields the records of a data set, which is not kept.

  If the first records are enough, some rows of shards that lie far apart come
  before all others: a long data set may begin with what is not wanted.
  """
  try:
    loaded = _load(spec, streaming=True)
    parts = [loaded]
    if first and loaded.num_shards > 1:
      count = min(loaded.num_shards, _SHARDS)
      places = (i * loaded.num_shards // count for i in range(count))
      parts = [loaded.shard(loaded.num_shards, i).take(_ROWS) for i in places]
      parts.append(loaded)
    for number, record in enumerate(itertools.chain(*parts), 1):
      yield f"{spec.source} record {number}", record
  except Exception as error:
    raise _not_loaded(spec, error) from error


def _check_nulls(loaded: Any, source: str, names: Mapping[str, str]) -> None:
  """Refuses nulls in a table's columns, which cost nothing to count."""
  for name, setting in names.items():
    if name not in loaded.column_names:
      continue
    column = loaded.data.column(name)
    if column.null_count:
      number = column.is_null().to_pylist().index(True)
      value(loaded[number], name, f"{source} record {number + 1}", setting)


def _check_rows(
    loaded: Any, spec: DatasetSpec, names: Mapping[str, str]
) -> None:
  """Checks the records of a table whose columns are not all plain text.

  A column of text needs no look at each row; one of messages may hold anything
  in any of them.
  """
  wanted = {name.partition(".")[0] for name in names}
  columns = [name for name in loaded.column_names if name in wanted]
  kinds = {str(loaded.data.column(name).type) for name in columns}
  if kinds <= {"string", "large_string"}:
    return
  table = loaded.select_columns(columns)
  for start in range(0, len(table), _BATCH):
    batch = table[start : start + _BATCH]
    for i, values in enumerate(zip(*batch.values(), strict=True)):
      record = dict(zip(batch, values, strict=True))
      where = f"{spec.source} record {start + i + 1}"
      try:
        _check(record, spec, names, where)
      except DataError:  # Said of the whole record, with all of its fields.
        _check(loaded[start + i], spec, names, where)


def _is_data_set(spec: DatasetSpec) -> bool:
  """Whether `datasets` reads it: no task, nor a single file."""
  path = pathlib.Path(spec.source)
  named = path.suffix.lower() in _READERS or os.path.isfile(path)
  made = spec.is_gym or spec.source in BUNDLED_TASKS
  return not made and (os.path.isdir(path) or not named)


def _read(
    spec: DatasetSpec, names: Mapping[str, str], first: bool
) -> Sequence[dict[str, Any]]:
  if spec.source in BUNDLED_TASKS:
    try:
      style = spec.subset or "clean"
      if spec.source == "sums_task":
        return bundled_tasks.SumsTask(spec.split, spec.size, style)
      if spec.source == "chain_task":
        return bundled_tasks.ChainTask(spec.split, spec.size, style)
      if style == "guided":
        return bundled_tasks.GuidedTask(spec.split, spec.size)
      if style == "rewrite":
        return bundled_tasks.RewriteTask(spec.split, spec.size)
      return bundled_tasks.MathTask(spec.split, spec.size, style)
    except ValueError as error:
      raise DataError(str(error)) from error
  if spec.is_gym:
    return gym.Entries(spec)
  if _is_data_set(spec):
    return _read_dataset(spec, names, first)
  return _read_file(pathlib.Path(spec.source), spec, names)


def _fits(
    record: Mapping[str, Any],
    spec: DatasetSpec,
    where: str,
    others: dict[str, set[str]],
) -> bool:
  """Whether a record's fields hold what `where` wants.

  Args:
    record: the record.
    spec: with `where`.
    where: the record's name in a sentence.
    others: gets some of what the fields of other records hold.
  """
  for name, wanted in spec.wanted.items():
    try:
      field(record, name)
    except KeyError as error:
      raise DataError(
          f"{where} has no field {name!r}, which `where` {spec.where} wants;"
          f" it has {', '.join(record)}, so name one of these there, or set"
          " `where` to () for all records."
      ) from error
    found = answer(record, name, where)
    if found != wanted:
      seen = others.setdefault(name, set())
      if len(seen) < 8:
        seen.add(found[:40])
      return False
  return True


def _pruned(found: Any, paths: Sequence[Sequence[str]]) -> Any:
  """Returns the parts of a record, or of a value in it, that have a path."""
  if not all(paths):  # A path ends here, so that all is wanted.
    return found
  inner: dict[str, list[Sequence[str]]] = {}
  for head, *rest in paths:
    inner.setdefault(head, []).append(rest)
  if isinstance(found, list):
    count = max(map(int, inner)) + 1
    return [
        _pruned(x, inner[str(i)]) if str(i) in inner else None
        for i, x in enumerate(found[:count])
    ]
  return {name: _pruned(found[name], rest) for name, rest in inner.items()}


def _identity(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> str:
  """Returns the same text for equal questions, but for their white space."""
  asked = texts(question(record, spec.question, where))
  return random_key(*(" ".join(turn.split()) for turn in asked)).hex()


class _Choice:
  """The records that are chosen from a stream; see the module.

  Attributes:
    kept: the records by their numbers.
  """

  def __init__(self, spec: DatasetSpec, most: int, random: bool):
    """Starts with none.

    Args:
      spec: which records.
      most: how many at most; 0 for no limit.
      random: whether they are drawn, or the first ones.
    """
    self._spec, self._most, self._random = spec, most, random
    self._keys: set[int | str] = set()
    # Ranks, keys and numbers; the first is the next to be given up.
    self._heap: list[tuple[int, int | str, int]] = []
    self.kept: dict[int, Mapping[str, Any]] = {}

  @property
  def is_full(self) -> bool:
    return bool(self._most) and len(self.kept) == self._most

  @property
  def is_settled(self) -> bool:
    """Whether no later record can change the choice."""
    return self.is_full and not self._random

  def offer(
      self, number: int, record: Mapping[str, Any], where: str
  ) -> bool:
    """Takes a record, unless it is a duplicate or is not drawn."""
    spec = self._spec
    key = _identity(record, spec, where) if spec.distinct else number
    if key in self._keys:
      return False
    if self._random:
      rank = -int.from_bytes(random_key(spec.seed, key))
      entry = (rank, key, number)
      if not self.is_full:
        heapq.heappush(self._heap, entry)
      elif rank < self._heap[0][0]:
        return False
      else:
        _, gone, place = heapq.heapreplace(self._heap, entry)
        self._keys.remove(gone)
        del self.kept[place]
    self._keys.add(key)
    self.kept[number] = record
    return True


def _choose(
    spec: DatasetSpec, names: Mapping[str, str], first: bool
) -> "Records":
  """Reads a source as a stream, and keeps the chosen records.

  Raises:
    DataError: see `read`; or no record fits.
  """
  stream = _file(pathlib.Path(spec.source))
  if _is_data_set(spec):
    stream = _dataset_stream(spec, first)
  else:
    first = False
  chosen = _Choice(
      spec, FIRST if first else spec.size, spec.random and not first
  )
  paths = [name.split(".") for name in names]
  others: dict[str, set[str]] = {}
  for number, (where, record) in enumerate(stream):
    if _fits(record, spec, where, others):
      _check(record, spec, names, where)
      chosen.offer(number, _pruned(record, paths), where)
    if chosen.is_settled:
      break
  if not chosen.kept and others:
    found = "; ".join(
        f"{name} holds {', '.join(map(repr, sorted(seen)))}"
        for name, seen in others.items()
    )
    raise DataError(
        f"{spec.source} has no record with {', '.join(spec.where)}"
        f" ({found}); change `where` in the data set's settings."
    )
  whole = not first or not chosen.is_full
  return Records(spec.source, chosen.kept, sorted(chosen.kept), whole)


def fill(record: Mapping[str, Any], template: str, where: str) -> str:
  """Replaces the names in braces by the record's fields.

  A field may hold what a question, an answer or a completion may hold. The last
  message stands for a list of messages.

  Raises:
    DataError: the record lacks one, or it holds something else.
  """
  return FIELD.sub(lambda match: filled(record, match[1], where), template)


def filled(record: Mapping[str, Any], name: str, where: str) -> str:
  """Returns the text of one field; see `fill`."""
  found = value(record, name, where)
  if not _are_messages(found):
    return answer(record, name, where)
  if len(found) == 1 and found[0]["role"] == "assistant":
    return completion(record, name, where)
  return last_turn(question(record, name, where))


class Records(Sequence):
  """Some records of a source.

  Attributes:
    numbers: which ones, from 0.
    is_whole: whether no record was left at the source.
  """

  def __init__(
      self,
      source: str,
      records: Sequence[Any] | Mapping[int, Any],
      numbers: Sequence[int],
      is_whole: bool,
  ):
    self._source, self._records, self.numbers = source, records, numbers
    self.is_whole = is_whole

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
    spec: DatasetSpec,
    first: bool = False,
    more: Mapping[str, str] | None = None,
) -> Records:
  """Reads the records and checks that each has the named fields.

  Args:
    spec: where from, and which.
    first: whether the first records are enough; then no data set is downloaded
      whole.
    more: names of fields that the records need besides those of `spec`, with
      the setting that names each.

  Raises:
    DataError: the source is missing, unreadable or empty, or a record lacks a
      field; the message names a file's line.
    GymError: see `gym.Entries`.
  """
  if spec.is_gym:  # Not all of its tasks have one right answer.
    spec = dataclasses.replace(spec, answer="")
  asked = FIELD.findall(spec.question) or [spec.question]
  own = (*asked, spec.answer, spec.completion)
  mine = dict.fromkeys(filter(None, (*own, *spec.choices)), "")
  names = mine | dict(more or {}) | mine  # In this order, but `mine` counts.
  streamed = bool(spec.where) or spec.distinct
  records = (_choose if streamed else _read)(spec, names, first)
  if len(records) == 0:
    raise DataError(
        f"{spec.source} has no records; check its contents and the split."
    )
  if streamed:
    return records
  # Records of a table share their fields, so the first stands for all.
  _check(records[0], spec, names, f"{spec.source} record 1")
  is_whole = not (first and _is_data_set(spec)) or len(records) < FIRST
  return Records(
      spec.source, records, _numbers(spec, len(records)), is_whole
  )


def peek(spec: DatasetSpec) -> Mapping[str, Any]:
  """Returns the first record as it is, whatever its fields are called.

  Raises:
    DataError: the source is missing, unreadable or empty.
  """
  if _is_data_set(spec) or spec.is_gym or spec.source in BUNDLED_TASKS:
    found = _read(spec, {}, first=True)
  else:
    stream = _file(pathlib.Path(spec.source))
    found = [record for _, record in itertools.islice(stream, 1)]
  if not len(found):
    raise DataError(
        f"{spec.source} has no records; check its contents and the split."
    )
  return found[0]


LETTERS = tuple(string.ascii_uppercase)
_REQUEST = (
    "Reason step by step, and put the letter of the right option in \\boxed{}."
)


def _options(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> Sequence[str]:
  """Returns the options in the record's order."""
  if len(spec.choices) > 1:
    options = [text(record, name, where) for name in spec.choices]
    for name, option in zip(spec.choices, options, strict=True):
      check_sound(option, name, where)
    return options
  (name,) = spec.choices
  found = value(record, name, where)
  texts = isinstance(found, list) and all(isinstance(x, str) for x in found)
  if texts and 2 <= len(found) <= len(LETTERS):
    for option in found:
      check_sound(option, name, where)
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
  """Returns the letter that a field holds, or that of the number it holds."""
  number = value(record, name, where)
  if type(number) is int and 0 <= number < count:
    return LETTERS[number]
  found = answer(record, name, where).strip()
  if found.upper() not in LETTERS[:count]:
    raise DataError(
        f"{where} has {found!r} in field {name!r}, which is none of the letters"
        f" A to {LETTERS[count - 1]} of its {count} options; name the field"
        " that holds the right option's letter, or its number as an integer"
        " from 0, or a field of dataset.choices that always holds the right"
        " option."
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
  read_text = fill if FIELD.search(spec.question) else text
  question = read_text(record, spec.question, where)
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
