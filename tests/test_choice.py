"""Records chosen from a stream: some, each once, drawn; memory stays bounded.

Also questions and suffixes that are templates over the record.
"""

import dataclasses
import itertools
import json
import pathlib
import random
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import toys

from prefix_distill.config import CheckpointSpec
from prefix_distill.config import DatasetSpec
from prefix_distill.config import DataSpec
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.report import report
from prefix_distill.train import loop

_SPEC = DatasetSpec(
    "x.jsonl",
    question="conversations.0.value",
    where=("domain=math",),
    distinct=True,
    random=True,
    size=40,
    seed=3,
)


def _rows(questions=120, answers=7, others=300):
  """Rows as OpenThoughts3 has them: many answers to each question."""
  rows = [
      {
          "difficulty": None,
          "source": "somewhere",
          "domain": "math",
          "conversations": [
              {"from": "human", "value": f"How many is {i} + {i}?"},
              {"from": "gpt", "value": f"Answer {j}. " * 50},
          ],
      }
      for i in range(questions)
      for j in range(answers)
  ]
  rows += [
      {**rows[0], "domain": "code", "conversations": [{"value": f"Code {i}."}]}
      for i in range(others)
  ]
  random.Random(0).shuffle(rows)
  return rows


def _write(directory: pathlib.Path, kind: str, rows) -> str:
  if kind == "directory":
    parts = [rows[i::4] for i in range(4)]
    (directory / "set").mkdir()
    for i, part in enumerate(parts):
      path = directory / "set" / f"train-{i:05}-of-00004.parquet"
      pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
    return str(directory / "set")
  path = directory / f"rows.{kind}"
  if kind == "parquet":
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=100)
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _questions(found: records.Records) -> list[str]:
  return [x["conversations"][0]["value"] for x in found]


def _expected(rows, spec) -> set[str]:
  """The choice by sorting all questions, as no stream can."""
  texts = {
      x["conversations"][0]["value"] for x in rows if x["domain"] == "math"
  }

  def rank(text: str) -> bytes:
    return records.random_key(spec.seed, records.random_key(text).hex())

  return set(sorted(texts, key=rank)[: spec.size])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory"])
def test_a_seeded_choice_of_distinct_questions(tmp_path, kind):
  rows = _rows()
  spec = dataclasses.replace(_SPEC, source=_write(tmp_path, kind, rows))
  found = records.read(spec)
  assert len(found) == 40 and len(set(_questions(found))) == 40
  assert set(_questions(found)) == _expected(rows, spec)
  assert _questions(records.read(spec)) == _questions(found)
  other = records.read(dataclasses.replace(spec, seed=4))
  assert set(_questions(other)) != set(_questions(found))


def test_the_choice_does_not_depend_on_order_or_number_of_duplicates(tmp_path):
  chosen = []
  for answers, seed in ((1, 0), (7, 1), (7, 2)):
    rows = _rows(answers=answers)
    random.Random(seed).shuffle(rows)
    path = tmp_path / str(seed)
    path.mkdir()
    spec = dataclasses.replace(_SPEC, source=_write(path, "jsonl", rows))
    chosen.append(set(_questions(records.read(spec))))
  assert chosen[0] == chosen[1] == chosen[2]


def test_without_random_the_first_of_each_question(tmp_path):
  rows = _rows()
  spec = dataclasses.replace(
      _SPEC, source=_write(tmp_path, "jsonl", rows), random=False
  )
  math = [
      x["conversations"][0]["value"] for x in rows if x["domain"] == "math"
  ]
  first = list(dict.fromkeys(math))
  assert _questions(records.read(spec)) == first[:40]
  every = records.read(dataclasses.replace(spec, size=0))
  assert _questions(every) == first and len(first) == 120


def test_a_random_choice_of_records_is_that_of_a_whole_read(tmp_path):
  """`where` alone draws by number; all records fit, so nothing changes."""
  rows = [{"question": f"q {i}", "kind": "a"} for i in range(200)]
  source = _write(tmp_path, "jsonl", rows)
  spec = DatasetSpec(source, size=30, random=True, seed=5)
  whole = records.read(spec)
  drawn = records.read(dataclasses.replace(spec, where=("kind=a",)))
  assert list(whole.numbers) == list(drawn.numbers)
  assert [*whole] == [dict(x, kind="a") for x in drawn]


