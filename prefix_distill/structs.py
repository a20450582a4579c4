"""The dimension key, and the pytrees that flow between the parts.

  B  sequences            D  model width        N  query heads
  S  prompt positions     L  layers             K  key/value heads
  P  prefix positions     V  vocabulary         G  N / K
  T  S + P                F  MLP width          H  head width
  M  positions that a key/value cache holds

The *prompt* is what both models are conditioned on; it is padded on the left,
so that every prefix begins at column S. The *prefix* is the student's own
first sampled tokens, never the prompt; it is padded on the right. A
*completion* is a whole answer: evaluation writes it, and supervised training
reads it.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """Prompts, padded on the left.

  Attributes:
    tokens: int32 [B, S].
    mask: bool [B, S], true on the prompt.
    index: int32 [B] or [B, k], the record's number in its data set, and what
      else sets a row apart; it seeds the row.
    teacher_tokens: int32 [B, S'], what the teacher reads instead, of another
      length; None for the same.
    teacher_mask: bool [B, S'].
  """

  tokens: jax.Array
  mask: jax.Array
  index: jax.Array
  teacher_tokens: jax.Array | None = None
  teacher_mask: jax.Array | None = None

  def for_teacher(self) -> "PromptBatch":
    """Returns the prompts as the teacher reads them."""
    if self.teacher_tokens is None:
      return self
    return PromptBatch(self.teacher_tokens, self.teacher_mask, self.index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """What follows the prompts, padded on the right.

  Attributes:
    tokens: int32 [B, P].
    mask: bool [B, P], true up to and including the stop token.
    log_probs: float32 [B, P], the sampled tokens' log-probabilities under the
      model's distribution at the sampling temperature, 0 where the mask is
      false; None if the tokens were not sampled.
    behavior_log_probs: float32 [B, P], the sampled tokens' log-probabilities
      under the truncated (top-k, top-p) distribution that was sampled.
    entropy: float32 [B, P], of the distribution that `log_probs` are of, in
      nats; None unless the loss asks for it.
  """

  tokens: jax.Array
  mask: jax.Array
  log_probs: jax.Array | None = None
  behavior_log_probs: jax.Array | None = None
  entropy: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherScores:
  """What the teacher says of a rollout, at each prefix position.

  Attributes:
    hidden: [B, P, D of the teacher], the final hidden states, from which the
      loss forms the teacher's distribution chunk by chunk. None in the sampled
      forms, which need only what follows; the exact form seldom does.
    log_probs: float32 [B, P], the teacher's log-probability of the student's
      token (or of stopping, where that is one event).
    entropy: float32 [B, P], the teacher's, in nats.
    top1: int32 [B, P], its most probable token.
  """

  hidden: jax.Array | None = None
  log_probs: jax.Array | None = None
  entropy: jax.Array | None = None
  top1: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
  """Which tokens of an update count in the relaxed loss.

  Attributes:
    reward: float32 [], log q - log p of a token, below which it is dropped.
    entropy: float32 [], the student's, below which a token is dropped.
  """

  reward: jax.Array
  entropy: jax.Array
