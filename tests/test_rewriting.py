"""The student samples, the teacher rewrites, the student learns of it."""

import dataclasses
import functools
import io
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import toys

from configs import mixed_policy
from prefix_distill import config as config_lib
from prefix_distill import preflight
from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import RewriteSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.prompts import Asking
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.data.prompts import Rewriting
from prefix_distill.errors import ConfigError
from prefix_distill.report import flops
from prefix_distill.report import report
from prefix_distill.rollout import generate
from prefix_distill.train import loop
from prefix_distill.train import update

_QUESTION = "Ann has 7 pens."


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:guided")


def _config(student="a", teacher="b", **changes) -> config_lib.Config:
  """A small run whose answers are rewritten; changes are of `rewrite`."""
  spec = dataclasses.replace(toys.REWRITE, **changes)
  return toys.run_config(
      student,
      teacher,
      rollout=RolloutSpec(2, 16, source="rewrite", rewrite=spec),
  )


def _rewriting(tokenizer, **changes) -> Rewriting:
  stops = tokenizer.stop_ids
  return Rewriting(_config(**changes), tokenizer, tokenizer, stops, stops)


def test_the_teachers_turn_has_the_problem_and_the_answer(tokenizer):
  rewriting = _rewriting(tokenizer, suffix="<think>")
  answers = [
      [*tokenizer.encode(text), *tokenizer.stop_ids]
      for text in ("\nWe guess.\n</think>\n\nIt is {question}.", "")
  ]
  asked = rewriting.ask([_QUESTION], np.array([5]), answers)
  assert asked.prompts.index.tolist() == [[5, 0], [5, 1]]
  assert not asked.shortened.any() and not asked.long.any()
  for row, mask, answer in zip(
      asked.prompts.tokens, asked.prompts.mask, answers, strict=True
  ):
    assert (np.diff(mask.astype(int)) >= 0).all()
    text = tokenizer.decode(answer[:-1])
    wanted = tokenizer.prompt(f"{_QUESTION} {text} Be brief.", "<think>")
    assert tokenizer.decode(row[mask].tolist()) == wanted
    # What the student wrote is text to the teacher, and no token of its own.
    (close,) = tokenizer.encode("</think>")
    assert close not in row


def test_turns_before_the_last_one_stay(tokenizer):
  turns = [
      {"role": "user", "content": "Ann has 7 pens."},
      {"role": "assistant", "content": "We use 7."},
      {"role": "user", "content": "How many?"},
  ]
  asked = _rewriting(tokenizer).ask([turns], np.array([0]), [[]])
  tokens, mask = asked.prompts.tokens[0], asked.prompts.mask[0]
  text = tokenizer.decode(tokens[mask].tolist())
  wanted = [*turns[:2], {"role": "user", "content": "How many?  Be brief."}]
  assert text == tokenizer.prompt(wanted, "")


def test_of_a_long_answer_the_beginning_is_shown(tokenizer):
  answer = tokenizer.encode(" pens" * 90 + " cups" * 90)
  whole = _rewriting(tokenizer, max_prompt_len=300)
  for room in (60, 150):
    rewriting = _rewriting(tokenizer, max_prompt_len=room)
    asked = rewriting.ask([_QUESTION], np.array([0]), [answer])
    assert asked.shortened.tolist() == [True] and not asked.long.any()
    assert asked.prompts.mask.all()  # It fills the room.
    text = tokenizer.decode(asked.prompts.tokens[0].tolist())
    shown = text.count(" pens") - 1 + text.count(" cups")
    wanted = whole.ask([_QUESTION], np.array([0]), [answer[:shown]]).prompts
    np.testing.assert_array_equal(
        wanted.tokens[wanted.mask], asked.prompts.tokens[0]
    )


def test_a_problem_that_does_not_fit_is_marked(tokenizer):
  rewriting = _rewriting(tokenizer, max_prompt_len=20)
  asked = rewriting.ask([_QUESTION * 9], np.array([0]), [[40]])
  assert asked.long.all() and asked.prompts.mask.all()


