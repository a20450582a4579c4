"""Batches that are too large for the memory go through it in parts.

How many parts depends on the prefix: early in a schedule thousands of rollouts
are sampled and scored at a time, at its end a few. Programs are compiled for
each length anyway.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.distill import prefix_schedule
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores
from prefix_distill.train import setup as setup_lib
from prefix_distill.train.compile import Program


def count(rows: int, length: int, most: int, shards: int) -> int:
  """Returns the number of parts that rows are taken in.

  Args:
    rows: in all, divisible by `shards`.
    length: tokens of a row.
    most: tokens of a part, over all devices; 0 for no limit. A part has at
      least one row for each shard, whatever the limit.
    shards: of the batch, each of which holds as many rows of every part.
  """
  if not most:
    return 1
  held = rows // shards
  return next(
      (
          parts
          for parts in range(1, held)
          if held % parts == 0 and rows // parts * length <= most
      ),
      held,
  )


def take(
    parts: int, mesh: jax.sharding.Mesh, tree: Any, index: jax.Array
) -> Any:
  """Returns a part of [B, ...]: [B / parts, ...]; to be jitted.

  Rows are dealt out like cards, so every device keeps its own rows and nothing
  moves.

  Args:
    parts: in how many the rows go; static.
    mesh: whose batch axes the rows are split over; static.
    tree: of arrays [B, ...].
    index: int32 [], which part.
  """
  spec = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  place = jax.sharding.NamedSharding(mesh, spec)

  def part(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    x = jax.lax.with_sharding_constraint(x, place)
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)

  return jax.tree.map(part, tree)


def join(arrays: Sequence[np.ndarray], together: int = 1) -> np.ndarray:
  """Puts what was computed of the parts into the order of the whole.

  Args:
    arrays: of the parts, [B / parts, ...].
    together: rows that a row was repeated into after the split.
  """
  rest = arrays[0].shape[1:]
  cards = [x.reshape(-1, together, *rest) for x in arrays]
  return np.stack(cards, axis=1).reshape(-1, *rest)


class Rows:
  """What is done to prompts and rollouts between the phases of a run.

  Attributes:
    mesh: of scoring and training.
    per_prompt: rollouts of a prompt.
  """

  def __init__(
      self,
      setup: setup_lib.Setup,
      buckets: tuple[int, ...],
      capacity: Callable[[int, int], int] | None = None,
  ):
    """Describes what is done.

    Args:
      setup: of the run.
      buckets: lengths of prefixes.
      capacity: of S and P, how many rollouts a device samples at a time, if
        `rollout.batch_tokens` does not say; None for no limit.
    """
    config = setup.config
    self._capacity = capacity
    self.mesh, self.per_prompt = setup.mesh, config.rollout.per_prompt
    self._sampling_mesh = setup.sampling_mesh
    self._config, self._buckets = config, buckets
    self._shards = sharding.batch_shards(setup.mesh)
    rows = sharding.batch_sharding(setup.mesh)
    self._deal = Program(
        take, 2, out_shardings=sharding.batch_sharding(self._sampling_mesh)
    )
    self._repeat = Program(generate.repeat_prompts, 1, out_shardings=rows)
    self._take = Program(take, 2, out_shardings=rows)
    self._shorten = Program(_shorten, 1, out_shardings=rows)
    self._lengthen = Program(_lengthen, 1, out_shardings=rows)
    self._agree = Program(prefix_schedule.cut, 1, out_shardings=rows)

  def bucket(self, cap: int) -> int:
    """Returns the static length that holds a cap."""
    return min(b for b in self._buckets if b >= cap)

  def group_count(self, prompts: PromptBatch, bucket: int) -> int:
    """Returns in how many groups prompts [B, S] are sampled."""
    rows, length = prompts.tokens.shape
    tokens = self.per_prompt * (length + bucket)
    most = self._config.rollout.batch_tokens
    if not most and self._capacity:
      most = self._capacity(length, bucket) * (length + bucket)
      most *= sharding.batch_shards(self._sampling_mesh)
    # Prompts split evenly over one mesh, and their rollouts over the other.
    least = self._shards // math.gcd(self._shards, self.per_prompt)
    shards = math.lcm(sharding.batch_shards(self._sampling_mesh), least)
    return count(rows, tokens, most, shards)

  def groups(self, prompts: PromptBatch, cap: int) -> list[PromptBatch]:
    """Splits prompts [B, S] into those that are sampled at a time.

    Returns:
      Groups, on the mesh of sampling.
    """
    number = self.group_count(prompts, self.bucket(cap))
    if number == 1 and self._sampling_mesh == self.mesh:
      return [prompts]
    return _split(self._deal, number, self._sampling_mesh, prompts)

  def part_count(self, batch: PromptBatch, rollout: Rollout) -> int:
    """Returns in how many parts rollouts [B, P] are scored."""
    prompt = max(batch.tokens.shape[1], batch.for_teacher().tokens.shape[1])
    rows, length = rollout.tokens.shape
    most = self._config.optimizer.batch_tokens
    return count(rows, prompt + length, most, self._shards)

  def parts(
      self, batch: PromptBatch, rollout: Rollout
  ) -> list[tuple[PromptBatch, Rollout]]:
    """Splits rollouts [B, P] into those that are scored at a time."""
    number = self.part_count(batch, rollout)
    if number == 1:
      return [(batch, rollout)]
    return _split(self._take, number, self.mesh, (batch, rollout))

  def part_shapes(
      self, prompts: PromptBatch, rollout: Rollout
  ) -> tuple[PromptBatch, Rollout, int]:
    """Returns the shapes of a part, and how many there are.

    Args:
      prompts: shapes of a group.
      rollout: shapes of its rollouts.
    """
    batch = self._repeat.shapes(self.per_prompt, prompts)
    number = self.part_count(batch, rollout)
    if number > 1:
      batch, rollout = self._take.shapes(
          number, self.mesh, (batch, rollout), np.int32(0)
      )
    return batch, rollout, number

  def repeat(self, batch: PromptBatch) -> PromptBatch:
    """Repeats each prompt for its rollouts."""
    return self._repeat(self.per_prompt, batch)

  def shorten(self, given: Rollout, cap: int) -> Rollout:
    """Cuts given answers [B, C] at the cap: [B, P], P the bucket of the cap."""
    return self._shorten(self.bucket(cap), given, np.int32(cap))

  def lengthen(self, rollouts: list[Rollout]) -> list[Rollout]:
    """Pads rollouts to the longest, for some groups end before others."""
    longest = max(rollout.tokens.shape[1] for rollout in rollouts)
    return [
        rollout
        if rollout.tokens.shape[1] == longest
        else self._lengthen(longest, rollout)
        for rollout in rollouts
    ]

  def agree(
      self, rollout: Rollout, scores: TeacherScores, threshold: float
  ) -> tuple[Rollout, jax.Array]:
    """Cuts rollouts short; see `prefix_schedule.cut`."""
    window = self._config.prefix.agreement.window_tokens
    return self._agree(window, rollout, scores, np.float32(threshold))


def _split(
    program: Program, number: int, mesh: jax.sharding.Mesh, tree: Any
) -> list[Any]:
  """Returns all parts; `program` is `take`."""
  return [program(number, mesh, tree, np.int32(i)) for i in range(number)]


def _lengthen(length: int, rollout: Rollout) -> Rollout:
  """Pads behind the mask, where nobody looks."""
  return jax.tree.map(
      lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]))), rollout
  )


def _shorten(length: int, given: Rollout, cap: jax.Array) -> Rollout:
  mask = given.mask[:, :length] & (jnp.arange(length) < cap)
  return Rollout(given.tokens[:, :length], mask)
