"""What a compiled program sends between devices, from its HLO text.

`read` walks the program from its entry and multiplies loops out. What is
counted is what one device does; all devices of a program do the same. The text
is that of `compiled.as_text()` for a program that is partitioned over a mesh
(GSPMD, Shardy or `shard_map`), from the compilers for CPU, GPU and TPU.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
import tempfile

import numpy as np

from prefix_distill.plan import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Axes of a collective whose groups no set of mesh axes explains.
UNKNOWN = ("?",)
_CALLS = ("async-start", "call", "custom-call", "fusion")
_START = 'custom_call_target="AsyncCollectiveStart"'
_REMATERIALIZATION = "nvoluntary full rematerialization"
_ADVICE = " As the last resort"


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a program, and how often it is executed.

  Attributes:
    kind: one of `KINDS`.
    bytes: of the whole array, in one execution, on one device: the result of
      an all-gather, and what goes into any other kind. Of arrays that are sent
      together, the sum.
    group_size: n, the devices that exchange with each other.
    dtype: as HLO writes it, such as "bf16"; of the first array.
    times: executions, loops multiplied out.
    exact: false if a loop of unknown trip count is around it, which `times`
      takes to run once.
    axes: mesh axes of more than one device that the groups run over, in the
      mesh's order; `UNKNOWN` if none fit.
    op_name: where in the Python program it comes from.
  """

  kind: str
  bytes: int
  group_size: int
  dtype: str
  times: int
  exact: bool
  axes: tuple[str, ...]
  op_name: str

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one execution, around a ring.

    A gather or scatter passes on all but the device's own part, a reduction
    is a scatter and a gather, and an exchange keeps one part of n.
    """
    if self.kind == "collective-permute":
      return float(self.bytes)
    if self.kind == "collective-broadcast":
      return float(self.bytes) if self.group_size > 1 else 0.0
    rest = (self.group_size - 1) / self.group_size * self.bytes
    return 2 * rest if self.kind == "all-reduce" else rest

  @property
  def total(self) -> float:
    """Bytes that a device sends in all executions."""
    return self.sent * self.times

  def __str__(self) -> str:
    often = f"{'' if self.exact else 'at least '}{self.times}x"
    size = f"{self.bytes / 2**20:.4g} MiB of {self.dtype}"
    over = " x ".join(self.axes)
    return f"{often} {self.kind} of {size} over {over} ({self.op_name})"


@dataclasses.dataclass(frozen=True)
class Planned:
  """Collectives that are meant to be there.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes that it may run over; any of them, or all.
    max_bytes: of one execution, as `Collective.bytes`.
    why: for the reader of the plan.
  """

  kind: str
  axes: tuple[str, ...]
  max_bytes: float
  why: str


def audit(
    found: Sequence[Collective],
    planned: Sequence[Planned],
    negligible: float = 0.0,
) -> list[str]:
  """Returns a sentence for each collective that no entry of the plan allows.

  Args:
    found: of a program.
    planned: what may be there.
    negligible: bytes; what a device sends in all executions of a collective,
      and which is no more than this, needs no plan.
  """
  sentences = []
  for one in found:
    if one.total <= negligible:
      continue
    near = [
        p
        for p in planned
        if p.kind == one.kind and set(one.axes) <= set(p.axes)
    ]
    if any(one.bytes <= p.max_bytes for p in near):
      continue
    reason = "which nothing plans"
    if near:
      most = max(near, key=lambda p: p.max_bytes)
      limit = f"{most.max_bytes / 2**20:.4g} MiB"
      reason = f"though at most {limit} are planned there ({most.why})"
    sentences.append(f"{one}, {reason}.")
  return sentences


def read(
    text: str,
    mesh: Mapping[str, int],
    trips: Mapping[str, int] | None = None,
) -> list[Collective]:
  """Lists the collectives of a compiled program, in the order of execution.

  Of a conditional's branches the one that sends most is taken. Transfers to
  and from the host are not listed. What a while loop's condition sends counts
  once more often than its body. Asynchronous forms count once, and TPU's
  fusions of an all-reduce and the device's slice of it as reduce-scatters; a
  matrix product that fetches its operand step by step is a loop of
  collective-permutes, and is listed as that.

  Args:
    text: of `compiled.as_text()`.
    mesh: size of each axis, major to minor, as `jax.sharding.Mesh.shape`;
      devices are numbered in this order.
    trips: trip counts of loops in which the text does not tell: the first
      pattern that `re.search` finds in the loop's op_name counts.

  Raises:
    ValueError: the text is not one of a module with an entry.
  """
  module = hlo.Module(text)
  reader = _Reader(module, mesh, trips or {}, _started(module))
  return list(reader.walk(module.entry, _Place(1, True, ""), {}))


@dataclasses.dataclass(frozen=True)
class _Place:
  """How often a computation is executed, and what calls it."""

  times: int
  exact: bool
  op_name: str


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Walks computations; `env` is the known integers of a computation."""

  module: hlo.Module
  mesh: Mapping[str, int]
  trips: Mapping[str, int]
  started: frozenset[str]

  def walk(
      self, computation: str, place: _Place, env: hlo.Env
  ) -> Iterator[Collective]:
    for op in self.module.computations[computation].values():
      kind = op.opcode.removesuffix("-start")
      here = dataclasses.replace(place, op_name=op.op_name or place.op_name)
      if kind in KINDS:
        if not self._is_later_part(op, computation):
          yield self._collective(op, kind, computation, here)
      elif op.opcode == "while":
        yield from self._loop(op, computation, here, env)
      elif op.opcode == "conditional":
        branches = [list(self.walk(name, here, {})) for name in op.called]
        yield from max(branches, key=lambda b: sum(x.total for x in b))
      elif op.opcode in _CALLS:
        for name in op.called:
          inner = self.module.arguments(op, computation, env)
          yield from self.walk(name, here, inner)

  def _loop(
      self, op: hlo.Op, computation: str, place: _Place, env: hlo.Env
  ) -> Iterator[Collective]:
    count, constants = self.module.trip_count(op, computation, env)
    if count is None:
      given = (n for p, n in self.trips.items() if re.search(p, op.op_name))
      count = next(given, None)
    exact = place.exact and count is not None
    count = 1 if count is None else count
    for part, times in (("condition", count + 1), ("body", count)):
      inner = _Place(place.times * times, exact, place.op_name)
      if times:
        yield from self.walk(op.attribute(part), inner, constants)

  def _is_later_part(self, op: hlo.Op, computation: str) -> bool:
    """Says if a TPU's fusion only goes on with a collective begun elsewhere.

    Such a collective stands in each fusion that it runs beside, always with
    the same channel; the first has a marker of its own.
    """
    return (
        "async_collective_fusion_config" in op.attributes
        and op.attribute("channel_id") in self.started
        and not _has_start(self.module.computations[computation])
    )

  def _collective(
      self, op: hlo.Op, kind: str, computation: str, place: _Place
  ) -> Collective:
    shapes = self.module.operand_shapes(op, computation)
    if kind == "ragged-all-to-all":
      shapes = shapes[:1]  # The others say where its pieces go.
    size = sum(hlo.num_bytes(shape) for shape in shapes)
    devices = math.prod(self.mesh.values())
    if kind == "collective-permute":
      pairs = hlo.groups(op.attribute("source_target_pairs"), devices)
      group, axes = 2, _moved(pairs, self.mesh)
    else:
      groups = hlo.groups(op.attribute("replica_groups"), devices)
      group, axes = max(map(len, groups)), _axes(groups, self.mesh)
    if kind == "all-gather":
      size *= group
    if kind == "all-reduce" and self._is_sliced(computation, size):
      kind = "reduce-scatter"
    return Collective(
        kind, size, group, hlo.dtype(shapes[0]), place.times, place.exact,
        axes, place.op_name,
    )  # fmt: skip

  def _is_sliced(self, computation: str, size: int) -> bool:
    """Says if a fusion keeps but a slice of the sum that it forms."""
    ops = self.module.computations[computation].values()
    return (
        computation in self.module.fused
        and any(op.opcode == "dynamic-slice" for op in ops)
        and hlo.num_bytes(self.module.root(computation).shape) < size
    )