def test_what_is_learned_is_what_was_sampled(tokenizer):
  """Tokens that no text would be encoded to stay as they are."""
  rewriting, rng = _rewriting(tokenizer, thoughts="cut"), random.Random(0)
  ids = sorted({*range(tokenizer.num_tokens)} - tokenizer.control_ids)
  stop, changed = tokenizer.stop_ids[0], 0
  for _ in range(50):
    body = [rng.choice(ids) for _ in range(20)]
    if "<think>" in tokenizer.decode(body):
      continue
    assert rewriting.take([*body, stop]).tokens == (*body, stop)
    changed += tokenizer.encode(tokenizer.decode(body)) != body
  assert changed > 20


@pytest.mark.parametrize(
    ("suffix", "thoughts", "text", "wanted"),
    [
        ("", "cut", "<think>\nWell.\n</think>\n\nWe add.", "We add."),
        ("", "cut", " <think>We</think> is </think>.", " is </think>."),
        ("", "cut", "We add.\n</think>\n\nAnn has 9.", None),
        ("<think>", "cut", "Well.\n</think>\n\nWe add.", "We add."),
        ("<think>", "keep", "\nWe add.\n</think>\n\nAnn has 9.", None),
        ("<think>\n\n</think>\n\n", "cut", "We add.", None),
    ],
)
def test_thoughts_are_cut_or_kept(tokenizer, suffix, thoughts, text, wanted):
  rewriting = _rewriting(tokenizer, suffix=suffix, thoughts=thoughts)
  written, stop = tokenizer.encode(text), tokenizer.stop_ids[0]
  taken = rewriting.take([*written, stop])
  wanted = text if wanted is None else wanted
  assert (tokenizer.decode(taken.tokens[:-1]), taken.failed) == (wanted, "")
  # They are the last of the tokens that were sampled.
  assert taken.tokens == (*written, stop)[-len(taken.tokens) :]


def test_the_students_thoughts_are_closed_before_the_final_mark(tokenizer):
  rewriting = _rewriting(
      tokenizer, thoughts="cut", scored_in="prompt", final_mark="In the end"
  )
  first, last = (
      tokenizer.encode(x) for x in ("In the end 9.\n\n", "In the end 8.")
  )
  taken = rewriting.take([*first, *last, tokenizer.stop_ids[0]])
  close = tokenizer.encode("</think>\n\n")
  assert taken.tokens == (*first, *close, *last, tokenizer.stop_ids[0])


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("We add.", {}, "cut"),
        ("<think>We add.<|im_end|>", {"thoughts": "cut"}, "unclosed"),
        ("We add.<|im_end|>", {"suffix": "<think>", "thoughts": "cut"},
         "unclosed"),
        ("We add.<|im_end|>", {"final_mark": "In", "scored_in": "prompt"},
         "unmarked"),
        ("We add.<|im_end|>", {"final_mark": "e a", "scored_in": "prompt"},
         "unmarked"),
        ("We<|im_start|>user<|im_end|>", {}, "markup"),
        ("<|im_end|>", {}, "empty"),
        (" \n\n<|im_end|>", {}, "empty"),
        ("<think>We add.</think>\n\n<|im_end|>", {"thoughts": "cut"}, "empty"),
    ],
)
def test_a_rewriting_that_fails_says_why(tokenizer, text, changes, reason):
  taken = _rewriting(tokenizer, **changes).take(tokenizer.encode(text))
  assert (taken.tokens, taken.failed) == ((), reason)


def test_no_token_at_all_is_a_rewriting_that_was_cut(tokenizer):
  assert _rewriting(tokenizer).take([]).failed == "cut"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_prompt_len": 100}, "rollout.rewrite.max_prompt_len is 100"),
        ({"final_mark": "So", "scored_in": "prompt"}, "final_mark is 'So'"),
    ],
)
def test_what_needs_a_tokenizer_to_be_refused(tokenizer, changes, words):
  rewriting = _rewriting(tokenizer, **changes)
  with pytest.raises(ConfigError) as error:
    rewriting.check(["<think>", ""])
  assert words in str(error.value) and str(error.value).endswith(".")


