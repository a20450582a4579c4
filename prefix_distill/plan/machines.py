"""Machines to plan for: what a device has, and how to get its compiler.

Numbers are of the makers' data sheets.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import re

from prefix_distill.errors import shown
from prefix_distill.errors import UserError

# The variables of a host of the machine; libtpu reads them when it is loaded.
# With these two compilers may run side by side, and none looks for metadata.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # A program for devices that are not there cannot be kept.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# JAX says one of these when a compiler is not installed.
_MISSING = re.compile(
    "not installed|not found|plugin|unknown backend|not implemented for cuda"
)
# More devices than any pod has.
_MOST = 2**16
_TARGETS = pathlib.Path(__file__).parent / "targets"


class MachineError(UserError):
  """A machine that is not known, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device's data sheet.

  Attributes:
    platform: "tpu" or "gpu".
    flops: dense bfloat16 FLOPs a second.
    memory: bytes that programs may use. On a TPU what the compiler allows; on a
      GPU nine tenths, for XLA's allocator and the libraries need some.
    bandwidth: bytes a second of the memory.
    link: bytes a second that a device sends, one way, over all links.
    accelerator: a TPU's accelerator type, without the size.
    host: devices of a host.
  """

  platform: str
  flops: float
  memory: float
  bandwidth: float
  link: float
  accelerator: str = ""
  host: int = 4


_GIB = 2**30
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip("tpu", 197e12, 15.75 * _GIB, 819e9, 180e9, "v5litepod"),
    "v5p": Chip("tpu", 459e12, 95.73 * _GIB, 2765e9, 540e9, "v5p"),
    "v6e": Chip("tpu", 918e12, 31.24 * _GIB, 1640e9, 360e9, "v6e"),
    "a100": Chip("gpu", 312e12, 0.9 * 79.15 * _GIB, 2039e9, 300e9, "", 8),
    "h100": Chip("gpu", 989e12, 0.9 * 79.1 * _GIB, 3352e9, 450e9, "", 8),
    "h200": Chip("gpu", 989e12, 0.9 * 139.8 * _GIB, 4800e9, 450e9, "", 8),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """A number of devices of one kind.

  Attributes:
    name: as it was asked for.
    chip: data sheet of each device.
    shape: devices along each dimension of a TPU's slice; the number of GPUs.
    slices: number of a TPU's slices.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.slices


def known() -> str:
  """Returns a sentence's part that names the machines."""
  tpus = [k for k, chip in CHIPS.items() if chip.platform == "tpu"]
  gpus = [k for k, chip in CHIPS.items() if chip.platform == "gpu"]
  return (
      f"TPUs {', '.join(tpus)} with the shape of a slice, as v5e:4x4 or"
      " v5p:2x2x2 (two such slices: v5e:4x4*2), and GPUs"
      f" {', '.join(gpus)} with their number, as h100:8"
  )


def parse(name: str) -> Machine:
  """Reads "v5e:4x4", "v5e:4x4*2" (two slices) or "h100:8".

  Raises:
    MachineError: the name is of another form, or of no such machine.
  """
  number = "[0-9]{1,6}"
  found = re.fullmatch(
      rf"(\w+):({number}(?:x{number})*)(?:\*({number}))?", name
  )
  kind = found and CHIPS.get(found[1])
  if not kind:
    raise MachineError(
        f"--topology={shown(name)[1:-1]} is not known; there are {known()}."
    )
  shape = tuple(map(int, found[2].split("x")))
  slices = int(found[3] or 1)
  size = math.prod(shape) * slices
  if not 1 <= size <= _MOST:
    raise MachineError(
        f"--topology={shown(name)[1:-1]} has {size} devices; use 1 or more, up"
        f" to {_MOST}."
    )
  if kind.platform == "gpu":
    if len(shape) > 1 or slices > 1:
      raise MachineError(
          f"--topology={name}: GPUs have a number and no shape; use"
          f" {found[1]}:{math.prod(shape) * slices}."
      )
    if shape[0] > kind.host and shape[0] % kind.host:
      raise MachineError(
          f"--topology={name}: {shape[0]} GPUs do not fill hosts of"
          f" {kind.host}; use a multiple of {kind.host}."
      )
  wanted = 3 if found[1] == "v5p" else 2
  if kind.platform == "tpu" and len(shape) != wanted:
    raise MachineError(
        f"--topology={name}: slices of {found[1]} have {wanted} dimensions;"
        f" use {found[1]}:{'x'.join(['2'] * wanted)} or the like."
    )
  return Machine(name, kind, shape, slices)


def devices(machine: Machine) -> list:
  """Returns devices to compile for, none of which is there.

  Raises:
    MachineError: the compiler is not installed, or knows no such slice.
  """
  # Imported late: the environment must be set before JAX is.
  from jax.experimental import topologies  # noqa: PLC0415

  kind, platform = machine.name.partition(":")[0], machine.chip.platform
  try:
    if platform == "tpu":
      size = math.prod(machine.shape)
      # The compiler wants some accelerator type; the shape counts.
      os.environ.setdefault(
          "TPU_ACCELERATOR_TYPE", f"{machine.chip.accelerator}-{size}"
      )
      options = {"num_slices": machine.slices} if machine.slices > 1 else {}
      name = f"{kind}:{'x'.join(map(str, machine.shape))}"
      return topologies.get_topology_desc(name, "tpu", **options).devices
    hosts = max(machine.size // machine.chip.host, 1)
    return topologies.get_topology_desc(
        "compile_only",
        "cuda",
        topology=f"1x{hosts}x{machine.size // hosts}",
        target_config=(_TARGETS / f"{kind}.txtpb").read_text(),
    ).devices
  except Exception as error:  # libtpu and the plugins raise many kinds.
    reason = " ".join(str(error).split())[:300]
    if _MISSING.search(reason.lower()):
      compiler, install = "cuda", "'jax[cuda13]' (or [cuda12])"
      if platform == "tpu":
        compiler, install = "tpu", "'jax[tpu]'"
      raise MachineError(
          f"--topology={machine.name} needs the compiler for {compiler}, which"
          f" is not installed here; run: pip install {install}."
          f" ({reason})"
      ) from error
    raise MachineError(
        f"--topology={machine.name} is refused by the compiler ({reason});"
        f" there are {known()}."
    ) from error
