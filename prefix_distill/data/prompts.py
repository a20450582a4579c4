"""Batches of prompts, and of completions for supervised training.

Grain shuffles, repeats and prefetches. This module turns a record into token
rows. Prompts are padded on the left to one static length, and the teacher's
own prompts to another.

Every process reads whole batches, and its devices take their rows of them.
Encoding prompts is cheap. So the state of the stream, the contents of a batch
and the records that are dropped do not depend on the number of processes.

`check` tests on one question what both models read. A mistake there makes no
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
  """

  index: int
  prompt: np.ndarray
  prompt_mask: np.ndarray
  completion: np.ndarray | None = None
  completion_mask: np.ndarray | None = None
  teacher_prompt: np.ndarray | None = None
  teacher_prompt_mask: np.ndarray | None = None


def _pad(chat: Chat, tokens: Sequence[int], length: int, left: bool) -> _Row:
  """Pads tokens on one side; returns None if there are too many."""
  if len(tokens) > length:
    return None
  row, mask = np.full(length, chat.pad_id, np.int32), np.zeros(length, bool)
  start = length - len(tokens) if left else 0
  kept = slice(start, start + len(tokens))
  row[kept], mask[kept] = tokens, True
  return row, mask


def encode_prompt(chat: Chat, question: str, max_len: int, suffix: str) -> _Row:
  """Returns a prompt's padded row and mask [S]; None if it is too long."""
  tokens = chat.encode(chat.prompt(question, suffix))
  return _pad(chat, tokens, max_len, left=True)


def questions(
    spec: DataSpec, record: Mapping[str, Any]
) -> tuple[str, str | None]:
  """Returns the student's question, and the teacher's; None if they agree."""
  question = str(records.field(record, spec.train.question))
  if not spec.teacher_prompt:
    return question, None
  where = f"{spec.train.source} record 1"
  return question, records.fill(record, spec.teacher_prompt, where)


def check_room(chat: Chat, spec: DataSpec, question: str) -> None:
  """Refuses a prompt length that no prompt can fit.

  Raises:
    ConfigError: the length is too short even for an empty question.
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
  """Refuses a length that none of the teacher's own prompts can fit.

  Args:
    chat: the teacher's tokenizer.
    spec: the data settings, with `teacher_prompt`.
    question: the teacher's question for the first record.

  Raises:
    ConfigError: the length is too short even if all fields are empty.
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
    records: all records, as they are read.
    question: the student's question for the first record.
    teacher_question: the teacher's question for the first record; None if it is
      the student's.
    dropped: how many records were longer than the static length so far.
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
      spec: the records, the batch size and the prompt lengths.
      chat: the student's tokenizer.
      seed: the seed of the shuffle; each epoch has its own order.
      completion_len: the longest completion; 0 for no completions.
      teacher_chat: the teacher's tokenizer; needed if the teacher has its own
        prompt.

    Raises:
      DataError: see `records.read`.
      ConfigError: the prompt length leaves no room for a question.
    """
    self.records = records.read(spec.train, more=spec.teacher_fields)
    self._spec, self._chat, self._teacher_chat = spec, chat, teacher_chat
    self._completion_len = completion_len
    self.question, self.teacher_question = questions(spec, self.records[0])
    check_room(chat, spec, self.question)
    if self.teacher_question is not None:
      check_teacher_room(teacher_chat, spec, self.teacher_question)
    stream = grain.MapDataset.range(len(self.records)).seed(seed).shuffle()
    stream = stream.repeat().map(self._encode)
    # A record that is too long comes out as None, so that it is counted.
    self._iterator = iter(
        stream.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=64),
            allow_nones=True,
        )
    )
    self.dropped = 0

  def _encode(self, number: int) -> Example | None:
    """Returns a record by its number; None if it is too long."""
    record, spec, fields = self.records[number], self._spec, self._spec.train
    where = f"{fields.source} record {number + 1}"
    question = records.text(record, fields.question, where)
    prompt = encode_prompt(
        self._chat, question, spec.max_prompt_len, spec.suffix
    )
    completion = teachers = (None, None)
    if self._completion_len:
      text = records.text(record, fields.completion, where)
      tokens = [*self._chat.encode(text), self._chat.end_id]
      completion = _pad(self._chat, tokens, self._completion_len, left=False)
    if spec.teacher_prompt:
      text = records.fill(record, spec.teacher_prompt, where)
      chat = self._teacher_chat
      tokens = chat.encode(chat.own_prompt(text, spec.suffix))
      teachers = _pad(chat, tokens, spec.teacher_prompt_len, left=True)
    if prompt is None or completion is None or teachers is None:
      return None
    return Example(number, *prompt, *completion, *teachers)

  def _take(self) -> list[Example]:
    examples, missed = [], 0
    while len(examples) < self._spec.batch_size:
      example = next(self._iterator)
      if example is not None:
        examples.append(example)
        missed = 0
        continue
      self.dropped += 1
      missed += 1
      if missed > len(self.records):
        missed = 0
        # Two epochs may place the records that fit far apart.
        if not any(map(self._encode, range(len(self.records)))):
          raise ConfigError(self._all_too_long())
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

  def get_state(self) -> str:
    """Returns the stream's position as JSON."""
    return json.dumps(
        {"grain": self._iterator.get_state(), "dropped": self.dropped}
    )

  def set_state(self, state: str) -> None:
    """Moves the stream to the position that `get_state` returned."""
    loaded = json.loads(state)
    self._iterator.set_state(loaded["grain"])
    self.dropped = loaded["dropped"]


