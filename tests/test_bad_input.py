"""Every bad input ends in one sentence, before anything expensive."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import toys

from configs import math as experiment
from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.train import setup

_ROOT = pathlib.Path(__file__).parent.parent


def _config(**changes):
  """The bundled experiment with dotted fields changed (`a__b` is a.b)."""
  settings = experiment.get_config("tiny")
  settings.evaluation.sets.heldout.size = 4
  settings.student.random_init = settings.teacher.random_init = True
  with settings.unlocked():
    for name, value in changes.items():
      *groups, field = name.split("__")
      inner = settings
      for group in groups:
        inner = inner[group]
      inner[field] = value
  return config_lib.from_dict(settings.to_dict())


def _refusal(tmp_path, config):
  """Returns the sentence; nothing may have been written."""
  workdir = tmp_path / "workdir"
  with pytest.raises(errors.UserError) as caught:
    setup.prepare(config, workdir)
  assert not workdir.exists()
  sentence = str(caught.value)
  assert sentence.endswith(".") and "\n" not in sentence
  return sentence


def _copy(tmp_path, name="teacher"):
  target = tmp_path / "model"
  shutil.copytree(assets.path(name), target)
  return target


def test_good_settings_pass(tmp_path):
  assert setup.prepare(_config(), tmp_path / "workdir").data is not None


@pytest.mark.parametrize(
    ("field", "path", "words"),
    [
        ("student__path", "/no/such/model", "/no/such/model is not a directo"),
        ("teacher__path", "bundled:gemma", "chain-teacher, chain-weak"),
    ],
)
def test_missing_model(tmp_path, field, path, words):
  assert words in _refusal(tmp_path, _config(**{field: path}))


def test_half_downloaded_model(tmp_path):
  model = _copy(tmp_path)
  weights = model / "model.safetensors"
  if weights.exists():
    weights.unlink()
  index = {"metadata": {}, "weight_map": {"a": "model-00001-of-2.safetensors"}}
  (model / "model.safetensors.index.json").write_text(json.dumps(index))
  config = _config(teacher__path=str(model), teacher__random_init=False)
  assert "model-00001-of-2.safetensors is missing" in _refusal(
      tmp_path, config
  )


def test_truncated_weights(tmp_path):
  model = _copy(tmp_path)
  (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
  config = _config(teacher__path=str(model), teacher__random_init=False)
  assert "not a whole safetensors file" in _refusal(tmp_path, config)


def test_two_tokenizers(tmp_path):
  model = _copy(tmp_path)
  file = model / "tokenizer.json"
  tokenizer = json.loads(file.read_text())
  vocab = tokenizer["model"]["vocab"]
  vocab["Ġpens"], vocab["Ġcups"] = vocab["Ġcups"], vocab["Ġpens"]
  file.write_text(json.dumps(tokenizer))
  sentence = _refusal(tmp_path, _config(teacher__path=str(model)))
  first = min(vocab["Ġpens"], vocab["Ġcups"])
  assert f"id {first} " in sentence
  assert "Ġpens" in sentence and "Ġcups" in sentence


def test_no_room_for_prompts(tmp_path):
  sentence = _refusal(tmp_path, _config(data__max_prompt_len=8))
  assert "data.max_prompt_len is 8" in sentence and "takes 9" in sentence


def test_answers_longer_than_the_model(tmp_path):
  sentence = _refusal(tmp_path, _config(evaluation__max_len=5000))
  assert "evaluation.max_len 5000" in sentence and "1024 positions" in sentence


def test_a_set_whose_own_prompts_are_too_long(tmp_path):
  file = tmp_path / "long.jsonl"
  question = "Ann has 7 pens. " * 165 + "How many pens does Ann have now?"
  file.write_text(json.dumps({"question": question, "answer": "7"}))
  settings = _config()
  heldout = dataclasses.replace(
      settings.evaluation.sets["heldout"],
      source=str(file),
      split="train",
      max_prompt_len=900,
  )
  evaluation = dataclasses.replace(
      settings.evaluation, sets={"heldout": heldout}
  )
  sentence = _refusal(
      tmp_path, dataclasses.replace(settings, evaluation=evaluation)
  )
  assert "evaluation.sets.heldout has prompts of up to" in sentence
  assert "1024 positions" in sentence


def test_answers_longer_than_the_teacher_that_scores_them(tmp_path):
  short = _copy(tmp_path)
  settings = json.loads((short / "config.json").read_text())
  settings["max_position_embeddings"] = 320
  (short / "config.json").write_text(json.dumps(settings))
  changes = {"teacher__path": str(short), "evaluation__max_len": 300}
  assert setup.prepare(_config(**changes), tmp_path / "fine")
  sentence = _refusal(tmp_path, _config(**changes, evaluation__scored=4))
  assert f"320 positions of {short}" in sentence


def test_prompt_files(tmp_path):
  file = tmp_path / "prompts.jsonl"

  def refusal():
    settings = _config()
    train = dataclasses.replace(
        settings.data.train, source=str(file), size=0, answer=""
    )
    data = dataclasses.replace(settings.data, train=train)
    return _refusal(tmp_path, dataclasses.replace(settings, data=data))

  assert "does not exist" in refusal()
  file.write_text("")
  assert "has no records" in refusal()
  file.write_text('{"question": "a"}\nnot json\n')
  assert "line 2 is not JSON" in refusal()
  file.write_text('{"question": "a"}\n\n{"problem": "b"}\n')
  sentence = refusal()
  assert "line 3 has no field 'question'; it has problem" in sentence
  file.write_bytes(b"\xff\xfe\x00")
  assert "cannot be read" in refusal()
  file = tmp_path / "prompts.parquet"
  file.write_bytes(b"no parquet")
  assert "cannot be read as parquet" in refusal()


def _command(tmp_path, *flags, devices=1):
  process = subprocess.run(
      [
          sys.executable,
          "-m",
          "prefix_distill.main",
          f"--workdir={tmp_path / 'workdir'}",
          *flags,
      ],
      cwd=_ROOT,
      text=True,
      capture_output=True,
      timeout=120,
      check=False,
      env=os.environ | {"XLA_FLAGS": toys.xla_flags(devices)},
  )
  assert not (tmp_path / "workdir").exists()
  lines = process.stderr.strip().splitlines()
  return process.returncode, [x for x in lines if x.startswith("error")]


@pytest.mark.parametrize(
    ("flags", "devices", "words"),
    [
        (["--config=configs/math.py:huge"], 1, "no argument 'huge'; use one"),
        (
            ["--config=configs/math.py", "--config.data.batchsize=8"],
            1,
            "data.batchsize is not a field; did you mean data.batch_size?",
        ),
        (
            ["--config=configs/math.py", "--config.prefix.increment=8"],
            1,
            "prefix.increment is not a field; did you mean"
            " prefix.linear.increment or",
        ),
        (
            ["--config=configs/math.py", "--config.loss.jsd.beta=0.1"],
            1,
            "loss.jsd.beta is 0.1 but loss.exact.divergence is 'reverse_kl';",
        ),
        (
            ["--config=configs/math.py", "--config.loss.exact.divergence=kl"],
            1,
            "loss.exact.divergence is 'kl'; use one of reverse_kl, forward_kl,",
        ),
        (
            ["--config=configs/math.py", "--config.prefix.schedule=fixed",
             "--config.prefix.fixed.length=0"],
            1,
            "prefix.fixed.length is 0; set it to 1 or more.",
        ),
        (
            ["--config=configs/math.py",
             "--config.evaluation.sets.mine.source=mine.jsonl"],
            1,
            "evaluation.sets.mine.answer is empty, so nothing can be graded;",
        ),
        (
            ["--config=configs/math.py",
             "--config.evaluation.sets.mine.source=mine.jsonl",
             "--config.evaluation.sets.mine.answer=answer"],
            1,
            "mine.jsonl",
        ),
        (["--config=configs/none.py"], 1, "configs/none.py"),
        (
            ["--config=configs/math.py", "--config.data.batch_size=12"],
            8,
            "data.batch_size is 12, which is not divisible by 8 (mesh data x"
            " fsdp = 8); set it to 16.",
        ),
        (
            ["--config=configs/math.py", "--config.mesh.fsdp=3"],
            8,
            "does not fill the 8 devices",
        ),
    ],
)
def test_the_command_ends_with_one_sentence(tmp_path, flags, devices, words):
  code, errors = _command(tmp_path, *flags, devices=devices)
  assert code == 1
  assert len(errors) == 1 and words in errors[0]
