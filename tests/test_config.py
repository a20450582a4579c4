"""The run's settings: what is accepted, and what a refusal says."""

import copy
import json
import math

import pytest

from prefix_distill import config_dict
from prefix_distill.errors import ConfigError

_VALUES = {
    "method": "prefix",
    "steps": 20,
    "student": {"path": "bundled:weak"},
    "teacher": {"path": "bundled:teacher", "compute_dtype": "bfloat16"},
    "data": {
        "train": {"source": "train.jsonl"},
        "batch_size": 8,
        "max_prompt_len": 64,
    },
    "rollout": {"per_prompt": 4, "max_len": 128},
    "prefix": {"buckets": (16, 64, 128), "increment": 8},
    "optimizer": {"learning_rate": 1e-4},
    "evaluation": {
        "sets": {
            "test": {"source": "test.jsonl", "answer": "answer"},
            "hard": {
                "source": "hard.jsonl", "answer": "a.0", "samples": 4,
            },
        },
    },
}  # fmt: skip


def _changed(changes):
  """Returns the settings with dotted names set."""
  values = copy.deepcopy(_VALUES)
  for name, value in changes.items():
    *groups, last = name.split(".")
    at = values
    for group in groups:
      at = at.setdefault(group, {})
    at[last] = value
  return values


def _refusal(changes):
  with pytest.raises(ConfigError) as error:
    config_dict.from_dict(_changed(changes))
  return str(error.value)


def _assert_names(message, parts):
  for part in parts:
    assert part in message
  assert message.endswith((".", "?"))
  assert "\n" not in message


def test_dictionaries_and_settings_invert_each_other():
  config = config_dict.from_dict(_VALUES)
  plain = config_dict.to_dict(config)
  assert config_dict.from_dict(plain) == config
  assert config_dict.from_dict(json.loads(json.dumps(plain))) == config
  other = config_dict.from_dict(_changed({"seed": 1}))
  assert other != config
  assert config_dict.to_dict(other) != plain


def test_given_values_and_defaults_arrive():
  config = config_dict.from_dict(_VALUES)
  assert config.teacher.compute_dtype == "bfloat16"
  assert config.student.compute_dtype == "float32"
  assert config.prefix.buckets == (16, 64, 128)
  assert config.evaluation.sets["hard"].answer == "a.0"
  assert config.data.suffix == "<think>"
  assert config.rollouts_per_step == 32


def test_a_whole_number_serves_as_a_fraction():
  config = config_dict.from_dict(_changed({"rollout.temperature": 2}))
  assert config.rollout.temperature == 2.0
  assert isinstance(config.rollout.temperature, float)


def test_settings_can_be_written_as_lists():
  config = config_dict.from_dict(_changed({"prefix.buckets": [32, 256]}))
  assert config.prefix.buckets == (32, 256)


def test_the_tokenizer_is_the_models_own_unless_named():
  values = {"student.path": "a"}
  config = config_dict.from_dict(_changed(values))
  assert config.student.tokenizer_path == "a"
  config = config_dict.from_dict(_changed(values | {"student.tokenizer": "b"}))
  assert config.student.tokenizer_path == "b"


@pytest.mark.parametrize(
    "changes, longest",
    (
        ({}, 128),
        ({"prefix.start": 5, "prefix.increment": 3}, 62),
        ({"prefix.start": 5, "prefix.increment": 3, "steps": 1}, 5),
        ({"prefix.start": 5, "prefix.increment": 3, "steps": 0}, 5),
        ({"prefix.increment": 7}, 128),
        ({"prefix.schedule": "fixed", "prefix.length": 30}, 30),
        ({"method": "full"}, 128),
        ({"method": "full", "prefix.schedule": "fixed",
          "prefix.length": 30}, 128),
    ),
)  # fmt: skip
def test_the_longest_prefix_is_what_the_schedule_reaches(changes, longest):
  assert config_dict.from_dict(_changed(changes)).longest_prefix == longest


