"""What both models are fed is shown and checked before anything is paid."""

import dataclasses
import importlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import datasets
import huggingface_hub
import pytest
import rich.console
import schemas

from configs import bundled
from configs import math as experiment
from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill import preflight
from prefix_distill.config import DatasetSpec
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.models import huggingface as hf
from prefix_distill.train import setup

_ROOT = pathlib.Path(__file__).parent.parent
_THINKS = "{{- '<|im_start|>assistant\\n<think>\\n' }}"


def _config(student="bundled:capable", teacher="bundled:teacher", **data):
  config = config_lib.from_dict(experiment.get_config().to_dict())
  return dataclasses.replace(
      config,
      student=dataclasses.replace(config.student, path=str(student)),
      teacher=dataclasses.replace(config.teacher, path=str(teacher)),
      data=dataclasses.replace(config.data, max_prompt_len=96, **data),
  )


def _shown(config):
  """Returns what is printed where there is no terminal."""
  out = io.StringIO()
  preflight.run(config, rich.console.Console(file=out, width=80))
  return out.getvalue()


def _words(config):
  return " ".join(_shown(config).split())


def _refusal(config):
  """Returns the sentence; nothing may have been printed before it."""
  out = io.StringIO()
  with pytest.raises(errors.UserError) as caught:
    preflight.run(config, rich.console.Console(file=out))
  assert not out.getvalue()
  sentence = str(caught.value)
  assert sentence.endswith(".") and "\n" not in sentence
  return sentence


def _model(directory, name, old="", new="", **settings):
  """Copies a bundled model without its weights, its template edited."""
  ignore = shutil.ignore_patterns("*.safetensors")
  shutil.copytree(assets.path(name), directory, ignore=ignore)
  template = directory / "chat_template.jinja"
  text = template.read_text()
  assert old in text
  template.write_text(text.replace(old, new) if old else text)
  file = directory / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))
  return directory


def _thinking(directory, name):
  """A model whose template opens <think> itself."""
  return _model(directory, name, "{{- '<|im_start|>assistant\\n' }}", _THINKS)


def test_the_default_is_shown_whole():
  text = _shown(_config())
  assert "<think>┊ the answer begins here" in text
  words = " ".join(text.split())
  for fact in (
      "student bundled:capable, teacher bundled:teacher",
      "the student's and the teacher's give the same tokens",
      "471 tokens; rows: student 471, teacher 471",
      "student <|endoftext|> (466); teacher <|im_end|> (468); one event",
      "<|endoftext|> (466), masked everywhere, so it may well be a stop",
      "1 in sampling and loss; 1 in evaluation",
      "1 in the first update, 99 in the last; 3 buckets: 32, 64, 100",
      "The checks passed. No weights were read",
  ):
    assert fact in words
  assert "Warning" not in text and "\x1b" not in text
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("suffix", ("<think>", "</think>", ""))
def test_every_special_token_is_shown_with_its_id(suffix):
  tokenizer = tokenizer_lib.load("bundled:capable")
  rows = [line.split() for line in _shown(_config(suffix=suffix)).splitlines()]
  tokens = tokenizer.encode(tokenizer.prompt("How many?", suffix))
  stops = {*tokenizer.stop_ids, *tokenizer_lib.load("bundled:teacher").stop_ids}
  shown = {*tokenizer.special_ids} & {*tokens} | stops | {tokenizer.pad_id}
  assert len(shown) == 3 + bool(suffix)
  for token in shown:
    count = tokens.count(token)
    row = [tokenizer.decode([token]), str(token), f"{count}x" if count else "-"]
    assert row in [r[:3] for r in rows]


def test_special_tokens_have_a_colour_of_their_own():
  out = io.StringIO()
  console = rich.console.Console(
      file=out, width=80, force_terminal=True, color_system="standard"
  )
  preflight.run(_config(), console)
  for token in ("<|im_start|>", "<|im_end|>", "<think>"):
    assert f"\x1b[1;36m{token}" in out.getvalue()


