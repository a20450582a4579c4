"""What the teacher says of the student's prefix."""

from prefix_distill.distill import divergence
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores


def score(
    model: Model,
    form: str,
    dist: divergence.Distribution,
    params: Params,
    batch: PromptBatch,
    rollout: Rollout,
) -> TeacherScores:
  """Runs the teacher over prompt + prefix; the rest was never sampled.

  Args:
    model: the teacher's architecture.
    form: "exact" keeps hidden states, from which the loss forms the whole
      distribution; "sampled" keeps the sampled tokens' log-probabilities.
    dist: temperature, real ids and stop tokens.
    params: the teacher's weights.
    batch: prompts [B, S].
    rollout: prefixes [B, P].
  """
  hidden = model.prefix_hidden(params, batch, rollout)
  if form == "exact":
    return TeacherScores(hidden=hidden)
  _, log_probs = divergence.fused_token_log_probs(
      hidden, model.head(params), rollout.tokens, dist
  )
  return TeacherScores(log_probs=log_probs)