def test_white_space_does_not_tell_questions_apart(tmp_path):
  rows = [{"question": x} for x in ("How many?", " How  many?\n", "How few?")]
  spec = DatasetSpec(_write(tmp_path, "jsonl", rows), distinct=True)
  assert [x["question"] for x in records.read(spec)] == [
      "How many?",
      "How few?",
  ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_is_that_of_the_chosen_records(tmp_path, kind):
  """3 times as many rows take no more memory, and far less than the file."""
  peaks = []
  for answers in (20, 60):
    rows = _rows(questions=100, answers=answers)
    for row in rows[:]:
      row["conversations"][-1]["value"] *= 4
    path = tmp_path / str(answers)
    path.mkdir()
    source = _write(path, kind, rows)
    spec = dataclasses.replace(_SPEC, source=source)
    records.read(spec)  # Imports, caches.
    text = sum(len(json.dumps(row)) for row in rows)
    del rows
    tracemalloc.start()
    found = records.read(spec)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert len(found) == 40 and "gpt" not in json.dumps([*found])
  assert peaks[1] < 1.3 * peaks[0] and peaks[1] < text / 4


def test_the_first_records_come_from_shards_that_lie_apart(tmp_path):
  """What preflight looks at is found although the first shards lack it."""
  (tmp_path / "set").mkdir()
  for i in range(6):
    domain = "math" if i == 4 else "code"
    rows = [
        {"question": f"{domain} {i} {j}", "domain": domain} for j in range(300)
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        tmp_path / "set" / f"train-{i:05}-of-00006.parquet",
    )
  spec = DatasetSpec(
      str(tmp_path / "set"), where=("domain=math",), distinct=True
  )
  found = records.read(spec, first=True)
  assert len(found) == records.FIRST and not found.is_whole
  assert all(x["question"].startswith("math 4") for x in found)


def test_what_no_record_holds_is_said_with_what_they_hold(tmp_path):
  source = _write(tmp_path, "jsonl", _rows())
  spec = dataclasses.replace(_SPEC, source=source, where=("domain=maths",))
  with pytest.raises(records.DataError, match="'code', 'math'"):
    records.read(spec)
  spec = dataclasses.replace(_SPEC, source=source, where=("topic=math",))
  with pytest.raises(records.DataError, match="no field 'topic'"):
    records.read(spec)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(where=("domain",)), "write each as 'FIELD=TEXT'"),
        (dict(where=("=math",)), "write each as 'FIELD=TEXT'"),
        (dict(where=("a=b", "a=c")), "name each field once"),
        (dict(source="math_task", size=9, distinct=True), "leave"),
        (dict(source="reasoning_gym:lcm", where=("a=b",)), "leave"),
    ],
)
def test_settings_that_choose_nothing(fields, words):
  with pytest.raises(ConfigError, match=words):
    DatasetSpec(**{"source": "x.jsonl", **fields})


def _stream(spec: DataSpec) -> prompts.PromptIterator:
  tokenizer = tokenizer_lib.load("bundled:guided")
  return prompts.PromptIterator(
      spec, tokenizer, seed=0, teacher_tokenizer=tokenizer
  )


def test_a_stream_of_chosen_records_resumes_exactly(tmp_path):
  rows = [
      {"problem": f"Ann has {i % 30} pens. Bob has {i % 7} cups.", "kind": "a"}
      for i in range(400)
  ]
  train = DatasetSpec(
      _write(tmp_path, "jsonl", rows),
      question="problem",
      where=("kind=a",),
      distinct=True,
      random=True,
      size=20,
  )
  spec = DataSpec(train, batch_size=4, max_prompt_len=40)
  stream = _stream(spec)
  for _ in range(3):
    next(stream)
  state = stream.get_state()
  after = [next(stream)[0].index.tolist() for _ in range(12)]
  again = _stream(spec)
  again.set_state(state)
  assert [next(again)[0].index.tolist() for _ in range(12)] == after
  assert len({*itertools.chain(*after)}) == 20


_TWO = [
    {
        "problem": f"Ann has {i} pens.",
        "start": start,
        "answer": str(i),
        "solution": f"Ann has {i} pens.",
    }
    for i in range(1, 9)
    for start in ("We want", "Ann")
]
_WORDS = DatasetSpec(
    "x", question="Take care. {problem}", answer="answer"
)


