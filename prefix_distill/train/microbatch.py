"""Microbatches: how many rows go through the memory at a time.

A batch that is too large for the memory is sampled in microbatches, and each of
those is scored and differentiated in microbatches. How many there are depends
on the prefix: early in a schedule thousands of rollouts fit, at its end a few.

Where the settings name no limit, sampling, evaluation, scoring and training
take as many rows as the memory holds. Weights are read once a token for all
rows together, so a token of more rows costs less. What a row takes is computed,
not tried; `python -m prefix_distill.plan` compiles the result.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.compilation import Program
from prefix_distill.models.config import num_params
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train.setup import Models

# Share of the memory that is left to the compiler and to fragments.
_SPARE = 0.04
# Arrays of [B, V] in float32 that exist while a token is drawn.
_LOGITS = 4
# Copies of what a layer's products make that exist in its backward pass. That
# is what the compiled gradient of Qwen3-8B takes; of 1.7B it takes less.
_WORK = 2
_FLOAT32 = 4
# More of the memory is left to scoring and training, whose products XLA tunes
# where there is a device; on an H200 they took 5 and 7 % more.
_TUNED = 0.08
# Answers at a time where no memory is known, as on a CPU.
_DEFAULT_ROWS = 64


def count(rows: int, length: int, most: int, shards: int) -> int:
  """Returns the number of microbatches.

  Args:
    rows: of the batch, divisible by `shards`.
    length: tokens of a row.
    most: tokens of a microbatch, over all devices; 0 for no limit. A
      microbatch has at least one row for each shard, whatever the limit.
    shards: of the batch; each holds as many rows of every microbatch.
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
  """Returns a microbatch of [B, ...]: [B / parts, ...]; to be jitted.

  Rows are dealt out like cards, so every device keeps its own rows and nothing
  moves.

  Args:
    parts: the number of microbatches; static.
    mesh: rows are split over its batch axes; static.
    tree: of arrays [B, ...].
    index: int32 [], which microbatch.
  """
  spec = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  place = jax.sharding.NamedSharding(mesh, spec)

  def part(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    x = jax.lax.with_sharding_constraint(x, place)
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)

  return jax.tree.map(part, tree)


def join(arrays: Sequence[np.ndarray], together: int = 1) -> np.ndarray:
  """Puts the microbatches' results into the order of the batch.

  Args:
    arrays: of the microbatches, [B / parts, ...].
    together: rows that a row was repeated into after the split.
  """
  rest = arrays[0].shape[1:]
  cards = [x.reshape(-1, together, *rest) for x in arrays]
  return np.stack(cards, axis=1).reshape(-1, *rest)


