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
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import string
from typing import Any
from typing import TypeAlias

from prefix_distill import strict_json
from prefix_distill.config import BUNDLED_TASKS
from prefix_distill.config import DatasetSpec
from prefix_distill.config import FIELD
from prefix_distill.data import bundled_tasks
from prefix_distill.data import gym
from prefix_distill.errors import UserError

# What a user asks: a text, or messages that end with the user's.
Message: TypeAlias = Mapping[str, str]
Question: TypeAlias = str | Sequence[Message]

# How many records are looked at before a run begins.
FIRST = 100

_ROLES = ("system", "user", "assistant")


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
  """Returns a field that holds text or messages that end with the user's."""
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
  if not found.strip():
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
    for extra in ("tool_calls", "function_call"):
      if message.get(extra):
        raise _refuse(
            message[extra],
            f"{at}.{extra}",
            where,
            "not supported; take out records with calls of tools",
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


def check_kinds(
    record: Mapping[str, Any], spec: DatasetSpec, where: str
) -> None:
  """Refuses a record whose fields hold what they may not; see the module."""
  question(record, spec.question, where)
  if spec.completion:
    completion(record, spec.completion, where)
  if spec.answer:
    answer(record, spec.answer, where)
  if len(spec.choices) > 1:
    for name in spec.choices:
      text(record, name, where)


def random_key(*parts: str | int) -> bytes:
  """Returns a pseudo-random sort key.

  The key is a hash of the parts. So it is the same on every machine and with
  every version of a library, and the records of a benchmark never change.
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


def _parse(found: str, where: str) -> Any:
  """Parses JSON; one sentence for whatever is wrong with it."""
  try:
    return strict_json.parse(found, finite=False)
  except strict_json.JsonError as error:
    raise DataError(f"{where} is not JSON ({error}); repair it.") from error


def _read_jsonl(
    path: pathlib.Path, spec: DatasetSpec, names: Sequence[str]
) -> list[dict[str, Any]]:
  """Reads and checks all lines; each line may have other fields."""
  out = []
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
      _check_fields(record, names, where)
      check_kinds(record, spec, where)
      out.append(record)
  return out


def _read_json(
    path: pathlib.Path, spec: DatasetSpec, names: Sequence[str]
) -> list[dict[str, Any]]:
  """Reads a list of records, or lines as in .jsonl."""
  whole = path.read_text(encoding="utf-8-sig")
  if not whole.lstrip().startswith("["):
    return _read_jsonl(path, spec, names)
  found = _parse(whole, str(path))
  for number, record in enumerate(found, 1):
    if not isinstance(record, dict):
      raise DataError(
          f"{path} record {number} is not a JSON object; write a list of"
          " objects."
      )
    _check_fields(record, names, f"{path} record {number}")
    check_kinds(record, spec, f"{path} record {number}")
  return found


def _read_parquet(
    path: pathlib.Path, spec: DatasetSpec, names: Sequence[str]
) -> list[dict[str, Any]]:
  import pyarrow.parquet  # Takes a second that most runs need not pay.

  found = pyarrow.parquet.read_table(path).to_pylist()
  for number, record in enumerate(found, 1):
    _check_fields(record, names, f"{path} record {number}")
    check_kinds(record, spec, f"{path} record {number}")
  return found


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


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


def _read_dataset(
    spec: DatasetSpec, names: Sequence[str], first: bool = False
) -> Sequence[dict[str, Any]]:
  """Loads a data set, or a list of its first records, which are streamed."""
  import datasets  # Takes seconds that most runs need not pay.

  local, cache = pathlib.Path(spec.source), None
  if os.path.isdir(local):
    cache = _cache_of(local.resolve(), datasets.config.HF_DATASETS_CACHE)
  try:
    loaded = datasets.load_dataset(
        spec.source,
        spec.subset or None,
        split=spec.split,
        cache_dir=cache,
        streaming=first,
    )
    if first:
      return list(loaded.take(FIRST))
  except Exception as error:
    reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
    raise DataError(
        f"The data set {spec.source} (subset {spec.subset!r}, split"
        f" {spec.split!r}) cannot be loaded ({reason}); check the names, or"
        " give the path of a .jsonl or .parquet file."
    ) from error
  _check_nulls(loaded, spec.source, names)
  return loaded


def _check_nulls(loaded: Any, source: str, names: Sequence[str]) -> None:
  """Refuses nulls in a table's columns, which cost nothing to count."""
  for name in names:
    if name not in loaded.column_names:
      continue
    column = loaded.data.column(name)
    if column.null_count:
      number = column.is_null().to_pylist().index(True)
      _check_fields(
          loaded[number], [name], f"{source} record {number + 1}"
      )


def _is_data_set(spec: DatasetSpec) -> bool:
  """Whether `datasets` reads it: no task, nor a single file."""
  path = pathlib.Path(spec.source)
  named = path.suffix.lower() in _READERS or os.path.isfile(path)
  made = spec.is_gym or spec.source in BUNDLED_TASKS
  return not made and (os.path.isdir(path) or not named)


def _read(
    spec: DatasetSpec, names: Sequence[str], first: bool
) -> Sequence[dict[str, Any]]:
  if spec.source in BUNDLED_TASKS:
    try:
      style = spec.subset or "clean"
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
  path = pathlib.Path(spec.source)
  kind = path.suffix.lower()
  if _is_data_set(spec):
    return _read_dataset(spec, names, first)
  if kind not in _READERS:
    raise DataError(
        f"{path} is a file of a kind that is not read; write it as"
        f" {', '.join(_READERS)}."
    )
  if not os.path.isfile(path):
    raise DataError(f"The file {path} does not exist; check data.*.source.")
  try:
    return _READERS[kind](path, spec, names)
  except DataError:
    raise
  except Exception as error:  # pyarrow raises many kinds.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise DataError(
        f"{path} cannot be read as {kind[1:]} ({lines[0]}); write it again."
    ) from error


