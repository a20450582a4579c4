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
KINDS = {
    "reverse_kl": toys.reverse_kl,
    "forward_kl": toys.forward_kl,
    "jsd": toys.jsd,
    "jsd at 0.1": functools.partial(toys.jsd, beta=0.1),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
DISTS = {
    "plain": DIST,
    "merged": MERGED,
    "cool": dataclasses.replace(MERGED, temperature=0.7),
    "teacher's top 4": dataclasses.replace(MERGED, top_k=4),
    "student's top 3": dataclasses.replace(
        DIST, top_k=3, top_k_of="student"
    ),
}


def normal(seed: int, *shape: int) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(2 * rng.normal(size=shape), jnp.float32)


def probs64(logits: jax.Array, dist: Distribution) -> np.ndarray:
  """Probabilities of the real tokens in float64."""
  x = np.asarray(logits, np.float64)[..., : dist.num_tokens]
  x = np.exp(x / dist.temperature)
  return x / x.sum(-1, keepdims=True)


def groups64(student, teacher, dist: Distribution) -> list[np.ndarray]:
  """Says of one position which tokens are one event, in NumPy's own way."""
  tokens = list(range(dist.num_tokens))
  stops = list(dist.stop_ids)
  singles = [t for t in tokens if t not in stops]
  out = [stops] if stops else []
  if dist.top_k:
    whose = student if dist.top_k_of == "student" else teacher
    ranked = sorted(singles, key=lambda t: -whose[t])
    singles, tail = ranked[: dist.top_k], ranked[dist.top_k :]
    out.append(tail)
  return [np.array(g) for g in [*([t] for t in singles), *out]]


BOUND = 0.05


def bounded(p, q, kind: str) -> float:
  """The same with each entry cut at `BOUND`."""
  if kind == "forward_kl":
    entries = q * np.log(q / p)
  else:
    m = (p + q) / 2
    entries = (q * np.log(q / m) + p * np.log(p / m)) / 2
  return float(np.minimum(entries, BOUND).sum())


def summed(p, q, kind: str) -> float:
  """The divergence of two distributions, as a textbook writes it."""
  if kind == "reverse_kl":
    return float(np.sum(p * np.log(p / q)))
  if kind == "forward_kl":
    return float(np.sum(q * np.log(q / p)))
  beta = 0.1 if kind == "jsd at 0.1" else 0.5
  m = beta * q + (1 - beta) * p
  return float(
      beta * np.sum(q * np.log(q / m)) + (1 - beta) * np.sum(p * np.log(p / m))
  )


def reference(
    student, teacher, dist: Distribution, kind: str, total=summed
) -> np.ndarray:
  """The divergence of each row of logits, in float64."""
  out = []
  for row, other in zip(student, teacher, strict=True):
    p, q = probs64(row, dist), probs64(other, dist)
    groups = groups64(np.asarray(row), np.asarray(other), dist)
    p, q = (np.array([x[g].sum() for g in groups]) for x in (p, q))
    out.append(total(p, q, kind))
  return np.array(out)


def reference_gradient(
    student, teacher, dist, kind, total=summed
) -> np.ndarray:
  """Central differences of `reference`."""
  student = np.asarray(student, np.float64)
  out, step = np.zeros_like(student), 1e-5
  for column in range(student.shape[1]):
    delta = np.zeros(student.shape[1])
    delta[column] = step
    out[:, column] = (
        reference(student + delta, teacher, dist, kind, total)
        - reference(student - delta, teacher, dist, kind, total)
    ) / (2 * step)
  return out


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_equal_a_calculation_by_hand(temperature):
  halves = np.log([1 / 2, 1 / 4, 1 / 8, 1 / 8])
  swapped = halves[[1, 0, 2, 3]]
  student = jnp.asarray(temperature * np.stack([halves] * 3) + 5)
  teacher = jnp.asarray(
      temperature * np.stack([halves, np.zeros(4), swapped])
  )
  dist = Distribution(temperature, 4)
  # Uniform against halves: 2 - 7/4 bits; halves swapped: 1/2 - 1/4 bits.
  reverse = toys.reverse_kl(student, teacher, dist)
  np.testing.assert_allclose(reverse, [0, LN2 / 4, LN2 / 4], atol=1e-6)
  # Cross-entropy 9/4 bits less the uniform's 2.
  forward = toys.forward_kl(student, teacher, dist)
  np.testing.assert_allclose(forward, [0, LN2 / 4, LN2 / 4], atol=1e-6)
  # The mixture of the swapped ones has 3/8 twice.
  jsd = 3 / 4 * np.log(8 / 3) + LN2 * 3 / 4 - LN2 * 7 / 4
  mixed = toys.jsd(student, teacher, dist)
  np.testing.assert_allclose(mixed[::2], [0, jsd], atol=1e-6)


@EVERY
@pytest.mark.parametrize("name", DISTS)
def test_values_and_gradients_equal_float64(kind, name):
  dist, (student, teacher) = DISTS[name], (normal(0, 9, 16), normal(1, 9, 16))
  values, gradients = jax.value_and_grad(
      lambda x: KINDS[kind](x, teacher, dist).sum(), has_aux=False
  )(student)
  wanted = reference(student, teacher, dist, kind)
  assert wanted.min() > 0.01
  np.testing.assert_allclose(
      KINDS[kind](student, teacher, dist), wanted, rtol=1e-5
  )
  assert float(values) == pytest.approx(wanted.sum(), rel=1e-5)
  slope = reference_gradient(student, teacher, dist, kind)
  assert np.abs(slope).max() > 0.01
  np.testing.assert_allclose(
      gradients, slope, atol=1e-5 * np.abs(slope).max()
  )


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_bfloat16_logits_err_by_their_own_rounding(kind):
  student, teacher = normal(0, 200, 16), normal(1, 200, 16)
  rounded = [x.astype(jnp.bfloat16) for x in (student, teacher)]
  ours = KINDS[kind](*rounded, DIST)
  assert ours.dtype == jnp.float32
  # Sums are float32, so what errs is the rounding of the logits alone.
  exact = reference(*(x.astype(jnp.float32) for x in rounded), DIST, kind)
  np.testing.assert_allclose(ours, exact, rtol=1e-5)
  wanted = reference(student, teacher, DIST, kind)
  assert np.median(np.abs(ours - wanted) / wanted) < 0.01


def test_beta_of_0_half_and_1_are_forward_js_and_reverse():
  student, teacher = normal(0, 9, 16), normal(1, 9, 16)
  jsd = functools.partial(toys.jsd, student, teacher, MERGED)
  forward = toys.forward_kl(student, teacher, MERGED)
  reverse = toys.reverse_kl(student, teacher, MERGED)
  np.testing.assert_array_equal(jsd(0), forward)
  np.testing.assert_array_equal(jsd(1), reverse)
  np.testing.assert_allclose(
      jsd(0.5), toys.jsd(teacher, student, MERGED, 0.5), rtol=1e-5
  )
  # The two ends are limits of the slope.
  np.testing.assert_allclose(jsd(1e-3) / 1e-3, forward, rtol=0.03)
  np.testing.assert_allclose(jsd(1 - 1e-3) / 1e-3, reverse, rtol=0.03)


@EVERY
@pytest.mark.parametrize("name", DISTS)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind, name):
  logits = normal(0, 6, 13)
  loss, grad = jax.value_and_grad(
      lambda x: KINDS[kind](x, logits, DISTS[name]).sum()
  )(logits)
  assert abs(loss) < 1e-5
  assert np.abs(grad).max() < 1e-6


