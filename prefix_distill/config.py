"""A run's settings: frozen dataclasses whose fields state their limits.

Pydantic checks each field; code here checks what relates several fields. A
value that cannot work raises `ConfigError` with one sentence, which names the
field, the value and the mend. Each schedule and each form of the loss has a
group of its own: `prefix.schedule` is "drift" and its settings are those of
`prefix.drift`. A group that is not in use must keep its defaults.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from typing import Annotated
from typing import Any
from typing import Literal

import pydantic
from pydantic import Field
import pydantic.dataclasses
import pydantic_core

from prefix_distill.errors import ConfigError
from prefix_distill.errors import redacted
from prefix_distill.errors import shown

# What the source of a task of reasoning-gym begins with, and its splits.
GYM = "reasoning_gym:"
GYM_SPLITS = ("train", "validation", "test")
# The sources of records that ship with the package.
BUNDLED_TASKS = ("math_task", "chain_task", "sums_task")
# A field's name in a template.
FIELD = re.compile(r"\{([^{}]+)\}")
# Stands in a check's sentence for the dotted name of the group.
_HERE = "\0"
_STRICT = pydantic.ConfigDict(allow_inf_nan=False, extra="forbid")
# The largest int32: programs count rows, tokens and updates in int32.
_MOST = 2**31 - 1
# Squares of smaller numbers are far below what float32 holds.
_LEAST = 1e-30
# The most answers that an evaluation samples for one set.
_MOST_ANSWERS = 2**20
# Schedules that compare both models' distributions.
_COMPARING = ("drift", "plateau", "agreement")
# How a sentence goes on after "NAME is VALUE"; pydantic's names of errors.
_MENDS = {
    "greater_than": "; set it above {gt}.",
    "greater_than_equal": "; set it to {ge} or more.",
    "less_than": "; set it below {lt}.",
    "less_than_equal": "; set it to {le} or less.",
    "tiny": f", which float32 may take for 0; set it to {_LEAST:g} or more.",
    "literal_error": "; use one of {expected}.",
    "string_too_short": ", which is empty; give a name.",
    "string_too_long": "; give {max_length} characters at most.",
    "string_pattern_mismatch": "; leave out control characters.",
    "string_unicode": (
        ", which has half of a character (a lone surrogate); write it in UTF-8."
    ),
    "too_long": ", which is {actual_length} values; give {max_length} at most.",
    "finite_number": ", which is no finite number; give a float.",
    "int_type": " ({kind}); give an int.",
    "int_from_float": " ({kind}); give an int.",
    "float_type": " ({kind}); give a float.",
    "bool_type": " ({kind}); give a bool, True or False.",
    "secret": (
        ", which has a password or a token in it, and settings are written to"
        " config.json; take it out, and log in with HF_TOKEN or `hf auth"
        " login`."
    ),
    "string_type": " ({kind}); give a str.",
    "tuple_type": " ({kind}); give a list.",
    "dict_type": ", but it is a group of names; set NAME.FIELD.",
    "dataclass_type": ", but it is a group of fields; set its fields.",
}

# Nothing is made a number that was none, and nothing a string; a dictionary
# may stand for a group, and a list for a tuple.
_Bool = Annotated[bool, Field(strict=True)]
_Int = Annotated[int, Field(strict=True, ge=-_MOST, le=_MOST)]
_Positive = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
_NotNegative = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
# JAX drops the higher bits of a seed.
_Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


def _of_float32(value: float) -> float:
  """Refuses what float32 may take for 0, and drops the sign of -0.0."""
  if 0 < abs(value) < _LEAST:
    raise pydantic_core.PydanticCustomError("tiny", "tiny")
  return value + 0.0


_Float = Annotated[
    float, Field(strict=True), pydantic.AfterValidator(_of_float32)
]
_Amount = Annotated[_Float, Field(ge=0, le=1e9)]
_Share = Annotated[_Float, Field(ge=0, le=1)]
_Part = Annotated[_Float, Field(gt=0, le=1)]
# To float32, 1 minus less than about 1e-7 is 1.
_Decay = Annotated[_Float, Field(ge=0, le=1 - 1e-6)]
# Logits over the temperature, and their squares, stay far inside float32.
_Temperature = Annotated[_Float, Field(ge=1e-3, le=1e3)]
# A text of a prompt may have several lines; the name of a model, a file, a data
# set or a field is one line, and no longer than a sentence can show.
_Text = Annotated[
    str, Field(strict=True, max_length=10**5, pattern=r"^[\P{Cc}\t\n\r]*$")
]
_LINE = r"^[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}]*$"
_Str = Annotated[str, Field(strict=True, max_length=1000, pattern=_LINE)]
_Name = Annotated[_Str, Field(min_length=1)]


def _without_secret(value: str) -> str:
  """Refuses a password or a token, which `config.json` would show."""
  if redacted(value) != value:
    raise pydantic_core.PydanticCustomError("secret", "secret")
  return value


def _place(value: str) -> str:
  """Expands ~, which a shell does not expand behind an equals sign."""
  return os.path.expanduser(_without_secret(value))


# The place of a model or data set; the limits of a text come first.
_Place = Annotated[_Str, pydantic.AfterValidator(_place)]
_NamedPlace = Annotated[_Name, pydantic.AfterValidator(_place)]
# A part of files' names, whose bytes are bounded.
_SetName = Annotated[
    str, Field(strict=True, min_length=1, max_length=50, pattern=_LINE)
]
# Each length compiles programs of its own.
_Lengths = Annotated[tuple[_Positive, ...], Field(max_length=64)]
_Dtype = Literal["float32", "bfloat16"]


def _check(ok: bool, sentence: str) -> None:
  if not ok:
    raise ValueError(sentence)


def _hints(cls: type) -> dict[str, Any]:
  """Maps each field to its type, without `None` and what is annotated."""
  hints = typing.get_type_hints(cls)
  for name, kind in hints.items():
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
      kind = next(a for a in typing.get_args(kind) if a is not type(None))
    hints[name] = kind
  return hints


def _groups(cls: type) -> list[str]:
  """Names the fields that are groups."""
  hints = _hints(cls).items()
  return [name for name, kind in hints if dataclasses.is_dataclass(kind)]


def _dotted(*parts: Any) -> str:
  """Joins names with dots; those that are none are shown as Python has them."""
  texts = (str(part) for part in parts if part != "")
  return ".".join(
      text if text.isprintable() and len(text) <= 100 else shown(text)
      for text in texts
  )


def _sentence(cls: type, at: str, error: pydantic.ValidationError) -> str:
  """Says what is wrong first: the field, the value and the mend."""
  first = error.errors(include_url=False)[0]
  kind, fields = first["type"], dataclasses.fields(cls)
  parts = [part for part in first["loc"] if part != "[key]"]
  if kind == "unexpected_positional_argument":
    more = shown(first["input"])
    return f"{at} has {len(fields)} fields, and {more} is one more."
  if parts and isinstance(parts[0], int):  # A positional argument.
    parts[0] = fields[parts[0]].name
  name = _dotted(at, *parts)
  value, context = first["input"], first.get("ctx", {})
  if kind == "value_error":
    return str(context["error"]).replace(_HERE, f"{name}." if name else "")
  if kind == "missing":
    return f"{name} is missing; set it."
  if kind == "unexpected_keyword_argument":
    return _unknown(cls, at, parts)
  if kind not in _MENDS:
    return f"{name} is {shown(value)}; {first['msg']}."
  limits = {
      key: f"{limit:g}" if isinstance(limit, float) else limit
      for key, limit in context.items()
  }
  mend = _MENDS[kind].format(kind=type(value).__name__, **limits)
  return f"{name} is {shown(value)}{mend}"


def _settings(at: str) -> Callable[[type], type]:
  """Makes a group of settings whose dotted name is `at`."""

  def decorate(cls: type) -> type:
    made = pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self, /, *args, **kwargs):
      try:
        init(self, *args, **kwargs)
      except pydantic.ValidationError as error:
        raise ConfigError(_sentence(made, at, error)) from None

    made.__init__ = checked
    return made

  return decorate


@_settings("model")
class ModelSpec:
  """Which model, and how it computes.

  Attributes:
    path: names a local directory in Hugging Face format, a hub id, or
      `bundled:NAME` for a model that ships with the package.
    compute_dtype: is the dtype of activations and caches; devices without
      bfloat16 compute in float32.
    param_dtype: is the dtype of the weights; the optimizer updates the
      student's in float32, and with `lora` leaves them alone.
    remat: says what the backward pass computes again: "none", "full" (each
      layer, from its input), "dots" (all but the products with weights) or
      "offload" (as "full", with the layers' inputs in the host's memory).
    offload: keeps a teacher's weights in the host's memory while the student
      samples.
    refresh: makes a teacher's weights a copy of the student's after every so
      many updates, in `param_dtype`, which takes one architecture of both; 0 is
      never.
    random_init: takes only the architecture and the tokenizer from `path`.
    tokenizer: names a model whose tokenizer, template and stop tokens replace
      those of `path`.
  """

  path: _NamedPlace
  compute_dtype: _Dtype = "float32"
  param_dtype: _Dtype = "float32"
  remat: Literal["none", "full", "dots", "offload"] = "none"
  offload: _Bool = False
  refresh: _NotNegative = 0
  random_init: _Bool = False
  tokenizer: _Place = ""

  @property
  def tokenizer_path(self) -> str:
    return self.tokenizer or self.path


@_settings("dataset")
class DatasetSpec:
  """Where records come from.

  Attributes:
    source: names "math_task", "chain_task" or "sums_task", a .jsonl, .json or
      .parquet file, a local data set directory, a hub id, or a task of
      reasoning-gym with its options, as "reasoning_gym:NAME?OPTION=VALUE".
    split: names the data set's split; files have none, and tasks of
      reasoning-gym "train", "validation" and "test".
    subset: names a hub data set's configuration, or the math task's style.
    question: names the field of the question, or is a template over the
      record's fields, such as "{problem} Think aloud.".
    answer: names the field of the right answer; empty if none is needed.
    completion: names the field of a whole answer; empty if none is needed.
    size: is how many records to take; 0 takes all, but a bundled task has no
      end, and of a task of reasoning-gym 100,000 for training and else 500.
    samples: is how many answers an evaluation samples for each problem.
    where: takes only records whose fields hold these texts, such as
      ("domain=math",); `size`, `random` and `distinct` choose among them.
    distinct: takes each question once, in its first record; white space does
      not tell two questions apart.
    random: takes `size` records at random instead of the first ones.
    choices: names the field that lists a question's options, or one field for
      each option; `answer` then holds the right one's letter, or as an integer
      its number from 0, or is one of these fields, and the options come in a
      random order.
    seed: seeds `random`, the order of the options, and a task of
      reasoning-gym.
    max_prompt_len: drops and counts longer prompts of an evaluation; 0 stands
      for `data.max_prompt_len`.
    rule: says where an evaluation looks for the answer: "plain" in the last
      box, or else in the text; "dual" in the last box and in the last line
      that begins with "Answer:", and one of them must be right.
  """

  source: _NamedPlace
  split: _Str = "train"
  subset: _Str = ""
  question: _Text = "question"
  answer: _Str = ""
  completion: _Str = ""
  size: _NotNegative = 0
  samples: _Positive = 1
  where: Annotated[tuple[_Str, ...], Field(max_length=26)] = ()
  distinct: _Bool = False
  random: _Bool = False
  choices: Annotated[tuple[_Str, ...], Field(max_length=26)] = ()
  seed: _Seed = 0
  max_prompt_len: _NotNegative = 0
  rule: Literal["plain", "dual"] = "plain"

  def __post_init__(self):
    endless = self.source in BUNDLED_TASKS
    self._check_gym()
    _check(
        not endless or self.size > 0,
        f"{_HERE}size is 0 but {_HERE}source is {self.source!r}, which has no"
        f" end; set {_HERE}size above 0.",
    )
    _check(
        not self.random or (self.size > 0 and not endless),
        f"{_HERE}random is True but {_HERE}source is {self.source!r} and"
        f" {_HERE}size is {self.size}; set {_HERE}size to how many records to"
        f" draw from a file or data set, or {_HERE}random to False.",
    )
    wrong = [text for text in self.where if not text.partition("=")[0]]
    wrong += [text for text in self.where if "=" not in text]
    _check(
        not wrong,
        f"{_HERE}where is {shown(self.where)}, of which {shown(wrong[:1])}"
        " names no field and text; write each as 'FIELD=TEXT', such as"
        " 'domain=math'.",
    )
    names = [text.partition("=")[0] for text in self.where]
    _check(
        len(set(names)) == len(names),
        f"{_HERE}where is {shown(self.where)}, which names a field twice, and"
        " no record holds two texts there; name each field once.",
    )
    for name in ("where", "distinct"):
      _check(
          not endless or not getattr(self, name),
          f"{_HERE}{name} is {shown(getattr(self, name))} but {_HERE}source is"
          f" {self.source!r}, which makes its records and has none to choose"
          f" from; leave {_HERE}{name} out.",
      )
    _check(
        all(self.choices) and len(set(self.choices)) == len(self.choices),
        f"{_HERE}choices is {self.choices}; name each field with options"
        " once.",
    )
    _check(
        self.choices != (self.answer,),
        f"{_HERE}choices is {self.choices} and {_HERE}answer is"
        f" {self.answer!r}, the same field; set {_HERE}answer to the field of"
        " the right option's letter.",
    )

  def _check_gym(self) -> None:
    if not self.is_gym:
      return
    _check(
        self.split in GYM_SPLITS,
        f"{_HERE}split is {self.split!r} and {_HERE}source is"
        f" {self.source!r}; use one of {', '.join(GYM_SPLITS)}.",
    )
    for name in ("subset", "where", "distinct", "random", "choices", "rule"):
      value, default = getattr(self, name), getattr(DatasetSpec, name)
      _check(
          value == default,
          f"{_HERE}{name} is {value!r} but {_HERE}source is {self.source!r},"
          " which makes and grades its questions by itself; leave"
          f" {_HERE}{name} at {default!r}.",
      )

  @property
  def wanted(self) -> dict[str, str]:
    """What `where` wants, by the name of the field."""
    pairs = (text.partition("=") for text in self.where)
    return {name: text for name, _, text in pairs}

  @property
  def is_gym(self) -> bool:
    """Whether it is a task of reasoning-gym."""
    return self.source.startswith(GYM)

  @property
  def grading(self) -> str:
    """A key of `grading.GRADERS`.

    That is "letter" for multiple choice, "gym" for a task of reasoning-gym, and
    else "math".
    """
    if self.is_gym:
      return "gym"
    kind = "letter" if self.choices else "math"
    return kind if self.rule == "plain" else f"dual_{kind}"


@_settings("data")
class DataSpec:
  """The training prompts.

  Attributes:
    train: says where the records come from.
    batch_size: is the number of prompts in an update, over all devices.
    max_prompt_len: is S, in tokens; longer prompts are dropped and counted.
    suffix: follows the chat template's generation prompt, for both models and
      in evaluation, and may be a template over the record's fields, such as
      "<think>{first_words}"; the paper appends `<think>`, since the loss hardly
      teaches a base model a special token.
    system: is the system prompt of questions that have none of their own, for
      both models and in evaluation; None stands for what the chat template
      adds by itself, and empty for none.
    teacher_prompt: is a template over the record's fields, such as
      "{question} Solution: {completion}", that the teacher reads instead of
      the last turn (of a field of messages, the last one's text); empty for
      the student's prompt.
    max_teacher_prompt_len: is S', in tokens, for `teacher_prompt`; 0 stands
      for `max_prompt_len`.
  """

  train: DatasetSpec
  batch_size: _Positive
  max_prompt_len: _Positive
  suffix: _Text = "<think>"
  system: _Text | None = None
  teacher_prompt: _Text = ""
  max_teacher_prompt_len: _NotNegative = 0

  def __post_init__(self):
    _check(
        not self.max_teacher_prompt_len or bool(self.teacher_prompt),
        f"data.max_teacher_prompt_len is {self.max_teacher_prompt_len} but"
        " data.teacher_prompt is empty, so the teacher reads the student's"
        " prompt; set data.teacher_prompt, or data.max_teacher_prompt_len to"
        " 0.",
    )
    _check(
        not self.teacher_prompt or bool(self.teacher_fields),
        f"data.teacher_prompt is {shown(self.teacher_prompt)}, which names no"
        " field"
        " and is the same for every record; name a field in braces, as"
        f" {{{self.train.question}}}.",
    )

  @property
  def teacher_fields(self) -> tuple[str, ...]:
    """The fields of the record that the teacher's prompt is made of."""
    return tuple(dict.fromkeys(FIELD.findall(self.teacher_prompt)))

  @property
  def suffix_fields(self) -> tuple[str, ...]:
    """The fields of the record that the suffix is made of."""
    return tuple(dict.fromkeys(FIELD.findall(self.suffix)))

  @property
  def teacher_prompt_len(self) -> int:
    """The static length of what the teacher reads before an answer."""
    return self.max_teacher_prompt_len or self.max_prompt_len


# What the teacher is asked by default.
_REWRITE = (
    "{question}\n\nHere is an attempt at this problem:\n\n{answer}\n\nWrite the"
    " attempt again in as few words as a reader needs: the steps that lead to"
    " the result, in order, with no detours, no repetition and no remarks about"
    " the attempt. Mend what is wrong in it, and bring it to its end if it has"
    " none. Put the final answer into \\boxed{}."
)


@_settings("rollout.rewrite")
class RewriteSpec:
  """The teacher rewrites what the student has sampled.

  Mixed-policy distillation (arXiv 2605.08776, of which we know the abstract);
  `data/prompts.py` says what is taken of what the teacher writes.

  Attributes:
    prompt: is what the teacher is asked in a chat turn of its own, with the
      problem in the place of {question} and the student's answer in that of
      {answer}.
    suffix: follows the generation prompt of that turn.
    thoughts: says what becomes of what the teacher thinks before it answers:
      "cut" takes what follows `</think>`, "keep" takes all.
    final_mark: is text with which the teacher's final answer begins, and before
      which the student's thoughts are closed by `</think>`; empty if the
      teacher closes them, or if there are none.
    scored_in: says after what the teacher scores the rewritten answer:
      "prompt", what it reads when it scores the student's own answers, or
      "rewriting", the turn in which it wrote it.
    max_draft_len: is the longest answer in tokens that the student samples to
      be rewritten; 0 stands for `rollout.max_len`.
    max_prompt_len: is the static length in tokens of the teacher's turn; of a
      longer answer of the student only the beginning is shown.
    max_len: is the longest rewriting in tokens, the teacher's thoughts
      included; what has not ended by then is not learned, and 0 stands for
      `rollout.max_len`.
  """

  prompt: _Text = _REWRITE
  suffix: _Text = ""
  thoughts: Literal["cut", "keep"] = "cut"
  final_mark: _Str = ""
  scored_in: Literal["prompt", "rewriting"] = "prompt"
  max_draft_len: _NotNegative = 0
  max_prompt_len: _NotNegative = 0
  max_len: _NotNegative = 0

  def __post_init__(self):
    fields = FIELD.findall(self.prompt)
    _check(
        {*fields} == {"question", "answer"},
        f"rollout.rewrite.prompt is {shown(self.prompt)}, which names"
        f" {', '.join(fields) or 'no field'} in braces; name {{question}} and"
        " {answer}, and nothing else.",
    )
    _check(
        not self.final_mark or self.scored_in == "prompt",
        f"rollout.rewrite.final_mark is {self.final_mark!r} but"
        f" rollout.rewrite.scored_in is {self.scored_in!r}, and the teacher did"
        " not write the `</think>` there; set rollout.rewrite.scored_in to"
        " 'prompt', or rollout.rewrite.final_mark to ''.",
    )


@_settings("rollout")
class RolloutSpec:
  """How the student samples.

  Attributes:
    per_prompt: is the number of rollouts for each prompt.
    max_len: is the longest answer in tokens: the cap of full distillation, of
      the schedule and of supervised answers.
    temperature: is that of sampling *and* of both models in the loss.
    source: says whose answers are learned from besides the student's:
      "student" for none, "teacher" samples prefixes from the teacher, "data"
      takes the beginnings of the records' completions, and "rewrite" those of
      the student's answers as the teacher has rewritten them.
    source_share: is the share of updates on the source's answers (1 - lambda
      of GKD, arXiv 2306.13649).
    cache_dtype: is the dtype of keys and values while answers are sampled;
      "int8" has a scale for each head and position, and empty stands for the
      student's compute dtype.
    top_k: draws only from so many of the most probable tokens; 0 is off.
    top_p: draws only from the most probable tokens that together reach this
      probability; 1 is off.
    batch_tokens: bounds the tokens of prompts and prefixes that are sampled at
      a time, over all devices; 0 takes what an accelerator's memory holds, and
      all on a CPU.
    rewrite: is the group of that source.
  """

  per_prompt: _Positive
  max_len: _Positive
  temperature: _Temperature = 1.0
  source: Literal["student", "teacher", "data", "rewrite"] = "student"
  source_share: _Share = 1.0
  cache_dtype: Literal["", "float32", "bfloat16", "int8"] = ""
  top_k: _NotNegative = 0
  top_p: _Part = 1.0
  batch_tokens: _NotNegative = 0
  rewrite: RewriteSpec = RewriteSpec()

  def __post_init__(self):
    _check(
        self.source != "student" or self.source_share == 1,
        f"rollout.source_share is {self.source_share} but rollout.source is"
        " 'student'; set rollout.source to 'teacher' or 'data', or"
        " rollout.source_share to 1.",
    )
    _check_idle(
        self,
        self.idle(self.source),
        "rollout",
        f"rollout.source is {self.source!r}; set rollout.source to '{{}}'",
    )
    _check(
        self.source != "rewrite" or self.rewrite.max_prompt_len > 0,
        "rollout.rewrite.max_prompt_len is 0 but rollout.source is 'rewrite';"
        " set rollout.rewrite.max_prompt_len to the tokens of a problem, an"
        " answer and rollout.rewrite.prompt together.",
    )

  @staticmethod
  def idle(source: str) -> set[str]:
    """Names the groups that a source does not use."""
    return set(_groups(RolloutSpec)) - {source}

  @property
  def draft_len(self) -> int:
    """The longest answer that is sampled to be rewritten."""
    return self.rewrite.max_draft_len or self.max_len

  @property
  def rewriting_len(self) -> int:
    """The longest rewriting, with what the teacher thinks before it."""
    return self.rewrite.max_len or self.max_len


@_settings("prefix.linear")
class LinearSpec:
  """The paper's schedule: the cap grows by a fixed step.

  Attributes:
    start: is the first cap in tokens.
    increment: is by how many tokens the cap grows.
    every: is the number of updates between two changes.
  """

  start: _Positive = 1
  increment: _NotNegative = 256
  every: _Positive = 1


@_settings("prefix.fixed")
class FixedSpec:
  """The same cap in every update.

  Attributes:
    length: is the cap in tokens.
  """

  length: _Positive = 256


@_settings("prefix.random")
class RandomSpec:
  """A cap drawn anew for every update, up to `rollout.max_len`.

  Attributes:
    min_length: is the smallest cap in tokens.
  """

  min_length: _Positive = 1


@_settings("prefix.drift")
class DriftSpec:
  """Prune-OPD: the cap grows while the student stays close to the teacher.

  A token's weight in the loss is its rollout's reliability there and a half.

  Attributes:
    start: is the first cap in tokens, and the smallest.
    increment: is by how many tokens the cap grows or shrinks.
    overlap_tokens: is how many of each model's most probable tokens are
      compared at a position.
    min_overlap: is the share of common tokens below which a position has
      drifted.
    max_drifted: is the number of drifted positions at which a rollout becomes
      unreliable; up to it, its reliability falls from 1 to 0.
    min_reliable_fraction: is the share of reliable rollouts from which the cap
      grows.
    patience_updates: is the number of updates below that share after which the
      cap shrinks.
  """

  start: _Positive = 1
  increment: _NotNegative = 256
  overlap_tokens: _Positive = 16
  min_overlap: _Share = 0.7
  max_drifted: _Positive = 100
  min_reliable_fraction: _Share = 0.1
  patience_updates: _Positive = 3


@_settings("prefix.plateau")
class PlateauSpec:
  """Adaptive FastOPD: the cap grows when the student has stopped improving.

  Attributes:
    start: is the first cap in tokens.
    increment: is by how many tokens the cap grows, and how many tokens before
      the cap are looked at.
    top_tokens: is how many of each model's most probable tokens are compared
      at a position.
    smoothing: is the share of the former value that the smoothed signal keeps
      in every update.
    min_progress: is by how much the smoothed signal, which is 1 at first, must
      fall to count as progress.
    min_reached_fraction: is the share of rollouts that reach the cap from which
      it grows at once; 0 is off.
    patience_updates: is the number of updates without progress after which the
      cap grows.
  """

  start: _Positive = 1
  increment: _NotNegative = 256
  top_tokens: _Positive = 16
  smoothing: _Decay = 0.5
  min_progress: _Share = 0.01
  min_reached_fraction: _Share = 0.5
  patience_updates: _Positive = 3


@_settings("prefix.agreement")
class AgreementSpec:
  """KAT: each rollout is cut where student and teacher have come to agree.

  Attributes:
    window_tokens: is how many tokens' divergences are averaged.
    quantile: says which quantile of past rollouts' smallest averages is the
      threshold.
    memory_rollouts: is the number of past rollouts that the quantile is of, at
      most.
    warmup_updates: is the number of first updates in which nothing is cut.
    min_rollouts: is the number of past rollouts before which nothing is cut.
    low_windows: is how many averages running must be below the threshold.
    top_tokens: is how many of the student's most probable tokens a divergence
      compares one by one; the others are compared as one.
  """

  window_tokens: _Positive = 64
  quantile: _Share = 0.7
  memory_rollouts: _Positive = 4096
  warmup_updates: _NotNegative = 50
  min_rollouts: _Positive = 512
  low_windows: _Positive = 4
  top_tokens: _Positive = 64

  def __post_init__(self):
    _check(
        self.min_rollouts <= self.memory_rollouts,
        f"prefix.agreement.min_rollouts is {self.min_rollouts} but"
        f" prefix.agreement.memory_rollouts is {self.memory_rollouts}, so that"
        " nothing would ever be cut; lower prefix.agreement.min_rollouts or"
        " raise prefix.agreement.memory_rollouts.",
    )


@_settings("prefix.audited")
class AuditedSpec:
  """Now and then a whole rollout shows where the divergence is.

  Attributes:
    start: is the first cap in tokens, and the smallest.
    divergence_fraction: is the share of the divergence that the cap covers.
    audit_every: is the largest number of updates between two audits.
    min_nats: is the divergence below which a prefix is audited at once, and
      below which a whole rollout ends the training; 0 is off.
  """

  start: _Positive = 1
  divergence_fraction: _Share = 0.5
  audit_every: _Positive = 8
  min_nats: _Amount = 0.0


def _check_idle(values: Any, idle: Iterable[str], at: str, mend: str) -> None:
  """Refuses what differs from its default in a group that is not in use."""
  for name in idle:
    group = getattr(values, name)
    for field in dataclasses.fields(group):
      value = getattr(group, field.name)
      where = f"{at}.{name}.{field.name}"
      _check(
          value == field.default,
          f"{where} is {shown(value)} but {mend.format(name)}, or leave"
          f" {where} at {shown(field.default)}.",
      )


@_settings("prefix")
class PrefixSpec:
  """How much of each answer is sampled and supervised.

  Attributes:
    schedule: says what chooses the cap; `distill/prefix_schedule.py` has the
      rules and their sources.
    buckets: are the static lengths that programs are compiled for, and the
      exact cap inside one is traced; empty stands for the longest cap and its
      halves, seven at most.
    linear: is the group of that schedule.
    fixed: is the group of that schedule.
    random: is the group of that schedule.
    drift: is the group of that schedule.
    plateau: is the group of that schedule.
    agreement: is the group of that schedule.
    audited: is the group of that schedule.
  """

  schedule: Literal[
      "linear", "fixed", "random", "drift", "plateau", "agreement", "audited"
  ] = "linear"
  buckets: _Lengths = ()
  linear: LinearSpec = LinearSpec()
  fixed: FixedSpec = FixedSpec()
  random: RandomSpec = RandomSpec()
  drift: DriftSpec = DriftSpec()
  plateau: PlateauSpec = PlateauSpec()
  agreement: AgreementSpec = AgreementSpec()
  audited: AuditedSpec = AuditedSpec()

  def __post_init__(self):
    _check(
        tuple(sorted(set(self.buckets))) == self.buckets,
        f"prefix.buckets is {self.buckets}, which does not increase; sort the"
        " lengths.",
    )
    _check_idle(
        self, self.idle(self.schedule), "prefix",
        f"prefix.schedule is {self.schedule!r}; set prefix.schedule to '{{}}'",
    )

  @staticmethod
  def idle(schedule: str) -> set[str]:
    """Names the groups that a schedule does not use."""
    return set(_groups(PrefixSpec)) - {schedule}


@_settings("loss.exact")
class ExactSpec:
  """The whole distributions are compared at every token.

  Attributes:
    divergence: names one of `distill/divergence.py`: "reverse_kl" (the
      paper's), "forward_kl" or "jsd".
    top_k: compares so many of the teacher's most probable tokens one by one
      and the rest as one; 0 compares all one by one.
    max_entry: cuts the contribution of every entry of the vocabulary at so
      many nats before the sum (COPSD, arXiv 2605.09548); merged stop tokens
      are one entry, and so is the rest of `top_k`; 0 is off.
  """

  divergence: _Name = "reverse_kl"
  top_k: _NotNegative = 0
  max_entry: _Amount = 0.0

  def __post_init__(self):
    _check(
        not self.max_entry or self.divergence != "reverse_kl",
        f"loss.exact.max_entry is {self.max_entry} but loss.exact.divergence is"
        " 'reverse_kl', whose large entries are the student's own mistakes; set"
        " loss.exact.divergence to 'forward_kl' or 'jsd', or"
        " loss.exact.max_entry to 0.",
    )


@_settings("loss.jsd")
class JsdSpec:
  """The exact loss's generalised Jensen-Shannon divergence.

  Attributes:
    beta: is the teacher's weight in the mixture; 0 is the forward KL and 1 the
      reverse KL (GKD, arXiv 2306.13649).
  """

  beta: _Share = 0.5


@_settings("loss.relaxed")
class RelaxedSpec:
  """REOPOLD (arXiv 2603.11137): the policy gradient on tokens that count.

  `distill/loss.py` has the formula and what the readings of the floor mean.

  Attributes:
    floor: says what the reward's lower bound is, for a weight a of the
      student in a mixture: "log_odds" is log(a / (1 - a)), "scaled_log" is
      log(a) / (1 - a), and "log" is log(a).
    weight: is a.
    entropy_share: is the share of an update's tokens, those at which the
      student's entropy is largest, that count after the switch.
    switch_step: is the number of updates before which the tokens count whose
      reward is not below the floor; 0 leaves out that phase.
  """

  floor: Literal["log_odds", "scaled_log", "log"] = "log_odds"
  weight: Annotated[_Float, Field(gt=0, lt=1)] = 0.3
  entropy_share: _Part = 0.2
  switch_step: _NotNegative = 150

  def __post_init__(self):
    _check(
        self.floor != "log_odds" or self.weight < 0.5,
        f"loss.relaxed.weight is {self.weight} but loss.relaxed.floor is"
        " 'log_odds', which is then 0 or more and drops what the teacher likes"
        " better than the student; set loss.relaxed.weight below 0.5, or"
        " another loss.relaxed.floor.",
    )


@_settings("loss")
class LossSpec:
  """The divergence on prefix tokens.

  A rollout's tokens are those in the window, of what is left if the rollout was
  cut. `normalize` counts these alone: "length" divides by the number of tokens
  in the window, and not by the rollout's whole length. A rollout with none adds
  0 to the sum, and counts among the rollouts.

  Attributes:
    form: says how the divergence is taken: "exact" over the whole
      distributions, "policy_gradient" on the sampled tokens, "relaxed" on
      some of them, and "direct" differentiates the estimate k3 on the sampled
      tokens.
    window_start: is the first position of a rollout that is trained on; a
      negative one counts from the rollout's end.
    window_end: is the position behind the last one that is trained on, counted
      as `window_start`; 0 is the rollout's end.
    normalize: says what the loss is divided by: "rollouts" is the paper's mean
      over rollouts of the sum over tokens, "tokens" the mean over all tokens,
      and "length" the mean over rollouts of the sum over a rollout's tokens
      divided by their number.
    merge_stop_tokens: takes the stop tokens of student and teacher as one
      event, so that a base model is not punished for the name of its stop.
    logits_mib: bounds the memory of logits in MiB a device; the chunked head
      takes so many tokens at a time.
    exact: is the group of that form.
    jsd: is the group of that divergence.
    relaxed: is the group of that form.
  """

  form: Literal["exact", "policy_gradient", "relaxed", "direct"] = "exact"
  window_start: _Int = 0
  window_end: _Int = 0
  normalize: Literal["rollouts", "tokens", "length"] = "rollouts"
  merge_stop_tokens: _Bool = True
  logits_mib: Annotated[_Positive, Field(le=2**20)] = 256
  exact: ExactSpec = ExactSpec()
  jsd: JsdSpec = JsdSpec()
  relaxed: RelaxedSpec = RelaxedSpec()

  def __post_init__(self):
    _check(
        self.form != "relaxed" or self.normalize == "tokens",
        f"loss.normalize is {self.normalize!r} but loss.form is 'relaxed',"
        " which divides by the number of tokens that count; set loss.normalize"
        " to 'tokens'.",
    )
    start, end = self.window_start, self.window_end
    _check(
        start < end or (end <= 0 <= start) or (start < 0 and end == 0),
        f"loss.window_start is {start} and loss.window_end is {end}, which"
        " leaves no tokens; set loss.window_end behind loss.window_start.",
    )
    divergence = self.exact.divergence
    idle = self.idle(self.form, divergence)
    mend = f"loss.form is {self.form!r}; set loss.form to '{{}}'"
    _check_idle(self, idle - {"jsd"}, "loss", mend)
    mend = "set loss.form to 'exact' and loss.exact.divergence to '{}'"
    shown = f"loss.form is {self.form!r}"
    if self.form == "exact":
      shown = f"loss.exact.divergence is {divergence!r}"
      # The sentence is a template, and a name may have braces.
      shown = shown.replace("{", "{{").replace("}", "}}")
      mend = "set loss.exact.divergence to '{}'"
    _check_idle(self, idle & {"jsd"}, "loss", f"{shown}; {mend}")

  @staticmethod
  def idle(form: str, divergence: str) -> set[str]:
    """Names the groups that a form and a divergence do not use."""
    used = {form, divergence} if form == "exact" else {form}
    return set(_groups(LossSpec)) - used

  def refines(self, step: int) -> bool:
    """Whether update `step` (from 0) is in the second phase of "relaxed"."""
    return self.form == "relaxed" and step >= self.relaxed.switch_step


@_settings("optimizer")
class OptimizerSpec:
  """AdamW with a global-norm clip and a warm-up.

  Attributes:
    learning_rate: is the peak; AdamW moves a weight by about so much in an
      update.
    warmup_steps: is the number of updates over which the learning rate rises
      to the peak.
    decay: says how the learning rate falls after the warm-up.
    final_fraction: is the share of the peak at the last step of a cosine.
    weight_decay: applies to matrices only.
    clip_norm: bounds the norm of the whole gradient; 0 is off.
    b1: is the decay of the first moment.
    b2: is the decay of the second moment.
    batch_tokens: bounds the tokens of prompts and prefixes that are scored and
      differentiated at a time, over all devices; 0 takes what an accelerator's
      memory holds, and all on a CPU.
    offload: keeps the moments in the host's memory between updates.
    max_skipped: ends the run when this many updates in a row were skipped
      because their numbers were not finite.
  """

  learning_rate: Annotated[_Float, Field(gt=0, le=1)]
  warmup_steps: _NotNegative = 0
  decay: Literal["constant", "cosine"] = "constant"
  final_fraction: _Share = 0.0
  weight_decay: _Amount = 0.0
  clip_norm: _Amount = 1.0
  b1: _Decay = 0.9
  b2: _Decay = 0.999
  batch_tokens: _NotNegative = 0
  offload: _Bool = False
  max_skipped: _Positive = 3

  def __post_init__(self):
    _check(
        self.decay == "cosine" or not self.final_fraction,
        f"optimizer.final_fraction is {self.final_fraction} but optimizer.decay"
        f" is {self.decay!r}; set optimizer.decay to 'cosine', or"
        " optimizer.final_fraction to 0.",
    )
    _check(
        self.learning_rate * self.weight_decay <= 1,
        f"optimizer.weight_decay is {self.weight_decay} and"
        f" optimizer.learning_rate is {self.learning_rate}, so that an update"
        " would turn the signs of all weights; set optimizer.weight_decay to"
        f" {1 / self.learning_rate:g} or less.",
    )


_Product = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]


