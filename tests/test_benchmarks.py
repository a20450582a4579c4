"""The paper's benchmarks, read from small local copies of the same schema."""

import collections
import dataclasses
import re

import numpy as np
import pytest
import schemas

from prefix_distill.config import DatasetSpec
from prefix_distill.config import EvaluationSpec
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.records import DataError
from prefix_distill.errors import ConfigError
from prefix_distill.evaluate import evaluator
from prefix_distill.evaluate import grading

# What seed 0 draws. Scores of other days are only comparable while it does.
_PINNED_NUMBERS = [8, 9, 10, 13, 14, 17]
_PINNED_LETTERS = "CDACDCBBBBBA"

_LETTERED = ("gpqa", "mmlu_pro")
names = pytest.mark.parametrize("name", evaluator.SETS)


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:teacher")


@pytest.fixture
def copy(tmp_path, monkeypatch):
  """Writes a local copy and returns the set's spec with it for the hub id."""
  import datasets

  monkeypatch.setattr(
      datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache")
  )

  def write(name, rows, kind="jsonl", **changes):
    source = schemas.write(name, kind, tmp_path, rows)
    spec = dataclasses.replace(evaluator.SETS[name], source=source)
    return dataclasses.replace(spec, **changes)

  return write


def _problems(spec, tokenizer, name="set"):
  return evaluator.load_problems(name, spec, tokenizer, 512, "<think>")


def _prompts(problems, tokenizer):
  batch = problems.batch
  return [
      tokenizer.decode(row[mask].tolist())
      for row, mask in zip(batch.tokens, batch.mask, strict=True)
  ]


def _refusal(spec, tokenizer):
  with pytest.raises(DataError) as error:
    _problems(spec, tokenizer)
  sentence = str(error.value)
  assert sentence.endswith(".") and "\n" not in sentence
  return sentence


def test_the_protocol_is_the_papers():
  spec = EvaluationSpec(dict(evaluator.SETS), **evaluator.PROTOCOL)
  assert (spec.max_len, spec.temperature, spec.top_p) == (16_384, 1, 1)
  assert (spec.top_k, spec.greedy) == (0, False)
  samples = {name: s.samples for name, s in spec.sets.items()}
  assert samples == {
      "math500": 4,
      "aime24": 16,
      "aime25": 16,
      "gpqa": 4,
      "mmlu_pro": 4,
      "hmmt": 16,
      "amc": 16,
  }
  sizes = {n: s.size for n, s in spec.sets.items() if s.size or s.random}
  assert sizes == {"mmlu_pro": 500} and spec.sets["mmlu_pro"].random
  lettered = {n for n, s in spec.sets.items() if s.grading == "letter"}
  assert lettered == set(_LETTERED)


def test_the_data_sets_are_pinned():
  pinned = {
      name: (spec.source, spec.subset, spec.split)
      for name, spec in evaluator.SETS.items()
  }
  assert pinned == {
      "math500": ("HuggingFaceH4/MATH-500", "", "test"),
      "aime24": ("HuggingFaceH4/aime_2024", "", "train"),
      "aime25": ("math-ai/aime25", "", "test"),
      "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
      "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "", "test"),
      "hmmt": ("MathArena/hmmt_feb_2025", "", "train"),
      "amc": ("math-ai/amc23", "", "test"),
  }


@names
@pytest.mark.parametrize("kind", ("directory", "jsonl", "parquet"))
def test_every_set_is_read_and_encoded_and_graded(name, kind, copy, tokenizer):
  rows = schemas.rows(name, 5)
  spec = copy(name, rows, kind)
  problems = _problems(spec, tokenizer, name)
  assert problems.samples == spec.samples and problems.dropped == 0
  assert problems.grading == ("letter" if name in _LETTERED else "math")
  for row, prompt in zip(rows, _prompts(problems, tokenizer), strict=True):
    assert row[spec.question] in prompt
    assert prompt.endswith("<|im_start|>assistant\n<think>")
  wrong = "Z" if name in _LETTERED else "-1"
  texts = [
      [f"</think> It is \\boxed{{{a}}}.", f"</think> It is \\boxed{{{wrong}}}."]
      for a in problems.answers
  ]
  summary = evaluator.summarize(
      evaluator.Completions(
          texts, np.full((5, 2), 9), np.full((5, 2), True), np.zeros((5, 2))
      ),
      problems.answers,
      problems.grading,
  )
  assert summary["accuracy"] == 0.5
  # Every record differs, so one's answer is wrong for the next.
  if name not in _LETTERED:
    assert not grading.is_correct(texts[0][0], problems.answers[1])


@pytest.mark.parametrize("name", _LETTERED)
def test_options_are_lettered_and_the_letter_is_the_right_ones(
    name, copy, tokenizer
):
  rows = schemas.rows(name, 12)
  problems = _problems(copy(name, rows), tokenizer)
  for row, prompt, letter in zip(
      rows, _prompts(problems, tokenizer), problems.answers, strict=True
  ):
    lines = dict(re.findall(r"^([A-Z])\. (.*)$", prompt, re.MULTILINE))
    if name == "gpqa":
      options = [v.strip() for k, v in row.items() if "Answer" in k]
      assert lines[letter] == row["Correct Answer"].strip()
      assert sorted(lines.values()) == sorted(options)
    else:
      assert list(lines.values()) == row["options"]
      assert lines[letter] == row["options"][row["answer_index"]]
    assert list(lines) == list("ABCDEFGHIJ"[: len(lines)])
    assert "letter of the right option in \\boxed{}" in prompt


