"""The pure functions of an update: the gradient and the optimizer's step.

`gradient` runs for each microbatch and adds up sums; `apply` runs once.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prefix_distill.config import OptimizerSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.divergence import Distribution
from prefix_distill.distill.loss import Loss
from prefix_distill.distill.prefix_schedule import Chosen
from prefix_distill.distill.prefix_schedule import Schedule
from prefix_distill.distill.prefix_schedule import SHOWN
from prefix_distill.models import lora
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import Limits
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores

# Sums over the batch and their counts; a metric is sum / count.
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Microbatch(NamedTuple):
  """A microbatch.

  Attributes:
    batch: prompts [B, S], one row for each rollout.
    rollout: [B, P].
    scores: the teacher's; None for supervised training.
    limits: of the tokens that count; None if all do.
  """

  batch: PromptBatch
  rollout: Rollout
  scores: TeacherScores | None = None
  limits: Limits | None = None


# (params, the teacher's output head, microbatch, the schedule's threshold if it
# has one, the frozen base if there is one) -> summed loss, metrics.
LossFn = Callable[..., tuple[jax.Array, Sums]]
# Answers are divided into so many bins of positions in the metrics.
POSITION_BINS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What an update replaces, and a checkpoint holds.

  Attributes:
    step: int32 [], updates done.
    params: float32 master weights, all or the adapters alone.
    opt_state: optax's.
  """

  step: jax.Array
  params: Params
  opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradient:
  """What the microbatches of an update add up to: sums, not means.

  Attributes:
    grads: of the summed loss, like the parameters.
    sums: the metrics.
    rows: int32 [], rollouts with a token at least.
    chosen: what the schedule chose of the last microbatch, which is no sum and
      is taken out before the next one; None if it chooses nothing.
  """

  grads: Params
  sums: Sums
  rows: jax.Array
  chosen: Chosen | None = None


@dataclasses.dataclass(frozen=True)
class Watch:
  """What the metrics look at; hashable.

  Attributes:
    max_len: the longest answer, which is divided into bins of positions.
    special_ids: tokens such as `<think>` and the stop tokens.
    schedule: chooses among an update's tokens, if it sees them.
  """

  max_len: int
  special_ids: tuple[int, ...]
  schedule: Schedule = Schedule(0)


@dataclasses.dataclass(frozen=True)
class Window:
  """Which positions of a rollout are trained on; hashable.

  Attributes:
    start, end: positions [start, end); negative ones count from the rollout's
      own end, and an end of 0 is that end.
    by_length: whether the tokens of a rollout share a weight of 1, so that
      their weighted sum is the rollout's mean; else each weighs 1.
  """

  start: int = 0
  end: int = 0
  by_length: bool = False

  def weights(self, mask: jax.Array) -> jax.Array:
    """Returns the weights [B, P] of tokens in the loss.

    They are bool, true where the mask is and in the window. With `by_length`
    that is divided, in float32, by the number of such tokens of the rollout,
    and not by the rollout's whole length.
    """
    length = jnp.sum(mask, axis=1, keepdims=True)
    start = self.start if self.start >= 0 else length + self.start
    end = self.end if self.end > 0 else length + self.end
    position = jnp.arange(mask.shape[1])
    inside = mask & (position >= start) & (position < end)
    if not self.by_length:
      return inside
    return inside / jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1)


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


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


def optimizer(spec: OptimizerSpec, steps: int) -> optax.GradientTransformation:
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


