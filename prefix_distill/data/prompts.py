"""Batches of prompts, and of completions for supervised training.

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

`check` tests on one question what both models are fed. A mistake there makes no
step fail: the run only learns less, or learns something else.
"""

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

from prefix_distill.config import DataSpec
from prefix_distill.config import FIELD
from prefix_distill.data import gym
from prefix_distill.data import records
from prefix_distill.data.records import Question
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.data.tokenizer import TokenizerError
from prefix_distill.errors import ConfigError
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

_MARKUP = re.compile(r"<[^<>\s]+>")
# How many records are looked at for their suffixes.
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


def pad(
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
  row = pad(tokenizer, tokens, max_len, left=True)
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
    ends: Sequence[int] = (),
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
  return pad(tokenizer, tokens, max_len, left=False), noted


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
  return question, with_last(question, text)


def with_last(question: Question, text: str) -> Question:
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
  least = len(tokenizer.encode_prompt(with_last(question, ""), spec.suffix))
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
  empty = with_last(question, FIELD.sub("", spec.teacher_prompt))
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
    more = (*spec.teacher_fields, *spec.suffix_fields)
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
    return [
        f"{'Dropped' if name in _DROPPED else 'Changed'} {number} of the first"
        f" {count} records of {self._spec.train.source}:"
        f" {(_DROPPED | _NOTED)[name]}."
        for name, number in counts.items()
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
    parts, others = "prompt or completion", "rollout.max_len"
    if spec.teacher_prompt:
      parts = "prompt, the teacher's, or completion"
      others = "data.max_teacher_prompt_len or rollout.max_len"
    return (
        f"data.max_prompt_len is {spec.max_prompt_len}, and every one of the"
        f" {len(self.records)} records is longer ({parts}); raise it, or"
        f" {others}."
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