def fill(record: Mapping[str, Any], template: str, where: str) -> str:
  """Replaces the names in braces by the record's fields.

  A field holds what a question, an answer or a completion may. Of messages
  that is the text of the last one.

  Raises:
    DataError: the record lacks one, or it holds something else.
  """
  return FIELD.sub(lambda match: _filled(record, match[1], where), template)


def _filled(record: Mapping[str, Any], name: str, where: str) -> str:
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
      records: Sequence[Any],
      numbers: Sequence[int],
      is_whole: bool = True,
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
    spec: DatasetSpec, first: bool = False, more: Sequence[str] = ()
) -> Records:
  """Reads the records and checks that each has the named fields.

  Args:
    spec: where from, and which.
    first: whether the first records are enough; then no data set is downloaded
      whole.
    more: names of fields that the records need besides those of `spec`.

  Raises:
    DataError: the source is missing, unreadable or empty, or a record lacks a
      field; the message names a file's line.
    GymError: see `gym.Entries`.
  """
  if spec.is_gym:  # Not all of its tasks have one right answer.
    spec = dataclasses.replace(spec, answer="")
  own = (spec.question, spec.answer, spec.completion)
  names = [name for name in dict.fromkeys((*own, *spec.choices, *more)) if name]
  records = _read(spec, names, first)
  if len(records) == 0:
    raise DataError(
        f"{spec.source} has no records; check its contents and the split."
    )
  # Records of a table share their fields, so the first stands for all.
  _check_fields(records[0], names, f"{spec.source} record 1")
  check_kinds(records[0], spec, f"{spec.source} record 1")
  is_whole = not (first and _is_data_set(spec)) or len(records) < FIRST
  return Records(
      spec.source, records, _numbers(spec, len(records)), is_whole
  )


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
  """Returns the letter that a field holds."""
  found = answer(record, name, where).strip()
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
