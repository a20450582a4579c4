"""Records, tokenizers and batches of prompts."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from prefix_distill import assets
from prefix_distill.config import DatasetSpec
from prefix_distill.config import DataSpec
from prefix_distill.data import bundled_tasks
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.data.records import DataError
from prefix_distill.data.tokenizer import TokenizerError
from prefix_distill.errors import ConfigError
from prefix_distill.structs import PromptBatch

_RECORDS = [
    {
        "question": f"Ann has {n} pens?",
        "answer": str(n),
        "turns": [{"text": f"{n}?"}],
    }
    for n in range(5)
]


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:teacher")


def _write_jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _write_parquet(path, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return str(path)


def _write_jsonl_directory(path, rows):
  path.mkdir()
  _write_jsonl(path / "train.jsonl", rows)
  _write_jsonl(path / "test.jsonl", rows[:1])
  return str(path)


def _write_parquet_directory(path, rows):
  path.mkdir()
  _write_parquet(path / "train-00000-of-00002.parquet", rows[:3])
  _write_parquet(path / "train-00001-of-00002.parquet", rows[3:])
  return str(path)


_WRITERS = {
    "a.jsonl": _write_jsonl,
    "a.parquet": _write_parquet,
    "jsonl": _write_jsonl_directory,
    "parquet": _write_parquet_directory,
}
formats = pytest.mark.parametrize("name", _WRITERS)


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes records in one of the formats; data sets are cached nowhere."""
  import datasets

  monkeypatch.setattr(
      datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache")
  )
  return lambda name, rows: _WRITERS[name](tmp_path / name, rows)


def _refusal(spec):
  with pytest.raises(DataError) as error:
    records.read(spec)
  assert "\n" not in str(error.value)
  return str(error.value)


@formats
def test_every_format_gives_the_same_records(name, write):
  source = write(name, _RECORDS)
  assert list(records.read(DatasetSpec(source))) == _RECORDS


@formats
def test_size_takes_the_first_records(name, write):
  source = write(name, _RECORDS)
  first = records.read(DatasetSpec(source, size=2))
  assert len(first) == 2
  assert list(first) == _RECORDS[:2]
  with pytest.raises(IndexError):
    first[2]
  assert list(records.read(DatasetSpec(source, size=9))) == _RECORDS


@formats
def test_dotted_names_reach_into_lists(name, write):
  source = write(name, _RECORDS)
  found = records.read(DatasetSpec(source, question="turns.0.text"))
  wanted = ["0?", "1?", "2?", "3?", "4?"]
  assert [records.field(r, "turns.0.text") for r in found] == wanted
  message = _refusal(DatasetSpec(source, question="turns.1.text"))
  assert "'turns.1.text'" in message
  assert "question, answer, turns" in message


@pytest.mark.parametrize(
    "name", ("b", "a.x", "a.2", "a.0.c", "a.0.b.0", "a.0.b.x", "")
)
def test_fields_that_are_not_there_are_named(name):
  with pytest.raises(KeyError, match=f"'{name}'"):
    records.field({"a": [{"b": "text"}]}, name)


@formats
def test_a_missing_field_is_named_with_those_there_are(name, write):
  source = write(name, _RECORDS)
  message = _refusal(DatasetSpec(source, answer="solution"))
  assert message.startswith(source)
  assert "no field 'solution'" in message
  assert "question, answer, turns" in message


def test_a_missing_field_of_one_line_is_named_with_its_line(write, tmp_path):
  odd = {"question": "?", "reply": "4"}
  source = write("a.jsonl", [*_RECORDS, odd])
  assert len(records.read(DatasetSpec(source))) == 6
  message = _refusal(DatasetSpec(source, answer="answer"))
  assert f"{source} line 6 has no field 'answer'" in message
  assert "it has question, reply" in message
  lines = (tmp_path / "a.jsonl").read_text().splitlines()
  (tmp_path / "a.jsonl").write_text("\n\n" + "\n\n".join(lines))
  message = _refusal(DatasetSpec(source, answer="answer"))
  assert f"{source} line 13 has no field 'answer'" in message


def test_blank_lines_are_no_records(write, tmp_path):
  source = write("a.jsonl", _RECORDS)
  text = (tmp_path / "a.jsonl").read_text()
  (tmp_path / "a.jsonl").write_text(text.replace("\n", "\n \n\n"))
  assert list(records.read(DatasetSpec(source))) == _RECORDS


