"""What a run saves: its state, the data stream's place, and running sums."""

import collections
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
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from prefix_distill import distributed
from prefix_distill import sharding
from prefix_distill.config import CheckpointSpec
from prefix_distill.errors import one_line
from prefix_distill.errors import UserError
from prefix_distill.models.transformer import Params
from prefix_distill.report import report
from prefix_distill.report.flops import Totals
from prefix_distill.train.step import TrainState

# In a workdir, and in a checkpoint.
_DIRECTORY = "checkpoints"
_STATE, _HOST = "state", "host"
# Beside the fields of the state, if the teacher was refreshed.
_TEACHER = "teacher"
# The field of the host's JSON that holds the SHA-256 of the others.
_SEAL = "sha256"
# Constants of the checksum, see `checksums_of`.
_A, _B = 0x9E3779B1, 0x85EBCA6B
_MIX = 0xC2B2AE35
# A path such as "params/layers/mlp/up" -> the checksum.
Checksums = dict[str, list[int]]


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
    teacher: the teacher's weights; None if they were never refreshed.
  """

  step: int
  state: TrainState
  data: str
  totals: Totals
  teacher: Params | None = None


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
  lines = report.read_metrics(workdir / "metrics.jsonl")
  found = report.evaluations(lines, set=name, model="student", mode="sampled")
  accuracy = {line["step"]: line.get("accuracy") for line in found}
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


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of each element as uint32; 64 bits become two words."""
  if x.dtype == bool:
    return x.astype(jnp.uint32)
  kind = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
  return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
  """Returns uint32 of the shape, counted row by row, modulo 2^32."""
  out, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    steps = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    out += steps * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return out


def _checksum(x: jax.Array) -> jax.Array:
  """Returns uint32 [3]: the two sums, and how many elements are not finite.

  See `checksums_of`.
  """
  words = _words(x)
  position = _positions(words.shape)
  factor = position * jnp.uint32(2 * _A % 2**32) + jnp.uint32(1)
  mixed = (words + position * jnp.uint32(_B)) * factor
  mixed ^= mixed >> 16
  mixed *= jnp.uint32(_MIX)
  mixed ^= mixed >> 13
  bad = jnp.zeros(words.shape, jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.inexact):
    bad = jnp.broadcast_to(~jnp.isfinite(x), x.shape).astype(jnp.uint32)
    bad = bad.reshape(bad.shape + (1,) * (words.ndim - bad.ndim))
    bad = jnp.broadcast_to(bad, words.shape)
  # One reduction and not three: it reads the array once, and is compiled in a
  # third of the time.
  zero = jnp.uint32(0)
  sums = jax.lax.reduce(
      (mixed, mixed * factor, bad),
      (zero, zero, zero),
      lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
      tuple(range(words.ndim)),
  )
  return jnp.stack(sums)


@functools.partial(jax.jit, static_argnums=1)
def _checksums(
    arrays: list[jax.Array], place: jax.sharding.NamedSharding | None
) -> jax.Array:
  """Returns uint32 [arrays, 3]."""
  out = jnp.stack([_checksum(x) for x in arrays])
  return out if place is None else jax.lax.with_sharding_constraint(out, place)


def _batches(arrays: list[jax.Array]) -> list[list[int]]:
  """Splits arrays so that few programs serve all of them.

  The optimizer's moments have the parameters' shapes, and so one program takes
  the parameters, the first moments and then the second. Arrays in the host's
  memory come one at a time, since together they may not fit on the device.
  """
  batches, seen = collections.defaultdict(list), collections.Counter()
  for i, x in enumerate(arrays):
    key = (x.shape, str(x.dtype), x.sharding)
    host = sharding.is_on_host(x.sharding)
    batches[i if host else -1 - seen[key]].append((str(key), i))
    seen[key] += 1
  return [[i for _, i in sorted(batch)] for batch in batches.values()]


def _measure(arrays: list[jax.Array]) -> np.ndarray:
  """Returns uint32 [arrays, 3]; every process must call it."""
  meshes = [getattr(x.sharding, "mesh", None) for x in arrays]
  mesh = next((mesh for mesh in meshes if mesh is not None), None)
  place = None if mesh is None else sharding.replicated(mesh)
  out = np.zeros((len(arrays), 3), np.uint32)
  for batch in _batches(arrays):
    there = [arrays[i] for i in batch]
    if sharding.is_on_host(there[0].sharding):
      there = [jax.device_put(there[0], sharding.on_device(there[0].sharding))]
    out[batch] = np.asarray(_checksums(there, place))
  return out


