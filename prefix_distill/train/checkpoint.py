"""What a run saves: its state, the data stream's place, and running sums."""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from prefix_distill import distributed
from prefix_distill.config import CheckpointSpec
from prefix_distill.errors import UserError
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.transformer import Params
from prefix_distill.report import flops
from prefix_distill.report import report
from prefix_distill.report.flops import Lengths
from prefix_distill.report.flops import StepFlops
from prefix_distill.train import checksum
from prefix_distill.train.step import TrainState

# In a workdir, and in a checkpoint.
_DIRECTORY = "checkpoints"
_STATE, _HOST = "state", "host"
# The field of the host's JSON that holds the SHA-256 of the others.
_SEAL = "sha256"


@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the updates so far, and the schedule's state.

  Attributes:
    schedule: the state of the prefix schedule, JSON.
    seconds: time of the updates.
    tokens: sampled tokens.
    flops: all FLOPs, those before the first update included.
    phases: the same by phase.
    flops_paper: FLOPs by the paper's formula, of the updates alone.
    flops_full: an estimate of what the same updates would have cost with whole
      answers.
    skipped: updates that were skipped because numbers were not finite.
    skipped_running: how many of the last updates were skipped.
  """

  schedule: dict[str, Any]
  seconds: float = 0.0
  tokens: int = 0
  flops: float = 0.0
  phases: StepFlops = StepFlops()
  flops_paper: float = 0.0
  flops_full: float = 0.0
  skipped: int = 0
  skipped_running: int = 0

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "Totals":
    return cls(**values | {"phases": StepFlops(**values["phases"])})

  def line(self) -> dict[str, Any]:
    """Returns the sums as a metrics line has them."""
    line = {
        "tokens": self.tokens,
        "flops": self.flops,
        "flops_paper": self.flops_paper,
    }
    for phase, value in dataclasses.asdict(self.phases).items():
      line[f"flops_{phase}"] = value
    if self.flops_full:
      line["flops_full_estimate"] = self.flops_full
    return line


@dataclasses.dataclass(frozen=True)
class Prices:
  """What an update of certain models costs.

  Attributes:
    student: the student's architecture.
    teacher: the teacher's; None for supervised training.
    remat: what the student computes again, see `ModelSpec`.
    compares: whether full distillation's cost is estimated too.
  """

  student: ModelConfig
  teacher: ModelConfig | None
  remat: str = "none"
  compares: bool = False

  def charge(
      self,
      totals: Totals,
      lengths: Lengths,
      source: str = "student",
      whole: float = 0.0,
  ) -> Totals:
    """Adds an update to the sums.

    Args:
      totals: before the update.
      lengths: of the update's sequences.
      source: who sampled the answers, as `flops.distillation` takes it.
      whole: mean length of whole answers, for the estimate of full
        distillation's cost.
    """
    cost, before = self._cost(lengths, source), totals.phases
    phases = StepFlops(**{
        phase: getattr(before, phase) + getattr(cost, phase)
        for phase in flops.PHASES
    })
    full = 0.0
    if self.compares:
      answers = np.full(len(lengths.sampled), whole)
      answers = dataclasses.replace(lengths, sampled=answers, trained=None)
      full = self._cost(answers, "student").total
    return dataclasses.replace(
        totals,
        tokens=totals.tokens + int(lengths.sampled.sum()),
        flops=totals.flops + cost.total,
        phases=phases,
        flops_paper=totals.flops_paper + self._paper(lengths, source),
        flops_full=totals.flops_full + full,
    )

  def _cost(self, lengths: Lengths, source: str) -> StepFlops:
    if self.teacher is None:
      return flops.supervised(self.student, lengths, self.remat)
    return flops.distillation(
        self.student, self.teacher, lengths, source, self.remat
    )

  def _paper(self, lengths: Lengths, source: str) -> float:
    if self.teacher is None:
      return flops.paper_supervised(self.student, lengths)
    return flops.paper_distillation(
        self.student, self.teacher, lengths, source
    )


class CheckpointError(UserError):
  """A state that is not saved, or that cannot be restored."""


class _Damage(Exception):
  """What is wrong with a checkpoint, as it goes on after "is damaged: "."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held.

  Attributes:
    step: updates done.
    state: what the next update starts from.
    data: the position of the data stream.
    totals: the running sums.
  """

  step: int
  state: TrainState
  data: str
  totals: Totals


def listed(workdir: pathlib.Path) -> list[int]:
  """Returns the steps under which something is saved, the last one first.

  Raises:
    CheckpointError: the directory cannot be read.
  """
  directory = workdir / _DIRECTORY
  if not os.path.lexists(directory):
    return []
  try:
    names = os.listdir(directory)
  except OSError as error:
    raise CheckpointError(
        f"{directory} cannot be read ({error.strerror}); put the directory of"
        " the run's checkpoints back, or delete the workdir to start over."
    ) from error
  steps = {int(n) for n in names if n.isascii() and n.isdecimal()}
  return sorted((n for n in steps if str(n) in names), reverse=True)


def best(workdir: pathlib.Path, name: str, steps: Iterable[int]) -> int | None:
  """Returns which of the steps has the highest sampled accuracy on a set.

  Args:
    workdir: with the metrics of the run.
    name: of the evaluation set.
    steps: those to choose from; the first of equals is chosen, and one that
      was not evaluated never.
  """
  accuracy = {}
  for line in report.read_metrics(workdir / "metrics.jsonl"):
    found = [line.get(key) for key in ("set", "model", "mode")]
    if found == [name, "student", "sampled"]:
      accuracy[line["step"]] = line.get("accuracy")
  judged = [s for s in sorted(steps) if accuracy.get(s) is not None]
  return max(judged, key=accuracy.__getitem__, default=None)


def free(path: pathlib.Path) -> pathlib.Path:
  """Returns the path, with "-2" or so at its end if something is there."""
  names = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
  paths = itertools.chain([path], names)
  return next(p for p in paths if not os.path.lexists(p))


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints are kept; one of Orbax's preservation policies.

  It is asked after each save. A checkpoint is saved before it is evaluated, and
  evaluated before the next one is saved; so the last one alone can be without
  its verdict, and the last ones are kept anyway.

  Attributes:
    spec: the settings.
    workdir: with the metrics of the run.
  """

  spec: CheckpointSpec
  workdir: pathlib.Path

  def should_preserve(
      self, checkpoints: Sequence[Any], *, context: Any = None
  ) -> list[bool]:
    """Returns whether to keep each; they come with increasing steps."""
    del context
    spec, steps = self.spec, [c.step for c in checkpoints]
    kept = set(steps[-spec.keep :])
    if spec.keep_every:
      kept |= {s for s in steps if s and s % spec.keep_every == 0}
    if spec.best:
      found = best(self.workdir, spec.best, steps)
      kept.add(distributed.from_first("best", found))
    return [step in kept for step in steps]


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
  """Adds the SHA-256 of JSON values to them."""
  values = json.loads(json.dumps(values))  # As they will be read.
  text = json.dumps(values, sort_keys=True)
  return values | {_SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _reason(error: Exception) -> str:
  """Returns what an error says, without TensorStore's details."""
  text = distributed.first_line(error)
  for details in (". See full", " [tensorstore_spec"):
    text = text.partition(details)[0]
  return text if len(text) <= 200 else f"{text[:200]}..."


def _read_host(directory: pathlib.Path, step: int) -> dict[str, Any]:
  """Reads the host's part of a checkpoint, and checks its SHA-256."""
  if not directory.is_dir():
    raise _Damage("it is no directory")
  if not ocp.utils.is_checkpoint_finalized(directory):
    raise _Damage("its save never ended")
  try:
    host = ocp.JsonCheckpointHandler().restore(directory / _HOST)
  except Exception as error:  # Orbax and what it calls raise many kinds.
    reason = _reason(error)
    raise _Damage(f"its host state cannot be read ({reason})") from error
  if not isinstance(host, dict) or _SEAL not in host:
    raise _Damage("its host state has no checksum")
  values = {name: value for name, value in host.items() if name != _SEAL}
  if _sealed(values) != host:
    raise _Damage("its host state is not what was saved")
  if values["step"] != step:
    raise _Damage(f"it holds the state of step {values['step']}")
  return values


@functools.cache
def _silence_orbax() -> None:
  """Drops what reads and writes say that were cut off as another one failed.

  Orbax raises the first failure, and closes the loop in which the others go on;
  each of those then has a traceback printed by Python, asyncio or TensorStore,
  and each of Orbax's threads logs its own.
  """
  logging.getLogger("asyncio").addFilter(
      lambda record: "never retrieved" not in record.getMessage()
  )
  logging.getLogger("absl").addFilter(
      lambda record: "_SignalingThread.run() raised" not in record.getMessage()
  )
  shown, printed = sys.unraisablehook, sys.excepthook

  def is_late(error: BaseException | None) -> bool:
    return "Event loop is closed" in str(error)

  def unraisable_hook(unraisable: Any) -> None:
    reader = "_device_put" in getattr(unraisable.object, "__qualname__", "")
    if not reader and not is_late(unraisable.exc_value):
      shown(unraisable)

  def except_hook(kind: type, error: BaseException, trace: Any) -> None:
    if not is_late(error):
      printed(kind, error, trace)

  sys.unraisablehook, sys.excepthook = unraisable_hook, except_hook


def _read_arrays(directory: pathlib.Path, abstract: Any) -> Any:
  """Reads the arrays of a tree, or of a part of one, into their shards."""
  # The handler and no `Checkpointer`, which would wait for the processes in
  # which reading failed.
  handler = ocp.PyTreeCheckpointHandler()
  try:
    return handler.restore(
        directory / _STATE,
        args=ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        ),
    )
  except Exception as error:  # Orbax and what it calls raise many kinds.
    _silence_orbax()
    reason = _reason(error)
    raise _Damage(f"its arrays cannot be read ({reason})") from error
  finally:
    handler.close()


