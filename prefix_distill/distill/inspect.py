"""Looks at single rollouts: what the teacher thinks of each token."""

import functools

import jax

from prefix_distill.distill import divergence
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def token_divergence(
    student: Model,
    teacher: Model,
    dist: divergence.Distribution,
    student_params: Params,
    teacher_params: Params,
    batch: PromptBatch,
    rollout: Rollout,
) -> jax.Array:
  """Returns the exact reverse KL at each rollout token, in nats: [B, P].

  Meaningless where `rollout.mask` is false.

  Args:
    student: its architecture.
    teacher: its architecture.
    dist: temperature, real ids and stop tokens.
    student_params: its weights.
    teacher_params: its weights.
    batch: prompts [B, S].
    rollout: [B, P].
  """
  return divergence.fused_reverse_kl(
      student.prefix_hidden(student_params, batch, rollout),
      student.head(student_params),
      teacher.prefix_hidden(teacher_params, batch, rollout),
      teacher.head(teacher_params),
      dist,
  )
