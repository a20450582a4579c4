import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores
from prefix_distill.train import microbatch
from prefix_distill.train import step as step_lib

LENGTHS = [1, 3, 8, 8, 2, 5, 8, 1]
COLUMNS = 8
DIST = toys.distribution()
MERGED = toys.distribution(stop_ids=toys.STOPS)
STUDENT, PARAMS = toys.model(0, num_layers=1)
TEACHER, TEACHER_PARAMS = toys.model(1, num_layers=1, dim=24, vocab_size=16)
TEACHER_HEAD = TEACHER.head(TEACHER_PARAMS)
PROMPTS = toys.prompts(len(LENGTHS))
ROLLOUT = toys.rollout(LENGTHS, COLUMNS)
MESH = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
SGD = optax.sgd(1.0)
OBJECTIVES = {
    "exact": ExactLoss(MERGED),
    "sampled": SampledLoss(MERGED),
    "direct": SampledLoss(MERGED, "direct"),
}
FORMS = pytest.mark.parametrize("form", OBJECTIVES)
WATCH = step_lib.Watch(4 * COLUMNS, toys.STOPS)

sample = jax.jit(generate.sample, static_argnums=(0, 1, 2))
_score = jax.jit(loss_lib.score, static_argnums=(0, 1))


def score(
    form: str, rollout: Rollout, prompts: PromptBatch = PROMPTS
) -> TeacherScores:
  objective = OBJECTIVES[form]
  return _score(TEACHER, objective, TEACHER_PARAMS, prompts, rollout)


LOSSES = {
    form: functools.partial(
        step_lib.distillation_loss, STUDENT, objective, WATCH,
        step_lib.Window(),
    )
    for form, objective in OBJECTIVES.items()
}
LOSS = LOSSES["exact"]


@functools.cache
def train_step(
    loss: step_lib.LossFn,
    normalize: str = "rollouts",
    parts: int = 1,
    tx: optax.GradientTransformation = SGD,
):
  """Returns an update that takes its rows in so many parts."""

  def step(state, teacher_head, inputs):
    total = None
    for i in range(parts):
      part = microbatch.take(parts, MESH, inputs, i)
      total = step_lib.gradient(loss, state.params, teacher_head, part, total)
    return step_lib.apply(tx, normalize, state, total)

  return jax.jit(step)


