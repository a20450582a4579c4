"""The chain task: its problems, its solutions and its splits."""

import re

import pytest

from prefix_distill.config import DatasetSpec
from prefix_distill.data import bundled_tasks
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:chain-teacher")


def _matrix_answer(question: str) -> int:
  """Solves a question by its text: a product of 2x2 matrices."""
  numbers = [int(n) for n in re.findall(r"\d+", question)]
  signs = [1 if s == "+" else -1 for s in re.findall(r"[+-]", question)]
  # The last two numbers are (a, b) times the start.
  before, last = (1, 0), (0, 1)
  for i in range(28):
    sign = signs[i % 5]
    new = (before[0] + sign * last[0], before[1] + sign * last[1])
    before, last = last, new
  return (last[0] * numbers[0] + last[1] * numbers[1]) % 23


@pytest.mark.parametrize("split", bundled_tasks.SPLITS)
def test_answers_agree_with_a_product_of_matrices(split):
  for record in bundled_tasks.ChainTask(split, 500):
    assert record["answer"] == str(_matrix_answer(record["question"]))
    boxed = re.findall(r"\\boxed\{(\d+)\}", record["completion"])
    assert boxed == [record["answer"]]


def test_every_sum_follows_the_rule_and_the_sums_before_it():
  for record in bundled_tasks.ChainTask("train", 300):
    first, second = re.findall(r"\d+", record["question"])
    signs = re.findall(r"[+-]", record["question"])
    lines = re.findall(
        r"^(\d+): (\d+) ([+-]) (\d+) = (\d+)\.$",
        record["completion"],
        re.MULTILINE,
    )
    assert [int(line[0]) for line in lines] == list(range(1, 29))
    numbers = [first, second]
    for i, (_, a, sign, b, new) in enumerate(lines):
      assert [a, b] == numbers[-2:]
      assert sign == signs[i % 5]
      result = int(a) + int(b) if sign == "+" else int(a) - int(b)
      assert 0 <= int(new) < 23
      assert (result - int(new)) % 23 == 0
      numbers.append(new)


def test_an_early_error_changes_the_answer():
  """The start of a chain decides its end: no other start has its end."""
  for i in range(100):
    drawn = bundled_tasks.chain("test", i)
    right = bundled_tasks.chain_solution(drawn)[1]
    wrong = bundled_tasks.Chain(
        drawn.first, (drawn.second + 1) % 23, drawn.rule
    )
    changed = bundled_tasks.chain_solution(wrong)[1] != right
    # The end is a * first + b * second; b is 0 for few rules.
    b = _matrix_answer(re.sub(r"\d+, \d+", "0, 1", drawn.question))
    assert changed == (b != 0)


def test_splits_are_disjoint_and_all_chains_are_in_one():
  found = {
      split: {bundled_tasks.chain(split, i).question for i in range(3000)}
      for split in bundled_tasks.SPLITS
  }
  train, validation, test = found.values()
  assert not train & validation
  assert not train & test
  assert not validation & test
  assert len(train) > 2500
  assert min(len(validation), len(test)) > 1000


def test_a_record_depends_on_its_split_and_index_alone():
  for split in bundled_tasks.SPLITS:
    task = bundled_tasks.ChainTask(split, 10)
    assert list(task) == [
        bundled_tasks.ChainTask(split, 10_000)[i] for i in range(10)
    ]
    with pytest.raises(IndexError):
      task[10]
  first = [bundled_tasks.ChainTask(s, 1)[0] for s in bundled_tasks.SPLITS]
  assert len({record["question"] for record in first}) == 3


def test_a_completion_is_ten_times_its_prompt(tokenizer):
  for split in bundled_tasks.SPLITS:
    for record in bundled_tasks.ChainTask(split, 200):
      prompt = tokenizer.encode(tokenizer.prompt(record["question"], "<think>"))
      completion = tokenizer.encode(record["completion"])
      assert len(prompt) == 21
      assert len(completion) == 235
      assert len(completion) >= 10 * len(prompt)
      assert tokenizer.decode(completion) == record["completion"]


def test_the_chain_task_is_read_as_a_source():
  found = records.read(
      DatasetSpec("chain_task", "validation", answer="answer", size=20)
  )
  assert [r["question"] for r in found] == [
      bundled_tasks.chain("validation", i).question for i in range(20)
  ]


def test_unknown_split_is_refused():
  with pytest.raises(ValueError, match="no split 'dev'.*'validation'"):
    bundled_tasks.ChainTask("dev", 3)
  with pytest.raises(records.DataError, match="no split 'dev'"):
    records.read(DatasetSpec("chain_task", "dev", size=3))


def test_a_weak_solver_errs_in_the_same_few_sums():
  """Each sum has one result, right or wrong; answers are the clean ones."""
  results, right = {}, 0
  task = bundled_tasks.ChainTask("train", 1500, "weak")
  for record, clean in zip(
      task, bundled_tasks.ChainTask("train", 1500), strict=True
  ):
    assert record["question"] == clean["question"]
    assert record["answer"] == clean["answer"]
    right += f"boxed{{{clean['answer']}}}" in record["completion"]
    for text, new in re.findall(
        r": (\d+ [+-] \d+) = (\d+)\.", record["completion"]
    ):
      results.setdefault(text, set()).add(int(new))
  assert len(results) == 2 * (23**2 - 1)  # No chain has two zeros.
  assert all(len(found) == 1 for found in results.values())
  wrong = 0
  for text, found in results.items():
    a, sign, b = text.split()
    result = int(a) + int(b) if sign == "+" else int(a) - int(b)
    wrong += found != {result % 23}
  assert wrong == 50
  assert 0.10 < right / 1500 < 0.35


def test_unknown_style_is_refused():
  with pytest.raises(records.DataError, match="no style 'tidy'.*'weak'"):
    records.read(DatasetSpec("chain_task", subset="tidy", size=3))


def test_a_size_is_required():
  with pytest.raises(ConfigError, match="'chain_task', which has no end"):
    DatasetSpec("chain_task")