def test_text_is_shown_as_it_is(tmp_path):
  question = "Is [bold]x[/bold] √2 :smile:, or [/INST]?"
  source = tmp_path / "a.jsonl"
  source.write_text(json.dumps({"question": question}))
  train = DatasetSpec(str(source))
  assert question in _words(_config(train=train))


def test_full_distillation_and_models_that_stop_alike():
  config = dataclasses.replace(
      _config("bundled:teacher"), method="full", steps=3
  )
  words = _words(config)
  assert "<|im_end|> (468), the same for both" in words
  assert "256 in every update; 1 bucket: 256" in words
  assert "<|endoftext|> (466), masked everywhere temperature" in words


def test_stops_that_are_told_apart_are_named():
  config = _config()
  loss = dataclasses.replace(config.loss, merge_stop_tokens=False)
  words = _words(dataclasses.replace(config, loss=loss))
  assert "told apart in the loss (loss.merge_stop_tokens is False)" in words


def test_supervised_training_has_the_students_part_only():
  settings = bundled.get_config("capable")
  settings.student.path = "bundled:capable"
  words = _words(config_lib.from_dict(settings.to_dict()))
  assert "the student's; there is no teacher" in words
  assert "completions of at most 232 tokens" in words
  assert "bundled:teacher" not in words


def _command(tmp_path, *flags, environment=types.MappingProxyType({})):
  """Runs --preflight in an empty folder, which must stay empty."""
  here = tmp_path / "here"
  here.mkdir()
  process = subprocess.run(
      [
          sys.executable,
          "-m",
          "prefix_distill.main",
          "--preflight",
          f"--config={_ROOT}/configs/math.py",
          *flags,
      ],
      cwd=here,
      text=True,
      capture_output=True,
      timeout=120,
      check=False,
      env=os.environ | {"PYTHONPATH": str(_ROOT)} | dict(environment),
  )
  assert not list(here.iterdir())
  return process.returncode, process.stdout, process.stderr


def test_the_command_needs_no_weights_and_writes_nothing(tmp_path):
  code, out, err = _command(
      tmp_path,
      f"--config.student.path={_model(tmp_path / 'student', 'capable')}",
      f"--config.teacher.path={_model(tmp_path / 'teacher', 'teacher')}",
  )
  assert code == 0, err
  assert "the answer begins here" in out and "The checks passed" in out


def test_the_command_ends_with_one_sentence(tmp_path):
  code, out, err = _command(tmp_path, "--config.data.suffix=Answer: ")
  assert code == 1 and not out
  lines = [x for x in err.splitlines() if x.startswith("error")]
  assert len(lines) == 1 and "With data.suffix 'Answer: '" in lines[0]


def test_templates_that_differ(tmp_path):
  system = "<|im_start|>system\\nHelp.<|im_end|>\\n"
  first = "{%- for message in messages %}"
  teacher = _model(
      tmp_path / "teacher", "teacher", first, "{{- '" + system + "' }}" + first
  )
  sentence = _refusal(_config(teacher=teacher))
  assert f"student (bundled:capable) and the teacher ({teacher})" in sentence
  tokenizer = tokenizer_lib.load("bundled:teacher")
  ours, theirs = (
      prompts.name_token(tokenizer, tokenizer.encode(word)[0])
      for word in ("user", "system")
  )
  assert f"position 1 (from 0) {ours} for the student and" in sentence
  assert f"{theirs} for the teacher; the teacher reads" in sentence
  assert sentence.endswith(
      "set student.tokenizer to a model with the teacher's template, as"
      f" {teacher}."
  )
  config = _config(teacher=teacher)
  student = dataclasses.replace(config.student, tokenizer=str(teacher))
  assert "passed" in _shown(dataclasses.replace(config, student=student))


def test_a_teacher_that_opens_its_thoughts_itself(tmp_path):
  teacher = _thinking(tmp_path / "teacher", "teacher")
  sentence = _refusal(_config(teacher=teacher))
  assert "no token for the student and '\\n' (id" in sentence
  assert "change data.suffix from '<think>' to '<think>\\n'" in sentence
  words = _words(_config(teacher=teacher, suffix="<think>\n"))
  assert "<think>↵ │ │ ┊ the answer begins here" in words
  assert "passed" in words
  assert "to '<think>\\n'" in _refusal(_config(teacher=teacher, suffix=""))