@jax.jit
def loss_and_gradients(rollout: Rollout, scores: TeacherScores):
  """Returns the loss, the metrics' sums, and the student's gradients."""
  form = "sampled" if scores.hidden is None else "exact"

  def loss(params):
    return LOSSES[form](params, TEACHER_HEAD, (PROMPTS, rollout, scores))

  (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(PARAMS)
  return value, sums, grads


def assert_equal(ours, theirs, **tolerance) -> None:
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(
      jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
  ):
    np.testing.assert_allclose(x, y, **tolerance)


def largest(tree) -> float:
  return max(np.abs(x).max() for x in jax.tree.leaves(tree))


def behind(value: float, x: jax.Array) -> jax.Array:
  """Puts a value, if it is of the array's kind, where the mask is false."""
  if x.dtype == jnp.int32:
    value = int(np.nan_to_num(value, nan=7))
  mask = ROLLOUT.mask.reshape(ROLLOUT.mask.shape + (1,) * (x.ndim - 2))
  return jnp.where(mask, x, jnp.asarray(value, x.dtype))


@FORMS
def test_what_is_behind_the_mask_changes_neither_loss_nor_gradient(form):
  scores = score(form, ROLLOUT)
  wanted = loss_and_gradients(ROLLOUT, scores)
  rollout = dataclasses.replace(
      ROLLOUT,
      tokens=behind(7, ROLLOUT.tokens),
      log_probs=behind(-3.0, ROLLOUT.log_probs),
      behavior_log_probs=behind(-3.0, ROLLOUT.log_probs),
  )
  scores = jax.tree.map(functools.partial(behind, 2.5), scores)
  assert largest(wanted[2]) > 0.1
  assert_equal(
      loss_and_gradients(rollout, scores), wanted, rtol=0, atol=1e-6
  )


@FORMS
def test_a_nan_behind_the_mask_does_not_pass(form):
  scores = score(form, ROLLOUT)
  wanted = loss_and_gradients(ROLLOUT, scores)
  rollout = dataclasses.replace(
      ROLLOUT, behavior_log_probs=behind(np.nan, ROLLOUT.log_probs)
  )
  scores = jax.tree.map(functools.partial(behind, np.nan), scores)
  ours = loss_and_gradients(rollout, scores)
  assert_equal(ours, wanted, rtol=0, atol=1e-6)


def test_the_teachers_scores_do_not_depend_on_what_is_behind_the_mask():
  rollout = dataclasses.replace(ROLLOUT, tokens=behind(7, ROLLOUT.tokens))
  ours, wanted = (score("exact", r).hidden for r in (rollout, ROLLOUT))
  mask = np.asarray(ROLLOUT.mask)
  np.testing.assert_allclose(ours[mask], wanted[mask], atol=1e-6)


def test_the_loss_reads_every_prefix_position_and_no_other():
  scores = score("exact", ROLLOUT)

  def loss(hidden):
    value, _ = chunked_head.weighted_sum(
        *OBJECTIVES["exact"].arguments(
            STUDENT, PARAMS, TEACHER_HEAD, hidden, ROLLOUT, scores, ROLLOUT.mask
        )
    )
    return value

  hidden = STUDENT.prefix_hidden(PARAMS, PROMPTS, ROLLOUT)
  grad = jax.jit(jax.grad(loss))(hidden)
  np.testing.assert_array_equal(np.any(grad != 0, axis=-1), ROLLOUT.mask)


def test_the_loss_is_the_sum_over_prefix_tokens_of_full_forward_passes():
  tokens = jnp.concatenate([PROMPTS.tokens, ROLLOUT.tokens], axis=1)
  mask = jnp.concatenate([PROMPTS.mask, ROLLOUT.mask], axis=1)
  log_probs = []
  for model, params in ((STUDENT, PARAMS), (TEACHER, TEACHER_PARAMS)):
    hidden = jax.jit(model.apply)(params, tokens, mask)
    logits = np.asarray(model.logits(params, hidden), np.float64)
    logits = logits[..., : toys.NUM_TOKENS]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    stop = probs[..., list(toys.STOPS)].sum(-1, keepdims=True)
    probs = np.concatenate([probs[..., : toys.STOPS[0]], stop], axis=-1)
    log_probs.append(np.log(probs))
  student, teacher = log_probs
  kl = (np.exp(student) * (student - teacher)).sum(-1)
  # The last prompt position predicts the first prefix token.
  first = PROMPTS.tokens.shape[1] - 1
  wanted = sum(kl[i, first : first + n].sum() for i, n in enumerate(LENGTHS))
  loss, sums, *_ = loss_and_gradients(ROLLOUT, score("exact", ROLLOUT))
  assert float(loss) == pytest.approx(wanted, rel=1e-5)
  for name, count in (("kl", sum(LENGTHS)), ("kl_rollout", len(LENGTHS))):
    assert [float(x) for x in sums[name]] == pytest.approx(
        [wanted, count], rel=1e-5
    )


@FORMS
def test_a_cap_of_one_trains_on_the_first_token(form):
  rollout = toys.rollout([1] * len(LENGTHS), COLUMNS)
  _, sums, grads = loss_and_gradients(rollout, score(form, rollout))
  assert int(sums["kl"][1]) == len(LENGTHS)
  assert largest(grads) > 0.1


@FORMS
def test_rollouts_that_were_all_cut_still_train(form):
  rollout = toys.rollout([COLUMNS] * len(LENGTHS), COLUMNS)
  rollout = dataclasses.replace(rollout, tokens=rollout.tokens % toys.STOPS[0])
  assert not np.isin(rollout.tokens, toys.STOPS).any()
  assert largest(loss_and_gradients(rollout, score(form, rollout))[2]) > 0.1


@pytest.mark.parametrize(
    "window, positions",
    [
        ((0, 0), [[0], [0, 1, 2], range(8)]),
        ((0, 2), [[0], [0, 1], [0, 1]]),
        ((1, 4), [[], [1, 2], [1, 2, 3]]),
        ((-2, 0), [[0], [1, 2], [6, 7]]),
        ((2, -1), [[], [], [2, 3, 4, 5, 6]]),
        ((-3, -1), [[], [0, 1], [5, 6]]),
    ],
)
def test_a_window_chooses_positions_of_each_rollout(window, positions):
  weights = step_lib.Window(*window).weights(ROLLOUT.mask)
  for row, wanted in zip(weights, positions, strict=False):
    assert np.flatnonzero(row).tolist() == list(wanted)


def test_a_window_trains_on_its_tokens_and_measures_all():
  scores = score("exact", ROLLOUT)
  loss = functools.partial(
      step_lib.distillation_loss, STUDENT, OBJECTIVES["exact"], WATCH
  )
  inputs = (PROMPTS, ROLLOUT, scores)
  parts = [
      loss(step_lib.Window(*w), PARAMS, TEACHER_HEAD, inputs)
      for w in ((0, 3), (3, 0), (0, 0))
  ]
  values = [float(value) for value, _ in parts]
  assert values[0] + values[1] == pytest.approx(values[2], rel=1e-5)
  assert min(values) > 0.1
  for _, sums in parts:
    ours, whole = (x["kl_position"][0] for x in (sums, parts[2][1]))
    np.testing.assert_allclose(ours, whole, rtol=1e-5)
  assert [int(s["loss"][1]) for _, s in parts] == [19, 17, 36]


def test_position_bins_sum_to_the_whole():
  _, sums, *_ = loss_and_gradients(ROLLOUT, score("exact", ROLLOUT))
  assert step_lib.bin_width(4 * COLUMNS) == 2
  assert sums["kl_at"][1].tolist() == [14, 9, 7, 6] + [0] * 12
  for by_position, whole in zip(sums["kl_at"], sums["kl"], strict=True):
    assert float(by_position.sum()) == pytest.approx(float(whole), rel=1e-6)


def test_the_sampled_form_has_the_exact_gradient_in_expectation():
  # One row for each first token, weighted by its probability.
  rows = toys.NUM_TOKENS
  prompts = jax.tree.map(lambda x: jnp.repeat(x[:1], rows, axis=0), PROMPTS)
  tokens, mask = jnp.arange(rows)[:, None], jnp.ones((rows, 1), bool)
  hidden = STUDENT.prefix_hidden(PARAMS, prompts, Rollout(tokens, mask))
  logits = STUDENT.logits(PARAMS, hidden)[0, 0, :rows]
  log_probs = jax.nn.log_softmax(logits)
  rollout = Rollout(tokens, mask, *(log_probs[:, None],) * 2)

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.value_and_grad, argnums=1)
  def expected(form, params):
    scores = loss_lib.score(
        TEACHER, OBJECTIVES[form], TEACHER_PARAMS, prompts, rollout
    )

    def loss(*row):
      inputs = jax.tree.map(lambda x: x[None], row)
      return LOSSES[form](params, TEACHER_HEAD, inputs)[0]

    return jnp.exp(log_probs) @ jax.vmap(loss)(prompts, rollout, scores)

  kl, wanted = expected("exact", PARAMS)
  estimate, ours = expected("sampled", PARAMS)
  assert float(estimate) == pytest.approx(float(kl), rel=1e-4)
  assert largest(wanted) > 0.1
  assert_equal(ours, wanted, rtol=0, atol=1e-5)


