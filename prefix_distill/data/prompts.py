"""Batches of prompts and completions, and the teacher's turns that rewrite.

Grain shuffles, repeats and prefetches. This module turns a record into token
rows. Prompts are padded on the left to one static length, and the teacher's
own prompts to another.

Every process reads whole batches, and its devices take their rows of them.
Encoding prompts is cheap. So the state of the stream, the contents of a batch
and the records that are dropped do not depend on the number of processes.

A record that is no use is left out of training, and counted in `dropped`:

  long      a prompt or a completion is longer than its static length
  empty     the question, the completion or a field of the teacher's prompt is
            blank
  broken    one of them has a lone surrogate, half of a character
  lost      the encoded prompt does not read as the question: the template left
            it out, or the tokenizer has no tokens for it
  template  the chat template refuses the record's messages
  markup    the completion has a token that ends or opens a turn, or opens
            again what the prompt has opened
  asked     an evaluation set asks the same, in a task of reasoning-gym
  unmade    reasoning-gym fails to make it

A completion is made to follow its prompt. If it begins with what the prompt
ends with (`<think>`), or ends with a stop token's text, that is cut off: the
prompt and the end of the row have them. Such records, and those whose questions
have text that looks like a token (`data/tokenizer.py`), are counted in `noted`.
The first records are looked at before the run begins, and what was found in
them is said (`PromptIterator.notes`). An evaluation leaves out what is long,
and refuses the other kinds, since its accuracy is of all problems.

`Rewriting` is host work between two samplings: the student's answers become
prompts of the teacher, and what the teacher writes becomes what the student
learns.

`check` tests on one question what both models are fed. A mistake there makes no
step fail: the run only learns less, or learns something else.
"""

import bisect
import collections
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import json
import re
from typing import Any

import grain
import numpy as np

from prefix_distill.config import Config
from prefix_distill.config import DataSpec
from prefix_distill.config import FIELD
from prefix_distill.data import gym
from prefix_distill.data import records
from prefix_distill.data.records import Question
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.data.tokenizer import TokenizerError
from prefix_distill.errors import ConfigError
from prefix_distill.errors import counted
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

# Why the teacher's rewriting of an answer fails; see `Rewriting`.
REWRITING_FAILURES = (
    "cut",
    "unclosed",
    "unmarked",
    "markup",
    "empty",
    "long",
)
_MARKUP = re.compile(r"<[^<>\s]+>")
_OPEN, _CLOSE = "<think>", "</think>"
# Any question; a template's last words do not depend on it.
_PROBE = "What is 7 + 5?"
# How many records are looked at for their suffixes, and at least for repeats.
_LOOKED = 1000
# A row of tokens and its mask; None for a text that is too long.
_Row = tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class Example:
  """One encoded record.

  Attributes:
    index: the record's number in its data set.
    prompt: int32 [S], padded on the left.
    prompt_mask: bool [S].
    completion: int32 [C], padded on the right; None without completions.
    completion_mask: bool [C].
    teacher_prompt: int32 [S'], padded on the left; None if the teacher reads
      the student's prompt.
    teacher_prompt_mask: bool [S'].
    noted: what was done to it, of `_NOTED`.
  """

  index: int
  prompt: np.ndarray
  prompt_mask: np.ndarray
  completion: np.ndarray | None = None
  completion_mask: np.ndarray | None = None
  teacher_prompt: np.ndarray | None = None
  teacher_prompt_mask: np.ndarray | None = None
  noted: tuple[str, ...] = ()

  @property
  def content(self) -> tuple[bytes, ...]:
    """The bytes of every row of tokens; records that read alike have equal."""
    rows = (self.prompt, self.completion, self.teacher_prompt)
    return tuple(row.tobytes() for row in rows if row is not None)


# Why a record is dropped, and what is done to one that is not.
_DROPPED = {
    "long": "longer than its static length",
    "empty": "empty in a field that is used",
    "broken": "with half of a character (a lone surrogate)",
    "lost": "the encoded prompt does not read as the question",
    "template": "the chat template refuses its messages",
    "markup": "the completion has a token that ends or opens a turn",
    "asked": "an evaluation set asks the same",
    "unmade": "reasoning-gym fails to make it",
}
_NOTED = {
    "plain": "text in a prompt looks like a token and is read as plain text",
    "opened": "the completion begins with what the prompt ends with, which is"
    " cut off",
    "ended": "the completion ends with a stop token's text, which is cut off",
}


def _pad(
    tokenizer: Tokenizer, tokens: Sequence[int], length: int, left: bool
) -> _Row:
  """Pads tokens on one side; returns None if there are too many."""
  if len(tokens) > length:
    return None
  row = np.full(length, tokenizer.pad_id, np.int32)
  mask = np.zeros(length, bool)
  start = length - len(tokens) if left else 0
  kept = slice(start, start + len(tokens))
  row[kept], mask[kept] = tokens, True
  return row, mask


