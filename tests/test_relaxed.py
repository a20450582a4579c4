"""The relaxed loss: which tokens count, and what an update of them is."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from configs import relaxed as experiment
from prefix_distill import config as config_lib
from prefix_distill import errors
from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.config import RelaxedSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import generate
from prefix_distill.rollout.generate import Truncation
from prefix_distill.structs import Limits
from prefix_distill.structs import TeacherScores
from prefix_distill.train import loop
from prefix_distill.train import microbatch
from prefix_distill.train import step as step_lib

_LENGTHS, _COLUMNS, _WIDTH = [1, 3, 8, 8, 2, 5, 8, 1], 8, 8
_ROWS, _REAL = len(_LENGTHS), toys.NUM_TOKENS
_DIST = toys.distribution(stop_ids=toys.STOPS, temperature=0.7)
_FLOOR = -0.4
_OFF = -np.inf
# Of each phase: the least reward, and the least entropy.
_PHASES = {"exploration": (_FLOOR, _OFF), "refinement": (_OFF, 0.6)}
EVERY_PHASE = pytest.mark.parametrize("phase", _PHASES)


def _normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


_ROLLOUT = dataclasses.replace(
    toys.rollout(_LENGTHS, _COLUMNS),
    entropy=jnp.abs(_normal(3, _ROWS, _COLUMNS)),
)
_SCORES = TeacherScores(
    log_probs=-jnp.abs(3 * _normal(4, _ROWS, _COLUMNS)),
    entropy=_normal(5, _ROWS, _COLUMNS),
    top1=jnp.zeros((_ROWS, _COLUMNS), jnp.int32),
)
_LOSS = SampledLoss(_DIST, floor=_FLOOR, memory=16 * 16 * 7)


def _limits(phase):
  return Limits(*map(jnp.float32, _PHASES[phase]))


@pytest.mark.parametrize(
    "name, weight, wanted",
    [
        ("log_odds", 0.1, np.log(1 / 9)),
        ("scaled_log", 0.1, np.log(0.1) / 0.9),
        ("log", 0.1, np.log(0.1)),
        ("log_odds", 0.3, np.log(3 / 7)),
        ("scaled_log", 1 - 1e-9, -1.0),
    ],
)
def test_the_readings_of_the_floor(name, weight, wanted):
  assert loss_lib.floor(RelaxedSpec(name, weight)) == pytest.approx(wanted)


def test_what_the_readings_mean():
  """The bounds of the docstring, of mixtures with any token's probability."""
  a, ratio = 0.3, np.geomspace(1e-12, 100, 1001)
  mixed = np.log(a + (1 - a) * ratio)  # log(m / p) of r = q / p.
  floors = {
      name: loss_lib.floor(RelaxedSpec(name, a))
      for name in ("log_odds", "scaled_log", "log")
  }
  assert mixed.min() == pytest.approx(floors["log"])
  assert mixed.min() / (1 - a) == pytest.approx(floors["scaled_log"])
  # The student's share of the mixture is the larger one below the floor.
  below = np.log(ratio) < floors["log_odds"]
  np.testing.assert_array_equal(below, a > (1 - a) * ratio)


def test_the_floor_bounds_the_reward_from_below_only():
  student, teacher = jnp.full(3, -1.0), jnp.array([-26.0, -1.5, -0.1])
  signal = SampledLoss(_DIST, floor=-2.0).signal(student, teacher)
  # A penalty of 25 nats becomes 2; what is milder, or praise, stays.
  np.testing.assert_allclose(signal, [2, 0.5, -0.9], rtol=1e-5)


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.2, 0.5, 1.0])
def test_the_top_share_is_that_of_all_arrays_together(share):
  rng = np.random.default_rng(0)
  values = [rng.exponential(size=n).astype(np.float32) for n in (40, 7, 30)]
  values[1][:3] = -0.0, 0.0, 1e-40
  values[2][5:9] = values[2][4]  # Equal numbers are not told apart.
  masks = [rng.random(len(x)) < 0.8 for x in values]
  masks[1][:3] = True
  least = jax.jit(step_lib.top_share, static_argnums=0)(
      share, [jnp.asarray(x) for x in values], masks
  )
  kept = np.concatenate([x[m] for x, m in zip(values, masks, strict=True)])
  ordered = np.sort(kept)[::-1]
  count = max(round(share * len(kept)), 1)
  assert float(least) == ordered[count - 1]


