"""FLOPs of a program, from its jaxpr.

The compiler's own count (`cost_analysis`) counts a loop's body once and a
kernel as nothing. This module multiplies loops out, and has formulas for the
attention kernels. It counts matrix products, as `report.flops` does: 2 m k n
for [m, k] and [k, n]. Numbers are of the whole program over all devices, for
the shapes as they are: padding is work. Pairs of positions that a mask hides
are work too, except in a kernel, which leaves most of them out.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jax.extend import core
import jax.numpy as jnp

# How many products of two [T, T] x [T, H]-like matrices an attention kernel
# forms. The backward passes form the scores again: splash does so for keys and
# values (with three more products) and for queries (with two), cuDNN does so
# once (with four).
_ATTENTION = {
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 4,
    "splash_mha_dq": 3,
    "splash_mqa_fwd": 2,
    "splash_mqa_dkv": 4,
    "splash_mqa_dq": 3,
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 5,
}
# Kernels of one query a row over a cache, with the heads' axis of the keys.
_OVER_CACHE = {"decode_attention": 1, "paged_attention": 0}
_AnyJaxpr = core.Jaxpr | core.ClosedJaxpr


def flops(jaxpr: _AnyJaxpr, trips: int = 1) -> float:
  """Counts a program's FLOPs over all devices.

  A scan's body is multiplied by the scan's length, and a while loop's by
  `trips`. A conditional costs its dearest branch. The body of a `shard_map` is
  what each device does, and is multiplied by the sizes of the mesh axes that
  the `shard_map` is manual over, even where devices do the same work twice. A
  remat's repeated work counts again. Sorts, gathers, ragged products,
  convolutions by FFT and solvers count nothing.

  A Pallas kernel counts by its name if `_ATTENTION` has it, and as causal, or
  if `_OVER_CACHE` has it. Any other kernel counts as its body times its grid.

  Args:
    jaxpr: such as `jax.jit(f).trace(*args).jaxpr`.
    trips: how often a while loop runs. The package's programs have at most one
      kind of while loop that holds products.
  """
  return _Counter(trips).count(jaxpr)


@dataclasses.dataclass(frozen=True)
class _Counter:
  """Walks jaxprs.

  Attributes:
    trips: how often a while loop runs.
  """

  trips: int

  def count(self, jaxpr: _AnyJaxpr) -> float:
    if isinstance(jaxpr, core.ClosedJaxpr):
      jaxpr = jaxpr.jaxpr
    return sum((self._equation(eqn) for eqn in jaxpr.eqns), 0.0)

  def _equation(self, eqn: core.JaxprEqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      return _dot(eqn)
    if name == "conv_general_dilated":
      return _convolution(eqn)
    if name.startswith("dot_product_attention_"):
      # MaskType by its name, for its module is not public.
      return _attention(eqn, "CAUSAL" in str(params["mask_type"]))
    if name == "pallas_call":
      return self._kernel(eqn)
    if name == "scan":
      return self.count(params["jaxpr"]) * params["length"]
    if name == "while":
      condition = self.count(params["cond_jaxpr"]) * (self.trips + 1)
      return condition + self.count(params["body_jaxpr"]) * self.trips
    if name == "cond":
      return max(map(self.count, params["branches"]))
    inside = sum(map(self.count, _called(params)), 0.0)
    if name == "shard_map":
      # A shard_map around this one multiplies by its own axes.
      mesh, manual = params["mesh"], params["newly_manual_axes"]
      inside *= math.prod(mesh.shape[axis] for axis in manual)
    return inside

  def _kernel(self, eqn: core.JaxprEqn) -> float:
    name = eqn.params["name"] or ""
    if _products(name):
      return _attention(eqn, causal=True)
    if name in _OVER_CACHE:
      return _over_cache(eqn, _OVER_CACHE[name])
    steps = math.prod(eqn.params["grid_mapping"].grid)
    return self.count(eqn.params["jaxpr"]) * steps


def _called(params: Mapping[str, Any]) -> Iterator[_AnyJaxpr]:
  """Yields what an operation calls: jit, remat, custom_vjp and the like."""
  for value in params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, _AnyJaxpr):
        yield one


def _dot(eqn: core.JaxprEqn) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  shape = eqn.invars[0].aval.shape
  depth = math.prod(shape[i] for i in contracted)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def _convolution(eqn: core.JaxprEqn) -> float:
  """Counts the kernel's window and input features for each output."""
  kernel = eqn.invars[1].aval.shape
  out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out


def _products(name: str) -> int:
  """Returns how many products a kernel of attention forms; 0 if it is none."""
  found = (n for prefix, n in _ATTENTION.items() if name.startswith(prefix))
  return next(found, 0)


def _attention(eqn: core.JaxprEqn, causal: bool) -> float:
  """Counts a kernel's products of queries and keys.

  Pallas has [..., N, T, H], cuDNN [B, T, N, H] or [B, N, T, H]. A query at
  position t of a causal kernel meets t keys, its own included.
  """
  queries, keys = [
      v.aval.shape
      for v in eqn.invars
      if len(v.aval.shape) > 2 and jnp.issubdtype(v.aval.dtype, jnp.floating)
  ][:2]
  axis = -3 if eqn.params.get("layout") == 0 else -2
  length, columns = queries[axis], keys[axis]
  pairs = length * (length + 1) / 2 if causal else length * columns
  name = eqn.params.get("name") or eqn.primitive.name
  return 2.0 * _products(name) * math.prod(queries) / length * pairs


def _over_cache(eqn: core.JaxprEqn, axis: int) -> float:
  """Counts two products of each query and all columns of a row's cache.

  The queries are [B, ...]; the last axis of the keys is a head's width.
  """
  queries, *others = [v.aval for v in eqn.invars if len(v.aval.shape) > 2]
  keys = next(a for a in others if len(a.shape) == 4)
  rows, heads, width = queries.shape[0], keys.shape[axis], keys.shape[-1]
  columns = keys.size / (rows * heads * width)
  return 2.0 * 2 * queries.size * columns
