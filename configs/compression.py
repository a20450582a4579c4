r"""Reasoning compression by self-distillation: a model learns to be brief.

  python -m prefix_distill.main --config=configs/compression.py:MODEL

The student reads the problem. The teacher is the same model, and reads an
instruction to be concise before the problem. Every M updates
(`teacher.refresh`) the teacher's weights become the student's, so that what was
learned is asked to be brief once more. The loss is the exact reverse KL on the
student's own answers, the mean over answers of each answer's mean over its
tokens (`loss.normalize` "length"). Source: OPSDC, later CRISP (Sang et al.,
March 2026).

MODEL is `tiny` (default), `qwen3-8b`, `qwen3-14b` or `r1-llama-8b`. More
arguments follow it, separated by commas:

  instruction=difficulty   asks for correctness first, and for brevity where the
                           problem is easy (default)
  instruction=uniform      asks for brevity whatever the problem
  cap=8k                   answers of at most so many tokens are sampled and
                           learned from; 1k, 8k (default) or a number
  sets=math500+aime24      evaluates on these sets only

`tiny` has an instruction of its own, "Be brief.", and a cap of 64 tokens, more
than a brief answer has. `--config.teacher.refresh=0` freezes the teacher.

tiny
  `bundled:guided` on the bundled task: nothing is downloaded. It is trained to
  answer short after "Be brief." and long after "Take care.", which the student
  has, so the case shows the mechanism, and no more. The run has half of the
  authors' 100 updates, so the default M is 25 for their 50.
  Hardware and cost: 1 CPU core; the 50 updates took 32 to 140 s on a busy
  machine.
  Result, 2026-11-30, seeds 0 and 1, on 240 held-out problems in the student's
  context: sampled accuracy in % with its 95 % interval, and the mean length in
  tokens.
                 seed 0                  seed 1
    before       95.8 (92.5-97.7) 169    92.9 (89.0-95.5) 171
    frozen       95.4 (92.0-97.4)  46    95.0 (91.5-97.1)  47
    M = 25       93.8 (89.9-96.2)  46    92.9 (89.0-95.5)  46
    M = 5        18.8 (14.3-24.2) 155     5.0  (2.9-8.5)   75
    M = 1         0.0  (0.0-1.6)  256     0.0  (0.0-1.6)  256
  So the collapse at M = 1 shows, and for M = 5, the authors' 10 in proportion,
  most of it. Progressive compression does not: a frozen teacher has the student
  as brief as itself within a few updates, since this model was made to answer
  in two lengths and knows no third. With M = 1 answers grow from about update
  28 on up to the cap, and the divergence is 0.0001 by then: the teacher agrees,
  and nothing calls the student back. What the teacher's context gives falls
  with every refresh: 94.2 and 95.8 % there with a frozen teacher, 89.2 and 88.3
  with M = 25, 8.3 and 3.8 with M = 5.

qwen3-8b, qwen3-14b, r1-llama-8b
  Qwen/Qwen3-8B, Qwen/Qwen3-14B and deepseek-ai/DeepSeek-R1-Distill-Llama-8B as
  the authors trained them on 8 x H200: 100 updates of 32 problems with one
  answer each at temperature 1, at most 8,192 tokens, AdamW at 1e-6 with weight
  decay 0.01, M = 50. They report for Qwen3-8B 31.6 % fewer tokens on MATH-500
  (29.8 % with cap=1k) and 17.1 % on AIME24 at the same accuracy; for M = 10
  64 % fewer on MATH-500 at some cost in accuracy, for a frozen teacher 18 %,
  and for M = 1 a collapse. We have not run it at this size. Evaluation is most
  of what it costs: on 8 x H100 the updates of the 8B take at least 2.2 hours,
  says `plan`, and evaluation, were all answers 30,000 tokens long, 555 hours,
  or 28 without MMLU (sets=math500+aime24+aime25+gpqa). docs/scale.md has the
  others.
  Problems: the statements of DAPO-Math-17k. The authors took about 13,600. The
  hub's BytedTsinghua-SIA/DAPO-Math-17k has each many times, in a list of chat
  messages with a request for the answer's form around it. So the default is
  open-r1/DAPO-Math-17k-Processed, subset `en`: without repetitions, `prompt` as
  text, 14,116 records (as the data sets' cards and users' code say; we have not
  downloaded it). 100 updates see 3,200 of them. For the raw one set
  --config.data.train.source=BytedTsinghua-SIA/DAPO-Math-17k and
  --config.data.train.subset=''.
  Evaluated before and after: temperature 0.6, top-p 0.95, top-k 20, 30,000
  tokens, 8 answers a problem, on MATH500, AIME24, AIME25, GPQA (diamond) and
  MMLU (all 14,042 questions: 19 of 20 answers are its own, which sets= can
  leave out); right if the last box or the last line "Answer:" is. Each line of
  the metrics has `mean_length` in tokens beside `accuracy`. GPQA needs a login
  on the hub.
  Not known to us, and chosen here: the wording of both instructions, no
  warm-up, clip at 1, prompts of at most 1,024 tokens, the model's own chat
  template with nothing behind it, and which questions of MMLU.
"""

import dataclasses

import ml_collections

from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.config import DatasetSpec
from prefix_distill.evaluate import evaluator

