import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.distill import divergence
from prefix_distill.distill.divergence import Distribution

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


def test_a_token_is_itself_and_an_event():
  logits = normal(0, 50, 13)
  whole = log_softmax(logits, MERGED)
  for token in range(toys.NUM_TOKENS):
    tokens = jnp.full(50, token)
    for dist, events in ((MERGED, merge(whole)), (DIST, whole)):
      ours, event = divergence.token_log_probs(logits, tokens, dist)
      wanted = events[:, min(token, events.shape[1] - 1)]
      np.testing.assert_allclose(ours, whole[:, token], rtol=1e-4)
      np.testing.assert_allclose(event, wanted, rtol=1e-4)


def test_the_name_of_the_stop_matters_only_if_stops_are_not_merged():
  student = normal(0, 6, 13).at[:, toys.STOPS[0]].set(8.0)
  ours, theirs = list(toys.STOPS), list(toys.STOPS[::-1])
  swapped = student.at[:, ours].set(student[:, theirs])
  for dist, least, most in ((MERGED, 0, 1e-5), (DIST, 3, np.inf)):
    same = divergence.reverse_kl(student, student, dist)
    other = divergence.reverse_kl(student, swapped, dist)
    assert least <= (other - same).min()
    assert (other - same).max() <= most


HIDDEN = normal(0, 3, 10, 6), normal(1, 3, 10, 8)
HEADS = normal(2, 20, 6), normal(3, 16, 8)
TOKENS = jnp.asarray(np.random.default_rng(4).integers(0, 13, (3, 10)))
COOL = dataclasses.replace(MERGED, temperature=0.7)


def dense(hidden, heads):
  student, teacher = (x @ w.T for x, w in zip(hidden, heads, strict=True))
  kl = divergence.reverse_kl(student, teacher, COOL)
  return kl, *divergence.token_log_probs(student, TOKENS, COOL)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(function):
  def loss(*inputs):
    values = function(*inputs)
    return jnp.sum(normal(5, 3, 3, 10) * jnp.stack(values)), values

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(HIDDEN, HEADS)


@pytest.mark.parametrize("chunk", [1, 4, 10, 100])
def test_fused_divergences_equal_the_dense_ones(chunk):
  dist = dataclasses.replace(COOL, chunk=chunk)

  def fused(hidden, heads):
    (student, teacher), (head, teacher_head) = hidden, heads
    kl = divergence.fused_reverse_kl(
        student, head, teacher, teacher_head, dist
    )
    return kl, *divergence.fused_token_log_probs(student, head, TOKENS, dist)

  ours, wanted = values_and_gradients(fused), values_and_gradients(dense)
  for x, y in zip(
      jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True
  ):
    assert x.shape == y.shape
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
    log_probs = jax.nn.log_softmax(logits)
    kl = log_probs - jax.nn.log_softmax(teacher)
    loss = divergence.policy_gradient(log_probs, sampler, kl)
    return jnp.sum(jnp.exp(sampler) * loss)

  loss, grad = jax.value_and_grad(expected)(student)
  wanted, exact = jax.value_and_grad(
      lambda x: divergence.reverse_kl(x, teacher, DIST)
  )(student)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  assert np.abs(exact).max() > 0.1
  np.testing.assert_allclose(grad, exact, atol=1e-5)


def test_the_ratio_is_one_on_policy_and_the_estimate_has_no_gradient():
  student, kl = jnp.array([-0.5, -1.0, -2.0]), jnp.array([0.5, 0.0, -1.75])
  same = divergence.policy_gradient(student, student, kl)
  np.testing.assert_allclose(same, kl)
  halved = divergence.policy_gradient(student, student + LN2, kl)
  np.testing.assert_allclose(halved, kl / 2, rtol=1e-6)
  for argument, wanted in ((0, kl), (2, 0 * kl)):
    grad = jax.grad(
        lambda *x: divergence.policy_gradient(*x).sum(), argument
    )(student, student, kl)
    np.testing.assert_allclose(grad, wanted)
