"""Batches of prompts, and of completions for supervised training.

Grain shuffles, repeats and prefetches. This module turns a record into token
rows. Prompts are padded on the left to one static length, and the teacher's
own prompts to another.

Every process reads whole batches, and its devices take their rows of them.
Encoding prompts is cheap. So the state of the stream, the contents of a batch
and the records that are dropped do not depend on the number of processes.

`check` tests on one question what both models are fed. A mistake there makes no
step fail: the run only learns less, or learns something else.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import json
import re
from typing import Any

import grain
import numpy as np

from prefix_distill.config import DataSpec
from prefix_distill.config import FIELD
from prefix_distill.data import records
from prefix_distill.data.tokenizer import Chat
from prefix_distill.data.tokenizer import TokenizerError
from prefix_distill.errors import ConfigError
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

_MARKUP = re.compile(r"<[^<>\s]+>")


@dataclasses.dataclass(frozen=True)
class Example:
  """One encoded record.

  Attributes:
    index: the record's number in its data set.
    prompt: int32 [S], padded on the left.
    prompt_mask: bool [S].
    completion: int32 [C], padded on the right; None without completions.
    completion_mask: bool [C].
    teacher_prompt: int32 [S'], padded on the left; None for the same.
    teacher_prompt_mask: bool [S'].
  """

  index: int
  prompt: np.ndarray
  prompt_mask: np.ndarray
  completion: np.ndarray | None = None
  completion_mask: np.ndarray | None = None
  teacher_prompt: np.ndarray | None = None
  teacher_prompt_mask: np.ndarray | None = None


def _pad_left(
    chat: Chat, text: str, max_len: int
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns a text's padded row and mask; None if it is too long."""
  tokens = chat.encode(text)
  if len(tokens) > max_len:
    return None
  row, mask = np.full(max_len, chat.pad_id, np.int32), np.zeros(max_len, bool)
  if tokens:
    row[-len(tokens) :], mask[-len(tokens) :] = tokens, True
  return row, mask


def encode_prompt(
    chat: Chat, question: str, max_len: int, suffix: str
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns a prompt's padded row and mask [S]; None if it is too long."""
  return _pad_left(chat, chat.prompt(question, suffix), max_len)


def _encode_own_prompt(
    chat: Chat, question: str, spec: DataSpec
) -> tuple[np.ndarray, np.ndarray] | None:
  text = chat.own_prompt(question, spec.suffix)
  return _pad_left(chat, text, spec.teacher_prompt_len)


def _encode_completion(
    chat: Chat, text: str, max_len: int
) -> tuple[np.ndarray, np.ndarray] | None:
  tokens = [*chat.encode(text), chat.end_id]
  if len(tokens) > max_len:
    return None
  row, mask = np.full(max_len, chat.pad_id, np.int32), np.zeros(max_len, bool)
  row[: len(tokens)], mask[: len(tokens)] = tokens, True
  return row, mask


def questions(
    spec: DataSpec, record: Mapping[str, Any]
) -> tuple[str, str | None]:
  """Returns what the student and the teacher are asked; None for the same."""
  question = str(records.field(record, spec.train.question))
  if not spec.teacher_prompt:
    return question, None
  where = f"{spec.train.source} record 1"
  return question, records.fill(record, spec.teacher_prompt, where)


def check_room(chat: Chat, spec: DataSpec, question: str) -> None:
  """Refuses a prompt length that no prompt can fit.

  Raises:
    ConfigError: even an empty question is too long.
  """
  least = len(chat.encode(chat.prompt("", spec.suffix)))
  if spec.max_prompt_len <= least:
    length = len(chat.encode(chat.prompt(question, spec.suffix)))
    raise ConfigError(
        f"data.max_prompt_len is {spec.max_prompt_len}, but the chat template"
        f" alone takes {least} tokens, which leaves no room for a question;"
        f" the first prompt needs {length}, so set it to that or more."
    )


def check_teacher_room(chat: Chat, spec: DataSpec, question: str) -> None:
  """Refuses a length that no prompt of the teacher's own can fit.

  Args:
    chat: the teacher's.
    spec: with the teacher's prompt.
    question: what it is asked in the first record.

  Raises:
    ConfigError: with empty fields it is too long already.
  """
  empty = FIELD.sub("", spec.teacher_prompt)
  least, length = (
      len(chat.encode(chat.own_prompt(text, spec.suffix)))
      for text in (empty, question)
  )
  if spec.teacher_prompt_len <= least:
    raise ConfigError(
        "The teacher's prompts have room for"
        f" {spec.teacher_prompt_len} tokens, but data.teacher_prompt takes"
        f" {least} with empty fields; the first prompt needs {length}, so set"
        " data.max_teacher_prompt_len to that or more."
    )


class PromptIterator:
  """An endless, seeded stream of whole batches, the same in all processes.

  Attributes:
    records: all of them, as they are read.
    question: the first record's.
    teacher_question: what the teacher is asked there; None for the same.
    dropped: records so far that were longer than the static length.
  """

  def __init__(
      self,
      spec: DataSpec,
      chat: Chat,
      *,
      seed: int,
      completion_len: int = 0,
      teacher_chat: Chat | None = None,
  ):
    """Opens the records.

    Args:
      spec: where from, how many a batch, how long.
      chat: the student's tokenizer.
      seed: of the shuffle; each epoch has an order of its own.
      completion_len: with completions of up to this length; 0 for none.
      teacher_chat: the teacher's tokenizer; needed for a prompt of its own.

    Raises:
      DataError: see `records.read`.
      ConfigError: the prompt length leaves no room for a question.
    """
    self.records = source = records.read(
        spec.train, more=spec.teacher_fields
    )
    self._spec, self._chat, self._teacher_chat = spec, chat, teacher_chat
    self._completion_len = completion_len
    self.question, self.teacher_question = questions(spec, source[0])
    check_room(chat, spec, self.question)
    if self.teacher_question is not None:
      check_teacher_room(teacher_chat, spec, self.teacher_question)
    self._epoch = len(source)
    self._numbered = _Numbered(source)
    stream = grain.MapDataset.source(self._numbered).seed(seed).shuffle()
    stream = stream.repeat().map(self._encode)
    # Records that are too long come out as None, so that they are counted.
    self._iterator = iter(
        stream.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=64),
            allow_nones=True,
        )
    )
    self.dropped = 0

  def _encode(self, item: tuple[int, Mapping[str, Any]]) -> Example | None:
    number, record = item
    fields = self._spec.train
    where = f"{fields.source} record {number + 1}"
    question = records.text(record, fields.question, where)
    prompt = encode_prompt(
        self._chat, question, self._spec.max_prompt_len, self._spec.suffix
    )
    if prompt is None:
      return None
    completion = teachers = (None, None)
    if self._completion_len:
      text = records.text(record, fields.completion, where)
      completion = _encode_completion(self._chat, text, self._completion_len)
    if self._spec.teacher_prompt:
      text = records.fill(record, self._spec.teacher_prompt, where)
      teachers = _encode_own_prompt(self._teacher_chat, text, self._spec)
    if completion is None or teachers is None:
      return None
    return Example(number, *prompt, *completion, *teachers)

  def _take(self) -> list[Example]:
    examples, missed = [], 0
    while len(examples) < self._spec.batch_size:
      example = next(self._iterator)
      if example is None:
        self.dropped += 1
        missed += 1
        if missed > self._epoch:
          missed = 0  # Bad luck, unless no record fits.
          if any(self._encode(item) for item in self._numbered):
            continue
          raise ConfigError(self._all_too_long())
        continue
      missed = 0
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
        f" {self._epoch} records is longer ({parts}); raise it, or {others}."
    )

  def __iter__(self) -> Iterator[tuple[PromptBatch, Rollout | None]]:
    return self

  def __next__(self) -> tuple[PromptBatch, Rollout | None]:
    """Returns NumPy prompts, and completions if they were asked for."""
    rows = self._take()
    batch = PromptBatch(
        tokens=np.stack([r.prompt for r in rows]),
        mask=np.stack([r.prompt_mask for r in rows]),
        index=np.array([r.index for r in rows], np.int32),
    )
    if self._spec.teacher_prompt:
      batch = dataclasses.replace(
          batch,
          teacher_tokens=np.stack([r.teacher_prompt for r in rows]),
          teacher_mask=np.stack([r.teacher_prompt_mask for r in rows]),
      )
    if not self._completion_len:
      return batch, None
    return batch, Rollout(
        tokens=np.stack([r.completion for r in rows]),
        mask=np.stack([r.completion_mask for r in rows]),
    )

  def get_state(self) -> str:
    """Returns where the stream is, as JSON."""
    return json.dumps(
        {"grain": self._iterator.get_state(), "dropped": self.dropped}
    )

  def set_state(self, state: str) -> None:
    """Goes to where `get_state` was called."""
    loaded = json.loads(state)
    self._iterator.set_state(loaded["grain"])
    self.dropped = loaded["dropped"]


