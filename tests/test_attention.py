"""Every way to attend computes the same, and compiles where it belongs."""

import dataclasses
import json

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.models import attention
from prefix_distill.models import kv_cache


def _inputs(length, head_dim=8, heads=4, kv_heads=2, dtype=jnp.float32):
  rng = np.random.default_rng(length)
  shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
  return [jnp.array(rng.standard_normal(s), dtype) for s in shapes]


def _by_hand(q, k, v):
  """One query at a time, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out, groups = np.zeros(q.shape), q.shape[2] // k.shape[2]
  for row, at, head in np.ndindex(q.shape[:3]):
    keys, values = (x[row, : at + 1, head // groups] for x in (k, v))
    scores = keys @ q[row, at, head] / np.sqrt(q.shape[3])
    weights = np.exp(scores - scores.max())
    out[row, at, head] = weights @ values / weights.sum()
  return out


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
def test_attention_in_blocks_is_attention_by_hand(length, monkeypatch):
  monkeypatch.setattr(attention, "_QUERY_BLOCK", 16)
  inputs = _inputs(length)
  found = attention.causal(*inputs)
  np.testing.assert_allclose(found, _by_hand(*inputs), atol=1e-5)


def test_attention_in_blocks_has_the_same_gradient(monkeypatch):
  inputs = _inputs(40)
  weight = jnp.array(np.random.default_rng(1).standard_normal((2, 40, 4, 8)))

  def gradients():
    loss = lambda *x: jnp.sum(attention.blocked(*x) * weight)  # noqa: E731
    return jax.grad(loss, (0, 1, 2))(*inputs)

  whole = gradients()
  monkeypatch.setattr(attention, "_QUERY_BLOCK", 16)
  for ours, wanted in zip(gradients(), whole, strict=True):
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_no_square_of_a_long_sequence_is_built():
  length = 4 * attention._QUERY_BLOCK
  inputs = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 3

  def loss(*x):
    return jnp.sum(attention.blocked(*x))

  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile()
  square = 2 * length**2 * 4  # Of both heads, in bytes.
  assert compiled.memory_analysis().temp_size_in_bytes < square


@pytest.mark.parametrize("length, head_dim", [(100, 64), (256, 128)])
def test_the_kernel_for_tpus_computes_the_same(length, head_dim):
  inputs = _inputs(length, head_dim)
  found = attention.splash_kernel(*inputs, interpret=True)
  np.testing.assert_allclose(found, attention.blocked(*inputs), atol=2e-3)


@pytest.mark.aot
@pytest.mark.parametrize(
    "platform, kernel", [("tpu", "tpu_custom_call"), ("gpu", "__cudnn$fmha")]
)
def test_programs_compile_with_the_platforms_kernel(platform, kernel):
  """Ahead of time, on a machine without the accelerator."""
  process = toys.start("compile_for.py", platform, devices=1)
  (printed,) = toys.finish([process], seconds=500)
  found = json.loads(printed.strip().splitlines()[-1])
  for program in ("forward", "backward", "rollout"):
    calls = [name for name in found[program] if name.startswith(kernel)]
    assert calls, (program, found[program])


def test_a_tpus_kernel_over_the_cache_looks_up_to_each_rows_length():
  """Interpreted: the pages of the cache as our layout has them."""
  rng = np.random.default_rng(0)
  rows, heads, groups, columns, size = 3, 2, 2, 512, 128
  kernel = attention.CacheKernel("paged", kv_cache.Layout("kbmh", "kbmh"))

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

  layer = kv_cache.LayerCache(
      draw(heads, rows, columns, size), draw(heads, rows, columns, size)
  )
  lengths = jnp.array([0, 130, 511], jnp.int32)
  projected = (
      draw(rows, heads * groups, size),
      draw(rows, heads, size),
      draw(rows, heads, size),
  )
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    found, kept = attention.over_cache(kernel, layer, projected, lengths)
  plain = dataclasses.replace(kernel, name="plain")
  wanted, same = attention.over_cache(plain, layer, projected, lengths)
  np.testing.assert_array_equal(kept.keys, same.keys)
  np.testing.assert_allclose(
      np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=0.03
  )
