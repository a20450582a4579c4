"""Checkpoints through Orbax: the state, the data stream's place, the sums."""

import pathlib

import orbax.checkpoint as ocp

from prefix_distill import distributed
from prefix_distill.config import CheckpointSpec
from prefix_distill.errors import UserError
from prefix_distill.train.ledger import Totals
from prefix_distill.train.step import TrainState


class CheckpointError(UserError):
  """A checkpoint that cannot be restored."""


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
    """Returns the last saved step, the one that process 0 sees."""
    return distributed.from_first("step", self._manager.latest_step())

  def save(self, state: TrainState, data: str, totals: Totals) -> None:
    """Saves after an update; every process must call it.

    Args:
      state: what the next update starts from.
      data: the position of the data stream, the same in all processes.
      totals: the running sums.
    """
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            host=ocp.args.JsonSave(
                {"data": data, "totals": totals.to_json()}
            ),
        ),
    )

  def restore(self, abstract: TrainState) -> tuple[TrainState, str, Totals]:
    """Restores the latest checkpoint straight into its shards.

    Args:
      abstract: shapes, dtypes and shardings of the state.

    Raises:
      CheckpointError: it is damaged.
    """
    step = self.latest_step()
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
          f" be restored ({distributed.first_line(error)}); delete that step's"
          " directory to go back to the one before."
      ) from error
    totals = Totals.from_json(restored.host["totals"])
    return restored.state, restored.host["data"], totals

  def close(self) -> None:
    self._manager.close()
