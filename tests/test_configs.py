"""Every shipped config is whole, and the paper's runs on toy directories."""

import json

import jax
import pytest
import schemas

from configs import bundled
from configs import compression
from configs import crosslingual
from configs import language
from configs import math as experiment
from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill.distill import prefix_schedule
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models.config import num_params
from prefix_distill.models.transformer import Model
from prefix_distill.plan import planner
from prefix_distill.plan import programs
from prefix_distill.train import loop

_GUIDED = ("tiny-privileged", "tiny-concise", "tiny-crosslingual")
_MODELS = (
    "",
    "tiny",
    "tiny-weak",
    *_GUIDED,
    "chain",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
)


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


@pytest.mark.parametrize("size", ["0.6b", "1.7b", "4b", "8b"])
@pytest.mark.parametrize("budget, steps", [("", 1500), (",steps=300", 300)])
def test_seqkd_has_the_papers_own_recipe(size, budget, steps):
  settings = experiment.get_config(f"qwen3-{size},method=seqkd{budget}")
  config = config_lib.from_dict(settings.to_dict())
  assert config.steps == steps and config.data.batch_size == 128
  assert config.optimizer.learning_rate == 1e-4
  assert config.checkpoint.best == "aime24" and config.evaluation.every == 10


def test_evaluation_sets_can_be_chosen():
  settings = experiment.get_config("qwen3-8b,sets=aime24+math500")
  assert [*settings.evaluation.sets] == ["aime24", "math500"]
  assert settings.checkpoint.best == "aime24"
  # Without the set that chooses, the last checkpoints are all there is.
  settings = experiment.get_config("qwen3-8b,sets=math500")
  assert config_lib.from_dict(settings.to_dict()).checkpoint.best == ""
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
  train = config.data.train
  assert train.wanted == {"domain": "math"} and train.size == 30_700
  assert train.distinct and train.random
  assert config.checkpoint.best == "aime24"
  assert config.mesh.filled(8) == config_lib.MeshSpec(1, 8)
  assert config.mesh.filled(1) == config_lib.MeshSpec(1, 1)
  assert config.steps == 60 and config.optimizer.learning_rate == 5e-5
  assert config.evaluation.max_len == config.rollout.max_len == 16_384
  assert config.evaluation.sets == evaluator.SETS
  caps = [prefix_schedule.cap(config, step) for step in range(60)]
  assert caps[:3] == [1, 257, 513] and caps[-1] == 15_105
  assert len(prefix_schedule.buckets(config)) <= 8


@pytest.mark.parametrize("method", ["prefix", "full", "seqkd", "sft"])
def test_the_language_models_config_is_valid(method):
  asked = f"student=mine,teacher=theirs,method={method}"
  settings = language.get_config(f"{asked},sets=heldout+validation").to_dict()
  config = config_lib.from_dict(settings)
  assert (config.method, config.student.path) == (method, "mine")
  assert (config.teacher and config.teacher.path) == (
      None if method == "sft" else "theirs"
  )
  # A teacher scores answers of evaluations whatever it does in training.
  assert bool(config.evaluation.scored) == (method != "sft")
  splits = {spec.split for spec in config.evaluation.sets.values()}
  assert splits == {"test", "validation"} and config.data.train.split == "train"


def test_the_language_models_argument():
  for wrong, why in (
      ("size=3", "no argument 'size=3'; use student="),
      ("student=", "no argument 'student='"),
      ("method=grpo", "method=grpo is none of prefix"),
      ("sets=test", "sets=test is none of heldout"),
  ):
    with pytest.raises(errors.ConfigError, match=why):
      language.get_config(wrong)


_COMPRESSED = ("qwen3-8b", "qwen3-14b", "r1-llama-8b")