@_settings("lora")
class LoraSpec:
  """Low-rank adapters (LoRA, arXiv 2106.09685) beside a frozen student.

  A product W x becomes W x + alpha / rank * B A x, and only A and B are
  trained. B is zero at first, so that the student begins as what it was made
  of. If the teacher has the same `path`, `param_dtype` and `random_init` as the
  student, both share one copy of the weights.

  Attributes:
    rank: is the number of rows of A and of columns of B; 0 is off.
    alpha: over the rank is what the adapters' products are multiplied by; 0
      stands for the rank.
    targets: names the products of each layer that get adapters, as Hugging Face
      calls them.
    path: names a local directory or a hub id in PEFT's format whose adapters
      the student begins with; empty for random A and zero B.
  """

  rank: _NotNegative = 0
  alpha: Annotated[_Amount, Field(le=1e6)] = 0.0
  targets: Annotated[tuple[_Product, ...], Field(max_length=7)] = (
      "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
      "down_proj",
  )
  path: _Place = ""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      _check(
          self.rank > 0 or value == field.default,
          f"lora.{field.name} is {value!r} but lora.rank is 0, so that the"
          " whole student is trained; set lora.rank above 0, or leave"
          f" lora.{field.name} at {field.default!r}.",
      )
    _check(
        len(set(self.targets)) == len(self.targets) > 0,
        f"lora.targets is {self.targets}; name one product or more, each once.",
    )

  @property
  def scale(self) -> float:
    """What the adapters' products are multiplied by; 1 if there are none."""
    return self.alpha / self.rank if self.alpha else 1.0