@EVERY
def test_vocabularies_of_different_padding_compare_on_the_real_ids(kind):
  student, teacher = normal(0, 6, 20), normal(1, 6, 16)
  # A padded row may hold anything, for nothing ever trained it.
  student = student.at[:, toys.NUM_TOKENS :].add(300.0)
  kl, grads = jax.value_and_grad(
      lambda *x: KINDS[kind](*x, DIST).sum(), (0, 1)
  )(student, teacher)
  wanted = reference(student, teacher, DIST, kind).sum()
  np.testing.assert_allclose(kl, wanted, rtol=1e-5)
  for grad in grads:
    assert (grad[:, toys.NUM_TOKENS :] == 0).all()
    assert (grad[:, : toys.NUM_TOKENS] != 0).all()


@EVERY
def test_the_name_of_the_stop_matters_only_if_stops_are_not_merged(kind):
  # Student and teacher are about to stop, each with its own token.
  student = normal(0, 6, 13).at[:, toys.STOPS[0]].set(30.0)
  student = student.at[:, toys.STOPS[1]].set(-10.0)
  ours, theirs = list(toys.STOPS), list(toys.STOPS[::-1])
  swapped = student.at[:, ours].set(student[:, theirs])
  same = KINDS[kind](student, swapped, MERGED)
  assert np.abs(same).max() < 1e-5
  other = KINDS[kind](student, swapped, DIST)
  # Tens of nats; a Jensen-Shannon divergence is bounded by the logarithm of
  # its weights.
  assert other.min() > {"jsd": 0.6, "jsd at 0.1": 0.3}.get(kind, 20)


