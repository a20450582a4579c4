import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.divergence import Shard
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.loss import Loss
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.models.transformer import Model
from prefix_distill.structs import Limits
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores

ROWS, LENGTH, VOCABULARY = 8, 10, 16
# Positions 8 and 9 are padding in every row.
LENGTHS = [3, 8, 1, 5, 8, 2, 7, 4]
MERGED = toys.distribution(stop_ids=toys.STOPS, temperature=0.7)
EXACT = {
    kind: ExactLoss(MERGED, kind, 0.3)
    for kind in ("reverse_kl", "forward_kl", "jsd")
}
OBJECTIVES = EXACT | {
    "top k": ExactLoss(dataclasses.replace(MERGED, top_k=4)),
    "bounded": ExactLoss(MERGED, "forward_kl", max_entry=0.05),
    "bounded top k": ExactLoss(
        dataclasses.replace(MERGED, top_k=4), "forward_kl", max_entry=0.05
    ),
    "policy gradient": SampledLoss(MERGED),
    "k3": SampledLoss(MERGED, "direct"),
    "relaxed": SampledLoss(MERGED, floor=-1.0),
}
EVERY = pytest.mark.parametrize("name", OBJECTIVES)


def normal(seed: int, *shape: int) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


STUDENT = Model(toys.model_config(vocab_size=VOCABULARY, dim=8))
ROLLOUT = toys.rollout(LENGTHS, LENGTH)
HIDDEN, TEACHER_HIDDEN = normal(0, ROWS, LENGTH, 8), normal(1, ROWS, LENGTH, 6)
# As many real tokens, but vocabularies and widths of their own.
HEAD, TEACHER_HEAD = normal(2, VOCABULARY, 8), normal(3, 40, 6)


def scores() -> TeacherScores:
  logits = TEACHER_HIDDEN @ TEACHER_HEAD.T
  probs = jax.nn.softmax(logits[..., : toys.NUM_TOKENS] / MERGED.temperature)
  stop = probs[..., list(toys.STOPS)].sum(-1)
  token = jnp.take_along_axis(probs, ROLLOUT.tokens[..., None], -1)[..., 0]
  is_stop = jnp.isin(ROLLOUT.tokens, jnp.array(toys.STOPS))
  return TeacherScores(
      TEACHER_HIDDEN,
      jnp.log(jnp.where(is_stop, stop, token)),
      normal(4, ROWS, LENGTH),
      jnp.zeros((ROWS, LENGTH), jnp.int32),
  )


def bounded_forward_kl(student, teacher, objective: ExactLoss) -> jax.Array:
  """Merges events in sorted arrays, and cuts what each contributes."""
  stops, singles = list(toys.STOPS), list(range(toys.STOPS[0]))
  probs = [
      jax.nn.softmax(x[..., : toys.NUM_TOKENS] / MERGED.temperature)
      for x in (student, teacher)
  ]
  stop = [x[..., stops].sum(-1, keepdims=True) for x in probs]
  singles = [x[..., singles] for x in probs]
  if k := objective.dist.top_k:
    order = jnp.argsort(-singles[1], axis=-1)
    singles = [jnp.take_along_axis(x, order, -1) for x in singles]
    stop = [
        jnp.concatenate([x, y[..., k:].sum(-1, keepdims=True)], -1)
        for x, y in zip(stop, singles, strict=True)
    ]
    singles = [x[..., :k] for x in singles]
  p, q = (
      jnp.concatenate([x, y], -1) for x, y in zip(singles, stop, strict=True)
  )
  return jnp.minimum(q * jnp.log(q / p), objective.max_entry).sum(-1)


# Drops tokens by the reward, and more of them by the entropy while sampling.
LIMITS = Limits(jnp.float32(-1.0), jnp.float32(0.4))
ENTROPY = jnp.abs(normal(7, ROWS, LENGTH))


def arguments(objective: Loss, hidden, head, weights, model=STUDENT):
  limits, rollout = None, ROLLOUT
  if getattr(objective, "floor", -np.inf) > -np.inf:
    limits = LIMITS
    rollout = dataclasses.replace(rollout, entropy=ENTROPY)
  return objective.arguments(
      model,
      {"head": {"weight": head}},
      TEACHER_HEAD,
      hidden,
      rollout,
      scores(),
      weights,
      limits,
  )