@pytest.mark.parametrize("model", ["tiny", *_COMPRESSED])
def test_compression_is_self_distillation(model):
  settings = compression.get_config(model).to_dict()
  config = config_lib.from_dict(settings)
  assert config.student.path == config.teacher.path
  assert config.loss.normalize == "length"
  assert config.loss.form == "exact"
  assert config.loss.exact.divergence == "reverse_kl"
  # The share of the updates that the authors wait for a new teacher.
  assert 2 * config.teacher.refresh == config.steps
  # The instruction comes first, and only the teacher reads it.
  instruction, _, field = config.data.teacher_prompt.rpartition("{")
  assert len(instruction) > 5
  assert field == ("question}" if model == "tiny" else "prompt}")
  assert config.data.system is None


@pytest.mark.parametrize("model", _COMPRESSED)
def test_the_authors_recipe_of_compression(model):
  config = config_lib.from_dict(compression.get_config(model).to_dict())
  assert (config.steps, config.teacher.refresh) == (100, 50)
  assert (config.data.batch_size, config.rollout.per_prompt) == (32, 1)
  assert (config.rollout.max_len, config.rollout.temperature) == (8192, 1.0)
  spec = config.optimizer
  assert (spec.learning_rate, spec.weight_decay) == (1e-6, 0.01)
  assert {prefix_schedule.cap(config, step) for step in range(100)} == {8192}
  graded = config.evaluation
  assert (graded.temperature, graded.top_p, graded.top_k) == (0.6, 0.95, 20)
  assert graded.max_len == 30_000 and not graded.greedy
  assert set(graded.sets) == {"math500", "aime24", "aime25", "gpqa", "mmlu"}
  for name, spec in graded.sets.items():
    assert (spec.samples, spec.rule) == (8, "dual")
    letters = name in ("gpqa", "mmlu")
    assert spec.grading == ("dual_letter" if letters else "dual_math")
  # All problems are whole sets, of sizes that the plan knows.
  answers = planner.num_answers(graded, [*graded.sets])
  assert answers == 8 * (500 + 30 + 30 + 198 + 14_042)


def test_arguments_of_compression():
  def read(argument):
    return config_lib.from_dict(compression.get_config(argument).to_dict())

  default, uniform = read("qwen3-8b"), read("qwen3-8b,instruction=uniform")
  assert default == read("qwen3-8b,instruction=difficulty,cap=8k")
  assert default.data.teacher_prompt != uniform.data.teacher_prompt
  short = read("qwen3-8b,cap=1k,sets=aime24")
  assert prefix_schedule.longest(short) == 1024
  assert [*short.evaluation.sets] == ["aime24"]
  assert prefix_schedule.longest(read("tiny,cap=16")) == 16
  for argument, text in (
      ("qwen3-1b", "no argument 'qwen3-1b'; use one of tiny, qwen3-8b"),
      ("cap=0", "no argument 'cap=0'"),
      ("qwen3-8b,cap=9000", "prefix.fixed.length is 9000"),
      ("tiny,instruction=uniform", "knows only 'Be brief.'"),
      ("qwen3-8b,sets=gsm8k", "sets=gsm8k is not one of "),
  ):
    with pytest.raises(errors.ConfigError, match=text):
      read(argument)


@pytest.mark.parametrize(
    "model, billions",
    [("qwen3-8b", 8.191), ("qwen3-14b", 14.768), ("r1-llama-8b", 8.030)],
)
def test_the_architectures_of_compression_are_known_offline(model, billions):
  path = compression.get_config(model).student.path
  known, _ = programs.architecture(path)
  assert num_params(known) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_bundled_assets_are_small():
  files = [p for n in assets.names() for p in assets.path(n).iterdir()]
  assert sum(p.stat().st_size for p in files) < 16e6


def _toy_directory(path, seed):
  """A random Qwen3 model with the bundled tokenizer."""
  config = json.loads((assets.path("weak") / "config.json").read_text())
  model = Model(hf.read_config("bundled:weak"))
  hf.export(
      model.init(jax.random.key(seed)),
      "bundled:weak",
      "bundled:weak",
      path,
      "bfloat16",
  )
  assert config["model_type"] == "qwen3"
  return str(path)