def test_a_tail_bucket_sees_mass_that_leaves_the_top():
  # The student moves mass from the teacher's top 2 to where nobody looks.
  teacher = jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1]))
  dist = Distribution(1.0, 4, top_k=2)
  moved = jnp.log(jnp.array([0.05, 0.03, 0.46, 0.46]))
  value = toys.reverse_kl(moved, teacher, dist)
  by_hand = 0.08 * np.log(0.1) + 0.92 * np.log(0.92 / 0.2)
  assert float(value) == pytest.approx(by_hand, rel=1e-5)
  kept = jnp.exp(moved[:2]) @ (moved[:2] - teacher[:2])
  assert kept < 0 < value


def test_top_k_of_everything_is_everything():
  student, teacher = normal(0, 6, 13), normal(1, 6, 13)
  whole = toys.reverse_kl(student, teacher, DIST)
  for k in (toys.NUM_TOKENS, 100):
    dist = dataclasses.replace(DIST, top_k=k)
    np.testing.assert_array_equal(
        toys.reverse_kl(student, teacher, dist), whole
    )
  # Merging events can only lower a divergence.
  few = dataclasses.replace(DIST, top_k=3)
  lower = toys.reverse_kl(student, teacher, few)
  assert (lower < whole).all()
  assert (lower > 0).all()


@EVERY
@pytest.mark.parametrize("name", DISTS)
def test_the_gradient_by_formula_is_that_of_autodiff(kind, name):
  dist, (student, teacher) = DISTS[name], (normal(0, 9, 13), normal(1, 9, 13))
  terms = {
      "reverse_kl": divergence.reverse_kl_term,
      "forward_kl": divergence.forward_kl_term,
      "jsd": divergence.named("jsd", 0.5),
      "jsd at 0.1": divergence.named("jsd", 0.1),
  }
  these = divergence.events(student, teacher, dist)
  probs = [divergence.log_probs(x, dist, these) for x in (student, teacher)]
  values, gradient = divergence.compare_with_gradient(
      terms[kind], *probs, these, dist
  )
  np.testing.assert_allclose(
      values, KINDS[kind](student, teacher, dist), rtol=1e-6
  )
  wanted = jax.grad(lambda x: KINDS[kind](x, teacher, dist).sum())(student)
  np.testing.assert_allclose(gradient, wanted, atol=2e-6)