@pytest.mark.parametrize(
    "name, suggestion",
    (
        ("step", "steps"),
        ("data.batchsize", "data.batch_size"),
        ("optimizer.learningrate", "optimizer.learning_rate"),
        ("evaluation.sets.test.anwser", "evaluation.sets.test.answer"),
        ("teacher.pth", "teacher.path"),
    ),
)
def test_unknown_fields_come_with_a_suggestion(name, suggestion):
  message = _refusal({name: 1})
  assert message == f"{name} is not a field; did you mean {suggestion}?"


def test_unknown_fields_without_a_likeness_list_the_fields():
  message = _refusal({"mesh.zzz": 1})
  assert message == (
      "mesh.zzz is not a field; the fields here are data, fsdp, tensor,"
      " sampling_tensor."
  )


def test_check_field_knows_every_field():
  config_dict.check_field("evaluation.sets.any_name.answer")
  config_dict.check_field("teacher.path")
  config_dict.check_field("prefix.buckets")
  for name in ("data.batch_sizes", "teacher.paths", "evaluation.sets.a.anwser"):
    with pytest.raises(ConfigError) as error:
      config_dict.check_field(name)
    assert f"{name} is not a field; did you mean " in str(error.value)
  with pytest.raises(ConfigError, match="steps.x is not a field"):
    config_dict.check_field("steps.x")


@pytest.mark.parametrize(
    "name, value, kind",
    (
        ("steps", "many", "int"),
        ("steps", 1.5, "int"),
        ("steps", True, "int"),
        ("method", 3, "str"),
        ("teacher.offload", "yes", "bool"),
        ("teacher.offload", 1, "bool"),
        ("student.path", None, "str"),
        ("rollout.temperature", "hot", "float"),
        ("rollout.temperature", True, "float"),
        ("data.train.question", ["q"], "str"),
        ("evaluation.sets.test.size", "all", "int"),
        ("prefix.buckets", (16, "x"), "int"),
        ("prefix.buckets", 128, ""),
        ("prefix.buckets", None, ""),
        ("prefix.buckets", "128", ""),
        ("data", 3, "group"),
        ("teacher", "bundled:teacher", "group"),
        ("student", None, "group"),
        ("evaluation.sets", "test", ""),
        ("evaluation.sets", None, ""),
        ("evaluation.sets.test", "test.jsonl", "group"),
    ),
)
def test_wrong_types_are_refused_with_the_value(name, value, kind):
  shown = value[1] if name == "prefix.buckets" and kind == "int" else value
  _assert_names(_refusal({name: value}), (f"{name} is {shown!r}", kind))


@pytest.mark.parametrize(
    "name",
    (
        "method", "steps", "student", "data", "rollout", "optimizer",
        "evaluation", "student.path", "data.train", "data.batch_size",
        "data.max_prompt_len", "data.train.source", "rollout.per_prompt",
        "rollout.max_len", "optimizer.learning_rate", "evaluation.sets",
        "evaluation.sets.test.source", "teacher.path",
    ),
)  # fmt: skip
def test_missing_fields_are_named(name):
  values = copy.deepcopy(_VALUES)
  *groups, last = name.split(".")
  at = values
  for group in groups:
    at = at[group]
  del at[last]
  with pytest.raises(ConfigError) as error:
    config_dict.from_dict(values)
  assert str(error.value) == f"{name} is missing; set it."


