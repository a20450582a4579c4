"""What the models say of each token of a few rollouts, for people to read.

It is a program of its own, without a gradient, so that the update computes the
same with and without it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prefix_distill.distill import chunked_head
from prefix_distill.distill import divergence
from prefix_distill.distill.chunked_head import HeadInputs
from prefix_distill.distill.chunked_head import PerToken
from prefix_distill.distill.chunked_head import TokenInputs
from prefix_distill.distill.divergence import Distribution
from prefix_distill.distill.divergence import Shard
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

_NEVER = -1e30


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
        name: shard.sum(jnp.sum(jnp.where(mine, probs.tokens, 0), axis=-1))
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
    real = jnp.where(ids < self.dist.num_tokens, log_probs, _NEVER)
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
