"""Batches of prompts, and of completions for supervised training.

Grain shuffles, repeats and reads ahead; what is here turns a record into token
rows. Prompts are padded on the left to one static length; those of the teacher,
where it has its own, to another.

Every process reads whole batches and its devices take their rows of them. To
encode prompts costs next to nothing, and so which records are too long, where
the stream is, and what a batch holds do not depend on the number of processes.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import grain
import numpy as np

from prefix_distill.config import DataSpec
from prefix_distill.config import FIELD
from prefix_distill.data import records
from prefix_distill.data.tokenizer import Chat
from prefix_distill.errors import ConfigError
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout


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
    source = records.read(spec.train, more=spec.teacher_fields)
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
