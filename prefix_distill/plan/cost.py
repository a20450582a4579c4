"""What a program costs: FLOPs, from its jaxpr; bytes sent, from its HLO text.

`flops` counts a program before it is compiled. The compiler's own count
(`cost_analysis`) counts a loop's body once and a kernel as nothing; `flops`
multiplies loops out, and has formulas for the attention kernels.

The HLO text is `compiled.as_text()` of a program that is partitioned over a
mesh (by GSPMD, Shardy or `shard_map`), from the compilers for CPU, GPU and TPU.
`Module` parses as much of it as traffic and trip counts need. `collectives`
walks the module from its entry, multiplies loops out, and lists the collectives
of one device; all devices of a program do the same. `audit` compares them with
a plan.
"""

import bisect
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math
import operator
import re
from typing import Any

from jax.extend import core
import jax.numpy as jnp
import numpy as np

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
# The known integers at some point of a program, by index: the values of a
# computation's parameters, or of the elements of a loop's tuple. None is
# unknown.
Env = Mapping[int, int | None]
Groups = list[list[int]]

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# The axes of a collective whose groups no set of mesh axes explains.
UNKNOWN = ("?",)

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_SCALAR = re.compile(r"(pred|[su]\d+)\[\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Operations whose result is the integer that they get.
_PASSING = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")
_ARITHMETIC = {
    "add": operator.add,
    "and": operator.and_,
    "maximum": max,
    "minimum": min,
    "multiply": operator.mul,
    "or": operator.or_,
    "subtract": operator.sub,
}
_MOST_TRIPS = 2**31
# Operations whose computations run once.
_CALLS = ("async-start", "call", "custom-call", "fusion")
_START = 'custom_call_target="AsyncCollectiveStart"'


def flops(jaxpr: _AnyJaxpr, trips: int = 1) -> float:
  """Counts a program's FLOPs over all devices.

  It counts matrix products, as `report.flops` does: 2 m k n for [m, k] and
  [k, n]. The shapes count as they are: padding is work. Pairs of positions that
  a mask hides are work too, except in a kernel, which leaves most of them out.

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


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction.

  Attributes:
    name: unique in the computation.
    shape: of the result, as text; a tuple's text has all its arrays.
    opcode: such as "all-gather-start".
    operands: the text between the parentheses.
    attributes: the text behind the parentheses.
    is_root: whether the result is the computation's result.
  """

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str
  is_root: bool

  @property
  def inputs(self) -> list[str]:
    """The operands' names."""
    return _NAME.findall(self.operands)

  @property
  def called(self) -> list[str]:
    """The computations that run once, or of which one runs."""
    found = _CALLED.findall(self.attributes)
    return [name for group in found for name in _NAME.findall(group)]

  @property
  def op_name(self) -> str:
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1] if found else ""

  def attribute(self, key: str) -> str:
    """Returns the text of an attribute without % and quotes; "" if none."""
    start = re.search(rf"(?:^|\W){key}=", self.attributes)
    if not start:
      return ""
    rest, depth = self.attributes[start.end() :], 0
    for match in re.finditer(r"[{}()\[\],]", rest):
      if match[0] == "," and not depth:
        following = rest[match.end() :].lstrip()
        if not following.startswith("device_ids="):  # Of a mesh of groups.
          return rest[: match.start()].strip('%" ')
      depth += (match[0] in "{([") - (match[0] in "})]")
    return rest.strip('%" ')