def stack(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], numbers: Sequence[int]
) -> PromptBatch:
  """Returns NumPy prompts of padded rows and masks, with their numbers."""
  tokens, masks = (np.stack(x) for x in zip(*rows, strict=True))
  return PromptBatch(tokens, masks, np.asarray(numbers, np.int32))


class Dropped(Exception):
  """A record that is no use; its text is the reason, of `_DROPPED`."""


def _encode_question(
    tokenizer: Tokenizer,
    question: Question,
    max_len: int,
    suffix: str,
    own: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a prompt, or the teacher's own.

  Raises:
    Dropped: it cannot be used.
  """
  texts = records.texts(question)
  faults = [records.fault(text) for text in texts]
  if "broken" in faults:
    raise Dropped("broken")
  if faults[-1]:
    raise Dropped("empty")
  if records.fault(suffix) == "broken":
    raise Dropped("broken")
  if not tokenizer.fits(question, max_len):
    raise Dropped("long")
  try:
    encode = tokenizer.encode_own if own else tokenizer.encode_prompt
    tokens = encode(question, suffix)
  except TokenizerError as error:
    raise Dropped("template") from error
  row = _pad(tokenizer, tokens, max_len, left=True)
  if row is None:
    raise Dropped("long")
  if not tokenizer.reads_back(question, tokens):
    raise Dropped("lost")
  return row


def encode_prompt(
    tokenizer: Tokenizer, question: Question, max_len: int, suffix: str
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns a prompt's padded row and mask [S]; None if it cannot be used."""
  try:
    return _encode_question(tokenizer, question, max_len, suffix)
  except Dropped:
    return None


def encode_problem(
    tokenizer: Tokenizer,
    question: Question,
    max_len: int,
    suffix: str,
    where: str,
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns a problem's padded row and mask [S]; None if it is too long.

  Raises:
    DataError: it cannot be used for another reason.
  """
  try:
    return _encode_question(tokenizer, question, max_len, suffix)
  except Dropped as dropped:
    reason = str(dropped)
    if reason == "long":
      return None
    because = f" ({dropped.__cause__})" if dropped.__cause__ else ""
    raise records.DataError(
        f"{where} cannot be used: {_DROPPED[reason]}{because}; repair it in a"
        " local copy, or take it out."
    ) from dropped


def _encode_completion(
    tokenizer: Tokenizer,
    text: str,
    max_len: int,
    opening: str,
    ends: Sequence[int],
) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
  """Encodes a completion, and says what was cut off.

  Args:
    tokenizer: the tokenizer.
    text: the completion.
    max_len: of the row, with the stop token.
    opening: what the prompt ends with.
    ends: tokens that end an answer besides the tokenizer's own.

  Raises:
    Dropped: it cannot be used.
  """
  if len(text) > max_len * tokenizer.longest_text:
    raise Dropped("long")
  text, noted = _trimmed(tokenizer, text, opening, ends)
  fault = records.fault(text)
  if fault:
    raise Dropped(fault)
  tokens = [*tokenizer.encode(text), tokenizer.end_id]
  if len(tokens) > max_len:
    raise Dropped("long")
  again = opening.strip() and text.lstrip().startswith(
      tuple(_MARKUP.findall(opening))
  )
  if again or not tokenizer.control_ids.isdisjoint(tokens[:-1]):
    raise Dropped("markup")
  return _pad(tokenizer, tokens, max_len, left=False), noted


def _trimmed(
    tokenizer: Tokenizer, text: str, opening: str, ends: Sequence[int]
) -> tuple[str, list[str]]:
  """Cuts off what the prompt and the row's end have already."""
  noted, start = [], text.lstrip()
  if opening and start.startswith(opening.strip()):
    text, noted = start[len(opening.strip()) :], ["opened"]
    # The white space behind it is the prompt's, too, if the prompt has any.
    text = text.removeprefix(opening[len(opening.rstrip()) :])
  end = tokenizer.end_of_text(text, ends)
  return text[:end], noted + ["ended"] * (end < len(text))


def questions(
    spec: DataSpec, record: Mapping[str, Any], where: str = ""
) -> tuple[Question, Question | None]:
  """Returns what the student and the teacher are asked; None for the same.

  The teacher's prompt takes the place of the last turn. Turns before it stay.
  """
  where = where or f"{spec.train.source} record 1"
  question = records.question(record, spec.train.question, where)
  if not spec.teacher_prompt:
    return question, None
  text = records.fill(record, spec.teacher_prompt, where)
  return question, _with_last(question, text)


def _with_last(question: Question, text: str) -> Question:
  """Returns a question with another last turn."""
  if isinstance(question, str):
    return text
  return [*question[:-1], {"role": "user", "content": text}]


def check_room(
    tokenizer: Tokenizer, spec: DataSpec, question: Question
) -> None:
  """Refuses a prompt length that no prompt can fit.

  Raises:
    ConfigError: the length is too short even for an empty question.
  """
  least = len(tokenizer.encode_prompt(_with_last(question, ""), spec.suffix))
  if spec.max_prompt_len <= least:
    length = len(tokenizer.encode_prompt(question, spec.suffix))
    raise ConfigError(
        f"data.max_prompt_len is {spec.max_prompt_len}, but the chat template"
        f" alone takes {least} tokens, which leaves no room for a question;"
        f" the first prompt needs {length}, so set it to that or more."
    )


def check_teacher_room(
    tokenizer: Tokenizer, spec: DataSpec, question: Question
) -> None:
  """Refuses a length that no prompt of the teacher's own can fit.

  Args:
    tokenizer: the teacher's tokenizer.
    spec: the data settings, with `teacher_prompt`.
    question: the teacher's question for the first record.

  Raises:
    ConfigError: the length is too short even if all fields are empty.
  """
  empty = _with_last(question, FIELD.sub("", spec.teacher_prompt))
  least, length = (
      len(tokenizer.encode_own(asked, spec.suffix))
      for asked in (empty, question)
  )
  if spec.teacher_prompt_len <= least:
    raise ConfigError(
        "The teacher's prompts have room for"
        f" {spec.teacher_prompt_len} tokens, but data.teacher_prompt takes"
        f" {least} with empty fields; the first prompt needs {length}, so set"
        " data.max_teacher_prompt_len to that or more."
    )


def _rows(tokens: np.ndarray, mask: np.ndarray) -> Iterator[bytes]:
  """Yields the bytes of each prompt [B, S], without its padding."""
  for row, kept in zip(tokens, mask, strict=True):
    yield row[kept].tobytes()


class PromptIterator:
  """An endless, seeded stream of whole batches, the same in all processes.

  Attributes:
    records: all records, as they are read.
    question: the first record's whose prompts can be encoded.
    teacher_question: what the teacher is asked there; None for the same.
    number: that record's, from 0.
    suffixes: those of the records, the one of that record first; of many
      records, some that lie far apart are looked at.
    notes: sentences about the first records, for the user to read.
    dropped: records so far that were no use.
    reasons: how many of them for which reason; see the module.
    noted: records so far of which something was cut or read as plain text.
  """

  def __init__(
      self,
      spec: DataSpec,
      tokenizer: Tokenizer,
      *,
      seed: int,
      completion_len: int = 0,
      teacher_tokenizer: Tokenizer | None = None,
      first: bool = False,
      asked: Iterable[PromptBatch] = (),
  ):
    """Opens the records.

    Args:
      spec: the records, the batch size and the prompt lengths.
      tokenizer: the student's tokenizer.
      seed: of the shuffle; each epoch has an order of its own.
      completion_len: with completions of up to this length; 0 for none.
      teacher_tokenizer: the teacher's; needed for a prompt of its own.
      first: see `records.read`.
      asked: the problems of evaluation sets, which a task of reasoning-gym is
        not to ask in training.

    Raises:
      UserError: see `records.read`.
      ConfigError: the prompt length leaves no room for a question, or no record
        can be used.
    """
    more = dict.fromkeys(spec.suffix_fields, "data.suffix")
    more |= dict.fromkeys(spec.teacher_fields, "data.teacher_prompt")
    self.records = records.read(spec.train, first, more)
    self._spec, self._chat, self._teacher_tokenizer = (
        spec,
        tokenizer,
        teacher_tokenizer,
    )
    self._completion_len = completion_len
    self._opening = functools.cache(tokenizer.opening)
    self._ends = teacher_tokenizer.stop_ids if teacher_tokenizer else ()
    self._asked = frozenset(
        row
        for batch in (asked if spec.train.is_gym else ())
        for row in _rows(batch.tokens, batch.mask)
    )
    self._epoch = len(self.records)
    self._whole = not first or self.records.is_whole
    self.notes = self._survey()
    stream = grain.MapDataset.range(self._epoch).seed(seed).shuffle()
    stream = stream.repeat().map(self._encode)
    # Records that are no use come out as their reasons, to be counted.
    self._iterator = iter(
        stream.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=64),
        )
    )
    self.dropped = 0
    self.reasons = collections.Counter()
    self.noted = collections.Counter()

  def _survey(self) -> list[str]:
    """Looks at the first records; returns sentences about them.

    Raises:
      ConfigError: no record can be used.
    """
    count = min(self._epoch, records.FIRST)
    found = [self._encode(i) for i in range(count)]
    shown = (i for i, x in enumerate(found) if self._is_shown(i, x))
    self.number = next(shown, -1)
    if self.number >= 0:
      self._show()
    self._check_any(found)
    if self.number < 0:  # More may follow, but these are not what was meant.
      raise ConfigError(self._none_left(collections.Counter(found)))
    counts = collections.Counter(x for x in found if isinstance(x, str))
    counts.update(
        note for x in found if isinstance(x, Example) for note in x.noted
    )
    notes = [
        f"{'Dropped' if name in _DROPPED else 'Changed'} {number} of the first"
        f" {count} records of {self._spec.train.source}:"
        f" {(_DROPPED | _NOTED)[name]}."
        for name, number in counts.items()
    ]
    return notes + self._repeats(found)

  def _repeats(self, found: Sequence[Example | str]) -> list[str]:
    """Returns a warning if the source has fewer prompts than a batch.

    It counts different prompts, and skips long sources.

    Args:
      found: the first records, encoded.
    """
    wanted, seen = self._spec.batch_size, set()
    if not self._whole or self._epoch > max(_LOOKED, 4 * wanted):
      return []
    later = map(self._encode, range(len(found), self._epoch))
    for example in itertools.chain(found, later):
      if isinstance(example, Example):
        seen.add(example.content)
      if len(seen) == wanted:
        return []
    return [
        f"Of {self._spec.train.source},"
        f" {counted(len(seen), 'different prompt')} can be used, fewer"
        f" than data.batch_size {wanted}, so that prompts repeat within an"
        " update; add prompts, or lower data.batch_size."
    ]

  def _is_shown(self, number: int, example: Example | str) -> bool:
    """Whether a record's prompts can be encoded, long or not, in no time."""
    if example not in ("long", "markup"):
      return isinstance(example, Example)
    question, theirs = questions(self._spec, self.records[number])
    room = 4 * self._spec.max_prompt_len
    if theirs is not None and records.fault(records.last_turn(theirs)):
      return False
    return self._chat.fits(question, room) and (
        theirs is None
        or self._teacher_tokenizer.fits(
            theirs, 4 * self._spec.teacher_prompt_len
        )
    )

  def _show(self) -> None:
    """Keeps the questions of the record that checks and users look at."""
    spec, record = self._spec, self.records[self.number]
    where = f"{spec.train.source} record {self.number + 1}"
    self.question, self.teacher_question = questions(spec, record, where)
    own = records.fill(record, spec.suffix, where)
    self.suffixes = list(dict.fromkeys([own, *self._some_suffixes()]))
    spec = dataclasses.replace(spec, suffix=own)
    check_room(self._chat, spec, self.question)
    if self.teacher_question is not None:
      check_teacher_room(self._teacher_tokenizer, spec, self.teacher_question)

  def _some_suffixes(self) -> Iterator[str]:
    spec = self._spec
    if not spec.suffix_fields:
      return
    last = self._epoch - 1
    for number in np.unique(np.linspace(0, last, _LOOKED, dtype=int)):
      where = f"{spec.train.source} record {number + 1}"
      yield records.fill(self.records[int(number)], spec.suffix, where)

  def _check_any(self, found: Sequence[Example | str]) -> None:
    """Refuses records of which none can be used.

    Raises:
      ConfigError: no record can be used.
    """
    if any(isinstance(x, Example) for x in found) or not self._whole:
      return
    reasons = collections.Counter(found)
    for i in range(len(found), self._epoch):
      example = self._encode(i)
      if isinstance(example, Example):
        return
      reasons[example] += 1
    raise ConfigError(self._none_left(reasons))

  def _none_left(self, reasons: Mapping[str, int]) -> str:
    if set(reasons) == {"long"}:
      return self._all_too_long()
    counts = "; ".join(f"{n}: {_DROPPED[name]}" for name, n in reasons.items())
    return (
        f"{self._spec.train.source} has {self._epoch} records, and none can be"
        f" used ({counts}); repair them, or name other fields in data.train."
    )

  def _encode(self, number: int) -> Example | str:
    """Returns an example, or the reason why a record is no use."""
    try:
      return self._example(number, self.records[number])
    except Dropped as dropped:
      return str(dropped)
    except gym.NotMade:
      return "unmade"

  def _example(self, number: int, record: Mapping[str, Any]) -> Example:
    spec, fields, tokenizer = self._spec, self._spec.train, self._chat
    where = f"{fields.source} record {number + 1}"
    question, theirs = questions(spec, record, where)
    suffix = records.fill(record, spec.suffix, where)
    prompt = _encode_question(
        tokenizer, question, spec.max_prompt_len, suffix
    )
    if self.is_asked(*prompt):
      raise Dropped("asked")
    noted = ["plain"] if tokenizer.has_markup(question) else []
    completion = teachers = (None, None)
    if self._completion_len:
      text = records.completion(record, fields.completion, where)
      completion, cut = _encode_completion(
          tokenizer,
          text,
          self._completion_len,
          self._opening(suffix),
          self._ends,
      )
      noted += cut
    if theirs is not None:
      fields = (records.filled(record, x, where) for x in spec.teacher_fields)
      if "empty" in map(records.fault, fields):
        raise Dropped("empty")
      tokenizer, room = self._teacher_tokenizer, spec.teacher_prompt_len
      teachers = _encode_question(
          tokenizer, theirs, room, suffix, own=True
      )
      if tokenizer.has_markup(theirs) and not noted:
        noted = ["plain"]
    return Example(number, *prompt, *completion, *teachers, tuple(noted))

  def questions(self, numbers: Iterable[int]) -> list[Question]:
    """Returns what the student is asked in some records."""
    spec = self._spec
    return [
        questions(
            spec, self.records[int(i)], f"{spec.train.source} record {i + 1}"
        )[0]
        for i in numbers
    ]

  def is_asked(self, tokens: np.ndarray, mask: np.ndarray) -> bool:
    """Whether an evaluation set has the prompt [S], see `asked`."""
    return bool(self._asked) and tokens[mask].tobytes() in self._asked

  def _take(self) -> list[Example]:
    examples, missed = [], collections.Counter()
    while len(examples) < self._spec.batch_size:
      example = next(self._iterator)
      if isinstance(example, str):
        self.dropped += 1
        self.reasons[example] += 1
        missed[example] += 1
        if missed.total() > self._epoch:
          missed.clear()  # Bad luck, unless no record fits.
          self._check_any(())
        continue
      missed.clear()
      self.noted.update(example.noted)
      examples.append(example)
    return examples

  def _all_too_long(self) -> str:
    spec = self._spec
    parts, mends = ["its prompt"], ["it"]
    if spec.teacher_prompt:
      parts.append("the teacher's")
      mends.append("data.max_teacher_prompt_len")
    if self._completion_len:
      parts.append("its completion")
      mends.append("rollout.max_len")
    return (
        f"data.max_prompt_len is {spec.max_prompt_len}, and every one of the"
        f" {len(self.records)} records is longer ({' or '.join(parts)}); raise"
        f" {' or '.join(mends)}."
    )

  def __iter__(self) -> Iterator[tuple[PromptBatch, Rollout | None]]:
    return self

  def __next__(self) -> tuple[PromptBatch, Rollout | None]:
    """Returns NumPy prompts, and completions if they were asked for."""
    rows = self._take()

    def stack(field: str) -> np.ndarray:
      return np.stack([getattr(row, field) for row in rows])

    batch = PromptBatch(
        tokens=stack("prompt"),
        mask=stack("prompt_mask"),
        index=np.array([row.index for row in rows], np.int32),
    )
    if self._spec.teacher_prompt:
      batch = dataclasses.replace(
          batch,
          teacher_tokens=stack("teacher_prompt"),
          teacher_mask=stack("teacher_prompt_mask"),
      )
    if not self._completion_len:
      return batch, None
    return batch, Rollout(stack("completion"), stack("completion_mask"))

  def counts(self) -> dict[str, int]:
    """Returns how many records were dropped so far, and for which reasons."""
    reasons = {f"dropped_{name}": n for name, n in self.reasons.items()}
    return {"dropped": self.dropped, **dict(sorted(reasons.items()))}

  def get_state(self) -> str:
    """Returns the stream's position as JSON."""
    return json.dumps(
        {
            "grain": self._iterator.get_state(),
            "dropped": self.dropped,
            "reasons": self.reasons,
            "noted": self.noted,
        }
    )

  def set_state(self, state: str) -> None:
    """Moves the stream to the position that `get_state` returned."""
    loaded = json.loads(state)
    self._iterator.set_state(loaded["grain"])
    self.dropped = loaded["dropped"]
    self.reasons = collections.Counter(loaded.get("reasons"))
    self.noted = collections.Counter(loaded.get("noted"))


