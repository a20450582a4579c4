import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import prefix_distill
from prefix_distill.config import ExactSpec
from prefix_distill.config import LossSpec
from prefix_distill.distill import divergence
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.divergence import Distribution
from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib

_PACKAGE = pathlib.Path(prefix_distill.__file__).parent
DIST = Distribution(1.0, 13)
LN2 = np.log(2)
SAMPLES = 100_000


def normal(seed: int, *shape: int) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


STUDENT, TEACHER = normal(0, 13), normal(1, 13)
KL = float(toys.reverse_kl(STUDENT, TEACHER, DIST))


def draws(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both models' log-probabilities of tokens drawn from the first."""
  tokens = jax.random.categorical(jax.random.key(0), logits, shape=(SAMPLES,))
  return tuple(jax.nn.log_softmax(x)[tokens] for x in (logits, TEACHER))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimates_average_to_the_exact_kl(name):
  values = np.asarray(getattr(loss_lib, name)(*draws(STUDENT)), np.float64)
  error = values.std() / np.sqrt(SAMPLES)
  assert 0 < error < 0.02 * KL
  assert abs(values.mean() - KL) < 3 * error


def test_k3_is_never_negative_and_varies_less():
  k1, k3 = (f(*draws(STUDENT)) for f in (loss_lib.k1, loss_lib.k3))
  assert k1.min() < 0 <= k3.min()
  assert k3.std() < k1.std()


def test_estimates_by_hand():
  student, teacher = jnp.log(jnp.array([1 / 2, 1 / 4])), jnp.log(1 / 4)
  np.testing.assert_allclose(
      loss_lib.k1(student, teacher), [LN2, 0], atol=1e-6
  )
  np.testing.assert_allclose(
      loss_lib.k3(student, teacher), [-1 / 2 + LN2, 0], atol=1e-6
  )


def expected_gradient(form: str, off_policy: bool):
  """The gradient of the expected loss, over all tokens at once."""
  sampler = jax.nn.log_softmax(normal(2, 13) if off_policy else STUDENT)
  loss = loss_lib.SampledLoss(DIST, form)

  def expected(logits):
    log_probs = jax.nn.log_softmax(logits)
    values = loss.of_tokens(
        log_probs, log_probs, sampler, jax.nn.log_softmax(TEACHER)
    )
    return jnp.sum(jnp.exp(sampler) * values)

  return jax.value_and_grad(expected)(STUDENT)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(
    "form, of_reverse, of_forward",
    [("policy_gradient", 1, 0), ("direct", 0, 1)],
)
def test_the_expected_gradient_is_what_the_docstring_says(
    form, of_reverse, of_forward, off_policy
):
  value, grad = expected_gradient(form, off_policy)
  assert float(value) == pytest.approx(KL, rel=1e-5)
  reverse, forward = (
      jax.grad(lambda x, f=f: f(x, TEACHER, DIST))(STUDENT)
      for f in (toys.reverse_kl, toys.forward_kl)
  )
  assert min(np.abs(x).max() for x in (reverse, forward)) > 0.05
  np.testing.assert_allclose(
      grad, of_reverse * reverse + of_forward * forward, atol=1e-5
  )


def test_the_gradient_of_samples_averages_to_the_exact_one():
  tokens = jax.random.categorical(
      jax.random.key(0), STUDENT, shape=(SAMPLES,)
  )
  sampler = jax.nn.log_softmax(STUDENT)[tokens]
  teacher = jax.nn.log_softmax(TEACHER)[tokens]
  loss = loss_lib.SampledLoss(DIST)

  # Each sample's gradient is a number times (one-hot - p).
  def values(log_probs):
    return loss.of_tokens(log_probs, log_probs, sampler, teacher)

  _, pull = jax.vjp(values, sampler)
  slope = np.asarray(pull(jnp.ones(SAMPLES))[0], np.float64)
  one_hot = np.eye(13)[np.asarray(tokens)]
  samples = slope[:, None] * (one_hot - np.asarray(jax.nn.softmax(STUDENT)))
  wanted = jax.grad(lambda x: toys.reverse_kl(x, TEACHER, DIST))(STUDENT)
  error = samples.std(axis=0) / np.sqrt(SAMPLES)
  assert (np.abs(samples.mean(axis=0) - wanted) < 4 * error).all()
  assert np.abs(wanted).max() > 10 * error.max()


def test_the_ratio_is_one_on_policy_and_the_estimate_has_no_gradient():
  student, kl = jnp.array([-0.5, -1.0, -2.0]), jnp.array([0.5, 0.0, -1.75])
  same = loss_lib.policy_gradient(student, student, kl)
  np.testing.assert_allclose(same, kl)
  halved = loss_lib.policy_gradient(student, student + LN2, kl)
  np.testing.assert_allclose(halved, kl / 2, rtol=1e-6)
  for argument, wanted in ((0, kl), (2, 0 * kl)):
    grad = jax.grad(
        lambda *x: loss_lib.policy_gradient(*x).sum(), argument
    )(student, student, kl)
    np.testing.assert_allclose(grad, wanted)
  grad = jax.grad(lambda *x: loss_lib.direct(*x).sum(), (0, 2))(
      student, student + LN2, kl
  )
  np.testing.assert_allclose(grad[0], 0)
  np.testing.assert_allclose(grad[1], 0.5, rtol=1e-6)


def test_a_stop_is_an_event_and_its_ratio_that_of_the_token():
  dist = toys.distribution(stop_ids=toys.STOPS)
  assert dist.stop_ids == toys.STOPS
  loss = loss_lib.SampledLoss(DIST)
  token, sampler = jnp.log(jnp.array([0.2])), jnp.log(jnp.array([0.1]))
  event, teacher = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
  value = loss.of_tokens(token, event, sampler, teacher)
  np.testing.assert_allclose(value, 2 * LN2, rtol=1e-5)


def test_the_way_from_an_update_to_a_formula_is_short(tmp_path, monkeypatch):
  stacks = []

  def planted(log_p, log_q):
    stacks.append([
        frame.name
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(_PACKAGE))
    ])
    return divergence.reverse_kl_term(log_p, log_q)

  # A divergence is added by its formula alone.
  monkeypatch.setitem(divergence.TERMS, "planted", planted)
  monkeypatch.setattr(loop.Programs, "compile_ahead", lambda *_: None)
  models = toys.write_models(tmp_path)
  config = toys.run_config(*models, loss=LossSpec(exact=ExactSpec("planted")))
  workdir = tmp_path / "run"
  workdir.mkdir()
  run = loop.Run(setup_lib.prepare(config, workdir), workdir)
  assert np.isfinite(run.update(0)["kl"])
  run.checkpointer.close()
  (stack,) = {tuple(stack) for stack in stacks}
  # Of the loss, the chunked head and the divergence.
  assert stack[stack.index("distillation_loss") :] == (
      "distillation_loss", "_run", "_local", "chunk", "__call__",
      "compare_with_gradient",
  )
  assert stack[0] == "update"
  assert len(stack) <= 10, stack  # Nine frames below `Run.update`.
