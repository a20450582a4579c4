"""Answers to many prompts: rows that have ended give way to waiting prompts.

The host looks at the rows after each segment. All processes of a run see the
same and decide the same.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import functools
import json
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from prefix_distill import distributed
from prefix_distill import sharding
from prefix_distill.errors import JsonError
from prefix_distill.errors import parse_json
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

# Refill when this fraction of the rows is free. A small fraction leaves fewer
# rows idle, and a large one prefills more prompts at a time.
REFILL = 1 / 8
# The cache has room for answers of at least so many tokens.
_SMALLEST_ROOM = 256


def rooms(
    model: Model, config: generate.SamplerConfig, prompt: int, cap: int
) -> tuple[int, ...]:
  """Returns the sizes of the cache, as columns behind the prompts.

  The last one is for rows as long as they may be.
  """
  sizes = generate.rooms(model, config, prompt, cap)
  return (*(x for x in sizes[:-1] if x >= _SMALLEST_ROOM), sizes[-1])


# The prompt's number, the tokens, and whether a stop token ended them.
Answer = tuple[int, np.ndarray, bool]


def kept_answers(
    engine: "Engine",
    prompts: PromptBatch,
    key: jax.Array,
    draw: generate.Draw,
    file: pathlib.Path,
    poll: Callable[[], None],
) -> Iterator[Answer]:
  """Yields what `Engine.answers` does, and keeps each answer in a file.

  If the file is there, the answers in it are yielded and not decoded again, so
  an evaluation that was stopped or killed goes on where it was. An answer
  depends on its prompt, the key and the draw alone.

  Args:
    engine: decodes.
    prompts: see `Engine.answers`.
    key: see `Engine.answers`.
    draw: see `Engine.answers`.
    file: on a file system that all processes see. Whoever has used all answers
      calls `forget_answers`.
    poll: see `Engine.answers`.
  """
  found = _read_answers(file, len(prompts.tokens))
  distributed.wait(f"answers in {file}")  # All have read before one writes.
  for number, (tokens, stopped) in found.items():
    yield number, np.asarray(tokens), stopped
  missing = [n for n in range(len(prompts.tokens)) if n not in found]
  rest = jax.tree.map(lambda x: x[missing], prompts)
  with contextlib.ExitStack() as stack:
    keep = _ignore
    if jax.process_index() == 0:
      keep = stack.enter_context(_kept(file))
    for number, (tokens, stopped) in found.items():
      keep([number, tokens, stopped])
    for number, tokens, stopped in engine.answers(rest, key, draw, poll):
      number = missing[number]
      keep([number, tokens.tolist(), stopped])
      yield number, tokens, stopped


def _ignore(answer: list[Any]) -> None:
  del answer


@contextlib.contextmanager
def _kept(file: pathlib.Path) -> Iterator[Callable[[list[Any]], None]]:
  """Yields what appends an answer to a file, until the disk fails."""
  with contextlib.ExitStack() as stack:
    failed = False

    def fail(error: OSError) -> None:
      nonlocal failed
      failed = True
      print(
          f"Warning: {file} cannot be written ({error.strerror}); if the"
          " run is stopped before all answers are there, they are sampled"
          " again.",
          file=sys.stderr,
          flush=True,
      )

    def write(answer: list[Any]) -> None:
      if failed:
        return
      line = f"{json.dumps(answer)}\n".encode()
      try:
        if out.write(line) < len(line):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      except OSError as error:
        fail(error)

    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      # Without a buffer, whose rest `close` would try to write.
      out = stack.enter_context(file.open("wb", buffering=0))
    except OSError as error:
      fail(error)
    yield write


def _read_answers(
    file: pathlib.Path, count: int
) -> dict[int, tuple[list[int], bool]]:
  """Reads kept answers up to the first line that is cut short or damaged."""
  found = {}
  try:
    lines = file.read_bytes().splitlines()
  except OSError:  # There is none, or no file.
    return found
  for line in lines:
    try:
      number, tokens, stopped = parse_json(line)
      if not _is_answer(number, tokens, stopped, count):
        break
    except (JsonError, TypeError, ValueError):
      break
    found[number] = tokens, stopped
  return found


def _is_answer(number: Any, tokens: Any, stopped: Any, count: int) -> bool:
  """Whether a line's values can be an answer to one of the prompts."""
  return (
      type(number) is int
      and 0 <= number < count
      and isinstance(tokens, list)
      and all(type(t) is int and 0 <= t < 2**31 for t in tokens)
      and len(tokens) > 0
      and isinstance(stopped, bool)
  )


def forget_answers(file: pathlib.Path) -> None:
  """Deletes the file of `kept_answers` once all answers have been used."""
  distributed.wait(f"the end of {file}")
  if jax.process_index() == 0:
    with contextlib.suppress(OSError):  # It could never be written.
      file.unlink()


# Jitted once for a model, however often it is evaluated.
_decoding = functools.cache(generate.decoding)


