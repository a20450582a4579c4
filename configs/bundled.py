"""How the bundled models were made: tokenizers, and supervised training.

  python -m configs.bundled tokenizer DIR EOS_TOKEN
  python -m prefix_distill.main --config=configs/bundled.py:teacher
  python -m prefix_distill.main --config=configs/bundled.py:capable
  python -m prefix_distill.main --config=configs/bundled.py:weak
  python -m configs.bundled guided runs/guided-start
  python -m prefix_distill.main --config=configs/bundled.py:guided
  python -m prefix_distill.main --config=configs/bundled.py:chain-teacher
  python -m prefix_distill.main --config=configs/bundled.py:chain-weak
  python -m prefix_distill.main --config=configs/bundled.py:rewriter

The tokenizers are byte-level like Qwen3's, so they encode any text. They have
Qwen3's special tokens and chat template, and every word of the bundled task is
one token. The guided model starts as the bundled teacher, with more embeddings
for the words of the contexts. Each new embedding is a copy of a known word's
embedding; a German word copies its English word.

The teacher learns from clean solutions. The students stand for base models:
they go on from the teacher with the sloppy solutions that stand for the web.
`guided` goes on from it with answers that depend on the context (see
`data/bundled_tasks.py`), and is evaluated in each. Each run leaves its model in
`runs/bundled-NAME/export`; copied to `prefix_distill/assets/NAME`, it is what
ships.

`guided` took half an hour on one busy CPU core. Its accuracy on 200 held-out
problems, sampled and greedy, and the sampled answers' mean length:

  question   45.0 %    99.5 %   124
  careful    96.0 %   100.0 %   168
  brief      96.0 %    99.5 %    46
  shown      95.0 %   100.0 %   188
  german     18.0 %     2.5 %   108

`chain-teacher` and `chain-weak` are of the chain task. The student goes on from
its teacher with sums of which 5 % are wrong, always the same ones. On one core
of a busy machine they took 35 minutes (10 of them its own) and 4. Sampled
accuracy on 480 problems of the validation split: 98.8 and 26.9 %.

`rewriter` goes on from `guided` with solutions to be written in short lines,
for `configs/mixed_policy.py`. Its 150 updates took 30 minutes on a machine that
others kept busy. Of 400 held-out solutions, half of them sloppy, it rewrites
7.9 % right before and 83.4 % (79.4-86.7) after, sampled, in 91 and 46 tokens.
"""

from collections.abc import Iterable
import dataclasses
import json
import pathlib
import shutil
import sys

import ml_collections
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
from prefix_distill import config as config_lib
from prefix_distill import errors
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


@dataclasses.dataclass(frozen=True)
class _Stage:
  """Where one model starts from and what it learns.

  A base model stops with <|endoftext|>, its teacher with <|im_end|>: the
  tokenizer says which.
  """

  path: str
  random_init: bool
  style: str
  steps: int
  learning_rate: float
  warmup_steps: int = 20
  tokenizer: str = ""
  max_prompt_len: int = 52
  task: str = "math_task"
  max_len: int = 232


_STAGES = {
    "teacher": _Stage("bundled:teacher", True, "clean", 2000, 2.5e-3, 100),
    "capable": _Stage(
        "runs/bundled-teacher/export",
        False,
        "capable",
        1600,
        7e-4,
        tokenizer="bundled:capable",
    ),
    "weak": _Stage(
        "runs/bundled-teacher/export",
        False,
        "weak",
        200,
        5e-4,
        tokenizer="bundled:weak",
    ),
    "guided": _Stage(
        "runs/guided-start", False, "guided", 1400, 7e-4, max_prompt_len=100
    ),
    "chain-teacher": _Stage(
        "bundled:chain-teacher",
        True,
        "clean",
        1400,
        2.5e-3,
        100,
        max_prompt_len=21,
        task="chain_task",
        max_len=237,
    ),
    "chain-weak": _Stage(
        "runs/bundled-chain-teacher/export",
        False,
        "weak",
        300,
        7e-4,
        tokenizer="bundled:chain-weak",
        max_prompt_len=21,
        task="chain_task",
        max_len=237,
    ),
    "rewriter": _Stage(
        "bundled:guided",
        False,
        "rewrite",
        150,
        7e-4,
        max_prompt_len=300,
        max_len=72,
    ),
}
_PROMPTED = ("guided", "rewrite")


def _problems(stage: _Stage) -> config_lib.DatasetSpec:
  return config_lib.DatasetSpec(
      source=stage.task,
      subset=stage.style,
      question="prompt" if stage.style in _PROMPTED else "question",
      answer="answer",
      completion="completion",
      size=1_000_000,
  )


def _heldout(stage: _Stage) -> dict[str, config_lib.DatasetSpec]:
  """Returns the evaluation set, or one for each context."""
  test = dataclasses.replace(_problems(stage), split="test")
  if stage.style != "guided":
    return {"heldout": dataclasses.replace(test, size=400)}
  return {
      context: dataclasses.replace(test, question=context, size=200)
      for context in bundled_tasks.CONTEXTS
  }


def get_config(name: str) -> ml_collections.ConfigDict:
  """Returns the config of a stage, one of `_STAGES`."""
  if name not in _STAGES:
    raise errors.ConfigError(
        f"configs/bundled.py has no argument {name!r}; use one of"
        f" {', '.join(_STAGES)}."
    )
  stage = _STAGES[name]
  config = config_lib.Config(
      method="sft",
      steps=stage.steps,
      student=config_lib.ModelSpec(
          stage.path, random_init=stage.random_init, tokenizer=stage.tokenizer
      ),
      data=config_lib.DataSpec(
          _problems(stage), batch_size=16, max_prompt_len=stage.max_prompt_len
      ),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=stage.max_len),
      optimizer=config_lib.OptimizerSpec(
          learning_rate=stage.learning_rate,
          warmup_steps=stage.warmup_steps,
          decay="cosine",
          final_fraction=0.02,
          weight_decay=0.1,
          b2=0.99,
      ),
      evaluation=config_lib.EvaluationSpec(
          sets=_heldout(stage), every=500, max_len=256, batch_size=200
      ),
      # So that no two of the models see the same problems in the same order.
      seed=list(_STAGES).index(name),
      checkpoint=config_lib.CheckpointSpec(every=200),
  )
  return ml_collections.ConfigDict(config_lib.to_dict(config))


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
  tokenizer.add_tokens(
      [
          AddedToken(token, special=token in _SPECIAL, normalized=False)
          for token in (*_SPECIAL, *_MARKUP)
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
