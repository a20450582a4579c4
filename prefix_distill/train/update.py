"""One update: sample, score, differentiate, step; in parts if need be."""

from collections.abc import Iterator
import contextlib
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from prefix_distill.models.transformer import Params
from prefix_distill.rollout import continuous_batching
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import microbatch
from prefix_distill.train.programs import Programs
from prefix_distill.train.step import TrainState


class Clock:
  """Seconds of the phases of one update."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds the time that passes inside to a phase's."""
    start, name = time.perf_counter(), f"seconds_{name}"
    yield
    passed = time.perf_counter() - start
    self.seconds[name] = self.seconds.get(name, 0.0) + passed


@dataclasses.dataclass(frozen=True)
class Request:
  """What an update is to do.

  Attributes:
    cap: in tokens.
    key: of the update's draws.
    source: whose answers it learns from: "student", "teacher" or "data"; None
      for supervised training, which learns from the given ones, whole.
    threshold: below which rollouts agree; None if they are not cut.
  """

  cap: int
  key: jax.Array
  source: str | None = "student"
  threshold: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What an update showed: whole arrays, in every process.

  Attributes:
    metrics: means over all rollouts.
    tokens: int32 [rollouts, P], as they were sampled or given.
    mask: bool [rollouts, P].
    trained: bool [rollouts, P], what was left of the mask after cutting.
    minima: [rollouts], see `prefix_schedule.cut`; None if nothing is cut.
  """

  metrics: dict[str, Any]
  tokens: np.ndarray
  mask: np.ndarray
  trained: np.ndarray
  minima: np.ndarray | None


def run(
    programs: Programs,
    state: TrainState,
    teacher_params: Params | None,
    prompts: PromptBatch,
    given: Rollout | None,
    request: Request,
    clock: Clock,
) -> tuple[TrainState, Outcome]:
  """Does one update.

  Args:
    programs: of the run.
    state: donated.
    teacher_params: where they rest; None for supervised training.
    prompts: [B, S].
    given: answers [B, C], if the source or supervised training wants them.
    request: see there.
    clock: gets the seconds of the phases sample, score and update.
  """
  groups = _answers(
      programs, state.params, teacher_params, prompts, given, request, clock
  )
  teacher = teacher_params and programs.on_device(teacher_params)
  split = [programs.rows.parts(*group) for group in groups]
  parts = [part for group in split for part in group]
  total, shown = None, []
  for batch, rollout in parts:
    scores, minima, trained = None, None, rollout
    if request.source is not None:
      with clock.phase("score"):
        scores = programs.score(teacher, batch, rollout)
        jax.block_until_ready(scores)
    if request.threshold is not None:
      trained, minima = programs.rows.agree(rollout, scores, request.threshold)
    with clock.phase("update"):
      args = (state.params, teacher, batch, trained, scores)
      if total is None and len(parts) > 1:
        total = programs.zeros(*args)
      shown.append((rollout.tokens, rollout.mask, trained.mask, minima))
      total = programs.gradient(*args, total)
  with clock.phase("update"):
    arrays = _gather(programs, shown, len(groups))
    state, metrics = programs.apply(state, total)
    metrics = jax.device_get(metrics)
  return state, Outcome(metrics, *arrays)


def _answers(
    programs: Programs,
    params: Params,
    teacher_params: Params | None,
    prompts: PromptBatch,
    given: Rollout | None,
    request: Request,
    clock: Clock,
) -> list[tuple[PromptBatch, Rollout]]:
  """Samples prefixes, or takes given ones, group by group."""
  source, cap = request.source, request.cap
  if source is None:
    return [(prompts, given)]
  with clock.phase("sample"):
    if source == "data":
      return [(prompts, programs.rows.shorten(given, cap))]
    if source == "teacher":
      params = programs.on_device(teacher_params)
    batches = programs.rows.groups(prompts, cap)
    rollouts = []
    for batch in batches:
      read = batch.for_teacher() if source == "teacher" else batch
      rollouts.append(programs.sample(params, read, request.key, cap, source))
    rollouts = jax.block_until_ready(programs.rows.lengthen(rollouts))
    batches = [programs.rows.repeat(batch) for batch in batches]
  return list(zip(batches, rollouts, strict=True))


def _gather(
    programs: Programs, shown: list[tuple], groups: int
) -> list[np.ndarray | None]:
  """Brings what the parts showed to the host, in the prompts' order."""
  found = continuous_batching.to_host(shown, programs.rows.mesh)
  size = len(found) // groups

  def whole(kind: int) -> np.ndarray | None:
    if found[0][kind] is None:
      return None
    arrays = [part[kind] for part in found]
    joined = [
        microbatch.join(arrays[first : first + size])
        for first in range(0, len(arrays), size)
    ]
    return microbatch.join(joined, programs.rows.per_prompt)

  return [whole(kind) for kind in range(len(found[0]))]
