"""Divergences between student and teacher, at each position, unreduced.

Every one is a sum over *events*, `sum_e f(log p(e), log q(e))`, with p the
student's distribution and q the teacher's. An event is a token, or several
tokens taken as one: the stop tokens of both models, or what top-k leaves over.
So a divergence is its `f`, and everything else (temperature, padded rows,
events, a vocabulary that is split over devices) is written once.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefix_distill import errors

# log p(e), log q(e) -> the event's share of the divergence.
Term = Callable[[jax.Array, jax.Array], jax.Array]
# The logit, or log-probability, of what is ruled out.
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Distribution:
  """How logits become the distribution that is compared; hashable.

  Attributes:
    temperature: the one that the student sampled with.
    num_tokens: real token ids; padded rows of either vocabulary are ruled out
      and the rest renormalised.
    stop_ids: tokens that count as one event, "stop"; empty for none. A base
      model and its teacher stop with different tokens, and without this every
      stop costs the student some 25 nats, so it unlearns to stop.
    top_k: compare so many tokens one by one, and the others as one event, the
      tail; 0 for all one by one. Without the tail a student could lower the
      divergence by moving its mass out of sight. Tokens as probable as the
      last one kept are kept as well.
    top_k_of: whose most probable tokens, "teacher" or "student".
  """

  temperature: float
  num_tokens: int
  stop_ids: tuple[int, ...] = ()
  top_k: int = 0
  top_k_of: str = "teacher"

  @property
  def plain(self) -> "Distribution":
    """What metrics are taken of: temperature 1, no top-k."""
    return dataclasses.replace(self, temperature=1.0, top_k=0)


@dataclasses.dataclass(frozen=True)
class Shard:
  """The part of the vocabulary that a device holds; hashable.

  Attributes:
    axis: the mesh axis that the vocabulary is split over, inside a
      `shard_map`; None for all of it.
  """

  axis: str | None = None

  def sum(self, x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, self.axis) if self.axis else x

  def sum_where(self, where: jax.Array, x: jax.Array) -> jax.Array:
    """Sums some tokens of all parts: [..., V] each to [...]."""
    return self.sum(jnp.sum(jnp.where(where, x, 0), axis=-1))

  def max(self, x: jax.Array) -> jax.Array:
    # No gradient: a maximum only keeps exponentials in range.
    x = jax.lax.stop_gradient(x)
    return jax.lax.pmax(x, self.axis) if self.axis else x

  def ids(self, rows: int) -> jax.Array:
    """Returns the token ids of this part: int32 [V]."""
    start = jax.lax.axis_index(self.axis) * rows if self.axis else 0
    return start + jnp.arange(rows)

  def top_k_threshold(self, x: jax.Array, k: int) -> jax.Array:
    """Returns the k-th largest number over all parts: [..., 1]."""
    best, _ = jax.lax.top_k(x, min(k, x.shape[-1]))
    if self.axis:
      best = jax.lax.all_gather(best, self.axis, axis=-1, tiled=True)
      best, _ = jax.lax.top_k(best, k)
    return best[..., -1:]


WHOLE = Shard()


class Events(NamedTuple):
  """Which tokens are which events.

  Attributes:
    single: bool [..., V], tokens that are events of their own.
    groups: bool [..., V] each, tokens that are one event together.
  """

  single: jax.Array
  groups: tuple[jax.Array, ...]


class LogProbs(NamedTuple):
  """A distribution over events.

  Attributes:
    tokens: float32 [..., V], of each token; 0 on padded rows.
    groups: float32 [..., G], of each group; 0 where a group has no tokens.
    present: bool [..., G], whether it has any.
  """

  tokens: jax.Array
  groups: jax.Array
  present: jax.Array


def reverse_kl_term(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(student || teacher) = sum p (log p - log q), the paper's loss.

  Source: arXiv 2602.15260, section 2.
  """
  return jnp.exp(log_p) * (log_p - log_q)


