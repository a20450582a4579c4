"""Tokenizers, chat templates and stop tokens; transformers does the work."""

from collections.abc import Sequence
import dataclasses
import json
import re
from typing import Any

import numpy as np
import transformers

from prefix_distill.errors import UserError
from prefix_distill.models import hf

_MARKUP = re.compile(r"<[^<>\s]+>")


class TokenizerError(UserError):
  """A tokenizer that is missing, or does not fit the other model's."""


@dataclasses.dataclass(frozen=True)
class Chat:
  """A model's tokenizer with what the loop needs of it.

  Attributes:
    path: the model's path, for messages.
    tokenizer: from transformers.
    stop_ids: the tokens at which the model ends an answer.
    pad_id: what padding is filled with; always masked.
  """

  path: str
  tokenizer: Any
  stop_ids: tuple[int, ...]
  pad_id: int

  @property
  def num_tokens(self) -> int:
    """Real token ids; a vocabulary's rows above are padding."""
    return len(self.tokenizer)

  @property
  def end_id(self) -> int:
    """What ends an answer in training: the tokenizer's own stop token."""
    end = self.tokenizer.eos_token_id
    return self.stop_ids[0] if end is None else end

  @property
  def special_ids(self) -> tuple[int, ...]:
    """Tokens that are not text: those added, such as `<think>`, and stops."""
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
    """Renders a question as the user's turn, without a system prompt."""
    text = self.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return text + suffix

  def opens(self, question: str, suffix: str) -> bool:
    """Whether the template itself ends with what the suffix opens."""
    template = self.prompt(question, "").rstrip()
    markup = _MARKUP.match(suffix.strip())
    opening = markup[0] if markup else suffix.strip()
    return bool(opening) and template.endswith(opening)

  def own_prompt(self, question: str, suffix: str) -> str:
    """Renders a question as this model itself has it: the suffix only once."""
    return self.prompt(question, "" if self.opens(question, suffix) else suffix)

  def answer(self, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Decodes one completion [C] up to, and without, its stop token."""
    kept = [int(t) for t in tokens[mask] if int(t) not in self.stop_ids]
    return self.decode(kept)


def _stop_ids(directory: Any, tokenizer: Any) -> tuple[int, ...]:
  """The tokenizer's end of sequence and those of the generation config."""
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
    TokenizerError: there is none, or it has no chat template or stop token.
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
    TokenizerError: with the first token that differs.
  """
  ours, theirs = (c.tokenizer.get_vocab() for c in (student, teacher))
  if ours == theirs:
    return
  by_id = [{i: t for t, i in vocab.items()} for vocab in (ours, theirs)]
  first = next(
      i
      for i in sorted(by_id[0].keys() | by_id[1].keys())
      if by_id[0].get(i) != by_id[1].get(i)
  )
  raise TokenizerError(
      f"student.path {student.path} and teacher.path {teacher.path} have"
      f" different tokenizers: id {first} is {by_id[0].get(first)!r} for the"
      f" student and {by_id[1].get(first)!r} for the teacher; choose a teacher"
      " of the same family, since distillation compares token by token."
  )