def test_gpqas_letters_are_balanced_and_always_the_same(copy, tokenizer):
  rows = schemas.rows("gpqa", 400)
  spec = copy("gpqa", rows)
  found = _problems(spec, tokenizer)
  assert _problems(spec, tokenizer).answers == found.answers
  counts = collections.Counter(found.answers)
  assert set(counts) == set("ABCD")
  # 100 each by chance, with a deviation of 8.7.
  assert all(65 <= count <= 135 for count in counts.values())
  assert "".join(found.answers[:12]) == _PINNED_LETTERS
  other = _problems(dataclasses.replace(spec, seed=1), tokenizer)
  same = sum(a == b for a, b in zip(found.answers, other.answers, strict=True))
  assert 60 <= same <= 140
  # A question's order does not depend on the other questions.
  fewer = _problems(copy("gpqa", rows[7:9]), tokenizer)
  assert fewer.answers == found.answers[7:9]


def test_the_random_questions_are_always_the_same_and_not_the_first(copy):
  rows = schemas.rows("mmlu_pro", 2000)
  spec = copy("mmlu_pro", rows)
  found = records.read(spec)
  assert len(found) == 500
  taken = list(found.numbers)
  assert taken == sorted(set(taken)) and taken != list(range(500))
  assert [r["question_id"] for r in found] == [70 + n for n in taken]
  # By chance 125 from each quarter, with a deviation of 8.4.
  quarters = np.bincount(np.array(taken) // 500)
  assert len(quarters) == 4 and (abs(quarters - 125) < 35).all()
  assert list(records.read(spec).numbers) == taken
  assert taken[:6] == _PINNED_NUMBERS
  other = records.read(dataclasses.replace(spec, seed=1)).numbers
  assert 80 < len(set(other) & set(taken)) < 170
  first = records.read(dataclasses.replace(spec, random=False))
  assert list(first.numbers) == list(range(500))
  whole = records.read(dataclasses.replace(spec, size=2000))
  assert list(whole.numbers) == list(range(2000))


def test_formats_draw_the_same_random_questions(copy):
  rows = schemas.rows("mmlu_pro", 60)
  drawn = [
      [
          r["question_id"]
          for r in records.read(copy("mmlu_pro", rows, kind, size=20))
      ]
      for kind in ("directory", "jsonl", "parquet")
  ]
  assert drawn[0] == drawn[1] == drawn[2] and len(drawn[0]) == 20


@names
def test_a_missing_field_is_named_with_those_there_are(name, copy, tokenizer):
  spec = evaluator.SETS[name]
  for field in {spec.question, spec.answer, *spec.choices}:
    rows = [
        {("other" if k == field else k): v for k, v in row.items()}
        for row in schemas.rows(name, 3)
    ]
    for kind in ("jsonl", "directory"):
      sentence = _refusal(copy(name, rows, kind), tokenizer)
      assert f"has no field {field!r}; it has" in sentence
      assert "other" in sentence


@pytest.mark.parametrize("name", _LETTERED)
def test_an_empty_field_is_named(name, copy, tokenizer):
  rows = schemas.rows(name, 3)
  field = evaluator.SETS[name].choices[-1]
  rows[2][field] = None
  for kind in ("jsonl", "directory"):
    sentence = _refusal(copy(name, rows, kind), tokenizer)
    assert f" 3 has nothing in its field {field!r}" in sentence


@pytest.mark.parametrize(
    "options, shown",
    [
        ("A. one B. two", "'A. one B. two'"),
        (["one"], "['one']"),
        ([1, 2, 3], "[1, 2, 3]"),
        ([["one"], ["two"]], "[['one'], ['two']]"),
        (["x"] * 27, "['x', 'x'"),
        ({"text": ["one", "two"]}, "{'text': ['one', 'two']}"),
    ],
)
def test_options_that_are_not_a_list_of_texts_are_refused(
    options, shown, copy, tokenizer
):
  rows = schemas.rows("mmlu_pro", 3)
  rows[1]["options"] = options
  sentence = _refusal(copy("mmlu_pro", rows), tokenizer)
  assert "mmlu_pro.jsonl record 2 has" in sentence
  assert shown in sentence and "in field 'options'" in sentence
  assert "a list of 2 to 26 texts" in sentence


@pytest.mark.parametrize(
    "answer", ["D", "", "AB", "1", 3, -1, "option 1 of 0", "(A)"]
)
def test_answers_that_are_none_of_the_letters_are_refused(
    answer, copy, tokenizer
):
  rows = schemas.rows("mmlu_pro", 1)
  rows[0]["answer"] = answer
  sentence = _refusal(copy("mmlu_pro", rows), tokenizer)
  assert f"record 1 has {str(answer)!r} in field 'answer'" in sentence
  assert "letters A to C of its 3 options" in sentence


def test_a_letter_may_be_lower_case(copy, tokenizer):
  rows = schemas.rows("mmlu_pro", 1)
  rows[0]["answer"] = " b "
  assert _problems(copy("mmlu_pro", rows), tokenizer).answers == ["B"]


def test_an_integer_is_the_number_of_the_right_option(copy, tokenizer):
  rows = schemas.rows("mmlu_pro", 8)
  wanted = [row["answer"] for row in rows]
  for row in rows:
    row["answer"] = row["answer_index"]
  assert _problems(copy("mmlu_pro", rows), tokenizer).answers == wanted


def test_sentences_number_random_records_as_the_source_does(copy, tokenizer):
  rows = schemas.rows("mmlu_pro", 50)
  spec = copy("mmlu_pro", rows, size=5)
  bad = records.read(spec).numbers[3]
  assert bad > 4
  rows[bad]["answer"] = "?"
  assert f"record {bad + 1} has '?'" in _refusal(
      copy("mmlu_pro", rows, size=5), tokenizer
  )


@names
def test_a_local_copy_that_changes_is_read_again(
    name, copy, tokenizer, tmp_path
):
  rows = schemas.rows(name, 6)
  spec = copy(name, rows[:3], "directory")
  assert len(records.read(spec)) == 3
  assert len(records.read(copy(name, rows[:5], "directory"))) == 5
  other = schemas.write(name, "directory", tmp_path / "other", rows[4:])
  assert [
      r[spec.question]
      for r in records.read(dataclasses.replace(spec, source=other))
  ] == [r[spec.question] for r in rows[4:]]


def test_a_directory_of_bare_files_has_no_subset(copy, tokenizer, tmp_path):
  rows = schemas.rows("gpqa", 4)
  spec = copy("gpqa", rows)
  schemas.write_csv(tmp_path / "bare" / "gpqa_diamond.csv", rows)
  bare = dataclasses.replace(spec, source=str(tmp_path / "bare"))
  sentence = _refusal(bare, tokenizer)
  assert "gpqa_diamond" in sentence and str(tmp_path / "bare") in sentence
  bare = dataclasses.replace(bare, subset="")
  assert (
      _problems(bare, tokenizer).answers == _problems(spec, tokenizer).answers
  )


def test_a_set_may_have_room_of_its_own(copy, tokenizer):
  rows = schemas.rows("aime25", 3)
  rows[1]["problem"] = "Ann has 7 pens. " * 60
  long = len(tokenizer.encode(tokenizer.prompt(rows[1]["problem"], "<think>")))
  assert 256 < long < 512
  spec = copy("aime25", rows)

  def load(own, default=128):
    return evaluator.load_problems(
        "aime25",
        dataclasses.replace(spec, max_prompt_len=own),
        tokenizer,
        default,
        "<think>",
    )

  found = load(8192)
  assert found.dropped == 0
  # As long as needed, and a multiple of 128.
  assert found.batch.tokens.shape == (3, -(-long // 128) * 128)
  assert rows[1]["problem"] in _prompts(found, tokenizer)[1]
  assert load(long).batch.tokens.shape == (3, long)
  shared = load(0)
  assert shared.dropped == 1 and shared.batch.tokens.shape == (2, 128)
  assert shared.batch.index.tolist() == [0, 2]
  for own, default, named in (
      (5, 128, "evaluation.sets.aime25.max_prompt_len 5"),
      (0, 6, "data.max_prompt_len 6"),
  ):
    with pytest.raises(DataError) as error:
      load(own, default)
    assert "all 3 prompts" in str(error.value) and named in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"random": True}, ("dataset.random is True", "dataset.size is 0")),
        (
            {"source": "math_task", "random": True, "size": 5},
            ("dataset.source is 'math_task'",),
        ),
        ({"choices": ("a", "a")}, ("dataset.choices is ('a', 'a')", "once")),
        ({"choices": ("a", "")}, ("dataset.choices is ('a', '')",)),
        (
            {"choices": ("options",), "answer": "options"},
            ("dataset.choices is ('options',)", "dataset.answer", "letter"),
        ),
        ({"max_prompt_len": -1}, ("dataset.max_prompt_len is -1",)),
    ],
)
def test_specs_that_cannot_work_are_refused(changes, words):
  with pytest.raises(ConfigError) as error:
    DatasetSpec(**{"source": "a.jsonl", **changes})
  for word in words:
    assert word in str(error.value)
  assert str(error.value).endswith(".")


def test_a_question_of_multiple_choice_reads_so():
  spec = evaluator.SETS["mmlu_pro"]
  record = {
      "question": "Which of these is a noble gas?\n",
      "answer": "B",
      "options": ["Nitrogen", " Neon"],
  }
  question, letter = records.multiple_choice(record, spec, "record 1")
  assert letter == "B"
  text = records.__doc__
  shown = "\n".join(
      line.removeprefix("  ")
      for line in text[text.index("  Which") :].splitlines()
  )
  assert question == shown.strip()
