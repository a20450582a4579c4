r"""A real language model learns to write sums out, on a laptop or one GPU.

  prefix-distill train --config=language:method=sft --workdir=runs/teacher
  prefix-distill train --config=language:teacher=runs/teacher/export

SmolLM2-135M-Instruct can add, and rambles. Trained on 320 worked answers
(`SumsTask` in `prefix_distill/data/bundled_tasks.py`) it is the teacher; as it
comes it is the student, which learns from the teacher on prefixes of its own
answers. Options, joined by commas:

  student=DIR     a directory or hub id (HuggingFaceTB/SmolLM2-135M-Instruct);
                  with method=sft it is what becomes the teacher
  teacher=DIR     a directory or hub id (runs/teacher/export)
  method=METHOD   prefix (default), full, seqkd or sft
  sets=A+B        heldout (default) and validation

Answers have 56 tokens and prompts 38, so that 2 cores suffice; nothing here
says how it is for answers of thousands of tokens. `evaluation.scored` has the
teacher score whole answers, which tells students apart that are never right.
"""

import dataclasses

import ml_collections

from prefix_distill import config as config_lib
from prefix_distill.config import DatasetSpec
from prefix_distill.errors import check

_DEFAULTS = {
    "student": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "teacher": "runs/teacher/export",
    "method": "prefix",
    "sets": "heldout",
}
_METHODS = ("prefix", "full", "seqkd", "sft")
_SPLITS = {"heldout": "test", "validation": "validation"}


def _parse(argument: str) -> dict[str, str]:
  """Splits "student=A,method=B"."""
  found = dict(_DEFAULTS)
  for part in filter(None, argument.split(",")):
    name, _, value = part.partition("=")
    check(
        name in _DEFAULTS and bool(value),
        f"configs/language.py has no argument {part!r}; use"
        f" {', '.join(f'{n}=' for n in _DEFAULTS)}.",
    )
    found[name] = value
  check(
      found["method"] in _METHODS,
      f"configs/language.py:method={found['method']} is none of"
      f" {', '.join(_METHODS)}.",
  )
  for name in found["sets"].split("+"):
    check(
        name in _SPLITS,
        f"configs/language.py:sets={name} is none of {', '.join(_SPLITS)}.",
    )
  return found


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; see the docstring above."""
  given = _parse(argument)
  task = DatasetSpec(
      "sums_task", question="messages", answer="answer", size=100_000
  )
  sets = {
      name: dataclasses.replace(task, split=_SPLITS[name], size=200)
      for name in given["sets"].split("+")
  }
  is_sft = given["method"] == "sft"
  if is_sft:
    task = dataclasses.replace(task, completion="completion")
  config = config_lib.Config(
      method=given["method"],
      steps=20 if is_sft else 16,
      student=config_lib.ModelSpec(given["student"]),
      teacher=None if is_sft else config_lib.ModelSpec(given["teacher"]),
      data=config_lib.DataSpec(
          task, batch_size=16, max_prompt_len=42, suffix=""
      ),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=64),
      prefix=config_lib.PrefixSpec(
          buckets=(8, 16, 32, 64), linear=config_lib.LinearSpec(increment=4)
      ),
      optimizer=config_lib.OptimizerSpec(
          learning_rate=1e-4 if is_sft else 5e-5, warmup_steps=2
      ),
      evaluation=config_lib.EvaluationSpec(
          sets,
          max_len=64,
          batch_size=100,
          greedy=False,
          teacher=False,
          scored=0 if is_sft else 100,
      ),
      checkpoint=config_lib.CheckpointSpec(every=20),
  )
  return ml_collections.ConfigDict(config_lib.to_dict(config))