def _closing(text: str, start: int = 0) -> int:
  """Returns where the parenthesis is closed that opens at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.end()
  return len(text)


def _parse(line: str) -> Op | None:
  found = _OP.match(line)
  if not found:
    return None
  rest = line[found.end() :]
  end = _closing(rest) if rest[0] == "(" else rest.find(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  start = rest.find("(")
  end = _closing(rest, start)
  operands, attributes = rest[start + 1 : end - 1], rest[end:]
  root = bool(found[1])
  return Op(found[2], shape, rest[:start], operands, attributes, root)


class Module:
  """A program's computations by name, each with its instructions by name."""

  def __init__(self, text: str):
    """Reads a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    self.computations: dict[str, dict[str, Op]] = {}
    self.entry, ops = "", {}
    for line in text.splitlines():
      if op := _parse(line):
        ops[op.name] = op
      elif header := _COMPUTATION.match(line):
        ops = self.computations.setdefault(header[2], {})
        self.entry = header[2] if header[1] else self.entry
    if not self.entry:
      raise ValueError("The text has no ENTRY, so it is no HLO module.")

  @functools.cached_property
  def fused(self) -> set[str]:
    """Names of the computations of fusions."""
    return {
        name
        for ops in self.computations.values()
        for op in ops.values()
        if op.opcode == "fusion"
        for name in op.called
    }

  def root(self, computation: str) -> Op:
    """Returns the instruction whose result is the computation's."""
    return next(o for o in self.computations[computation].values() if o.is_root)

  def operand_shapes(self, op: Op, computation: str) -> list[str]:
    """Returns the shapes of an instruction's operands, as text."""
    ops = self.computations[computation]
    return [ops[name].shape for name in op.inputs]

  def arguments(self, op: Op, computation: str, env: Env) -> Env:
    """Returns the known parameters of the computation that an op calls."""
    values = (self.value(computation, name, env) for name in op.inputs)
    return dict(enumerate(values))

  def value(self, computation: str, name: str, env: Env) -> int | None:
    """Returns the integer that an instruction gives; None if unknown."""
    op = self.computations[computation].get(name)
    if op is None or not _SCALAR.match(op.shape):
      return None
    inputs = op.inputs
    if op.opcode == "constant":
      word = op.operands.strip()
      word = {"true": "1", "false": "0"}.get(word, word)
      return int(word) if re.fullmatch(r"-?\d+", word) else None
    if op.opcode == "parameter":
      return env.get(int(op.operands))
    if op.opcode == "get-tuple-element":
      return self._element(computation, op, env)
    if op.opcode in _PASSING:
      return self.value(computation, inputs[0], env)
    if op.opcode in ("fusion", "call") and op.called:
      inner = self.arguments(op, computation, env)
      return self.value(op.called[0], self.root(op.called[0]).name, inner)
    compute = _ARITHMETIC.get(op.opcode)
    if op.opcode == "compare":
      compute = getattr(operator, op.attribute("direction").lower())
    if compute is None:
      return None
    values = []
    for x in inputs:
      values.append(self.value(computation, x, env))
      if values[-1] is None:
        return None
    return int(compute(*values))

  def _element(self, computation: str, op: Op, env: Env) -> int | None:
    """Returns an element of a loop's tuple, or of a tuple made here."""
    ops = self.computations[computation]
    source = ops.get(op.inputs[0])
    index = int(op.attribute("index"))
    if source is None:
      return None
    if source.opcode == "tuple":
      return self.value(computation, source.inputs[index], env)
    parameters = sum(o.opcode == "parameter" for o in ops.values())
    is_loop = source.opcode == "parameter" and parameters == 1
    return env.get(index) if is_loop else None

  def _elements(self, computation: str, name: str, env: Env) -> Env:
    """Returns the known elements of a tuple."""
    op = self.computations[computation][name]
    return self.arguments(op, computation, env) if op.opcode == "tuple" else {}

  def trip_count(
      self, op: Op, computation: str, env: Env
  ) -> tuple[int | None, Env]:
    """Finds how often a while loop runs its body.

    The compilers for CPU and GPU write the trip count. Elsewhere the condition
    has to follow from known integers that grow or shrink evenly.

    Args:
      op: the loop.
      computation: the one that holds the loop.
      env: the known integers of the computation.

    Returns:
      The trip count, or None if it is unknown; and the loop's constants.
    """
    body, condition = op.attribute("body"), op.attribute("condition")
    states = [self._elements(computation, op.inputs[0], env)]
    for _ in range(2):
      states.append(self._elements(body, self.root(body).name, states[-1]))
    first = states[0]
    steps = {}
    for i in first:
      x, y, z = (state.get(i) for state in states)
      if None not in (x, y, z) and z - y == y - x:
        steps[i] = y - x
    constants = {i: first[i] for i, step in steps.items() if not step}
    if known := _KNOWN_TRIPS.search(op.attributes):
      return int(known[1]), constants

    def goes_on(trip: int) -> int | None:
      env = {i: first[i] + trip * step for i, step in steps.items()}
      return self.value(condition, self.root(condition).name, env)

    if goes_on(0) is None:
      return None, constants
    trips = range(_MOST_TRIPS)
    count = bisect.bisect_left(trips, True, key=lambda trip: not goes_on(trip))
    return (count if count < _MOST_TRIPS else None), constants


def dtype(shape: str) -> str:
  """Returns the type of an array, or of a tuple's first array."""
  return _ARRAY.search(shape)[1]


