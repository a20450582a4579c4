"""What a run keeps to be read: which texts, where, and that they are right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.config import FixedSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.config import SamplesSpec
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.distill import loss as loss_lib
from prefix_distill.report import report
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import loop
from prefix_distill.train import samples
from prefix_distill.train import setup as setup_lib

TIMED = ("seconds", "tokens_per_second", "compilations")
TEXT = "Ann has 7 pens; 12 größer 世界 🙂🏽 é\n\tend  "
INSPECT = jax.jit(loss_lib.inspect, static_argnums=range(5))
SPEC = SamplesSpec(
    updates=3, rollouts=3, max_tokens=6, alternatives=2, problems=3
)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("most", [2, 3, 8])
def test_what_is_kept_lies_evenly_and_has_both_ends(count, most):
  chosen = sorted(samples.updates(count, most))
  assert len(chosen) == min(count, most)
  assert (chosen[0], chosen[-1]) == (1, count)
  gaps = np.diff(chosen)
  assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_evaluations_that_are_kept_were_made():
  assert samples.evaluations(50, 25, 8) == {0, 25, 50}
  assert samples.evaluations(50, 0, 8) == {0, 50}
  assert samples.evaluations(7, 2, 3) == {0, 4, 7}
  assert samples.evaluations(0, 0, 8) == {0}
  chosen = samples.evaluations(10_000, 7, 8)
  assert len(chosen) == 8 and {0, 10_000} <= chosen
  assert all(step % 7 == 0 for step in chosen - {10_000})


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:teacher")


def test_pieces_and_segments_are_the_text(tokenizer):
  ids = tokenizer.encode(TEXT) + list(tokenizer.stop_ids)
  assert len(ids) > 20
  texts = samples.pieces(tokenizer, ids)
  assert len(texts) == len(ids)
  assert "".join(texts) == tokenizer.decode(ids)
  # Characters of several tokens are whole, and the other tokens are there.
  assert "".join(texts).startswith(TEXT) and "" in texts
  assert any("世" in text for text in texts)
  parts = samples.segments(tokenizer, ids)
  assert "".join(text for text, _ in parts) == tokenizer.decode(ids)
  assert parts[0] == (TEXT, 0)
  assert [special for _, special in parts] == [0] + [1] * len(
      tokenizer.stop_ids
  )


def test_bytes_that_are_no_characters_keep_their_number(tokenizer):
  broken = tokenizer.encode("世界")[:-1] * 3
  texts = samples.pieces(tokenizer, broken)
  assert len(texts) == len(broken)
  assert "".join(texts).startswith("世")


def dense(model, params, batch, rollout):
  """Log-probabilities over the real tokens, float64: [B, P, V]."""
  hidden = model.prefix_hidden(params, batch, rollout)
  logits = np.asarray(hidden, np.float64) @ np.asarray(
      model.head(params), np.float64
  ).T
  logits = logits[..., : toys.NUM_TOKENS]
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("memory", [2**28, 4 * 4 * 40 * 7])
def test_an_inspection_is_what_the_dense_models_say(memory):
  (student, ours), (teacher, theirs) = toys.model(0), toys.model(1)
  batch, rollout = toys.prompts(4), toys.rollout([8, 3, 6, 1], 8)
  dist = toys.distribution(temperature=0.5, top_k=3)
  found = INSPECT(
      student, teacher, dist, 5, memory, ours, theirs, batch, rollout
  )
  mask, tokens = np.asarray(rollout.mask), np.asarray(rollout.tokens)
  p, q = (
      dense(*pair, batch, rollout)
      for pair in ((student, ours), (teacher, theirs))
  )
  kl = (np.exp(p) * (p - q)).sum(-1)
  for got, wanted in (
      (found["divergence"], kl),
      (found["student"], np.take_along_axis(p, tokens[..., None], -1)[..., 0]),
      (found["teacher"], np.take_along_axis(q, tokens[..., None], -1)[..., 0]),
      (found["best_log_probs"], np.sort(q, -1)[..., ::-1][..., :5]),
      (found["best"], np.argsort(-q, -1)[..., :5]),
  ):
    np.testing.assert_allclose(np.asarray(got)[mask], wanted[mask], atol=2e-5)
  # Stop tokens are one event, as in the loss.
  merged = toys.distribution(stop_ids=toys.STOPS)
  found = INSPECT(
      student, teacher, merged, 99, memory, ours, theirs, batch, rollout
  )
  exact = toys.token_divergence(
      student, teacher, merged, ours, theirs, batch, rollout
  )
  np.testing.assert_allclose(
      np.asarray(found["divergence"])[mask], np.asarray(exact)[mask], rtol=1e-5
  )
  assert np.abs(np.asarray(exact)[mask] - kl[mask]).max() > 1e-3
  assert found["best"].shape == (4, 8, toys.NUM_TOKENS)


def test_without_a_teacher_the_student_is_asked():
  student, params = toys.model(0)
  batch, rollout = toys.prompts(4), toys.rollout([8, 3, 6, 1], 8)
  found = INSPECT(
      student, None, toys.distribution(), 2, 2**28, params, None, batch, rollout
  )
  assert "teacher" not in found
  mask, p = np.asarray(rollout.mask), dense(student, params, batch, rollout)
  at = np.asarray(rollout.tokens)[..., None]
  wanted = -np.take_along_axis(p, at, -1)[..., 0]
  got = np.asarray(found["divergence"])
  np.testing.assert_allclose(got[mask], wanted[mask], atol=2e-5)
  assert np.asarray(found["best"])[mask].tolist() == (
      np.argsort(-p, -1)[..., :2][mask].tolist()
  )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return toys.write_models(tmp_path_factory.mktemp("models"))


def settings(models, **changes):
  config = toys.run_config(
      *models,
      steps=5,
      samples=SPEC,
      prefix=PrefixSpec("fixed", fixed=FixedSpec(8), buckets=(8,)),
  )
  evaluation = dataclasses.replace(config.evaluation, every=2, teacher=True)
  checkpoint = dataclasses.replace(config.checkpoint, every=1)
  return dataclasses.replace(
      config, evaluation=evaluation, checkpoint=checkpoint, **changes
  )


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  loop.train(settings(models), workdir)
  return workdir


def metrics(workdir):
  return [
      {k: v for k, v in line.items() if not k.startswith(TIMED)}
      for line in report.read_metrics(workdir / "metrics.jsonl")
  ]


def test_a_run_keeps_as_many_texts_as_were_asked_for(whole):
  rollouts, answers = report.read_samples(whole)
  assert [x["step"] for x in rollouts] == [1] * 3 + [3] * 3 + [5] * 3
  for line in rollouts:
    kept = min(line["length"], SPEC.max_tokens)
    for name in ("ids", "texts", "divergence", "student", "teacher"):
      assert len(line[name]) == kept
    assert [len(x) for x in line["alternatives"]] == [2] * kept
    assert line["finished"] or line["length"] == 8
    assert line["prompt"][0] == ["<|im_start|>", 1]
  # Other prompts, and not rollouts of one.
  assert len({x["record"] for x in rollouts[:3]}) == 3
  seen = [(x["step"], x["model"]) for x in answers]
  assert seen == [
      (step, model)
      for step, model in (
          (0, "student"),
          (4, "student"),
          (5, "student"),
          (5, "teacher"),
      )
      for _ in range(3)
  ]
  assert [x["problem"] for x in answers] == [0, 4, 7] * 4
  size = sum(x.stat().st_size for x in (whole / "samples").iterdir())
  assert size < 50_000


def test_an_answers_verdict_is_that_of_the_metrics(whole):
  lines = {
      (x["step"], x["model"], x["set"], x["mode"]): x
      for x in metrics(whole)
      if "verdicts" in x
  }
  _, answers = report.read_samples(whole)
  for line in answers:
    found = lines[line["step"], line["model"], line["set"], line["mode"]]
    assert line["right"] is (found["verdicts"][line["problem"]] == "1")
    assert line["finished"] or line["length"] == 12


def test_divergences_are_the_exact_reverse_kl_of_the_first_student(
    whole, models, tokenizer
):
  rollouts, _ = report.read_samples(whole)
  rollouts = [x for x in rollouts if x["step"] == 1]
  config = settings(models)
  setup = setup_lib.prepare(config, whole)
  student, teacher = setup.models.student, setup.models.teacher
  ours, theirs = (
      setup_lib.load_model(spec, model, setup.models.mesh, config.seed)
      for spec, model in ((config.student, student), (config.teacher, teacher))
  )
  for line in rollouts:
    prompt = tokenizer.encode("".join(text for text, _ in line["prompt"]))
    kept = np.array([line["ids"]], np.int32)
    kl = toys.token_divergence(
        student,
        teacher,
        setup.models.loss.dist,
        ours,
        theirs,
        PromptBatch(
            jnp.array([prompt]),
            jnp.ones((1, len(prompt)), bool),
            jnp.zeros(1, jnp.int32),
        ),
        Rollout(jnp.array(kept), jnp.ones(kept.shape, bool)),
    )
    np.testing.assert_allclose(line["divergence"], kl[0], rtol=1e-3, atol=1e-5)
    assert min(line["divergence"]) > 0.01
    # Random models write bytes that are no characters.
    text = tokenizer.decode(line["ids"])
    assert "".join(line["texts"]).replace("\ufffd", "") == (
        text.replace("\ufffd", "")
    )


def test_a_run_that_goes_on_has_no_line_twice(
    whole, models, tmp_path, monkeypatch
):
  config, workdir = settings(models), tmp_path / "run"
  write, count = report.LineWriter.write, 0

  # Between the lines of a set's answers and the line of its metrics.
  def stop_before_the_evaluation(self, values):
    nonlocal count
    if "verdicts" in values and values["step"] == 4:
      count += 1
      raise KeyboardInterrupt
    write(self, values)

  monkeypatch.setattr(report.LineWriter, "write", stop_before_the_evaluation)
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, workdir)
  assert count == 1
  _, answers = report.read_samples(workdir)
  assert [x["step"] for x in answers] == [0] * 3 + [4] * 3
  monkeypatch.setattr(report.LineWriter, "write", write)
  loop.train(config, workdir)
  for name in ("rollouts.jsonl", "answers.jsonl"):
    ours, theirs = (x / "samples" / name for x in (workdir, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_samples_change_no_number_of_a_run(whole, models, tmp_path):
  spec = SamplesSpec(rollouts=0, problems=0)
  loop.train(settings(models, samples=spec), tmp_path / "run")
  assert metrics(tmp_path / "run") == metrics(whole)
  assert report.read_samples(tmp_path / "run") == ([], [])


def test_damaged_lines_are_left_out(tmp_path):
  directory = tmp_path / "samples"
  directory.mkdir()
  (directory / "answers.jsonl").write_text('{"step": 1}\n{"step": 2, "mo')
  (directory / "rollouts.jsonl").write_bytes(b"\xff\n[1]\n")
  assert report.read_samples(tmp_path) == ([], [])
  assert report.read_samples(tmp_path / "nothing") == ([], [])
