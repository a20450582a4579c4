"""Answers to many prompts: rows that have ended give way to waiting prompts.

The host looks at the rows every few tokens. All processes of a run see the
same and decide the same.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import decode_state
from prefix_distill.rollout import sampler
from prefix_distill.structs import PromptBatch

# Tokens between two looks at the rows.
SEGMENT = 16
# Of the rows, that are given to new prompts at a time: with few, rows wait
# less for each other to end; with many, prompts are read faster.
_REFILL = 1 / 8
# Of the cache's room for answers, where no row is longer.
_SMALLEST_ROOM = 256


def most_columns(prompt: int, cap: int) -> int:
  """Returns the size of the ring when rows are as long as they may be."""
  return prompt + cap + SEGMENT


def to_host(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Brings whole arrays to every process."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  place = sharding.replicated(mesh)
  tree = jax.jit(lambda x: x, out_shardings=place)(tree)
  return jax.tree.map(
      lambda x: multihost_utils.global_array_to_host_local_array(
          x, mesh, jax.sharding.PartitionSpec()
      ),
      tree,
  )


class Engine:
  """Decodes with one set of weights, a fixed number of rows at a time."""

  def __init__(
      self,
      model: Model,
      config: decode_state.SamplerConfig,
      params: Params,
      rows: int,
      mesh: jax.sharding.Mesh,
  ):
    """Lays the weights out for decoding.

    Args:
      model: the architecture.
      config: how to sample; one answer a prompt.
      params: the weights, on any mesh of the same devices.
      rows: answers decoded at a time, divisible by the mesh's batch axes.
      mesh: the device mesh of sampling.
    """
    self._mesh = mesh
    self._rows = rows
    batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    groups = max(int(rows * _REFILL) // batch_shards, 1)
    self._refill = groups * batch_shards
    self._stop_ids = config.stop_ids
    self._programs = _programs(model, config, mesh)
    place = jax.tree.leaves(params)[0].sharding
    if isinstance(place, jax.sharding.NamedSharding) and place.mesh != mesh:
      params = self._programs.move(params)
    self._params = params
    self._layout = self._programs.layout(params)

  def answers(
      self, prompts: PromptBatch, key: jax.Array, draw: decode_state.Draw
  ) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yields number, tokens and whether it stopped, of each answer, as it ends.

    Args:
      prompts: NumPy prompts [n, S], for any n; every process has all.
      key: see `sampler.prefill`.
      draw: cap, temperature, greedy.
    """
    waiting = list(range(len(prompts.tokens)))[::-1]
    table = _Table(self._rows, prompts.tokens.shape[1], int(draw.cap))
    key = sharding.replicate_key(key, self._mesh)
    state = self._programs.empty(
        self._rows, prompts.tokens.shape[1], table.columns, key
    )
    while waiting or table.busy:
      while waiting and table.num_free >= min(self._refill, len(waiting)):
        size = min(self._refill, len(waiting))
        numbers = [waiting.pop() for _ in range(size)]
        state = self._insert(state, prompts, numbers, table, key, draw)
      columns = table.next_columns()
      state = self._programs.resize(state, columns)
      state = self._programs.decode(
          self._layout, state, draw, decode_state.count(SEGMENT)
      )
      seen = self._programs.read(state, np.int32(table.newest))
      for number, tokens in table.harvest(*to_host(seen, self._mesh)):
        yield number, tokens, int(tokens[-1]) in self._stop_ids

  def _insert(self, state, prompts, numbers, table, key, draw):
    """Reads prompts and gives them free rows."""
    slots = table.claim(numbers, self._refill)
    padded = np.resize(numbers, self._refill)
    batch = jax.tree.map(lambda x: x[padded], prompts)
    batch = sharding.global_batch(batch, self._mesh)
    new = self._programs.prefill(
        batch.tokens.shape[1] + 1, self._params, batch, key, draw
    )
    return self._programs.insert(state, new, slots)