class Engine:
  """Decodes with one set of weights, a fixed number of rows at a time."""

  def __init__(
      self,
      model: Model,
      config: generate.SamplerConfig,
      params: Params,
      rows: int,
  ):
    """Lays the weights out for decoding.

    Args:
      model: on the mesh of sampling.
      config: how to sample; one answer a prompt.
      params: the weights, on any mesh of the same devices, or their shapes.
      rows: answers decoded at a time, divisible by the mesh's batch axes.
    """
    self._rows = rows
    self._model, self._config = model, config
    mesh = model.mesh
    self._segment = generate.segment(model)
    shards = sharding.batch_shards(mesh)
    self._refill = max(int(rows * REFILL) // shards, 1) * shards
    self._programs = _decoding(model, config)
    place = jax.tree.leaves(params)[0].sharding
    if isinstance(place, jax.sharding.NamedSharding) and place.mesh != mesh:
      params = self._programs.move(params)
    self._params = params
    self._layout = self._programs.layout(params)

  def answers(
      self,
      prompts: PromptBatch,
      key: jax.Array,
      draw: generate.Draw,
      poll: Callable[[], None] = lambda: None,
  ) -> Iterator[Answer]:
    """Yields number, tokens and whether it stopped, of each answer, as it ends.

    On shapes every answer reaches the cap.

    Args:
      prompts: NumPy prompts [n, S], for any n; every process has all. Or their
        shapes.
      key: see `generate.prefill`.
      draw: cap, temperature, greedy.
      poll: called before each segment; it may raise to stop.
    """
    model, config = self._model, self._config
    waiting = list(range(len(prompts.tokens)))[::-1]
    prompt, programs = prompts.tokens.shape[1], self._programs
    sizes, cap = rooms(model, config, prompt, int(draw.cap)), int(draw.cap)
    table = _Table(self._rows, sizes, self._segment, cap)
    key = sharding.replicate_key(key, model.mesh)
    state = programs.empty(
        model, config, self._rows, self._columns(prompt, table), key
    )
    while waiting or table.busy:
      poll()
      while waiting and table.num_free >= min(self._refill, len(waiting)):
        size = min(self._refill, len(waiting))
        numbers = [waiting.pop() for _ in range(size)]
        slots = table.claim(numbers, self._refill)
        batch = self._take(prompts, numbers)
        new, first = programs.prefill(
            model,
            config,
            generate.columns(model, config, prompt),
            self._params,
            batch,
            key,
            draw,
        )
        state = programs.insert(state, new, slots)
        table.write(slots, *self._look(first, new))
      yield from table.harvest(self._config.stop_ids)
      if not table.busy:
        continue
      state = programs.resize(state, self._columns(prompt, table))
      state, drawn = programs.decode(
          model, config, self._segment, self._layout, state, draw
      )
      table.write(np.arange(self._rows), *self._look(drawn, state))
      yield from table.harvest(self._config.stop_ids)

  def _columns(self, prompt: int, table: "_Table") -> int:
    return generate.columns(
        self._model, self._config, prompt + table.room()
    )

  def _take(self, prompts: PromptBatch, numbers: list[int]) -> PromptBatch:
    """Returns prompts as a batch of the refill's size; some come twice."""
    padded = np.resize(numbers, self._refill)

    def rows(tree: PromptBatch) -> PromptBatch:
      return jax.tree.map(lambda x: x[padded], tree)

    abstract = sharding.is_abstract(prompts)
    batch = jax.eval_shape(rows, prompts) if abstract else rows(prompts)
    return sharding.global_batch(batch, self._model.mesh)

  def _look(
      self, drawn: Rollout, state: generate.DecodeState
  ) -> tuple[np.ndarray, ...]:
    """Brings tokens and mask [B, n], and who is live [B], to the host."""
    shown = (drawn.tokens, drawn.mask, state.live)
    if sharding.is_abstract(shown):
      return tuple(np.ones(x.shape, x.dtype) for x in shown)
    return sharding.to_host(shown)


class _Table:
  """Which row answers which prompt, and what it has written so far."""

  def __init__(
      self, rows: int, sizes: tuple[int, ...], segment: int, cap: int
  ):
    self._sizes, self._segment, self._cap = sizes, segment, cap
    self._owner = np.full(rows, -1)
    self._tokens: list[list[np.ndarray]] = [[] for _ in range(rows)]
    self._count = np.zeros(rows, int)
    self._live = np.zeros(rows, bool)
    self._room = sizes[0]

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
    slots = np.full(size, len(self._owner), np.int32)
    slots[: len(free)] = free
    return slots

  def room(self) -> int:
    """Returns the columns behind the prompts that the next segment needs."""
    longest = int(self._count[self._owner >= 0].max(initial=0))
    needed = min(longest + self._segment, self._sizes[-1])
    fitting = next(size for size in self._sizes if size >= needed)
    # It shrinks late, or it would go to and fro.
    if not fitting <= self._room <= 2 * fitting:
      self._room = fitting
    return self._room

  def write(
      self,
      rows: np.ndarray,
      tokens: np.ndarray,
      mask: np.ndarray,
      live: np.ndarray,
  ) -> None:
    """Takes what rows have drawn: [R, n] and [R]."""
    for i, row in enumerate(rows):
      if row < len(self._owner) and self._owner[row] >= 0:
        self._tokens[row].append(tokens[i][mask[i]])
        self._count[row] += int(mask[i].sum())
        self._live[row] = live[i] and self._count[row] < self._cap

  def harvest(
      self, stop_ids: tuple[int, ...]
  ) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yields number, tokens and whether it stopped of ended answers."""
    for row in np.flatnonzero((self._owner >= 0) & ~self._live):
      tokens = np.concatenate(self._tokens[row])
      yield int(self._owner[row]), tokens, int(tokens[-1]) in stop_ids
      self._owner[row], self._tokens[row] = -1, []
