"""TODO."""

import dataclasses

import ml_collections

from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.config import DatasetSpec
from prefix_distill.config import LossSpec
from prefix_distill.config import ModelSpec
from prefix_distill.config import RelaxedSpec
from prefix_distill.evaluate import evaluator

# The student, the teacher and what follows the chat template's prompt.
_PAIRS = {
    "r1-1.5b": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Skywork/Skywork-OR1-7B",
        "",
    ),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B", "<think>"),
    "qwen3-8b": ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "<think>"),
}  # fmt: skip


def _loss(steps: int) -> LossSpec:
  """The switch is in the middle of the run."""
  relaxed = RelaxedSpec(switch_step=steps // 2)
  return LossSpec("relaxed", normalize="tokens", relaxed=relaxed)


def _small() -> config_lib.Config:
  steps = 40
  task = DatasetSpec(source="chain_task", answer="answer", size=100_000)
  heldout = dataclasses.replace(task, split="test", size=120)
  return config_lib.Config(
      method="full",
      steps=steps,
      student=ModelSpec("bundled:chain-weak"),
      teacher=ModelSpec("bundled:chain-teacher"),
      data=config_lib.DataSpec(task, batch_size=16, max_prompt_len=21),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=240),
      loss=_loss(steps),
      optimizer=config_lib.OptimizerSpec(learning_rate=3e-4, warmup_steps=2),
      evaluation=config_lib.EvaluationSpec(
          {"heldout": heldout},
          max_len=240,
          batch_size=120,
          greedy=False,
          teacher=False,
      ),
      checkpoint=config_lib.CheckpointSpec(every=20),
  )


def _full_size(name: str) -> config_lib.Config:
  steps, (student, teacher, suffix) = 300, _PAIRS[name]
  questions = DatasetSpec(
      source="open-thoughts/OpenThoughts3-1.2M",
      question="conversations.0.value",
      size=30_700,
  )
  return config_lib.Config(
      method="full",
      steps=steps,
      student=ModelSpec(student, compute_dtype="bfloat16", remat="full"),
      teacher=ModelSpec(
          teacher, compute_dtype="bfloat16", param_dtype="bfloat16"
      ),
      data=config_lib.DataSpec(
          questions, batch_size=128, max_prompt_len=512, suffix=suffix
      ),
      rollout=config_lib.RolloutSpec(per_prompt=8, max_len=8192),
      loss=_loss(steps),
      optimizer=config_lib.OptimizerSpec(
          learning_rate=1e-6, warmup_steps=2, batch_tokens=2**18
      ),
      evaluation=config_lib.EvaluationSpec(
          dict(evaluator.SETS), every=50, between=("aime24",), teacher=False,
          batch_size=0, **evaluator.PROTOCOL,
      ),
      mesh=config_lib.MeshSpec(data=1, fsdp=8),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )  # fmt: skip


def get_config(name: str = "small") -> ml_collections.ConfigDict:
  """Returns the experiment; see the docstring above."""
  name = name or "small"
  errors.check(
      name == "small" or name in _PAIRS,
      f"configs/relaxed.py has no argument {name!r}; use one of small,"
      f" {', '.join(_PAIRS)}.",
  )
  config = _small() if name == "small" else _full_size(name)
  return ml_collections.ConfigDict(config_lib.to_dict(config))
