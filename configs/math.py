"""On-policy distillation from reasoning prefixes, on math problems.

  python -m prefix_distill.main --config=configs/math.py:MODEL,method=METHOD

MODEL is `tiny` (default), `tiny-weak`, `tiny-privileged`, `tiny-concise`,
`tiny-crosslingual`, `chain`, `qwen3-0.6b`, `qwen3-1.7b`, `qwen3-4b` or
`qwen3-8b`; METHOD is `prefix` (default: the paper's growing cap), `full` or
`seqkd`.
`qwen3-1.7b,sets=math500+aime24` evaluates on those sets only.

tiny, tiny-weak
  The bundled models on the bundled task: nothing is downloaded.
  Hardware: 2 CPU cores, 1.5 GB. Cost and result: README.md.

tiny-privileged, tiny-concise, tiny-crosslingual
  One model is student and teacher (`bundled:guided`, see
  `prefix_distill/data/bundled_tasks.py`); the teacher is the one it starts as,
  and reads another prompt: the problem with a short solution, with "Be brief."
  where the student has "Take care.", or in English with "Take care." where the
  student has it in German. The model was trained to answer each in its own
  way, so these show the mechanism, and no more.
  Hardware and cost: 1 CPU core, 50 updates of 32 rollouts, caps of 1 to 99; 1.3
  to 3.7 minutes on a busy machine, of which the updates took 24 to 46 s.
  Result, one seed: sampled and greedy accuracy in % and the sampled answers'
  mean length on 480 held-out problems, in the student's context; then the
  teacher's accuracy, in its own context, on 240:
                      before              after               teacher
    privileged        40.6  99.6  125     95.8  99.8  188     96.2 100.0
    concise           94.6 100.0  173     94.8  99.6   46     95.8  99.6
    crosslingual      19.2   4.0  109     92.5  99.6  174     94.6 100.0
  The evaluation set `context` is the student in the teacher's context: at the
  end 92.5 and 97.5, 93.3 and 100.0, 94.6 and 99.2. With a cap of 16 throughout
  (--config.prefix.schedule=fixed --config.prefix.fixed.length=16) the student's
  sampled accuracy is 88.3, 77.5 and 77.5, and less than before in the teacher's
  context: 80.0, 80.8 and 85.4. Without a context (privileged with
  --config.data.teacher_prompt= --config.data.max_teacher_prompt_len=0) it goes
  from 40.6 (36.3-45.1) to 44.6 (40.2-49.1).

chain
  Prompts of 21 tokens and answers of 236 (`ChainTask` in
  `prefix_distill/data/bundled_tasks.py`): 28 sums in a row, each on the results
  of the two before it. The student errs in 5 % of all sums, which it has to
  learn one by one, so this task takes more updates than `tiny`, and prompts
  cost little.
  Hardware and cost: 1 CPU core; 60 updates of 32 rollouts took 4 to 8 minutes
  on a machine that others kept busy, evaluation included.
  Result, one seed, sampled accuracy in % on 120 problems of the validation
  split (standard error 3 to 5; the teacher has 98.8 on 480), and 1e11 FLOPs:
    updates            10          20          30          40          60
    full, 1e-4     28   4.2    43   8.4    59  12.6    69  16.8    79  25.3
    full, 3e-4     49   4.2    73   8.4    86  12.6    88  16.9    91  25.3
    full, 1e-3     72   4.2    78   8.4    87  12.6    92  16.8    89  25.3
    prefix, 3e-4   21   0.5    49   1.7    64   3.5    73   6.0    92  13.1
    prefix, 1e-3   38   0.5    61   1.7    73   3.5    78   6.0    93  13.1
  docs/results has the test split and other methods; over five seeds at 3e-4 the
  growing prefix ends 4.9 points (2.2 to 7.7) below full distillation, for 52 %
  of its FLOPs, and is 6.2 (3.3 to 9.5) above it at equal FLOPs.

qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b
  The paper's recipe (arXiv 2602.15260, section 4): Qwen3-*-Base learns from
  Qwen3-8B on 30.7k questions of OpenThoughts3, 512 prompts x 4 rollouts, 60
  updates, AdamW at 5e-5; the cap starts at 1 token and grows by 256 after
  every update, up to 16,384. The paper took 30.8 (1.7B) and 53.0 (8B) hours on
  8 x A100 and 2.4e19 and 7.5e19 FLOPs, and reports MATH500 68.1 and 86.9,
  AIME24 10.6 and 44.0, AIME25 11.5 and 33.5, GPQA 23.6 and 48.3, MMLU-Pro
  39.4 and 66.1. We have not run it at this size; docs/scale.md has what `plan`
  says of it. The 0.6B and the 4B are ours.
  Not stated in the paper, and chosen here: temperature 1, constant learning
  rate after 2 warm-up updates, no weight decay, clip at 1, full parameters,
  stop tokens of student and teacher taken as one event, prompts of at most
  512 tokens, the exact reverse KL (the paper's sampled form is
  --config.loss.form=policy_gradient), which 30.7k questions, and `<think>`
  appended to the prompt in evaluation as in training.
  Evaluated at the end on MATH500, AIME24, AIME25, GPQA, MMLU-Pro, HMMT and AMC,
  as `prefix_distill/evaluate/evaluator.py` says; before and every ten updates
  on AIME24 alone (--config.evaluation.between='()' for all sets), which chose
  the paper's checkpoint, so it is no held-out score. The teacher is not
  evaluated (--config.evaluation.teacher=True). GPQA needs a login on the hub.
"""