def cut(batch: PromptBatch, length: int) -> PromptBatch:
  """Keeps the last columns; the student's prompts are shorter than that."""
  return dataclasses.replace(
      batch, tokens=batch.tokens[:, -length:], mask=batch.mask[:, -length:]
  )


@dataclasses.dataclass(frozen=True)
class PromptReader:
  """A model that reads prompts.

  Attributes:
    role: "student" or "teacher", which is also its group in the config.
    tokenizer: its tokenizer and template.
    vocab_size: the rows of its embedding table.
  """

  role: str
  tokenizer: Tokenizer
  vocab_size: int


def name_token(tokenizer: Tokenizer, token: int | None) -> str:
  """Names a token for a sentence; None is the end of the prompt."""
  if token is None:
    return "no token"
  return f"{tokenizer.decode([token])!r} (id {token})"


def check(
    spec: DataSpec,
    question: Question,
    student: PromptReader,
    teacher: PromptReader | None = None,
    teacher_question: Question | None = None,
) -> None:
  """Refuses tokenizers, templates and suffixes that do not fit together.

  Args:
    spec: the data settings, with the suffix.
    question: any question, such as the first record's.
    student: the student; both models read its prompts.
    teacher: the teacher; None for supervised training.
    teacher_question: the teacher's question, in its own template; None if the
      teacher reads the student's prompt.

  Raises:
    ConfigError: the suffix does not fit the student's template.
    TokenizerError: a tokenizer does not fit its model, or the two templates
      differ.
  """
  for model in (student, teacher) if teacher else (student,):
    _check_vocab_size(model)
  _check_opened_once(spec, question, student.tokenizer)
  if teacher and teacher_question is None:
    _check_templates(spec, question, student.tokenizer, teacher.tokenizer)
  elif teacher:
    prompt = teacher.tokenizer.own_prompt(teacher_question, spec.suffix)
    _check_boundary(spec, "teacher's prompt", prompt, teacher.tokenizer)
  prompt = student.tokenizer.prompt(question, spec.suffix)
  _check_boundary(spec, "prompt", prompt, student.tokenizer)


