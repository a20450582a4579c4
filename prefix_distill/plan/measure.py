"""Compiles the programs, and keeps what was found.

What a compiler says of a program is kept in a file named by a hash of the
program's text, the machine and the versions: a second look costs the tracing.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import time
from typing import Any

import jax

from prefix_distill import sharding
from prefix_distill.plan import build
from prefix_distill.plan import collectives
from prefix_distill.plan import count
from prefix_distill.plan.machines import Machine
from prefix_distill.rollout.generate import DecodeState
from prefix_distill.train.compile import Stage

_GIB = 2**30
# Collectives of less than this in a program are counters and the like.
_NEGLIGIBLE = 2**20
# Where there is a device XLA tunes its products and then fuses fewer of them.
# On an H200 score and gradient took 1.07 and 1.05 of what was compiled without
# one, decoding and prompts 1.00 and 1.01 (docs/results/accelerator.md).
_TUNED, _TUNING = ("score", "gradient"), 1.08
# What the TPU's compiler says: "Used 26.90G of 15.75G hbm", or "... required
# for HLO temporaries (16.17G) exceeds available HBM (15.75G)".
_USED = re.compile(
    r"(?:[Uu]sed |required[^(]*\()([\d.]+)([KMGT])i?B?"
    r"(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Measured:
  """What is known of a program before it ever runs.

  Attributes:
    name: of the stage.
    bucket: P.
    times: how often it runs in an update.
    rows: of one run, over all devices.
    flops: of one run, over all devices, loops multiplied out.
    moved: bytes that a device at least reads and writes in one run.
    memory: bytes on a device, everything that lies beside included; on TPU at
      most, for the compiler shares some; of a refused program what it wants,
      if the compiler says so. 0 if it was not compiled.
    refused: by the TPU's compiler, with its sentence; empty if it fits.
    sent: bytes that a device sends in one run, by kind of collective and axes.
    exact: false if a loop's trip count had to be guessed.
    unplanned: sentences on collectives that nothing plans.
    seconds: that compiling took.
  """

  name: str
  bucket: int
  times: int
  rows: int
  flops: float
  moved: float
  memory: float = 0.0
  refused: str = ""
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  exact: bool = True
  unplanned: list[str] = dataclasses.field(default_factory=list)
  seconds: float = 0.0

  @property
  def compiled(self) -> bool:
    return bool(self.memory or self.refused)

  def verdict(self, machine: Machine) -> bool:
    """Whether it fits: the compiler's word on TPU, a budget on GPU."""
    if machine.chip.platform == "tpu":
      return not self.refused
    return self.memory <= machine.chip.memory


def directory() -> pathlib.Path:
  """Returns where results are kept."""
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "prefix_distill" / "plan"


def reckon(stage: Stage, bucket: int) -> Measured:
  """Says what follows from a program's trace alone."""
  traced = stage.program.trace(*stage.args)
  flops = count.flops(traced.jaxpr, stage.trips).flops
  return Measured(
      stage.name, bucket, stage.times, stage.rows, flops, moved(stage)
  )


def moved(stage: Stage) -> float:
  """Returns the bytes that a device at least reads and writes in one run.

  A step of decoding reads the weights, and of the cache what its kernel does;
  any other program its arguments, and it writes its results.
  """
  arrays = [a for a in stage.args if _has_shapes(a)]
  size = sharding.bytes_per_device
  if stage.segments is None:
    return float(size(arrays) + size(stage.program.shapes(*stage.args)))
  cache = sum(
      size(a.cache.layers) for a in arrays if isinstance(a, DecodeState)
  )
  rest = size(arrays) - cache
  for tree in arrays:  # Of a table of its own a few lines are looked up.
    if isinstance(tree, dict) and "head" in tree:
      rest -= size(tree["embed"])
  return stage.segments.length * (rest + stage.segments.share * cache)


def _has_shapes(argument: Any) -> bool:
  leaves = jax.tree.leaves(argument)
  return bool(leaves) and all(
      isinstance(x, jax.ShapeDtypeStruct) for x in leaves
  )


def compile_stage(
    plan: build.Plan,
    stage: Stage,
    bucket: int,
    machine: Machine,
    planned: Sequence[collectives.Planned],
) -> Measured:
  """Compiles a program, or recalls what was found when it was.

  The memory of those that a GPU's compiler would tune is taken a little larger
  than it says.
  """
  known = reckon(stage, bucket)
  beside = plan.beside(stage.name, stage.times > 1)
  lowered = stage.program.beside(*stage.args, tree=beside).lower()
  mesh = dict(plan.mesh(stage.name).shape)
  file = directory() / f"{_key(lowered, machine, mesh, stage.trips)}.json"
  if file.is_file():
    found = json.loads(file.read_text())
  else:
    found = _compile(lowered, mesh, stage, planned)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.rename(file)
  if machine.chip.platform == "gpu" and stage.name in _TUNED:
    found["memory"] *= _TUNING
  return dataclasses.replace(known, **found)


def _key(lowered: Any, machine: Machine, mesh: dict, trips: int) -> str:
  versions = [jax.__version__, jax.lib.__version__]
  try:
    import libtpu  # noqa: PLC0415

    versions.append(libtpu.__version__)
  except ImportError:
    pass
  text = f"{lowered.as_text()}{machine}{mesh}{trips}{versions}"
  text += pathlib.Path(collectives.__file__).read_text()
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _compile(
    lowered: Any,
    mesh: dict[str, int],
    stage: Stage,
    planned: Sequence[collectives.Planned],
) -> dict[str, Any]:
  start = time.monotonic()
  try:
    with collectives.rematerializations(keep=False) as warnings:
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _refusal(str(error)) | {"seconds": time.monotonic() - start}
  sizes = compiled.memory_analysis()
  memory = getattr(sizes, "total_allocation_bytes", 0) or (
      sizes.argument_size_in_bytes + sizes.output_size_in_bytes
      - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
  )  # fmt: skip
  trips = {"": stage.trips}
  found = collectives.read(compiled.as_text(), mesh, trips)
  sent = {}
  for one in found:
    name = f"{one.kind} over {' x '.join(one.axes)}"
    sent[name] = sent.get(name, 0.0) + one.total
  return {
      "memory": float(memory),
      "sent": {name: total for name, total in sent.items() if total},
      "exact": all(one.exact for one in found),
      "unplanned": [
          *collectives.audit(found, planned, _NEGLIGIBLE), *warnings
      ],
      "seconds": time.monotonic() - start,
  }  # fmt: skip


def _refusal(text: str) -> dict[str, Any]:
  """Returns the numbers of a TPU compiler's refusal, and a sentence's part."""
  found = _USED.search(text)
  if not found:
    return {"refused": " ".join(text.split())[:300]}
  used, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
  sentence = f"needs {used / _GIB:.1f} of {limit / _GIB:.2f} GiB"
  return {"refused": sentence, "memory": used}