@pytest.mark.parametrize(
    "method",
    [
        "prefix",
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("seqkd", marks=pytest.mark.slow),
    ],
)
def test_the_qwen3_config_updates_toy_directories(tmp_path, method):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text(
      "".join(
          json.dumps({
              "conversations": [
                  {"from": "human", "value": f"What is {i % 8}?"},
                  {"from": "gpt", "value": f"Answer {i}."},
              ],
              "domain": "code" if i % 9 == 8 else "math",
          })
          + "\n"
          for i in range(40)
      )
  )
  settings = experiment.get_config(f"qwen3-1.7b,method={method}")
  settings.steps = 2
  settings.student.path = _toy_directory(tmp_path / "student", 0)
  settings.teacher.path = _toy_directory(tmp_path / "teacher", 1)
  settings.data.train.source = str(prompts)
  settings.data.train.size = 6
  settings.data.batch_size = 8
  settings.data.max_prompt_len = 64
  settings.rollout.max_len = settings.evaluation.max_len = 24
  if method == "prefix":
    settings.prefix.linear.increment = 16
  if method == "seqkd":  # This one's answers end.
    settings.teacher.path, settings.rollout.max_len = "bundled:teacher", 256
  settings.prefix.buckets = (24,)
  settings.optimizer.batch_tokens = 1024
  settings.rollout.batch_tokens = 1024
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
  loss = "cross_entropy" if method == "seqkd" else "kl"
  updates = [x for x in lines if loss in x]
  caps = {"prefix": [1, 17], "full": [24, 24], "seqkd": [256, 256]}[method]
  assert [x["prefix_len"] for x in updates] == caps
  assert all(x[loss] > 0 for x in updates)
  graded = {x["set"]: (x["grading"], x["dropped"]) for x in lines if "set" in x}
  assert graded == {
      "math500": ("math", 0),
      "aime24": ("math", 0),
      "aime25": ("math", 0),
      "gpqa": ("letter", 0),
      "mmlu_pro": ("letter", 0),
      "hmmt": ("math", 0),
      "amc": ("math", 0),
  }


_LANGUAGES = ("swa", "ewe", "deu", "zho", "tha")


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
@pytest.mark.parametrize("language", _LANGUAGES)
def test_the_crosslingual_recipe(size, language):
  settings = crosslingual.get_config(f"qwen3-{size},language={language}")
  config = config_lib.from_dict(settings.to_dict())
  assert config.student.path == config.teacher.path
  assert config.student.path == f"Qwen/Qwen3-{size.upper()}"
  rollout = config.rollout
  assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.1, 0.95, 20)
  assert rollout.max_len == 2048 and config.loss.normalize == "tokens"
  assert config.loss.exact.divergence == "forward_kl"
  assert (config.steps, config.data.batch_size) == (100, 32)
  assert config.optimizer.clip_norm == 0.1
  assert set(config.data.teacher_fields) == {
      "problem_translated",
      "problem",
      "solution",
  }
  ((name, spec),) = config.evaluation.sets.items()
  assert name == ("afrimgsm" if language in ("swa", "ewe") else "polymath")
  assert spec.source in ("masakhane/afrimgsm", "Qwen/PolyMath")


def test_the_crosslingual_recipes_arguments():
  config = config_lib.from_dict(crosslingual.get_config("").to_dict())
  assert config.student.path == "bundled:guided"
  for wrong in ("qwen3-2b", "language=xx", "swa"):
    with pytest.raises(errors.ConfigError, match="has no argument"):
      crosslingual.get_config(wrong)


