"""The run's settings: a ConfigDict from the command line becomes frozen,
validated dataclasses here, and goes no further.

Every check raises `ConfigError` with one sentence that names the field, the
values and the mend.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import types
import typing
from typing import Any

METHODS = ("prefix", "full", "sft")
SCHEDULES = ("linear", "fixed")
LOSSES = ("exact", "sampled")


class UserError(Exception):
  """Something only the user can mend; its one sentence says what and how."""


class ConfigError(UserError):
  """A setting that cannot work."""


def _check(ok: bool, message: str) -> None:
  if not ok:
    raise ConfigError(message)


def _at_least(owner: str, values: Mapping[str, float], low: float) -> None:
  for name, value in values.items():
    _check(
        value >= low,
        f"{owner}.{name} is {value}, which is below {low}; set it to {low} or"
        " more.",
    )


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """Which model, and how it computes.

  Attributes:
    path: a local directory in Hugging Face format, a hub id, or
      `bundled:NAME` for one that ships with the package.
    compute_dtype: "float32" or "bfloat16"; activations and caches.
    param_dtype: what the weights are kept in. The student's are the master
      weights that the optimizer updates.
    remat: recompute each layer in the backward pass.
    random_init: take only the architecture and the tokenizer from `path`.
    tokenizer: a model whose tokenizer, template and stop tokens to use
      instead of those of `path`.
  """

  path: str
  compute_dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  random_init: bool = False
  tokenizer: str = ""

  def __post_init__(self):
    for name in ("compute_dtype", "param_dtype"):
      value = getattr(self, name)
      _check(
          value in ("float32", "bfloat16"),
          f"A model's {name} is {value!r}; use 'float32' or 'bfloat16'.",
      )

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
  """

  source: str
  split: str = "train"
  subset: str = ""
  question: str = "question"
  answer: str = ""
  completion: str = ""
  size: int = 0
  samples: int = 1

  def __post_init__(self):
    _at_least("dataset", {"size": self.size}, 0)
    _at_least("dataset", {"samples": self.samples}, 1)
    _check(
        self.source != "math_task" or self.size > 0,
        "A dataset of source 'math_task' has size 0, but the task is"
        " generated without an end; set its size.",
    )


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The training prompts.

  Attributes:
    train: the records.
    batch_size: prompts per update, over all devices.
    max_prompt_len: S; longer prompts are dropped and counted.
    suffix: text after the chat template's generation prompt. The paper
      appends `<think>`, since the loss can hardly teach a base model to emit
      a special token (section 4).
  """

  train: DatasetSpec
  batch_size: int
  max_prompt_len: int
  suffix: str = "<think>"

  def __post_init__(self):
    _at_least(
        "data",
        {"batch_size": self.batch_size, "max_prompt_len": self.max_prompt_len},
        1,
    )


@dataclasses.dataclass(frozen=True)
class PrefixSpec:
  """How much of each answer is sampled and supervised.

  Attributes:
    schedule: "linear" (the paper's) or "fixed".
    start: linear: the cap of the first update, in tokens.
    increment: linear: by how much the cap grows after each update.
    length: fixed: the cap.
    buckets: the static lengths that programs are compiled for; the exact cap
      inside a bucket is traced. The run's longest cap is added if it needs
      to be. Empty: powers of two.
  """

  schedule: str = "linear"
  start: int = 1
  increment: int = 256
  length: int = 256
  buckets: tuple[int, ...] = ()

  def __post_init__(self):
    _check(
        self.schedule in SCHEDULES,
        f"prefix.schedule is {self.schedule!r}; use one of {SCHEDULES}.",
    )
    _at_least("prefix", {"start": self.start, "length": self.length}, 1)
    _at_least("prefix", {"increment": self.increment}, 0)
    _check(
        tuple(sorted(set(self.buckets))) == self.buckets,
        f"prefix.buckets {self.buckets} do not increase; sort them.",
    )


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
  """How the student samples.

  Attributes:
    per_prompt: rollouts for each prompt.
    max_len: the longest answer: the cap of full distillation, of the schedule
      and of supervised answers.
    temperature: of sampling *and* of both models in the loss.
  """

  per_prompt: int
  max_len: int
  temperature: float = 1.0

  def __post_init__(self):
    _at_least(
        "rollout", {"per_prompt": self.per_prompt, "max_len": self.max_len}, 1
    )
    _check(
        self.temperature > 0,
        f"rollout.temperature is {self.temperature}; training samples, so set"
        " it above 0.",
    )


@dataclasses.dataclass(frozen=True)
class LossSpec:
  """The divergence on prefix tokens.

  Attributes:
    form: "exact" is the reverse KL over the whole vocabulary; "sampled" is
      the paper's policy gradient on the sampled tokens, importance weighted.
    merge_stop_tokens: take the stop tokens of student and teacher as one
      event, so that a base model is not punished for the name of its stop.
    chunk: positions whose logits exist at a time.
  """

  form: str = "exact"
  merge_stop_tokens: bool = True
  chunk: int = 128

  def __post_init__(self):
    _check(
        self.form in LOSSES,
        f"loss.form is {self.form!r}; use one of {LOSSES}.",
    )
    _at_least("loss", {"chunk": self.chunk}, 1)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """AdamW with a global-norm clip and a warm-up.

  Attributes:
    learning_rate: the peak.
    warmup_steps: updates over which it rises from 0.
    decay: after the warm-up, "constant" or "cosine".
    final_fraction: of the peak, at the last step of a cosine.
    weight_decay: on matrices only.
    clip_norm: of the whole gradient; 0 for none.
    b1, b2: moments.
    accumulation: micro-batches per update.
  """

  learning_rate: float
  warmup_steps: int = 0
  decay: str = "constant"
  final_fraction: float = 0.0
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.999
  accumulation: int = 1

  def __post_init__(self):
    _check(
        self.decay in ("constant", "cosine"),
        f"optimizer.decay is {self.decay!r}; use 'constant' or 'cosine'.",
    )
    _check(
        self.learning_rate > 0,
        f"optimizer.learning_rate is {self.learning_rate}; set it above 0.",
    )
    _at_least("optimizer", {"accumulation": self.accumulation}, 1)
    _at_least(
        "optimizer",
        {
            "warmup_steps": self.warmup_steps,
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
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    _check(
        self.data == -1 or self.data >= 1,
        f"mesh.data is {self.data}; set it to 1 or more, or to -1 for the"
        " devices that are left.",
    )
    _at_least("mesh", {"fsdp": self.fsdp, "tensor": self.tensor}, 1)


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
  """Evaluation runs to the end of the answer, whatever the training cap.

  Attributes:
    sets: name -> records, with `answer`.
    every: updates between evaluations of the student; 0 for none but the
      first and the last.
    max_len: the longest completion.
    temperature: of the sampled answers.
    greedy: whether to evaluate greedy answers as well.
    batch_size: completions decoded at a time.
    teacher: whether to evaluate the teacher, after the last update.
  """

  sets: Mapping[str, DatasetSpec]
  every: int = 0
  max_len: int = 256
  temperature: float = 1.0
  greedy: bool = True
  batch_size: int = 64
  teacher: bool = True

  def __post_init__(self):
    _at_least(
        "evaluation",
        {"max_len": self.max_len, "batch_size": self.batch_size},
        1,
    )
    _at_least("evaluation", {"every": self.every}, 0)
    _check(
        self.temperature > 0,
        f"evaluation.temperature is {self.temperature}; greedy answers have a"
        " switch of their own (evaluation.greedy), so set it above 0.",
    )
    for name, spec in self.sets.items():
      _check(
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
    _at_least("checkpoint", {"every": self.every, "keep": self.keep}, 1)


@dataclasses.dataclass(frozen=True)
class Config:
  """A run.

  Attributes:
    method: "prefix" stops rollouts at a growing or fixed cap, "full" at
      `rollout.max_len`; "sft" trains on the records' completions.
    steps: updates.
    seed: of the data order, sampling and random initialisation.
    teacher: None for `sft`.
  """

  method: str
  steps: int
  student: ModelSpec
  data: DataSpec
  rollout: RolloutSpec
  optimizer: OptimizerSpec
  evaluation: EvaluationSpec
  seed: int = 0
  teacher: ModelSpec | None = None
  prefix: PrefixSpec = PrefixSpec()
  loss: LossSpec = LossSpec()
  mesh: MeshSpec = MeshSpec()
  checkpoint: CheckpointSpec = CheckpointSpec()

  def __post_init__(self):
    _check(
        self.method in METHODS,
        f"method is {self.method!r}; use one of {METHODS}.",
    )
    _at_least("config", {"steps": self.steps, "seed": self.seed}, 0)
    distils = self.method != "sft"
    _check(
        not distils or self.teacher is not None,
        f"method is {self.method!r} but teacher is None; name a teacher.",
    )
    _check(
        distils or bool(self.data.train.completion),
        "method is 'sft' but data.train.completion is empty; name the field"
        " that holds the answers to learn.",
    )
    _check(
        distils or self.rollout.per_prompt == 1,
        f"method is 'sft' but rollout.per_prompt is {self.rollout.per_prompt};"
        " a record has one completion, so set it to 1.",
    )
    _check(
        self.prefix.schedule != "fixed"
        or self.prefix.length <= self.rollout.max_len,
        f"prefix.length is {self.prefix.length} but rollout.max_len is"
        f" {self.rollout.max_len}; lower the first or raise the second.",
    )
    rows = self.rollouts_per_step
    _check(
        self.data.batch_size % self.optimizer.accumulation == 0,
        f"data.batch_size is {self.data.batch_size}, not divisible by"
        f" optimizer.accumulation {self.optimizer.accumulation}; change one so"
        f" that the {rows} rollouts split evenly.",
    )

  @property
  def rollouts_per_step(self) -> int:
    return self.data.batch_size * self.rollout.per_prompt

  @property
  def longest_prefix(self) -> int:
    """The largest cap that this run can reach."""
    if self.method != "prefix":
      return self.rollout.max_len
    if self.prefix.schedule == "fixed":
      return self.prefix.length
    last = self.prefix.start + self.prefix.increment * max(self.steps - 1, 0)
    return min(last, self.rollout.max_len)


def _convert(value: Any, kind: Any, name: str) -> Any:
  """Turns a plain value into a field's type, or raises ConfigError."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    return _convert(value, next(a for a in args if a is not type(None)), name)
  if dataclasses.is_dataclass(kind):
    _check(
        isinstance(value, Mapping),
        f"{name} is {value!r}, but it is a group of fields; set its fields.",
    )
    return _build(kind, value, name + ".")
  if origin is tuple:
    return tuple(_convert(v, args[0], name) for v in value)
  if origin is not None:  # A mapping of names.
    return {
        k: _convert(v, args[1], f"{name}.{k}") for k, v in value.items()
    }
  if kind is float and isinstance(value, int):
    value = float(value)
  right_type = isinstance(value, kind)
  if kind is int and isinstance(value, bool):
    right_type = False
  _check(
      right_type,
      f"{name} is {value!r}, a {type(value).__name__}; give a"
      f" {kind.__name__}.",
  )
  return value


def _check_known(cls: type, name: str, prefix: str) -> None:
  hints = typing.get_type_hints(cls)
  if name in hints:
    return
  close = difflib.get_close_matches(name, hints, 1)
  mend = f"the fields here are {', '.join(hints)}."
  if close:
    mend = f"did you mean {prefix}{close[0]}?"
  raise ConfigError(f"{prefix}{name} is not a field; {mend}")


def check_field(name: str) -> None:
  """Raises ConfigError if a dotted name, "data.batch_size", is no field."""
  cls: Any = Config
  prefix = ""
  for part in name.split("."):
    if dataclasses.is_dataclass(cls):
      _check_known(cls, part, prefix)
      cls = typing.get_type_hints(cls)[part]
    elif typing.get_origin(cls) not in (None, tuple):
      cls = typing.get_args(cls)[1]  # A mapping of names.
    else:
      raise ConfigError(f"{prefix}{part} is not a field; {prefix[:-1]} is one.")
    if typing.get_origin(cls) is types.UnionType:
      cls = next(a for a in typing.get_args(cls) if a is not type(None))
    prefix += part + "."


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    _check_known(cls, name, prefix)
  for field in dataclasses.fields(cls):
    required = (
        field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    if required and field.name not in values:
      raise ConfigError(f"{prefix}{field.name} is missing; set it.")
  return cls(**{
      name: _convert(value, hints[name], prefix + name)
      for name, value in values.items()
  })


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds and validates a run's settings from nested plain values.

  Raises:
    ConfigError: an unknown or missing field, a wrong type, or values that do
      not work together.
  """
  return _build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the settings as nested plain values; `from_dict` inverts it."""
  return dataclasses.asdict(config)
