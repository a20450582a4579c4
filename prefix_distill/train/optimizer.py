"""AdamW through optax."""

import jax
import optax

from prefix_distill.config import OptimizerSpec


def learning_rate(spec: OptimizerSpec, steps: int) -> optax.Schedule:
  """Linear warm-up, then constant or a cosine to the last step.

  The first update is at 1 / warmup_steps of the peak, not at 0.
  """
  if spec.decay == "cosine":
    rising = max(spec.warmup_steps - 1, 0)
    return optax.warmup_cosine_decay_schedule(
        spec.learning_rate / max(spec.warmup_steps, 1),
        spec.learning_rate,
        rising,
        max(steps - 1, rising + 1),
        spec.learning_rate * spec.final_fraction,
    )
  if not spec.warmup_steps:
    return optax.constant_schedule(spec.learning_rate)
  return optax.linear_schedule(
      spec.learning_rate / spec.warmup_steps,
      spec.learning_rate,
      max(spec.warmup_steps - 1, 1),
  )


def make(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
  """Returns clip, then AdamW with decay on matrices (not norms or biases)."""

  def matrices(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1].key).endswith(("scale", "bias")),
        params,
    )

  adamw = optax.adamw(
      learning_rate(spec, steps),
      b1=spec.b1,
      b2=spec.b2,
      weight_decay=spec.weight_decay,
      mask=matrices,
  )
  if not spec.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(spec.clip_norm), adamw)