def test_a_mend_that_would_not_help_is_not_proposed(tmp_path):
  teacher = _model(
      tmp_path / "teacher", "teacher", "assistant\\n'", "assistant\\nSure: '"
  )
  sentence = _refusal(_config(teacher=teacher))
  assert "set student.tokenizer" in sentence


@pytest.mark.parametrize("suffix", ("<think>", "<think>\n", "<think>Well"))
def test_a_suffix_that_the_template_has_already(tmp_path, suffix):
  student = _thinking(tmp_path / "student", "capable")
  teacher = _thinking(tmp_path / "teacher", "teacher")
  sentence = _refusal(_config(student, teacher, suffix=suffix))
  assert f"data.suffix is {suffix!r}" in sentence
  assert "already ends with" in sentence and "<think>\\n'" in sentence
  assert sentence.endswith("set data.suffix=''.")
  assert "passed" in _shown(_config(student, teacher, suffix=""))


@pytest.mark.parametrize(
    "suffix", ("Answer: ", "<think>\nWell ", "<think> ")
)
def test_an_end_that_the_first_word_would_change(suffix):
  sentence = _refusal(_config(suffix=suffix))
  assert f"With data.suffix {suffix!r}" in sentence
  assert "ends with the token ' ', which becomes ' We'" in sentence
  assert "such as 'We' follows" in sentence


@pytest.mark.parametrize("suffix", ("<think>", "Answer:", "<think>Well,"))
def test_an_end_that_stays_as_it_is(suffix):
  assert "Warning" not in _shown(_config(suffix=suffix))


@pytest.mark.parametrize("suffix", ("", "<think>\n"))
def test_an_end_that_a_line_break_would_change_is_a_warning(suffix):
  words = _words(_config(suffix=suffix))
  assert "end '\\n' and the line break to '\\n\\n'" in words
  assert "passed with 1 warning." in words


def test_a_suffix_that_is_split_is_a_warning():
  words = _words(_config(suffix="<think><reason>"))
  assert "Warning: data.suffix has '<reason>', which the student's" in words
  assert "passed with 1 warning." in words


def test_a_teacher_that_is_the_student_is_a_warning(monkeypatch):
  """Also where one of the two is under ~; not if it reads more."""
  model = assets.path("capable")
  monkeypatch.setenv("HOME", str(model.parent))
  config = _config(model, f"~/{model.name}")
  assert "Warning: Student and teacher are the same model" in _words(config)
  data = dataclasses.replace(
      config.data, teacher_prompt="{question} {solution}"
  )
  supervised = dataclasses.replace(config, method="seqkd")
  for other in (_config(), supervised, dataclasses.replace(config, data=data)):
    assert not setup.same_model_note(other)


def test_another_temperature_in_evaluation_is_a_warning():
  config = _config()
  evaluation = dataclasses.replace(config.evaluation, temperature=0.6)
  words = _words(dataclasses.replace(config, evaluation=evaluation))
  assert "evaluation.temperature is 0.6 and rollout.temperature is 1" in words
  assert "1 in sampling and loss; 0.6 in evaluation" in words


def test_a_first_record_that_is_too_long_is_a_warning(tmp_path):
  source = tmp_path / "a.jsonl"
  lines = [{"question": "How many? " * 50}, {"question": "How many?"}]
  source.write_text("\n".join(map(json.dumps, lines)))
  words = _words(_config(train=DatasetSpec(str(source))))
  assert "Dropped 1 of the first 2 records" in words
  assert "longer than its static length." in words
  assert "data.max_prompt_len is 96: this record would be dropped." in words