def test_questions_and_suffixes_are_filled_from_the_record(tmp_path):
  train = dataclasses.replace(
      _WORDS, source=_write(tmp_path, "jsonl", _TWO)
  )
  spec = DataSpec(
      train,
      batch_size=16,
      max_prompt_len=40,
      suffix="<think>{start}",
      teacher_prompt="{problem}\nSolution:\n{solution}",
      max_teacher_prompt_len=60,
  )
  stream = _stream(spec)
  assert stream.suffixes == ["<think>We want", "<think>Ann"]
  tokenizer = tokenizer_lib.load("bundled:guided")
  batch, _ = next(stream)
  for row in range(16):
    record = _TWO[int(batch.index[row])]
    own = tokenizer.encode_prompt(
        f"Take care. {record['problem']}", f"<think>{record['start']}"
    )
    assert batch.tokens[row][batch.mask[row]].tolist() == own
    theirs = tokenizer.encode_prompt(
        f"{record['problem']}\nSolution:\n{record['solution']}",
        f"<think>{record['start']}",
    )
    found = batch.teacher_tokens[row][batch.teacher_mask[row]].tolist()
    assert found == theirs
  problems = evaluator.load_problems(
      "heldout", train, tokenizer, 40, spec.suffix
  )
  assert problems.opening == "<think>"
  for row, record in enumerate(_TWO):
    tokens = problems.batch.tokens[row][problems.batch.mask[row]]
    assert tokenizer.decode(tokens.tolist()).endswith(
        f"<think>{record['start']}"
    )


def test_an_evaluation_set_without_the_suffixes_field_is_refused(tmp_path):
  train = dataclasses.replace(_WORDS, source=_write(tmp_path, "jsonl", _TWO))
  tokenizer = tokenizer_lib.load("bundled:guided")
  with pytest.raises(records.DataError, match="no field 'opening'"):
    evaluator.load_problems("x", train, tokenizer, 40, "<think>{opening}")


def test_every_filled_suffix_is_checked(tmp_path):
  """One record of many has a suffix that the template has already."""
  rows = [dict(x) for x in _TWO]
  rows[-1]["start"] = "Answer: "
  train = dataclasses.replace(_WORDS, source=_write(tmp_path, "jsonl", rows))
  stream = _stream(
      DataSpec(train, batch_size=4, max_prompt_len=40, suffix="<think>{start}")
  )
  assert "<think>Answer: " in stream.suffixes


def test_a_run_reads_the_choice_and_remembers_it(tmp_path):
  """Two processes' worth of reads agree, and so do the fingerprints."""
  source = _write(tmp_path, "directory", _rows())
  spec = dataclasses.replace(_SPEC, source=source)
  one, two = records.read(spec), records.read(spec)
  assert one.numbers == two.numbers
  assert [*one] == [*two]
  assert one.where(0) == f"{source} record {one.numbers[0] + 1}"
  assert np.all(np.diff(one.numbers) > 0)


def _updates(workdir: pathlib.Path) -> list[dict]:
  """The lines of a run's updates, without what depends on the clock."""
  variable = ("seconds", "tokens_per_second", "compilations")
  return [
      {k: v for k, v in line.items() if not k.startswith(variable)}
      for line in report.read_metrics(workdir / "metrics.jsonl")
      if "kl" in line
  ]


def test_a_run_of_drawn_records_goes_on_exactly(tmp_path, monkeypatch):
  def rows(first):
    return [
        {"question": f"Ann has {first + i % 20} pens.", "kind": "ab"[i % 3 > 1]}
        for i in range(90)
    ]

  source = _write(tmp_path, "jsonl", rows(0))
  train = DatasetSpec(
      source, where=("kind=a",), distinct=True, random=True, size=12, seed=3
  )
  config = toys.run_config(
      *toys.write_models(tmp_path),
      steps=4,
      data=DataSpec(train, batch_size=4, max_prompt_len=48),
      checkpoint=CheckpointSpec(every=1),
  )
  graded = dataclasses.replace(config.evaluation, sets={})
  config = dataclasses.replace(config, evaluation=graded)
  loop.train(config, tmp_path / "whole")
  update = loop.Run.update

  def stop_at_two(self, step):
    if step == 2:
      raise KeyboardInterrupt
    return update(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "update", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
      loop.train(config, tmp_path / "parts")
  # Other questions at the same place are another run.
  _write(tmp_path, "jsonl", rows(100))
  with pytest.raises(UserError, match="data.train"):
    loop.train(config, tmp_path / "parts")
  _write(tmp_path, "jsonl", rows(0))
  loop.train(config, tmp_path / "parts")
  whole = _updates(tmp_path / "whole")
  assert [line["step"] for line in whole] == [1, 2, 3, 4]
  assert _updates(tmp_path / "parts") == whole
