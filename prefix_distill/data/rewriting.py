"""What the teacher is asked to rewrite, and what is taken of its words.

Host work between two samplings: the student's answers become prompts of the
teacher, and what the teacher writes becomes what the student learns.

The teacher gets a chat turn of its own, in its own template, with the problem
and the student's answer as text (`rollout.rewrite.prompt`). Text that looks
like a token is plain text there, as in all prompts (`data/tokenizer.py`). If
the turn is longer than its static length, only the beginning of the answer is
shown; a teacher can bring an answer that breaks off to its end, as it has to
with one that reached the student's cap.

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
              "</think>" and an empty line, which close the student's thoughts.
              They are the only tokens that the teacher did not sample.

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
"""

import bisect
from collections.abc import Sequence
import dataclasses

import numpy as np

from prefix_distill.config import Config
from prefix_distill.config import FIELD
from prefix_distill.data import prompts as prompts_lib
from prefix_distill.data import records
from prefix_distill.data.records import Question
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.data.tokenizer import TokenizerError
from prefix_distill.errors import ConfigError
from prefix_distill.structs import PromptBatch

REASONS = ("cut", "unclosed", "unmarked", "markup", "empty", "long")
_OPEN, _CLOSE = "<think>", "</think>"
# Any question; a template's last words do not depend on it.
_PROBE = "What is 7 + 5?"


@dataclasses.dataclass(frozen=True)
class Taken:
  """What is taken of a rewriting.

  Attributes:
    tokens: what the student learns, with the stop token; empty if it failed.
    failed: why, of `REASONS`; "" if it did not fail.
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
  """How the teacher is asked, and how its words are read.

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
    row = prompts_lib.pad(self.teacher, tokens, room, left=True)
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
    turn = prompts_lib.with_last(question, text)
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