def _reference(hidden, head, limits):
  """Losses, which tokens count, and gradients of the sum, in float64."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  logits = (hidden @ head.T)[..., :_REAL] / _DIST.temperature
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  ids = np.asarray(_ROLLOUT.tokens)[..., None]
  token = np.log(np.take_along_axis(probs, ids, -1))[..., 0]
  stop = np.log(probs[..., list(toys.STOPS)].sum(-1))
  event = np.where(np.isin(ids[..., 0], toys.STOPS), stop, token)
  reward = np.asarray(_SCORES.log_probs, np.float64) - event
  ratio = np.exp(token - np.asarray(_ROLLOUT.behavior_log_probs, np.float64))
  least_reward, least_entropy = map(float, (limits.reward, limits.entropy))
  counted = np.asarray(_ROLLOUT.mask) & (reward >= least_reward)
  counted &= np.asarray(_ROLLOUT.entropy) >= least_entropy
  losses = np.where(counted, -ratio * np.maximum(reward, _FLOOR), 0)
  one_hot = np.arange(_REAL) == ids
  slopes = losses[..., None] * (one_hot - probs) / _DIST.temperature
  d_head = np.zeros_like(head)
  d_head[:_REAL] = np.einsum("bpv,bpd->vd", slopes, hidden)
  return losses, counted, (slopes @ head[:_REAL], d_head)


@EVERY_PHASE
def test_losses_masks_and_gradients_equal_float64(phase):
  hidden, head = _normal(1, _ROWS, _COLUMNS, _WIDTH), _normal(2, 16, _WIDTH)
  student = Model(toys.model_config(vocab_size=16, dim=_WIDTH))
  limits = _limits(phase)

  def value(hidden, head):
    return chunked_head.weighted_sum(
        *_LOSS.arguments(
            student,
            {"head": {"weight": head}},
            None,
            hidden,
            _ROLLOUT,
            _SCORES,
            _ROLLOUT.mask,
            limits,
        )
    )

  (total, metrics), gradients = jax.jit(
      jax.value_and_grad(value, (0, 1), has_aux=True)
  )(hidden, head)
  losses, counted, wanted = _reference(hidden, head, limits)
  mask = np.asarray(_ROLLOUT.mask)
  assert 5 < counted.sum() < mask.sum() - 3
  np.testing.assert_array_equal(
      np.asarray(metrics["counted"], bool)[mask], counted[mask]
  )
  assert float(total) == pytest.approx(losses.sum(), rel=1e-5)
  for x, y in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())
  # A token that does not count has a gradient of exactly nothing.
  assert not np.asarray(gradients[0])[~counted].any()


def test_a_reward_that_is_no_number_is_not_dropped():
  scores = dataclasses.replace(
      _SCORES, log_probs=_SCORES.log_probs.at[2, 3].set(np.nan)
  )
  hidden, head = _normal(1, _ROWS, _COLUMNS, _WIDTH), _normal(2, 16, _WIDTH)
  student = Model(toys.model_config(vocab_size=16, dim=_WIDTH))
  total, _ = chunked_head.weighted_sum(
      *_LOSS.arguments(
          student,
          {"head": {"weight": head}},
          None,
          hidden,
          _ROLLOUT,
          scores,
          _ROLLOUT.mask,
          _limits("exploration"),
      )
  )
  assert np.isnan(total)


_STUDENT, _PARAMS = toys.model(0, num_layers=1)
_PROMPTS = toys.prompts(_ROWS)
_MESH = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
_WATCH = step_lib.Watch(_COLUMNS, toys.STOPS)
_UPDATE_LOSS = functools.partial(
    step_lib.distillation_loss, _STUDENT, _LOSS, _WATCH, step_lib.Window()
)


_SGD = optax.sgd(1.0)
_gradient = jax.jit(step_lib.gradient, static_argnums=0)
_apply = jax.jit(functools.partial(step_lib.apply, _SGD, "tokens"))
_limits_of = jax.jit(
    functools.partial(step_lib.limits, step_lib.Window(), _FLOOR, 0.3)
)
_take = jax.jit(microbatch.take, static_argnums=(0, 1))


@functools.cache
def _updated(parts, phase):
  """An update with a rate of 1, in so many microbatches."""
  whole = step_lib.Microbatch(_PROMPTS, _ROLLOUT, _SCORES)
  pieces = [_take(parts, _MESH, whole, i) for i in range(parts)]
  refines = phase == "refinement"
  limits = _limits_of(refines, [piece.rollout for piece in pieces])
  state, total = step_lib.init_state(_PARAMS, _SGD), None
  for piece in pieces:
    inputs = piece._replace(limits=limits)
    total = _gradient(_UPDATE_LOSS, state.params, None, inputs, total)
  return *_apply(state, total), limits, total


@EVERY_PHASE
def test_the_sum_is_divided_by_the_tokens_that_count(phase):
  state, metrics, limits, total = _updated(1, phase)
  hidden = _STUDENT.prefix_hidden(_PARAMS, _PROMPTS, _ROLLOUT)
  losses, counted, _ = _reference(hidden, _PARAMS["head"]["weight"], limits)
  assert float(metrics["loss"]) == pytest.approx(
      losses.sum() / counted.sum(), rel=1e-5
  )
  tokens = sum(_LENGTHS)
  assert float(metrics["counted"]) == pytest.approx(counted.sum() / tokens)
  if phase == "refinement":
    assert counted.sum() == round(0.3 * tokens)
  jax.tree.map(
      lambda p, new, g: np.testing.assert_allclose(
          new, p - g / counted.sum(), atol=1e-6
      ),
      _PARAMS,
      state.params,
      total.grads,
  )


@pytest.mark.parametrize("parts", [2, 8])
def test_microbatches_do_not_change_the_update(parts):
  for phase in _PHASES:
    one, ours = _updated(1, phase), _updated(parts, phase)
    assert ours[2] == one[2]  # The same limits, to the last bit.
    for name in ("loss", "counted", "grad_norm"):
      np.testing.assert_allclose(ours[1][name], one[1][name], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        ours[0].params,
        one[0].params,
    )


def test_only_tokens_of_the_window_are_ranked():
  window = step_lib.Window(0, 3)
  limits = step_lib.limits(window, _FLOOR, 0.3, True, [_ROLLOUT])
  inside = np.asarray(_ROLLOUT.mask) & (np.arange(_COLUMNS) < 3)
  ordered = np.sort(np.asarray(_ROLLOUT.entropy)[inside])[::-1]
  count = round(0.3 * inside.sum())
  assert float(limits.entropy) == ordered[count - 1]
  assert float(limits.reward) == -np.inf


def test_the_sampler_records_the_entropies_of_the_student():
  config = generate.SamplerConfig(
      toys.STOPS, toys.PAD, _REAL, 2, Truncation(top_k=3), entropy=True
  )
  draw = generate.Draw.of(_COLUMNS, 0.7)
  rollout = jax.jit(generate.sample, static_argnums=(0, 1, 2))(
      _STUDENT, config, _COLUMNS, _PARAMS, _PROMPTS, jax.random.key(0), draw
  )
  batch = generate.repeat_prompts(2, _PROMPTS)
  hidden = _STUDENT.prefix_hidden(_PARAMS, batch, rollout)
  logits = np.asarray(_STUDENT.logits(_PARAMS, hidden), np.float64)
  probs = np.exp(logits[..., :_REAL] / 0.7)
  probs /= probs.sum(-1, keepdims=True)
  mask = np.asarray(rollout.mask)
  assert mask.any() and not mask.all()
  np.testing.assert_allclose(
      np.asarray(rollout.entropy)[mask],
      -(probs * np.log(probs)).sum(-1)[mask],
      rtol=1e-4,
  )
  assert not np.asarray(rollout.entropy)[~mask].any()


@pytest.mark.parametrize("name", ["", "r1-1.5b", "qwen3-1.7b", "qwen3-8b"])
def test_the_recipes_are_whole(name):
  config = config_lib.from_dict(experiment.get_config(name).to_dict())
  loss = config.loss
  assert (loss.form, loss.normalize) == ("relaxed", "tokens")
  assert loss.relaxed.switch_step == config.steps // 2
  assert config.method == "full"


def test_an_unknown_recipe_is_refused():
  with pytest.raises(errors.ConfigError, match="use one of small, r1-1.5b"):
    experiment.get_config("r1-7b")


def _recipe(tmp_path):
  """The recipe of the paper's pair on small random models, of 4 updates."""
  questions = tmp_path / "questions.jsonl"
  rows = [{"question": f"What is {i}?"} for i in range(16)]
  questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
  settings = experiment.get_config("r1-1.5b")
  settings.steps = 4
  settings.loss.relaxed.switch_step = 2
  settings.student.path, settings.teacher.path = toys.write_models(tmp_path)
  settings.data.train = config_lib.DatasetSpec(str(questions)).__dict__
  settings.data.batch_size, settings.data.max_prompt_len = 4, 64
  settings.rollout.per_prompt, settings.rollout.max_len = 2, 16
  settings.prefix.buckets = (16,)
  settings.optimizer.batch_tokens = 4 * (64 + 16)  # Two microbatches.
  settings.mesh.fsdp = 1
  settings.evaluation.sets, settings.evaluation.between = {}, ()
  settings.evaluation.max_len = 16
  settings.checkpoint.every = 1
  return config_lib.from_dict(settings.to_dict())


