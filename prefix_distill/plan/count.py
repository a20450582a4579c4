"""FLOPs of a program, from its jaxpr.

The compiler's own count (`cost_analysis`) takes a loop's body once and a kernel
for nothing. Here loops are multiplied out, and the attention kernels have
formulas. Counted are matrix products, as in `report.flops`: 2 m k n for [m, k]
and [k, n]. Numbers are of the whole program over all devices, for the shapes as
they are: padding is work, and so are pairs of positions that a mask hides,
except in a kernel, which leaves most of them out.
"""

import bisect
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import operator
from typing import Any

from jax.extend import core
import jax.numpy as jnp

# Products of two [T, T] x [T, H]-like matrices that attention kernels form. The
# backward passes form the scores again: splash does for keys and values (with
# three more products) and for queries (with two), cuDNN once (with four).
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
# Kernels of one query a row over a cache, and which axis of their keys is that
# of the heads.
_OVER_CACHE = {"decode_attention": 1, "paged_attention": 0}
_ELEMENTWISE = frozenset((
    "add", "add_any", "cos", "div", "erf", "exp", "exp2", "expm1",
    "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg",
    "pow", "rsqrt", "select_n", "sin", "sqrt", "square", "sub", "tanh",
))  # fmt: skip
_REDUCTIONS = frozenset((
    "argmax", "argmin", "cumlogsumexp", "cummax", "cumprod", "cumsum",
    "reduce_max", "reduce_min", "reduce_prod", "reduce_sum",
))  # fmt: skip
# What is computed of integers that are known, to find trip counts.
_INTEGERS = {
    "add": operator.add,
    "and": operator.and_,
    "convert_element_type": int,
    "eq": operator.eq,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "max": max,
    "min": min,
    "mul": operator.mul,
    "ne": operator.ne,
    "or": operator.or_,
    "sub": operator.sub,
}
_MOST_TRIPS = 2**31
_Known = Sequence[int | None]


@dataclasses.dataclass(frozen=True)
class Count:
  """FLOPs over all devices.

  Attributes:
    flops: the number.
    exact: false if a loop of unknown trip count was taken to run once.
  """

  flops: float = 0.0
  exact: bool = True

  def __add__(self, other: "Count") -> "Count":
    return Count(self.flops + other.flops, self.exact and other.exact)

  def times(self, number: float) -> "Count":
    return Count(self.flops * number, self.exact)


def flops(
    jaxpr: core.Jaxpr | core.ClosedJaxpr,
    trips: int | None = None,
    elementwise: bool = False,
) -> Count:
  """Counts a program's FLOPs.

  Scans are multiplied by their length, while loops by their trip count where it
  follows from constants, conditionals cost their dearest branch, and what is in
  a `shard_map` is per device and done by each: multiplied by the sizes of the
  mesh axes that it is manual over, also where devices do the same twice. What a
  remat does again is counted again. Sorts, gathers, ragged products,
  convolutions by FFT and solvers count nothing.

  A Pallas kernel counts by its name if `_ATTENTION` has it, and as causal, or
  if `_OVER_CACHE` has it; any other as its body times its grid, conditionals
  inside as always taken.

  Args:
    jaxpr: such as `jax.jit(f).trace(*args).jaxpr`.
    trips: trip count of while loops whose own depends on data, such as the
      sampler's.
    elementwise: whether to add one for each element of the result of an
      elementwise operation, and for each that a reduction reads.
  """
  jaxpr = _open(jaxpr)
  return _Counter(trips, elementwise).count(jaxpr, [None] * len(jaxpr.invars))