from collections.abc import Sequence
import dataclasses

import ml_collections

from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.config import DatasetSpec
from prefix_distill.evaluate import evaluator

_MODELS = (
    "tiny tiny-weak tiny-privileged tiny-concise tiny-crosslingual chain"
    " qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b"
).split()
_METHODS = ("prefix", "full", "seqkd")
# The student's context, the teacher's, what the teacher reads, and its length.
_CONTEXTS = {
    "tiny-privileged": (
        "question",
        "shown",
        "{question}\nSolution:\n{solution}",
        100,
    ),
    "tiny-concise": ("careful", "brief", "Be brief. {question}", 56),
    "tiny-crosslingual": ("german", "careful", "Take care. {question}", 56),
}


def _splits(task: DatasetSpec, size: int) -> dict[str, DatasetSpec]:
  """Returns problems to report on, and others to choose settings by."""
  splits = {"heldout": "test", "validation": "validation"}
  return {
      name: dataclasses.replace(task, split=split, size=size)
      for name, split in splits.items()
  }


def _tiny(student: str) -> config_lib.Config:
  task = DatasetSpec(source="math_task", answer="answer", size=100_000)
  sets = _splits(task, 480)
  # Half of the answers for the student that goes wrong in the opening; all of
  # them for the one that goes wrong everywhere.
  prefix = {
      "capable": config_lib.PrefixSpec(
          buckets=(32, 64, 100), linear=config_lib.LinearSpec(increment=2)
      ),
      "weak": config_lib.PrefixSpec(
          buckets=(64, 128, 200), linear=config_lib.LinearSpec(increment=4)
      ),
  }[student]
  return config_lib.Config(
      method="prefix",
      steps=50,
      student=config_lib.ModelSpec(f"bundled:{student}"),
      teacher=config_lib.ModelSpec("bundled:teacher"),
      data=config_lib.DataSpec(task, batch_size=32, max_prompt_len=52),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=256),
      prefix=prefix,
      optimizer=config_lib.OptimizerSpec(learning_rate=3e-4, warmup_steps=2),
      evaluation=config_lib.EvaluationSpec(
          sets=sets, every=25, max_len=256, batch_size=240
      ),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )


def _guided(name: str) -> config_lib.Config:
  """Self-distillation: one model, with another context as the teacher."""
  config = _tiny("capable")
  mine, theirs, template, length = _CONTEXTS[name]
  task = dataclasses.replace(
      config.data.train, subset="guided", question=mine
  )
  heldout = dataclasses.replace(task, split="test", size=480)
  # How well the student answers as the teacher does; before the first update,
  # how well the teacher does.
  context = dataclasses.replace(
      heldout, question=theirs, max_prompt_len=length, size=240
  )
  return dataclasses.replace(
      config,
      student=config_lib.ModelSpec("bundled:guided"),
      teacher=config_lib.ModelSpec("bundled:guided"),
      data=config_lib.DataSpec(
          task,
          batch_size=32,
          max_prompt_len=56,
          teacher_prompt=template,
          max_teacher_prompt_len=length,
      ),
      # The teacher would be evaluated on the student's prompts.
      evaluation=dataclasses.replace(
          config.evaluation,
          sets={"heldout": heldout, "context": context},
          every=0,
          teacher=False,
      ),
  )


def _chain() -> config_lib.Config:
  task = DatasetSpec(source="chain_task", answer="answer", size=100_000)
  return config_lib.Config(
      method="prefix",
      steps=60,
      student=config_lib.ModelSpec("bundled:chain-weak"),
      teacher=config_lib.ModelSpec("bundled:chain-teacher"),
      data=config_lib.DataSpec(task, batch_size=32, max_prompt_len=21),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=240),
      prefix=config_lib.PrefixSpec(
          buckets=(60, 120, 180, 240),
          linear=config_lib.LinearSpec(increment=4),
      ),
      optimizer=config_lib.OptimizerSpec(learning_rate=3e-4, warmup_steps=2),
      evaluation=config_lib.EvaluationSpec(
          sets=_splits(task, 240), every=20, max_len=240, batch_size=240
      ),
      checkpoint=config_lib.CheckpointSpec(every=10),
  )


