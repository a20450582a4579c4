"""The run's settings: what is accepted, and what a refusal says."""

import copy
import dataclasses
import inspect
import json
import math
import re

import pytest

from prefix_distill import config as config_lib
from prefix_distill.distill import prefix_schedule
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
    "prefix": {"buckets": (16, 64, 128), "linear": {"increment": 8}},
    "optimizer": {"learning_rate": 1e-4},
    "evaluation": {
        "sets": {
            "test": {"source": "test.jsonl", "answer": "answer"},
            "hard": {
                "source": "hard.jsonl",
                "answer": "a.0",
                "samples": 4,
            },
        },
    },
}


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
    config_lib.from_dict(_changed(changes))
  return str(error.value)


def _assert_names(message, parts):
  for part in parts:
    assert part in message
  assert message.endswith((".", "?"))
  assert "\n" not in message


def test_dictionaries_and_settings_invert_each_other():
  config = config_lib.from_dict(_VALUES)
  plain = config_lib.to_dict(config)
  assert config_lib.from_dict(plain) == config
  assert config_lib.from_dict(json.loads(json.dumps(plain))) == config
  other = config_lib.from_dict(_changed({"seed": 1}))
  assert other != config
  assert config_lib.to_dict(other) != plain


def test_given_values_and_defaults_arrive():
  config = config_lib.from_dict(_VALUES)
  assert config.teacher.compute_dtype == "bfloat16"
  assert config.student.compute_dtype == "float32"
  assert config.prefix.buckets == (16, 64, 128)
  assert config.evaluation.sets["hard"].answer == "a.0"
  assert config.data.suffix == "<think>"
  assert config.rollouts_per_step == 32


def test_a_whole_number_serves_as_a_fraction():
  config = config_lib.from_dict(_changed({"rollout.temperature": 2}))
  assert config.rollout.temperature == 2.0
  assert isinstance(config.rollout.temperature, float)


@pytest.mark.parametrize("system", (None, "", "Be brief."))
def test_a_system_prompt_may_be_none_empty_or_text(system):
  assert config_lib.from_dict(_VALUES).data.system is None
  values = copy.deepcopy(_VALUES)
  values["data"]["system"] = system
  config = config_lib.from_dict(values)
  assert config.data.system == system
  assert config_lib.from_dict(config_lib.to_dict(config)) == config


def test_settings_can_be_written_as_lists():
  config = config_lib.from_dict(_changed({"prefix.buckets": [32, 256]}))
  assert config.prefix.buckets == (32, 256)


def test_the_tokenizer_is_the_models_own_unless_named():
  values = {"student.path": "a"}
  config = config_lib.from_dict(_changed(values))
  assert config.student.tokenizer_path == "a"
  config = config_lib.from_dict(_changed(values | {"student.tokenizer": "b"}))
  assert config.student.tokenizer_path == "b"


_FIXED_30 = {
    "prefix": {"schedule": "fixed", "fixed": {"length": 30}},
}


@pytest.mark.parametrize(
    "changes, longest",
    (
        ({}, 128),
        ({"prefix.linear": {"start": 5, "increment": 3}}, 62),
        ({"prefix.linear": {"start": 5, "increment": 3}, "steps": 1}, 5),
        ({"prefix.linear": {"start": 5, "increment": 3}, "steps": 0}, 5),
        ({"prefix.linear.increment": 7}, 128),
        (_FIXED_30, 30),
        ({"method": "full"}, 128),
        (_FIXED_30 | {"method": "full"}, 128),
    ),
)
def test_the_longest_prefix_is_what_the_schedule_reaches(changes, longest):
  config = config_lib.from_dict(_changed(changes))
  assert prefix_schedule.longest(config) == longest