@pytest.mark.parametrize(
    "name, value",
    (
        ("student.compute_dtype", "float16"),
        ("teacher.param_dtype", "int8"),
        ("data.train.size", -1),
        ("data.train.samples", 0),
        ("data.batch_size", 0),
        ("data.max_prompt_len", 0),
        ("prefix.schedule", "cubic"),
        ("prefix.start", 0),
        ("prefix.length", 0),
        ("prefix.increment", -1),
        ("prefix.buckets", (64, 16, 128)),
        ("prefix.buckets", (64, 64, 128)),
        ("rollout.per_prompt", 0),
        ("rollout.max_len", 0),
        ("rollout.top_k", -1),
        ("rollout.top_p", 0.0),
        ("rollout.top_p", 1.5),
        ("evaluation.top_p", -0.1),
        ("rollout.cache_dtype", "float16"),
        ("data.prompt_buckets", (64, 32)),
        ("data.prompt_buckets", (0, 32)),
        ("data.prompt_buckets", (10**6,)),
        ("rollout.temperature", 0.0),
        ("rollout.temperature", -1.0),
        ("rollout.temperature", math.nan),
        ("loss.form", "forward"),
        ("loss.divergence", "kl"),
        ("loss.beta", 1.5),
        ("loss.top_k", -1),
        ("loss.top_k_of", "both"),
        ("loss.estimator", "k2"),
        ("loss.mixture", -0.1),
        ("loss.normalize", "rows"),
        ("loss.logits_mib", 0),
        ("optimizer.decay", "step"),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.batch_tokens", -1),
        ("rollout.batch_tokens", -1),
        ("optimizer.warmup_steps", -1),
        ("optimizer.clip_norm", -0.5),
        ("optimizer.weight_decay", -0.1),
        ("mesh.data", 0),
        ("mesh.data", -2),
        ("mesh.fsdp", 0),
        ("mesh.tensor", -1),
        ("mesh.sampling_tensor", -1),
        ("evaluation.max_len", 0),
        ("evaluation.batch_size", -1),
        ("evaluation.every", -1),
        ("evaluation.temperature", 0.0),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 0),
        ("steps", -1),
        ("seed", -1),
        ("method", "offline"),
    ),
)
def test_values_that_cannot_work_are_refused_by_name(name, value):
  message = _refusal({name: value})
  shown = str(value) if isinstance(value, (int, float, tuple)) else repr(value)
  _assert_names(message, (name.split(".")[-1], shown))


_ENDLESS = {"data.train.source": "math_task"}
_SFT = {"method": "sft", "teacher": None, "rollout.per_prompt": 1}


# What is wrong, what the sentence must name, and a mend.
@pytest.mark.parametrize(
    "changes, named, mend",
    (
        (
            {"teacher": None},
            ("method is 'prefix'", "teacher is None"),
            _SFT | {"data.train.completion": "solution"},
        ),
        (
            _SFT,
            ("method is 'sft'", "data.train.completion is empty"),
            {"data.train.completion": "solution"},
        ),
        (
            _SFT | {"data.train.completion": "c", "rollout.per_prompt": 3},
            ("method is 'sft'", "rollout.per_prompt is 3", "set it to 1"),
            {"rollout.per_prompt": 1},
        ),
        (
            {"prefix.schedule": "fixed", "prefix.length": 300},
            ("prefix.length is 300", "rollout.max_len is 128"),
            {"prefix.length": 128},
        ),
        (
            {"mesh.fsdp": 4, "mesh.sampling_tensor": 3},
            ("mesh.sampling_tensor is 3", "mesh.fsdp x mesh.tensor = 4"),
            {"mesh.sampling_tensor": 2},
        ),
        (
            {"student.offload": True},
            ("student.offload is True", "never idle", "optimizer.offload"),
            {"student.offload": False},
        ),
        (
            {"loss.form": "direct"},
            ("loss.form is 'direct'", "loss.estimator 'k1'", "is zero"),
            {"loss.estimator": "k3"},
        ),
        (
            {"loss.form": "policy_gradient", "loss.divergence": "jsd"},
            ("loss.divergence is 'jsd'", "loss.form is 'policy_gradient'"),
            {"loss.form": "exact"},
        ),
        (
            {"loss.form": "policy_gradient", "loss.top_k": 16},
            ("loss.top_k is 16", "loss.form is 'policy_gradient'"),
            {"loss.form": "exact"},
        ),
        (
            {"loss.mixture": 0.1},
            ("loss.mixture is 0.1", "loss.form is 'exact'"),
            {"loss.form": "policy_gradient"},
        ),
        (
            {"loss.min_entropy": 0.2},
            ("loss.min_entropy is 0.2", "loss.form is 'exact'"),
            {"loss.form": "policy_gradient"},
        ),
        (
            _ENDLESS,
            ("'math_task'", "size 0"),
            {"data.train.size": 100},
        ),
        (
            {"evaluation.sets.test.answer": ""},
            ("evaluation.sets.test.answer is empty",),
            {"evaluation.sets.test.answer": "answer"},
        ),
    ),
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(changes, named, mend):
  _assert_names(_refusal(changes), named)
  config_dict.from_dict(_changed(changes | mend))