class _Small:
  """A run's programs, for updates on one device."""

  def __init__(self, config: config_lib.Config):
    mesh = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
    self.config = config
    self.models, self.tokenizer, (self.params, self.teacher_params) = (
        toys.load_models(config, mesh)
    )
    self.stops = self.models.stop_ids
    self.programs = update.Programs(self.models)
    data = PromptIterator(config.data, self.tokenizer, seed=0)
    self.prompts = next(data)[0]
    self.questions = data.questions(self.prompts.index)

  def rewriting(self, stops=None) -> Rewriting:
    stops = self.stops if stops is None else stops
    return Rewriting(
        self.config, self.tokenizer, self.tokenizer, self.stops, stops
    )

  def update(self, rewriting: Rewriting, cap: int = 8):
    """Returns the state before, the state after, and what was shown."""
    copy = functools.partial(jax.tree.map, jnp.copy)
    before = self.programs.init(copy(self.params))
    request = update.Request(
        cap,
        jax.random.key(3),
        "rewrite",
        asking=Asking(rewriting, self.questions, self.prompts.index),
    )
    prompts = sharding.global_batch(self.prompts, self.models.mesh)
    kept = copy(before)
    after, done = self.programs.update(
        before, self.teacher_params, prompts, None, request, update.Clock()
    )
    return kept, after, done


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  return [
      toys.write_model(root / name, seed, "teacher")
      for seed, name in enumerate(("student", "teacher"))
  ]


@pytest.fixture(scope="module", params=("rewriting", "prompt"))
def small(request, paths):
  config = _config(*paths, scored_in=request.param)
  optimizer = OptimizerSpec(learning_rate=1e-2, clip_norm=0.0)
  data = dataclasses.replace(config.data, batch_size=4)
  config = dataclasses.replace(config, optimizer=optimizer, data=data)
  return _Small(config)


@pytest.fixture(scope="module")
def done(small):
  return small.update(small.rewriting())


@pytest.fixture(scope="module")
def asked(small):
  """What the two models wrote, by the samplers' pure functions."""
  config, rewriting = small.config.rollout, small.rewriting()
  tokenizer, prompts = small.tokenizer, small.prompts
  sample = jax.jit(generate.sample, static_argnums=(0, 1, 2))

  def write(model, params, batch, key, length, count):
    spec = generate.SamplerConfig(
        small.stops, tokenizer.pad_id, tokenizer.num_tokens, count
    )
    batch = jax.tree.map(jnp.asarray, batch)
    found = sample(
        model, spec, length, params, batch, key, generate.Draw.of(length)
    )
    tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
    return [t[m] for t, m in zip(tokens, mask, strict=True)]

  key = jax.random.key(3)
  drafts = write(
      small.models.student, small.params, prompts, key, config.draft_len, 2
  )
  turns = rewriting.ask(small.questions, prompts.index, drafts)
  written = write(
      small.models.teacher,
      small.teacher_params,
      turns.prompts,
      jax.random.fold_in(key, 1),
      config.rewriting_len,
      1,
  )
  return drafts, turns, written


