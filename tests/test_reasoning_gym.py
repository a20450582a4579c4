"""Tasks of reasoning-gym: questions, splits, verifiers, and a run on them."""

import dataclasses
import functools
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
import toys

from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill.config import DatasetSpec
from prefix_distill.data import gym
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.evaluate import grading
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import workdir as workdir_lib

factory = pytest.importorskip(
    "reasoning_gym.factory", reason="needs pip install -e '.[gym]'"
)

# A mixture has no tasks unless they are given.
_MIXTURE = (
    'composite?datasets=[{"name":"chain_sum","weight":1,"config":{}},'
    '{"name":"gcd","weight":1,"config":{"max_value":50}}]'
)
_TASKS = [
    _MIXTURE if name == "composite" else name
    for name in sorted(factory.DATASETS)
]
# Facts of reasoning-gym 0.1.25. These have no right answer of their own:
_NO_ANSWER = {
    "boxnet",
    "graph_color",
    "propositional_logic",
    "rubiks_cube",
    "rush_hour",
}
# Any text is the answer "False" to its verifier.
_ANY_ANSWER = {"game_of_life_halting"}
# A question takes seconds.
_SLOW = {"knight_swap", "sokoban", "futoshiki", "zebra_puzzles"}


def _read(task, split="train", **changes):
  return records.read(DatasetSpec(f"reasoning_gym:{task}", split, **changes))


def _grade(text, record):
  return grading.verified(text, record["reference"])