class Microbatches:
  """Splits prompts and rollouts, and changes rollouts between the phases.

  Attributes:
    mesh: of scoring and training.
    per_prompt: rollouts of a prompt.
  """

  def __init__(
      self,
      models: Models,
      samplers: Sequence[generate.Sampler],
      resting: Any,
  ):
    """Jits the programs.

    Args:
      models: of the run.
      samplers: those that the run may sample with, all with as many rollouts
        of a prompt and the same buckets.
      resting: shapes of what lies in the memory while sampling.
    """
    self.mesh = models.mesh
    self.per_prompt = samplers[0].config.per_prompt
    self._models, self._samplers = models, samplers
    self._resting = resting
    self._capacity = functools.cache(self.rollouts_at_a_time)
    self._trained = functools.cache(
        functools.partial(trained, models, resting)
    )
    self._sampling_mesh = models.sampling_mesh
    self._shards = sharding.batch_shards(models.mesh)
    rows = sharding.batch_sharding(models.mesh)
    self._deal = Program(
        "deal",
        take,
        2,
        out_shardings=sharding.batch_sharding(self._sampling_mesh),
    )
    self._repeat = Program(
        "repeat", generate.repeat_prompts, 1, out_shardings=rows
    )
    self._take = Program("take", take, 2, out_shardings=rows)
    self._shorten = Program("shorten", _shorten, 1, out_shardings=rows)
    self._lengthen = Program("lengthen", _lengthen, 1, out_shardings=rows)

  def bucket(self, cap: int) -> int:
    """Returns the static length that holds a cap."""
    return self._samplers[0].bucket(cap)

  def rollouts_at_a_time(self, prompt: int, length: int) -> int:
    """Returns how many rollouts a device samples at a time."""
    return min(
        rollouts(
            self._models,
            sampler.model,
            sampler.config,
            self._resting,
            prompt,
            length,
            1 / sampler.config.per_prompt,
        )
        for sampler in self._samplers
    )

  def sampling_count(self, prompts: PromptBatch, bucket: int) -> int:
    """Returns in how many microbatches prompts [B, S] are sampled."""
    rows, length = prompts.tokens.shape
    tokens = self.per_prompt * (length + bucket)
    most = self._models.config.rollout.batch_tokens
    if not most and self._models.memory is not None:
      most = self._capacity(length, bucket) * (length + bucket)
      most *= sharding.batch_shards(self._sampling_mesh)
    # Prompts split evenly over one mesh, and their rollouts over the other.
    least = self._shards // math.gcd(self._shards, self.per_prompt)
    shards = math.lcm(sharding.batch_shards(self._sampling_mesh), least)
    return count(rows, tokens, most, shards)

  def for_sampling(
      self, prompts: PromptBatch, cap: int
  ) -> list[PromptBatch]:
    """Splits prompts [B, S] into microbatches on the mesh of sampling."""
    number = self.sampling_count(prompts, self.bucket(cap))
    if number == 1 and self._sampling_mesh == self.mesh:
      return [prompts]
    return _split(self._deal, number, self._sampling_mesh, prompts)

  def scoring_count(self, batch: PromptBatch, rollout: Rollout) -> int:
    """Returns in how many microbatches rollouts [B, P] are scored."""
    prompt = max(batch.tokens.shape[1], batch.for_teacher().tokens.shape[1])
    rows, length = rollout.tokens.shape
    most = self._models.config.optimizer.batch_tokens
    if not most and self._models.memory is not None:
      most = self._trained(prompt, length) * (prompt + length) * self._shards
    return count(rows, prompt + length, most, self._shards)

  def for_scoring(
      self, batch: PromptBatch, rollout: Rollout
  ) -> list[tuple[PromptBatch, Rollout]]:
    """Splits rollouts [B, P] into microbatches."""
    number = self.scoring_count(batch, rollout)
    if number == 1:
      return [(batch, rollout)]
    return _split(self._take, number, self.mesh, (batch, rollout))

  def repeat(self, batch: PromptBatch) -> PromptBatch:
    """Repeats each prompt for its rollouts."""
    return self._repeat(self.per_prompt, batch)

  def shorten(self, given: Rollout, cap: int) -> Rollout:
    """Cuts given answers [B, C] at the cap: [B, P], P the bucket of the cap."""
    return self._shorten(self.bucket(cap), given, np.int32(cap))

  def lengthen(self, rollouts: list[Rollout]) -> list[Rollout]:
    """Pads rollouts to the longest; some microbatches end before others."""
    longest = max(rollout.tokens.shape[1] for rollout in rollouts)
    return [
        rollout
        if rollout.tokens.shape[1] == longest
        else self._lengthen(longest, rollout)
        for rollout in rollouts
    ]


def _split(
    program: Program, number: int, mesh: jax.sharding.Mesh, tree: Any
) -> list[Any]:
  """Returns all microbatches; `program` is `take`."""
  return [program(number, mesh, tree, np.int32(i)) for i in range(number)]


def _lengthen(length: int, rollout: Rollout) -> Rollout:
  """Pads behind the mask."""
  return jax.tree.map(
      lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]))), rollout
  )


def _shorten(length: int, given: Rollout, cap: jax.Array) -> Rollout:
  mask = given.mask[:, :length] & (jnp.arange(length) < cap)
  return Rollout(given.tokens[:, :length], mask)


def _free(models: Models, model: Model, resting: Any) -> float:
  """Returns bytes of a device that are free while a model decodes.

  Args:
    models: with `memory`.
    model: on the mesh of sampling.
    resting: what lies in the memory meanwhile, as shapes or arrays; those that
      are on the host are not counted.
  """
  layout = jax.eval_shape(model.decode_layout, model.abstract_params())
  layout = sharding.placed(layout, sharding.decode_params(layout, model.mesh))
  taken = _resting_bytes(resting) + sharding.bytes_per_device(layout)
  return (1 - _SPARE) * models.memory - taken


def _resting_bytes(tree: Any) -> int:
  """Returns the bytes of a tree that lie in a device's own memory."""
  leaves = jax.tree.leaves(tree)
  return sharding.bytes_per_device(
      [x for x in leaves if not sharding.is_on_host(x.sharding)]
  )


def _row_bytes(
    model: Model,
    config: generate.SamplerConfig,
    prompt: int,
    length: int,
    reading: float,
) -> float:
  """Returns bytes that a row takes on a device.

  They hold its cache, a second copy of one layer while the cache grows, the
  keys and values of prompts before they are laid out, and its logits.

  Args:
    model: on the mesh of sampling.
    config: see `SamplerConfig`.
    prompt: S.
    length: P.
    reading: prompts that are read at a time, for each row.
  """
  c, dtype = model.config, generate.cache_dtype(model, config)
  kernel, split = model.cache_kernel(dtype), model.mesh.shape["tensor"]
  shards = split if c.num_kv_heads % split == 0 else 1
  heads = 2 * c.num_layers * c.num_kv_heads / shards
  entry = c.head_dim * dtype.itemsize + (4 if dtype.itemsize == 1 else 0)
  columns = generate.columns(model, config, prompt + length)
  cache = columns * heads * entry
  growth = 0.0 if kernel.reads_lengths else cache / c.num_layers
  read = 2 * prompt * heads * c.head_dim * model.dtype.itemsize
  return cache + growth + reading * read + 4 * _LOGITS * c.vocab_size


