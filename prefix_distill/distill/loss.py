"""What a run minimises: a divergence or an estimate of it, and its metrics.

An exact loss compares the whole distributions of student and teacher. A
sampled loss compares log-probabilities of the tokens that were drawn. With y
drawn from the student, log r = log q(y) - log p(y) (p: student, q: teacher;
stop tokens as one event):

  k1 = -log r              unbiased for KL(p || q), of high variance
  k3 = r - 1 - log r       unbiased as well, never negative

(Schulman, "Approximating KL divergence", 2020.) What an estimator is good for
depends on what is differentiated. On policy, in expectation, the gradient of

  policy gradient with k1   is that of the reverse KL (the paper's loss)
  k3 directly               is that of the forward KL

The relaxed loss (REOPOLD, arXiv 2603.11137) is the policy gradient with k1 on
some of the tokens. With the reward R = log q(y) - log p(y), it is the sum of

  -(p(y) / p_sampler(y)) max(R, floor)  (no gradient through R)

over the tokens that count, divided by their number in the whole update. In the
first updates (exploration) a token counts if R is not below the floor; after
that (refinement) if the student's entropy at it is among the largest of the
update, such as the upper fifth of all tokens. Entropies are recorded while the
student samples. That is elementwise work on probabilities which are there
anyway, so the FLOP ledger charges nothing; to find them in a pass before the
gradient would cost the student's forward pass. Dropped tokens are computed and
charged as any other.

Each loss is a `chunked_head.TokenLoss`: it takes the logits of a chunk of
tokens and returns losses, their gradients by formula, and metrics. The metrics
are the same for all losses as far as the teacher's scores allow, so that runs
can be compared.

`inspect` says what the models make of each token of a few rollouts, for people
to read. It is a program of its own, without a gradient, so that the update
computes the same with and without it.
"""

import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefix_distill.config import Config
from prefix_distill.config import RelaxedSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import divergence
from prefix_distill.distill.chunked_head import HeadInputs
from prefix_distill.distill.chunked_head import PerToken
from prefix_distill.distill.chunked_head import TokenInputs
from prefix_distill.distill.divergence import Distribution
from prefix_distill.distill.divergence import Shard
from prefix_distill.distill.prefix_schedule import Schedule
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import Limits
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss on prefix tokens; hashable.

  Attributes:
    dist: what is compared.
    memory: bytes of logits that may exist at a time on a device.
  """

  dist: Distribution
  memory: int = dataclasses.field(default=2**28, kw_only=True)

  def arguments(
      self,
      model: Model,
      params: Params,
      teacher_head: jax.Array | None,
      hidden: jax.Array,
      rollout: Rollout,
      scores: TeacherScores,
      weights: jax.Array,
      limits: Limits | None = None,
  ) -> tuple[Any, ...]:
    """Returns the arguments of `chunked_head.weighted_sum`.

    That returns the sum, differentiable in `params` and `hidden`, and metrics
    [B, P] in nats: `loss`, `kl` (the reverse KL at temperature 1, or its k1
    estimate on the drawn tokens), both entropies and whether the most probable
    tokens agree. Metrics mean nothing where the mask is false.

    Args:
      model: the student's architecture.
      params: the student's.
      teacher_head: [V, D of the teacher]; None if the loss is sampled.
      hidden: [B, P, D], the student's states that predict each token.
      rollout: [B, P].
      scores: the teacher's.
      weights: [B, P], of each token; 0 where the mask is false.
      limits: of the tokens that count; None if all do.
    """
    inputs = HeadInputs(hidden, model.head(params), scores.hidden, teacher_head)
    extras = self.extras(rollout, scores, limits)
    tokens = TokenInputs(weights, rollout.mask, extras)
    trains_head = model.config.lora is None
    return self, inputs, tokens, model.mesh, self.memory, trains_head

  def extras(
      self,
      rollout: Rollout,
      scores: TeacherScores,
      limits: Limits | None,
  ) -> Any:
    """Returns what the loss needs of each token, besides logits."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ExactLoss(Loss):
  """A divergence over all events; hashable.

  Attributes:
    kind: one of `divergence.TERMS`.
    beta: of "jsd".
    score_tokens: whether the teacher scores the sampled tokens as well.
    max_entry: see `divergence.bounded`; 0 for no bound.
  """

  kind: str = "reverse_kl"
  beta: float = 0.5
  score_tokens: bool = False
  max_entry: float = 0.0

  def __post_init__(self):
    divergence.named(self.kind)

  def extras(
      self,
      rollout: Rollout,
      scores: TeacherScores,
      limits: Limits | None,
  ) -> None:
    del rollout, scores, limits

  def __call__(
      self,
      logits: jax.Array,
      teacher_logits: jax.Array,
      extras: None,
      shard: Shard,
  ) -> tuple[jax.Array, jax.Array, PerToken]:
    """See `chunked_head.TokenLoss`."""
    del extras
    dist, both = self.dist, (logits, teacher_logits)
    student, teacher, these = divergence.distributions(*both, dist, shard)
    value, gradient = divergence.compare_with_gradient(
        divergence.named(self.kind, self.beta, self.max_entry),
        student,
        teacher,
        these,
        dist,
        shard,
    )
    plain = dist.plain
    if plain != dist:
      student, teacher, these = divergence.distributions(*both, plain, shard)
    agree = _top1(logits, dist, shard) == _top1(teacher_logits, dist, shard)
    metrics = {
        "loss": value,
        "kl": divergence.compare(
            divergence.reverse_kl_term, student, teacher, these, shard
        ),
        "entropy_student": _entropy(student, plain, shard),
        "entropy_teacher": _entropy(teacher, plain, shard),
        "top1_agreement": agree.astype(jnp.float32),
    }
    return value, gradient, metrics


