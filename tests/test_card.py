"""The model card says what the run did, and its code runs."""

import pathlib
import re
import subprocess
import sys

import pytest
import toys

from configs import math as experiment
from prefix_distill import config as config_lib
from prefix_distill import model_commands
from prefix_distill.errors import ConfigError
from prefix_distill.report import page

_ROOT = pathlib.Path(__file__).parents[1]


def _config(argument: str = "qwen3-1.7b") -> config_lib.Config:
  return config_lib.from_dict(experiment.get_config(argument).to_dict())


def _evaluation(step: int, model: str, accuracy: float) -> dict:
  return {
      "step": step,
      "model": model,
      "set": "aime24",
      "mode": "sampled",
      "accuracy": accuracy,
      "accuracy_low": accuracy - 0.05,
      "accuracy_high": accuracy + 0.05,
      "problems": 30,
      "samples": 16,
  }


_LINES = (
    _evaluation(0, "student", 0.1),
    {"step": 10, "prefix_len": 8, "flops": 2e18, "tokens": 12, "seconds": 3.0},
    _evaluation(10, "student", 0.4),
    {"step": 20, "prefix_len": 9, "flops": 4e18, "tokens": 30, "seconds": 6.0},
    _evaluation(20, "student", 0.5),
    _evaluation(20, "teacher", 0.6),
)


def test_a_card_has_recipe_cost_and_results():
  text = page.card(_config(), _LINES, 20, "apache-2.0")
  head = text.split("---")[1]
  assert "base_model: Qwen/Qwen3-1.7B-Base" in head
  assert "license: apache-2.0" in head and "open-thoughts/" in head
  assert "10.0 % (5.0-15.0) | 50.0 % (45.0-55.0) | 20 | 60.0 %" in text
  assert "| training FLOPs | 4e+18 |" in text
  assert "exact reverse KL" in text and "linear schedule" in text
  assert "2602.15260" in text


def test_an_earlier_checkpoint_has_the_results_of_its_time():
  text = page.card(_config(), _LINES, 10, "")
  assert "40.0 % (35.0-45.0) | 10 | - |" in text and "2e+18" in text
  assert "license:" not in text and "see there" in text


def test_a_card_names_no_directory_of_the_machine():
  config = config_lib.to_dict(_config("tiny"))
  config["student"]["path"] = "/home/ann/models/mine"
  config["data"]["train"] |= {"source": "/home/ann/data/asked.jsonl"}
  text = page.card(config_lib.from_dict(config), _LINES, 20, "")
  assert "/home" not in text and "# mine, distilled" in text


def test_a_card_tells_two_models_of_one_name_apart():
  config = config_lib.to_dict(_config("tiny"))
  config["student"]["path"] = "/home/ann/small/model"
  config["teacher"]["path"] = "/home/ann/large/model/"
  text = page.card(config_lib.from_dict(config), _LINES, 20, "")
  assert "/home" not in text and "# small/model, distilled" in text
  assert "small/model after 20 updates" in text and "from large/model," in text
  for end in ("", "/"):
    config["teacher"]["path"] = config["student"]["path"] + end
    text = page.card(config_lib.from_dict(config), _LINES, 20, "")
    assert "# model, distilled" in text and "from model," in text


@pytest.mark.parametrize(
    "suffix, words", [("", "prompt, add_"), ("<a>", "prompt + '<a>', add_")]
)
def test_the_cards_code_gives_the_suffix_if_there_is_one(suffix, words):
  config = config_lib.to_dict(_config("tiny"))
  config["data"]["suffix"] = suffix
  text = page.card(config_lib.from_dict(config), _LINES, 20, "")
  assert f"    {words}" in text and ("behind the chat" in text) == bool(suffix)


@pytest.mark.parametrize(
    "text, found",
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
        ("---\ntags:\n- a\nlicense: 'mit'\n---\n", "mit"),
        ("# A model\nlicense: mit\n", ""),
        ("---\nlicense_name: odd\n---\n", ""),
    ],
)
def test_the_licence_is_the_bases(text, found, tmp_path):
  (tmp_path / "README.md").write_text(text)
  assert page.licence(tmp_path) == found


def test_a_base_without_a_card_has_no_licence(tmp_path):
  assert page.licence(tmp_path) == ""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("run")
  command = [
      sys.executable,
      "-m",
      "prefix_distill.main",
      *toys.SMALL_RUN,
      f"--workdir={workdir}",
      "--tracker=none",
  ]
  subprocess.run(command, cwd=_ROOT, check=True)
  return workdir / "export"


def test_every_export_has_a_card(exported):
  text = (exported / "README.md").read_text()
  assert "after 6 updates" in text and "heldout, sampled | 8 x 1" in text


@pytest.mark.torch
def test_the_cards_code_runs(exported):
  code = (exported / "README.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", code, re.DOTALL)
  done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=exported,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip()


def test_a_push_that_fails_is_a_sentence(exported, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  code = (
      "import pathlib, sys; from prefix_distill import model_commands;"
      "model_commands.push(pathlib.Path(sys.argv[1]), 'ann/mine', True)"
  )
  done = subprocess.run(
      [sys.executable, "-c", code, str(exported)],
      capture_output=True,
      text=True,
      check=False,
  )
  assert "UserError: --push=ann/mine failed (" in done.stderr


def test_a_name_on_the_hub_has_two_parts():
  argv = ["--workdir=runs", "--push=mine"]
  with pytest.raises(ConfigError, match="give USER/NAME"):
    model_commands.parse("export", argv)