def _masked(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Zeroes what lies behind the mask, so that no NaN from there can pass."""
  mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
  return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _sum_and_count(
    values: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return jnp.sum(_masked(values, mask)), jnp.sum(mask)


def _by_position(
    values: jax.Array, mask: jax.Array, max_len: int
) -> tuple[jax.Array, jax.Array]:
  """Sums [B, P] into bins of positions: values and counts, [POSITION_BINS]."""
  bins = jnp.arange(mask.shape[1]) // bin_width(max_len)
  totals = jnp.sum(_masked(values, mask), axis=0)
  return tuple(
      jax.ops.segment_sum(x, bins, POSITION_BINS)
      for x in (totals, jnp.sum(mask, axis=0))
  )


def bin_width(max_len: int) -> int:
  """Returns the positions in a bin."""
  return -(-max_len // POSITION_BINS)


def distillation_loss(
    model: Model,
    token_loss: Loss,
    watch: Watch,
    window: Window,
    params: Params,
    teacher_head: jax.Array | None,
    inputs: Microbatch,
    threshold: jax.Array | None = None,
    base: Params | None = None,
) -> tuple[jax.Array, Sums]:
  """Sums the loss over all prefix tokens of all rollouts.

  Divided by the number of rollouts it is the paper's: the mean over rollouts
  of the *sum* over prefix tokens (section 2). A rollout that was cut at the
  cap counts as any other. If the window weighs by length, it is the mean over
  rollouts of their *means* over tokens.

  A schedule that sees the tokens first chooses which of them count, and their
  weights. What it does not choose is as if it had not been sampled.

  Returns:
    The summed loss, and metrics in nats: `loss` and `kl` per token (`loss` is
    the mean of the rollouts' means if the window weighs by length),
    `kl_rollout` per rollout, `kl_at` per token in each bin of positions,
    `kl_position` at each position, `kl_special` per special token, both
    entropies, and the share of tokens at which the most probable one is the
    same. All but `loss` are of the whole rollout, whatever the window. With
    limits there is also `counted`, the share of tokens that have a loss; `loss`
    is then per counted token. What the schedule chose is under `chosen`.
  """
  params = lora.join(base, params)
  batch, rollout, scores, limits = Microbatch(*inputs)
  mask = rollout.mask
  # Inputs and not only terms: the gradient of a discarded NaN is 0 * NaN.
  with jax.named_scope("student"):
    hidden = _masked(model.prefix_hidden(params, batch, rollout), mask)
  scores, sampler = jax.tree.map(
      lambda x: _masked(x, mask), (scores, rollout.behavior_log_probs)
  )
  rollout = dataclasses.replace(rollout, behavior_log_probs=sampler)
  schedule, shown, given = watch.schedule, {}, None
  if schedule.sees:
    found = loss_lib.seen(
        model, token_loss, schedule, params, teacher_head, hidden, scores, mask
    )
    chosen, given, sums = schedule.choose(found, mask, threshold)
    mask = chosen.trained
    rollout = dataclasses.replace(rollout, mask=mask)
    shown = {SHOWN + name: pair for name, pair in sums.items()}
    shown["chosen"] = chosen
  weights = window.weights(mask)
  if given is not None:
    weights = weights * given
  loss, metrics = chunked_head.weighted_sum(
      *token_loss.arguments(
          model, params, teacher_head, hidden, rollout, scores, weights, limits
      )
  )
  sums = {name: _sum_and_count(x, mask) for name, x in metrics.items()}
  if "counted" in metrics:
    weights = weights * (metrics["counted"] > 0)
    sums["counted"] = (jnp.sum(weights > 0), jnp.sum(mask))
  sums["loss"] = (loss, jnp.sum(weights))
  if sampler is not None:
    sums["sampler"] = _sum_and_count(sampler, mask)
  kl = metrics["kl"]
  special = mask & jnp.isin(rollout.tokens, jnp.array(watch.special_ids))
  sums |= {
      "kl_rollout": (sums["kl"][0], jnp.sum(jnp.any(mask, axis=1))),
      "kl_at": _by_position(kl, mask, watch.max_len),
      "kl_position": (jnp.sum(_masked(kl, mask), 0), jnp.sum(mask, 0)),
      "kl_special": _sum_and_count(kl, special),
  }
  return loss, sums | shown


def limits(
    window: Window,
    floor: float,
    share: float,
    refines: jax.Array,
    rollouts: Sequence[Rollout],
) -> Limits:
  """Says which tokens of an update count in the relaxed loss; to be jitted.

  Args:
    window: the tokens that may count.
    floor: the reward below which a token is dropped in the first phase.
    share: of the tokens, that count in the second phase.
    refines: bool [], whether the update is in the second phase.
    rollouts: all of the update, with entropies, whatever their microbatches.
  """
  masks = [window.weights(rollout.mask) > 0 for rollout in rollouts]
  least = top_share(share, [r.entropy for r in rollouts], masks)
  off = jnp.float32(-jnp.inf)
  return Limits(
      jnp.where(refines, off, jnp.float32(floor)),
      jnp.where(refines, least, off),
  )


def top_share(
    share: float, values: Sequence[jax.Array], masks: Sequence[jax.Array]
) -> jax.Array:
  """Returns the least of the largest numbers: float32 [].

  Numbers from 0 on have the order of their bits. So the bits are found one
  after the other, by counting the numbers that are as large: arrays stay on
  their devices, and counts are exact in any order.

  Args:
    share: the fraction of all numbers that counts as the largest, and at least
      one number. Numbers equal to the least of these count as well.
    values: float32 [...] each; what is negative is taken for 0.
    masks: bool, like the values; false for numbers that are left out.
  """
  bits = []
  for x, mask in zip(values, masks, strict=True):
    x = jnp.abs(jnp.maximum(x, 0))  # -0.0 has the sign's bit.
    bits.append(jnp.where(mask, jax.lax.bitcast_convert_type(x, jnp.int32), -1))

  def as_large(least: jax.Array) -> jax.Array:
    return sum(jnp.sum(x >= least) for x in bits)

  wanted = jnp.maximum(jnp.round(share * as_large(0)), 1).astype(jnp.int32)

  def bit(i: jax.Array, found: jax.Array) -> jax.Array:
    tried = found | (1 << (30 - i))
    return jnp.where(as_large(tried) >= wanted, tried, found)

  found = jax.lax.fori_loop(0, 31, bit, jnp.int32(0))
  return jax.lax.bitcast_convert_type(found, jnp.float32)


def supervised_loss(
    model: Model,
    dist: Distribution,
    memory: int,
    params: Params,
    teacher_head: None,
    inputs: Microbatch,
    threshold: None = None,
    base: Params | None = None,
) -> tuple[jax.Array, Sums]:
  """Sums the cross-entropy of the completions, stop token included."""
  del teacher_head, threshold  # There is no teacher, and nothing is chosen.
  params = lora.join(base, params)
  batch, rollout, *_ = inputs
  hidden = model.prefix_hidden(params, batch, rollout)
  loss = loss_lib.cross_entropy(
      model, params, hidden, rollout, dist, memory
  )
  count = jnp.sum(rollout.mask)
  return loss, {"cross_entropy": (loss, count), "loss": (loss, count)}


def gradient(
    loss_fn: LossFn,
    params: Params,
    teacher_head: jax.Array | None,
    inputs: Microbatch,
    before: Gradient | None = None,
    threshold: jax.Array | None = None,
    base: Params | None = None,
) -> Gradient:
  """Adds a microbatch's gradient and metrics; to be jitted, `before` donated.

  Args:
    loss_fn: returns a sum and metrics as (sum, count).
    params: those of the student that are trained.
    teacher_head: [V, D of the teacher]; None if the loss does not need it.
    inputs: the microbatch.
    before: of the microbatches so far, without what was chosen; None for none.
    threshold: float32 [], the schedule's; None if it has none.
    base: the student's weights that are not trained; None if all are.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (_, sums), grads = grad_fn(params, teacher_head, inputs, threshold, base)
  chosen = sums.pop("chosen", None)
  mask = Microbatch(*inputs).rollout.mask
  rows = jnp.sum(jnp.any(mask, axis=1), dtype=jnp.int32)
  total = Gradient(grads, sums, rows)
  if before is not None:
    total = jax.tree.map(jnp.add, before, total)
  return dataclasses.replace(total, chosen=chosen)


def refreshed(dtype: str, params: Params, old: Params | None) -> Params:
  """Returns a copy of the student's weights for the teacher; to be jitted.

  Weights of the same dtype are copied, too: the next update donates the
  student's.

  Args:
    dtype: of the teacher's weights.
    params: the student's.
    old: the teacher's, to be donated; None for none.
  """
  del old
  return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)


def guarded(finite: jax.Array, new: Any, old: Any) -> Any:
  """Returns the new arrays of a tree if all is finite, and else the old."""
  return jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), new, old
  )


