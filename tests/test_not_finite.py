"""Numbers that are not finite: seen, skipped, counted, and never kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toys

from prefix_distill.config import AuditedSpec
from prefix_distill.config import LossSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return toys.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(models, tmp_path):
  """Returns a function that starts a run, which is closed at the end."""
  runs = []

  def make(**changes):
    config = toys.run_config(*models, **changes)
    run = loop.Run(setup_lib.prepare(config, tmp_path), tmp_path)
    run.save()
    runs.append(run)
    return run

  yield make
  for run in runs:
    run.programs.close()
    run.checkpointer.close()


def _planted(params, value):
  """Returns weights with one number replaced."""
  scale = params["final_norm"]["scale"].at[3].set(value)
  return params | {"final_norm": {"scale": scale}}


def _state(run):
  return jax.device_get((run.state.params, run.state.opt_state))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["exact", "policy_gradient"])
def test_a_teacher_with_one_bad_number_changes_nothing(start, value, form):
  run = start(loss=LossSpec(form))
  good, before = run.teacher_params, _state(run)
  run.teacher_params = _planted(good, value)
  line = run.update(0)
  assert (line["skipped"], run.cause) == (1, "the teacher")
  assert int(run.state.step) == 1
  jax.tree.map(np.testing.assert_array_equal, _state(run), before)
  batch = safetensors.numpy.load_file(
      run.workdir / "skipped/step-1.safetensors"
  )
  assert batch["prompt_tokens"].shape == batch["prompt_mask"].shape
  assert batch["tokens"].shape == batch["mask"].shape == (16, 8)
  # With a good one the run goes on.
  run.teacher_params = good
  line = run.update(1)
  assert line["skipped"] == 1 and np.isfinite(line["loss"])
  assert run.totals.skipped_running == 0
  run.check_skipped(2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_student_with_one_bad_number_is_named(start, value):
  run = start()
  params = _planted(run.state.params, value)
  run.state = dataclasses.replace(run.state, params=params)
  assert run.update(0)["skipped"] == 1
  assert run.cause == "the sampler"  # It meets the number first.


def test_a_schedule_learns_nothing_of_a_skipped_update(start):
  # To an audit a divergence of NaN would look like none, and end the run.
  run = start(prefix=PrefixSpec("audited", audited=AuditedSpec(2)))
  run.teacher_params = _planted(run.teacher_params, np.nan)
  before = run.totals.schedule
  run.update(0)
  assert run.totals.schedule == before and run.cap == 2


@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_a_run_whose_numbers_stay_bad_ends_with_a_sentence(
    models, tmp_path, monkeypatch, scale
):
  # The settings bound the learning rate, so the schedule is changed behind
  # them.
  learning_rate = step.learning_rate

  def exploding(spec, steps):
    schedule = learning_rate(spec, steps)
    return lambda count: scale * (schedule(count) / spec.learning_rate)

  monkeypatch.setattr(step, "learning_rate", exploding)
  config = toys.run_config(
      *models,
      steps=9,
      optimizer=OptimizerSpec(learning_rate=1.0, max_skipped=2),
  )
  with pytest.raises(loop.NotFiniteError) as error:
    loop.train(config, tmp_path)
  text = str(error.value)
  assert "last 2 updates, up to 2, because" in text and "the optimizer" in text
  assert "last good checkpoint is that of update 0" in text
  lines = [
      json.loads(line)
      for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert [x["skipped"] for x in lines if "skipped" in x] == [1, 2]
  assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("metrics", "phase"),
    [
        ({"sampler": np.nan, "entropy_teacher": np.nan}, "the sampler"),
        ({"sampler": 0.0, "entropy_teacher": np.inf}, "the teacher"),
        ({"cross_entropy": -np.inf, "grad_norm": np.nan}, "the student"),
        ({"loss": 0.0, "grad_norm": np.inf}, "the gradient"),
        ({"grad_norm": 1.0, "update_norm": np.inf}, "the optimizer"),
    ],
)
def test_the_first_phase_is_named(metrics, phase):
  assert step.first_not_finite(metrics) == phase


def test_what_overflows_while_it_is_summed_is_skipped_too():
  # Each number of the gradient is finite, and its norm is not.
  tx = step.optimizer(OptimizerSpec(learning_rate=0.1, clip_norm=0.0), 9)
  state = step.init_state({"x": jnp.ones(4)}, tx)
  total = step.Gradient(
      {"x": jnp.full(4, 3e38)},
      {"loss": (jnp.float32(1), jnp.int32(1))},
      jnp.int32(1),
  )
  new, metrics = step.apply(tx, "rollouts", state, total)
  assert not metrics["finite"]
  np.testing.assert_array_equal(new.params["x"], 1)
  assert step.first_not_finite(metrics) == "the gradient"