_MODELS = {
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "r1-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
_INSTRUCTIONS = {
    "difficulty": (
        "Being right comes first, being brief second. If the problem is easy,"
        " go straight to the answer in the few steps that it takes. If it is"
        " hard, keep every step that the answer rests on, treat all cases, and"
        " check the result once at the end."
    ),
    "uniform": (
        "Be direct. Do not restate the problem, and leave out every step that"
        " the answer does not need: write the key steps only, then the answer."
    ),
}
_CAPS = {"1k": 1024, "8k": 8192}


def _prefix(cap: int) -> config_lib.PrefixSpec:
  return config_lib.PrefixSpec("fixed", fixed=config_lib.FixedSpec(cap))


def _tiny(cap: int) -> config_lib.Config:
  task = DatasetSpec(
      source="math_task",
      subset="guided",
      question="careful",
      answer="answer",
      size=100_000,
  )
  heldout = dataclasses.replace(task, split="test", size=240)
  # How the student answers what the teacher is asked.
  context = dataclasses.replace(heldout, question="brief")
  return config_lib.Config(
      method="prefix",
      steps=50,
      student=config_lib.ModelSpec("bundled:guided"),
      teacher=config_lib.ModelSpec("bundled:guided", refresh=25),
      data=config_lib.DataSpec(
          task,
          batch_size=32,
          max_prompt_len=56,
          teacher_prompt="Be brief. {question}",
      ),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=256),
      prefix=_prefix(cap or 64),
      loss=config_lib.LossSpec(normalize="length"),
      optimizer=config_lib.OptimizerSpec(learning_rate=3e-4, warmup_steps=2),
      evaluation=config_lib.EvaluationSpec(
          sets={"heldout": heldout, "context": context},
          max_len=256,
          greedy=False,
          batch_size=240,
          # It would be evaluated on the student's prompts.
          teacher=False,
      ),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )


def _sets() -> dict[str, DatasetSpec]:
  sets = {
      name: evaluator.SETS[name]
      for name in ("math500", "aime24", "aime25", "gpqa")
  }
  sets["mmlu"] = dataclasses.replace(
      evaluator.SETS["mmlu_pro"],
      source="cais/mmlu",
      subset="all",
      choices=("choices",),
      size=0,
      random=False,
  )
  return {
      name: dataclasses.replace(spec, samples=8, rule="dual")
      for name, spec in sets.items()
  }


def _large(model: str, instruction: str, cap: int) -> config_lib.Config:
  statements = DatasetSpec(
      source="open-r1/DAPO-Math-17k-Processed", subset="en", question="prompt"
  )
  path = _MODELS[model]
  return config_lib.Config(
      method="prefix",
      steps=100,
      student=config_lib.ModelSpec(
          path, compute_dtype="bfloat16", remat="full"
      ),
      teacher=config_lib.ModelSpec(
          path, compute_dtype="bfloat16", param_dtype="bfloat16", refresh=50
      ),
      data=config_lib.DataSpec(
          statements,
          batch_size=32,
          max_prompt_len=1024,
          # These models' templates and habits open the thinking.
          suffix="",
          teacher_prompt=f"{_INSTRUCTIONS[instruction]}\n\n{{prompt}}",
          max_teacher_prompt_len=1152,
      ),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=8192),
      prefix=_prefix(cap or 8192),
      loss=config_lib.LossSpec(normalize="length"),
      optimizer=config_lib.OptimizerSpec(
          learning_rate=1e-6, weight_decay=0.01
      ),
      evaluation=config_lib.EvaluationSpec(
          sets=_sets(),
          max_len=30_000,
          temperature=0.6,
          top_k=20,
          top_p=0.95,
          greedy=False,
          batch_size=0,
          teacher=False,
      ),
      mesh=config_lib.MeshSpec(data=1, fsdp=-1),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )


def _parse(argument: str) -> tuple[str, str, int, list[str]]:
  """Splits "MODEL,instruction=NAME,cap=N,sets=A+B"; each may be missing."""
  model, instruction, cap, sets = "tiny", "", 0, []
  for part in filter(None, argument.split(",")):
    name, equals, value = part.partition("=")
    tokens = _CAPS.get(value, 0)
    if value.isascii() and value.isdecimal() and len(value) < 10:
      tokens = int(value)
    if equals and name == "instruction" and value in _INSTRUCTIONS:
      instruction = value
    elif equals and name == "cap" and tokens:
      cap = tokens
    elif equals and name == "sets":
      sets = value.split("+")
    elif not equals and part in ("tiny", *_MODELS):
      model = part
    else:
      raise errors.ConfigError(
          f"configs/compression.py has no argument {part!r}; use one of tiny,"
          f" {', '.join(_MODELS)}, instruction= with"
          f" {', '.join(_INSTRUCTIONS)}, cap= with {', '.join(_CAPS)} or a"
          " number of tokens, and sets= with names joined by +."
      )
  errors.check(
      model != "tiny" or not instruction,
      f"configs/compression.py:tiny has instruction={instruction}, but its"
      " model knows only 'Be brief.'; leave instruction= out, or name one of"
      f" {', '.join(_MODELS)}.",
  )
  return model, instruction or "difficulty", cap, sets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; see the docstring above."""
  model, instruction, cap, names = _parse(argument)
  config = _tiny(cap) if model == "tiny" else _large(model, instruction, cap)
  sets = config.evaluation.sets
  for name in names:
    errors.check(
        name in sets,
        f"configs/compression.py:sets={name} is not one of {', '.join(sets)}.",
    )
  evaluation = dataclasses.replace(
      config.evaluation, sets={n: sets[n] for n in names or sets}
  )
  config = dataclasses.replace(config, evaluation=evaluation)
  return ml_collections.ConfigDict(config_lib.to_dict(config))