class _Numbered(Sequence):
  """Records with their numbers."""

  def __init__(self, source: Sequence[Mapping[str, Any]]):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[int, Mapping[str, Any]]:
    return index, self._source[index]


def trim(batch: PromptBatch, spec: DataSpec) -> PromptBatch:
  """Cuts padding off, down to the smallest bucket that holds the prompts.

  A prompt of the teacher's own stays as it is.

  Args:
    batch: NumPy prompts [B, max_prompt_len], the whole batch.
    spec: with `prompt_buckets`.
  """
  if not spec.prompt_buckets:
    return batch
  longest = batch.mask.sum(axis=1).max()
  lengths = (*spec.prompt_buckets, spec.max_prompt_len)
  length = min(n for n in lengths if n >= longest)
  return dataclasses.replace(
      batch, tokens=batch.tokens[:, -length:], mask=batch.mask[:, -length:]
  )


@dataclasses.dataclass(frozen=True)
class Fed:
  """A model, as far as what it is fed goes.

  Attributes:
    role: "student" or "teacher", which is also its group in the config.
    chat: its tokenizer and template.
    rows: of its vocabulary.
  """

  role: str
  chat: Chat
  rows: int


def named(chat: Chat, token: int | None) -> str:
  """Names a token in a sentence; None stands for the end of the prompt."""
  if token is None:
    return "no token"
  return f"{chat.decode([token])!r} (id {token})"