def test_the_student_learns_the_beginnings_of_what_the_teacher_wrote(
    small, done, asked
):
  drafts, turns, written = asked
  taken = [small.rewriting().take(tokens) for tokens in written]
  _, _, shown = done
  assert list(shown.rewritten.failed) == [one.failed for one in taken]
  assert 0 < sum(bool(one.failed) for one in taken) < len(taken)
  for tokens, mask, one in zip(shown.tokens, shown.mask, taken, strict=True):
    assert tokens[mask].tolist() == list(one.tokens[:8])
  lengths = shown.rewritten.lengths
  assert lengths.drafts.tolist() == [len(x) for x in drafts]
  assert lengths.written.tolist() == [len(x) for x in written]
  assert lengths.prompts.tolist() == turns.prompts.mask.sum(1).tolist()
  assert lengths.kept.tolist() == [len(one.tokens) for one in taken]
  line = shown.rewritten.metrics()
  done_rows = [one for one in taken if not one.failed]
  assert line["rewritten"] == len(done_rows) / len(taken)
  assert line["rewritten_len"] == pytest.approx(
      np.mean([len(one.tokens) for one in done_rows])
  )
  failed = [v for k, v in line.items() if k.startswith("rewrite_")]
  assert line["rewritten"] + sum(failed) == pytest.approx(1)


def _behind(contexts, answers) -> tuple[np.ndarray, np.ndarray]:
  """Returns contexts and answers in rows that are padded on the right.

  With them comes where each answer begins.
  """
  rows = [[*c, *a[:-1]] for c, a in zip(contexts, answers, strict=True)]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for row, found in zip(tokens, rows, strict=True):
    row[: len(found)] = found
  return tokens, np.array([len(c) for c in contexts])


def _dense_log_probs(small, model, params, rows, length):
  """The events' log-probabilities [rows, length, events], in float64."""
  tokens, starts = rows
  model, stops = dataclasses.replace(model, mesh=None), np.array(small.stops)
  # What is behind a row's end, the causal mask hides.
  hidden = model.apply(params, tokens, np.ones(tokens.shape, bool))
  at = np.minimum(starts[:, None] - 1 + np.arange(length), tokens.shape[1] - 1)
  logits = model.logits(params, hidden[np.arange(len(tokens))[:, None], at])
  logits = logits[..., : small.tokenizer.num_tokens].astype(jnp.float64)
  probs = jax.nn.softmax(logits)
  stop = probs[..., stops].sum(-1, keepdims=True)
  others = np.setdiff1d(np.arange(small.tokenizer.num_tokens), stops)
  return jnp.log(jnp.concatenate([probs[..., others], stop], -1))


def _dense_kl(small, params, contexts, teacher_contexts, answers):
  """The mean over answers of the summed KL, and its gradient."""
  lengths = np.array([len(answer) for answer in answers])
  counts = np.arange(lengths.max()) < lengths[:, None]

  def value(params, teacher_params):
    student, teacher = (
        _dense_log_probs(
            small, model, weights, _behind(found, answers), lengths.max()
        )
        for model, weights, found in (
            (small.models.student, params, contexts),
            (small.models.teacher, teacher_params, teacher_contexts),
        )
    )
    kl = jnp.sum(jnp.exp(student) * (student - teacher), -1)
    return jnp.sum(jnp.where(counts, kl, 0)) / len(answers)

  with jax.enable_x64(True):
    return jax.jit(jax.value_and_grad(value))(params, small.teacher_params)


