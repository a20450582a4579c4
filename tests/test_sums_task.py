"""The sums task: its problems, its solutions and its splits."""

import ast
import re

import pytest

from prefix_distill.config import DatasetSpec
from prefix_distill.data import bundled_tasks
from prefix_distill.data import records


def _value(text: str) -> int:
  assert re.fullmatch(r"\d+( [+-] \d+)+", text)
  found = 0
  for term in re.findall(r"[+-]?\d+", text.replace(" ", "")):
    found += ast.literal_eval(term.removeprefix("+"))
  return found


@pytest.mark.parametrize("split", bundled_tasks.SPLITS)
def test_answers_and_every_sum_on_the_way_are_right(split):
  for record in bundled_tasks.SumsTask(split, 500):
    assert record["answer"] == str(_value(record["question"]))
    *lines, last = record["completion"].split("\n")
    assert last == rf"\boxed{{{record['answer']}}}"
    total, numbers = None, re.findall(r"[+-] \d+", record["question"])
    assert len(lines) == len(numbers) == 5
    for line, number in zip(lines, numbers, strict=True):
      left, right = line.split(" = ")
      assert _value(left) == int(right)
      assert 0 <= int(right) <= 40
      assert left.endswith(number)
      assert total is None or left.split()[0] == total
      total = right
    assert total == record["answer"]


def test_messages_hold_the_question():
  record = bundled_tasks.SumsTask("train", 1)[0]
  system, user = record["messages"]
  assert system["role"] == "system" and user["role"] == "user"
  assert user["content"] == record["question"]


def test_no_question_is_in_two_splits():
  found = [
      {record["question"] for record in bundled_tasks.SumsTask(split, 2000)}
      for split in bundled_tasks.SPLITS
  ]
  assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
  assert all(len(one) > 1900 for one in found)


def test_it_is_read_as_a_source():
  spec = DatasetSpec("sums_task", "test", question="messages", size=3)
  assert len(records.read(spec)) == 3
  with pytest.raises(records.DataError, match="no split 'dev'"):
    records.read(DatasetSpec("sums_task", "dev", size=3))
  with pytest.raises(records.DataError, match="no style 'tidy'"):
    records.read(DatasetSpec("sums_task", subset="tidy", size=3))
