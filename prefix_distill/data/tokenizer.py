"""Tokenizers, chat templates and stop tokens; transformers does the work.

What a user or a system prompt says is text. Text that looks like a token of the
tokenizer's own (`<|im_end|>`, `<think>`) is encoded as plain text, not as that
token, and is counted; otherwise a question could end the user's turn. What the
assistant said in earlier turns keeps its markup (`<think>`), but no token that
ends a turn.

The template alone decides where the first token (BOS) stands. The tokenizer
adds none.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any
import unicodedata

import numpy as np
import tokenizers
import transformers

from prefix_distill.data.records import Message
from prefix_distill.data.records import Question
from prefix_distill.errors import JsonError
from prefix_distill.errors import one_line
from prefix_distill.errors import read_json
from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf

_MARKUP = re.compile(r"<[^<>\s]+>")
_LAST_MARKUP = re.compile(r"(<[^<>\s/|][^<>\s|]*>)\s*\Z")
# A question that every tokenizer and template can take.
_PROBE = "What is 7 + 5?"


class TokenizerError(UserError):
  """A tokenizer that is missing, or differs from the other model's."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A model's tokenizer, chat template and stop tokens.

  Attributes:
    path: the model's path, for messages.
    pretrained: the tokenizer of transformers.
    stop_ids: the tokens at which the model ends an answer.
    pad_id: what padding is filled with; always masked.
    system: the system prompt of a question without one; None for what the
      template has by itself, and empty for none.
  """

  path: str
  pretrained: Any
  stop_ids: tuple[int, ...]
  pad_id: int
  system: str | None = None

  @property
  def num_tokens(self) -> int:
    """The number of tokens; rows of an embedding table above are padding."""
    return len(self.pretrained)

  @property
  def end_id(self) -> int:
    """The token that ends an answer in training: the end of sequence."""
    end = self.pretrained.eos_token_id
    return self.stop_ids[0] if end is None else end

  @property
  def special_ids(self) -> tuple[int, ...]:
    """Tokens that are not text: added tokens, such as `<think>`, and stops."""
    added = self.pretrained.added_tokens_decoder
    return tuple(sorted({*added, *self.stop_ids}))

  def encode(self, text: str) -> list[int]:
    return self.pretrained.encode(text, add_special_tokens=False)

  def decode(self, tokens: Sequence[int]) -> str:
    """Returns the text, special tokens included."""
    return self.pretrained.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def prompt(self, question: Question, suffix: str) -> str:
    """Renders a question and opens the assistant's turn.

    Raises:
      TokenizerError: the template refuses the question.
    """
    text = self._render(self._messages(question))
    return text + suffix

  def encode_prompt(self, question: Question, suffix: str) -> list[int]:
    """Encodes what `prompt` renders; see the module for what a user says.

    Raises:
      TokenizerError: the template refuses the question.
    """
    messages = self._messages(question)
    if not any(self._markup_in(message) for message in messages):
      return self.encode(self._render(messages) + suffix)
    marks = _unused(messages)
    guarded = [self._guard(message, marks) for message in messages]
    return self._encode_guarded(self._render(guarded) + suffix, marks)

  def encode_own(self, question: Question, suffix: str) -> list[int]:
    """Encodes what `own_prompt` renders."""
    return self.encode_prompt(question, self._own_suffix(question, suffix))

  def has_markup(self, question: Question) -> bool:
    """Whether a question has text that looks like a token."""
    return any(self._markup_in(m) for m in self._messages(question))

  def _messages(self, question: Question) -> list[Message]:
    """Returns the turns with the system prompt."""
    if isinstance(question, str):
      question = [{"role": "user", "content": question}]
    if self.system and question[0]["role"] != "system":
      return [{"role": "system", "content": self.system}, *question]
    return [*question]

  def _render(
      self, messages: Sequence[Message], add_generation_prompt: bool = True
  ) -> str:
    text = self._apply(messages, add_generation_prompt)
    if self.system != "" or messages[0]["role"] == "system":
      return text
    start, head = self._unasked
    if not text.startswith(head):
      raise TokenizerError(
          f"{self.path}: data.system is '', but the system prompt that the chat"
          " template adds depends on the question and cannot be left out; set"
          " data.system to a text, or take it out of chat_template.jinja."
      )
    return text[:start] + text[len(head) :]

  def _apply(
      self, messages: Sequence[Message], add_generation_prompt: bool = True
  ) -> str:
    try:
      text = self.pretrained.apply_chat_template(
          messages,
          add_generation_prompt=add_generation_prompt,
          tokenize=False,
      )
    except Exception as error:  # A template can raise anything.
      reason = one_line(error)
      if isinstance(error, RecursionError):  # Its words depend on the depth.
        reason = "it calls itself without an end"
      roles = ", ".join(message["role"] for message in messages)
      raise TokenizerError(
          f"{self.path}: the chat template fails on messages of {roles}"
          f" ({reason}); repair chat_template.jinja, or change the"
          " messages."
      ) from error
    return text

  @functools.cached_property
  def _unasked(self) -> tuple[int, str]:
    """Where the template's own system prompt begins, and all up to its end.

    The first turn begins with the template's first token that is not BOS. The
    user's turn begins with the last such token before the question.
    """
    text = self._apply([{"role": "user", "content": _PROBE}])
    head = text[: text.index(_PROBE)]
    bos = self.pretrained.bos_token
    found = [m for m in self._markup.finditer(head) if m[0] != bos]
    if not found:
      raise TokenizerError(
          f"{self.path}: data.system is '', but the chat template marks turns"
          " with no token of their own, so that its system prompt cannot be"
          " told apart; leave data.system at None."
      )
    last = [m for m in found if m[0] == found[0][0]][-1]
    return found[0].start(), head[: last.start()]

  @functools.cached_property
  def _markup(self) -> re.Pattern[str]:
    """Finds text that looks like a token of the tokenizer's own."""
    return _any_of(self._names(self.special_ids))

  @functools.cached_property
  def _control(self) -> re.Pattern[str]:
    """Finds text that looks like a token that belongs to no answer."""
    return _any_of(self._names(self.control_ids))

  @functools.cached_property
  def control_ids(self) -> frozenset[int]:
    """Added tokens that stop an answer or that the tokenizer calls special."""
    added = self.pretrained.added_tokens_decoder
    return frozenset(
        i for i, token in added.items() if token.special or i in self.stop_ids
    )

  def end_of_text(self, text: str, more: Sequence[int]) -> int:
    """Returns where the text of stop tokens at a text's end begins.

    Args:
      text: an answer.
      more: tokens that end it besides the model's own.
    """
    stops, end = self._names({*self.stop_ids, *more}), len(text)
    while True:
      last = end
      while last and text[last - 1].isspace():
        last -= 1
      found = [s for s in stops if text.endswith(s, 0, last)]
      if not found:
        return end
      end = last - len(found[0])

  def _names(self, ids: Iterable[int]) -> list[str]:
    """Returns the text of those of the tokens that were added."""
    added = self.pretrained.added_tokens_decoder
    return [added[i].content for i in ids if i in added]

  def _pattern(self, message: Message) -> re.Pattern[str]:
    says = message["role"] == "assistant"
    return self._control if says else self._markup

  def _markup_in(self, message: Message) -> bool:
    pattern, content = self._pattern(message), message["content"]
    return bool(
        pattern.search(content) or pattern.search(self._normalized(content))
    )

  def _normalized(self, text: str) -> str:
    """Returns a text as the tokenizer's normalizer makes it."""
    backend = getattr(self.pretrained, "backend_tokenizer", None)
    if text.isascii() or backend is None or backend.normalizer is None:
      return text
    return backend.normalizer.normalize_str(text)

  def _guard(self, message: Message, marks: tuple[str, str]) -> Message:
    """Puts marks around text that looks like a token."""
    pattern, content = self._pattern(message), message["content"]
    normalized = self._normalized(content)
    if len(pattern.findall(normalized)) > len(pattern.findall(content)):
      content = normalized
    content = pattern.sub(lambda m: marks[0] + m[0] + marks[1], content)
    return {**message, "content": content}

  def _encode_guarded(self, text: str, marks: tuple[str, str]) -> list[int]:
    """Encodes a text whose tokens between the marks are plain text.

    What stands between two of the template's own tokens is encoded in one go,
    so that plain text has the tokens that it has elsewhere.
    """
    tokens, stretch, plain = [], "", False
    parts = re.split(f"{marks[0]}(.*?){marks[1]}", text, flags=re.DOTALL)
    for i, part in enumerate(parts):
      if i % 2:
        stretch, plain = stretch + part, True
        continue
      position = 0
      for match in self._markup.finditer(part):
        stretch += part[position : match.start()]
        tokens += self._encode_stretch(stretch, plain)
        tokens += self.encode(match[0])
        stretch, plain, position = "", False, match.end()
      stretch += part[position:]
    return tokens + self._encode_stretch(stretch, plain)

  def _encode_stretch(self, text: str, plain: bool) -> list[int]:
    if not plain:
      return self.encode(text) if text else []
    found = self._plain.encode(text, add_special_tokens=False).ids
    if not self.control_ids.isdisjoint(found):
      raise TokenizerError(
          f"{self.path}: the tokenizer cannot write {text[:60]!r} as plain"
          " text; take it out of the record."
      )
    return found

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """The tokenizer without tokens of its own, but for white space."""
    backend = getattr(self.pretrained, "backend_tokenizer", None)
    if backend is None:
      raise TokenizerError(
          f"{self.path}: text that looks like a token needs a tokenizer.json;"
          " convert the tokenizer, or take such text out of the records."
      )
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = [
        token
        for token in settings["added_tokens"]
        if not token["content"].strip()
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(settings))

  @functools.cached_property
  def longest_text(self) -> int:
    """Characters that a token stands for, at most; above what any has."""
    # Bytes are characters of a vocabulary, and a normalizer may merge some.
    return 4 * max(map(len, self.pretrained.get_vocab()))

  def fits(self, question: Question, max_len: int) -> bool:
    """Whether a question may fit, told without encoding it."""
    most = max_len * self.longest_text
    return sum(len(m["content"]) for m in self._messages(question)) <= most

  def reads_back(self, question: Question, tokens: Sequence[int]) -> bool:
    """Whether the tokens hold what the user and the system prompt say."""
    text = _squeezed(self.decode(tokens))
    return all(
        _squeezed(message["content"]) in text
        for message in self._messages(question)
        if message["role"] != "assistant"
    )

  def opens(self, question: Question, suffix: str) -> bool:
    """Whether the template itself ends with what the suffix opens."""
    template = self.prompt(question, "").rstrip()
    markup = _MARKUP.match(suffix.strip())
    opening = markup[0] if markup else suffix.strip()
    return bool(opening) and template.endswith(opening)

  def _own_suffix(self, question: Question, suffix: str) -> str:
    return "" if self.opens(question, suffix) else suffix

  def own_prompt(self, question: Question, suffix: str) -> str:
    """Renders a question as this model itself has it: the suffix only once."""
    return self.prompt(question, self._own_suffix(question, suffix))

  def opening(self, suffix: str) -> str:
    """Returns how prompts end: a tag with white space, or else the suffix."""
    found = _LAST_MARKUP.search(self.prompt(_PROBE, suffix))
    if found and found[1] in self._names(self.special_ids):
      return found[0]
    return suffix if suffix.strip() else ""

  def answer(self, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Decodes one completion [C] without its stop token."""
    kept = [int(t) for t in tokens[mask] if int(t) not in self.stop_ids]
    return self.decode(kept)


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
  """Finds any of the names, the longest first; white space is no name."""
  names = sorted((n for n in names if n.strip()), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _unused(messages: Sequence[Message]) -> tuple[str, str]:
  """Returns two characters of private use that no message has."""
  used = {c for message in messages for c in message["content"]}
  free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in used)
  return next(free), next(free)


def _squeezed(text: str) -> str:
  """Drops what a template or a normalizer may change: white space and form."""
  return "".join(unicodedata.normalize("NFKC", text).split())


# What a tokenizer is made of.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def _load_tokenizer(path: str, directory: pathlib.Path) -> Any:
  try:
    return transformers.AutoTokenizer.from_pretrained(
        directory, trust_remote_code=False
    )
  except Exception as error:
    _check_config(directory)  # It may be at fault.
    raise TokenizerError(
        f"{path}: the tokenizer cannot be loaded"
        f" ({_broken_file(directory) or one_line(error)}); download the model"
        " again."
    ) from error


def _check_config(directory: pathlib.Path) -> None:
  """Refuses a config.json that transformers cannot read."""
  file = directory / "config.json"
  if not file.is_file():
    return
  hf.read_json(file)
  try:
    transformers.AutoConfig.from_pretrained(
        directory, trust_remote_code=False
    )
  except Exception as error:
    raise TokenizerError(
        f"{file} cannot be read ({one_line(error)}); download it again."
    ) from error


def _broken_file(directory: pathlib.Path) -> str:
  """Says which of the tokenizer's files is at fault; empty if none is."""
  for file in (directory / name for name in _FILES):
    if not file.is_file():
      continue
    try:
      found = read_json(file, finite=False)
    except JsonError as error:
      return f"{file.name} is not JSON: {one_line(error)}"
    if not isinstance(found, dict):
      return f"{file.name} is no JSON object"
    listed = found.get("chat_template")
    if isinstance(listed, list) and not all(
        isinstance(x, dict) and {"name", "template"} <= {*x} for x in listed
    ):
      return f"{file.name} lists chat templates without a name or a template"
  template = directory / "chat_template.jinja"
  try:
    template.read_text("utf-8") if template.is_file() else None
  except ValueError as error:
    return f"{template.name} is not UTF-8: {one_line(error)}"
  return ""


def load(path: str, system: str | None = None) -> Tokenizer:
  """Loads the tokenizer of a model.

  Args:
    path: the model's.
    system: see `Tokenizer`.

  Raises:
    TokenizerError: there is none, it has no stop token, or a question would not
      come out of it and its template as it should.
  """
  directory = hf.resolve(path)
  pretrained = _load_tokenizer(path, directory)
  template = pretrained.chat_template
  if not template:
    raise TokenizerError(
        f"{path}: the tokenizer has no chat template, so prompts cannot be"
        " rendered; add chat_template.jinja to the model's directory."
    )
  if isinstance(template, dict) and "default" not in template:
    raise TokenizerError(
        f"{path}: the tokenizer has the chat templates {', '.join(template)},"
        " and none is called default; write the one to use into"
        " chat_template.jinja."
    )
  end = pretrained.eos_token_id
  _check_known(path, directory, pretrained)
  stops = {*hf.stop_ids(directory, len(pretrained)), end} - {None}
  stops = tuple(sorted(stops))
  if not stops:
    raise TokenizerError(
        f"{path}: neither the tokenizer nor generation_config.json names an"
        " end-of-sequence token, so no answer would end; set eos_token."
    )
  pad = pretrained.pad_token_id
  pad = stops[0] if pad is None else pad
  tokenizer = Tokenizer(path, pretrained, stops, pad, system)
  _check_probe(tokenizer)
  return tokenizer


def _check_known(path: str, directory: pathlib.Path, pretrained: Any) -> None:
  """Refuses an end-of-sequence token that tokenizer.json does not have.

  transformers gives such a token the next free id, which may be a padded row.
  """
  file, end = directory / "tokenizer.json", pretrained.eos_token_id
  if end is None or end < len(pretrained) - 4 or not file.is_file():
    return  # It is known, and a large file need not be read again.
  known = tokenizers.Tokenizer.from_file(str(file))
  if known.token_to_id(pretrained.eos_token) is None:
    raise TokenizerError(
        f"{path}: tokenizer_config.json has the eos_token"
        f" {pretrained.eos_token!r}, which tokenizer.json does not have; name"
        " one of its tokens."
    )


def _check_probe(tokenizer: Tokenizer) -> None:
  """Refuses a template or a tokenizer that loses a plain question."""
  text = tokenizer.prompt(_PROBE, "")
  if _squeezed(_PROBE) not in _squeezed(text):
    raise TokenizerError(
        f"{tokenizer.path}: the chat template leaves the question out; it"
        f" renders {_PROBE!r} as {text[:200]!r}, so repair chat_template.jinja."
    )
  if tokenizer.system and _squeezed(tokenizer.system) not in _squeezed(text):
    raise TokenizerError(
        f"{tokenizer.path}: the chat template leaves the system prompt out;"
        " leave data.system at None, or repair chat_template.jinja."
    )
  _check_generation_prompt(tokenizer, text)
  tokens = tokenizer.encode_prompt(_PROBE, "")
  if not tokenizer.reads_back(_PROBE, tokens):
    raise TokenizerError(
        f"{tokenizer.path}: the tokenizer loses text; it encodes a prompt with"
        f" {_PROBE!r} as {len(tokens)} tokens that read"
        f" {tokenizer.decode(tokens)[:200]!r}, so download its files again"
        " (tokenizer.json above all)."
    )
  bos = tokenizer.pretrained.bos_token_id
  if bos is not None and tokens[:2] == [bos, bos]:
    raise TokenizerError(
        f"{tokenizer.path}: a prompt begins with"
        f" {tokenizer.decode([bos])!r} twice; take one out of"
        " chat_template.jinja."
    )


def _check_generation_prompt(tokenizer: Tokenizer, text: str) -> None:
  """Refuses a template that does not open the assistant's turn.

  Some formats have nothing there. In others an answer that is part of the
  messages shows what opens its turn.
  """
  user, answer = {"role": "user", "content": _PROBE}, "It is 12."
  messages = tokenizer._messages([user])
  if text != tokenizer._render(messages, add_generation_prompt=False):
    if text.endswith(tuple(tokenizer._names(tokenizer.stop_ids))):
      raise TokenizerError(
          f"{tokenizer.path}: the chat template opens the assistant's turn and"
          f" ends it at once, with {text[-40:]!r}; repair chat_template.jinja."
      )
    return
  try:
    whole = tokenizer._render(
        [*messages, {"role": "assistant", "content": answer}]
    )
  except TokenizerError:
    return
  opened = whole[whole.rfind(_PROBE) : whole.find(answer)].rstrip()
  if answer in whole and len(opened) > len(text[text.rfind(_PROBE) :].rstrip()):
    raise TokenizerError(
        f"{tokenizer.path}: the chat template does not open the assistant's"
        " turn; it ignores add_generation_prompt, so repair"
        " chat_template.jinja."
    )


def check_same(student: Tokenizer, teacher: Tokenizer) -> None:
  """Refuses two tokenizers that give a token different ids.

  Raises:
    TokenizerError: they differ; the message names the first such token.
  """
  ours, theirs = (c.pretrained.get_vocab() for c in (student, teacher))
  if ours == theirs:
    return
  # An id without a token has None, and differs from the other's token.
  first = min(i for _, i in ours.items() ^ theirs.items())
  names = [
      next((token for token, i in vocab.items() if i == first), None)
      for vocab in (ours, theirs)
  ]
  raise TokenizerError(
      f"student.path {student.path} and teacher.path {teacher.path} have"
      f" different tokenizers: id {first} is {names[0]!r} for the student and"
      f" {names[1]!r} for the teacher; choose a teacher of the same family,"
      " since distillation compares token by token."
  )