def dense_values(objective: Loss, hidden, head) -> jax.Array:
  """The loss of every token, from whole logits and plain JAX: [B, P]."""
  n, student = toys.NUM_TOKENS, hidden @ head.T
  teacher = TEACHER_HIDDEN @ TEACHER_HEAD.T
  if isinstance(objective, ExactLoss) and objective.max_entry:
    return bounded_forward_kl(student, teacher, objective)
  if isinstance(objective, ExactLoss):
    compare = {
        "reverse_kl": toys.reverse_kl,
        "forward_kl": toys.forward_kl,
        "jsd": functools.partial(toys.jsd, beta=objective.beta),
    }[objective.kind]
    return compare(student, teacher, objective.dist)
  log_probs = jax.nn.log_softmax(student[..., :n] / MERGED.temperature)
  token = jnp.take_along_axis(log_probs, ROLLOUT.tokens[..., None], -1)[..., 0]
  stop = jax.nn.logsumexp(log_probs[..., list(toys.STOPS)], axis=-1)
  event = jnp.where(
      jnp.isin(ROLLOUT.tokens, jnp.array(toys.STOPS)), stop, token
  )
  values = objective.of_tokens(
      token, event, ROLLOUT.behavior_log_probs, scores().log_probs
  )
  if objective.floor == -np.inf:
    return values
  dropped = (scores().log_probs - event < LIMITS.reward) | (
      ENTROPY < LIMITS.entropy
  )
  return jnp.where(dropped, 0, values)


def dense(objective: Loss, hidden, head):
  def loss(hidden, head):
    values = dense_values(objective, hidden, head)
    return jnp.sum(jnp.where(ROLLOUT.mask, values, 0)), values

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)


def ours(objective: Loss, mesh=None, hidden=HIDDEN, head=HEAD):
  """Value, metrics and gradients through the chunked head, scaled by two."""
  model = dataclasses.replace(STUDENT, mesh=mesh)

  def loss(hidden, head):
    value, metrics = chunked_head.weighted_sum(
        *arguments(objective, hidden, head, ROLLOUT.mask, model)
    )
    return 2 * value, metrics

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)


def assert_equals_dense(objective: Loss, got) -> None:
  (value, metrics), gradients = got
  (wanted, values), slopes = dense(objective, HIDDEN, HEAD)
  assert float(value) == pytest.approx(2 * float(wanted), rel=1e-5)
  mask = np.asarray(ROLLOUT.mask)
  np.testing.assert_allclose(
      metrics["loss"][mask], values[mask], rtol=1e-4, atol=1e-5
  )
  for x, y in zip(gradients, slopes, strict=True):
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(x, 2 * y, atol=2e-5 * np.abs(y).max())


@EVERY
@pytest.mark.parametrize("tokens", [1, 7, 24, 1000])
def test_a_chunked_loss_equals_the_dense_one(name, tokens):
  # Memory for so many tokens' logits at a time.
  memory = tokens * 4 * 4 * VOCABULARY
  objective = dataclasses.replace(OBJECTIVES[name], memory=memory)
  assert_equals_dense(objective, ours(objective))


@pytest.mark.parametrize("part", ["equal", "travels"])
def test_a_head_on_eight_devices(part):
  (printed,) = toys.finish(
      [toys.start("chunked_head_on_meshes.py", part, devices=8)], seconds=240
  )
  assert printed.endswith("OK\n")