def by_length(*window: int) -> step_lib.LossFn:
  """Returns the exact loss whose rollouts weigh the same, however long."""
  window = step_lib.Window(*(window or (0, 0)), by_length=True)
  return functools.partial(
      step_lib.distillation_loss, STUDENT, OBJECTIVES["exact"], WATCH, window
  )


def mean_of_means(scores: TeacherScores):
  """Returns sums and gradients from each rollout alone, divided by hand."""
  gradient = jax.jit(jax.grad(LOSS, has_aux=True))
  inputs, total = (PROMPTS, ROLLOUT, scores), 0.0
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  for i, length in enumerate(LENGTHS):
    row = jax.tree.map(lambda x, i=i: x[i : i + 1], inputs)
    own, sums = gradient(PARAMS, TEACHER_HEAD, row)
    total += sums["loss"][0] / length
    grads = jax.tree.map(lambda g, x, n=length: g + x / n, grads, own)
  # All other metrics stay those of tokens.
  sums = jax.jit(LOSS)(PARAMS, TEACHER_HEAD, inputs)[1]
  return sums | {"loss": (total, len(LENGTHS))}, grads


def test_a_mean_by_length_is_that_of_a_dense_reference():
  """Against float64 in NumPy: the loss, and its gradients by formula."""
  rng = np.random.default_rng(0)
  window, lengths, vocab = (1, 6), np.array(LENGTHS), 13
  rows = len(LENGTHS)
  hidden, other = rng.normal(size=(2, rows, COLUMNS, 4))
  head, other_head = rng.normal(size=(2, vocab, 4))
  mask = np.arange(COLUMNS) < lengths[:, None]
  inside = mask & (np.arange(COLUMNS) >= 1) & (np.arange(COLUMNS) < 6)

  def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  log_p = log_softmax(hidden @ head.T)
  log_q = log_softmax(other @ other_head.T)
  terms = np.exp(log_p) * (log_p - log_q)
  kl = terms.sum(-1, keepdims=True)
  # Of rollouts with one token none is in the window: they add nothing.
  share = inside / np.maximum(inside.sum(1, keepdims=True), 1) / rows
  wanted = np.sum(share * kl[..., 0])
  by_logits = share[..., None] * (terms - np.exp(log_p) * kl)
  weights = step_lib.Window(*window, by_length=True).weights(jnp.array(mask))

  def loss(hidden, head):
    inputs = chunked_head.HeadInputs(
        hidden, head, jnp.float32(other), jnp.float32(other_head)
    )
    tokens = chunked_head.TokenInputs(weights, jnp.array(mask))
    exact = ExactLoss(DIST)
    return chunked_head.weighted_sum(exact, inputs, tokens)[0] / rows

  found, grads = jax.value_and_grad(loss, (0, 1))(
      jnp.float32(hidden), jnp.float32(head)
  )
  assert wanted > 0.1
  assert float(found) == pytest.approx(wanted, rel=1e-5)
  np.testing.assert_allclose(grads[0], by_logits @ head, atol=1e-6)
  by_head = np.einsum("bpv,bpd->vd", by_logits, hidden)
  np.testing.assert_allclose(grads[1], by_head, atol=1e-6)
  # The same from the whole loss: its mean is over the rollouts that have any.
  _, sums = by_length(*window)(
      PARAMS, TEACHER_HEAD, (PROMPTS, ROLLOUT, score("exact", ROLLOUT))
  )
  assert float(sums["loss"][1]) == pytest.approx((inside.sum(1) > 0).sum())