@dataclasses.dataclass(frozen=True)
class _Counter:
  """Walks jaxprs; `known` are those inputs whose integer value is known."""

  trips: int | None
  elementwise: bool

  def count(self, jaxpr: core.Jaxpr, known: _Known) -> Count:
    total = Count()
    for eqn, inputs in _run(jaxpr, known):
      total += self._equation(eqn, inputs)
    return total

  def _equation(self, eqn: core.JaxprEqn, known: _Known) -> Count:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      return Count(_dot(eqn))
    if name == "conv_general_dilated":
      return Count(_convolution(eqn))
    if name.startswith("dot_product_attention_"):
      # MaskType by its name, for its module is not public.
      return Count(_attention(eqn, "CAUSAL" in str(params["mask_type"])))
    if name == "pallas_call":
      return self._kernel(eqn)
    if name == "scan":
      # From jax 0.12 on it does not say which inputs stay as they are.
      known = known[: params.get("num_consts", 0)]
      body = self._inside(params["jaxpr"], known)
      return body.times(params["length"])
    if name == "while":
      return self._while(params, known)
    if name == "cond":
      branches = (self._inside(b, known[1:]) for b in params["branches"])
      return max(branches, key=lambda c: c.flops)
    inside = Count()
    for jaxpr in _called(params):
      same = len(_open(jaxpr).invars) == len(known)
      inside += self._inside(jaxpr, known if same else ())
    if name == "shard_map":
      # Not those of a shard_map around it, which multiplies by them itself.
      mesh, manual = params["mesh"], params["newly_manual_axes"]
      inside = inside.times(math.prod(mesh.shape[axis] for axis in manual))
    return inside + Count(_elements(eqn) if self.elementwise else 0.0)

  def _inside(
      self, jaxpr: core.Jaxpr | core.ClosedJaxpr, known: _Known
  ) -> Count:
    """Counts what is called with these first inputs, and others unknown."""
    jaxpr = _open(jaxpr)
    rest = max(len(jaxpr.invars) - len(known), 0)
    return self.count(jaxpr, [*known[: len(jaxpr.invars)], *[None] * rest])

  def _while(self, params: Mapping[str, Any], known: _Known) -> Count:
    number = _trip_count(params, known)
    number = self.trips if number is None else number
    total = Count(exact=number is not None)
    number = 1 if number is None else number
    consts = params["cond_nconsts"]
    cond = self._inside(params["cond_jaxpr"], known[:consts])
    known = known[consts : consts + params["body_nconsts"]]
    body = self._inside(params["body_jaxpr"], known)
    return total + cond.times(number + 1) + body.times(number)

  def _kernel(self, eqn: core.JaxprEqn) -> Count:
    name = eqn.params["name"] or ""
    if _products(name):
      return Count(_attention(eqn, causal=True))
    if name in _OVER_CACHE:
      return Count(_over_cache(eqn, _OVER_CACHE[name]))
    grid = eqn.params["grid_mapping"].grid
    steps = [n for n in grid if isinstance(n, int)]
    body = self._inside(eqn.params["jaxpr"], ())
    exact = body.exact and len(steps) == len(grid)
    return Count(body.flops * math.prod(steps), exact)


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _called(
    params: Mapping[str, Any],
) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
  """Yields what an operation calls: jit, remat, custom_vjp and the like."""
  for value in params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, core.Jaxpr | core.ClosedJaxpr):
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
  position t of a causal kernel meets t keys, itself included.
  """
  arrays = [
      v.aval.shape
      for v in eqn.invars
      if len(v.aval.shape) > 2 and jnp.issubdtype(v.aval.dtype, jnp.floating)
  ]
  queries, keys = arrays[:2]
  axis = -3 if eqn.params.get("layout") == 0 else -2
  length, columns = queries[axis], keys[axis]
  pairs = length * (length + 1) / 2 if causal else length * columns
  name = eqn.params.get("name") or eqn.primitive.name
  return 2.0 * _products(name) * math.prod(queries) / length * pairs


def _over_cache(eqn: core.JaxprEqn, axis: int) -> float:
  """Counts two products of each query and all columns of a row's cache.

  Of queries [B, ...] and keys, whose last axis is the width of a head.
  """
  arrays = [v.aval for v in eqn.invars if len(v.aval.shape) > 2]
  keys = next(a for a in arrays if len(a.shape) == 4 and a is not arrays[0])
  rows, heads, width = arrays[0].shape[0], keys.shape[axis], keys.shape[-1]
  columns = keys.size / (rows * heads * width)
  return 2.0 * 2 * arrays[0].size * columns


def _elements(eqn: core.JaxprEqn) -> float:
  name = eqn.primitive.name
  if name in _ELEMENTWISE:
    return float(math.prod(eqn.outvars[0].aval.shape))
  if name in _REDUCTIONS:
    return float(math.prod(eqn.invars[0].aval.shape))
  return 0.0


def _run(
    jaxpr: core.Jaxpr, known: _Known, env: dict[Any, int] | None = None
) -> Iterator[tuple[core.JaxprEqn, _Known]]:
  """Yields equations with the integers that go in, as far as they are known.

  `env` is filled with the integers of variables.
  """
  env = {} if env is None else env
  env.update(
      (v, n)
      for v, n in zip(jaxpr.invars, known, strict=True)
      if n is not None
  )
  for eqn in jaxpr.eqns:
    inputs = [_value(v, env) for v in eqn.invars]
    compute = _INTEGERS.get(eqn.primitive.name)
    if compute and inputs and None not in inputs:
      env[eqn.outvars[0]] = int(compute(*inputs))
    yield eqn, inputs


def _value(atom: Any, env: Mapping[Any, int]) -> int | None:
  """Returns the integer of a variable or a literal; None if unknown."""
  if not isinstance(atom, core.Literal):
    return env.get(atom)
  whole = atom.aval.shape == () and atom.aval.dtype.kind in "iub"
  return int(atom.val) if whole else None


def _results(jaxpr: core.Jaxpr) -> Callable[[_Known], _Known]:
  """Returns a function from known inputs to known outputs."""

  def results(known: _Known) -> _Known:
    env: dict[Any, int] = {}
    for _ in _run(jaxpr, known, env):
      pass
    return [_value(v, env) for v in jaxpr.outvars]

  return results


def _trip_count(params: Mapping[str, Any], known: _Known) -> int | None:
  """Finds how often a loop runs whose integers grow or shrink evenly."""
  cond, body = (_results(_open(params[f"{p}_jaxpr"])) for p in ("cond", "body"))
  start = params["cond_nconsts"]
  first = start + params["body_nconsts"]
  of_cond, of_body = list(known[:start]), list(known[start:first])
  states = [list(known[first:])]
  for _ in range(2):
    states.append(body(of_body + states[-1]))
  steps = [
      b - a if None not in (a, b, c) and c - b == b - a else None
      for a, b, c in zip(*states, strict=True)
  ]

  def ended(trip: int) -> int | None:
    now = (
        None if step is None else a + trip * step
        for a, step in zip(states[0], steps, strict=True)
    )
    (goes_on,) = cond([*of_cond, *now])
    return None if goes_on is None else int(not goes_on)

  if ended(0) is None:
    return None
  count = bisect.bisect_left(range(_MOST_TRIPS), 1, key=ended)
  return count if count < _MOST_TRIPS else None