def checksums_of(tree: Any) -> tuple[Checksums, list[str]]:
  """Returns the checksum of each array, and which arrays are not finite.

  It is computed where the arrays lie; every process must call it. A checksum
  depends on the bits and the order of an array's elements, and not on how the
  array is sharded or on how many devices hold it. The element at position i,
  counted row by row, has the word w of up to 32 bits:

    m_i = 2 A i + 1
    h_i = mix((w_i + B i) m_i)
    checksum = (sum_i h_i mod 2^32, sum_i m_i h_i mod 2^32)

  `m_i` is odd and `mix` is a bijection of 32 bits, so a change of any bits of
  one element changes the first sum for certain. Sums without `mix` would miss
  pairs of flipped signs, for 2^31 times an odd number is always 2^31.

  Args:
    tree: arrays, wherever they lie.
  """
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = [sharding.path_name(path) for path, _ in leaves]
  found = _measure([x for _, x in leaves])
  sums = {
      name: [int(first), int(second)]
      for name, (first, second, _) in zip(names, found, strict=True)
  }
  return sums, [n for n, row in zip(names, found, strict=True) if row[2]]


def _fields(state: TrainState) -> dict[str, Any]:
  """Returns the state as a tree of the same names, to which more can come."""
  return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
  """Adds the SHA-256 of JSON values to them."""
  values = json.loads(json.dumps(values))  # As they will be read.
  text = json.dumps(values, sort_keys=True)
  return values | {_SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _reason(error: Exception) -> str:
  """Returns what an error says, without TensorStore's details."""
  text = one_line(error)
  for details in (". See full", " [tensorstore_spec"):
    text = text.partition(details)[0]
  return text


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
  """Drops the words of reads and writes that were cut off by another's failure.

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
  found, not_finite = checksums_of(tree)
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

  def save(
      self,
      state: TrainState,
      data: str,
      totals: Totals,
      teacher: Params | None = None,
  ) -> None:
    """Saves after an update; every process must call it.

    Args:
      state: what the next update starts from.
      data: the position of the data stream, the same in all processes.
      totals: the running sums.
      teacher: its weights, if they are no longer those that were loaded.

    Raises:
      CheckpointError: a value of the state is not finite.
    """
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    saved = state
    if teacher is not None:
      saved = {**_fields(state), _TEACHER: teacher}
    checksums, not_finite = checksums_of(saved)
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
    done = self._manager.save(
        step,
        args=ocp.args.Composite(**{
            _STATE: ocp.args.StandardSave(saved),
            _HOST: ocp.args.JsonSave(_sealed(host)),
        }),
    )
    if not done:
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

  def restore(
      self, abstract: TrainState, teacher: Params | None = None
  ) -> Restored | None:
    """Restores the last checkpoint that is whole, straight into its shards.

    Those after it are moved to `damaged/` in the workdir, with a warning each,
    so that their steps can be saved again. Every process must call it, and all
    restore the same.

    Args:
      abstract: shapes, dtypes and shardings of the state.
      teacher: those of the teacher's weights; None if there is no teacher.

    Returns:
      What it held; None if nothing was ever saved.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged; nothing is
        moved.
    """
    steps = distributed.from_first("checkpoints", listed(self._workdir))
    damage = {}
    for step in steps:
      found = self._try(step, abstract, teacher)
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

  def _try(
      self, step: int, abstract: TrainState, teacher: Params | None
  ) -> Restored | str:
    """Returns what a checkpoint held, or how it is damaged in any process."""
    directory, said = self._directory / str(step), ""
    wanted = _fields(abstract)
    try:
      host = _read_host(directory, step)
      if any(name.startswith(f"{_TEACHER}/") for name in host["checksums"]):
        wanted[_TEACHER] = teacher
      tree = _read_arrays(directory, wanted)
    except _Damage as error:
      said = str(error)
    said = next(filter(None, distributed.from_all("damage", said)), "")
    if said:
      return said
    try:
      _check_arrays(tree, host)
    except _Damage as error:  # The same in all processes.
      return str(error)
    teacher = tree.pop(_TEACHER, None)
    totals = Totals.from_json(host["totals"])
    return Restored(step, TrainState(**tree), host["data"], totals, teacher)

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