def _count(task):
  return 1 if task in _SLOW else 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A random model's architecture and tokenizer, whose tokens are bytes."""
  directory = tmp_path_factory.mktemp("bytes") / "architecture"
  directory.mkdir()
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(
      tokenizers.models.BPE({x: i for i, x in enumerate(alphabet)}, [])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(
      ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
  )
  made.save(str(directory / "tokenizer.json"))
  for name in ("tokenizer_config.json", "chat_template.jinja"):
    text = (assets.path("teacher") / name).read_text()
    (directory / name).write_text(text)
  settings = json.loads((assets.path("teacher") / "config.json").read_text())
  settings |= {
      "vocab_size": 264,
      "hidden_size": 16,
      "intermediate_size": 32,
      "num_hidden_layers": 2,
      "layer_types": ["full_attention"] * 2,
      "max_window_layers": 2,
      "head_dim": 8,
      "eos_token_id": 258,
      "pad_token_id": 256,
      "max_position_embeddings": 2048,
  }
  (directory / "config.json").write_text(json.dumps(settings))
  return directory


@pytest.fixture(scope="module")
def tokenizer(source):
  return tokenizer_lib.load(str(source))


@pytest.fixture(scope="module")
def models(source):
  """A student and a teacher; returns their paths."""
  paths = []
  for seed in range(2):
    params = Model(hf.read_config(str(source))).init(jax.random.key(seed))
    paths.append(source.with_name(f"model{seed}"))
    hf.export(params, str(source), str(source), paths[-1], "float32")
  return [str(path) for path in paths]


@pytest.mark.parametrize("task", _TASKS)
def test_every_task_is_read_encoded_and_graded(task, tokenizer):
  count = _count(task)
  found = _read(task, "test", size=count)
  assert len(found) == count
  for number in range(count):
    record = found[number]
    question = records.question(record, "question", "here")
    assert prompts.encode_problem(tokenizer, question, 2**14, "<think>", "here")
    assert ("answer" in record) == (task not in _NO_ANSWER)
    if "answer" in record:
      right = f"<think>Well.</think>\n<answer>{record['answer']}</answer>"
      assert _grade(right, record) == 1
    wrong = _grade("</think><answer>no such answer</answer>", record)
    assert (wrong == 1) == (task in _ANY_ANSWER)
    assert _grade("", record) == _grade(f"<think>{question}", record) == 0


# In another process, in another order.
_PROGRAM = """
import json, sys
from prefix_distill.config import DatasetSpec
from prefix_distill.data import records
for task, count in json.loads(sys.stdin.read()):
  found = records.read(DatasetSpec("reasoning_gym:" + task, "test", size=20))
  rows = {i: found[i] for i in reversed(range(count))}
  print(json.dumps([rows[i] for i in range(count)]))
"""


def test_a_record_depends_on_its_number_alone(tmp_path):
  asked = [
      # A few of these draw from the generator that a process shares.
      (task, 20 if task == "list_functions" else 2)
      for task in _TASKS
      if task not in _SLOW
  ]
  done = subprocess.run(
      [sys.executable, "-c", _PROGRAM],
      input=json.dumps(asked),
      text=True,
      capture_output=True,
      env=toys._environment(1) | {"PYTHONHASHSEED": "7"},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lines = done.stdout.splitlines()
  for (task, count), line in zip(asked, lines, strict=True):
    found = _read(task, "test", size=30)  # More, but the same ones.
    assert json.loads(line) == [found[i] for i in range(count)], task


@pytest.mark.parametrize("task", ["chain_sum", "acre", "list_functions"])
def test_no_entry_is_in_two_splits_or_under_two_seeds(task):
  seen = set()
  for seed in (0, 1):
    for split in config_lib.GYM_SPLITS:
      found = _read(task, split, seed=seed, size=300)
      new = set()
      for i in (*range(20), *range(280, 300)):
        asked = json.loads(found[i]["reference"])
        new.add(asked["seed"] + asked["number"])
      assert len(new) == 40 and not new & seen
      seen |= new


def test_every_split_takes_seeds_of_its_own_whatever_the_seed_is():
  for seed in (0, 1, 7, 2**32 - 1):
    for number, split in enumerate(config_lib.GYM_SPLITS):
      found = _read("chain_sum", split, seed=seed, size=1_000_000)
      for i in (0, 1, 999_999):
        asked = json.loads(found[i]["reference"])
        drawn = asked["seed"] + asked["number"]
        assert drawn % 3 == number and drawn < 2**32


def test_reading_makes_no_more_than_it_must():
  start = time.monotonic()
  found = _read("zebra_puzzles")  # Half a second each.
  assert len(found) == 100_000
  assert time.monotonic() - start < 30
  assert len(_read("zebra_puzzles", "test")) == 500


@pytest.mark.parametrize(
    "task, says",
    [
        ("chain_sums", "is no task of reasoning-gym; did you mean chain_sum?"),
        ("chain_sum?min_term=3", "no option; did you mean min_terms?"),
        ("chain_sum?min_terms=three", "min_terms=three, which is of another"),
        ("chain_sum?min_terms=3.5", "valid integer"),
        ("chain_sum?min_terms=9", "refused by reasoning-gym: max_terms must"),
        ("chain_sum?seed=3", "set seed of the data set"),
        ("basic_arithmetic?format_style=odd", "'simple' or 'natural'"),
        ("composite", "refused by reasoning-gym: Must specify"),
        ("composite?datasets={named}", "another kind"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(task, says):
  with pytest.raises(UserError) as error:
    _read(task)
  assert says in str(error.value)
  assert str(error.value).startswith(f"reasoning_gym:{task} ")
  assert "\n" not in str(error.value)


def test_more_records_than_there_are_is_one_sentence():
  with pytest.raises(UserError, match="has 2000 records in each split"):
    _read("acre", size=2001)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"split": "dev"}, "use one of train, validation, test"),
        ({"subset": "hard"}, "leave dataset.subset at ''"),
        ({"choices": ("a", "b")}, "leave dataset.choices at"),
        ({"rule": "dual"}, "leave dataset.rule at 'plain'"),
        ({"random": True, "size": 5}, "leave dataset.random at False"),
    ],
)
def test_settings_without_a_meaning_are_one_sentence(changes, says):
  with pytest.raises(UserError) as error:
    DatasetSpec("reasoning_gym:chain_sum", **changes)
  assert says in str(error.value)


def test_there_are_no_completions():
  with pytest.raises(UserError, match="has no field 'solution'; it has quest"):
    _read("chain_sum", completion="solution")


def test_options_have_their_kinds():
  texts = {
      "chain_sum?min_terms=5&max_terms=5": " ",
      'basic_arithmetic?operators=["+"]&format_style=simple': "+",
      "basic_arithmetic?operators=('+',)&allow_parentheses=False": "+",
      "caesar_cipher?delimiter=.&min_words=2": "",
  }
  for task, has in texts.items():
    assert has in _read(task)[0]["question"]
  assert (
      _read("chain_sum?min_terms=5&max_terms=5")[3]["metadata"]["num_terms"]
      == 5
  )


def test_a_missing_package_is_one_sentence(monkeypatch):
  monkeypatch.setattr(gym.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match=r"pip install 'prefix_distill\[gym\]'"):
    _read("chain_sum")


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{7}", "7"),
        ("<think>\\boxed{1}</think> The answer is <answer> 7 </answer>.", "7"),
        ("<answer>1</answer> no: <answer>7\n8</answer>", "7\n8"),
        (r"<answer>\boxed{\text{True}}</answer>", "True"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        ("<think>x</think>\n 7 ", "7"),
        ("<think>7", ""),
        ("<answer>7", "<answer>7"),
    ],
)
def test_the_final_answer_is_cut_out(text, answer):
  assert grading.final_answer(text) == answer