def check(
    spec: DataSpec,
    question: str,
    student: Fed,
    teacher: Fed | None = None,
    teacher_question: str | None = None,
) -> None:
  """Refuses tokenizers, templates and suffixes that do not fit together.

  Args:
    spec: with the suffix.
    question: any; the first record's.
    student: whose prompts both models are fed.
    teacher: None for supervised training.
    teacher_question: what the teacher is asked instead, in its own template;
      None for the same.

  Raises:
    ConfigError: the suffix does not fit the student's template.
    TokenizerError: a tokenizer does not fit its model, or the templates each
      other.
  """
  for model in (student, teacher) if teacher else (student,):
    _check_rows(model)
  _check_opened_once(spec, question, student.chat)
  if teacher and teacher_question is None:
    _check_templates(spec, question, student.chat, teacher.chat)
  elif teacher:
    prompt = teacher.chat.own_prompt(teacher_question, spec.suffix)
    _check_boundary(spec, "teacher's prompt", prompt, teacher.chat)
  prompt = student.chat.prompt(question, spec.suffix)
  _check_boundary(spec, "prompt", prompt, student.chat)


def warnings(spec: DataSpec, question: str, chat: Chat) -> list[str]:
  """Returns sentences about what works, but may not be meant."""
  found = [
      f"data.suffix has {markup!r}, which the student's tokenizer does not"
      f" know as one token: it reads {len(chat.encode(markup))} pieces of"
      " text. Choose a suffix that it knows, or none."
      for markup in _MARKUP.findall(spec.suffix)
      if len(chat.encode(markup)) > 1
  ]
  merged = _merged(chat, chat.prompt(question, spec.suffix), "\n")
  if merged:
    found.append(
        f"If an answer began with a line break, the prompt's end {merged[0]!r}"
        f" and that would be one token elsewhere, {merged[1]!r}. A data.suffix"
        " that ends in a special token has no such seam."
    )
  return found