@pytest.mark.parametrize(
    "name, suggestion",
    (
        ("step", "steps"),
        ("data.batchsize", "data.batch_size"),
        ("optimizer.learningrate", "optimizer.learning_rate"),
        ("evaluation.sets.test.anwser", "evaluation.sets.test.answer"),
        ("teacher.pth", "teacher.path"),
        ("loss.beta", "loss.jsd.beta"),
        (
            "prefix.min_overlap",
            "prefix.drift.min_overlap",
        ),
        (
            "prefix.increment",
            "prefix.linear.increment or prefix.drift.increment or"
            " prefix.plateau.increment",
        ),
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
  config_lib.check_field("evaluation.sets.any_name.answer")
  config_lib.check_field("teacher.path")
  config_lib.check_field("prefix.buckets")
  for name in ("data.batch_sizes", "teacher.paths", "evaluation.sets.a.anwser"):
    with pytest.raises(ConfigError) as error:
      config_lib.check_field(name)
    assert f"{name} is not a field; did you mean " in str(error.value)
  with pytest.raises(ConfigError, match="steps.x is not a field"):
    config_lib.check_field("steps.x")


@pytest.mark.parametrize(
    "name, value, kind",
    (
        ("steps", "many", "int"),
        ("steps", 1.5, "int"),
        ("steps", True, "int"),
        ("teacher.offload", "yes", "bool"),
        ("teacher.offload", 1, "bool"),
        ("student.path", None, "str"),
        ("rollout.temperature", "hot", "float"),
        ("rollout.temperature", True, "float"),
        ("data.train.question", ["q"], "str"),
        ("data.system", ["Be brief."], "str"),
        ("data.system", 0, "str"),
        ("evaluation.sets.test.size", "all", "int"),
        ("evaluation.sets.test.choices", ("a", 1), "str"),
        ("optimizer.learning_rate", "1e-4", "float"),
        ("prefix.linear.every", 2.0, "int"),
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
  if isinstance(value, tuple):
    name, value = f"{name}.1", value[1]
    message = _refusal({name.removesuffix(".1"): ("a", value)})
  else:
    message = _refusal({name: value})
  _assert_names(message, (f"{name} is {value!r}", kind))


@pytest.mark.parametrize(
    "name",
    (
        "method", "steps", "student", "data", "rollout", "optimizer",
        "evaluation", "student.path", "data.train", "data.batch_size",
        "data.max_prompt_len", "data.train.source", "rollout.per_prompt",
        "rollout.max_len", "optimizer.learning_rate", "evaluation.sets",
        "evaluation.sets.test.source", "teacher.path",
    ),
)
def test_missing_fields_are_named(name):
  values = copy.deepcopy(_VALUES)
  *groups, last = name.split(".")
  at = values
  for group in groups:
    at = at[group]
  del at[last]
  with pytest.raises(ConfigError) as error:
    config_lib.from_dict(values)
  assert str(error.value) == f"{name} is missing; set it."


@pytest.mark.parametrize(
    "name, value, mend",
    (
        ("student.compute_dtype", "float16", "use one of 'float32'"),
        ("student.path", "", "give a name"),
        ("teacher.param_dtype", "int8", "use one of"),
        ("teacher.remat", "some", "use one of 'none', 'full', 'dots' or"),
        ("data.train.size", -1, "set it to 0 or more"),
        ("data.train.samples", 0, "set it to 1 or more"),
        ("data.batch_size", 0, "set it to 1 or more"),
        ("data.max_prompt_len", 0, "set it to 1 or more"),
        ("data.max_teacher_prompt_len", -1, "set it to 0 or more"),
        ("data.system", "Be\udcff", "write it in UTF-8"),
        ("data.suffix", "\ud800", "write it in UTF-8"),
        ("prefix.schedule", "cubic", "use one of 'linear', 'fixed', 'random'"),
        ("prefix.linear.start", 0, "set it to 1 or more"),
        ("prefix.linear.every", 0, "set it to 1 or more"),
        ("prefix.linear.increment", -1, "set it to 0 or more"),
        ("prefix.fixed.length", 0, "set it to 1 or more"),
        ("prefix.random.min_length", 0, "set it to 1 or more"),
        ("prefix.drift.min_overlap", 1.1, "set it to 1 or less"),
        ("prefix.drift.max_drifted", 0, "set it to 1 or more"),
        ("prefix.drift.patience_updates", 0, "set it to 1 or more"),
        ("prefix.plateau.min_reached_fraction", -0.5, "set it to 0 or more"),
        ("prefix.plateau.smoothing", 1.0, "set it to 0.999999 or less"),
        ("prefix.plateau.top_tokens", 0, "set it to 1 or more"),
        ("prefix.agreement.quantile", 2.0, "set it to 1 or less"),
        ("prefix.agreement.low_windows", 0, "set it to 1 or more"),
        ("prefix.agreement.warmup_updates", -1, "set it to 0 or more"),
        ("prefix.audited.min_nats", -0.1, "set it to 0 or more"),
        ("prefix.buckets", (64, 16, 128), "sort the lengths"),
        ("prefix.buckets", (64, 64, 128), "sort the lengths"),
        ("rollout.per_prompt", 0, "set it to 1 or more"),
        ("rollout.max_len", 0, "set it to 1 or more"),
        ("rollout.top_k", -1, "set it to 0 or more"),
        ("rollout.top_p", 0.0, "set it above 0"),
        ("rollout.top_p", 1.5, "set it to 1 or less"),
        ("rollout.cache_dtype", "float16", "use one of '', 'float32'"),
        ("rollout.temperature", 0.0, "set it to 0.001 or more"),
        ("rollout.temperature", -1.0, "set it to 0.001 or more"),
        ("rollout.temperature", 1e4, "set it to 1000 or less"),
        ("rollout.temperature", math.nan, "give a float"),
        ("rollout.temperature", math.inf, "give a float"),
        ("rollout.source", "web", "use one of 'student', 'teacher', 'data' or"),
        ("rollout.source_share", -0.5, "set it to 0 or more"),
        ("rollout.batch_tokens", -1, "set it to 0 or more"),
        ("loss.form", "forward", "use one of 'exact', 'policy_gradient',"),
        ("loss.jsd.beta", 1.5, "set it to 1 or less"),
        ("loss.exact.top_k", -1, "set it to 0 or more"),
        ("loss.exact.max_entry", -0.1, "set it to 0 or more"),
        ("loss.relaxed.floor", "log2", "use one of 'log_odds', 'scaled_log'"),
        ("loss.relaxed.weight", 0.0, "set it above 0"),
        ("loss.relaxed.weight", 1.0, "set it below 1"),
        ("loss.relaxed.entropy_share", 0.0, "set it above 0"),
        ("loss.relaxed.switch_step", -1, "set it to 0 or more"),
        ("loss.normalize", "rows", "use one of 'rollouts', 'tokens' or"),
        ("loss.logits_mib", 0, "set it to 1 or more"),
        ("optimizer.decay", "step", "use one of 'constant' or 'cosine'"),
        ("optimizer.learning_rate", 0.0, "set it above 0"),
        ("optimizer.learning_rate", -math.inf, "give a float"),
        ("optimizer.batch_tokens", -1, "set it to 0 or more"),
        ("optimizer.warmup_steps", -1, "set it to 0 or more"),
        ("optimizer.clip_norm", -0.5, "set it to 0 or more"),
        ("optimizer.weight_decay", -0.1, "set it to 0 or more"),
        ("optimizer.weight_decay", 1e10, "set it to 1e+09 or less"),
        ("optimizer.clip_norm", 1e-38, "set it to 1e-30 or more"),
        ("optimizer.learning_rate", 1e-38, "set it to 1e-30 or more"),
        ("optimizer.learning_rate", 1e30, "set it to 1 or less"),
        ("optimizer.b1", -0.1, "set it to 0 or more"),
        ("optimizer.b2", 1.0, "set it to 0.999999 or less"),
        ("mesh.data", 0, "set it to 1 or more, or to -1"),
        ("mesh.data", -2, "set it to -1 or more"),
        ("mesh.fsdp", 0, "set it to 1 or more"),
        ("mesh.tensor", -1, "set it to 1 or more"),
        ("mesh.sampling_tensor", -1, "set it to 0 or more"),
        ("evaluation.top_p", -0.1, "set it above 0"),
        ("evaluation.max_len", 0, "set it to 1 or more"),
        ("evaluation.batch_size", -1, "set it to 0 or more"),
        ("evaluation.every", -1, "set it to 0 or more"),
        ("evaluation.temperature", 0.0, "set it to 0.001 or more"),
        ("evaluation.between", ("easy",), "use test, hard"),
        ("checkpoint.every", 0, "set it to 1 or more"),
        ("checkpoint.keep", 0, "set it to 1 or more"),
        ("teacher.refresh", -1, "set it to 0 or more"),
        ("steps", -1, "set it to 0 or more"),
        ("steps", 2**31, "set it to 2147483647 or less"),
        ("seed", -1, "set it to 0 or more"),
        ("seed", 2**32, "set it below 4294967296"),
        ("data.train.seed", -1, "set it to 0 or more"),
        ("student.path", "a\nb", "leave out control characters"),
        ("data.system", "a\x00b", "leave out control characters"),
        ("data.train.choices", ("a",) * 27, "give 26 at most"),
        ("method", "offline", "use one of 'prefix', 'full', 'sft' or 'seqkd'"),
    ),
)
def test_a_bad_value_is_one_sentence_of_field_value_and_mend(
    name, value, mend
):
  _assert_names(_refusal({name: value}), (f"{name} is {value!r}", mend))


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
            ("method is 'sft'", "rollout.per_prompt is 3", "per_prompt to 1"),
            {"rollout.per_prompt": 1},
        ),
        (
            {"prefix": {"schedule": "fixed", "fixed": {"length": 300}}},
            ("prefix.fixed.length is 300", "rollout.max_len is 128"),
            {"prefix.fixed.length": 128},
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
            {"student.refresh": 5},
            ("student.refresh is 5", "it is the teacher", "teacher.refresh"),
            {"student.refresh": 0},
        ),
        (
            {"teacher.refresh": 5, "method": "seqkd", "rollout.per_prompt": 1},
            ("method is 'seqkd'", "teacher.refresh is 5", "scores"),
            {"teacher.refresh": 0},
        ),
        (
            {
                "rollout.source": "teacher",
                "method": "seqkd",
                "rollout.per_prompt": 1,
            },
            ("method is 'seqkd'", "rollout.source is 'teacher'", "samples"),
            {"rollout.source": "student"},
        ),
        (
            {"rollout.source_share": 0.5},
            ("rollout.source_share is 0.5", "rollout.source is 'student'"),
            {"rollout.source": "teacher"},
        ),
        (
            {"optimizer.final_fraction": 0.5},
            ("optimizer.final_fraction is 0.5", "decay is 'constant'"),
            {"optimizer.decay": "cosine"},
        ),
        (
            {"optimizer.learning_rate": 0.5, "optimizer.weight_decay": 3.0},
            ("optimizer.weight_decay is 3.0", "to 2 or less"),
            {"optimizer.weight_decay": 2.0},
        ),
        (
            {"data.batch_size": 2**20, "rollout.per_prompt": 2**10},
            ("data.batch_size is 1048576", "rollout.per_prompt is 1024",
             "2147483647 tokens at most"),
            {"data.batch_size": 1024},
        ),
        (
            {"evaluation.batch_size": 2**30},
            ("evaluation.batch_size is 1073741824", "tokens at a time"),
            {"evaluation.batch_size": 0},
        ),
        (
            {"evaluation.sets.hard.size": 2**20},
            ("evaluation.sets.hard.size is 1048576", "1048576 answers at most"),
            {"evaluation.sets.hard.size": 2**18},
        ),
        (
            {"prefix": {"schedule": "random", "random": {"min_length": 129}}},
            ("prefix.random.min_length is 129", "rollout.max_len is 128"),
            {"rollout.max_len": 129},
        ),
        (
            {"prefix": {
                "schedule": "agreement", "agreement": {"window_tokens": 129},
            }},
            ("prefix.agreement.window_tokens is 129", "ever be cut"),
            {"rollout.max_len": 133},
        ),
        (
            {"loss.exact": {"divergence": "{}"}, "loss.jsd": {"beta": 0.1}},
            ("loss.jsd.beta is 0.1", "loss.exact.divergence is '{}'"),
            {"loss.exact": {"divergence": "jsd"}},
        ),
        (
            {"prefix": {
                "schedule": "agreement", "agreement": {"min_rollouts": 4097},
            }},
            ("prefix.agreement.min_rollouts is 4097", "rollouts is 4096"),
            {"prefix": {
                "schedule": "agreement", "agreement": {"min_rollouts": 4096},
            }},
        ),
        (
            {"loss": {"form": "relaxed"}},
            ("loss.normalize is 'rollouts'", "loss.form is 'relaxed'",
             "set loss.normalize to 'tokens'"),
            {"loss.normalize": "tokens"},
        ),
        (
            {"loss": {"form": "relaxed", "normalize": "tokens",
                      "relaxed": {"weight": 0.5}}},
            ("loss.relaxed.weight is 0.5", "loss.relaxed.floor is 'log_odds'",
             "below 0.5"),
            {"loss.relaxed.floor": "scaled_log"},
        ),
        (
            {"loss": {"exact": {"max_entry": 0.05}}},
            ("loss.exact.max_entry is 0.05",
             "loss.exact.divergence is 'reverse_kl'", "'forward_kl' or 'jsd'"),
            {"loss.exact.divergence": "forward_kl"},
        ),
        (
            _ENDLESS,
            ("data.train.source is 'math_task'", "data.train.size is 0"),
            {"data.train.size": 100},
        ),
        (
            {"evaluation.sets.test.answer": ""},
            ("evaluation.sets.test.answer is empty",),
            {"evaluation.sets.test.answer": "answer"},
        ),
    ),
)
def test_values_that_do_not_fit_together_are_refused(changes, named, mend):
  _assert_names(_refusal(changes), named)
  config_lib.from_dict(_changed(changes | mend))


@pytest.mark.parametrize(
    "name, value, choice, mend",
    (
        ("prefix.drift.min_overlap", 0.4, "prefix.schedule is 'linear'",
         {"prefix.schedule": "drift", "prefix.linear": {}}),
        ("prefix.fixed.length", 8, "prefix.schedule is 'linear'",
         {"prefix.schedule": "fixed", "prefix.linear": {}}),
        ("loss.jsd.beta", 0.1, "loss.exact.divergence is 'reverse_kl'",
         {"loss.exact": {"divergence": "jsd"}}),
        ("loss.relaxed.weight", 0.1, "loss.form is 'exact'",
         {"loss.form": "relaxed", "loss.normalize": "tokens"}),
    ),
)
def test_a_setting_of_a_group_that_is_not_in_use_is_refused(
    name, value, choice, mend
):
  message = _refusal({name: value})
  _assert_names(message, (f"{name} is {value!r} but {choice}; set ", "leave"))
  config_lib.from_dict(_changed({name: value} | mend))


@pytest.mark.parametrize(
    "changes, named",
    (
        (
            {"loss": {"form": "direct", "exact": {"top_k": 16}}},
            ("loss.exact.top_k is 16", "set loss.form to 'exact'"),
        ),
        (
            {"loss": {"form": "policy_gradient",
                      "exact": {"divergence": "jsd"}}},
            ("loss.exact.divergence is 'jsd'", "set loss.form to 'exact'"),
        ),
        (
            {"loss": {"form": "policy_gradient", "jsd": {"beta": 0.2}}},
            ("loss.jsd.beta is 0.2", "loss.form to 'exact' and"
             " loss.exact.divergence to 'jsd'"),
        ),
    ),
)
def test_the_exact_loss_has_settings_of_its_own(changes, named):
  _assert_names(_refusal(changes), named)


@pytest.mark.parametrize(
    "make, message",
    (
        (
            lambda: config_lib.MeshSpec(fsdp=0),
            "mesh.fsdp is 0; set it to 1 or more, or to -1 for the devices that"
            " are left.",
        ),
        (
            lambda: config_lib.MeshSpec(-1, True),
            "mesh.fsdp is True (bool); give an int.",
        ),
        (
            lambda: dataclasses.replace(config_lib.DriftSpec(), start=0),
            "prefix.drift.start is 0; set it to 1 or more.",
        ),
        (
            lambda: config_lib.PrefixSpec(linear={"start": 0}),
            "prefix.linear.start is 0; set it to 1 or more.",
        ),
        (
            lambda: config_lib.DatasetSpec("math_task"),
            "dataset.size is 0 but dataset.source is 'math_task', which has no"
            " end; set dataset.size above 0.",
        ),
        (
            lambda: config_lib.ModelSpec("a", remaat="none"),
            "model.remaat is not a field; did you mean model.remat?",
        ),
        (lambda: config_lib.ModelSpec(), "model.path is missing; set it."),
        (
            lambda: config_lib.RandomSpec(1, 2),
            "prefix.random has 1 fields, and 2 is one more.",
        ),
    ),
)
def test_settings_made_in_code_are_checked_alike(make, message):
  with pytest.raises(ConfigError) as error:
    make()
  assert str(error.value) == message


def test_a_name_can_be_made_with_all_its_fields():
  name = "evaluation.sets.mine.source"
  values = config_lib.with_new_groups(_VALUES, name)
  mine = values["evaluation"]["sets"]["mine"]
  fields = dataclasses.fields(config_lib.DatasetSpec)
  assert list(mine) == [field.name for field in fields]
  assert "mine" not in _VALUES["evaluation"]["sets"]
  mine |= {"source": "mine.jsonl", "answer": "answer"}
  config = config_lib.from_dict(values)
  assert config.evaluation.sets["mine"].source == "mine.jsonl"
  assert {*config.evaluation.sets} == {"test", "hard", "mine"}
  values = config_lib.with_new_groups({"teacher": None}, "teacher.path")
  assert values["teacher"]["path"] == ""


def test_a_choice_of_the_command_line_drops_the_files_other_groups():
  changes = {"prefix.schedule": "fixed", "prefix.fixed.length": 8}
  values = _changed(changes)
  assert "prefix.linear.increment is 8" in _refusal(changes)
  given = ["prefix.schedule", "prefix.fixed.length"]
  config = config_lib.from_dict(
      config_lib.without_idle_groups(values, given)
  )
  assert config.prefix.linear == config_lib.LinearSpec()
  assert config.prefix.buckets == (16, 64, 128)
  given.append("prefix.linear.increment")
  with pytest.raises(ConfigError, match="prefix.linear.increment is 8"):
    config_lib.from_dict(config_lib.without_idle_groups(values, given))
  values = _changed({
      "loss": {"form": "direct", "exact": {"top_k": 3}, "jsd": {"beta": 0.1}}
  })
  given = ["loss.form"]
  config = config_lib.from_dict(
      config_lib.without_idle_groups(values, given)
  )
  assert config.loss == config_lib.LossSpec("direct")


def test_every_field_is_described_by_one_sentence():
  for name, spec in vars(config_lib).items():
    if not (isinstance(spec, type) and dataclasses.is_dataclass(spec)):
      continue
    # Python 3.13 takes the indentation away by itself.
    text = inspect.cleandoc(spec.__doc__).partition("Attributes:\n")[2]
    described = dict(re.findall(r"^  (\w+): ((?:.|\n {4})+)", text, re.M))
    assert list(described) == [f.name for f in dataclasses.fields(spec)], name
    for sentence in described.values():
      assert sentence.endswith(".") and ". " not in sentence, sentence
