import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.config import OptimizerSpec
from prefix_distill.models.transformer import Model
from prefix_distill.train import step

SPEC = OptimizerSpec(learning_rate=0.5)


def rates(steps: int, **changes) -> list[float]:
  schedule = step.learning_rate(
      dataclasses.replace(SPEC, **changes), steps
  )
  return [float(schedule(i)) for i in range(steps)]


def first_update(params, grads, **changes):
  tx = step.optimizer(dataclasses.replace(SPEC, **changes), 10)
  return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)


def test_without_a_warm_up_the_rate_is_constant():
  assert rates(3) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_rate_rises_evenly_to_the_peak_over_the_warm_up(decay):
  rising = rates(9, warmup_steps=4, decay=decay)[:4]
  assert rising == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_a_constant_rate_stays_at_the_peak():
  assert rates(6, warmup_steps=1) == [0.5] * 6
  assert rates(6, warmup_steps=2)[1:] == [0.5] * 5


def test_a_cosine_falls_from_the_peak_to_its_final_fraction():
  falling = rates(9, decay="cosine", final_fraction=0.1)
  assert falling[0] == 0.5
  assert falling == sorted(falling, reverse=True)
  assert falling[4] == pytest.approx(0.275, abs=0.06)
  assert falling[-1] == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("clip", [0.0, 1e-8])
def test_the_clip_scales_the_whole_gradient_to_its_norm(clip):
  params = {"weight": jnp.zeros(2), "scale": jnp.zeros(1)}
  grads = {"weight": jnp.array([60.0, 0.0]), "scale": jnp.array([80.0])}
  # Without moments Adam's step is g / (|g| + 1e-8): a gradient's size shows
  # in it only if it is as small as that.
  update = first_update(params, grads, clip_norm=clip, b1=0.0, b2=0.0)
  for name, share in (("weight", 0.6), ("scale", 0.8)):
    size = share * (clip or 100.0)
    wanted = -0.5 * size / (size + 1e-8)
    assert float(update[name][0]) == pytest.approx(wanted, rel=1e-4)


def test_a_gradient_below_the_clip_is_left_alone():
  params, grads = {"weight": jnp.zeros(1)}, {"weight": jnp.array([1e-8])}
  update = first_update(params, grads, clip_norm=1.0, b1=0.0, b2=0.0)
  assert float(update["weight"][0]) == pytest.approx(-0.25, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_weight_decay_is_on_matrices_only(family):
  params = jax.tree.map(
      lambda x: jnp.full(x.shape, 2.0),
      Model(toys.model_config(family=family)).abstract_params(),
  )
  update = first_update(
      params, jax.tree.map(jnp.zeros_like, params), weight_decay=0.1
  )
  kinds = {False: set(), True: set()}
  for path, leaf in jax.tree_util.tree_flatten_with_path(update)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    vector = "norm" in name or "bias" in name
    kinds[vector].add(name)
    np.testing.assert_allclose(leaf, 0.0 if vector else -0.1, rtol=1e-6)
  assert len(kinds[False]) == 9
  extra = {"qwen3": 2, "qwen2": 3, "llama": 0}[family]
  assert len(kinds[True]) == 3 + extra