@pytest.mark.parametrize("role", ("student", "teacher"))
def test_a_tokenizer_that_is_larger_than_its_model(tmp_path, role):
  name = {"student": "capable", "teacher": "teacher"}[role]
  model = _model(
      tmp_path / "model",
      name,
      vocab_size=464,
      pad_token_id=None,
      eos_token_id=None,
  )
  (model / "generation_config.json").write_text("{}")
  sentence = _refusal(_config(**{role: model}))
  assert f"The {role}'s tokenizer ({model}) has 471 tokens" in sentence
  assert "'</think>' (id 470)" in sentence
  assert f"config.json of {role}.path is 464" in sentence
  assert f"set {role}.tokenizer" in sentence
  larger = _model(tmp_path / "larger", name, vocab_size=512)
  assert f"{role} 512" in _words(_config(**{role: larger}))


def test_every_run_checks(tmp_path):
  config = _config(suffix="Answer: ")
  teacher = _model(tmp_path / "teacher", "teacher", "assistant", "helper")
  for bad, named in (
      (config, "With data.suffix 'Answer: '"),
      (_config(teacher=teacher), "the teacher reads the student's prompt"),
  ):
    specs = {
        role: dataclasses.replace(getattr(bad, role), random_init=True)
        for role in ("student", "teacher")
    }
    with pytest.raises(errors.UserError, match=named):
      setup.prepare(dataclasses.replace(bad, **specs), tmp_path / "workdir")
  assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize("weights", (False, True))
def test_weights_are_downloaded_only_where_they_are_read(monkeypatch, weights):
  asked = []

  def download(path, allow_patterns, revision=None):
    asked.append((path, "*.safetensors" in allow_patterns))
    return assets.path("teacher" if "8B" in path else "capable")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  config = _config("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B")
  if weights:
    path = config.student.path
    hf.check_weights(path, hf.read_config(path))
    assert asked == [(path, False), (path, True)]
  else:
    assert "passed" in _shown(config)
    assert {p for p, _ in asked} == {config.student.path, config.teacher.path}
    assert not any(with_weights for _, with_weights in asked)


def test_the_first_records_of_a_data_set_are_streamed(tmp_path, monkeypatch):
  directory = tmp_path / "set"
  directory.mkdir()
  lines = [json.dumps({"question": f"{n}?"}) for n in range(5)]
  (directory / "train.jsonl").write_text("\n".join(lines))
  spec, load = DatasetSpec(str(directory), size=3), datasets.load_dataset

  def loaded(*args, streaming, **kwargs):
    assert streaming
    return load(*args, streaming=streaming, **kwargs)

  monkeypatch.setattr(datasets, "load_dataset", loaded)
  found = records.read(spec, first=True)
  assert list(found) == [{"question": f"{n}?"} for n in range(3)]
  missing = dataclasses.replace(spec, question="problem")
  with pytest.raises(records.DataError, match="it has question"):
    records.read(missing, first=True)


def test_warnings_and_checks_take_any_question():
  tokenizer, spec = tokenizer_lib.load("bundled:capable"), _config().data
  student = prompts.PromptReader("student", tokenizer, 471)
  for question in ("", " ", "<think>", "√2\n\n"):
    prompts.check(spec, question, student, student)
    assert not prompts.warnings(spec, question, tokenizer)


def _changed(config, path, /, **changes):
  """Changes fields of a group, named with dots."""
  name, _, rest = path.partition(".")
  inner = getattr(config, name)
  if rest:
    return dataclasses.replace(
        config, **{name: _changed(inner, rest, **changes)}
    )
  return dataclasses.replace(
      config, **{name: dataclasses.replace(inner, **changes)}
  )


def _without_set(config, **changes):
  heldout = dataclasses.replace(
      config.evaluation.sets["heldout"], split="train", **changes
  )
  return _changed(config, "evaluation", sets={"heldout": heldout})


def _on_completions(config, tmp_path, completion):
  source = tmp_path / "a.jsonl"
  source.write_text(json.dumps({"question": "?", "completion": completion}))
  train = DatasetSpec(str(source), completion="completion")
  config = _changed(config, "data", train=train)
  return _changed(config, "rollout", source="data")


