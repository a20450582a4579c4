"""Relaxed on-policy distillation (REOPOLD, arXiv 2603.11137).

  python -m prefix_distill.main --config=configs/relaxed.py:NAME

NAME is `small` (default), `r1-1.5b`, `qwen3-1.7b` or `qwen3-8b`. The policy
gradient on sampled tokens with the reward R = log q - log p (q: teacher, p:
student), of which a part counts; `prefix_distill/distill/loss.py` has the
formula. In the first half of the updates (exploration) tokens with R below a
floor are dropped. In the second (refinement) R is raised to the floor, and the
fifth of an update's tokens counts at which the student's entropy is largest.
The sum is divided by the number of tokens that count, over all microbatches and
devices. Metrics: `counted` is their share of all tokens, `phase` the phase, and
`least_entropy` the entropy from which tokens count in refinement.

Sources. Of the paper we have read the abstract; the rest is from public notes
and implementations of others. They agree on the reward, on what each phase
drops, on the sum's divisor, and but for one on the share 0.2. They differ on
  the floor, for the weight a: log(a / (1 - a)) in four, of which two cite
    equation 7, and log(a) / (1 - a) in two. The default is the first:
    --config.loss.relaxed.floor=scaled_log is the other, and `log`, log(a), is
    ours. `loss.relaxed.floor` says what each means;
  the weight: 0.3 as the paper's default in one and as an example in one, 0.1
    as the paper's in one, 0.2 from a figure in one. The default is 0.3, where
    the floor is -0.85;
  the switch: 150 of 300 updates as the paper's in one, the default; after a
    third of the updates in one.

small
  Prompts of 21 tokens and answers of 236 (`ChainTask` in
  `prefix_distill/data/bundled_tasks.py`): 28 sums, of which the student gets 5
  in 100 wrong. 40 updates of 16 rollouts, the switch after 20.
  Hardware and cost: 1 minute and 25 seconds of CPU time; 8.4e11 FLOPs.
  Result, sampled accuracy in % on 120 problems (95 % interval), and the mean of
  k1 in the last five updates in nats a token; below the plain policy gradient
  with the same budget, --config.loss.form=policy_gradient:
                    before              after               k1
    relaxed, seed 0 26.7 (19.6-35.2)    53.3 (44.4-62.0)    0.046
    relaxed, seed 1 29.2 (21.8-37.8)    49.2 (40.4-58.0)    0.071
    plain, seed 0   26.7 (19.6-35.2)    52.5 (43.6-61.2)    0.034
    plain, seed 1   29.2 (21.8-37.8)    55.8 (46.9-64.4)    0.044
  Two seeds do not tell them apart: +0.8 points with one, -6.6 with the other.
  In exploration 98.8 % of the tokens count. Those that are dropped are the
  student's wrong results, of which this task consists, so k1 falls more slowly
  in that half: in updates 16 to 20 it is 0.082 and 0.113, with the plain
  gradient 0.057 and 0.050. In refinement tokens count from 0.0015 to 0.0034
  nats on: four fifths of the tokens are copied or certain.

r1-1.5b
  The paper's mathematical pair according to one public list:
  DeepSeek-R1-Distill-Qwen-1.5B learns from Skywork-OR1-7B. 300 updates, the
  switch after 150. Not known to us, and chosen here: 128 of 30,700 distinct
  questions on mathematics of OpenThoughts3 with 8 rollouts of at most 8,192
  tokens, temperature 1 (one reader has 0.6), AdamW at a constant 1e-6 after 2
  warm-up updates, no suffix, since we take the chat templates to open `<think>`
  themselves (--preflight shows the prompt), and the evaluation of
  `configs/math.py`.
  Hardware: 8 x H100, where it takes at least 12.5 hours and 0.9 for evaluation
  if all rollouts reach the cap, says `prefix_distill.plan --topology=h100:8`.
  We have not run it.

qwen3-1.7b, qwen3-8b
  The same with the pairs of `configs/math.py`: 31.8 and 66.0 hours, and 3.2 and
  7.7 for evaluation; both fit, see docs/scale.md. Not run by us.
"""

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
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "Skywork/Skywork-OR1-7B",
        "",
    ),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B", "<think>"),
    "qwen3-8b": ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "<think>"),
}


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
      where=("domain=math",),
      distinct=True,
      random=True,
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
          # As many tokens at a time as the memory holds.
          learning_rate=1e-6, warmup_steps=2
      ),
      evaluation=config_lib.EvaluationSpec(
          dict(evaluator.SETS),
          every=50,
          between=("aime24",),
          teacher=False,
          batch_size=0,
          **evaluator.PROTOCOL,
      ),
      mesh=config_lib.MeshSpec(data=1, fsdp=-1),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )


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