@EVERY
def test_improbable_events_stay_finite(kind):
  # A teacher to which both stops are all but impossible.
  student, teacher = normal(0, 6, 13), normal(1, 6, 13)
  teacher = teacher.at[:, list(toys.STOPS)].set(-150.0)
  for dist in (DIST, MERGED):
    loss, grad = jax.value_and_grad(
        lambda x, dist=dist: KINDS[kind](x, teacher, dist).sum()
    )(student)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
  if kind == "reverse_kl":
    np.testing.assert_allclose(
        toys.reverse_kl(student, teacher, MERGED),
        reference(student, teacher, MERGED, kind),
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("name", DISTS)
def test_entries_are_cut_as_in_float64(kind, name):
  dist, (student, teacher) = DISTS[name], (normal(0, 9, 16), normal(1, 9, 16))
  these = divergence.events(student, teacher, dist)
  probs = [divergence.log_probs(x, dist, these) for x in (student, teacher)]
  term = divergence.named(kind, max_entry=BOUND)
  values, gradient = divergence.compare_with_gradient(term, *probs, these, dist)
  given = student, teacher, dist, kind
  wanted = reference(*given, bounded)
  np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      divergence.compare(term, *probs, these), values, rtol=1e-6
  )
  # Most rows have an entry that is cut.
  assert (wanted < reference(*given) - 0.005).sum() > 6
  slope = reference_gradient(*given, bounded)
  assert np.abs(slope).max() > 0.01
  np.testing.assert_allclose(gradient, slope, atol=1e-5 * np.abs(slope).max())


def test_a_bound_that_nothing_reaches_changes_nothing():
  student, teacher = normal(0, 9, 16), normal(1, 9, 16)
  these = divergence.events(student, teacher, MERGED)
  probs = [divergence.log_probs(x, MERGED, these) for x in (student, teacher)]
  plain, high = (
      divergence.compare_with_gradient(
          divergence.named("forward_kl", max_entry=most), *probs, these, MERGED
      )
      for most in (0.0, 50.0)
  )
  for x, y in zip(plain, high, strict=True):
    np.testing.assert_array_equal(x, y)


def test_merged_stops_are_one_entry():
  # Two stops of 0.2 against 0.1 each: 0.14 nats each, 0.28 as one.
  teacher = jnp.log(jnp.array([[0.6, 0.2, 0.2]]))
  student = jnp.log(jnp.array([[0.8, 0.1, 0.1]]))
  first, stop = 0.6 * np.log(0.6 / 0.8), 0.2 * LN2
  for stops, most, wanted in (
      ((), 0.1, first + 2 * 0.1),
      ((1, 2), 0.1, first + 0.1),
      ((1, 2), 0.2, first + 0.2),
      ((), 0.2, first + 2 * stop),
  ):
    dist = Distribution(1.0, 3, stops)
    these = divergence.events(student, teacher, dist)
    probs = [divergence.log_probs(x, dist, these) for x in (student, teacher)]
    term = divergence.named("forward_kl", max_entry=most)
    value = divergence.compare(term, *probs, these)
    np.testing.assert_allclose(value, [wanted], rtol=1e-5)


def test_where_a_cut_entry_leaves_the_student():
  """What the docstring of `bounded` warns of, by hand."""
  teacher = jnp.log(jnp.array([0.9, 0.1]))
  near, far = (jnp.log(jnp.array([x, 1 - x])) for x in (0.86, 0.85))
  dist = Distribution(1.0, 2)
  these = divergence.events(teacher, teacher, dist)
  q = divergence.log_probs(teacher, dist, these)

  def slope(kind, logits):
    return divergence.compare_with_gradient(
        divergence.named(kind, max_entry=0.05),
        divergence.log_probs(logits, dist, these),
        q,
        these,
        dist,
    )

  # 0.9 log(0.9 / 0.86) is 0.041 and is not cut: z moves by q - p.
  _, gradient = slope("forward_kl", near)
  np.testing.assert_allclose(gradient, [-0.04, 0.04], atol=1e-6)
  # 0.9 log(0.9 / 0.85) is 0.051. The rest pulls 0.1 to the other token.
  value, gradient = slope("forward_kl", far)
  np.testing.assert_allclose(value, 0.05 + 0.1 * np.log(0.1 / 0.15), rtol=1e-5)
  np.testing.assert_allclose(gradient, [0.085, -0.085], atol=1e-6)
  assert (np.asarray(slope("jsd", far)[1]) * [-1, 1] > 0).all()