def forward_kl_term(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(teacher || student) = sum q (log q - log p)."""
  return jnp.exp(log_q) * (log_q - log_p)


def jsd_term(log_p: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
  """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1).

    JSD = beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

  The GKD paper calls the teacher P and the student Q. JSD / beta goes to the
  forward KL as beta goes to 0, and JSD / (1 - beta) to the reverse KL as it
  goes to 1; those two limits are what 0 and 1 stand for.

  Args:
    log_p: the student's.
    log_q: the teacher's.
    beta: between 0 and 1.
  """
  if beta == 0:
    return forward_kl_term(log_p, log_q)
  if beta == 1:
    return reverse_kl_term(log_p, log_q)
  log_m = jnp.logaddexp(log_q + jnp.log(beta), log_p + jnp.log1p(-beta))
  teacher = beta * jnp.exp(log_q) * (log_q - log_m)
  return teacher + (1 - beta) * jnp.exp(log_p) * (log_p - log_m)


# What `loss.exact.divergence` may name.
TERMS = {
    "reverse_kl": reverse_kl_term,
    "forward_kl": forward_kl_term,
    "jsd": jsd_term,
}


def bounded(term: Term, most: float) -> Term:
  """Cuts each event's share: min(f(log p(e), log q(e)), most).

  So a few tokens of style cannot make up most of a divergence (COPSD, arXiv
  2605.09548, with 0.05 nats for the forward KL). An event is a token, all stop
  tokens where they are merged, or the tail of top-k. An event whose share is
  cut has no gradient of its own.

  Only large shares are cut. Shares of the forward KL are negative where the
  student is more probable than the teacher, and these stay whole. Shares of the
  JSD are never negative.

  The sum of cut shares is no divergence, and may be negative. Where student and
  teacher agree all shares are 0, so the teacher's distribution is still a local
  minimum. Elsewhere the forward KL may pull the wrong way: the gradient of the
  cut share is gone, and the other tokens take that token's mass. If the teacher
  gives a token 0.9 and the student 0.85, the share 0.9 log(0.9 / 0.85) is above
  0.05, and the student moves away from the teacher. Each share of the JSD pulls
  the right way by itself.

  Args:
    term: of the divergence.
    most: above 0, in nats.
  """

  def cut(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    shares = term(log_p, log_q)
    # A NaN stays one.
    return jnp.where(shares > most, most, shares)

  return cut


def named(name: str, beta: float = 0.5, max_entry: float = 0.0) -> Term:
  """Returns the formula that the settings name.

  Args:
    name: of `TERMS`.
    beta: of "jsd".
    max_entry: see `bounded`; 0 for no bound.

  Raises:
    ConfigError: there is none.
  """
  errors.check(
      name in TERMS,
      f"loss.exact.divergence is {name!r}; use one of {', '.join(TERMS)}.",
  )
  found = TERMS[name]
  if name == "jsd":
    found = functools.partial(found, beta=beta)
  return bounded(found, max_entry) if max_entry else found


def events(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    dist: Distribution,
    shard: Shard = WHOLE,
) -> Events:
  """Says which tokens are compared one by one and which together."""
  ids = shard.ids(student_logits.shape[-1])
  single, groups = ids < dist.num_tokens, []
  if len(dist.stop_ids) > 1:
    # One stop token is an event of its own anyway.
    stop = jnp.isin(ids, jnp.array(dist.stop_ids))
    single &= ~stop
    groups.append(stop)
  if 0 < dist.top_k < dist.num_tokens:
    whose = student_logits if dist.top_k_of == "student" else teacher_logits
    ranked = jnp.where(single, jax.lax.stop_gradient(whose), NEVER)
    kept = single & (ranked >= shard.top_k_threshold(ranked, dist.top_k))
    groups.append(single & ~kept)
    single = kept
  return Events(single, tuple(groups))


def log_probs(
    logits: jax.Array, dist: Distribution, these: Events, shard: Shard = WHOLE
) -> LogProbs:
  """Returns log softmax(logits / temperature) of tokens and groups.

  Two reductions over the vocabulary, of one number for each event that is a
  sum; the logits stay where they are.
  """
  scaled = logits.astype(jnp.float32) / dist.temperature
  real = shard.ids(logits.shape[-1]) < dist.num_tokens
  masks = (real, *these.groups)
  # A group has a maximum of its own, or an improbable one would vanish.
  top = shard.max(
      jnp.stack(
          [jnp.max(jnp.where(m, scaled, NEVER), axis=-1) for m in masks], -1
      )
  )
  sums = shard.sum(
      jnp.stack(
          [
              jnp.sum(
                  jnp.where(m, jnp.exp(jnp.where(m, scaled - t, 0)), 0), -1
              )
              for m, t in zip(masks, _columns(top), strict=True)
          ],
          -1,
      )
  )
  present = sums > 0
  logs = jnp.where(present, top + jnp.log(jnp.where(present, sums, 1)), 0)
  total = logs[..., :1]
  groups = jnp.where(present, logs - total, 0)[..., 1:]
  tokens = jnp.where(real, scaled - total, 0)
  return LogProbs(tokens, groups, present[..., 1:])


def _columns(x: jax.Array) -> list[jax.Array]:
  return [x[..., i : i + 1] for i in range(x.shape[-1])]


def distribution(
    logits: jax.Array, dist: Distribution, shard: Shard = WHOLE
) -> tuple[LogProbs, Events]:
  """Returns one model's distribution; top-k takes its own tokens."""
  these = events(logits, logits, dist, shard)
  return log_probs(logits, dist, these, shard), these


