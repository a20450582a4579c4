"""A teacher with a prompt of its own, from the records to the metrics."""

import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import toys

from prefix_distill import errors
from prefix_distill import preflight
from prefix_distill.config import DatasetSpec
from prefix_distill.config import DataSpec
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.data.records import DataError
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.errors import ConfigError
from prefix_distill.structs import PromptBatch
from prefix_distill.train import loop
from prefix_distill.train import setup

_COUNT = 6
_TEMPLATE = "{question} \\boxed{{turns.0.text}} and {}\nAnd {question}"


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:teacher")


@pytest.fixture
def source(tmp_path):
  """Questions of different lengths, with a hint in a list."""
  rows = [
      {
          "question": "Ann has 7 pens. " * (n % 3) + f"How many {n}?",
          "turns": [{"text": "{question} " * n}],
          "completion": f"We add.\n</think>\n\n{n}",
      }
      for n in range(_COUNT)
  ]
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return DatasetSpec(str(path), completion="completion"), rows


def _spec(train, template=_TEMPLATE, room=200, **changes):
  return DataSpec(
      train,
      batch_size=2,
      max_prompt_len=60,
      teacher_prompt=template,
      max_teacher_prompt_len=room,
      **changes,
  )


def _take(spec, tokenizer, count=3, **changes):
  iterator = PromptIterator(
      spec, tokenizer, seed=0, teacher_tokenizer=tokenizer, **changes
  )
  return [next(iterator) for _ in range(count)], iterator


def test_the_template_takes_fields_as_they_are(tokenizer, source):
  train, rows = source
  batches, iterator = _take(_spec(train), tokenizer)
  assert iterator.teacher_question.startswith(
      "Ann has 7 pens. How many 1? \\boxed{{question} } and {}"
  )
  seen = set()
  for batch, _ in batches:
    assert batch.tokens.shape == (2, 60)
    assert batch.teacher_tokens.shape == batch.teacher_mask.shape == (2, 200)
    for i, index in enumerate(batch.index):
      question, hint = rows[index]["question"], rows[index]["turns"][0]["text"]
      wanted = f"{question} \\boxed{{{hint}}} and {{}}\nAnd {question}"
      mask = batch.teacher_mask[i]
      assert (np.diff(mask.astype(int)) >= 0).all()
      found = tokenizer.decode(batch.teacher_tokens[i][mask].tolist())
      assert found == tokenizer.prompt(wanted, "<think>")
      assert (batch.teacher_tokens[i][~mask] == tokenizer.pad_id).all()
      own = tokenizer.decode(batch.tokens[i][batch.mask[i]].tolist())
      assert own == tokenizer.prompt(question, "<think>")
      seen.add(int(index))
  assert seen == set(range(1, _COUNT))  # The first one has no hint.


def test_without_a_template_there_is_one_prompt(tokenizer, source):
  (batch, _), *_ = _take(DataSpec(source[0], 2, 60), tokenizer)[0]
  assert batch.teacher_tokens is None and batch.teacher_mask is None
  assert batch.for_teacher() is batch