def _has_start(ops: Mapping[str, hlo.Op]) -> bool:
  return any(_START in op.attributes for op in ops.values())


def _started(module: hlo.Module) -> frozenset[str]:
  """Returns the channels of collectives that have a marked start."""
  return frozenset(
      op.attribute("channel_id")
      for ops in module.computations.values()
      if _has_start(ops)
      for op in ops.values()
      if op.opcode in KINDS
  )


def _axes(groups: hlo.Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Finds the axes whose groups these are, in any order of their members."""
  wanted = {frozenset(group) for group in groups}
  ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
  long = [i for i, n in enumerate(mesh.values()) if n > 1]
  for count in range(len(long) + 1):
    for chosen in itertools.combinations(long, count):
      last = range(ids.ndim - count, ids.ndim)
      rows = np.moveaxis(ids, chosen, last).reshape(
          -1, math.prod(ids.shape[i] for i in chosen)
      )
      if {frozenset(row) for row in rows.tolist()} == wanted:
        return tuple(list(mesh)[i] for i in chosen)
  return UNKNOWN


def _moved(pairs: hlo.Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Finds the axes along which a permutation moves."""
  sizes = tuple(mesh.values())
  if max(map(max, pairs)) >= math.prod(sizes):
    return UNKNOWN
  sources, targets = (np.unravel_index(x, sizes) for x in np.array(pairs).T)
  rows = zip(mesh, sources, targets, strict=True)
  return tuple(axis for axis, s, t in rows if np.any(s != t))


@contextlib.contextmanager
def rematerializations(keep: bool = True) -> Iterator[list[str]]:
  """Collects the partitioner's warnings of arrays that it replicates.

  When XLA finds no other way from one sharding to the next, it gathers the
  whole array on every device and says so in its log, on file descriptor 2. In
  the `with` block that goes to a file; at its end the messages, each once, are
  in the list, and everything else is written to the real standard error.

  The descriptor is the process's: what other threads and children print
  meanwhile waits as well, two of these blocks must not overlap in time unless
  one is within the other, and a crash of the process loses the output. A
  program out of the compilation cache was not partitioned and warns of
  nothing, nor does one under TF_CPP_MIN_LOG_LEVEL=3. The compiler for TPUs logs
  to files, unless TPU_STDERR_LOG_LEVEL is 1 or 0 when it is loaded.
  """
  found = []
  sys.stderr.flush()
  real = os.dup(2)
  try:
    with tempfile.TemporaryFile() as file:
      os.dup2(file.fileno(), 2)
      try:
        yield found
      finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        file.seek(0)
        for line in file.read().splitlines(keepends=True):
          message = line.decode(errors="replace").strip()
          if _REMATERIALIZATION not in message:
            if keep:
              os.write(2, line)
            continue
          message = message[message.find("Inv") :].partition(_ADVICE)[0]
          if message not in found:
            found.append(message)
  finally:
    os.close(real)