def warnings(
    spec: DataSpec, question: Question, tokenizer: Tokenizer
) -> list[str]:
  """Returns sentences about what works, but may not be meant."""
  found = [
      f"data.suffix has {markup!r}, which the student's tokenizer splits into"
      f" {len(tokenizer.encode(markup))} tokens. Choose a suffix that is one"
      " token, or no suffix."
      for markup in _MARKUP.findall(spec.suffix)
      if len(tokenizer.encode(markup)) > 1
  ]
  merged = _merged(tokenizer, tokenizer.prompt(question, spec.suffix), "\n")
  if merged:
    found.append(
        "If an answer begins with a line break, the tokenizer would join the"
        f" prompt's end {merged[0]!r} and the line break to {merged[1]!r}. A"
        " data.suffix that ends in a special token avoids this."
    )
  return found


def _check_vocab_size(model: PromptReader) -> None:
  vocab = model.tokenizer.pretrained.get_vocab()
  last = max(vocab, key=vocab.__getitem__)
  if max(model.tokenizer.num_tokens, vocab[last] + 1) > model.vocab_size:
    raise TokenizerError(
        f"The {model.role}'s tokenizer ({model.tokenizer.path}) has"
        f" {model.tokenizer.num_tokens} tokens up to {last!r} (id"
        f" {vocab[last]}), but vocab_size in the config.json of"
        f" {model.role}.path is {model.vocab_size}; set"
        f" {model.role}.tokenizer to the one that belongs to the model."
    )