def rollouts(
    models: Models,
    model: Model,
    config: generate.SamplerConfig,
    resting: Any,
    prompt: int,
    length: int,
    reading: float,
) -> int:
  """Returns how many rollouts a device samples at a time; at least one.

  Args:
    models: whose `memory` is known.
    model: on the mesh of sampling.
    config: see `SamplerConfig`.
    resting: see `_free`.
    prompt: S.
    length: P.
    reading: prompts that are read at a time, for each row.
  """
  row = _row_bytes(model, config, prompt, length, reading)
  return max(int(_free(models, model, resting) // row), 1)


def _width(model: Model) -> float:
  """Returns numbers a token that a layer's products make on a device."""
  c, split = model.config, model.mesh.shape["tensor"]
  heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
  return 2 * c.dim + (heads + 3 * c.mlp_dim) / split


def _kept(model: Model) -> float:
  """Returns numbers a token that the forward pass keeps for the backward."""
  c = model.config
  each = {
      "none": 2 * _width(model),
      "dots": c.dim + _width(model),
      "full": c.dim,
      "offload": 0,
  }[model.remat]
  return c.num_layers * each


def _trained_bytes(models: Models, prompt: int, length: int) -> float:
  """Returns bytes that a row takes on a device while it is differentiated.

  They hold what the forward pass keeps of each layer, the work of one layer and
  its gradient, and the final states of both models, with their gradient. A row
  that is only scored takes less, unless the teacher is far wider.
  """
  student, teacher = models.student, models.teacher
  tokens, width = prompt + length, student.dtype.itemsize
  work = _kept(student) + _WORK * _width(student)
  final = length * student.config.dim * (width + 2 * _FLOAT32)
  row = tokens * width * work + final
  if teacher is None:
    return row
  width = teacher.dtype.itemsize
  hidden = length * teacher.config.dim * width
  scored = tokens * width * _WORK * _width(teacher)
  return max(row, scored) + hidden


def _beside_training(models: Models, resting: Any) -> float:
  """Returns bytes that lie on a device while rows are differentiated.

  They hold what rests there, the gradient and its sum, the logits of a chunk,
  both heads and two layers gathered over fsdp, and the head's gradient, which
  is whole before it is scattered.
  """
  size, split = sharding.bytes_per_device, models.mesh.shape["tensor"]
  state, _, teacher = resting
  total = _resting_bytes(resting) + 2 * size(state.params)
  if models.config.teacher is not None and models.config.teacher.offload:
    total += size(sharding.moved(sharding.on_device, teacher or ()))
  total += models.config.loss.logits_mib * 2**20
  for model in (models.student, models.teacher):
    if model is None:
      continue
    c, width = model.config, model.dtype.itemsize
    table = c.vocab_size * c.dim
    layer = (num_params(c) - table) / c.num_layers
    total += width * (table + 2 * layer) / split
  student = models.student.config
  if student.lora is not None:  # Its head has no gradient.
    return total
  return total + _FLOAT32 * student.vocab_size * student.dim / split


def trained(models: Models, resting: Any, prompt: int, length: int) -> int:
  """Returns how many rows a device scores and trains on; at least one.

  Args:
    models: whose `memory` is known.
    resting: shapes of the state, of the weights beside adapters and of the
      teacher, where they rest.
    prompt: S, the longer one of the student's and the teacher's.
    length: P.
  """
  room = (1 - _SPARE - _TUNED) * models.memory
  free = room - _beside_training(models, resting)
  return max(int(free // _trained_bytes(models, prompt, length)), 1)


def answers(
    models: Models,
    model: Model,
    config: generate.SamplerConfig,
    resting: Any,
    prompt: int,
    length: int = 0,
) -> int:
  """Returns how many answers are decoded at a time, over all devices.

  `evaluation.batch_size`; or, if that is 0, as many as the memory holds.

  Args:
    models: of the run.
    model: on the mesh of sampling.
    config: see `SamplerConfig`.
    resting: see `_free`.
    prompt: S.
    length: of the longest answer; 0 for evaluation's.
  """
  spec = models.config.evaluation
  if spec.batch_size:
    return spec.batch_size
  shards = sharding.batch_shards(model.mesh)
  if models.memory is None:
    return -(-_DEFAULT_ROWS // shards) * shards
  if model.mesh != models.mesh:  # Prompts are read between two segments.
    moved = jax.eval_shape(model.cast, model.abstract_params())
    resting = [resting, sharding.with_shardings(moved, model.mesh)]
  most = rollouts(
      models,
      model,
      config,
      resting,
      prompt,
      length or spec.max_len,
      reading=continuous_batching.REFILL,
  )
  return shards * most