def compiled_loss(mesh, sizes=(ROWS, 64, 64), memory=2**14) -> str:
  rows, length, vocabulary = sizes
  objective = dataclasses.replace(EXACT["reverse_kl"], memory=memory)
  model = dataclasses.replace(STUDENT, mesh=mesh)
  place = functools.partial(jax.sharding.NamedSharding, mesh)
  batch = place(jax.sharding.PartitionSpec(sharding.BATCH_AXES))
  weights = place(jax.sharding.PartitionSpec("tensor", "fsdp"))

  def shape(sharding, *dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  def loss(hidden, head, teacher_hidden, teacher_head, tokens, mask):
    return chunked_head.weighted_sum(
        *objective.arguments(
            model, {"head": {"weight": head}}, teacher_head, hidden,
            Rollout(tokens, mask), TeacherScores(teacher_hidden), mask,
        )
    )[0]

  return (
      jax.jit(jax.grad(loss, (0, 1)), out_shardings=(batch, weights))
      .lower(
          shape(batch, rows, length, 8),
          shape(weights, vocabulary, 8),
          shape(batch, rows, length, 6),
          shape(weights, vocabulary, 6),
          shape(batch, rows, length, dtype=jnp.int32),
          shape(batch, rows, length, dtype=bool),
      )
      .compile()
      .as_text()
  )


def test_logits_exist_for_one_chunk_at_a_time():
  vocabulary, memory = 4096, 4 * 4 * 4096 * 8
  text = compiled_loss(
      sharding.make_mesh(MeshSpec(), jax.devices()[:1]),
      (4, 64, vocabulary),
      memory,
  )
  shapes = re.findall(r"f32\[([\d,]+)\]", text)
  sizes = [
      np.prod([int(x) for x in dims.split(",")])
      for dims in shapes
      if str(vocabulary) in dims.split(",")
  ]
  assert max(sizes) == 8 * vocabulary


def test_chunks_are_even_and_keep_to_the_memory():
  assert chunked_head.chunks(100, 1000, 10 * 16_000) == (13, 8)
  assert chunked_head.chunks(100, 1000, 40 * 16_000) == (3, 40)
  assert chunked_head.chunks(2048, 1000, 300 * 16_000) == (8, 256)
  assert chunked_head.chunks(2048, 1000, 110 * 16_000) == (20, 104)
  assert chunked_head.chunks(100, 1000, 1) == (100, 1)
  assert chunked_head.chunks(7, 1000, 2**40) == (1, 7)


def test_positions_that_are_padding_in_all_rows_are_left_out():
  def count(logits, other, ids, shard):
    del other, ids, shard
    ones = jnp.ones(len(logits))
    return ones, jnp.zeros_like(logits), {"seen": ones}

  memory = ROWS * 4 * 4 * VOCABULARY  # one position of all rows
  seen = chunked_head.per_token(
      count,
      chunked_head.HeadInputs(HIDDEN, HEAD),
      chunked_head.TokenInputs(ROLLOUT.mask, ROLLOUT.mask, ROLLOUT.tokens),
      None,
      memory,
  )["seen"]
  assert (seen[:, : max(LENGTHS)] == 1).all()
  assert (seen[:, max(LENGTHS) :] == 0).all()


@EVERY
def test_weights_weigh_tokens_and_leave_the_metrics_alone(name):
  objective = dataclasses.replace(
      OBJECTIVES[name], memory=16 * 16 * VOCABULARY
  )
  weights = jnp.abs(normal(6, ROWS, LENGTH)) * ROLLOUT.mask
  weights *= jnp.arange(LENGTH) > 2

  def loss(hidden, head):
    return chunked_head.weighted_sum(
        *arguments(objective, hidden, head, weights)
    )

  def whole(hidden, head):
    values = dense_values(objective, hidden, head)
    return jnp.sum(weights * values)

  (_, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      HIDDEN, HEAD
  )
  for x, y in zip(
      gradients, jax.grad(whole, (0, 1))(HIDDEN, HEAD), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())
  wanted, mask = dense_values(objective, HIDDEN, HEAD), np.array(ROLLOUT.mask)
  np.testing.assert_allclose(
      metrics["loss"][mask], wanted[mask], rtol=1e-4, atol=1e-5
  )


def test_no_token_at_all_is_a_loss_of_zero():
  empty = dataclasses.replace(ROLLOUT, mask=jnp.zeros_like(ROLLOUT.mask))
  memory = 16 * 4 * 4 * VOCABULARY
  objective = dataclasses.replace(EXACT["reverse_kl"], memory=memory)
  value, grads = jax.value_and_grad(
      lambda h: chunked_head.weighted_sum(
          *objective.arguments(
              STUDENT, {"head": {"weight": HEAD}}, TEACHER_HEAD, h, empty,
              scores(), empty.mask,
          )
      )[0]
  )(HIDDEN)
  assert value == 0
  assert not grads.any()


def test_metrics_are_those_of_the_whole_distributions():
  (_, metrics), _ = ours(EXACT["forward_kl"])
  plain = toys.distribution(stop_ids=toys.STOPS)
  logits = HIDDEN @ HEAD.T, TEACHER_HIDDEN @ TEACHER_HEAD.T
  kl = toys.reverse_kl(*logits, plain)
  np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4, atol=1e-6)
  best = []
  for name, x in zip(("student", "teacher"), logits, strict=True):
    x = np.asarray(x, np.float64)[..., : toys.NUM_TOKENS]
    probs = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    entropy = -(probs * np.log(probs)).sum(-1)
    np.testing.assert_allclose(
        metrics[f"entropy_{name}"], entropy, rtol=1e-4
    )
    top = x.argmax(-1)
    best.append(np.where(np.isin(top, toys.STOPS), toys.STOPS[0], top))
  agree = best[0] == best[1]
  assert 0 < agree.mean() < 1
  np.testing.assert_array_equal(metrics["top1_agreement"], agree)