def _check_opened_once(
    spec: DataSpec, question: Question, tokenizer: Tokenizer
) -> None:
  if tokenizer.opens(question, spec.suffix):
    template = tokenizer.prompt(question, "")
    raise ConfigError(
        f"data.suffix is {spec.suffix!r}, but the student's chat template"
        f" ({tokenizer.path}) already ends with {template[-20:]!r}, so the"
        " prompt would have it twice; set data.suffix=''."
    )


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple:
  """Returns where two rows first differ, and their two tokens there."""
  pairs = itertools.zip_longest(ours, theirs)
  return next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)


def _check_templates(
    spec: DataSpec, question: Question, student: Tokenizer, teacher: Tokenizer
) -> None:
  ours = student.encode_prompt(question, spec.suffix)
  theirs = teacher.encode_own(question, spec.suffix)
  if ours == theirs:
    return
  position, a, b = _first_difference(ours, theirs)
  raise TokenizerError(
      f"The chat templates of the student ({student.path}) and the teacher"
      f" ({teacher.path}) give a question different tokens: at position"
      f" {position} (from 0) {name_token(student, a)} for the student and"
      f" {name_token(teacher, b)} for the teacher; the teacher reads the"
      f" student's prompt, so {_mend(spec, question, student, teacher)}."
  )