class _Table:
  """Which row answers which prompt, and what it has written so far."""

  def __init__(self, rows: int, prompt: int, cap: int):
    self._prompt, self._cap = prompt, cap
    self._owner = np.full(rows, -1)
    self._tokens: list[list[np.ndarray]] = [[] for _ in range(rows)]
    self._count = np.zeros(rows, int)
    self._fresh = np.zeros(rows, bool)  # Its first token was not read yet.
    self.columns = prompt + SEGMENT
    self.columns = self.next_columns()
    self.newest = prompt  # The column that holds the newest tokens.

  @property
  def busy(self) -> bool:
    return bool((self._owner >= 0).any())

  @property
  def num_free(self) -> int:
    return int((self._owner < 0).sum())

  def claim(self, numbers: list[int], size: int) -> np.ndarray:
    """Takes free rows for prompts; returns them, padded with no row at all."""
    free = np.flatnonzero(self._owner < 0)[: len(numbers)]
    self._owner[free], self._count[free] = numbers, 0
    self._fresh[free] = True
    slots = np.full(size, len(self._owner), np.int32)
    slots[: len(free)] = free
    return slots

  def next_columns(self) -> int:
    """Returns the cache's size for the next segment: the largest, or halves."""
    busy = self._owner >= 0
    longest = int(self._count[busy].max(initial=0)) + SEGMENT + 1
    room = most_columns(self._prompt, self._cap) - self._prompt
    while room // 2 >= max(longest, _SMALLEST_ROOM):
      room //= 2
    # It shrinks late, or it would go to and fro.
    if not room <= self.columns - self._prompt <= 2 * room + 1:
      self.columns = self._prompt + room
    return self.columns

  def harvest(
      self,
      tokens: np.ndarray,
      count: np.ndarray,
      live: np.ndarray,
      newest: np.ndarray,
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Takes a segment's tokens [B, SEGMENT + 1]; yields the ended answers."""
    for row in np.flatnonzero(self._owner >= 0):
      # The first column was read before, but for rows that are new.
      new, skip = count[row] - self._count[row], int(not self._fresh[row])
      self._tokens[row].append(tokens[row, skip : skip + new])
      if not live[row]:
        yield int(self._owner[row]), np.concatenate(self._tokens[row])
        self._owner[row], self._tokens[row] = -1, []
    self._count, self._fresh[:] = count.copy(), False
    self.newest = int(newest)


@dataclasses.dataclass(frozen=True)
class _Programs:
  """The engine's jitted parts; the first arguments are static or sizes."""

  move: Any
  layout: Any
  prefill: Any
  decode: Any
  insert: Any
  read: Any
  resize: Any
  empty: Any


@functools.cache
def _programs(
    model: Model, config: decode_state.SamplerConfig, mesh: jax.sharding.Mesh
) -> _Programs:
  """Jits once for a model, however often it is evaluated."""
  place = decode_state.state_shardings(model.config.num_kv_heads, mesh)
  params = model.abstract_params()
  layout = jax.eval_shape(model.decode_layout, params)
  donated = {"out_shardings": place, "donate_argnums": 0}

  def empty(rows, prompt, columns, key):
    shape = (rows, columns)
    dtype = jnp.dtype(config.cache_dtype or model.dtype)
    return decode_state.empty(model.config, dtype, shape, prompt, key)

  def read(state, first):
    return decode_state.read(state, first, SEGMENT + 1)

  return _Programs(
      move=jax.jit(
          model.cast, out_shardings=sharding.param_shardings(params, mesh)
      ),
      layout=jax.jit(
          model.decode_layout,
          out_shardings=sharding.decode_params(layout, mesh),
      ),
      prefill=jax.jit(
          functools.partial(sampler.prefill, model, config),
          static_argnums=0,
          out_shardings=place,
      ),
      decode=jax.jit(
          functools.partial(sampler.decode, model, config),
          out_shardings=place,
          donate_argnums=1,
      ),
      insert=jax.jit(decode_state.insert, **donated),
      read=jax.jit(read),
      resize=decode_state.Resizer(place),
      empty=jax.jit(empty, static_argnums=(0, 1, 2), out_shardings=place),
  )
