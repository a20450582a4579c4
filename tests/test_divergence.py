import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefix_distill.distill import divergence
from prefix_distill.distill.divergence import Distribution
import toys

DIST = toys.distribution()
MERGED = toys.distribution(stop_ids=toys.STOPS)
LN2 = np.log(2)


def normal(seed: int, *shape: int) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(2 * rng.normal(size=shape), jnp.float32)


def log_softmax(logits: jax.Array, dist: Distribution) -> np.ndarray:
  x = np.asarray(logits, np.float64)[..., : dist.num_tokens]
  x = x / dist.temperature
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl64(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
  return (np.exp(student) * (student - teacher)).sum(-1)


def merge(log_probs: np.ndarray) -> np.ndarray:
  """Puts one event, the sum, in the place of the stop tokens."""
  probs = np.exp(log_probs)
  stop = probs[..., list(toys.STOPS)].sum(-1, keepdims=True)
  others = np.delete(probs, toys.STOPS, axis=-1)
  return np.log(np.concatenate([others, stop], axis=-1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reverse_kl_equals_a_calculation_by_hand(temperature):
  halves = np.log([1 / 2, 1 / 4, 1 / 8, 1 / 8])
  swapped = halves[[1, 0, 2, 3]]
  student = temperature * np.stack([halves, halves, halves]) + 5
  teacher = temperature * np.stack([halves, np.zeros(4), swapped])
  kl = divergence.reverse_kl(
      jnp.asarray(student), jnp.asarray(teacher), Distribution(temperature, 4)
  )
  # 0; H(uniform) - H(student) = 2 - 7/4 bits; 1/2 - 1/4 bits.
  np.testing.assert_allclose(kl, [0, LN2 / 4, LN2 / 4], atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reverse_kl_equals_float64(temperature):
  dist = toys.distribution(temperature=temperature)
  student, teacher = normal(0, 5, 7, 13), normal(1, 5, 7, 13)
  wanted = kl64(log_softmax(student, dist), log_softmax(teacher, dist))
  assert wanted.min() > 0.1
  np.testing.assert_allclose(
      divergence.reverse_kl(student, teacher, dist), wanted, rtol=1e-5
  )


@pytest.mark.parametrize("dist", [DIST, MERGED])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(dist):
  logits = normal(0, 6, 13)
  loss, grad = jax.value_and_grad(
      lambda x: divergence.reverse_kl(x, logits, dist).sum()
  )(logits)
  assert abs(loss) < 1e-6
  assert np.abs(grad).max() < 1e-6


def test_vocabularies_of_different_padding_compare_on_the_real_ids():
  student, teacher = normal(0, 6, 20), normal(1, 6, 16)
  kl, grads = jax.value_and_grad(
      lambda *x: divergence.reverse_kl(*x, DIST).sum(), (0, 1)
  )(student, teacher)
  wanted = kl64(log_softmax(student, DIST), log_softmax(teacher, DIST)).sum()
  np.testing.assert_allclose(kl, wanted, rtol=1e-5)
  for grad in grads:
    assert (grad[:, toys.NUM_TOKENS :] == 0).all()
    assert (grad[:, : toys.NUM_TOKENS] != 0).all()


def test_merged_stop_tokens_count_as_one_event():
  student, teacher = normal(0, 50, 13), normal(1, 50, 13)
  wanted = kl64(
      merge(log_softmax(student, MERGED)), merge(log_softmax(teacher, MERGED))
  )
  np.testing.assert_allclose(
      divergence.reverse_kl(student, teacher, MERGED), wanted, rtol=1e-4
  )
  for token in range(toys.NUM_TOKENS):
    tokens = jnp.full(50, token)
    merged = merge(log_softmax(student, MERGED))[:, min(token, toys.STOPS[0])]
    np.testing.assert_allclose(
        divergence.token_log_probs(student, tokens, MERGED), merged, rtol=1e-5
    )


def test_the_name_of_the_stop_matters_only_if_stops_are_not_merged():
  student = normal(0, 6, 13).at[:, toys.STOPS[0]].set(8.0)
  ours, theirs = list(toys.STOPS), list(toys.STOPS[::-1])
  swapped = student.at[:, ours].set(student[:, theirs])
  for dist, least, most in ((MERGED, 0, 1e-5), (DIST, 3, np.inf)):
    same = divergence.reverse_kl(student, student, dist)
    other = divergence.reverse_kl(student, swapped, dist)
    assert least <= (other - same).min()
    assert (other - same).max() <= most


@pytest.mark.parametrize("chunk", [1, 4, 10, 100])
def test_fused_divergences_equal_the_dense_ones(chunk):
  dist = dataclasses.replace(MERGED, temperature=0.7, chunk=chunk)
  hidden = normal(0, 3, 10, 6), normal(1, 3, 10, 8)
  heads = normal(2, 20, 6), normal(3, 16, 8)
  tokens = jnp.asarray(np.random.default_rng(4).integers(0, 13, (3, 10)))
  weights = normal(5, 3, 10)

  def fused(hidden, heads):
    kl = divergence.fused_reverse_kl(
        hidden[0], heads[0], hidden[1], heads[1], dist
    )
    log_probs = divergence.fused_token_log_probs(
        hidden[0], heads[0], tokens, dist
    )
    return jnp.sum(weights * (kl + log_probs)), (kl, log_probs)

  def dense(hidden, heads):
    student, teacher = (x @ w.T for x, w in zip(hidden, heads, strict=True))
    kl = divergence.reverse_kl(student, teacher, dist)
    log_probs = divergence.token_log_probs(student, tokens, dist)
    return jnp.sum(weights * (kl + log_probs)), (kl, log_probs)

  (_, ours), our_grads = jax.jit(
      jax.value_and_grad(fused, (0, 1), has_aux=True)
  )(hidden, heads)
  (_, wanted), grads = jax.jit(
      jax.value_and_grad(dense, (0, 1), has_aux=True)
  )(hidden, heads)
  assert ours[0].shape == ours[1].shape == (3, 10)
  for x, y in zip(
      jax.tree.leaves((ours, our_grads)),
      jax.tree.leaves((wanted, grads)),
      strict=True,
  ):
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_only_one_chunk_of_logits_exists_at_a_time():
  hidden, head = normal(0, 3, 64, 6), normal(1, 20, 6)
  dist = dataclasses.replace(DIST, chunk=8)

  def loss(hidden, head):
    return divergence.fused_reverse_kl(hidden, head, hidden, head, dist).sum()

  def shapes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.shape for v in equation.outvars)
      for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          yield from shapes(inner)

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head).jaxpr
  vocabulary = [np.prod(s) for s in shapes(jaxpr) if 20 in s or 13 in s]
  assert max(vocabulary) == 3 * 8 * 20


@pytest.mark.parametrize("off_policy", [False, True])
def test_policy_gradient_is_that_of_reverse_kl_in_expectation(off_policy):
  student, teacher = normal(0, 13), normal(1, 13)
  sampler = jax.nn.log_softmax(normal(2, 13) if off_policy else student)

  def expected(logits):
    loss, _ = divergence.policy_gradient(
        jax.nn.log_softmax(logits), sampler, jax.nn.log_softmax(teacher)
    )
    return jnp.sum(jnp.exp(sampler) * loss)

  loss, grad = jax.value_and_grad(expected)(student)
  wanted, exact = jax.value_and_grad(
      lambda x: divergence.reverse_kl(x, teacher, DIST)
  )(student)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  assert np.abs(exact).max() > 0.1
  np.testing.assert_allclose(grad, exact, atol=1e-5)


def test_the_sampled_kl_is_the_difference_and_its_ratio_one_on_policy():
  student, teacher = -jnp.array([0.5, 1.0, 2.0]), -jnp.array([1.0, 1.0, 0.25])
  difference = np.array([0.5, 0.0, -1.75])
  loss, kl = divergence.policy_gradient(student, student, teacher)
  np.testing.assert_allclose(kl, difference)
  np.testing.assert_allclose(loss, difference)
  halved, kl = divergence.policy_gradient(student, student + LN2, teacher)
  np.testing.assert_allclose(kl, difference)
  np.testing.assert_allclose(halved, difference / 2, rtol=1e-6)
  grad = jax.grad(
      lambda x: divergence.policy_gradient(x, student, teacher)[1].sum()
  )(student)
  assert (grad == 0).all()