def _mend(
    spec: DataSpec, question: Question, student: Tokenizer, teacher: Tokenizer
) -> str:
  """Says how the student's prompt becomes the teacher's."""
  base = student.prompt(question, "")
  wanted = teacher.own_prompt(question, spec.suffix)
  suffix = wanted.removeprefix(base)
  # The teacher's prompt depends on the suffix, too.
  if wanted.startswith(base) and (
      teacher.own_prompt(question, suffix) == base + suffix
  ):
    return (
        f"change data.suffix from {spec.suffix!r} to {suffix!r}, with which"
        " the two agree"
    )
  return (
      "set student.tokenizer to a model with the teacher's template, as"
      f" {teacher.path}"
  )


def _merged(
    tokenizer: Tokenizer, prompt: str, text: str
) -> tuple[str, str] | None:
  """Returns how the prompt's last tokens change if a text follows.

  This compares the prompt's own tokens only. Some tokenizers put a space before
  a text that is encoded alone, so the text's tokens may differ harmlessly.

  Args:
    tokenizer: the tokenizer.
    prompt: the rendered prompt.
    text: the start of an answer.

  Returns:
    The text of the prompt's tokens that change, and of the first token in their
    place; None if no token changes.
  """
  alone, joint = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
  if joint[: len(alone)] == alone:
    return None
  start, _, token = _first_difference(alone, joint)
  return tokenizer.decode(alone[start:]), tokenizer.decode([token])


def _first_word(tokenizer: Tokenizer, prompt: str) -> str:
  """Returns a first word of an answer, with a space if the prompt is text."""
  last = tokenizer.encode(prompt)[-1]
  glued = prompt[-1].isspace() or last in tokenizer.special_ids
  return "We" if glued else " We"


