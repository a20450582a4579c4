"""Checksums of arrays, computed where the arrays lie.

A checksum depends on the bits and the order of an array's elements, and not on
how the array is sharded or on how many devices hold it. The element at position
i, counted row by row, has the word w of up to 32 bits:

  m_i = 2 A i + 1
  h_i = mix((w_i + B i) m_i)
  checksum = (sum_i h_i mod 2^32, sum_i m_i h_i mod 2^32)

`m_i` is odd and `mix` is a bijection of 32 bits, so a change of any bits of one
element changes the first sum for certain. Sums without `mix` would miss pairs
of flipped signs, for 2^31 times an odd number is always 2^31.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding

_A, _B = 0x9E3779B1, 0x85EBCA6B
_MIX = 0xC2B2AE35
_HOST = "pinned_host"
# A path such as "params/layers/mlp/up" -> the checksum.
Checksums = dict[str, list[int]]


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


def _one(x: jax.Array) -> jax.Array:
  """Returns uint32 [3]: the two sums, and how many elements are not finite."""
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
def _all(
    arrays: list[jax.Array], place: jax.sharding.NamedSharding | None
) -> jax.Array:
  """Returns uint32 [arrays, 3]."""
  out = jnp.stack([_one(x) for x in arrays])
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
    host = x.sharding.memory_kind == _HOST
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
    if there[0].sharding.memory_kind == _HOST:
      there = [jax.device_put(there[0], sharding.on_device(there[0].sharding))]
    out[batch] = np.asarray(_all(there, place))
  return out


def measure(tree: Any) -> tuple[Checksums, list[str]]:
  """Returns the checksum of each array, and which arrays are not finite.

  Every process must call it.

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
