"""Makes the bundled tokenizers, and the start of `configs/bundled.py:guided`.

  python -m prefix_distill.experiments.bundled_models tokenizer DIR EOS_TOKEN
  python -m prefix_distill.experiments.bundled_models guided DIR

The tokenizers are byte-level like Qwen3's, so they encode any text. They have
Qwen3's special tokens and chat template, and every word of the bundled task is
one token. The guided model starts as the bundled teacher, with more embeddings
for the words of the contexts. Each new embedding is a copy of a known word's
embedding; a German word copies its English word.
"""

from collections.abc import Iterable
import json
import pathlib
import shutil
import sys

import numpy as np
import safetensors.numpy
from tokenizers import AddedToken
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import Regex
from tokenizers import Tokenizer
import transformers

from prefix_distill import assets
from prefix_distill.data import bundled_tasks

# Qwen's pattern, but a number with the space before it is one token.
_PATTERN = (
    r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_EMBEDDING = "model.embed_tokens.weight"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKUP = ("<think>", "</think>")
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def make_tokenizer(
    eos_token: str, more: Iterable[str] = ()
) -> transformers.PreTrainedTokenizerFast:
  """Builds the tokenizer.

  Args:
    eos_token: `<|endoftext|>` for a base model, `<|im_end|>` for a chat model.
    more: further words that are one token each. Their ids come last, so that
      all other ids stay.
  """
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
  pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
  for word in bundled_tasks.vocabulary():
    piece = byte_level.pre_tokenize_str(word)[0][0]
    if piece not in pieces:
      pieces.append(piece)
  more = [byte_level.pre_tokenize_str(word)[0][0] for word in more]
  if more:  # An added token takes its existing id, or else the next id.
    pieces += [*_SPECIAL, *_MARKUP, *more]
  # Without merges a word is one token or a sequence of bytes.
  model = models.BPE(
      {piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True
  )
  tokenizer = Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens([
      AddedToken(token, special=token in _SPECIAL, normalized=False)
      for token in (*_SPECIAL, *_MARKUP)
  ])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer,
      eos_token=eos_token,
      pad_token="<|endoftext|>",
      chat_template=_CHAT_TEMPLATE,
      clean_up_tokenization_spaces=False,
      padding_side="left",
  )


def make_guided(directory: pathlib.Path) -> None:
  """Writes the model's directory."""
  shutil.copytree(assets.path("teacher"), directory)
  tokenizer = make_tokenizer("<|im_end|>", bundled_tasks.WORDS)
  tokenizer.save_pretrained(directory)
  starts = [tokenizer.encode(old) for old in bundled_tasks.WORDS.values()]
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  rows = tensors[_EMBEDDING]
  tensors[_EMBEDDING] = np.concatenate([rows, rows[np.ravel(starts)]])
  safetensors.numpy.save_file(
      tensors, directory / "model.safetensors", metadata={"format": "pt"}
  )
  settings = json.loads((directory / "config.json").read_text())
  settings["vocab_size"] = len(tokenizer)
  (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
  what, directory, *rest = sys.argv[1:]
  if what == "guided":
    make_guided(pathlib.Path(directory))
  else:
    make_tokenizer(*rest).save_pretrained(directory)


if __name__ == "__main__":
  main()
