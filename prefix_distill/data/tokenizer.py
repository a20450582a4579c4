"""Tokenizers, chat templates and stop tokens, read with transformers."""

from collections.abc import Sequence
import dataclasses
import json
import re
from typing import Any

import numpy as np
import transformers

from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf

_MARKUP = re.compile(r"<[^<>\s]+>")


class TokenizerError(UserError):
  """A tokenizer that is missing, or differs from the other model's."""


@dataclasses.dataclass(frozen=True)
class Chat:
  """A model's tokenizer, chat template and stop tokens.

  Attributes:
    path: the model's path, for messages.
    tokenizer: the tokenizer of transformers.
    stop_ids: the tokens that end the model's answers.
    pad_id: the padding token; padding is always masked.
  """

  path: str
  tokenizer: Any
  stop_ids: tuple[int, ...]
  pad_id: int

  @property
  def num_tokens(self) -> int:
    """The number of tokens; rows of an embedding table above are padding."""
    return len(self.tokenizer)

  @property
  def end_id(self) -> int:
    """The token that ends an answer in training: the end of sequence."""
    end = self.tokenizer.eos_token_id
    return self.stop_ids[0] if end is None else end

  @property
  def special_ids(self) -> tuple[int, ...]:
    """Tokens that are not text: added tokens, such as `<think>`, and stops."""
    added = self.tokenizer.added_tokens_decoder
    return tuple(sorted({*added, *self.stop_ids}))

  def encode(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False)

  def decode(self, tokens: Sequence[int]) -> str:
    """Returns the text, special tokens included."""
    return self.tokenizer.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def prompt(self, question: str, suffix: str) -> str:
    """Renders a question as the user's turn; there is no system prompt."""
    text = self.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return text + suffix

  def opens(self, question: str, suffix: str) -> bool:
    """Whether the template already ends with the suffix's first tag."""
    template = self.prompt(question, "").rstrip()
    markup = _MARKUP.match(suffix.strip())
    opening = markup[0] if markup else suffix.strip()
    return bool(opening) and template.endswith(opening)

  def own_prompt(self, question: str, suffix: str) -> str:
    """Renders a question; adds the suffix unless the template ends with it."""
    return self.prompt(question, "" if self.opens(question, suffix) else suffix)

  def answer(self, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Decodes one completion [C] without its stop token."""
    kept = [int(t) for t in tokens[mask] if int(t) not in self.stop_ids]
    return self.decode(kept)


def _stop_ids(directory: Any, tokenizer: Any) -> tuple[int, ...]:
  """Returns the stop tokens of the tokenizer and the generation config."""
  stops = []
  if tokenizer.eos_token_id is not None:
    stops.append(tokenizer.eos_token_id)
  file = directory / "generation_config.json"
  if file.is_file():
    listed = json.loads(file.read_text()).get("eos_token_id")
    stops += listed if isinstance(listed, list) else [listed]
  return tuple(sorted({s for s in stops if s is not None}))


def load(path: str) -> Chat:
  """Loads the tokenizer of a model.

  Raises:
    TokenizerError: the tokenizer, its chat template or a stop token is missing.
  """
  directory = hf.resolve(path)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        directory, trust_remote_code=False
    )
  except Exception as error:
    raise TokenizerError(
        f"{path}: the tokenizer cannot be loaded"
        f" ({str(error).splitlines()[0]}); download the model again."
    ) from error
  if not tokenizer.chat_template:
    raise TokenizerError(
        f"{path}: the tokenizer has no chat template, so prompts cannot be"
        " rendered; add chat_template.jinja to the model's directory."
    )
  stops = _stop_ids(directory, tokenizer)
  if not stops:
    raise TokenizerError(
        f"{path}: neither the tokenizer nor generation_config.json names an"
        " end-of-sequence token, so no answer would end; set eos_token."
    )
  pad = tokenizer.pad_token_id
  return Chat(path, tokenizer, stops, stops[0] if pad is None else pad)


def check_same(student: Chat, teacher: Chat) -> None:
  """Refuses two tokenizers that give a token different ids.

  Raises:
    TokenizerError: they differ; the message names the first such token.
  """
  ours, theirs = (c.tokenizer.get_vocab() for c in (student, teacher))
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