def _lines(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [x for x in map(json.loads, lines) if "prefix_len" in x]


def test_a_run_is_resumed_exactly_across_the_switch(tmp_path, monkeypatch):
  config = _recipe(tmp_path)
  loop.train(config, tmp_path / "whole")
  whole = _lines(tmp_path / "whole")
  phases = ["exploration"] * 2 + ["refinement"] * 2
  assert [x["phase"] for x in whole] == phases
  for i, line in enumerate(whole):
    tokens = line["tokens"] - (whole[i - 1]["tokens"] if i else 0)
    if line["phase"] == "refinement":
      # The first tokens of a prompt's rollouts have the same entropy.
      assert -0.1 < line["counted"] * tokens - round(0.2 * tokens) < 3
      assert line["least_entropy"] > 0
    else:
      assert 0.2 < line["counted"] < 1
      assert "least_entropy" not in line
  # The second phase runs the programs of the first.
  assert [x["compilations_update"] for x in whole] == [1] * 4

  update = loop.Run.update

  def stop_at_one(self, step):
    if step == 1:
      raise KeyboardInterrupt
    return update(self, step)

  monkeypatch.setattr(loop.Run, "update", stop_at_one)
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, tmp_path / "parts")
  monkeypatch.setattr(loop.Run, "update", update)
  loop.train(config, tmp_path / "parts")
  names = ("kl", "loss", "counted", "phase", "grad_norm", "flops", "tokens")
  for ours, line in zip(_lines(tmp_path / "parts"), whole, strict=True):
    assert {n: ours[n] for n in names} == {n: line[n] for n in names}
    assert ours.get("least_entropy") == line.get("least_entropy")


def test_eight_devices_compute_what_one_does(tmp_path):
  process = toys.start("eight_devices.py", tmp_path, "relaxed", devices=8)
  (printed,) = toys.finish([process], seconds=240)
  one, ours = map(json.loads, printed.strip().splitlines())
  counted = np.array(one["counted"])
  # Two updates of the first phase, and three of the second.
  assert (counted[:2, 1] == -np.inf).all() and (counted[2:, 1] > 0).all()
  assert (counted[:2, 0] > 0.3).all() and (counted[:2, 0] < 1).all()
  np.testing.assert_allclose(counted[2:, 0], 0.2, atol=0.02)
  assert ours["tokens"] == one["tokens"]
  np.testing.assert_allclose(ours["counted"], counted, rtol=1e-4)
  np.testing.assert_allclose(ours["norms"], one["norms"], rtol=1e-3)
  assert ours["compilations"] == one["compilations"]