@dataclasses.dataclass(frozen=True)
class SampledLoss(Loss):
  """A loss on sampled tokens; hashable.

  Attributes:
    form: "policy_gradient", of k1, or "direct", of k3.
    floor: bounds the reward log q - log p from below, so that a token which
      the teacher abhors does not outweigh all others; see `floor`.
  """

  form: str = "policy_gradient"
  floor: float = -math.inf

  def extras(
      self,
      rollout: Rollout,
      scores: TeacherScores,
      limits: Limits | None,
  ) -> "_Drawn":
    least = None
    if limits is not None:
      least = jnp.where(
          rollout.entropy < limits.entropy, jnp.inf, limits.reward
      )
    return _Drawn(
        rollout.tokens,
        rollout.behavior_log_probs,
        scores.log_probs,
        scores.entropy,
        scores.top1,
        least,
    )

  def signal(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns the estimate from log-probabilities of events [...]."""
    if self.floor > -math.inf:
      teacher = jnp.maximum(
          teacher, jax.lax.stop_gradient(student) + self.floor
      )
    estimate = {"policy_gradient": k1, "direct": k3}[self.form]
    return estimate(student, teacher)

  def of_tokens(
      self,
      tokens: jax.Array,
      events: jax.Array,
      sampler: jax.Array,
      teacher: jax.Array,
  ) -> jax.Array:
    """Returns the loss of each token.

    Args:
      tokens: [...], the student's log-probabilities of the drawn tokens.
      events: [...], of what they stand for.
      sampler: [...], the drawn tokens' log-probabilities while sampling.
      teacher: [...], the teacher's, of what they stand for.
    """
    loss = {"policy_gradient": policy_gradient, "direct": direct}[self.form]
    return loss(tokens, sampler, self.signal(events, teacher))

  def __call__(
      self,
      logits: jax.Array,
      other_logits: None,
      extras: "_Drawn",
      shard: Shard,
  ) -> tuple[jax.Array, jax.Array, PerToken]:
    """See `chunked_head.TokenLoss`.

    With limits there is a metric more, `counted`: 1 for tokens that count; the
    others have no loss.
    """
    del other_logits
    dist = self.dist
    found = _tokens(logits, extras.ids, dist, shard)
    values, pull = jax.vjp(
        lambda token, event: self.of_tokens(
            token, event, extras.sampler, extras.teacher
        ),
        found.token,
        found.event,
    )
    by_token, by_event = pull(jnp.ones_like(values))
    gradient = by_token[:, None] * found.d_token
    gradient += by_event[:, None] * found.d_event
    agree = _top1(logits, dist, shard) == extras.top1
    metrics = {
        "kl": found.event - extras.teacher,
        "entropy_student": _plain_entropy(logits, dist, shard),
        "entropy_teacher": extras.entropy,
        "top1_agreement": agree.astype(jnp.float32),
    }
    if extras.least is not None:
      # What is NaN counts, or nobody would see it.
      counted = ~(extras.teacher - found.event < extras.least)
      values = jnp.where(counted, values, 0)
      gradient = jnp.where(counted[:, None], gradient, 0)
      metrics["counted"] = counted.astype(jnp.float32)
    return values, gradient, metrics | {"loss": values}


class _Drawn(NamedTuple):
  """What a sampled loss needs of each token, besides logits: [N] each.

  Attributes:
    ids: the drawn tokens.
    sampler: their log-probabilities while sampling.
    teacher: the teacher's log-probabilities of what they stand for.
    entropy: the teacher's.
    top1: its most probable tokens.
    least: the reward below which a token does not count; None if all count.
  """

  ids: jax.Array
  sampler: jax.Array
  teacher: jax.Array
  entropy: jax.Array
  top1: jax.Array
  least: jax.Array | None


def floor(spec: RelaxedSpec) -> float:
  """Returns the floor of the reward log q - log p, for a mixture's weight.

  With a the weight of the student in the mixture m = a p + (1 - a) q:

    log_odds    log(a / (1 - a))  there both shares of m are equal; below it
                                  the mixture is more the student's
    scaled_log  log(a) / (1 - a)  the least that log(m / p) / (1 - a) can be,
                                  which is as steep as R where p = q
    log         log(a)            the least that log(m / p) can be

  Others' notes and implementations differ on the paper's equation 7: log_odds,
  the default, is in four, and scaled_log in two; log is ours.
  """
  a = spec.weight
  return {
      "log_odds": math.log(a / (1 - a)),
      "scaled_log": math.log(a) / (1 - a),
      "log": math.log(a),
  }[spec.floor]


@dataclasses.dataclass(frozen=True)
class Sight:
  """What a schedule sees of both models at a token; hashable.

  It is a `chunked_head.TokenLoss` without a loss, of whose metrics `names` are
  kept. With S and T the student's and the teacher's most probable tokens, and
  p and q both models' probabilities at the loss's temperature:

    overlap           |S & T| / top_tokens
    shared_mass       sum of p over S & T
    shared_penalty    sum of p |log p - log q| over S & T
    unshared_penalty  the same over S without T
    top_kl            the reverse KL over S one by one and the others as one
                      event; in nats, as the penalties are

  Attributes:
    dist: what is compared. Stop tokens are one event in `top_kl` alone.
    names: of the metrics.
    top_tokens: how many tokens S and T have; at most all real tokens.
  """

  dist: Distribution
  names: tuple[str, ...]
  top_tokens: int

  def __call__(
      self,
      logits: jax.Array,
      teacher_logits: jax.Array,
      extras: None,
      shard: Shard,
  ) -> tuple[jax.Array, jax.Array, PerToken]:
    """See `chunked_head.TokenLoss`."""
    del extras
    both = logits, teacher_logits
    plain = dataclasses.replace(self.dist, stop_ids=(), top_k=0)
    count = min(self.top_tokens, plain.num_tokens)
    own, theirs = (_top(x, count, plain, shard) for x in both)
    log_p, log_q = (
        divergence.distribution(x, plain, shard)[0].tokens for x in both
    )
    probs = jnp.exp(log_p)
    penalty = probs * abs(log_p - log_q)

    overlap = shard.sum_where(own & theirs, jnp.ones_like(probs)) / count
    found = {
        "overlap": jnp.minimum(overlap, 1.0),
        "shared_mass": shard.sum_where(own & theirs, probs),
        "shared_penalty": shard.sum_where(own & theirs, penalty),
        "unshared_penalty": shard.sum_where(own & ~theirs, penalty),
        "top_kl": self._top_kl(both, shard),
    }
    none = jnp.zeros(logits.shape[0])
    kept = {name: found[name] for name in self.names}
    return none, jnp.zeros_like(logits), kept

  def _top_kl(
      self, both: tuple[jax.Array, jax.Array], shard: Shard
  ) -> jax.Array:
    dist = dataclasses.replace(
        self.dist, top_k=self.top_tokens, top_k_of="student"
    )
    return divergence.compare(
        divergence.reverse_kl_term,
        *divergence.distributions(*both, dist, shard),
        shard,
    )


@dataclasses.dataclass(frozen=True)
class Inspection:
  """A `chunked_head.TokenLoss` whose metrics are all that it is for; hashable.

  Attributes:
    dist: the real ids and the stop tokens, at temperature 1.
    count: how many of the most probable tokens to return.
  """

  dist: Distribution
  count: int

  def __call__(
      self,
      logits: jax.Array,
      other_logits: jax.Array | None,
      extras: jax.Array,
      shard: Shard,
  ) -> tuple[jax.Array, jax.Array, PerToken]:
    """See `chunked_head.TokenLoss`; the extras are the tokens [N]."""
    other = logits if other_logits is None else other_logits
    student, teacher, these = divergence.distributions(
        logits, other, self.dist, shard
    )
    mine = shard.ids(logits.shape[-1]) == extras[:, None]
    found = {
        name: shard.sum_where(mine, probs.tokens)
        for name, probs in (("student", student), ("teacher", teacher))
    }
    if other_logits is None:
      found.pop("teacher")
      found["divergence"] = -found["student"]
    else:
      found["divergence"] = divergence.compare(
          divergence.reverse_kl_term, student, teacher, these, shard
      )
    found |= self._best(teacher.tokens, shard)
    return found["divergence"], jnp.zeros_like(logits), found

  def _best(self, log_probs: jax.Array, shard: Shard) -> PerToken:
    """Returns the most probable tokens of [N, V], over all parts: [N, n]."""
    ids = shard.ids(log_probs.shape[-1])
    count = min(self.count, self.dist.num_tokens)
    real = jnp.where(ids < self.dist.num_tokens, log_probs, divergence.NEVER)
    best, at = jax.lax.top_k(real, min(count, len(ids)))
    which = ids[at]
    if shard.axis:
      best, which = (
          jax.lax.all_gather(x, shard.axis, axis=-1, tiled=True)
          for x in (best, which)
      )
      best, at = jax.lax.top_k(best, count)
      which = jnp.take_along_axis(which, at, axis=-1)
    return {"best": which, "best_log_probs": best}


def make(config: Config, num_tokens: int, stop_ids: tuple[int, ...]) -> Loss:
  """Returns the loss that the settings name.

  Args:
    config: of the run.
    num_tokens: see `Distribution`.
    stop_ids: see `Distribution`.

  Raises:
    ConfigError: the settings name no divergence.
  """
  spec = config.loss
  memory = spec.logits_mib * 2**20
  dist = Distribution(
      temperature=1.0 if config.is_supervised else config.rollout.temperature,
      num_tokens=num_tokens,
      stop_ids=stop_ids,
      top_k=spec.exact.top_k,
  )
  if spec.form in ("policy_gradient", "direct"):
    return SampledLoss(dist, spec.form, memory=memory)
  if spec.form == "relaxed":
    return SampledLoss(dist, floor=floor(spec.relaxed), memory=memory)
  return ExactLoss(
      dist,
      spec.exact.divergence,
      spec.jsd.beta,
      max_entry=spec.exact.max_entry,
      memory=memory,
  )


def k1(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """Returns log p(y) - log q(y) of log-probabilities [...]."""
  return student - teacher


def k3(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """Returns r - 1 - log r, r = q(y) / p(y), of log-probabilities [...]."""
  log_ratio = teacher - student
  return jnp.expm1(log_ratio) - log_ratio


def policy_gradient(
    student: jax.Array, sampler: jax.Array, signal: jax.Array
) -> jax.Array:
  """Returns the paper's importance-sampled token loss.

    loss = -(p(y) / p_sampler(y)) A,  A = -signal  (no gradient through A)

  whose gradient estimates that of the signal's expectation (arXiv 2602.15260,
  section 2). No discount, baseline or clipping. The ratio is that of the
  tokens that were drawn; the signal may compare events.

  Args:
    student: [...], log-probabilities, of the student being trained.
    sampler: [...], recorded while sampling.
    signal: [...], `k1`, bounded or not.
  """
  return jnp.exp(student - sampler) * jax.lax.stop_gradient(signal)


def direct(
    student: jax.Array, sampler: jax.Array, signal: jax.Array
) -> jax.Array:
  """Returns the signal itself, differentiated, importance weighted.

  loss = (p(y) / p_sampler(y)) signal  (no gradient through the ratio)
  """
  return jax.lax.stop_gradient(jnp.exp(student - sampler)) * signal


@jax.named_scope("score")
def score(
    model: Model,
    loss: Loss,
    params: Params,
    batch: PromptBatch,
    rollout: Rollout,
) -> TeacherScores:
  """Runs the teacher over prompt + prefix; the rest was never sampled.

  Args:
    model: the teacher's architecture.
    loss: an exact one takes hidden states, from which it forms the whole
      distribution; a sampled one, or if it says so, what the teacher says of
      the tokens.
    params: the teacher's weights.
    batch: prompts [B, S].
    rollout: prefixes [B, P].
  """
  hidden = model.prefix_hidden(params, batch.for_teacher(), rollout)
  exact = isinstance(loss, ExactLoss)
  if exact and not loss.score_tokens:
    return TeacherScores(hidden=hidden)
  looked = token_scores(
      model, params, hidden, rollout.tokens, rollout.mask, loss.dist,
      loss.memory,
  )
  return TeacherScores(
      hidden=hidden if exact else None,
      log_probs=looked["event"],
      entropy=looked["entropy"],
      top1=looked["top1"],
  )


def token_scores(
    model: Model,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    dist: Distribution,
    memory: int = 2**28,
) -> PerToken:
  """Returns what the head says of given tokens, each [B, P].

  Args:
    model: the architecture.
    params: its weights.
    hidden: [B, P, D], the states that predict each token.
    tokens: int32 [B, P].
    mask: bool [B, P].
    dist: temperature, real ids and stop tokens.
    memory: bytes of logits that may exist at a time on a device.

  Returns:
    `log_prob` of the token, `event` of what it stands for, `entropy` in nats
    at temperature 1, and `top1`, the most probable token.
  """
  return chunked_head.per_token(
      functools.partial(_look, dist),
      HeadInputs(hidden, model.head(params)),
      TokenInputs(mask, mask, tokens),
      model.mesh,
      memory,
  )


def seen(
    model: Model,
    loss: ExactLoss,
    schedule: Schedule,
    params: Params,
    teacher_head: jax.Array,
    hidden: jax.Array,
    scores: TeacherScores,
    mask: jax.Array,
) -> PerToken:
  """Returns what a schedule sees of each token, [B, P], without gradients.

  Args:
    model: the student's architecture.
    loss: an exact one.
    schedule: says what it sees.
    params: the student's.
    teacher_head: [V, D of the teacher].
    hidden: [B, P, D], the student's states that predict each token.
    scores: the teacher's.
    mask: bool [B, P].
  """
  sight = Sight(loss.dist, schedule.sees, schedule.top_tokens)
  inputs = HeadInputs(hidden, model.head(params), scores.hidden, teacher_head)
  return chunked_head.per_token(
      sight,
      jax.lax.stop_gradient(inputs),
      TokenInputs(mask, mask),
      model.mesh,
      loss.memory,
  )


@jax.named_scope("inspect")
def inspect(
    student: Model,
    teacher: Model | None,
    dist: Distribution,
    count: int,
    memory: int,
    student_params: Params,
    teacher_params: Params | None,
    batch: PromptBatch,
    rollout: Rollout,
) -> PerToken:
  """Looks at the tokens of rollouts; to be jitted, the first five static.

  Args:
    student: its architecture.
    teacher: its architecture; None for supervised training.
    dist: the real ids and the stop tokens; temperature and top-k are left
      aside, as in the metrics.
    count: how many of the most probable tokens to return.
    memory: bytes of logits that may exist at a time on a device.
    student_params: its weights.
    teacher_params: its weights; None if there is no teacher.
    batch: prompts [B, S].
    rollout: [B, P].

  Returns:
    Meaningless where `rollout.mask` is false: `divergence`, the exact reverse
    KL in nats, or without a teacher -log p(token) of the student, [B, P];
    `student` and, if there is one, `teacher`, log-probabilities of the tokens,
    [B, P]; `best` and `best_log_probs`, the most probable tokens of the
    teacher, or else of the student, int32 and float32 [B, P, count], or as
    many as there are tokens.
  """
  hidden = student.prefix_hidden(student_params, batch, rollout)
  inputs = HeadInputs(hidden, student.head(student_params))
  if teacher is not None:
    inputs = dataclasses.replace(
        inputs,
        other_hidden=teacher.prefix_hidden(
            teacher_params, batch.for_teacher(), rollout
        ),
        other_head=teacher.head(teacher_params),
    )
  return chunked_head.per_token(
      Inspection(dist.plain, count),
      inputs,
      TokenInputs(rollout.mask, rollout.mask, rollout.tokens),
      student.mesh,
      memory,
  )


def cross_entropy(
    model: Model,
    params: Params,
    hidden: jax.Array,
    rollout: Rollout,
    dist: Distribution,
    memory: int = 2**28,
) -> jax.Array:
  """Sums -log p(token) over given answers: the supervised loss."""
  value, _ = chunked_head.weighted_sum(
      functools.partial(_supervised, dist),
      HeadInputs(hidden, model.head(params)),
      TokenInputs(rollout.mask, rollout.mask, rollout.tokens),
      model.mesh,
      memory,
      model.config.lora is None,
  )
  return value


def _entropy(
    probs: divergence.LogProbs, dist: Distribution, shard: Shard
) -> jax.Array:
  """Returns -sum p log p over tokens: [N]."""
  real = shard.ids(probs.tokens.shape[-1]) < dist.num_tokens
  return -shard.sum_where(real, jnp.exp(probs.tokens) * probs.tokens)


def _top1(logits: jax.Array, dist: Distribution, shard: Shard) -> jax.Array:
  """Returns the most probable token, or the first stop token for any: [N]."""
  ids = shard.ids(logits.shape[-1])
  logits = jnp.where(ids < dist.num_tokens, logits, -jnp.inf)
  best = shard.max(jnp.max(logits, axis=-1))[:, None]
  # The smallest id, where there are several.
  token = -shard.max(jnp.max(jnp.where(logits == best, -ids, -(2**30)), -1))
  if len(dist.stop_ids) > 1:
    stop = jnp.isin(token, jnp.array(dist.stop_ids))
    token = jnp.where(stop, dist.stop_ids[0], token)
  return token


def _top(
    logits: jax.Array, count: int, dist: Distribution, shard: Shard
) -> jax.Array:
  """Returns which tokens are among the most probable: bool [N, V].

  Tokens as probable as the last of them are among them.
  """
  real = shard.ids(logits.shape[-1]) < dist.num_tokens
  ranked = jnp.where(real, logits, -jnp.inf)
  return real & (ranked >= shard.top_k_threshold(ranked, count))


class _Tokens(NamedTuple):
  """What the student's logits say of given tokens.

  Attributes:
    token: [N], log-probability of the token.
    event: [N], of what it stands for.
    d_token, d_event: [N, V], their gradients.
  """

  token: jax.Array
  event: jax.Array
  d_token: jax.Array
  d_event: jax.Array


def _tokens(
    logits: jax.Array, ids: jax.Array, dist: Distribution, shard: Shard
) -> _Tokens:
  """Looks up tokens [N] in logits [N, V] of a part of the vocabulary."""
  dist = dataclasses.replace(dist, top_k=0)
  probs, these = divergence.distribution(logits, dist, shard)
  mine = shard.ids(logits.shape[-1]) == ids[:, None]
  token = shard.sum_where(mine, probs.tokens)
  real = shard.ids(logits.shape[-1]) < dist.num_tokens
  soft = jnp.where(real, jnp.exp(probs.tokens), 0)
  event, share = token, mine
  if these.groups:
    members = these.groups[0]
    is_stop = jnp.isin(ids, jnp.array(dist.stop_ids))
    log_stop = probs.groups[:, 0]
    event = jnp.where(is_stop, log_stop, token)
    within = jnp.exp(jnp.where(members, probs.tokens - log_stop[:, None], 0))
    share = jnp.where(
        is_stop[:, None], jnp.where(members, within, 0), mine
    )
  return _Tokens(
      token, event, (mine - soft) / dist.temperature,
      (share - soft) / dist.temperature,
  )


def _plain_entropy(
    logits: jax.Array, dist: Distribution, shard: Shard
) -> jax.Array:
  """Returns one model's `_entropy` at temperature 1: [N]."""
  plain = dataclasses.replace(dist.plain, stop_ids=())
  probs, _ = divergence.distribution(logits, plain, shard)
  return _entropy(probs, plain, shard)


def _look(
    dist: Distribution,
    logits: jax.Array,
    other_logits: None,
    ids: jax.Array,
    shard: Shard,
) -> tuple[jax.Array, jax.Array, PerToken]:
  """Looks at given tokens; see `token_scores`."""
  del other_logits
  found = _tokens(logits, ids, dist, shard)
  metrics = {
      "log_prob": found.token,
      "event": found.event,
      "entropy": _plain_entropy(logits, dist, shard),
      "top1": _top1(logits, dist, shard),
  }
  return found.event, found.d_event, metrics


def _supervised(
    dist: Distribution,
    logits: jax.Array,
    other_logits: None,
    ids: jax.Array,
    shard: Shard,
) -> tuple[jax.Array, jax.Array, PerToken]:
  """Cross-entropy of given tokens; see `chunked_head.TokenLoss`."""
  del other_logits
  found = _tokens(logits, ids, dist, shard)
  return -found.token, -found.d_token, {}
