"""Divergences between student and teacher on prefix tokens, unreduced.

The loss takes hidden states and output heads, and forms logits for a chunk of
positions at a time, forward and backward, so `[B, P, V]` never exists.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from prefix_distill.models.transformer import head_logits
from prefix_distill.rollout import token_choice


@dataclasses.dataclass(frozen=True)
class Distribution:
  """How logits become the distribution that is compared; hashable.

  Attributes:
    temperature: the one that the student sampled with.
    num_tokens: real token ids; padded rows of either vocabulary are ruled out.
    stop_ids: tokens that count as one event, "stop"; empty for none. A base
      model and its teacher stop with different tokens, and without this every
      stop costs the student some 25 nats, so it unlearns to stop.
    chunk: positions whose logits exist at a time.
  """

  temperature: float
  num_tokens: int
  stop_ids: tuple[int, ...] = ()
  chunk: int = 128


def _event_log_probs(log_probs: jax.Array, dist: Distribution) -> jax.Array:
  """Replaces each stop token's log-probability by that of stopping at all.

  Under `sum_v p(v) [log p'(v) - log q'(v)]` the stop tokens together then
  contribute `p(stop) [log p(stop) - log q(stop)]`, as one event would.
  """
  if len(dist.stop_ids) < 2:
    return log_probs
  stops = jnp.array(dist.stop_ids)
  stopping = jax.nn.logsumexp(log_probs[..., stops], axis=-1, keepdims=True)
  is_stop = jnp.isin(jnp.arange(log_probs.shape[-1]), stops)
  return jnp.where(is_stop, stopping, log_probs)


def reverse_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, dist: Distribution
) -> jax.Array:
  """Returns KL(student || teacher) at each position.

    KL = sum_v p_S(v) [log p_S(v) - log p_T(v)],  p = softmax(logits / tau)

  with the stop tokens as one event (arXiv 2602.15260, equation of section 3,
  over the whole vocabulary).

  Args:
    student_logits: [..., V_S], V_S >= num_tokens.
    teacher_logits: [..., V_T], V_T >= num_tokens.
    dist: temperature, real ids and stop tokens.

  Returns:
    float32 [...], nats.
  """
  n = dist.num_tokens
  student, teacher = (
      token_choice.log_probs(x[..., :n], dist.temperature, n)
      for x in (student_logits, teacher_logits)
  )
  ratio = _event_log_probs(student, dist) - _event_log_probs(teacher, dist)
  return jnp.sum(jnp.exp(student) * ratio, axis=-1)


def token_log_probs(
    logits: jax.Array, tokens: jax.Array, dist: Distribution
) -> tuple[jax.Array, jax.Array]:
  """Returns log p(token), and log p(event): [..., V] to [...] each.

  The event is the token itself, or stopping at all if it is a stop token.
  """
  n = dist.num_tokens
  log_probs = token_choice.log_probs(logits[..., :n], dist.temperature, n)
  return tuple(
      jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
      for x in (log_probs, _event_log_probs(log_probs, dist))
  )


def policy_gradient(
    student_log_probs: jax.Array,
    sampler_log_probs: jax.Array,
    kl: jax.Array,
) -> jax.Array:
  """Returns the paper's importance-sampled token loss.

    loss_t = -r_t A_t,   r_t = pi_S(y_t) / pi_sampler(y_t),
    A_t = -[log pi_S(y_t) - log pi_T(y_t)]  (no gradient through A)

  so that its gradient is an estimate of the gradient of reverse KL (section 2
  of arXiv 2602.15260). No discount, baseline or clipping. The ratio is that of
  the tokens that were drawn; A may compare events.

  Args:
    student_log_probs: [...], of the student being trained.
    sampler_log_probs: [...], recorded while sampling.
    kl: [...], log pi_S - log pi_T, the sampled estimate of the divergence.
  """
  ratio = jnp.exp(student_log_probs - sampler_log_probs)
  return ratio * jax.lax.stop_gradient(kl)


def map_chunks(
    function: Callable[..., Any], chunk: int, *arrays: Any
) -> jax.Array:
  """Applies a function to chunks of positions and joins the results.

  Each chunk is computed again in the backward pass, so that only one chunk's
  temporaries exist at a time.

  Args:
    function: from chunks [B, c, ...] of the arrays to arrays [B, c].
    chunk: c; P need not be a multiple of it.
    *arrays: trees of [B, P, ...].

  Returns:
    A tree of [B, P].
  """
  length = jax.tree.leaves(arrays)[0].shape[1]
  chunk = min(chunk, length)
  count = -(-length // chunk)

  def split(x):
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, count * chunk - length)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(
        x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0
    )

  body = jax.checkpoint(lambda parts: function(*parts))
  out = jax.lax.map(body, jax.tree.map(split, arrays))

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], count * chunk, *x.shape[3:])[:, :length]

  return jax.tree.map(join, out)


def fused_reverse_kl(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    dist: Distribution,
) -> jax.Array:
  """`reverse_kl` from hidden states [B, P, D] and heads [V, D]: [B, P].

  Student and teacher may differ in width and in padding of the vocabulary.
  """

  def chunk(student, teacher):
    return reverse_kl(
        head_logits(student, student_head),
        head_logits(teacher, teacher_head),
        dist,
    )

  return map_chunks(chunk, dist.chunk, student_hidden, teacher_hidden)


def fused_token_log_probs(
    hidden: jax.Array, head: jax.Array, tokens: jax.Array, dist: Distribution
) -> tuple[jax.Array, jax.Array]:
  """`token_log_probs` from hidden states [B, P, D] and a head: [B, P]s."""

  def chunk(states, ids):
    return token_log_probs(head_logits(states, head), ids, dist)

  return map_chunks(chunk, dist.chunk, hidden, tokens)
