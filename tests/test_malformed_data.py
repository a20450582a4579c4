"""Malformed data and tokenizers: one sentence first, or a right reading."""

import dataclasses
import io
import time

import malformed_data
import pytest
import rich.console
import toys

from prefix_distill import errors
from prefix_distill import preflight
from prefix_distill.config import DatasetSpec
from prefix_distill.data import records
from prefix_distill.train import setup

CASES = malformed_data.cases()


def _config(case, source):
  """A run on the case as its records or as its student's tokenizer."""
  config = toys.run_config("bundled:teacher", "bundled:teacher")
  if case.name.startswith("tokenizer/"):
    student = dataclasses.replace(
        config.student, tokenizer=str(source), random_init=True
    )
    return dataclasses.replace(config, student=student, teacher=student)
  fields = {"answer": "answer", **case.fields}
  train = DatasetSpec(str(source), completion="completion")
  if case.fields:
    train = config.data.train
  heldout = DatasetSpec(str(source), **fields)
  return dataclasses.replace(
      config,
      data=dataclasses.replace(config.data, train=train),
      rollout=dataclasses.replace(
          config.rollout,
          source="student" if case.fields else "data",
          max_len=32,
      ),
      evaluation=dataclasses.replace(
          config.evaluation, sets={"heldout": heldout}
      ),
  )


def _preflight(config):
  out = io.StringIO()
  preflight.run(config, rich.console.Console(file=out))
  return out.getvalue()


def test_there_are_many_and_each_has_a_name():
  names = [case.name for case in CASES]
  assert len(set(names)) == len(names) >= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_sentence_or_a_right_reading(tmp_path, case):
  config = _config(case, case.write(tmp_path))
  if not case.says:
    inputs = setup.check(config)
    if isinstance(case.reads, tuple):
      assert inputs.fed[0].tokenizer.stop_ids == case.reads
    else:
      assert [records.last_turn(inputs.data.question)] == case.reads
      assert len(inputs.problems["heldout"].answers) == len(case.reads)
      assert inputs.problems["heldout"].answers[0] == malformed_data.ANSWER
    assert "The checks passed" in _preflight(config)
    return
  with pytest.raises(errors.UserError) as caught:
    setup.check(config)
  sentence = str(caught.value)
  for words in case.says:
    assert words in sentence
  assert sentence.endswith(".") and "\n" not in sentence
  assert len(sentence) < 700
  with pytest.raises(errors.UserError) as caught:
    _preflight(config)
  assert str(caught.value) == sentence


@pytest.mark.parametrize("field", ("question", "completion"))
@pytest.mark.parametrize("text", ("pens ", "x", "<|im_end|> "))
def test_a_line_of_32_megabytes_takes_seconds(tmp_path, field, text):
  path = tmp_path / "a.jsonl"
  long = malformed_data.line(**{field: text * (2**25 // len(text))})
  path.write_text(f"{long}\n{malformed_data.line()}\n")
  config = _config(malformed_data.Case("file/long", None), path)
  heldout = dataclasses.replace(
      config.evaluation.sets["heldout"], max_prompt_len=90
  )
  evaluation = dataclasses.replace(
      config.evaluation, sets={"heldout": heldout}
  )
  config = dataclasses.replace(config, evaluation=evaluation)
  start = time.monotonic()
  inputs = setup.check(config)
  assert time.monotonic() - start < 10
  assert inputs.problems["heldout"].dropped == (field == "question")
  batch, _ = next(inputs.data)
  assert set(batch.index) == {1}
  assert set(inputs.data.reasons) == {"long"}