def assert_token_scores(mesh=None) -> None:
  model = dataclasses.replace(STUDENT, mesh=mesh)
  scores_of = functools.partial(loss_lib.token_scores, model)
  got = jax.jit(scores_of, static_argnums=4)(
      {"head": {"weight": HEAD}}, HIDDEN, ROLLOUT.tokens, ROLLOUT.mask, MERGED
  )
  logits = (HIDDEN @ HEAD.T)[..., : toys.NUM_TOKENS]
  log_probs = jax.nn.log_softmax(logits / MERGED.temperature)
  token = jnp.take_along_axis(log_probs, ROLLOUT.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(got["log_prob"], token, rtol=1e-4)
  stop = jax.nn.logsumexp(log_probs[..., list(toys.STOPS)], axis=-1)
  is_stop = jnp.isin(ROLLOUT.tokens, jnp.array(toys.STOPS))
  np.testing.assert_allclose(
      got["event"], jnp.where(is_stop, stop, token), rtol=1e-4
  )
  top = logits.argmax(-1)
  top = jnp.where(jnp.isin(top, jnp.array(toys.STOPS)), toys.STOPS[0], top)
  np.testing.assert_array_equal(got["top1"], top)


def test_token_scores_are_those_of_the_softmax():
  assert_token_scores()


def test_cross_entropy_has_the_gradient_of_the_softmax():
  def chunked_loss(hidden, head):
    return loss_lib.cross_entropy(
        STUDENT,
        {"head": {"weight": head}},
        hidden,
        ROLLOUT,
        toys.distribution(),
        24 * 16 * VOCABULARY,
    )

  def plain(hidden, head):
    logits = (hidden @ head.T)[..., : toys.NUM_TOKENS]
    log_probs = jax.nn.log_softmax(logits)
    token = jnp.take_along_axis(log_probs, ROLLOUT.tokens[..., None], -1)
    return -jnp.sum(jnp.where(ROLLOUT.mask, token[..., 0], 0))

  got = jax.value_and_grad(chunked_loss, (0, 1))(HIDDEN, HEAD)
  wanted = jax.value_and_grad(plain, (0, 1))(HIDDEN, HEAD)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_head_in_bfloat16_keeps_sums_in_float32():
  small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (HIDDEN, HEAD))
  (value, _), gradients = ours(EXACT["reverse_kl"], None, *small)
  (wanted, _), slopes = dense(EXACT["reverse_kl"], HIDDEN, HEAD)
  assert value.dtype == jnp.float32
  assert float(value) == pytest.approx(2 * float(wanted), rel=0.02)
  for x, y in zip(gradients, slopes, strict=True):
    assert x.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(x, np.float32) - 2 * y)
    assert error < 0.03 * np.linalg.norm(2 * y)


def test_a_shard_is_the_whole_without_an_axis():
  assert Shard().ids(3).tolist() == [0, 1, 2]
  assert Shard().top_k_threshold(jnp.array([[1.0, 5.0, 3.0]]), 2) == 3