def _check_rows(model: Fed) -> None:
  vocab = model.chat.tokenizer.get_vocab()
  last = max(vocab, key=vocab.__getitem__)
  if max(model.chat.num_tokens, vocab[last] + 1) > model.rows:
    raise TokenizerError(
        f"The {model.role}'s tokenizer ({model.chat.path}) has"
        f" {model.chat.num_tokens} tokens up to {last!r} (id {vocab[last]}),"
        f" but vocab_size in the config.json of {model.role}.path is"
        f" {model.rows}; set {model.role}.tokenizer to the one that belongs to"
        " the model."
    )


def _check_opened_once(spec: DataSpec, question: str, chat: Chat) -> None:
  if chat.opens(question, spec.suffix):
    template = chat.prompt(question, "")
    raise ConfigError(
        f"data.suffix is {spec.suffix!r}, but the student's chat template"
        f" ({chat.path}) already ends with {template[-20:]!r}, so that the"
        " prompt would open it twice; set data.suffix=''."
    )


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple:
  """Returns where two rows differ, and the two tokens there."""
  pairs = itertools.zip_longest(ours, theirs)
  return next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)


def _check_templates(
    spec: DataSpec, question: str, student: Chat, teacher: Chat
) -> None:
  ours = student.encode(student.prompt(question, spec.suffix))
  theirs = teacher.encode(teacher.own_prompt(question, spec.suffix))
  if ours == theirs:
    return
  position, a, b = _first_difference(ours, theirs)
  raise TokenizerError(
      f"The chat templates of the student ({student.path}) and the teacher"
      f" ({teacher.path}) give a question different tokens: at position"
      f" {position} (from 0) {named(student, a)} for the student and"
      f" {named(teacher, b)} for the teacher; the teacher is fed the student's"
      f" prompt, so {_mend(spec, question, student, teacher)}."
  )


def _mend(spec: DataSpec, question: str, student: Chat, teacher: Chat) -> str:
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


def _merged(chat: Chat, prompt: str, text: str) -> tuple[str, str] | None:
  """Returns what of the prompt's end changes if a text follows, and to what.

  Only the prompt's own tokens are compared: some tokenizers put a space before
  a text that is encoded alone, so its tokens may differ harmlessly.

  Args:
    chat: the tokenizer.
    prompt: rendered.
    text: how an answer may begin.

  Returns:
    Text of the prompt's changed tokens and of the first one in their place;
    None if they stay.
  """
  alone, joint = chat.encode(prompt), chat.encode(prompt + text)
  if joint[: len(alone)] == alone:
    return None
  start, _, token = _first_difference(alone, joint)
  return chat.decode(alone[start:]), chat.decode([token])


def _first_word(chat: Chat, prompt: str) -> str:
  """Returns how an answer begins: after text, a word takes a space along."""
  last = chat.encode(prompt)[-1]
  glued = prompt[-1].isspace() or last in chat.special_ids
  return "We" if glued else " We"


def _check_boundary(
    spec: DataSpec, name: str, prompt: str, chat: Chat
) -> None:
  """Refuses prompts whose last tokens no text with an answer would have.

  The student writes after the prompt's tokens. If prompt and answer together
  are tokenized in another way ("Answer: " and "We" into " We"), it never saw
  such a sequence in its training, and what it learns here is of none.
  """
  word = _first_word(chat, prompt)
  merged = _merged(chat, prompt, word)
  if merged:
    raise ConfigError(
        f"With data.suffix {spec.suffix!r} the {name} ends with the token"
        f" {merged[0]!r}, but with a first word as {word!r} after it that is"
        f" {merged[1]!r}, and the model would be trained on what no text gives;"
        " change data.suffix, for instance to one without a space at its end"
        " or with a special token there."
    )