@pytest.mark.parametrize(
    "line, what",
    (
        ('{"question": 1', "is not JSON"),
        ("question: 1", "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('"text"', "is not a JSON object"),
    ),
)
def test_bad_json_is_refused_with_its_line(line, what, tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(f'{{"question": "1"}}\n\n{line}\n')
  assert f"{path} line 3 {what}" in _refusal(DatasetSpec(str(path)))


@pytest.mark.parametrize("name", ("a.jsonl", "a.parquet"))
def test_files_that_are_not_there_are_named(name, tmp_path):
  path = tmp_path / name
  assert f"{path} does not exist" in _refusal(DatasetSpec(str(path)))


@pytest.mark.parametrize("name", ("a.jsonl", "a.parquet"))
def test_files_of_another_kind_are_refused(name, tmp_path):
  path = tmp_path / name
  path.write_bytes(b"\xff\xfe\x00PAR1 nothing of the kind")
  message = _refusal(DatasetSpec(str(path)))
  assert f"{path} cannot be read as {name[2:]}" in message


@pytest.mark.parametrize("text", ("", "\n\n"))
def test_files_without_records_are_refused(text, tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(text)
  assert f"{path} has no records" in _refusal(DatasetSpec(str(path)))


def test_tables_without_rows_are_refused(tmp_path):
  path = tmp_path / "a.parquet"
  table = pyarrow.table({"question": pyarrow.array([], pyarrow.string())})
  pyarrow.parquet.write_table(table, path)
  assert f"{path} has no records" in _refusal(DatasetSpec(str(path)))


def test_splits_of_a_data_set_are_told_apart(write):
  source = write("jsonl", _RECORDS)
  found = records.read(DatasetSpec(source, split="test"))
  assert list(found) == _RECORDS[:1]
  message = _refusal(DatasetSpec(source, split="dev"))
  assert source in message
  assert "'dev'" in message


@pytest.mark.parametrize("name", ("jsonl", "parquet"))
def test_a_null_in_a_column_is_refused_with_its_record(name, write):
  rows = [row | {"answer": row["answer"]} for row in _RECORDS]
  rows[3]["answer"] = None
  source = write(name, rows)
  message = _refusal(DatasetSpec(source, answer="answer"))
  assert f"{source} record 4 has nothing in its field 'answer'" in message
  assert len(records.read(DatasetSpec(source))) == 5


@formats
def test_integers_are_answers_and_no_questions(name, write):
  source = write(name, [{"question": "?", "n": n} for n in range(5)])
  found = records.read(DatasetSpec(source, answer="n"))
  assert [records.gold(r, "n", "a") for r in found] == list("01234")
  message = _refusal(DatasetSpec(source, question="n"))
  assert "0 (int) in field 'n', which is no text" in message


def test_the_math_task_is_a_source():
  spec = DatasetSpec("math_task", "test", "weak", size=3)
  found = records.read(spec)
  assert list(found) == list(bundled_tasks.MathTask("test", 3, "weak"))
  clean = records.read(dataclasses.replace(spec, subset=""))
  assert list(clean) == list(bundled_tasks.MathTask("test", 3))
  for changes, named in (
      ({"split": "dev"}, "'dev'"),
      ({"subset": "tidy"}, "'tidy'"),
  ):
    assert named in _refusal(dataclasses.replace(spec, **changes))


def _tokenizer_directory(tmp_path, name="teacher"):
  return shutil.copytree(assets.path(name), tmp_path / name)


def _edit(file, **changes):
  settings = json.loads(file.read_text()) | changes
  settings = {k: v for k, v in settings.items() if v is not None}
  file.write_text(json.dumps(settings))


def test_prompts_have_the_chat_form_and_the_suffix(tokenizer):
  assert tokenizer.prompt("How many?", "<think>") == (
      "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>"
  )


def test_stop_tokens_come_from_tokenizer_and_generation_config(tmp_path):
  directory = _tokenizer_directory(tmp_path)
  end_text, end_turn = (
      tokenizer_lib.load(str(directory)).encode(t)[0]
      for t in ("<|endoftext|>", "<|im_end|>")
  )
  file = directory / "generation_config.json"
  for listed, stops in (
      (end_text, {end_text, end_turn}),
      ([end_turn, end_text], {end_text, end_turn}),
      (end_turn, {end_turn}),
      (None, {end_turn}),
  ):
    _edit(file, eos_token_id=listed)
    found = tokenizer_lib.load(str(directory))
    assert found.stop_ids == tuple(sorted(stops))
    assert found.pad_id == end_text
  file.unlink()
  assert tokenizer_lib.load(str(directory)).stop_ids == (end_turn,)


def test_a_tokenizer_without_a_stop_token_is_refused(tmp_path):
  directory = _tokenizer_directory(tmp_path)
  _edit(directory / "tokenizer_config.json", eos_token=None)
  listed = tokenizer_lib.load(str(directory))
  assert listed.stop_ids == (listed.encode("<|im_end|>")[0],)
  _edit(directory / "generation_config.json", eos_token_id=None)
  with pytest.raises(TokenizerError, match=f"{directory}: .*eos_token"):
    tokenizer_lib.load(str(directory))


def test_padding_without_a_pad_token_is_a_stop_token(tmp_path):
  directory = _tokenizer_directory(tmp_path)
  _edit(directory / "tokenizer_config.json", pad_token=None)
  found = tokenizer_lib.load(str(directory))
  assert found.pad_id == found.stop_ids[0]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
  directory = _tokenizer_directory(tmp_path)
  (directory / "chat_template.jinja").unlink()
  with pytest.raises(TokenizerError) as error:
    tokenizer_lib.load(str(directory))
  assert f"{directory}: the tokenizer has no chat template" in str(error.value)


@pytest.mark.parametrize("text", (None, "", '{"model": '))
def test_missing_and_broken_tokenizers_are_refused(text, tmp_path):
  directory = _tokenizer_directory(tmp_path)
  (directory / "tokenizer.json").unlink()
  if text is not None:
    (directory / "tokenizer.json").write_text(text)
  with pytest.raises(TokenizerError) as error:
    tokenizer_lib.load(str(directory))
  assert str(error.value).startswith(f"{directory}: the tokenizer cannot be")
  assert "\n" not in str(error.value)


def test_models_may_stop_differently_but_not_tokenize_differently(
    tokenizer, tmp_path
):
  base = tokenizer_lib.load("bundled:capable")
  assert base.stop_ids != tokenizer.stop_ids
  tokenizer_lib.check_same(base, tokenizer)
  directory = _tokenizer_directory(tmp_path)
  vocab = tokenizer.pretrained.get_vocab()
  first, second = sorted(
      (vocab[tokenizer.pretrained.tokenize(w)[0]], w)
      for w in (" pens", " cups")
  )
  file = directory / "tokenizer.json"
  text = file.read_text()
  for word, other in (("pens", "?"), ("cups", "pens"), ("?", "cups")):
    text = text.replace(f'"Ġ{word}"', f'"Ġ{other}"')
  file.write_text(text)
  changed = tokenizer_lib.load(str(directory))
  assert changed.encode(first[1]) == [second[0]]
  with pytest.raises(TokenizerError) as error:
    tokenizer_lib.check_same(changed, tokenizer)
  message = str(error.value)
  assert f"id {first[0]} is 'Ġ{second[1][1:]}' for the student" in message
  assert f"and 'Ġ{first[1][1:]}' for the teacher" in message
  assert str(directory) in message and "bundled:teacher" in message


def test_a_vocabulary_that_is_longer_differs_in_its_first_extra_token(
    tokenizer, tmp_path
):
  directory = _tokenizer_directory(tmp_path)
  longer = tokenizer_lib.load(str(directory))
  longer.pretrained.add_tokens(["<extra>", "<more>"])
  with pytest.raises(TokenizerError) as error:
    tokenizer_lib.check_same(tokenizer, longer)
  wanted = f"id {tokenizer.num_tokens} is None for the student and '<extra>'"
  assert wanted in str(error.value)


def test_an_answer_ends_before_its_stop_token(tokenizer):
  tokens = np.array(tokenizer.encode("Ann has 7 pens.<|im_end|><|endoftext|>"))
  mask = np.arange(len(tokens)) < len(tokens) - 1
  assert tokenizer.answer(tokens, mask) == "Ann has 7 pens."


_LONG = "Ann has 7 pens. " * 20
_COUNT = 12


@pytest.fixture
def questions(tmp_path):
  """Writes questions of different lengths; the numbered ones are too long."""

  def write(too_long=()):
    rows = [
        {
            "question": _LONG if n in too_long else "Ann has 7 pens. " * (n % 3)
            + f"How many {n}?",
            "completion": "We add. " * (n % 4) + f"\n</think>\n\n{n}",
        }
        for n in range(_COUNT)
    ]
    source = _write_jsonl(tmp_path / "questions.jsonl", rows)
    train = DatasetSpec(source, completion="completion")
    return DataSpec(train, batch_size=4, max_prompt_len=30)

  return write


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _order(iterator, count):
  return np.concatenate([b.index for b, _ in _take(iterator, count)]).tolist()


def _text(tokenizer, row, mask):
  return tokenizer.decode(row[mask].tolist())


def test_prompts_are_whole_and_padded_on_the_left(tokenizer, questions):
  spec = questions()
  rows = records.read(spec.train)
  lengths = set()
  for batch, completions in _take(PromptIterator(spec, tokenizer, seed=0), 3):
    assert completions is None
    assert batch.tokens.shape == batch.mask.shape == (4, 30)
    assert batch.tokens.dtype == batch.index.dtype == np.int32
    for row, mask, index in zip(
        batch.tokens, batch.mask, batch.index, strict=True
    ):
      assert (np.diff(mask.astype(int)) >= 0).all()
      assert (row[~mask] == tokenizer.pad_id).all()
      question = rows[index]["question"]
      assert _text(tokenizer, row, mask) == tokenizer.prompt(
          question, "<think>"
      )
      lengths.add(int(mask.sum()))
  assert len(lengths) > 2


def test_every_record_comes_once_an_epoch_in_an_order_of_its_own(
    tokenizer, questions
):
  order = _order(PromptIterator(questions(), tokenizer, seed=0), 9)
  epochs = [order[i : i + _COUNT] for i in range(0, 3 * _COUNT, _COUNT)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(_COUNT))
  for one, other in itertools.combinations([*epochs, sorted(order)], 2):
    assert one != other


def test_the_seed_decides_the_order(tokenizer, questions):
  spec = questions()
  first, same, other = (
      _order(PromptIterator(spec, tokenizer, seed=seed), 6)
      for seed in (3, 3, 4)
  )
  assert first == same
  assert first != other


def test_prompts_that_are_too_long_are_dropped_and_counted(
    tokenizer, questions
):
  iterator = PromptIterator(questions((2, 5, 7)), tokenizer, seed=0)
  order = _order(iterator, 9)
  left = [n for n in range(_COUNT) if n not in (2, 5, 7)]
  assert sorted(order) == sorted(4 * left)
  # The last epoch may be drawn up to its last record that fits.
  assert 9 <= iterator.dropped <= 12


def test_a_prompt_may_fill_the_row(tokenizer, questions):
  spec = questions()
  rows = records.read(spec.train)
  lengths = [
      len(tokenizer.encode(tokenizer.prompt(r["question"], "<think>")))
      for r in rows
  ]
  longest = max(lengths)
  for room, dropped in ((longest, 0), (longest - 1, lengths.count(longest))):
    spec = dataclasses.replace(spec, max_prompt_len=room, batch_size=1)
    iterator = PromptIterator(spec, tokenizer, seed=0)
    _take(iterator, 2 * (_COUNT - dropped))
    assert dropped <= iterator.dropped <= 2 * dropped
    if dropped:
      with_mask = next(iterator)[0].mask
      assert with_mask.shape == (1, longest - 1)


@pytest.mark.parametrize("taken", (0, 1, 4))
def test_a_stream_goes_on_from_its_state(taken, tokenizer, questions):
  spec = questions((1, 2, 6))

  def start():
    return PromptIterator(spec, tokenizer, seed=0, completion_len=20)

  iterator = start()
  _take(iterator, taken)
  state = iterator.get_state()
  json.loads(state)
  wanted, dropped = _take(iterator, 6), iterator.dropped
  for other in (start(), iterator):
    other.set_state(state)
    found = _take(other, 6)
    assert other.dropped == dropped > 0
    for one, two in zip(found, wanted, strict=True):
      for part, same in zip(one, two, strict=True):
        np.testing.assert_array_equal(part.tokens, same.tokens)
        np.testing.assert_array_equal(part.mask, same.mask)
      np.testing.assert_array_equal(one[0].index, two[0].index)


def test_completions_end_with_the_stop_token_and_padding(tokenizer, questions):
  spec = questions()
  rows = records.read(spec.train)
  iterator = PromptIterator(spec, tokenizer, seed=0, completion_len=20)
  for batch, completions in _take(iterator, 3):
    assert completions.log_probs is None
    assert completions.tokens.shape == completions.mask.shape == (4, 20)
    for row, mask, index in zip(
        completions.tokens, completions.mask, batch.index, strict=True
    ):
      assert (np.diff(mask.astype(int)) <= 0).all()
      assert (row[~mask] == tokenizer.pad_id).all()
      wanted = rows[index]["completion"] + "<|im_end|>"
      assert _text(tokenizer, row, mask) == wanted
      assert not np.isin(row[mask][:-1], tokenizer.stop_ids).any()


def test_completions_that_are_too_long_are_dropped_and_counted(
    tokenizer, questions
):
  spec = questions()
  lengths = [
      len(tokenizer.encode(r["completion"])) + 1
      for r in records.read(spec.train)
  ]
  room = sorted(set(lengths))[-2]
  fits = [n for n in range(_COUNT) if lengths[n] <= room]
  spec = dataclasses.replace(spec, batch_size=1)
  iterator = PromptIterator(spec, tokenizer, seed=0, completion_len=room)
  assert sorted(_order(iterator, len(fits))) == fits
  assert 0 < iterator.dropped <= _COUNT - len(fits)


def test_completions_end_though_only_the_generation_config_says_how(
    questions, tmp_path
):
  directory = _tokenizer_directory(tmp_path)
  _edit(directory / "tokenizer_config.json", eos_token=None)
  tokenizer = tokenizer_lib.load(str(directory))
  iterator = PromptIterator(questions(), tokenizer, seed=0, completion_len=20)
  _, completions = next(iterator)
  for row, mask in zip(completions.tokens, completions.mask, strict=True):
    assert row[mask][-1] in tokenizer.stop_ids


def test_records_that_are_all_too_long_are_refused(tokenizer, questions):
  spec = questions(range(_COUNT))
  with pytest.raises(ConfigError) as error:
    next(PromptIterator(spec, tokenizer, seed=0))
  assert "data.max_prompt_len is 30" in str(error.value)
  assert f"every one of the {_COUNT} records" in str(error.value)
  with pytest.raises(ConfigError) as error:
    next(PromptIterator(questions(), tokenizer, seed=0, completion_len=2))
  assert "rollout.max_len" in str(error.value)


def test_one_record_that_fits_is_enough(tokenizer, questions):
  spec = questions(range(1, _COUNT))
  iterator = PromptIterator(spec, tokenizer, seed=0)
  assert set(_order(iterator, 6)) == {0}


def test_a_prompt_length_without_room_is_refused(tokenizer, questions):
  spec = questions()
  least = len(tokenizer.encode(tokenizer.prompt("", "<think>")))
  first = records.read(spec.train)[0]["question"]
  needed = len(tokenizer.encode(tokenizer.prompt(first, "<think>")))
  for room in (1, least):
    tight = dataclasses.replace(spec, max_prompt_len=room)
    with pytest.raises(ConfigError) as error:
      PromptIterator(tight, tokenizer, seed=0)
    message = str(error.value)
    assert f"data.max_prompt_len is {room}" in message
    assert f"takes {least} tokens" in message
    assert f"needs {needed}, so" in message
  PromptIterator(
      dataclasses.replace(spec, max_prompt_len=needed), tokenizer, seed=0
  )


def test_encode_prompt_gives_nothing_rather_than_a_part(tokenizer):
  wanted = tokenizer.encode(tokenizer.prompt("Ann", ""))
  row, mask = prompts.encode_prompt(tokenizer, "Ann", len(wanted), "")
  assert row.tolist() == wanted
  assert mask.all()
  assert prompts.encode_prompt(tokenizer, "Ann", len(wanted) - 1, "") is None


def test_a_batch_is_cut_to_its_last_columns():
  lengths = (3, 9, 5)
  mask = np.arange(20) >= 20 - np.array(lengths)[:, None]
  tokens = np.where(mask, np.arange(20), 0)
  batch = PromptBatch(tokens, mask, np.arange(3))
  for wanted in (20, 10, 9):
    cut = prompts.cut(batch, wanted)
    assert cut.tokens.shape == cut.mask.shape == (3, wanted)
    assert cut.mask.sum(axis=1).tolist() == list(lengths)
    np.testing.assert_array_equal(cut.tokens[cut.mask], tokens[mask])


def test_every_record_of_a_data_set_is_checked_before_the_run(tmp_path):
  """A column of messages may hold anything in any row."""
  rows = [
      {"asked": [{"role": "user", "content": f"What is {n}?"}]}
      for n in range(600)
  ]
  folder = tmp_path / "set"
  folder.mkdir()
  spec = DatasetSpec(str(folder), question="asked")

  def write(rows):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / "train.parquet"
    )

  write(rows)
  assert len(records.read(spec)) == 600
  rows[555]["asked"][0]["role"] = "tool"
  write(rows)
  with pytest.raises(DataError, match="record 556"):
    records.read(spec)
