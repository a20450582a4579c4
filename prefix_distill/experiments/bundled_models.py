"""Makes the bundled tokenizers and the start of `configs/bundled.py:guided`.

  python -m prefix_distill.experiments.bundled_models tokenizer DIR EOS_TOKEN
  python -m prefix_distill.experiments.bundled_models guided DIR

The tokenizers are byte-level like Qwen3's, with the same special tokens and
chat template, so any text can be encoded; the words of the bundled task are
whole tokens. The start of the guided task is the bundled teacher with rows for
the words of the contexts. Each of those rows starts as a copy of the row of a
known word, and the row of a German word as a copy of the row of its English
word.
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

# As Qwen's, but a number is one token and takes the space before it.
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
    more: words that are whole tokens as well; their ids come last, so that
      those of all others stay.
  """
  pre = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  byte_level = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
  )
  pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
  for word in bundled_tasks.vocabulary():
    piece = byte_level.pre_tokenize_str(word)[0][0]
    if piece not in pieces:
      pieces.append(piece)
  more = [byte_level.pre_tokenize_str(word)[0][0] for word in more]
  if more:  # Added tokens take an id that is there, or else the next.
    pieces += [*_SPECIAL, *_MARKUP, *more]
  # Without merges a word is its own token or a row of bytes.
  model = models.BPE(
      {piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True
  )
  tokenizer = Tokenizer(model)
  tokenizer.pre_tokenizer = pre
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(
      [
          AddedToken(t, special=True, normalized=False)
          for t in _SPECIAL
      ]
      + [
          AddedToken(t, special=False, normalized=False)
          for t in _MARKUP
      ]
  )
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