def distributions(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    dist: Distribution,
    shard: Shard = WHOLE,
) -> tuple[LogProbs, LogProbs, Events]:
  """Returns both models' distributions over the same events, and the events.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    dist: temperature, real ids and events.
    shard: which part of the vocabulary the V rows are.
  """
  these = events(student_logits, teacher_logits, dist, shard)
  return (
      log_probs(student_logits, dist, these, shard),
      log_probs(teacher_logits, dist, these, shard),
      these,
  )


def compare(
    term: Term,
    student: LogProbs,
    teacher: LogProbs,
    these: Events,
    shard: Shard = WHOLE,
) -> jax.Array:
  """Sums a term over all events: float32 [...], nats."""
  shares = term(student.tokens, teacher.tokens)
  total = shard.sum_where(these.single, shares)
  groups = term(student.groups, teacher.groups)
  return total + jnp.sum(jnp.where(student.present, groups, 0), axis=-1)


def compare_with_gradient(
    term: Term,
    student: LogProbs,
    teacher: LogProbs,
    these: Events,
    dist: Distribution,
    shard: Shard = WHOLE,
) -> tuple[jax.Array, jax.Array]:
  """`compare`, and its gradient with respect to the student's logits.

  With g_e = df/dlog p(e) the gradient of a token's logit z_v, v in event e, is

    (g_e p(v) / p(e) - p(v) sum_e' g_e') / temperature

  so it takes no second pass over the vocabulary's parts but one more sum.

  Returns:
    [...] and [..., V].
  """
  # Gradients of the shares, in one pass with them.
  values, slopes = jax.jvp(
      functools.partial(term, log_q=teacher.tokens), (student.tokens,),
      (jnp.ones_like(student.tokens),),
  )
  group_values, group_slopes = jax.jvp(
      functools.partial(term, log_q=teacher.groups), (student.groups,),
      (jnp.ones_like(student.groups),),
  )
  slopes = jnp.where(these.single, slopes, 0)
  value, total = shard.sum(
      jnp.stack([
          jnp.sum(jnp.where(these.single, values, 0), axis=-1),
          jnp.sum(slopes, axis=-1),
      ])
  )
  value += jnp.sum(jnp.where(student.present, group_values, 0), axis=-1)
  group_slopes = jnp.where(student.present, group_slopes, 0)
  total += jnp.sum(group_slopes, axis=-1)
  probs = jnp.exp(student.tokens)
  parts = zip(
      these.groups, _columns(group_slopes), _columns(student.groups),
      strict=True,
  )
  for members, group_slope, log_prob in parts:
    share = jnp.exp(jnp.minimum(student.tokens - log_prob, 0))
    slopes = jnp.where(members, group_slope * share, slopes)
  gradient = (slopes - probs * total[..., None]) / dist.temperature
  real = shard.ids(probs.shape[-1]) < dist.num_tokens
  return value, jnp.where(real, gradient, 0)