def test_the_gradient_is_that_of_a_dense_float64_reference(
    small, done, asked
):
  """On the rows that did not fail, and divided by their number alone."""
  before, after, shown = done
  prompts, turns = small.prompts, asked[1].prompts
  rows = np.flatnonzero(np.array(shown.rewritten.failed) == "")
  contexts = [prompts.tokens[i // 2][prompts.mask[i // 2]] for i in rows]
  others = contexts
  if small.config.rollout.rewrite.scored_in == "rewriting":
    others = [turns.tokens[i][turns.mask[i]] for i in rows]
  answers = [shown.tokens[i][shown.mask[i]] for i in rows]
  wanted, gradient = _dense_kl(
      small, before.params, contexts, others, answers
  )
  assert float(shown.metrics["kl_rollout"]) == pytest.approx(
      float(wanted), rel=1e-5
  )
  # The first update's first moment is a tenth of the gradient.
  moment = optax.tree_utils.tree_get(after.opt_state, "mu")
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
  assert largest > 0.01
  for ours, theirs in zip(
      jax.tree.leaves(moment), jax.tree.leaves(gradient), strict=True
  ):
    np.testing.assert_allclose(10 * ours, theirs, atol=1e-5 * largest)


def test_if_all_rewritings_fail_nothing_is_learned(small):
  before, after, shown = small.update(small.rewriting(stops=()))
  assert set(shown.rewritten.failed) == {"cut"}
  assert not shown.mask.any() and shown.metrics["finite"]
  assert int(after.step) == 1
  for ours, theirs in zip(
      jax.tree.leaves((after.params, after.opt_state)),
      jax.tree.leaves((before.params, before.opt_state)),
      strict=True,
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_a_cap_above_every_rewriting_takes_them_whole(small):
  _, _, shown = small.update(small.rewriting(), cap=16)
  lengths = shown.rewritten.lengths
  assert shown.mask.sum(1).tolist() == lengths.kept.clip(max=16).tolist()


def test_an_update_says_on_shapes_which_programs_it_runs(small):
  planned = []
  with update.compilation.watching(planned.append):
    small.programs.update_on_shapes(8)
  names = {variant.program.name for variant in planned}
  assert {"prefill", "decode", "rewrite_prefill", "rewrite_decode"} <= names
  used = small.programs.compilations()
  compiled = {v for v in planned if v.program.name.endswith(("fill", "code"))}
  assert used["compilations_sample"] <= len(compiled)


def test_the_ledger_charges_both_samplings():
  student, teacher = toys.model_config(), toys.model_config(dim=64)
  these = flops.RewritingLengths(
      np.array([5, 9]), np.array([20, 30]), np.array([7, 4]), np.array([7, 0])
  )
  lengths = flops.Lengths(
      np.array([3]), np.array([6, 0]), these.prompts, np.array([6, 0]), these
  )
  cost = flops.distillation(student, teacher, lengths, "rewrite")
  assert cost.prefill == (
      flops.prefill(student, [3]) + flops.prefill(teacher, [20, 30])
  )
  assert cost.decode == (
      flops.decode(student, [3, 3], [5, 9])
      + flops.decode(teacher, [20, 30], [7, 4])
  )
  # A failed row's prompt is read all the same, by both models.
  assert cost.score == flops.forward(teacher, [20, 30], [6, 0])
  assert cost.forward == flops.forward(student, [3, 3], [6, 0])
  assert lengths.drawn == 5 + 9 + 7 + 4
  paper = flops.paper_distillation(student, teacher, lengths, "rewrite")
  given = flops.paper_distillation(student, teacher, lengths, "data")
  assert paper - given == pytest.approx(
      flops.paper_forward(student, [8, 12])
      + flops.paper_forward(teacher, [27, 34])
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """One device, and eight in microbatches, sampling on another mesh."""
  directory = tmp_path_factory.mktemp("devices")
  process = toys.start(
      "rewriting_on_devices.py", str(directory), devices=8
  )
  (out,) = toys.finish([process], 900)
  return [json.loads(line)["updates"] for line in out.splitlines()]


def test_neither_devices_nor_microbatches_change_the_update(runs):
  one, *others = runs
  assert len(others) == 1
  failed = [reason for shown in one for reason in shown["failed"]]
  assert 0 < failed.count("") < len(failed)
  for other in others:
    for ours, wanted in zip(other, one, strict=True):
      for name in ("tokens", "failed", "written", "turns"):
        assert ours[name] == wanted[name]
      for name in ("kl_rollout", "grad_norm"):
        assert ours[name] == pytest.approx(wanted[name], rel=1e-4)


def _stops_often(path: str) -> None:
  """Makes every 12th token one that ends an answer."""
  file = f"{path}/generation_config.json"
  with open(file) as source:
    settings = json.load(source)
  with open(file, "w") as out:
    json.dump(settings | {"eos_token_id": [*range(6, 240, 12)]}, out)


@pytest.fixture(scope="module")
def often(tmp_path_factory):
  root = tmp_path_factory.mktemp("often")
  found = [
      toys.write_model(root / name, seed, "teacher")
      for seed, name in enumerate(("student", "teacher"))
  ]
  for path in found:
    _stops_often(path)
  return found


def _lines(workdir) -> list[dict]:
  """The updates' lines, without what depends on the clock."""
  timed = ("seconds", "tokens_per_second", "compilations")
  return [
      {k: v for k, v in line.items() if not k.startswith(timed)}
      for line in report.read_metrics(workdir / "metrics.jsonl")
      if "prefix_len" in line
  ]


def test_a_run_goes_on_exactly_in_its_middle(often, tmp_path):
  """With a share of on-policy updates, and prefixes that grow."""
  config = _config(*often)
  config = dataclasses.replace(
      config,
      steps=4,
      seed=16,
      rollout=dataclasses.replace(config.rollout, source_share=0.75),
      prefix=config_lib.PrefixSpec(
          buckets=(4, 16), linear=config_lib.LinearSpec(2, 4)
      ),
      checkpoint=config_lib.CheckpointSpec(every=1, keep=9),
      evaluation=dataclasses.replace(config.evaluation, sets={}),
  )
  loop.train(config, tmp_path / "whole")
  wanted = _lines(tmp_path / "whole")
  assert {line.get("source") for line in wanted} == {"rewrite", "student"}
  rewritten = [x for x in wanted if x["source"] == "rewrite"]
  assert any(0 < x["rewritten"] < 1 for x in rewritten)
  assert all(x["draft_len"] <= 12 for x in rewritten)
  shutil.copytree(tmp_path / "whole", tmp_path / "part")
  for name in ("3", "4"):
    shutil.rmtree(tmp_path / "part" / "checkpoints" / name)
  shutil.rmtree(tmp_path / "part" / "export")
  loop.train(config, tmp_path / "part")
  assert _lines(tmp_path / "part") == wanted
  ours, theirs = (
      (tmp_path / name / "export" / "model.safetensors").read_bytes()
      for name in ("part", "whole")
  )
  assert ours == theirs


@pytest.mark.slow
def test_two_processes_learn_what_one_does(often, tmp_path):
  toys_config = f"--config=tests/programs/toy_config.py:{','.join(often)}"
  flags = (
      toys_config,
      "--config.steps=3",
      "--config.rollout.source=rewrite",
      "--config.data.teacher_prompt=",
      "--config.data.max_teacher_prompt_len=0",
      "--config.rollout.rewrite.prompt={question} {answer} Be brief.",
      "--config.rollout.rewrite.max_prompt_len=110",
      "--config.rollout.rewrite.thoughts=keep",
      "--config.rollout.rewrite.scored_in=rewriting",
  )
  for name, processes in (("one", 1), ("two", 2)):
    started = toys.start_run(
        *flags,
        f"--workdir={tmp_path / name}",
        processes=processes,
        devices=4 // processes,
    )
    toys.finish(started, 900)
  ours, wanted = _lines(tmp_path / "two"), _lines(tmp_path / "one")
  assert any(0 < line["rewritten"] < 1 for line in wanted)
  for x, y in zip(ours, wanted, strict=True):
    assert x.keys() == y.keys()
    for name, value in y.items():
      if not isinstance(value, str):
        value = pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True)
      assert x[name] == value, name


def test_the_recipe_is_whole():
  assert mixed_policy.get_config() == mixed_policy.get_config("tiny")
  for model in ("tiny", "qwen3-1.7b"):
    settings = mixed_policy.get_config(model)
    config = config_lib.from_dict(settings.to_dict())
    assert config.rollout.source == "rewrite"
    assert config_lib.from_dict(config_lib.to_dict(config)) == config
  with pytest.raises(ConfigError, match="no argument 'qwen3-70b'"):
    mixed_policy.get_config("qwen3-70b")


def _scaled_down(settings, often, tmp_path):
  """The recipe at full size, on toy models and a local file."""
  records = (
      {"conversations": [{"value": f"Add {i}."}], "domain": "math"}
      for i in range(8)
  )
  file = tmp_path / "prompts.jsonl"
  file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
  settings.update_from_flattened_dict(
      {
          "steps": 2,
          "data.train.source": str(file),
          "data.batch_size": 4,
          "data.max_prompt_len": 64,
          "rollout.max_len": 12,
          "mesh.fsdp": 1,
          "rollout.rewrite.max_draft_len": 16,
          "rollout.rewrite.max_len": 24,
          "rollout.rewrite.max_prompt_len": 900,
          "optimizer.batch_tokens": 512,
          "evaluation.max_len": 8,
          "student.path": often[0],
          "teacher.path": often[1],
      }
  )
  with settings.unlocked():
    settings.evaluation.sets = {}
  return settings


def test_the_recipe_at_full_size_runs_on_toy_models(often, tmp_path):
  settings = _scaled_down(
      mixed_policy.get_config("qwen3-1.7b"), often, tmp_path
  )
  # Random models never write the words that mark the final answer.
  settings.rollout.rewrite.final_mark = ""
  loop.train(config_lib.from_dict(settings.to_dict()), tmp_path / "run")
  lines = _lines(tmp_path / "run")
  assert len(lines) == 2 and lines[0]["rewritten"] > 0
  assert lines[0]["kl"] > 0 and lines[0]["flops_prefill"] > 0


def test_preflight_accepts_the_recipe_at_full_size(often, tmp_path):
  settings = _scaled_down(
      mixed_policy.get_config("qwen3-1.7b"), often, tmp_path
  )
  out = io.StringIO()
  console = rich.console.Console(file=out, width=80)
  preflight.run(config_lib.from_dict(settings.to_dict()), console)
  words = " ".join(out.getvalue().split())
  assert "What the teacher is asked to rewrite for record 1" in words
  assert "Final answer:" in words and "at most 900" in words
  settings.rollout.rewrite.max_prompt_len = 90
  with pytest.raises(ConfigError, match="max_prompt_len is 90"):
    preflight.run(config_lib.from_dict(settings.to_dict()), console)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "Be brief. {answer}"}, "names answer in braces"),
        ({"prompt": "{question} {answer} {hint}"}, "and nothing else"),
        ({"prompt": "Be brief."}, "names no field in braces"),
        ({"final_mark": "So"}, "final_mark is 'So'"),
        ({"max_prompt_len": 0}, "max_prompt_len is 0"),
        ({"max_prompt_len": 2**30}, "tokens in an update"),
        ({"max_draft_len": -1}, "max_draft_len is -1"),
        ({"thoughts": "hide"}, "use one of 'cut' or 'keep'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words):
  with pytest.raises(ConfigError) as error:
    _config(**changes)
  assert words in str(error.value) and str(error.value).endswith(".")


def test_rewriting_needs_its_source_and_one_context():
  config = _config()
  with pytest.raises(ConfigError) as error:
    dataclasses.replace(config.rollout, source="student")
  assert "set rollout.source to 'rewrite'" in str(error.value)
  data = dataclasses.replace(config.data, teacher_prompt="{question}")
  with pytest.raises(ConfigError, match="scored_in is 'rewriting' but data"):
    dataclasses.replace(config, data=data)
  rollout = dataclasses.replace(config.rollout, per_prompt=1)
  with pytest.raises(ConfigError, match="supervised training samples nothing"):
    dataclasses.replace(config, method="seqkd", rollout=rollout)
  loss = config_lib.LossSpec(form="policy_gradient")
  with pytest.raises(ConfigError, match="rollout.source is 'rewrite' but loss"):
    dataclasses.replace(config, loss=loss)


def test_another_source_on_the_command_line_drops_the_group():
  values = config_lib.to_dict(_config())
  values["rollout"]["source"] = "student"
  given = config_lib.without_idle_groups(values, ["rollout.source"])
  config = config_lib.from_dict(given)
  assert config.rollout.rewrite == RewriteSpec()
