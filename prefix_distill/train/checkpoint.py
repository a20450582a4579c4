"""Checkpoints through Orbax: the state, and where the data stream is."""

import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from prefix_distill.errors import UserError
from prefix_distill.specs import CheckpointSpec
from prefix_distill.train.step import TrainState

# Each process's data position is gathered in a row of this many bytes.
_ROW = 4096


class CheckpointError(UserError):
  """A checkpoint that cannot be restored."""


def _gather(text: str) -> list[str]:
  """Returns every process's text, in order."""
  if jax.process_count() == 1:
    return [text]
  data = text.encode()
  if len(data) > _ROW:
    raise CheckpointError(
        f"The data position takes {len(data)} bytes, more than {_ROW}."
    )
  row = np.frombuffer(data.ljust(_ROW), np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [bytes(r).decode().rstrip() for r in rows]


class Checkpointer:
  """Saves and restores; a checkpoint appears whole or not at all."""

  def __init__(self, directory: pathlib.Path, spec: CheckpointSpec):
    self._manager = ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=spec.keep, enable_async_checkpointing=False
        ),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState, data: str, totals: dict[str, Any]) -> None:
    """Saves after an update; every process must call it.

    Args:
      state: what the next update starts from.
      data: the position of this process's data stream.
      totals: running sums of the metrics, JSON.
    """
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            host=ocp.args.JsonSave({"data": _gather(data), "totals": totals}),
        ),
    )

  def restore(self, abstract: TrainState) -> tuple[TrainState, str, dict]:
    """Restores the latest checkpoint straight into its shards.

    Args:
      abstract: shapes, dtypes and shardings of the state.

    Raises:
      CheckpointError: it is damaged, or was written by another number of
        processes.
    """
    step = self._manager.latest_step()
    try:
      restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
              state=ocp.args.StandardRestore(abstract),
              host=ocp.args.JsonRestore(),
          ),
      )
    except Exception as error:
      raise CheckpointError(
          f"The checkpoint of step {step} in {self._manager.directory} cannot"
          f" be restored ({str(error).splitlines()[0]}); delete that step's"
          " directory to go back to the one before."
      ) from error
    data = restored.host["data"]
    if len(data) != jax.process_count():
      raise CheckpointError(
          f"The checkpoint of step {step} was written by {len(data)} processes"
          f" and this run has {jax.process_count()}; start as many as before."
      )
    return (
        restored.state,
        data[jax.process_index()],
        restored.host["totals"],
    )

  def close(self) -> None:
    self._manager.close()
