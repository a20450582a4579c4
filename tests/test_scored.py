"""The teacher scores whole answers of an evaluation."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toys

from prefix_distill import config as config_lib
from prefix_distill.config import RolloutSpec
from prefix_distill.errors import ConfigError
from prefix_distill.report import report
from prefix_distill.structs import Rollout
from prefix_distill.train import loop
from prefix_distill.train import setup


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return toys.write_models(tmp_path_factory.mktemp("models"))


def settings(models, scored=7, **changes):
  config = toys.run_config(*models, **changes)
  evaluation = dataclasses.replace(
      config.evaluation, scored=scored, teacher=False
  )
  return dataclasses.replace(config, evaluation=evaluation)


def evaluations(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line for line in lines if "mode" in line]


@pytest.mark.parametrize("tokens", [0, 3 * (96 + 12)])
def test_scores_are_those_of_each_answer_alone(models, tmp_path, tokens):
  """Seven answers in batches of three rollouts, in microbatches or not."""
  config = settings(models)
  config = dataclasses.replace(
      config,
      data=dataclasses.replace(config.data, batch_size=3),
      rollout=dataclasses.replace(config.rollout, per_prompt=1),
      optimizer=dataclasses.replace(config.optimizer, batch_tokens=tokens),
  )
  run = loop.Run(setup.prepare(config, tmp_path), tmp_path)
  prompts = jax.tree.map(lambda x: x[:7], run.setup.problems["heldout"].batch)
  draws = np.random.default_rng(0)
  answers = [draws.integers(3, 40, size) for size in (1, 12, 5, 7, 12, 2, 3)]
  found = run.programs.divergences(
      run.student_params, run.teacher_params, prompts, answers
  )
  assert [len(x) for x in found] == [len(x) for x in answers]
  for row, (nats, answer) in enumerate(zip(found, answers, strict=True)):
    prompt = jax.tree.map(lambda x, row=row: x[row : row + 1], prompts)
    mask = np.ones((1, len(answer)), bool)
    alone = toys.token_divergence(
        run.models.student,
        run.models.teacher,
        run.models.loss.dist.plain,
        run.student_params,
        run.teacher_params,
        prompt,
        Rollout(answer[None].astype(np.int32), mask),
    )
    np.testing.assert_allclose(nats, alone[0], rtol=2e-4, atol=1e-5)
  run.programs.close()
  run.checkpointer.close()


def test_a_run_says_how_far_the_student_is(models, tmp_path):
  """It comes nearer, the answers' sums are the mean, and so are positions."""
  loop.train(settings(models), tmp_path)
  lines = evaluations(tmp_path)
  assert [line["step"] for line in lines] == [0, 3]
  for line in lines:
    assert len(line["answer_kls"]) == 7
    mean, parts = np.mean(line["answer_kls"]), line["answer_kl_positions"]
    assert line["answer_kl"] == pytest.approx(mean, rel=1e-3)
    assert line["answer_kl"] == pytest.approx(sum(parts), rel=1e-5)
  assert 0 < lines[1]["answer_kl"] < lines[0]["answer_kl"]
  assert "nats from the teacher" in report.evaluation_line(
      "student", 3, lines[1]
  )


def test_scoring_has_the_memory_of_the_copy_that_decodes(
    models, tmp_path, monkeypatch
):
  """The weights that were laid out for decoding are gone by then."""
  run = loop.Run(setup.prepare(settings(models), tmp_path), tmp_path)
  seen, scored = [], run.programs.divergences

  def looked_at(*arguments):
    seen.append(sum(x.nbytes for x in jax.live_arrays()))
    return scored(*arguments)

  monkeypatch.setattr(run.programs, "divergences", looked_at)
  before = sum(x.nbytes for x in jax.live_arrays())
  run.evaluate(0)
  weights = sum(x.nbytes for x in jax.tree.leaves(run.student_params))
  assert seen[0] - before < weights / 2
  run.programs.close()
  run.checkpointer.close()


def test_a_student_that_is_the_teacher_is_at_zero(models, tmp_path):
  loop.train(settings([models[1], models[1]], steps=1), tmp_path)
  assert abs(evaluations(tmp_path)[0]["answer_kl"]) < 1e-5


def test_seqkds_student_is_scored_as_full_distillations_is(models, tmp_path):
  """Before training both are the same student, on the same answers."""
  found = {}
  for method in ("full", "seqkd"):
    # Random models hardly ever stop, so one that is trained answers.
    config = settings(
        [models[0], "bundled:teacher"],
        method=method,
        steps=1,
        rollout=RolloutSpec(per_prompt=1, max_len=250),
    )
    loop.train(config, tmp_path / method)
    found[method] = evaluations(tmp_path / method)
  full, seqkd = found["full"], found["seqkd"]
  assert [line["step"] for line in seqkd] == [0, 1]
  for name in ("answer_kl", "answer_kls", "answer_kl_positions"):
    np.testing.assert_allclose(seqkd[0][name], full[0][name], rtol=1e-5)
  assert 0 < seqkd[1]["answer_kl"] != seqkd[0]["answer_kl"]


def test_positions_are_told_apart():
  nats = [np.ones(70), np.full(10, 2.0)]
  found = report.divergence(nats)
  assert found["answer_kl"] == 45
  assert found["answer_kls"] == [70, 20]
  assert found["answer_kl_positions"] == [(16 + 20) / 2, 48 / 2, 6 / 2]
  assert report.divergence([np.ones(16)])["answer_kl_positions"] == [16]


def test_what_has_no_teacher_to_score_is_refused(models):
  config = settings(models, scored=0)
  evaluation = dataclasses.replace(config.evaluation, scored=4)
  with pytest.raises(ConfigError, match="'sft' but evaluation.scored is 4"):
    dataclasses.replace(config, method="sft", evaluation=evaluation)
  data = dataclasses.replace(config.data, teacher_prompt="{question} Hint.")
  with pytest.raises(ConfigError, match="evaluation.scored is 4 but data.tea"):
    dataclasses.replace(config, data=data, evaluation=evaluation)
  with pytest.raises(ConfigError, match="scored"):
    config_lib.EvaluationSpec(evaluation.sets, scored=-1)
