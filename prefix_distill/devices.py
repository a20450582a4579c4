"""What a device can compute with, by asking it.

A device may also be one of a topology that is only compiled for.
"""

from collections.abc import Callable
import re

import jax

# NVIDIA's Ampere. Turing (T4, 7.5) and Volta (V100, 7.0) lack what is asked
# for here.
_AMPERE = (8, 0)


def _compute_capability(device: jax.Device) -> tuple[int, int] | None:
  """Returns an NVIDIA GPU's; None for other devices, and where none is said.

  AMD's GPUs are of the platform "gpu" as well and say "gfx90a" or the like.
  """
  if device.platform not in ("gpu", "cuda"):
    return None
  said = str(getattr(device, "compute_capability", ""))
  found = re.fullmatch(r"(\d+)\.(\d+)[a-z]?", said)
  return (int(found[1]), int(found[2])) if found else None


def has_bfloat16(device: jax.Device) -> bool:
  """Whether bfloat16 is worth computing in; only a known lack says no.

  XLA computes bfloat16 in float32 where the device cannot, which is right and
  slow, so nothing breaks on a device that does not say what it is. There the
  setting stands, and with it the memory that the user counted on.
  """
  capability = _compute_capability(device)
  return capability is None or capability >= _AMPERE


def has_cudnn_attention(device: jax.Device) -> bool:
  """Whether cuDNN's flash attention runs; only a known capability says yes.

  Elsewhere the program would not compile, and plain XLA always does.
  """
  capability = _compute_capability(device)
  return capability is not None and capability >= _AMPERE


def first_without(
    has: Callable[[jax.Device], bool], mesh: jax.sharding.Mesh
) -> jax.Device | None:
  """Returns the first device of a mesh that lacks something, if one does."""
  return next((d for d in mesh.devices.flat if not has(d)), None)


def describe(device: jax.Device) -> str:
  """Returns "Tesla T4 (compute capability 7.5)"."""
  capability = _compute_capability(device)
  if capability is None:
    return device.device_kind
  major, minor = capability
  return f"{device.device_kind} (compute capability {major}.{minor})"