@_settings("mesh")
class MeshSpec:
  """Sizes of the device mesh's axes.

  Attributes:
    data: is the number of replicas of the weights; -1 takes the devices that
      are left.
    fsdp: is the number of shards of the weights and of the batch; -1 takes the
      devices that are left.
    tensor: is the number of shards of heads, MLP columns and vocabulary.
    sampling_tensor: is `tensor` while answers are sampled, in training and in
      evaluation, where weights are not split over fsdp and as many times fewer
      batch shards are left; 0 stands for `tensor`.
  """

  data: Annotated[_Int, Field(ge=-1)] = -1
  fsdp: Annotated[_Int, Field(ge=-1)] = 1
  tensor: _Positive = 1
  sampling_tensor: _NotNegative = 0

  def __post_init__(self):
    _check(
        self.data != 0,
        "mesh.data is 0; set it to 1 or more, or to -1 for the devices that are"
        " left.",
    )
    _check(
        self.fsdp != 0,
        "mesh.fsdp is 0; set it to 1 or more, or to -1 for the devices that are"
        " left.",
    )
    _check(
        self.data != -1 or self.fsdp != -1,
        "mesh.data is -1 and mesh.fsdp is -1, but one axis takes the devices"
        " that are left; set mesh.data to 1.",
    )
    shards = self.fsdp * self.tensor
    _check(
        not self.sampling_tensor
        or self.fsdp == -1
        or shards % self.sampling_tensor == 0,
        f"mesh.sampling_tensor is {self.sampling_tensor}, which does not divide"
        f" mesh.fsdp x mesh.tensor = {shards}; set it to a divisor of that, or"
        " to 0 for mesh.tensor.",
    )

  def filled(self, devices: int) -> "MeshSpec":
    """Returns the sizes with no axis left open, for so many devices.

    Their product is the number of devices, if that can be.

    Raises:
      ConfigError: `sampling_tensor` does not divide what fsdp becomes.
    """
    if self.fsdp == -1:
      fsdp = max(devices // (self.data * self.tensor), 1)
      return dataclasses.replace(self, fsdp=fsdp)
    if self.data == -1:
      data = max(devices // (self.fsdp * self.tensor), 1)
      return dataclasses.replace(self, data=data)
    return self


@_settings("evaluation")
class EvaluationSpec:
  """Evaluation runs to the end of the answer, whatever the training cap.

  Attributes:
    sets: maps a name to records, with `answer`.
    every: is the number of updates between evaluations of the student; 0
      leaves the first and the last one.
    between: names the sets that are evaluated before the last update; empty
      for all.
    max_len: is the longest answer in tokens.
    temperature: is that of the sampled answers.
    top_k: is that of the sampled answers, as in `rollout`.
    top_p: is that of the sampled answers, as in `rollout`.
    greedy: evaluates greedy answers as well.
    batch_size: is the number of answers decoded at a time; 0 takes as many as
      an accelerator's memory holds, and 64 on a CPU.
    teacher: evaluates the teacher after the last update.
    scored: is the number of problems, evenly over each set, whose first sampled
      answers the teacher scores, whole, since the reverse KL tells students
      apart that hardly ever answer right; SeqKD reads the teacher's weights
      anew for each set and evaluation; 0 is off.
  """

  sets: Mapping[_SetName, DatasetSpec]
  every: _NotNegative = 0
  between: tuple[_Str, ...] = ()
  max_len: _Positive = 256
  temperature: _Temperature = 1.0
  top_k: _NotNegative = 0
  top_p: _Part = 1.0
  greedy: _Bool = True
  batch_size: _NotNegative = 64
  teacher: _Bool = True
  scored: _NotNegative = 0

  def __post_init__(self):
    for name in self.between:
      _check(
          name in self.sets,
          f"evaluation.between is {shown(self.between)}, of which {name!r} is"
          f" not in evaluation.sets; use {', '.join(self.sets) or '()'}.",
      )
    for name, spec in self.sets.items():
      _check(
          bool(spec.answer) or spec.is_gym,
          f"evaluation.sets.{name}.answer is empty, so nothing can be graded;"
          " name the field of the right answer.",
      )
      answers = spec.size * spec.samples
      _check(
          answers <= _MOST_ANSWERS,
          f"evaluation.sets.{name}.size is {spec.size} and"
          f" evaluation.sets.{name}.samples is {spec.samples}, which is"
          f" {answers} answers; lower one of them, for {_MOST_ANSWERS} answers"
          " at most.",
      )


@_settings("checkpoint")
class CheckpointSpec:
  """When to save, and what is kept.

  Attributes:
    every: is the number of updates between checkpoints.
    keep: is the number of last checkpoints that are kept.
    keep_every: keeps the checkpoints whose update is a multiple of it as well;
      0 is off.
    best: names the evaluation set with whose highest sampled accuracy a
      checkpoint is kept as well; empty for none.
  """

  every: _Positive = 10
  keep: _Positive = 2
  keep_every: _NotNegative = 0
  best: _Str = ""

  def __post_init__(self):
    _check(
        self.keep_every % self.every == 0,
        f"checkpoint.keep_every is {self.keep_every}, which is no multiple of"
        f" checkpoint.every {self.every}, so not all of these would be saved;"
        f" set checkpoint.keep_every to a multiple of {self.every}, or to 0.",
    )


@_settings("export")
class ExportSpec:
  """What a finished run leaves for others to serve.

  Attributes:
    dtype: is the dtype of the exported weights; "auto" takes bfloat16 if the
      teacher's weights are stored in bfloat16, and else float32.
  """

  dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@_settings("samples")
class SamplesSpec:
  """Texts that a run keeps in `samples/`, for its report.

  Attributes:
    updates: is of how many updates rollouts are kept, and of how many
      evaluations answers; the first and the last are among them, and the
      others lie evenly between.
    rollouts: is the number of rollouts that are kept of such an update; 0 is
      off.
    max_tokens: is how many tokens of a rollout are kept, from its beginning.
    alternatives: is how many of the teacher's most probable tokens are kept
      at each position.
    problems: is the number of problems of an evaluation set whose answers are
      kept, whole and one each; 0 is off.
  """

  updates: Annotated[_Positive, Field(ge=2, le=1000)] = 8
  rollouts: Annotated[_NotNegative, Field(le=1000)] = 4
  max_tokens: Annotated[_Positive, Field(le=2**16)] = 512
  alternatives: Annotated[_Positive, Field(le=20)] = 4
  problems: Annotated[_NotNegative, Field(le=1000)] = 6


@_settings("")
class Config:
  """A run.

  The settings of the prefix stay what they are when `method` is not "prefix",
  so that a method can be changed alone.

  Attributes:
    method: stops rollouts at a cap ("prefix") or at `rollout.max_len`
      ("full"), trains on the records' completions ("sft"), or has the teacher
      write an answer to each prompt once and trains on those ("seqkd", arXiv
      1606.07947).
    steps: is the number of updates.
    student: is the model that learns.
    data: is the training prompts.
    rollout: says how the student samples.
    optimizer: says how the student is updated.
    evaluation: says what is evaluated, and when.
    seed: seeds the data order, sampling and random initialisation.
    teacher: is the model that scores; None for "sft".
    prefix: says how much of each answer is sampled.
    loss: says what is minimised.
    mesh: says how devices are arranged.
    checkpoint: says when the run is saved.
    export: says how the student is exported.
    lora: says whether only adapters of the student are trained.
    samples: says which texts are kept.
  """

  method: Literal["prefix", "full", "sft", "seqkd"]
  steps: _NotNegative
  student: ModelSpec
  data: DataSpec
  rollout: RolloutSpec
  optimizer: OptimizerSpec
  evaluation: EvaluationSpec
  seed: _Seed = 0
  teacher: ModelSpec | None = None
  prefix: PrefixSpec = PrefixSpec()
  loss: LossSpec = LossSpec()
  mesh: MeshSpec = MeshSpec()
  checkpoint: CheckpointSpec = CheckpointSpec()
  export: ExportSpec = ExportSpec()
  lora: LoraSpec = LoraSpec()
  samples: SamplesSpec = SamplesSpec()

  def __post_init__(self):
    self._check_models()
    self._check_lora()
    self._check_answers()
    self._check_prefix()
    self._check_sizes()
    self._check_best()

  def _check_models(self) -> None:
    _check(
        self.student.param_dtype == "float32" or self.lora.rank > 0,
        f"student.param_dtype is {self.student.param_dtype!r}, but AdamW's"
        " small steps vanish in bfloat16; set student.param_dtype to 'float32'"
        " and, to compute in bfloat16, student.compute_dtype.",
    )
    _check(
        not self.student.offload,
        "student.offload is True, but the student is never idle; set"
        " student.offload to False (optimizer.offload keeps the moments in the"
        " host's memory).",
    )
    _check(
        not self.student.refresh,
        f"student.refresh is {self.student.refresh}, but it is the teacher that"
        " is refreshed from the student; set student.refresh to 0 and"
        " teacher.refresh.",
    )
    refresh = self.teacher.refresh if self.teacher else 0
    _check(
        not refresh or not self.is_supervised,
        f"method is {self.method!r} but teacher.refresh is {refresh}, and no"
        " teacher scores anything; set teacher.refresh to 0.",
    )
    _check(
        self.method == "sft" or self.teacher is not None,
        f"method is {self.method!r} but teacher is None; set teacher.path.",
    )
    scored = self.evaluation.scored
    _check(
        not scored or self.method != "sft",
        f"method is {self.method!r} but evaluation.scored is {scored}, and no"
        " teacher scores anything; set evaluation.scored to 0.",
    )
    _check(
        not scored or not self.data.teacher_prompt,
        f"evaluation.scored is {scored} but data.teacher_prompt is"
        f" {shown(self.data.teacher_prompt)}, and evaluation sets have no"
        " prompt of the teacher's own; set evaluation.scored to 0.",
    )

  def _check_lora(self) -> None:
    if not self.lora.rank:
      return
    _check(
        not self.optimizer.offload,
        f"optimizer.offload is True but lora.rank is {self.lora.rank}, and the"
        " moments of adapters are too small to be worth the way; set"
        " optimizer.offload to False.",
    )
    refresh = self.teacher.refresh if self.teacher else 0
    _check(
        not refresh,
        f"teacher.refresh is {refresh} but lora.rank is {self.lora.rank}, and"
        " a teacher has no adapters to take over; set one of them to 0.",
    )
    _check(
        not (self.shares_weights and self.teacher.offload),
        "teacher.offload is True but lora.rank is"
        f" {self.lora.rank} and the teacher is the student's own base, whose"
        " weights the student always needs; set teacher.offload to False.",
    )

  def _check_answers(self) -> None:
    completion = self.data.train.completion
    _check(
        self.method != "sft" or bool(completion),
        "method is 'sft' but data.train.completion is empty; name the field of"
        " the answers to learn.",
    )
    _check(
        self.rollout.source != "data" or bool(completion),
        "rollout.source is 'data' but data.train.completion is empty; name the"
        " field of the answers.",
    )
    supervised, source = self.is_supervised, self.rollout.source
    _check(
        not supervised or source == "student",
        f"method is {self.method!r} but rollout.source is {source!r}, and"
        " supervised training samples nothing; set method to 'prefix' or"
        " 'full', or rollout.source to 'student'.",
    )
    scored_in = self.rollout.rewrite.scored_in
    _check(
        scored_in == "prompt" or not self.data.teacher_prompt,
        f"rollout.rewrite.scored_in is {scored_in!r} but data.teacher_prompt is"
        f" {shown(self.data.teacher_prompt)}, and the teacher scores in one"
        " context; leave data.teacher_prompt empty, or set"
        " rollout.rewrite.scored_in to 'prompt'.",
    )
    _check(
        not supervised or self.rollout.per_prompt == 1,
        f"method is {self.method!r} but rollout.per_prompt is"
        f" {self.rollout.per_prompt}, and a record has one completion; set"
        " rollout.per_prompt to 1.",
    )
    _check(
        not supervised or not self.data.teacher_prompt,
        f"method is {self.method!r} but data.teacher_prompt is"
        f" {self.data.teacher_prompt!r}, and no teacher scores anything; leave"
        " data.teacher_prompt empty.",
    )
    _check(
        self.method != "seqkd" or not self.data.suffix_fields,
        f"method is 'seqkd' but data.suffix is {shown(self.data.suffix)}, and"
        " the teacher's answers are kept without the record's other fields;"
        " set data.suffix to a text without names in braces.",
    )

  def _check_prefix(self) -> None:
    source, form = self.rollout.source, self.loss.form
    _check(
        source == "student" or form == "exact",
        f"rollout.source is {source!r} but loss.form is {form!r}, which needs"
        " tokens that the student drew; set loss.form to 'exact'.",
    )
    length, longest = self.prefix.fixed.length, self.rollout.max_len
    _check(
        self.prefix.schedule != "fixed" or length <= longest,
        f"prefix.fixed.length is {length} but rollout.max_len is {longest};"
        " lower prefix.fixed.length or raise rollout.max_len.",
    )
    shortest = self.prefix.random.min_length
    _check(
        self.prefix.schedule != "random" or shortest <= longest,
        f"prefix.random.min_length is {shortest} but rollout.max_len is"
        f" {longest}; lower prefix.random.min_length or raise"
        " rollout.max_len.",
    )
    window = self.prefix.agreement.window_tokens
    least = window + self.prefix.agreement.low_windows
    _check(
        self.prefix.schedule != "agreement" or least <= longest,
        f"prefix.agreement.window_tokens is {window} and"
        f" prefix.agreement.low_windows is {least - window}, but"
        f" rollout.max_len is {longest}, so that no rollout would ever be cut;"
        " lower one of them or raise rollout.max_len to"
        f" {least} or more.",
    )
    _check(
        self.schedule not in _COMPARING or form == "exact",
        f"prefix.schedule is {self.schedule!r} but loss.form is {form!r}, which"
        " does not see the two models' most probable tokens; set loss.form to"
        " 'exact'.",
    )
    _check(
        self.schedule != "agreement" or source == "student",
        f"prefix.schedule is 'agreement' but rollout.source is {source!r}, and"
        " the schedule cuts the student's own rollouts; set rollout.source to"
        " 'student'.",
    )

  def _check_sizes(self) -> None:
    data, rollout, graded = self.data, self.rollout, self.evaluation
    prompt = max(data.max_prompt_len, data.teacher_prompt_len)
    tokens = self.rollouts_per_step * (prompt + rollout.max_len)
    _check(
        tokens <= _MOST,
        f"data.batch_size is {data.batch_size} and rollout.per_prompt is"
        f" {rollout.per_prompt}, which with prompts of {prompt} tokens and"
        f" rollout.max_len {rollout.max_len} is {tokens} tokens in an update;"
        f" lower one of them, for {_MOST} tokens at most.",
    )
    if rollout.source == "rewrite":
      self._check_rewriting(prompt)
    lengths = {"data.max_prompt_len": data.max_prompt_len} | {
        f"evaluation.sets.{name}.max_prompt_len": spec.max_prompt_len
        for name, spec in graded.sets.items()
    }
    longest, prompt = max(lengths.items(), key=lambda item: item[1])
    tokens = graded.batch_size * (prompt + graded.max_len)
    _check(
        tokens <= _MOST,
        f"evaluation.batch_size is {graded.batch_size}, which with"
        f" {longest} {prompt} and evaluation.max_len {graded.max_len} is"
        f" {tokens} tokens at a time; lower one of them, for {_MOST} tokens at"
        " most.",
    )

  def _check_rewriting(self, prompt: int) -> None:
    """Bounds what is sampled, given what the longest prompt is."""
    rollout = self.rollout
    spec, most = rollout.rewrite, max(rollout.rewriting_len, rollout.max_len)
    longest = max(prompt + rollout.draft_len, spec.max_prompt_len + most)
    tokens = self.rollouts_per_step * longest
    _check(
        tokens <= _MOST,
        f"rollout.rewrite.max_prompt_len is {spec.max_prompt_len},"
        f" rollout.rewrite.max_draft_len {spec.max_draft_len} and"
        f" rollout.rewrite.max_len {spec.max_len}, which for"
        f" {self.rollouts_per_step} rollouts is {tokens} tokens in an update;"
        f" lower one of them, for {_MOST} tokens at most.",
    )

  def _check_best(self) -> None:
    name, sets = self.checkpoint.best, self.evaluation.sets
    if not name:
      return
    _check(
        name in sets,
        f"checkpoint.best is {name!r}, which is not in evaluation.sets; use"
        f" {', '.join(sets) or 'none'}.",
    )
    between = self.evaluation.between
    _check(
        not between or name in between,
        f"checkpoint.best is {name!r}, which evaluation.between {between}"
        " leaves out before the last update; add it there.",
    )
    every, saved = self.evaluation.every, self.checkpoint.every
    _check(
        every > 0,
        f"checkpoint.best is {name!r} but evaluation.every is 0, so there is"
        " nothing to choose from; set evaluation.every above 0.",
    )
    _check(
        every % saved == 0,
        f"checkpoint.best is {name!r} but evaluation.every {every} is no"
        f" multiple of checkpoint.every {saved}, so what is evaluated would not"
        " always be saved; change one of them.",
    )

  @property
  def shares_weights(self) -> bool:
    """Whether the teacher is what the student's adapters are added to."""
    if not self.lora.rank or self.teacher is None:
      return False
    return all(
        getattr(self.student, name) == getattr(self.teacher, name)
        for name in ("path", "param_dtype", "random_init")
    )

  @property
  def is_supervised(self) -> bool:
    """Whether it learns from given answers, without a teacher's scores."""
    return self.method in ("sft", "seqkd")

  @property
  def reads_completions(self) -> bool:
    """Whether records need a completion."""
    return self.method == "sft" or self.rollout.source == "data"

  @property
  def schedule(self) -> str:
    """What chooses the caps; empty if they are all of full length."""
    return self.prefix.schedule if self.method == "prefix" else ""

  @property
  def rollouts_per_step(self) -> int:
    return self.data.batch_size * self.rollout.per_prompt


def from_dict(values: Mapping[str, Any]) -> Config:
  """Builds and validates a run's settings from nested plain values.

  Raises:
    ConfigError: an unknown or missing field, a wrong type, or values that do
      not work together.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(
        f"The settings are {shown(values)}, which is no mapping of fields to"
        " values; give one."
    )
  for name in values:
    if name not in _hints(Config):
      named = name if isinstance(name, str) and name else shown(name)
      raise ConfigError(_unknown(Config, "", [named]))
  return Config(**values)


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the settings as nested plain values; `from_dict` inverts it."""
  return dataclasses.asdict(config)


def plain(config: Config) -> dict[str, Any]:
  """Returns the settings as JSON has them: lists, and no tuples."""
  return json.loads(json.dumps(to_dict(config)))


def first_difference(
    old: Any, new: Any, name: str = ""
) -> tuple[str, Any, Any]:
  """Returns the dotted name of a field that differs, and both its values."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in [*new, *(k for k in old if k not in new)]:
      if old.get(key) != new.get(key):
        inner = f"{name}.{key}" if name else key
        return first_difference(old.get(key), new.get(key), inner)
  return name, old, new


def check_field(name: str) -> None:
  """Raises ConfigError if a dotted name, "data.batch_size", is no field."""
  kind, before = Config, []
  for part in name.split("."):
    inner = _inner(kind, part)
    if inner is None:
      raise ConfigError(_unknown(Config, "", [*before, part]))
    kind = inner
    before.append(part)


def with_new_groups(values: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Adds the groups that a dotted name needs, with all of their fields.

  So a name can be made under a mapping: for "evaluation.sets.mine.source" the
  set `mine` gets the fields of a data set, at their defaults.
  """
  kind, values = Config, dict(values)
  at, (*groups, last) = values, name.split(".")
  for part in groups:
    kind = _inner(kind, part)
    found = at.get(part)
    at[part] = _defaults(kind) if found is None else dict(found)
    at = at[part]
  if last not in at:
    # A new name of a mapping stands for a group.
    if _is_mapping(kind):
      at[last] = _defaults(_inner(kind, last))
    else:
      at[last] = _defaults(kind)[last]
  return values


def without_idle_groups(
    values: Mapping[str, Any], given: Iterable[str]
) -> dict[str, Any]:
  """Drops groups that a choice in `given` has put out of use.

  A file may have a linear schedule, and the command line `prefix.schedule`
  alone: the file's settings of the linear schedule are then meant for nothing.

  Args:
    values: of the file and the command line.
    given: dotted names of the command line, whose groups stay.
  """
  given, values, idle = set(given), dict(values), set()
  if "prefix.schedule" in given:
    names = PrefixSpec.idle(values["prefix"]["schedule"])
    idle |= {("prefix", name) for name in names}
  if given & {"loss.form", "loss.exact.divergence"}:
    loss = values["loss"]
    exact = loss.get("exact", {})
    names = LossSpec.idle(
        loss.get("form", LossSpec.form),
        exact.get("divergence", ExactSpec.divergence),
    )
    idle |= {("loss", name) for name in names}
  if "rollout.source" in given:
    names = RolloutSpec.idle(values["rollout"]["source"])
    idle |= {("rollout", name) for name in names}
  for group, name in idle:
    if not any(n.startswith(f"{group}.{name}.") for n in given):
      inner = values[group].items()
      values[group] = {k: v for k, v in inner if k != name}
  return values


def _inner(kind: Any, name: str) -> Any:
  """Returns the type of what is called `name` in a group or mapping."""
  if dataclasses.is_dataclass(kind):
    return _hints(kind).get(name)
  return typing.get_args(kind)[1] if _is_mapping(kind) else None


def _is_mapping(kind: Any) -> bool:
  return typing.get_origin(kind) is Mapping


def _defaults(cls: Any) -> dict[str, Any]:
  """Returns plain values of all fields; a required one is empty."""
  out = {}
  if not dataclasses.is_dataclass(cls):
    return out
  for field in dataclasses.fields(cls):
    kind, value = _hints(cls)[field.name], field.default
    if dataclasses.is_dataclass(kind):
      value = _defaults(kind)
    elif value is dataclasses.MISSING:
      value = {} if _is_mapping(kind) else kind()
    out[field.name] = value
  return out


def _leaves(kind: Any, before: str) -> Iterator[str]:
  """Yields the dotted names of all fields of a group."""
  if dataclasses.is_dataclass(kind):
    for name, inner in _hints(kind).items():
      yield before + name
      yield from _leaves(inner, f"{before}{name}.")


def _unknown(cls: type, at: str, parts: list[Any]) -> str:
  """Says that the last of the names is no field, and which is nearest."""
  kind = cls
  for part in parts[:-1]:
    kind = _inner(kind, part)
  *before, last = (_dotted(part) for part in (at, *parts) if part)
  before = "".join(f"{part}." for part in before)
  if not dataclasses.is_dataclass(kind):
    return f"{before}{last} is not a field; {before[:-1]} is one."
  known = list(_hints(kind))
  # A name that is a field of an inner group, or else one that looks like it.
  near = [n for n in _leaves(kind, "") if n.split(".")[-1] == last]
  near = near or difflib.get_close_matches(last, known, 1)
  mend = f"the fields here are {', '.join(known)}."
  if near:
    mend = f"did you mean {' or '.join(before + name for name in near)}?"
  return f"{before}{last} is not a field; {mend}"