def apply(
    tx: optax.GradientTransformation,
    normalize: str,
    state: TrainState,
    total: Gradient,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes the optimizer's step; to be jitted with the state donated.

  Gradients of *sums* were added over microbatches and are divided once by the
  global count, so neither microbatches nor sharding change the update.

  If the loss, the gradient's norm or the norm of the parameters' change is not
  finite, parameters and moments stay as they were; and so they do if there was
  no token to learn from.

  Args:
    tx: the optimizer.
    normalize: `loss.normalize`: "tokens" divides by the number of tokens, the
      others by that of rollouts. For "length" the gradient is that of a loss
      whose window weighs by length.
    state: before.
    total: of all microbatches.

  Returns:
    The state after, and metrics as means.
  """
  # The count over all microbatches and devices: no mean of means.
  count = total.sums["loss"][1] if normalize == "tokens" else total.rows
  grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), total.grads)
  with jax.named_scope("optimizer"):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  norms = {
      "grad_norm": optax.global_norm(grads),
      "update_norm": optax.global_norm(updates),
  }
  finite = jnp.isfinite(total.sums["loss"][0])
  for norm in norms.values():
    finite &= jnp.isfinite(norm)
  params, opt_state = guarded(
      finite & (total.rows > 0),
      (params, opt_state),
      (state.params, state.opt_state),
  )
  metrics = {
      name: summed / number  # NaN in a bin without tokens.
      for name, (summed, number) in total.sums.items()
  }
  metrics |= norms | {"finite": finite}
  return TrainState(state.step + 1, params, opt_state), metrics


# The phases of an update in order, each with a metric of its numbers.
_PHASES = (
    ("the sampler", "sampler"),
    ("the teacher", "entropy_teacher"),
    ("the student", "entropy_student"),
    ("the student", "cross_entropy"),
    ("the loss", "loss"),
    ("the gradient", "grad_norm"),
    ("the optimizer", "update_norm"),
)


def first_not_finite(metrics: dict[str, Any]) -> str:
  """Returns the first phase of an update whose numbers are not finite.

  Args:
    metrics: what `apply` returned, on the host, with `finite` false.
  """
  return next(
      phase
      for phase, name in _PHASES
      if name in metrics and not np.isfinite(metrics[name])
  )