def test_verifiers_that_fail_hang_or_exit_end_nothing():
  record = _read("polynomial_multiplication", "test")[0]
  right = f"<answer>{record['answer']}</answer>"
  factors = _read("prime_factorization", "test")[0]
  for answer in ("exit()", "10**10**10", "while", "(" * 5000, "\ud800"):
    assert _grade(f"<answer>{answer}</answer>", record) == 0
    assert _grade(right, record) == 1
  assert _grade("nonsense 17", factors) == 0  # Its verifier raises.


def test_an_entry_that_is_not_made_is_left_out(monkeypatch, tokenizer):
  made = gym.Entries.__getitem__

  def fails(self, index):
    if index % 3 == 1:
      raise gym.NotMade("It fails.")
    return made(self, index)

  monkeypatch.setattr(gym.Entries, "__getitem__", fails)
  spec = DatasetSpec("reasoning_gym:chain_sum", "test", size=9)
  problems = evaluator.load_problems("own", spec, tokenizer, 512, "<think>")
  assert (len(problems.answers), problems.dropped) == (6, 3)
  spec = config_lib.DataSpec(spec, batch_size=6, max_prompt_len=512)
  stream = prompts.PromptIterator(spec, tokenizer, seed=0)
  assert set(next(stream)[0].index) <= {0, 2, 3, 5, 6, 8}
  assert stream.reasons["unmade"] == stream.dropped
  assert any("reasoning-gym fails" in note for note in stream.notes)
  assert workdir_lib._sampled(stream.records)


def test_training_does_not_ask_what_an_evaluation_asks(tokenizer):
  """Of coin_flip's few questions, many are in both splits."""
  spec = DatasetSpec("reasoning_gym:coin_flip", "test", size=100)
  problems = evaluator.load_problems("own", spec, tokenizer, 512, "<think>")
  data = config_lib.DataSpec(
      dataclasses.replace(spec, split="train", size=100), 50, 500
  )
  stream = prompts.PromptIterator(
      data, tokenizer, seed=0, asked=[problems.batch]
  )
  rows = set(prompts._rows(problems.batch.tokens, problems.batch.mask))
  trained = set()
  for _ in range(4):
    batch, _ = next(stream)
    trained |= set(prompts._rows(batch.tokens, batch.mask))
  assert trained and not trained & rows
  assert stream.reasons["asked"] == stream.dropped > 0
  assert any("evaluation set asks the same" in note for note in stream.notes)
  data = dataclasses.replace(data, train=spec)
  with pytest.raises(UserError, match="an evaluation set asks the same"):
    prompts.PromptIterator(data, tokenizer, seed=0, asked=[problems.batch])