def _check_arrays(tree: Any, host: dict[str, Any]) -> None:
  """Compares arrays with their checksums; every process must call it."""
  found, not_finite = checksum.measure(tree)
  for name, sums in found.items():
    if host["checksums"].get(name) != sums:
      raise _Damage(f"the array {name} is not what was saved")
  if not_finite:
    raise _Damage(f"the array {not_finite[0]} has values that are not finite")


def read_params(workdir: pathlib.Path, step: int, abstract: Params) -> Params:
  """Reads the student's weights of a checkpoint, and nothing else of it.

  Args:
    workdir: of the run.
    step: of the checkpoint.
    abstract: shapes, dtypes and shardings of the weights.

  Raises:
    CheckpointError: the checkpoint is damaged.
  """
  directory = workdir.absolute() / _DIRECTORY / str(step)
  try:
    host = _read_host(directory, step)
    tree = _read_arrays(directory, {"params": abstract})
    _check_arrays(tree, host)
  except _Damage as error:
    raise CheckpointError(
        f"The checkpoint of step {step} in {workdir} is damaged: {error};"
        " choose another --step."
    ) from error
  return tree["params"]


class Checkpointer:
  """Saves and restores; a checkpoint appears whole or not at all.

  A checkpoint is a directory with the arrays, and with JSON of the host's: the
  place of the data stream, the running sums, a checksum of each array and a
  SHA-256 of that JSON itself.
  """

  def __init__(self, workdir: pathlib.Path, spec: CheckpointSpec):
    self._workdir, self._spec = workdir.absolute(), spec
    self._directory = self._workdir / _DIRECTORY

  @functools.cached_property
  def _manager(self) -> ocp.CheckpointManager:
    """Opened once nothing damaged lies there any more."""
    return ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=Retention(self._spec, self._workdir),
            enable_async_checkpointing=False,
            # What a kill left of a save.
            cleanup_tmp_directories=True,
        ),
    )

  def save(self, state: TrainState, data: str, totals: Totals) -> None:
    """Saves after an update; every process must call it.

    Args:
      state: what the next update starts from.
      data: the position of the data stream, the same in all processes.
      totals: the running sums.

    Raises:
      CheckpointError: a value of the state is not finite.
    """
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    checksums, not_finite = checksum.measure(state)
    if not_finite:
      raise CheckpointError(
          f"After update {step} the array {not_finite[0]} has values that are"
          f" not finite, so nothing is saved, and {self._last_good()}; lower"
          " optimizer.learning_rate or look at the last lines of"
          f" {self._workdir / 'metrics.jsonl'}."
      )
    host = {
        "step": step,
        "data": data,
        "totals": totals.to_json(),
        "checksums": checksums,
    }
    _silence_orbax()
    saved = self._manager.save(
        step,
        args=ocp.args.Composite(**{
            _STATE: ocp.args.StandardSave(state),
            _HOST: ocp.args.JsonSave(_sealed(host)),
        }),
    )
    if not saved:
      raise CheckpointError(
          f"The state after update {step} is not saved, for {self._directory}"
          f" has a checkpoint of step {self._manager.latest_step()}; choose"
          " another --workdir."
      )

  def reopen(self) -> None:
    """Forgets a save that failed, and what it left."""
    self.close()
    vars(self).pop("_manager", None)

  def _last_good(self) -> str:
    step = self._manager.latest_step()
    if step is None:
      return "there is no checkpoint"
    return f"the last checkpoint is that of step {step}"

  def restore(self, abstract: TrainState) -> Restored | None:
    """Restores the last checkpoint that is whole, straight into its shards.

    Those after it are moved to `damaged/` in the workdir, with a warning each,
    so that their steps can be saved again. Every process must call it, and all
    restore the same.

    Args:
      abstract: shapes, dtypes and shardings of the state.

    Returns:
      What it held; None if nothing was ever saved.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged; nothing is
        moved.
    """
    steps = distributed.from_first("checkpoints", listed(self._workdir))
    damage = {}
    for step in steps:
      found = self._try(step, abstract)
      if isinstance(found, Restored):
        self._set_aside(damage, step)
        return found
      damage[step] = found
    if damage:
      raise CheckpointError(
          f"No checkpoint in {self._directory} is whole:"
          f" {'; '.join(f'step {k}: {v}' for k, v in damage.items())}. Put a"
          " copy back, or delete the workdir to start over."
      )
    return None

  def _try(self, step: int, abstract: TrainState) -> Restored | str:
    """Returns what a checkpoint held, or how it is damaged in any process."""
    directory, said = self._directory / str(step), ""
    try:
      host = _read_host(directory, step)
      state = _read_arrays(directory, abstract)
    except _Damage as error:
      said = str(error)
    said = next(filter(None, distributed.from_all("damage", said)), "")
    if said:
      return said
    try:
      _check_arrays(state, host)
    except _Damage as error:  # The same in all processes.
      return str(error)
    return Restored(
        step, state, host["data"], Totals.from_json(host["totals"])
    )

  def _set_aside(self, damage: dict[int, str], good: int) -> None:
    """Moves damaged checkpoints away, with a warning each."""
    failed = ""
    if jax.process_index() == 0:
      for step, reason in damage.items():
        try:
          place = self._move(step)
        except OSError as error:
          failed = (
              f"The checkpoint of step {step} in {self._directory} is damaged"
              f" ({reason}) and cannot be moved away ({error.strerror}); make"
              " the workdir writable, or delete that checkpoint."
          )
          break
        print(
            f"warning: The checkpoint of step {step} is damaged: {reason}. It"
            f" is now {place}, and the run goes on from step {good}.",
            file=sys.stderr,
            flush=True,
        )
    failed = distributed.from_first("moved", failed)
    if failed:
      raise CheckpointError(failed)

  def _move(self, step: int) -> pathlib.Path:
    """Returns where a damaged checkpoint lies now."""
    place = self._workdir / "damaged" / str(step)
    place.parent.mkdir(exist_ok=True)
    place = free(place)
    (self._directory / str(step)).rename(place)
    return place

  def close(self) -> None:
    self._manager.close()