def num_bytes(shape: str) -> int:
  """Returns the bytes of an array or of a tuple's arrays, without padding."""
  total = 0
  for name, dims in _ARRAY.findall(shape):
    bits = re.search(r"\d+", name)
    bits = 8 if name == "pred" else int(bits[0]) if bits else 0
    size = math.prod(int(d.strip("<=")) for d in dims.split(",") if d)
    total += -(-size * bits // 8)
  return total


def read_groups(text: str, devices: int) -> Groups:
  """Reads replica groups, or the pairs of a permutation.

  Args:
    text: such as "{{0,1},{2,3}}", "[4,2]<=[2,4]T(1,0)" or
      "mesh['a'=2,'b'=4] {'b'}"; nothing means all devices in one group.
    devices: number of the program's devices.

  Raises:
    ValueError: the text is none of these.
  """
  if text.startswith("mesh["):
    return _mesh_groups(text)
  if text.startswith("["):
    shape, order = text.split("<=")
    return _iota(order).reshape(_integers(shape)).tolist()
  found = [_integers(g) for g in re.findall(r"\{([\d,\s]*)\}", text)]
  if not [g for g in found if g]:
    return [list(range(devices))]
  return found


def _integers(text: str) -> list[int]:
  return [int(x) for x in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
  """Reads "[2,4]T(1,0)": 0 to 7 in rows of four, transposed."""
  shape, _, order = text.partition("T")
  shape = _integers(shape)
  array = np.arange(math.prod(shape)).reshape(shape)
  return array.transpose(_integers(order)) if order else array


def _mesh_groups(text: str) -> Groups:
  """Reads "mesh['a'=2,'b'=4], device_ids=([8]) {'a','b':(2)2}".

  ":(2)2" is a part of an axis: of size 2, with 2 devices before it. An axis of
  four is seen as two by two, and the part is its second two.
  """
  mesh, _, chosen = text.partition(" {")
  if not chosen:
    raise ValueError(f"These are no replica groups: {text}")
  axes = {n: int(s) for n, s in re.findall(r"'([^']*)'=(\d+)", mesh)}
  ids = np.arange(math.prod(axes.values()))
  if listed := re.search(r"device_ids=\((.*)\)", mesh):
    order = listed[1]
    ids = _iota(order) if order.startswith("[") else np.array(_integers(order))
  parts = [
      (name, int(before or 1), int(before or 1) * int(size or axes[name]))
      for name, before, size in re.findall(
          r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen
      )
  ]
  shape, last = [], []
  for name, size in axes.items():
    mine = [(low, high) for n, low, high in parts if n == name]
    cuts = sorted({1, size, *itertools.chain(*mine)})
    for start, end in itertools.pairwise(cuts):
      if any(low <= start and end <= high for low, high in mine):
        last.append(len(shape))
      shape.append(end // start)
  rest = [i for i in range(len(shape)) if i not in last]
  count = math.prod(shape[i] for i in last)
  return ids.reshape(shape).transpose(rest + last).reshape(-1, count).tolist()


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a program, and how often it runs.

  Attributes:
    kind: one of `KINDS`.
    bytes: size of the whole array in one execution on one device: of an
      all-gather's result, and of any other kind's operand. Arrays that are sent
      together are added up.
    group_size: n, the number of devices that exchange with each other.
    dtype: of the first array, as HLO writes it, such as "bf16".
    times: number of executions, loops multiplied out.
    exact: false if the collective is in a loop of unknown trip count; `times`
      then counts that loop's body once.
    axes: mesh axes of more than one device that the groups run over, in the
      mesh's order; `UNKNOWN` if none fit.
    op_name: the place in the Python program.
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

    A gather or scatter passes on all but the device's own part. A reduction is
    a scatter and a gather. An exchange keeps one part of n.
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
class Allowed:
  """Collectives that a program may have.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes that they may run over, all of them or some.
    max_bytes: limit for one execution, as `Collective.bytes`.
    why: a reason for the reader of the plan.
  """

  kind: str
  axes: tuple[str, ...]
  max_bytes: float
  why: str


def audit(
    found: Sequence[Collective],
    allowed: Sequence[Allowed],
    negligible: float,
) -> list[str]:
  """Returns a sentence for each collective that no entry of the plan allows.

  The partitioner sometimes finds no way from one sharding to the next but to
  replicate the whole array on every device. A replica of activations comes over
  data as well, over which no gather is planned. On a mesh without replicas it
  comes over fsdp alone, and is told from a weight by its size only.

  Args:
    found: the collectives of a program.
    allowed: the collectives that the program may have.
    negligible: bytes; a collective needs no plan if a device sends no more than
      this in all its executions.
  """
  sentences = []
  for one in found:
    if one.total <= negligible:
      continue
    same = (p for p in allowed if p.kind == one.kind)
    near = [p for p in same if set(one.axes) <= set(p.axes)]
    most = max(near, key=lambda p: p.max_bytes, default=None)
    if most and one.bytes <= most.max_bytes:
      continue
    reason = "which nothing plans"
    if most:
      limit = f"{most.max_bytes / 2**20:.4g} MiB"
      reason = f"though at most {limit} are planned there ({most.why})"
    sentences.append(f"{one}, {reason}.")
  return sentences


def collectives(
    text: str,
    mesh: Mapping[str, int],
    trips: int | None = None,
) -> list[Collective]:
  """Lists the collectives of a compiled program, in the order of execution.

  A conditional counts as the branch that sends most. A while loop's condition
  runs once more often than the loop's body. An asynchronous collective counts
  once. A TPU's fusion of an all-reduce and a slice of its result counts as a
  reduce-scatter. A matrix product that fetches its operand step by step is a
  loop of collective-permutes. Transfers to and from the host are not listed.

  Args:
    text: result of `compiled.as_text()`.
    mesh: size of each axis, major to minor, as `jax.sharding.Mesh.shape`;
      devices are numbered in this order.
    trips: trip count of loops whose own the text does not tell; None if it is
      unknown.

  Raises:
    ValueError: the text has no entry computation.
  """
  module = Module(text)
  reader = _Reader(module, mesh, trips, _started(module))
  return list(reader.walk(module.entry, _Place(1, True, ""), {}))


@dataclasses.dataclass(frozen=True)
class _Place:
  """How often a computation runs, and the op_name of its caller."""

  times: int
  exact: bool
  op_name: str


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Walks computations, with the known integers of each as `env`."""

  module: Module
  mesh: Mapping[str, int]
  trips: int | None
  started: frozenset[str]

  def walk(
      self, computation: str, place: _Place, env: Env
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
      self, op: Op, computation: str, place: _Place, env: Env
  ) -> Iterator[Collective]:
    count, constants = self.module.trip_count(op, computation, env)
    count = self.trips if count is None else count
    exact = place.exact and count is not None
    count = 1 if count is None else count
    for part, times in (("condition", count + 1), ("body", count)):
      inner = _Place(place.times * times, exact, place.op_name)
      if times:
        yield from self.walk(op.attribute(part), inner, constants)

  def _is_later_part(self, op: Op, computation: str) -> bool:
    """Returns whether a TPU's fusion goes on with another's collective.

    Such a collective stands in each fusion that runs beside the collective,
    always with the same channel. The first fusion has a marker.
    """
    return (
        "async_collective_fusion_config" in op.attributes
        and op.attribute("channel_id") in self.started
        and not _has_start(self.module.computations[computation])
    )

  def _collective(
      self, op: Op, kind: str, computation: str, place: _Place
  ) -> Collective:
    shapes = self.module.operand_shapes(op, computation)
    if kind == "ragged-all-to-all":
      shapes = shapes[:1]  # The others say where its pieces go.
    size = sum(num_bytes(shape) for shape in shapes)
    devices = math.prod(self.mesh.values())
    if kind == "collective-permute":
      pairs = read_groups(op.attribute("source_target_pairs"), devices)
      group, axes = 2, _moved(pairs, self.mesh)
    else:
      groups = read_groups(op.attribute("replica_groups"), devices)
      group, axes = max(map(len, groups)), _axes(groups, self.mesh)
    if kind == "all-gather":
      size *= group
    if kind == "all-reduce" and self._is_sliced(computation, size):
      kind = "reduce-scatter"
    times, exact, name = place.times, place.exact, place.op_name
    first = dtype(shapes[0])
    return Collective(kind, size, group, first, times, exact, axes, name)

  def _is_sliced(self, computation: str, size: int) -> bool:
    """Returns whether a fusion keeps only a slice of the sum."""
    ops = self.module.computations[computation].values()
    return (
        computation in self.module.fused
        and any(op.opcode == "dynamic-slice" for op in ops)
        and num_bytes(self.module.root(computation).shape) < size
    )


def _has_start(ops: Mapping[str, Op]) -> bool:
  return any(_START in op.attributes for op in ops.values())


def _started(module: Module) -> frozenset[str]:
  """Returns the channels of collectives that have a marked start."""
  return frozenset(
      op.attribute("channel_id")
      for ops in module.computations.values()
      if _has_start(ops)
      for op in ops.values()
      if op.opcode in KINDS
  )


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Finds the axes of these groups, in any order of their members."""
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


def _moved(pairs: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Finds the axes along which a permutation moves."""
  sizes = tuple(mesh.values())
  if max(map(max, pairs)) >= math.prod(sizes):
    return UNKNOWN
  sources, targets = (np.unravel_index(x, sizes) for x in np.array(pairs).T)
  rows = zip(mesh, sources, targets, strict=True)
  return tuple(axis for axis, s, t in rows if np.any(s != t))
