"""What both models are fed, checked on one question.

No step fails if something here is wrong: the run only learns less, or another
thing. So it is checked before the run.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import re

from prefix_distill.config import DataSpec
from prefix_distill.data.tokenizer import Chat
from prefix_distill.data.tokenizer import TokenizerError
from prefix_distill.errors import ConfigError

_MARKUP = re.compile(r"<[^<>\s]+>")


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
