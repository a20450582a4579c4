"""The bundled task in several contexts, and the model that knows them."""

import json
import random
import re

import numpy as np
import pytest
import safetensors.numpy

from configs import bundled
from prefix_distill import assets
from prefix_distill.config import DatasetSpec
from prefix_distill.data import bundled_tasks
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib

_CONTEXTS = tuple(bundled_tasks.CONTEXTS)


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:guided")


def _completions(context, size=400):
  rng = random.Random(0)
  problems = [bundled_tasks.problem("test", i) for i in range(size)]
  return problems, [bundled_tasks.completion(p, context, rng) for p in problems]


def _boxed(text):
  return re.findall(r"\\boxed\{(\d+)\}", text)[-1]


def test_records_are_those_of_the_task():
  found = records.read(DatasetSpec("math_task", "test", "guided", size=20))
  plain = bundled_tasks.MathTask("test", 20)
  for record, clean in zip(found, plain, strict=True):
    assert record["question"] == clean["question"]
    assert record["answer"] == clean["answer"]
    assert record["prompt"] in [record[context] for context in _CONTEXTS]
    assert record["solution"] in record["shown"]
    assert f"= {record['answer']}.\n" in record["solution"]
  task = bundled_tasks.GuidedTask("test", 20)
  assert [task[i] for i in (19, 3)] == [found[19], found[3]]
  with pytest.raises(IndexError):
    task[20]
  with pytest.raises(ValueError, match="no split 'dev'"):
    bundled_tasks.GuidedTask("dev", 3)


def test_a_rewriting_shows_an_answer_and_wants_the_short_lines():
  wrong = 0
  for i, record in enumerate(bundled_tasks.RewriteTask("test", 200)):
    prob = bundled_tasks.problem("test", i)
    start, end = bundled_tasks.REWRITE.split("{answer}")
    asked, shown = record["prompt"].removesuffix(end).split("Solution:\n", 1)
    assert asked.endswith(start.split("}")[1].removesuffix("Solution:\n"))
    assert prob.question in asked and record["question"] == prob.question
    assert shown.startswith("\n") and "</think>" in shown
    wrong += _boxed(shown) != record["answer"]
    assert bundled_tasks.short_lines(prob) in record["completion"]
    assert _boxed(record["completion"]) == record["answer"]
  assert 20 < wrong < 100


def test_short_lines_are_right():
  for i in range(300):
    prob = bundled_tasks.problem("test", i)
    total = 0
    for line in bundled_tasks.short_lines(prob).splitlines():
      sums = re.findall(r": (\d+) ([+-]) (\d+) = (\d+)\.$", line)
      for before, sign, amount, after in sums:
        assert int(before) == total
        total += int(amount) if sign == "+" else -int(amount)
        assert int(after) == total
      if not sums:
        total = int(re.search(r"\d+", line)[0])
    assert total == prob.answer


@pytest.mark.parametrize("context", ("careful", "brief", "shown"))
def test_answers_are_right_where_they_should_be(context):
  problems, texts = _completions(context)
  assert all(
      _boxed(text) == str(p.answer)
      for p, text in zip(problems, texts, strict=True)
  )
  short = np.mean(["Step" not in text for text in texts])
  wanted = {"careful": (0.05, 0.2), "brief": (1, 1), "shown": (0, 0)}[context]
  assert wanted[0] <= short <= wanted[1]


def test_german_is_answered_worse_than_english():
  right = {}
  for context in ("question", "german"):
    problems, texts = _completions(context)
    right[context] = np.mean([
        _boxed(text) == str(p.answer)
        for p, text in zip(problems, texts, strict=True)
    ])
  assert 0.15 < right["german"] + 0.1 < right["question"] < 0.7


def test_german_says_the_same_in_as_many_words():
  question = (
      "Ann has 7 pens. The shop opens at 9. Bob is 9 years old. The pens cost 3"
      " dollars. Ann gives Bob 2 pens. How many pens does Ann have now?"
  )
  assert bundled_tasks.german(question) == (
      "Ann hat 7 Stifte. Der Laden öffnet um 9. Bob ist 9 Jahre alt. Die Stifte"
      " kosten 3 Dollar. Ann gibt Bob 2 Stifte. Wie viele Stifte hat Ann jetzt?"
  )


def test_every_word_of_every_context_is_one_token(tokenizer):
  pre_tokenizer = tokenizer.pretrained.backend_tokenizer.pre_tokenizer
  # But for these, which are a token for each of their two bytes.
  marks = {"?\u010a": "?\u010a", ":\u010a": ":\u010a"}
  for split in bundled_tasks.SPLITS:
    for record in bundled_tasks.GuidedTask(split, 300):
      texts = [record[context] for context in _CONTEXTS]
      for text in (*texts, *record["completion"].split("</think>")):
        pieces = [p for p, _ in pre_tokenizer.pre_tokenize_str(text)]
        pieces = [part for p in pieces for part in marks.get(p, [p])]
        ids = tokenizer.encode(text)
        tokens = tokenizer.pretrained.convert_ids_to_tokens(ids)
        assert tokens == pieces


def test_the_tokenizer_goes_on_from_the_others(tokenizer, tmp_path):
  vocab = tokenizer.pretrained.get_vocab()
  teacher = tokenizer_lib.load("bundled:teacher")
  assert teacher.pretrained.get_vocab().items() <= vocab.items()
  assert len(vocab) == teacher.num_tokens + len(bundled_tasks.WORDS)
  assert tokenizer.stop_ids == teacher.stop_ids
  assert tokenizer.special_ids == teacher.special_ids
  made = bundled.make_tokenizer("<|im_end|>", bundled_tasks.WORDS)
  made.save_pretrained(tmp_path)
  shipped = (assets.path("guided") / "tokenizer.json").read_text()
  assert (tmp_path / "tokenizer.json").read_text() == shipped


def test_new_words_start_as_words_that_are_known(tmp_path):
  bundled.make_guided(tmp_path / "start")
  name = "model.embed_tokens.weight"
  old, new = (
      safetensors.numpy.load_file(path / "model.safetensors")
      for path in (assets.path("teacher"), tmp_path / "start")
  )
  tokenizer = tokenizer_lib.load(str(tmp_path / "start"))
  count = len(old[name])
  np.testing.assert_array_equal(new[name][:count], old[name])
  (pens,), (stifte,) = tokenizer.encode(" pens"), tokenizer.encode(" Stifte")
  assert stifte >= count
  np.testing.assert_array_equal(new[name][stifte], old[name][pens])
  settings = json.loads((tmp_path / "start" / "config.json").read_text())
  assert settings["vocab_size"] == len(new[name]) == tokenizer.num_tokens
