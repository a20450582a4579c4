"""Mixed-policy distillation: the teacher rewrites what the student sampled.

  python -m prefix_distill.main --config=configs/mixed_policy.py:MODEL

MODEL is `tiny` (default) or `qwen3-1.7b`.

From the paper (Yang et al., arXiv 2605.08776), of which we know the abstract
alone: a smaller reasoning student samples a trajectory; a larger teacher
rewrites that trajectory concisely; the student learns from the teacher by a KL
divergence on the rewritten trajectory, which is off-policy but rooted in the
student.

Ours is all else: what the teacher is asked (in a chat turn of its own, with the
problem and the student's answer), what is taken of what it writes and when a
rewriting fails (`Rewriting` in `prefix_distill/data/prompts.py`), after what
the teacher scores it (`rollout.rewrite.scored_in`), the direction of the KL
(the package's reverse KL over the whole vocabulary;
--config.loss.exact.divergence for another), models, data, lengths and the
optimizer. Prefixes of rewritten answers are --config.method=prefix with a
schedule.

The teacher scores in one of two contexts. After the student's own prompt
("prompt") it is what it is in all other distillation here: it says how it would
go on, and knows nothing of a wish for brevity but what the rewritten words
before show. After the turn in which it rewrote ("rewriting") its distribution
is the one that the answer was drawn from, wish included, and the student
learns to answer as if it had been asked.

tiny
  `bundled:guided` learns from `bundled:rewriter` (`RewriteTask` in
  `prefix_distill/data/bundled_tasks.py`), a model of the same size that was
  trained to rewrite a solution in short lines; so this shows the mechanism,
  and no more. The student reads "Take care." and the problem, and answers in
  some 170 tokens. The teacher scores in "rewriting".
  Hardware and cost: 2 CPU cores that others kept busy; 20 updates of 16 answers
  took 147 and 160 s, and the whole run 4 and 5 minutes; 2.4e11 FLOPs.
  Result, two seeds: sampled accuracy in % (95 % interval) and mean tokens of
  the answers to 240 held-out problems, before and after:
    seed 0   95.8 (92.5-97.7)  169      76.7 (70.9-81.6)  46
    seed 1   92.9 (89.0-95.5)  171      72.1 (66.1-77.4)  47
  Answers become a quarter as long, and accuracy is lost. Part of the loss is
  the teacher's: 83.4 % (79.4-86.7) of 400 of its rewritings are right, half of
  them of answers such as these and half of sloppy ones.

qwen3-1.7b
  Qwen3-1.7B, which reasons, from Qwen3-8B on 30,700 distinct questions on
  mathematics of OpenThoughts3: 64 prompts an update, drafts of at most 8,192
  tokens, rewritings of at most 4,096, 100 updates. The teacher rewrites without
  thinking first (its turn begins with an empty thought), and writes "Final
  answer:" before its last words, where the student's thoughts are closed. It
  scores in "prompt", since in the other context it would not close them. We
  have not run it at this size; `plan` says that it fits 8 x H100, with at least
  2.6 hours for the updates and 1.9 for evaluation.
"""

import dataclasses

import ml_collections

from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.config import DatasetSpec
from prefix_distill.data import bundled_tasks
from prefix_distill.evaluate import evaluator

_MODELS = ("tiny", "qwen3-1.7b")
_MARK = "Final answer:"
_PROMPT = (
    "{question}\n\nA student has written this about the problem:\n\n"
    "{answer}\n\nWrite the student's reasoning again, as short as it can be"
    " without losing a step that the result needs. Leave out detours,"
    " repetitions, doubts that came to nothing and remarks about the text."
    " Where it is wrong, put it right; where it breaks off, bring it to its"
    f' end. Then write a last line that begins with "{_MARK}" and has the'
    " result in \\boxed{}."
)


def _tiny() -> config_lib.Config:
  task = DatasetSpec(
      source="math_task",
      subset="guided",
      question="careful",
      answer="answer",
      size=100_000,
  )
  heldout = dataclasses.replace(task, split="test", size=240)
  return config_lib.Config(
      method="full",
      steps=20,
      student=config_lib.ModelSpec("bundled:guided"),
      teacher=config_lib.ModelSpec("bundled:rewriter"),
      data=config_lib.DataSpec(task, batch_size=16, max_prompt_len=56),
      rollout=config_lib.RolloutSpec(
          per_prompt=1,
          max_len=64,
          source="rewrite",
          rewrite=config_lib.RewriteSpec(
              prompt=bundled_tasks.REWRITE,
              # It writes what follows <think> in the student's answers, too.
              suffix="<think>",
              thoughts="keep",
              scored_in="rewriting",
              max_draft_len=240,
              max_prompt_len=300,
          ),
      ),
      optimizer=config_lib.OptimizerSpec(learning_rate=5e-4, warmup_steps=2),
      evaluation=config_lib.EvaluationSpec(
          sets={"heldout": heldout},
          max_len=256,
          batch_size=240,
          greedy=False,
          # It would be evaluated on the student's prompts.
          teacher=False,
      ),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )


def _qwen3() -> config_lib.Config:
  questions = DatasetSpec(
      source="open-thoughts/OpenThoughts3-1.2M",
      question="conversations.0.value",
      where=("domain=math",),
      distinct=True,
      random=True,
      size=30_700,
  )
  names = ("math500", "aime24", "aime25")
  return config_lib.Config(
      method="full",
      steps=100,
      student=config_lib.ModelSpec(
          "Qwen/Qwen3-1.7B", compute_dtype="bfloat16", remat="full"
      ),
      teacher=config_lib.ModelSpec(
          "Qwen/Qwen3-8B", compute_dtype="bfloat16", param_dtype="bfloat16"
      ),
      data=config_lib.DataSpec(
          questions, batch_size=64, max_prompt_len=512, suffix="<think>\n"
      ),
      rollout=config_lib.RolloutSpec(
          per_prompt=1,
          max_len=4096,
          source="rewrite",
          rewrite=config_lib.RewriteSpec(
              prompt=_PROMPT,
              suffix="<think>\n\n</think>\n\n",
              final_mark=_MARK,
              max_draft_len=8192,
              # A problem, a draft, and what is asked, with some to spare.
              max_prompt_len=9216,
          ),
      ),
      optimizer=config_lib.OptimizerSpec(
          # As many tokens at a time as the memory holds.
          learning_rate=1e-6, warmup_steps=5
      ),
      evaluation=config_lib.EvaluationSpec(
          sets={name: evaluator.SETS[name] for name in names},
          max_len=16_384,
          batch_size=0,
          greedy=False,
          teacher=False,
      ),
      mesh=config_lib.MeshSpec(data=1, fsdp=-1),
      checkpoint=config_lib.CheckpointSpec(every=20),
  )


def get_config(model: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; see the docstring above."""
  model = model or "tiny"
  errors.check(
      model in _MODELS,
      f"configs/mixed_policy.py has no argument {model!r}; use one of"
      f" {', '.join(_MODELS)}.",
  )
  config = _tiny() if model == "tiny" else _qwen3()
  return ml_collections.ConfigDict(config_lib.to_dict(config))
