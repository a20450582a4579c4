"""The parts of a run's settings: frozen dataclasses that check themselves.

Every check raises `ConfigError` with one sentence that names the field, the
values and the mend.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import re

from prefix_distill import errors
from prefix_distill import recipe

# A field's name in a template.
FIELD = re.compile(r"\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Which model, and how it computes.

  Attributes:
    path: a local directory in Hugging Face format, a hub id, or
      `bundled:NAME` for one that ships with the package.
    compute_dtype: "float32" or "bfloat16"; activations and caches. Devices
      without bfloat16 compute in float32.
    param_dtype: what the weights are kept in. The student's are the master
      weights that the optimizer updates.
    remat: what the backward pass computes again instead of keeping it: "none",
      "full" (each layer, from its input), "dots" (all but the products with
      weights) or "offload" (as "full", and the layers' inputs wait in the
      host's memory).
    offload: keep the weights in the host's memory while the student samples;
      for a teacher.
    random_init: take only the architecture and the tokenizer from `path`.
    tokenizer: a model whose tokenizer, template and stop tokens to use
      instead of those of `path`.
  """

  path: str
  compute_dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  offload: bool = False
  random_init: bool = False
  tokenizer: str = ""

  def __post_init__(self):
    for name in ("compute_dtype", "param_dtype"):
      recipe.one_of(f"A model's {name}", getattr(self, name), recipe.DTYPES)
    recipe.one_of("A model's remat", self.remat, recipe.REMATS)

  @property
  def tokenizer_path(self) -> str:
    return self.tokenizer or self.path


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """Where records come from.

  Attributes:
    source: "math_task", a .jsonl or .parquet file, a local data set
      directory, or a hub id.
    split: of the data set; files have none.
    subset: a hub data set's configuration, or the math task's style.
    question, answer, completion: names of the fields; an empty name means
      that the run does not need the field.
    size: how many records to take, 0 for all. The math task has no end, so it
      needs a size.
    samples: evaluation: how many answers to sample per problem.
    random: take `size` records at random instead of the first ones.
    choices: evaluation: the field that lists the options of a multiple-choice
      question, or one field for each. `answer` holds the right one's letter;
      or it is one of the fields in `choices`, and then the options come in an
      order of their own for each question.
    seed: of `random` and of that order.
    max_prompt_len: evaluation: longer prompts are dropped and counted; 0 for
      `data.max_prompt_len`.
  """

  source: str
  split: str = "train"
  subset: str = ""
  question: str = "question"
  answer: str = ""
  completion: str = ""
  size: int = 0
  samples: int = 1
  random: bool = False
  choices: tuple[str, ...] = ()
  seed: int = 0
  max_prompt_len: int = 0

  def __post_init__(self):
    lengths = {"size": self.size, "max_prompt_len": self.max_prompt_len}
    errors.at_least("dataset", lengths, 0)
    errors.at_least("dataset", {"samples": self.samples}, 1)
    errors.check(
        self.source != "math_task" or self.size > 0,
        "A dataset of source 'math_task' has size 0, but the task is"
        " generated without an end; set its size.",
    )
    errors.check(
        not self.random or (self.size > 0 and self.source != "math_task"),
        f"dataset.random is True for {self.source!r} with dataset.size"
        f" {self.size}; it draws so many records of a file or data set, so set"
        " the size, or dataset.random=False.",
    )
    self._check_choices()

  def _check_choices(self) -> None:
    shown = f"dataset.choices is {self.choices}"
    errors.check(
        all(self.choices) and len(set(self.choices)) == len(self.choices),
        f"{shown}; name each field with options once.",
    )
    errors.check(
        self.choices != (self.answer,),
        f"{shown} and dataset.answer the same field; name the field that holds"
        " the right option's letter.",
    )

  @property
  def grading(self) -> str:
    """How answers are graded: "letter" for multiple choice, or "math"."""
    return "letter" if self.choices else "math"


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The training prompts.

  Attributes:
    train: the records.
    batch_size: prompts per update, over all devices.
    max_prompt_len: S; longer prompts are dropped and counted.
    prompt_buckets: shorter static lengths; a batch takes the smallest that
      holds its prompts, and each compiles programs of its own. Empty for
      `max_prompt_len` alone.
    suffix: text after the chat template's generation prompt. The paper
      appends `<think>`, since the loss can hardly teach a base model to emit
      a special token (section 4).
    teacher_prompt: what the teacher reads instead of the student's prompt, a
      template over the record's fields: "{question} Solution: {completion}".
      It is rendered with the teacher's own chat template, and the suffix.
      Empty: the teacher reads what the student reads.
    max_teacher_prompt_len: S', as `max_prompt_len` for the teacher's; 0 for
      the same length.
  """

  train: DatasetSpec
  batch_size: int
  max_prompt_len: int
  prompt_buckets: tuple[int, ...] = ()
  suffix: str = "<think>"
  teacher_prompt: str = ""
  max_teacher_prompt_len: int = 0

  def __post_init__(self):
    errors.at_least(
        "data",
        {"batch_size": self.batch_size, "max_prompt_len": self.max_prompt_len},
        1,
    )
    lengths = (0, *self.prompt_buckets, self.max_prompt_len)
    errors.check(
        all(a < b for a, b in itertools.pairwise(lengths)),
        f"data.prompt_buckets {self.prompt_buckets} do not increase up to"
        f" data.max_prompt_len {self.max_prompt_len}; sort them, and leave out"
        " those that are too long.",
    )
    self._check_teacher_prompt()

  def _check_teacher_prompt(self) -> None:
    length = self.max_teacher_prompt_len
    errors.at_least("data", {"max_teacher_prompt_len": length}, 0)
    errors.check(
        not length or bool(self.teacher_prompt),
        f"data.max_teacher_prompt_len is {length} but data.teacher_prompt is"
        " empty, so the teacher reads the student's prompt; set the second, or"
        " the first to 0.",
    )
    errors.check(
        not self.teacher_prompt or bool(self.teacher_fields),
        f"data.teacher_prompt {self.teacher_prompt!r} names no field, so the"
        " teacher would read the same for every record; name one in braces, as"
        f" {{{self.train.question}}}.",
    )

  @property
  def teacher_fields(self) -> tuple[str, ...]:
    """The fields of the record that the teacher's prompt is made of."""
    return tuple(dict.fromkeys(FIELD.findall(self.teacher_prompt)))

  @property
  def teacher_prompt_len(self) -> int:
    """The static length of what the teacher reads before an answer."""
    return self.max_teacher_prompt_len or self.max_prompt_len


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """AdamW with a global-norm clip and a warm-up.

  Attributes:
    learning_rate: the peak.
    warmup_steps: updates over which it rises to the peak.
    decay: after the warm-up, "constant" or "cosine".
    final_fraction: of the peak, at the last step of a cosine.
    weight_decay: on matrices only.
    clip_norm: of the whole gradient; 0 for none.
    b1, b2: moments.
    batch_tokens: tokens of prompts and prefixes that are scored and
      differentiated at a time, over all devices; an update with more goes
      through the memory in parts. 0: all at a time. `python -m
      prefix_distill.plan` finds what fits.
    offload: keep the moments in the host's memory between updates.
  """

  learning_rate: float
  warmup_steps: int = 0
  decay: str = "constant"
  final_fraction: float = 0.0
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.999
  batch_tokens: int = 0
  offload: bool = False

  def __post_init__(self):
    recipe.one_of("optimizer.decay", self.decay, ("constant", "cosine"))
    errors.check(
        self.learning_rate > 0,
        f"optimizer.learning_rate is {self.learning_rate}; set it above 0.",
    )
    errors.at_least(
        "optimizer",
        {
            "warmup_steps": self.warmup_steps,
            "batch_tokens": self.batch_tokens,
            "clip_norm": self.clip_norm,
            "weight_decay": self.weight_decay,
        },
        0,
    )


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Sizes of the device mesh's axes.

  Attributes:
    data: replicas of the weights; -1 takes the devices that are left.
    fsdp: shards of the weights and of the batch.
    tensor: shards of heads, MLP columns and vocabulary.
    sampling_tensor: the same while answers are sampled, in training and in
      evaluation, where weights are not split over fsdp and a prompt's keys and
      values lie on one batch shard; as many times fewer batch shards are
      left. 0 for `tensor`.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sampling_tensor: int = 0

  def __post_init__(self):
    errors.check(
        self.data == -1 or self.data >= 1,
        f"mesh.data is {self.data}; set it to 1 or more, or to -1 for the"
        " devices that are left.",
    )
    errors.at_least("mesh", {"fsdp": self.fsdp, "tensor": self.tensor}, 1)
    errors.at_least("mesh", {"sampling_tensor": self.sampling_tensor}, 0)
    shards = self.fsdp * self.tensor
    errors.check(
        not self.sampling_tensor or shards % self.sampling_tensor == 0,
        f"mesh.sampling_tensor is {self.sampling_tensor}, which does not divide"
        f" mesh.fsdp x mesh.tensor = {shards}; set it to a divisor of that, or"
        " to 0 for mesh.tensor.",
    )


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
  """Evaluation runs to the end of the answer, whatever the training cap.

  Attributes:
    sets: name -> records, with `answer`.
    every: updates between evaluations of the student; 0 for none but the
      first and the last.
    between: names of the sets that are evaluated before the last update;
      empty for all.
    max_len: the longest completion.
    temperature: of the sampled answers.
    top_k, top_p: of the sampled answers, as in `RolloutSpec`.
    greedy: whether to evaluate greedy answers as well.
    batch_size: completions decoded at a time; 0 for as many as an
      accelerator's memory holds, and 64 on a CPU.
    teacher: whether to evaluate the teacher, after the last update.
  """

  sets: Mapping[str, DatasetSpec]
  every: int = 0
  between: tuple[str, ...] = ()
  max_len: int = 256
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  greedy: bool = True
  batch_size: int = 64
  teacher: bool = True

  def __post_init__(self):
    errors.at_least("evaluation", {"max_len": self.max_len}, 1)
    counts = {"every": self.every, "batch_size": self.batch_size}
    errors.at_least("evaluation", counts, 0)
    for name in self.between:
      errors.check(
          name in self.sets,
          f"evaluation.between names {name!r}, which is not one of"
          f" evaluation.sets ({', '.join(self.sets) or 'none'}).",
      )
    errors.check(
        self.temperature > 0,
        f"evaluation.temperature is {self.temperature}; greedy answers have a"
        " switch of their own (evaluation.greedy), so set it above 0.",
    )
    recipe.check_truncation("evaluation", self.top_k, self.top_p)
    for name, spec in self.sets.items():
      errors.check(
          bool(spec.answer),
          f"evaluation.sets.{name}.answer is empty, so nothing can be graded;"
          " name the field that holds the right answer.",
      )


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """When to save.

  Attributes:
    every: updates between checkpoints.
    keep: how many to keep.
  """

  every: int = 10
  keep: int = 2

  def __post_init__(self):
    errors.at_least("checkpoint", {"every": self.every, "keep": self.keep}, 1)