def _check_boundary(
    spec: DataSpec, name: str, prompt: str, tokenizer: Tokenizer
) -> None:
  """Refuses prompts whose last tokens change once an answer follows.

  The student writes after the prompt's tokens. The tokenizer may split prompt
  and answer together in another way ("Answer: " and "We" into " We"). Then the
  student never saw such tokens in its training, and learns nothing useful here.
  """
  word = _first_word(tokenizer, prompt)
  merged = _merged(tokenizer, prompt, word)
  if merged:
    raise ConfigError(
        f"With data.suffix {spec.suffix!r} the {name} ends with the token"
        f" {merged[0]!r}, which becomes {merged[1]!r} if a word such as"
        f" {word!r} follows, so the model would train on tokens that no text"
        " has; change data.suffix so that it ends in a special token, or"
        " without a space."
    )


@dataclasses.dataclass(frozen=True)
class Taken:
  """What is taken of a rewriting.

  Attributes:
    tokens: what the student learns, with the stop token; empty if it failed.
    failed: why, of `REWRITING_FAILURES`; "" if it did not fail.
  """

  tokens: tuple[int, ...] = ()
  failed: str = ""


@dataclasses.dataclass(frozen=True)
class Asked:
  """The teacher's turns; NumPy, rows in the order of the rollouts.

  Attributes:
    prompts: [rollouts, max_prompt_len]; `index` [rollouts, 2] has the record
      and the rollout's number.
    shortened: bool [rollouts], whether the answer's end is not shown.
    long: bool [rollouts], whether not even the problem fits; the row then
      holds what fits, and nothing is taken of what is written there.
  """

  prompts: PromptBatch
  shortened: np.ndarray
  long: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rewriting:
  """How the teacher is asked to rewrite, and how its words are read.

  The teacher gets a chat turn of its own, in its own template, with the problem
  and the student's answer as text (`rollout.rewrite.prompt`). Text that looks
  like a token is plain text there, as in all prompts. If the turn is longer
  than its static length, only the beginning of the answer is shown; a teacher
  can bring an answer that breaks off to its end, as it has to with one that
  reached the student's cap.

  What the teacher writes is never encoded again. The student learns the very
  tokens that the teacher sampled, stop token included: text decoded and encoded
  again could come out as other tokens, which neither model would have written.
  Text is looked at only to find where to cut, always between two tokens:

    thoughts    If the turn ends with `<think>`, or the teacher begins with it,
                all up to the first `</think>` is the teacher's thinking about
                the rewriting. It goes, with the white space behind it
                (`rollout.rewrite.thoughts` "cut"), or stays ("keep", for a
                teacher whose thoughts are the shorter reasoning).
    final mark  Before the last `rollout.rewrite.final_mark` come the tokens of
                "</think>" and an empty line, which close the student's
                thoughts. They are the only tokens that the teacher did not
                sample.

  A rewriting fails, and for these reasons:

    cut         no stop token within `rollout.rewrite.max_len`
    unclosed    the thoughts do not end
    unmarked    the final mark is missing, or begins inside a token
    markup      it has a token that opens or ends a turn
    empty       nothing is left, or only white space
    long        the problem alone does not fit the teacher's turn

  The row of a failed rewriting is masked: it has no loss, and the mean over
  rollouts is over the others. The student's own answer is not learned in its
  place. It is long, as most answers are that the teacher cannot rewrite, so it
  would teach the opposite; and it would make an update part on-policy that is
  meant not to be.

  Attributes:
    config: of the run.
    student: the student's tokenizer.
    teacher: the teacher's.
    stop_ids: tokens that end the student's answers.
    teacher_stop_ids: tokens that end the teacher's.
  """

  config: Config
  student: Tokenizer
  teacher: Tokenizer
  stop_ids: tuple[int, ...] = ()
  teacher_stop_ids: tuple[int, ...] = ()

  def check(self, suffixes: Sequence[str]) -> None:
    """Refuses settings that leave no room, or close what is not open.

    Args:
      suffixes: of the student's prompts.

    Raises:
      ConfigError: there is no room, or nothing is open.
    """
    spec, data = self.config.rollout.rewrite, self.config.data
    least = len(self._encode("", ""))
    # A problem fits that fits the student's prompt, whatever its template.
    needed = least + data.max_prompt_len
    if spec.max_prompt_len <= needed:
      raise ConfigError(
          f"rollout.rewrite.max_prompt_len is {spec.max_prompt_len}, but"
          f" rollout.rewrite.prompt takes {least} tokens without its fields and"
          f" data.max_prompt_len is {data.max_prompt_len}, which leaves no room"
          f" for an answer; set rollout.rewrite.max_prompt_len above {needed}."
      )
    openings = (self.student.prompt(_PROBE, x).rstrip() for x in suffixes)
    if spec.final_mark and not all(x.endswith(_OPEN) for x in openings):
      raise ConfigError(
          f"rollout.rewrite.final_mark is {spec.final_mark!r}, before which"
          f" {_CLOSE} is put, but the student's prompt does not end with"
          f" {_OPEN}; set data.suffix to '{_OPEN}', or"
          " rollout.rewrite.final_mark to ''."
      )

  def ask(
      self,
      questions: Sequence[Question],
      index: np.ndarray,
      answers: Sequence[np.ndarray],
  ) -> Asked:
    """Puts the student's answers into the teacher's turns.

    Args:
      questions: of each prompt.
      index: int [prompts], the records' numbers.
      answers: the tokens of each rollout; those of a prompt are neighbours.
    """
    count = len(answers) // len(questions)
    rows = [
        self._row(questions[i // count], tokens)
        for i, tokens in enumerate(answers)
    ]
    tokens, mask, shortened, long = map(np.stack, zip(*rows, strict=True))
    numbers = np.tile(np.arange(count), len(questions))
    index = np.stack([np.repeat(index, count), numbers], 1).astype(np.int32)
    return Asked(PromptBatch(tokens, mask, index), shortened, long)

  def _row(
      self, question: Question, answer: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """Returns a turn [max_prompt_len], its mask, and two flags of `Asked`."""
    room = self.config.rollout.rewrite.max_prompt_len
    kept = [int(t) for t in answer if int(t) not in self.stop_ids]
    shown = len(kept)
    tokens = self._turn(question, kept)
    while tokens and len(tokens) > room and shown:
      # The teacher's tokens of it may be more than the student's.
      shown -= min(len(tokens) - room, shown)
      tokens = self._turn(question, kept[:shown])
    long = not 0 < len(tokens) <= room
    tokens = tokens[-room:] or [self.teacher.pad_id]
    row = _pad(self.teacher, tokens, room, left=True)
    return *row, shown < len(kept), long

  def _turn(self, question: Question, answer: Sequence[int]) -> list[int]:
    """Encodes a turn; empty if the template or the tokenizer refuses it."""
    try:
      return self._encode(question, self.student.decode(answer))
    except TokenizerError:
      return []

  def _encode(self, question: Question, answer: str) -> list[int]:
    spec = self.config.rollout.rewrite
    fields = {"question": records.last_turn(question), "answer": answer}
    text = FIELD.sub(lambda match: fields[match[1]], spec.prompt)
    turn = _with_last(question, text)
    return self.teacher.encode_own(turn, spec.suffix)

  def take(self, written: Sequence[int]) -> Taken:
    """Returns what the student learns of what the teacher sampled."""
    spec, body = self.config.rollout.rewrite, [int(t) for t in written]
    if not body or body[-1] not in self.teacher_stop_ids:
      return Taken(failed="cut")
    stop = body.pop()
    if spec.thoughts == "cut" and self._thinks(body):
      found = self._after(body, _CLOSE)
      if found is None:
        return Taken(failed="unclosed")
      body = body[found:]
      while body and self.teacher.decode(body[:1]).isspace():
        del body[0]
    if not self.teacher.control_ids.isdisjoint(body):
      return Taken(failed="markup")
    if not self.teacher.decode(body).strip():
      return Taken(failed="empty")
    if spec.final_mark:
      at = self._text_at(body, self.teacher.decode(body).rfind(spec.final_mark))
      if at is None:
        return Taken(failed="unmarked")
      body[at:at] = self.student.encode(f"{_CLOSE}\n\n")
    return Taken((*body, stop))

  def _thinks(self, body: Sequence[int]) -> bool:
    """Whether the teacher's turn was opened with a thought, or it opens one."""
    suffix = self.config.rollout.rewrite.suffix
    turn = self.teacher.own_prompt(_PROBE, suffix).rstrip()
    begins = self.teacher.decode(body).lstrip().startswith(_OPEN)
    return turn.endswith(_OPEN) or begins

  def _after(self, tokens: Sequence[int], text: str) -> int | None:
    """Returns how many tokens end with a text first; None if it is missing."""
    start = self.teacher.decode(tokens).find(text)
    if start < 0:
      return None
    return self._text_at(tokens, start + len(text))

  def _text_at(self, tokens: Sequence[int], length: int) -> int | None:
    """Returns how many tokens are so many characters; None if none are."""
    if length < 0:
      return None

    def size(count: int) -> int:
      return len(self.teacher.decode(tokens[:count]))

    count = bisect.bisect_left(range(len(tokens)), length, key=size)
    return count if size(count) == length else None


@dataclasses.dataclass(frozen=True)
class Asking:
  """An update's questions, with how the teacher is asked about them.

  Attributes:
    rewriting: see there.
    questions: of each prompt.
    index: int [prompts], the records' numbers.
  """

  rewriting: Rewriting
  questions: Sequence[Question]
  index: np.ndarray

  def ask(self, answers: Sequence[np.ndarray]) -> Asked:
    """See `Rewriting.ask`."""
    return self.rewriting.ask(self.questions, self.index, answers)