def trim(batch: PromptBatch, spec: DataSpec) -> PromptBatch:
  """Cuts padding off, down to the smallest bucket that holds the prompts.

  The teacher's own prompts keep their length.

  Args:
    batch: NumPy prompts [B, max_prompt_len], the whole batch.
    spec: the data settings, with `prompt_buckets`.
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
class PromptReader:
  """A model that reads prompts.

  Attributes:
    role: "student" or "teacher", which is also its group in the config.
    chat: its tokenizer and template.
    vocab_size: the rows of its embedding table.
  """

  role: str
  chat: Chat
  vocab_size: int


def name_token(chat: Chat, token: int | None) -> str:
  """Names a token for a sentence; None is the end of the prompt."""
  if token is None:
    return "no token"
  return f"{chat.decode([token])!r} (id {token})"


def check(
    spec: DataSpec,
    question: str,
    student: PromptReader,
    teacher: PromptReader | None = None,
    teacher_question: str | None = None,
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
  _check_opened_once(spec, question, student.chat)
  if teacher and teacher_question is None:
    _check_templates(spec, question, student.chat, teacher.chat)
  elif teacher:
    prompt = teacher.chat.own_prompt(teacher_question, spec.suffix)
    _check_boundary(spec, "teacher's prompt", prompt, teacher.chat)
  prompt = student.chat.prompt(question, spec.suffix)
  _check_boundary(spec, "prompt", prompt, student.chat)


def warnings(spec: DataSpec, question: str, chat: Chat) -> list[str]:
  """Returns sentences about settings that work, but may be a mistake."""
  found = [
      f"data.suffix has {markup!r}, which the student's tokenizer splits into"
      f" {len(chat.encode(markup))} tokens. Choose a suffix that is one token,"
      " or no suffix."
      for markup in _MARKUP.findall(spec.suffix)
      if len(chat.encode(markup)) > 1
  ]
  merged = _merged(chat, chat.prompt(question, spec.suffix), "\n")
  if merged:
    found.append(
        "If an answer begins with a line break, the tokenizer would join the"
        f" prompt's end {merged[0]!r} and the line break to {merged[1]!r}. A"
        " data.suffix that ends in a special token avoids this."
    )
  return found


def _check_vocab_size(model: PromptReader) -> None:
  vocab = model.chat.tokenizer.get_vocab()
  last = max(vocab, key=vocab.__getitem__)
  if max(model.chat.num_tokens, vocab[last] + 1) > model.vocab_size:
    raise TokenizerError(
        f"The {model.role}'s tokenizer ({model.chat.path}) has"
        f" {model.chat.num_tokens} tokens up to {last!r} (id {vocab[last]}),"
        f" but vocab_size in the config.json of {model.role}.path is"
        f" {model.vocab_size}; set {model.role}.tokenizer to the one that"
        " belongs to the model."
    )


def _check_opened_once(spec: DataSpec, question: str, chat: Chat) -> None:
  if chat.opens(question, spec.suffix):
    template = chat.prompt(question, "")
    raise ConfigError(
        f"data.suffix is {spec.suffix!r}, but the student's chat template"
        f" ({chat.path}) already ends with {template[-20:]!r}, so the prompt"
        " would have it twice; set data.suffix=''."
    )


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple:
  """Returns where two rows first differ, and their two tokens there."""
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
      f" {position} (from 0) {name_token(student, a)} for the student and"
      f" {name_token(teacher, b)} for the teacher; the teacher reads the"
      f" student's prompt, so {_mend(spec, question, student, teacher)}."
  )


def _mend(spec: DataSpec, question: str, student: Chat, teacher: Chat) -> str:
  """Says which setting makes the student's prompt equal the teacher's."""
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
  """Returns how the prompt's last tokens change if a text follows.

  This compares the prompt's own tokens only. Some tokenizers put a space before
  a text that is encoded alone, so the text's tokens may differ harmlessly.

  Args:
    chat: the tokenizer.
    prompt: the rendered prompt.
    text: the start of an answer.

  Returns:
    The text of the prompt's tokens that change, and of the first token in their
    place; None if no token changes.
  """
  alone, joint = chat.encode(prompt), chat.encode(prompt + text)
  if joint[: len(alone)] == alone:
    return None
  start, _, token = _first_difference(alone, joint)
  return chat.decode(alone[start:]), chat.decode([token])


def _first_word(chat: Chat, prompt: str) -> str:
  """Returns a first word of an answer, with a space if the prompt is text."""
  last = chat.encode(prompt)[-1]
  glued = prompt[-1].isspace() or last in chat.special_ids
  return "We" if glued else " We"


def _check_boundary(
    spec: DataSpec, name: str, prompt: str, chat: Chat
) -> None:
  """Refuses prompts whose last tokens change once an answer follows.

  The student writes after the prompt's tokens. The tokenizer may split prompt
  and answer together in another way ("Answer: " and "We" into " We"). Then the
  student never saw such tokens in its training, and learns nothing useful here.
  """
  word = _first_word(chat, prompt)
  merged = _merged(chat, prompt, word)
  if merged:
    raise ConfigError(
        f"With data.suffix {spec.suffix!r} the {name} ends with the token"
        f" {merged[0]!r}, which becomes {merged[1]!r} if a word such as"
        f" {word!r} follows, so the model would train on tokens that no text"
        " has; change data.suffix so that it ends in a special token, or"
        " without a space."
    )