def test_scores_are_partial_and_only_1_is_right():
  found = _read("letter_counting", "test", size=2)
  references = [found[i]["reference"] for i in range(2)]
  completions = evaluator.Completions(
      [[found[0]["answer"]], [f"{found[1]['answer']} of them"]],
      np.ones((2, 1), int),
      np.ones((2, 1), bool),
      np.zeros((2, 1)),
  )
  opening = "<think></think>"
  result = evaluator.summarize(completions, references, "gym", opening)
  assert result["accuracy"] == 0.5
  assert 0.5 < result["score"] < 1


def _config(models, **changes):
  config = toys.run_config(*models)
  train = DatasetSpec("reasoning_gym:chain_sum?max_terms=3", size=300)
  tested = DatasetSpec("reasoning_gym:gcd", "test", size=4)
  sets = dataclasses.replace(config.evaluation, sets={"other": tested})
  data = dataclasses.replace(config.data, train=train, max_prompt_len=300)
  return dataclasses.replace(config, data=data, evaluation=sets, **changes)


def test_the_fingerprint_names_the_version(models, monkeypatch):
  inputs = setup_lib.check(_config(models))
  read = functools.partial(
      workdir_lib.read_contents,
      _config(models),
      inputs.data.records,
      inputs.problems,
  )
  found = read()
  assert found["reasoning-gym"] == f"version {gym.version()}"
  monkeypatch.setattr(gym, "version", lambda: "9.9")
  said = workdir_lib.contents_difference(read(), found)
  assert "reasoning-gym with version 9.9" in said


_RUN = (
    "--config.steps=2",
    "--config.data.batch_size=4",
    "--config.data.max_prompt_len=300",
    "--config.rollout.max_len=16",
    "--config.prefix.buckets=(16,)",
    "--config.data.train.source=reasoning_gym:chain_sum?max_terms=3",
    "--config.data.train.answer=",
    "--config.data.train.size=0",
    "--config.evaluation.max_len=16",
    "--config.evaluation.every=0",
    "--config.evaluation.batch_size=4",
    "--config.evaluation.sets.heldout.source=reasoning_gym:gcd",
    "--config.evaluation.sets.heldout.size=4",
)


@pytest.mark.parametrize("method", ["prefix", "seqkd"])
def test_a_run_trains_on_one_task_and_is_graded_by_another(
    method, models, tmp_path
):
  student, teacher = models
  flags = (
      "--config=configs/math.py:tiny-weak",
      *_RUN,
      f"--config.method={method}",
      f"--config.student.path={student}",
      f"--config.teacher.path={teacher}",
      f"--workdir={tmp_path}",
  )
  if method == "seqkd":  # Random models end their answers by chance alone.
    flags += ("--config.steps=10", "--config.rollout.max_len=64")
  toys.finish(toys.start_run(*flags, devices=1), 300)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  graded = [line for line in found if line.get("mode") == "sampled"]
  assert graded[-1]["grading"] == "gym"
  assert {"accuracy", "score"} <= graded[-1].keys()
  kept = json.loads((tmp_path / "contents.json").read_text())
  assert kept["reasoning-gym"] == f"version {gym.version()}"


def test_sft_without_completions_is_one_sentence(models, tmp_path):
  student, teacher = models
  (ended,) = toys.end(
      toys.start_run(
          "--config=configs/math.py:tiny-weak",
          *_RUN,
          "--config.method=sft",
          f"--config.student.path={student}",
          f"--workdir={tmp_path}",
          devices=1,
      ),
      120,
  )
  assert ended[0] != 0
  assert "data.train.completion is empty" in ended[2]
