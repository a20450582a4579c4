"""How many rows a device decodes at a time: as many as its memory holds.

Weights are read once a token for all rows together, so with more rows a token
costs less. What a row takes is reckoned, not tried; `python -m
prefix_distill.plan` compiles the result.
"""

from typing import Any

import jax

from prefix_distill import sharding
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.train import setup as setup_lib

# Of the memory, what is left to the compiler's own needs and to fragments.
_SPARE = 0.04
# Arrays of [B, V] in float32 that exist while a token is drawn.
_LOGITS = 4
# Answers at a time where no memory is known, as on a CPU.
_DEFAULT_ROWS = 64


def _free(setup: setup_lib.Setup, model: Model, resting: Any) -> float:
  """Returns bytes of a device that are free while a model decodes.

  Args:
    setup: with `memory`.
    model: on the mesh of sampling.
    resting: what lies in the memory meanwhile, as shapes or arrays; those that
      are on the host are not counted.
  """
  layout = jax.eval_shape(model.decode_layout, model.abstract_params())
  layout = sharding.placed(layout, sharding.decode_params(layout, model.mesh))
  on_device = [
      x
      for x in jax.tree.leaves(resting)
      if x.sharding.memory_kind != "pinned_host"
  ]
  taken = sharding.bytes_per_device(on_device)
  taken += sharding.bytes_per_device(layout)
  return (1 - _SPARE) * setup.memory - taken


def _row_bytes(
    model: Model,
    config: generate.SamplerConfig,
    prompt: int,
    length: int,
    reading: float,
) -> float:
  """Returns bytes that a row takes on a device.

  Its cache, one layer of it once more while it grows, the keys and values of
  prompts before they are laid out, and its logits.

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
    setup: setup_lib.Setup,
    model: Model,
    config: generate.SamplerConfig,
    resting: Any,
    prompt: int,
    length: int,
    reading: float,
) -> int:
  """Returns how many rollouts a device samples at a time; at least one.

  Args:
    setup: whose `memory` is known.
    model: on the mesh of sampling.
    config: see `SamplerConfig`.
    resting: see `_free`.
    prompt: S.
    length: P.
    reading: prompts that are read at a time, for each row.
  """
  row = _row_bytes(model, config, prompt, length, reading)
  return max(int(_free(setup, model, resting) // row), 1)


def answers(
    setup: setup_lib.Setup,
    model: Model,
    config: generate.SamplerConfig,
    resting: Any,
    prompt: int,
) -> int:
  """Returns how many answers are decoded at a time, over all devices.

  `evaluation.batch_size`; or, if that is 0, as many as the memory holds.

  Args:
    setup: of the run.
    model: on the mesh of sampling.
    config: see `SamplerConfig`.
    resting: see `_free`.
    prompt: S.
  """
  spec = setup.config.evaluation
  if spec.batch_size:
    return spec.batch_size
  shards = sharding.batch_shards(model.mesh)
  if setup.memory is None:
    return -(-_DEFAULT_ROWS // shards) * shards
  if model.mesh != setup.mesh:  # Prompts are read between two segments.
    moved = jax.eval_shape(model.cast, model.abstract_params())
    resting = [resting, sharding.with_shardings(moved, model.mesh)]
  most = rollouts(
      setup, model, config, resting, prompt, spec.max_len,
      reading=continuous_batching.REFILL,
  )
  return shards * most