@pytest.mark.parametrize(
    "size, template, different",
    [(4, "", 3), (3, "", 0), (7, "{question}", 3), (6, _TEMPLATE, 5)],
)
def test_a_batch_that_repeats_prompts_is_told(
    size, template, different, tokenizer, source
):
  """What differs is what the models read: a hint alone is enough."""
  train, rows = source
  rows = [
      row | {"question": f"How many {n % 3}?"} for n, row in enumerate(rows)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  pathlib.Path(train.source).write_text(text)
  room = 200 if template else 0
  spec = dataclasses.replace(_spec(train, template, room), batch_size=size)
  found = _take(spec, tokenizer, 0)[1].notes
  notes = [note for note in found if "repeat within" in note]
  assert len(notes) == bool(different)
  words = f"{different} different prompts can be used, fewer than"
  assert all(f"{words} data.batch_size {size}," in note for note in notes)


def test_completions_and_a_teachers_prompt_go_together(tokenizer, source):
  (batch, completions), *_ = _take(
      _spec(source[0]), tokenizer, completion_len=40
  )[0]
  assert completions.mask.any(axis=1).all()
  assert batch.teacher_mask.any(axis=1).all()


def test_a_teachers_prompt_that_is_too_long_drops_its_record(tokenizer, source):
  train, rows = source
  lengths = [
      len(
          tokenizer.encode(tokenizer.prompt(row["turns"][0]["text"], "<think>"))
      )
      for row in rows
  ]
  room = sorted(lengths)[3]
  spec = _spec(train, "{turns.0.text}", room)
  spec = dataclasses.replace(spec, batch_size=1)
  batches, iterator = _take(spec, tokenizer, 8)
  # The first one is empty.
  assert {int(b.index[0]) for b, _ in batches} == {1, 2, 3}
  assert 6 <= iterator.dropped <= 9
  assert set(iterator.reasons) == {"empty", "long"}


def test_teachers_prompts_that_are_all_too_long_are_refused(tokenizer, source):
  with pytest.raises(ConfigError) as error:
    _take(_spec(source[0], "{question} {question} Ann Ann", 15), tokenizer)
  assert "raise it or data.max_teacher_prompt_len" in str(error.value)


def test_a_template_that_leaves_no_room_is_refused(tokenizer, source):
  template = "Ann has 7 pens. " * 4 + "{question}"
  with pytest.raises(ConfigError) as error:
    _take(_spec(source[0], template, 20), tokenizer)
  assert "have room for 20 tokens" in str(error.value)
  assert "set data.max_teacher_prompt_len" in str(error.value)


@pytest.mark.parametrize("name", ("solution", "turns.1.text", "a b"))
def test_a_field_that_is_not_there_is_named(name, tokenizer, source):
  with pytest.raises(DataError) as error:
    _take(_spec(source[0], f"{{question}} {{{name}}}"), tokenizer)
  sentence = str(error.value)
  assert f"no field {name!r}, which data.teacher_prompt names;" in sentence
  assert "it has question, turns, completion, so name one of" in sentence
  assert sentence.endswith(".") and "\n" not in sentence


def test_a_stream_goes_on_from_its_state(tokenizer, source):
  spec = _spec(source[0], "{turns.0.text}", 20)
  batches, iterator = _take(spec, tokenizer)
  state, dropped = iterator.get_state(), iterator.dropped
  wanted = [next(iterator)[0] for _ in range(4)]
  _, other = _take(spec, tokenizer, 0)
  other.set_state(state)
  assert other.dropped == dropped > 0
  for batch in wanted:
    jax.tree.map(np.testing.assert_array_equal, next(other)[0], batch)
  assert len(batches) == 3


def test_the_teachers_template_opens_its_thoughts_once(tokenizer):
  assert tokenizer.own_prompt("Ann", "<think>") == tokenizer.prompt(
      "Ann", "<think>"
  )
  thinking = tokenizer_lib.load("bundled:teacher")
  thinking.pretrained.chat_template += "{{- '<think>\\n' }}"
  own = thinking.own_prompt("Ann", "<think>")
  assert own == tokenizer.prompt("Ann", "<think>\n")


def _data(**changes):
  task = DatasetSpec("math_task", size=1)
  return dict(train=task, batch_size=4, max_prompt_len=60) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_teacher_prompt_len": 9}, "but data.teacher_prompt is empty"),
        ({"max_teacher_prompt_len": -1}, "max_teacher_prompt_len is -1"),
        ({"teacher_prompt": "Be brief."}, "as {question}."),
        ({"teacher_prompt": "In \\boxed{}."}, "names no field"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words):
  with pytest.raises(ConfigError) as error:
    DataSpec(**_data(**changes))
  assert words in str(error.value) and str(error.value).endswith(".")


def test_supervised_training_has_no_teacher_to_read_it():
  config = toys.run_config("student", "teacher")
  train = dataclasses.replace(config.data.train, completion="completion")
  data = dataclasses.replace(
      config.data, train=train, teacher_prompt="{question}"
  )
  rollout = dataclasses.replace(config.rollout, per_prompt=1)
  with pytest.raises(ConfigError, match="data.teacher_prompt is '{question}'"):
    dataclasses.replace(config, method="sft", data=data, rollout=rollout)


def _with_own(rows, columns, length, seed=3):
  """Prompts, and others of another length for the teacher."""
  theirs = toys.prompts(rows, length, seed)
  return dataclasses.replace(
      toys.prompts(rows, columns),
      teacher_tokens=theirs.tokens,
      teacher_mask=theirs.mask,
  )


@pytest.mark.parametrize("length", (3, 11))
def test_the_teacher_scores_prefixes_after_its_own_prompt(length):
  model, params = toys.model(1, num_layers=1)
  batch, lengths = _with_own(3, 5, length), [1, 3, 6]
  rollout = toys.rollout(lengths, 6)
  exact = ExactLoss(toys.distribution())
  sampled = SampledLoss(toys.distribution())
  score = jax.jit(loss_lib.score, static_argnums=(0, 1))
  hidden = score(model, exact, params, batch, rollout).hidden
  log_probs = score(model, sampled, params, batch, rollout).log_probs
  for row, count in enumerate(lengths):
    prompt = batch.teacher_tokens[row][batch.teacher_mask[row]]
    tokens = rollout.tokens[row, :count]
    alone = jnp.concatenate([prompt, tokens])[None]
    wanted = jax.jit(model.apply)(params, alone, jnp.ones(alone.shape, bool))
    wanted = wanted[0, len(prompt) - 1 : -1]
    np.testing.assert_allclose(hidden[row, :count], wanted, atol=1e-5)
    logits = model.logits(params, wanted)[:, : toys.NUM_TOKENS]
    wanted = jax.nn.log_softmax(logits)[np.arange(count), tokens]
    np.testing.assert_allclose(log_probs[row, :count], wanted, atol=1e-5)


def test_what_is_inspected_is_what_the_teacher_read():
  model, params = toys.model(1)
  batch, rollout = _with_own(3, 5, 9), toys.rollout([2, 4, 4], 4)

  def divergence(batch):
    return toys.token_divergence(
        model, model, toys.distribution(), params, params, batch, rollout
    )[rollout.mask]

  same = PromptBatch(batch.tokens, batch.mask, batch.index)
  np.testing.assert_allclose(divergence(same), 0, atol=1e-6)
  assert divergence(batch).min() > 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs three updates of toy models and returns the lines of its metrics."""
  folder = tmp_path_factory.mktemp("runs")
  models = [
      toys.write_model(folder / name, seed, "teacher")
      for name, seed in (("student", 0), ("teacher", 1))
  ]

  def start(name, **changes):
    config = toys.run_config(*models)
    data = dataclasses.replace(config.data, **changes)
    loop.train(dataclasses.replace(config, data=data), folder / name)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second", "compilations")
    return [
        {k: v for k, v in json.loads(x).items() if not k.startswith(timed)}
        for x in lines
    ]

  return start


def test_the_students_question_in_a_template_changes_nothing(run):
  plain = run("plain")
  assert run("same", teacher_prompt="{question}") == plain
  longer = run(
      "longer",
      teacher_prompt="{question} It is {answer}.",
      max_teacher_prompt_len=120,
  )
  updates, others = ([m for m in x if "kl" in m] for x in (longer, plain))
  assert len(updates) == len(others) == 3
  assert updates[0]["kl"] != others[0]["kl"]
  for name in ("flops_prefill", "flops_decode", "flops_forward"):
    assert updates[0][name] == others[0][name]
  assert updates[0]["flops_score"] > others[0]["flops_score"]


def test_prompts_beyond_the_teachers_positions_are_refused(tmp_path):
  models = [toys.write_model(tmp_path / n, 0, "teacher") for n in "ab"]
  config = toys.run_config(*models)
  data = dataclasses.replace(
      config.data, teacher_prompt="{question}", max_teacher_prompt_len=1020
  )
  with pytest.raises(errors.UserError) as error:
    setup.prepare(dataclasses.replace(config, data=data), tmp_path / "run")
  assert "1020 tokens plus the longest prefix of 8 is 1028" in str(error.value)
  assert "1024 positions" in str(error.value)


def _shown(**changes):
  config = toys.run_config("bundled:capable", "bundled:teacher")
  data = dataclasses.replace(config.data, **changes)
  out = io.StringIO()
  console = rich.console.Console(file=out, width=80)
  preflight.run(dataclasses.replace(config, data=data), console)
  return " ".join(out.getvalue().split())


def test_preflight_shows_what_each_model_reads():
  words = _shown(
      teacher_prompt="{question}\nSolution: {answer}",
      max_teacher_prompt_len=120,
  )
  assert "What the student reads" in words and "at most 96" in words
  assert "What the teacher reads" in words and "at most 120" in words
  assert words.count("<think>┊ the answer begins here") == 2
  assert words.count("Solution: ") == 1
  assert "each model's own; the teacher reads data.teacher_prompt" in words
  assert "What both models read" in _shown()


def test_preflight_warns_of_a_teachers_prompt_that_would_be_dropped():
  words = _shown(teacher_prompt="{question} {question}")
  assert "The teacher's prompt has" not in words
  words = _shown(teacher_prompt="{question} {question} {question}")
  assert "teacher's prompt has" in words
  assert "data.max_teacher_prompt_len is 96" in words
  assert "would be dropped" in words


def test_an_end_of_the_teachers_prompt_that_a_word_would_change(tmp_path):
  with pytest.raises(ConfigError, match="the teacher's prompt ends with"):
    _refused_boundary(tmp_path)


def _refused_boundary(tmp_path):
  """A teacher whose template, unlike the student's, ends in a space."""
  teacher = toys.write_model(tmp_path / "teacher", 0, "teacher")
  file = tmp_path / "teacher" / "chat_template.jinja"
  file.write_text(file.read_text() + "{{- 'Answer: ' }}")
  config = toys.run_config("bundled:capable", teacher)
  data = dataclasses.replace(
      config.data, suffix="", teacher_prompt="{question}"
  )
  config = dataclasses.replace(config, data=data)
  preflight.run(config, rich.console.Console(file=io.StringIO()))