def _qwen3(size: str) -> config_lib.Config:
  questions = DatasetSpec(
      source="open-thoughts/OpenThoughts3-1.2M",
      question="conversations.0.value",
      where=("domain=math",),
      distinct=True,
      random=True,
      size=30_700,
  )
  return config_lib.Config(
      method="prefix",
      steps=60,
      student=config_lib.ModelSpec(
          f"Qwen/Qwen3-{size}-Base", compute_dtype="bfloat16", remat="full"
      ),
      teacher=config_lib.ModelSpec(
          "Qwen/Qwen3-8B", compute_dtype="bfloat16", param_dtype="bfloat16"
      ),
      data=config_lib.DataSpec(questions, batch_size=512, max_prompt_len=512),
      rollout=config_lib.RolloutSpec(
          # As many at a time as the memory holds.
          per_prompt=4, max_len=16_384
      ),
      prefix=config_lib.PrefixSpec(
          buckets=(256, 512, 1024, 2048, 4096, 8192, 16_384),
      ),
      optimizer=config_lib.OptimizerSpec(
          # As many tokens at a time as the memory holds.
          learning_rate=5e-5, warmup_steps=2
      ),
      evaluation=config_lib.EvaluationSpec(
          sets=dict(evaluator.SETS),
          every=10,
          # All sets after the last update. On the way AIME24, which chose the
          # paper's checkpoint: all sets each time took longer than the updates.
          between=("aime24",),
          teacher=False,
          batch_size=0,
          **evaluator.PROTOCOL,
      ),
      mesh=config_lib.MeshSpec(data=1, fsdp=-1),
      checkpoint=config_lib.CheckpointSpec(every=5, best="aime24"),
  )


def _supervised(config: config_lib.Config) -> config_lib.Config:
  """The paper's recipe for SeqKD, which differs from the on-policy one."""
  return dataclasses.replace(
      config,
      steps=1500,
      data=dataclasses.replace(config.data, batch_size=128),
      optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-4),
      checkpoint=dataclasses.replace(config.checkpoint, every=10),
  )


@dataclasses.dataclass
class _Argument:
  """What "MODEL,method=METHOD,sets=A+B,steps=N" asks for."""

  model: str = "tiny"
  method: str = "prefix"
  sets: tuple[str, ...] = ()
  steps: int = 0


def _parse(argument: str) -> _Argument:
  """Splits the argument; every part may be missing."""
  asked = _Argument()
  for part in filter(None, argument.split(",")):
    name, equals, value = part.partition("=")
    if equals and name == "method" and value in _METHODS:
      asked.method = value
    elif equals and name == "sets":
      asked.sets = tuple(value.split("+"))
    elif equals and name == "steps" and value.isdecimal() and len(value) < 8:
      asked.steps = int(value)
    elif not equals and part in _MODELS:
      asked.model = part
    else:
      raise errors.ConfigError(
          f"configs/math.py has no argument {part!r}; use one of"
          f" {', '.join(_MODELS)}, method= with {', '.join(_METHODS)}, sets="
          " with names joined by +, and steps= with a number."
      )
  return asked


def _choose(
    config: config_lib.Config, names: Sequence[str]
) -> config_lib.Config:
  """Keeps the named evaluation sets."""
  sets = config.evaluation.sets
  for name in names:
    errors.check(
        name in sets,
        f"configs/math.py:sets={name} is not one of {', '.join(sets)}.",
    )
  chosen = {name: sets[name] for name in names}
  between = tuple(n for n in config.evaluation.between if n in chosen)
  best = config.checkpoint.best
  return dataclasses.replace(
      config,
      evaluation=dataclasses.replace(
          config.evaluation, sets=chosen, between=between
      ),
      checkpoint=dataclasses.replace(
          config.checkpoint, best=best if best in chosen else ""
      ),
  )


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; see the docstring above."""
  asked = _parse(argument)
  model, sets = asked.model, asked.sets
  if model in _CONTEXTS:
    config = _guided(model)
  elif model.startswith("tiny"):
    config = _tiny("weak" if model == "tiny-weak" else "capable")
  elif model == "chain":
    config = _chain()
  else:
    config = _qwen3(model.removeprefix("qwen3-").upper())
  if not sets and not model.startswith("qwen3"):
    # The validation split is there to be asked for.
    sets = [name for name in config.evaluation.sets if name != "validation"]
  if sets:
    config = _choose(config, sets)
  if asked.method == "seqkd":
    rollout = dataclasses.replace(config.rollout, per_prompt=1)
    config = dataclasses.replace(config, rollout=rollout)
    if model.startswith("qwen3"):
      config = _supervised(config)
  config = dataclasses.replace(
      config, method=asked.method, steps=asked.steps or config.steps
  )
  return ml_collections.ConfigDict(config_lib.to_dict(config))