@pytest.mark.parametrize(
    "normalize, counts",
    [("rollouts", (1, 2, 4)), ("tokens", (2, 4)), ("length", (1, 2, 4))],
)
def test_parts_do_not_change_the_update(normalize, counts):
  if normalize == "rollouts":
    loss, count, scores = LOSS, len(LENGTHS), score("exact", ROLLOUT)
    _, sums, grads = loss_and_gradients(ROLLOUT, scores)
  elif normalize == "length":
    loss, count, scores = by_length(), len(LENGTHS), score("exact", ROLLOUT)
    sums, grads = mean_of_means(scores)
  else:
    loss = functools.partial(
        step_lib.supervised_loss, STUDENT, DIST, 2**28
    )
    count, scores = sum(LENGTHS), None
    grads, sums = jax.jit(jax.grad(loss, has_aux=True))(
        PARAMS, None, (PROMPTS, ROLLOUT, None)
    )
  assert largest(grads) / count > 0.05
  wanted = jax.tree.map(lambda p, g: p - g / count, PARAMS, grads)
  norm = optax.global_norm(grads) / count
  state = step_lib.init_state(PARAMS, SGD)
  for parts in counts:
    after, metrics = train_step(loss, normalize, parts)(
        state, TEACHER_HEAD, (PROMPTS, ROLLOUT, scores)
    )
    assert int(after.step) == 1
    assert_equal(after.params, wanted, rtol=0, atol=1e-6)
    for name, (total, number) in sums.items():
      np.testing.assert_allclose(metrics[name], total / number, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


@functools.cache
def _adam() -> optax.GradientTransformation:
  return step_lib.optimizer(OptimizerSpec(0.02), 50)


def kl_before_and_after(form: str) -> tuple[float, float]:
  """Runs sample, score, update 50 times; returns the exact KL per token."""
  prompts, per_prompt, cap = toys.prompts(4, seed=2), 32, 3
  config = generate.SamplerConfig(
      toys.STOPS, toys.PAD, toys.NUM_TOKENS, per_prompt
  )
  batch = generate.repeat_prompts(per_prompt, prompts)
  tx = _adam()
  state, kl = step_lib.init_state(PARAMS, tx), []
  for number in range(51):
    key = jax.random.key(number)
    rollout = sample(
        STUDENT,
        config,
        cap,
        state.params,
        prompts,
        key,
        generate.Draw.of(cap),
    )
    if number in (0, 50):
      inputs = (batch, rollout, score("exact", rollout, batch))
      _, metrics = train_step(LOSS, tx=tx)(state, TEACHER_HEAD, inputs)
      kl.append(float(metrics["kl"]))
    inputs = (batch, rollout, score(form, rollout, batch))
    state, _ = train_step(LOSSES[form], tx=tx)(state, TEACHER_HEAD, inputs)
  return kl[0], kl[1]


def test_fifty_exact_updates_cut_the_kl_tenfold():
  before, after = kl_before_and_after("exact")
  assert before > 0.3
  assert after < before / 10


def test_fifty_sampled_updates_halve_the_kl():
  before, after = kl_before_and_after("sampled")
  assert before > 0.3
  assert after < before / 2


def test_a_cap_above_every_answer_gives_the_gradient_of_full_distillation():
  # The sampler draws the same rows in a shorter bucket, see test_rollout.
  full = toys.rollout([5, 1, 3, 2, 4, 5, 1, 2], COLUMNS)
  short = jax.tree.map(lambda x: x[:, :6], full)
  wanted = loss_and_gradients(full, score("exact", full))
  ours = loss_and_gradients(short, score("exact", short))
  assert largest(wanted[2]) > 0.1
  for sums in (ours[1], wanted[1]):
    sums["kl_position"] = [x[:6] for x in sums["kl_position"]]
  assert_equal(ours, wanted, rtol=1e-5, atol=1e-5)
