"""Every shipped config is whole, and the paper's runs on toy directories."""

import json

import jax
import pytest
import schemas

from configs import bundled
from configs import math as experiment
from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.distill import prefix_schedule
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.train import loop

_GUIDED = ("tiny-privileged", "tiny-concise", "tiny-crosslingual")
_MODELS = (
    "", "tiny", "tiny-weak", *_GUIDED, "chain", "qwen3-1.7b", "qwen3-8b"
)  # fmt: skip


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("method", ["prefix", "full"])
def test_math_configs_are_valid(model, method):
  settings = experiment.get_config(f"{model},method={method}".strip(","))
  config = config_lib.from_dict(settings.to_dict())
  assert config.method == method
  assert config_lib.from_dict(config_lib.to_dict(config)) == config


@pytest.mark.parametrize("model", ["tiny", "qwen3-1.7b"])
def test_seqkd_takes_one_answer_a_prompt(model):
  settings = experiment.get_config(f"{model},method=seqkd")
  config = config_lib.from_dict(settings.to_dict())
  assert (config.method, config.rollout.per_prompt) == ("seqkd", 1)


def test_evaluation_sets_can_be_chosen():
  settings = experiment.get_config("qwen3-8b,sets=aime24+math500")
  assert [*settings.evaluation.sets] == ["aime24", "math500"]
  with pytest.raises(errors.ConfigError, match="sets=gsm8k is not one of"):
    experiment.get_config("qwen3-8b,sets=gsm8k")


@pytest.mark.parametrize(
    "name",
    [
        "teacher", "capable", "weak", "guided", "chain-teacher", "chain-weak",
        "rewriter",
    ],
)
def test_bundled_configs_are_valid(name):
  settings = bundled.get_config(name)
  assert config_lib.from_dict(settings.to_dict()).method == "sft"


def test_the_papers_recipe():
  config = config_lib.from_dict(
      experiment.get_config("qwen3-8b").to_dict()
  )
  assert config.student.path == "Qwen/Qwen3-8B-Base"
  assert config.teacher.path == "Qwen/Qwen3-8B"
  assert (config.data.batch_size, config.rollout.per_prompt) == (512, 4)
  assert config.steps == 60 and config.optimizer.learning_rate == 5e-5
  assert config.evaluation.max_len == config.rollout.max_len == 16_384
  assert config.evaluation.sets == evaluator.SETS
  caps = [prefix_schedule.cap(config, step) for step in range(60)]
  assert caps[:3] == [1, 257, 513] and caps[-1] == 15_105
  assert len(prefix_schedule.buckets(config)) <= 8


def test_bundled_assets_are_small():
  files = [p for n in assets.names() for p in assets.path(n).iterdir()]
  assert sum(p.stat().st_size for p in files) < 16e6


def _toy_directory(path, seed):
  """A random Qwen3 model with the bundled tokenizer."""
  config = json.loads((assets.path("weak") / "config.json").read_text())
  model = Model(hf.read_config("bundled:weak"))
  hf.export(
      model.init(jax.random.key(seed)), "bundled:weak", "bundled:weak", path,
      "bfloat16",
  )  # fmt: skip
  assert config["model_type"] == "qwen3"
  return str(path)


def test_the_qwen3_config_updates_toy_directories(tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text(
      "".join(
          json.dumps({
              "conversations": [{"from": "human", "value": f"What is {i}?"}],
          })
          + "\n"
          for i in range(8)
      )
  )
  settings = experiment.get_config("qwen3-1.7b")
  settings.steps = 2
  settings.student.path = _toy_directory(tmp_path / "student", 0)
  settings.teacher.path = _toy_directory(tmp_path / "teacher", 1)
  settings.data.train.source = str(prompts)
  settings.data.batch_size = 4
  settings.data.max_prompt_len = 64
  settings.rollout.max_len = settings.evaluation.max_len = 24
  settings.prefix.linear.increment = 16
  settings.prefix.buckets = (24,)
  settings.optimizer.batch_tokens = 1024
  settings.rollout.batch_tokens = 1024
  settings.mesh.fsdp = 1
  settings.evaluation.batch_size = 16
  for name, spec in settings.evaluation.sets.items():
    rows = schemas.rows(name, 2)
    spec.source = schemas.write(name, "jsonl", tmp_path, rows)
    spec.samples = 2
  workdir = tmp_path / "run"
  loop.train(config_lib.from_dict(settings.to_dict()), workdir)
  lines = [
      json.loads(x)
      for x in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  updates = [x for x in lines if "kl" in x]
  assert [x["prefix_len"] for x in updates] == [1, 17]
  assert all(x["kl"] > 0 for x in updates)
  graded = {x["set"]: (x["grading"], x["dropped"]) for x in lines if "set" in x}
  assert graded == {
      "math500": ("math", 0), "aime24": ("math", 0), "aime25": ("math", 0),
      "gpqa": ("letter", 0), "mmlu_pro": ("letter", 0), "hmmt": ("math", 0),
      "amc": ("math", 0),
  }  # fmt: skip