def test_the_crosslingual_config_updates_toy_directories(tmp_path):
  """The full-size recipe's own code on small random models and records."""
  settings = crosslingual.get_config("qwen3-1.7b,language=swa")
  train = tmp_path / "train.jsonl"
  train.write_text(
      "".join(
          json.dumps(
              {
                  "problem": f"Ann has {i} pens.",
                  "solution": f"It is {i}.",
                  "problem_translated": f"Ann ana kalamu {i}.",
                  "language": "swa",
              }
          )
          + "\n"
          for i in range(8)
      )
  )
  heldout = tmp_path / "test.jsonl"
  heldout.write_text(
      "".join(
          json.dumps({"question": f"Ann ana kalamu {i}.", "answer_number": i})
          + "\n"
          for i in range(2)
      )
  )
  path = _toy_directory(tmp_path / "model", 0)
  settings.student.path = settings.teacher.path = path
  settings.steps, settings.data.batch_size = 2, 4
  settings.data.train.source = str(train)
  settings.rollout.max_len = 16
  settings.data.max_prompt_len = 128
  settings.data.max_teacher_prompt_len = 512
  settings.evaluation.max_len = 16
  settings.evaluation.batch_size = 8
  settings.evaluation.sets.afrimgsm.source = str(heldout)
  settings.evaluation.sets.afrimgsm.max_prompt_len = 128
  settings.evaluation.sets.afrimgsm.samples = 2
  workdir = tmp_path / "run"
  loop.train(config_lib.from_dict(settings.to_dict()), workdir)
  lines = [
      json.loads(x)
      for x in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  assert [x["kl"] > 0 for x in lines if "kl" in x] == [True, True]
  assert {x["set"] for x in lines if "set" in x} == {"afrimgsm"}
  assert all(not x["dropped"] for x in lines if "dropped" in x)


def test_the_compression_config_updates_toy_directories(tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  rows = [
      # As the raw data set has them, and as the processed one.
      {"prompt": [{"role": "user", "content": f"What is {i}?"}]}
      if i % 2
      else {"prompt": f"What is {i}?"}
      for i in range(8)
  ]
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  settings = compression.get_config("qwen3-8b,cap=16,sets=aime24+mmlu")
  path = _toy_directory(tmp_path / "model", 0)
  settings.steps, settings.teacher.refresh = 3, 2
  settings.student.path = settings.teacher.path = path
  settings.data.train.source = str(prompts)
  settings.data.train.subset = ""
  settings.data.batch_size = 4
  settings.data.max_prompt_len = 64
  settings.data.max_teacher_prompt_len = 640
  settings.rollout.max_len = settings.evaluation.max_len = 24
  settings.mesh.fsdp = 1
  settings.evaluation.batch_size = 16
  for name, spec in settings.evaluation.sets.items():
    rows = schemas.rows("aime24", 2)
    if name == "mmlu":
      rows = [_mmlu(n) for n in range(2)]
    spec.source = schemas.write(name, "jsonl", tmp_path, rows)
    spec.samples, spec.max_prompt_len = 2, 256
    spec.subset = ""
  workdir = tmp_path / "run"
  loop.train(config_lib.from_dict(settings.to_dict()), workdir)
  lines = [
      json.loads(x)
      for x in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  updates = [x for x in lines if "kl" in x]
  assert [x["prefix_len"] for x in updates] == [16] * 3
  assert [x["teacher_update"] for x in updates] == [0, 0, 2]
  assert all(x["kl"] > 0 for x in updates)
  graded = {x["set"]: (x["grading"], x["dropped"]) for x in lines if "set" in x}
  assert graded == {"aime24": ("dual_math", 0), "mmlu": ("dual_letter", 0)}
  # Tokens beside accuracy.
  for line in (x for x in lines if "set" in x):
    assert 0 < line["mean_length"] <= 24 and 0 <= line["accuracy"] <= 1


def _mmlu(n):
  """A record of MMLU, whose answer is the right option's number."""
  return {
      "question": f"Which one, {n}?",
      "subject": "virology",
      "choices": [f"option {i}" for i in range(4)],
      "answer": n % 4,
  }