def _cut(directory, name):
  model = _model(directory / "model", name)
  (model / "generation_config.json").write_text('{"eos_token_id": [466')
  return model


# What a run refuses, and words of its sentence.
_REFUSED = {
    "positions": (
        lambda c, _: _changed(c, "evaluation", max_len=5000),
        "more than the 1024 positions of bundled:capable",
    ),
    "the teacher's positions": (
        lambda c, _: _changed(
            c, "data", teacher_prompt="{question}", max_teacher_prompt_len=1000
        ),
        "more than the 1024 positions of bundled:teacher",
    ),
    "mesh": (
        lambda c, _: _changed(c, "mesh", fsdp=3),
        "which does not fill the",
    ),
    "a set that is not there": (
        lambda c, d: _without_set(c, source=str(d / "no.jsonl"), size=0),
        "no.jsonl does not exist",
    ),
    "a field that a set lacks": (
        lambda c, _: _without_set(c, answer="solution"),
        "has no field 'solution'",
    ),
    "a set's own length": (
        lambda c, _: _without_set(c, max_prompt_len=3),
        "prompts are longer than evaluation.sets.heldout.max_prompt_len 3",
    ),
    "completions that are lists": (
        lambda c, d: _on_completions(c, d, ["We add."]),
        "a.jsonl line 1 has ['We add.'] (list) in field 'completion'",
    ),
    "completions that are blank": (
        lambda c, d: _on_completions(c, d, "<think>\n<|im_end|>"),
        "none can be used (1: empty in a field that is used)",
    ),
    "completions of two turns": (
        lambda c, d: _on_completions(c, d, "7<|im_end|>\n<|im_start|>user"),
        "none can be used (1: the completion has a token that ends",
    ),
    "a field that the teacher's prompt lacks": (
        lambda c, _: _changed(c, "data", teacher_prompt="{question} {hint}"),
        "has no field 'hint'",
    ),
    "a tokenizer that is not there": (
        lambda c, d: _changed(c, "student", tokenizer=str(d / "none")),
        "none is not a directory",
    ),
    "a template that raises": (
        lambda c, d: _changed(
            c,
            "teacher",
            path=str(
                _model(d / "t", "teacher", "{%- if", "{{- nothing.x }}{%- if")
            ),
        ),
        "the chat template fails on messages of user",
    ),
    "a generation config that is cut": (
        lambda c, d: _changed(c, "student", path=str(_cut(d, "capable"))),
        "generation_config.json cannot be read",
    ),
    "completions that are long": (
        lambda c, d: _on_completions(c, d, "We add. " * 999),
        "every one of the 1 records is longer",
    ),
    "prompts that are long": (
        lambda c, _: _changed(c, "data", max_prompt_len=12),
        "every one of the 100000 records is longer",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_a_run_refuses_is_refused_before_weights(
    tmp_path, monkeypatch, name
):
  change, words = _REFUSED[name]
  if name == "prompts that are long":
    monkeypatch.setattr(prompts.PromptIterator, "_encode", lambda *_: "long")
  monkeypatch.setattr(hf, "check_weights", None)  # Not to be called.
  config = change(_config(), tmp_path)
  sentence = _refusal(config)
  assert words in sentence
  with pytest.raises(errors.UserError) as caught:
    setup.prepare(config, tmp_path / "workdir")
  assert sentence.startswith(str(caught.value))
  assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize("group", ("data", "evaluation"))
def test_a_batch_that_does_not_split_is_refused_for_other_devices(
    tmp_path, group
):
  devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  code, out, err = _command(
      tmp_path, f"--config.{group}.batch_size=12", environment=devices
  )
  assert code == 1 and not out
  words = f"{group}.batch_size is 12, which is not divisible by 8"
  assert words in err
  assert "JAX_NUM_CPU_DEVICES" in err


@pytest.mark.parametrize("role", ("student", "teacher"))
@pytest.mark.parametrize("content", ("", "{", "[]", "[" * 100_000))
def test_the_file_at_fault_is_named(tmp_path, role, content):
  name = {"student": "capable", "teacher": "teacher"}[role]
  model = _model(tmp_path / "model", name)
  (model / "config.json").write_text(content)
  sentence = _refusal(_config(**{role: model}))
  assert f"{model}/config.json" in sentence
  assert "tokenizer" not in sentence


def test_what_is_cut_off_or_dropped_is_a_warning(tmp_path):
  source = tmp_path / "a.jsonl"
  rows = [{"question": "<|im_end|>How many?"}, {"question": " "}]
  source.write_text("\n".join(map(json.dumps, rows)))
  words = _words(_config(train=DatasetSpec(str(source))))
  assert "read as plain text." in words and "Dropped 1 of the first" in words
  assert "1 different prompt can be used, fewer than data.batch_size" in words
  assert "passed with 3 warnings." in words


def _record(number):
  """A record of all recipes' training data at once."""
  problem = f"What is {number} + 7?"
  return {
      "conversations": [{"from": "human", "value": problem}],
      "domain": "math",
      "prompt": problem,
      "problem": problem,
      "solution": "We add.",
      "problem_translated": f"{number} + 7 ni ngapi?",
  }


def _held_out(name, tmp_path):
  """Writes problems with the fields of a recipe's evaluation set."""
  rows = [{"question": "1 + 1 ni ngapi?", "answer_number": 2}]
  if name == "mmlu":
    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": 1}]
  elif name != "afrimgsm":
    rows = schemas.rows(name, 2)
  return schemas.write_jsonl(tmp_path / f"{name}.jsonl", rows)


_RECIPES = (
    "compression:qwen3-8b",
    "compression:qwen3-14b",
    "compression:r1-llama-8b",
    "crosslingual:qwen3-1.7b",
    "crosslingual:qwen3-4b",
    "crosslingual:qwen3-8b",
    "relaxed:r1-1.5b",
    "relaxed:qwen3-1.7b",
    "relaxed:qwen3-8b",
    "mixed_policy:qwen3-1.7b",
    "math:qwen3-0.6b",
    "math:qwen3-4b,method=full",
    "math:qwen3-8b,method=seqkd",
)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_recipe_at_full_size_passes_with_local_models_and_data(
    tmp_path, recipe
):
  """Only names are replaced: lengths, batches and the mesh are its own."""
  name, _, variant = recipe.partition(":")
  module = importlib.import_module(f"configs.{name}")
  settings = module.get_config(variant)
  # A base model has no thoughts; DeepSeek's templates open them.
  make = _thinking if variant.startswith("r1-") else _model
  long = {"max_position_embeddings": 40_960}
  for role, model in (("student", "weak"), ("teacher", "teacher")):
    path = make(tmp_path / role, model)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | long))
    settings[role].path = str(path)
  if name in ("compression", "crosslingual"):  # One model is both.
    settings.student.path = settings.teacher.path
  settings.data.train.source = schemas.write_jsonl(
      tmp_path / "train.jsonl", [_record(i) for i in range(9)]
  )
  for subset in (settings.data.train, *settings.evaluation.sets.values()):
    subset.subset = ""
  for one, spec in settings.evaluation.sets.items():
    spec.source = _held_out(one, tmp_path)
  words = _words(config_lib.from_dict(settings.to_dict()))
  assert "The checks passed" in words
  assert ("Final answer:" in words) == (name == "mixed_policy")
  own = "each model's own; the teacher reads data.teacher_prompt" in words
  assert own == (name in ("compression", "crosslingual"))


@pytest.mark.parametrize("recipe", _RECIPES)
def test_without_a_network_a_recipe_ends_in_one_sentence(monkeypatch, recipe):
  def unreachable(*_, **__):
    raise OSError("Cannot reach the hub\nand so on")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
  name, _, variant = recipe.partition(":")
  module = importlib.import_module(f"configs.{name}")
  config = config_lib.from_dict(module.get_config(variant).to_dict())
  sentence = _refusal(config)
  assert sentence == (
      f"{config.student.path} is neither a directory here nor could it be"
      " downloaded (Cannot reach the hub); check the name, the network and"
      " HF_TOKEN."
  )
