"""Compiled programs as text: HLO's computations, shapes, groups and loops.

What the parts of this package share. It reads what `compiled.as_text()` gives,
as far as the traffic between devices and the trip counts of loops need it.
"""

import bisect
from collections.abc import Mapping
import dataclasses
import functools
import itertools
import math
import re

import numpy as np

# Integers that are known at some point of a program: of a fused computation's
# parameters, or of the elements of a loop's tuple, by index. None is unknown.
Env = Mapping[int, int | None]
Groups = list[list[int]]

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
# What gives on the integer that it gets.
_PASSING = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")
_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "and": lambda a, b: a & b,
    "maximum": max,
    "minimum": min,
    "multiply": lambda a, b: a * b,
    "or": lambda a, b: a | b,
    "subtract": lambda a, b: a - b,
}
_COMPARISON = {
    "EQ": lambda a, b: a == b,
    "GE": lambda a, b: a >= b,
    "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
    "LT": lambda a, b: a < b,
    "NE": lambda a, b: a != b,
}
_MOST_TRIPS = 2**31

# Instructions that start no kernel.
_FREE = (
    "after-all", "bitcast", "constant", "get-tuple-element", "iota",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction.

  Attributes:
    name: in its computation.
    shape: of the result, as text; of a tuple, all of them.
    opcode: such as "all-gather-start".
    operands: what stands between its parentheses.
    attributes: what follows them.
    is_root: whether it is the computation's result.
  """

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str
  is_root: bool

  @property
  def inputs(self) -> list[str]:
    """The names of its operands."""
    return _NAME.findall(self.operands)

  @property
  def called(self) -> list[str]:
    """The computations that it runs once, or of which it runs one."""
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
  return Op(
      found[2], shape, rest[:start], rest[start + 1 : end - 1], rest[end:],
      bool(found[1]),
  )  # fmt: skip


class Module:
  """A program: its computations, by name, of instructions, by name."""

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
    """Returns what is known of the parameters of what an op calls."""
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
      compute = _COMPARISON[op.attribute("direction")]
    if compute is None:
      return None
    values = []
    for x in inputs:
      values.append(self.value(computation, x, env))
      if values[-1] is None:
        return None
    return int(compute(*values))

  def _element(self, computation: str, op: Op, env: Env) -> int | None:
    """Returns an element of a loop's tuple or of one that is made here."""
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
    """Returns what is known of the elements of a tuple."""
    op = self.computations[computation][name]
    return self.arguments(op, computation, env) if op.opcode == "tuple" else {}

  def trip_count(
      self, op: Op, computation: str, env: Env
  ) -> tuple[int | None, Env]:
    """Finds how often a while loop runs its body.

    Compilers for CPU and GPU say so. Elsewhere the condition has to follow from
    integers that the loop starts with and that grow or shrink evenly.

    Args:
      op: the loop.
      computation: that it is in.
      env: what is known there.

    Returns:
      The trip count, None if unknown, and the loop's constant integers.
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

    def ended(trip: int) -> int | None:
      env = {i: first[i] + trip * step for i, step in steps.items()}
      goes_on = self.value(condition, self.root(condition).name, env)
      return None if goes_on is None else int(not goes_on)

    if ended(0) is None:
      return None, constants
    count = bisect.bisect_left(range(_MOST_TRIPS), 1, key=ended)
    return (count if count < _MOST_TRIPS else None), constants


def dtype(shape: str) -> str:
  """Returns the type of an array, or of a tuple's first one."""
  return _ARRAY.search(shape)[1]


def num_bytes(shape: str) -> int:
  """Returns the bytes of an array or of a tuple's, without their padding."""
  total = 0
  for name, dims in _ARRAY.findall(shape):
    bits = re.search(r"\d+", name)
    bits = 8 if name == "pred" else int(bits[0]) if bits else 0
    size = math.prod(int(d.strip("<=")) for d in dims.split(",") if d)
    total += -(-size * bits // 8)
  return total


def groups(text: str, devices: int) -> Groups:
  """Reads replica groups, or the pairs of a permutation.

  Args:
    text: "{{0,1},{2,3}}", "[4,2]<=[2,4]T(1,0)", "mesh['a'=2,'b'=4] {'b'}", or
      nothing for all devices in one group.
    devices: of the program.

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

  A part of an axis is (the devices before it) and its size: above, the last
  two of an axis of four that is seen as two by two.
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


def _kernels(module: Module, computation: str, loops: bool = True) -> int:
  """Counts the kernels that a computation starts, of branches the larger one's.

  Args:
    module: of the computation.
    computation: its name.
    loops: whether to count what is in its loops.
  """
  total = 0
  for op in module.computations[computation].values():
    if op.opcode in _FREE or op.opcode.endswith("-done"):
      continue
    if op.opcode == "while":
      trips, _ = module.trip_count(op, computation, {})
      inside = _kernels(module, op.attribute("body")) if loops else 0
      total += (trips or 1) * inside
    elif op.opcode == "call":
      total += sum(_kernels(module, name, loops) for name in op.called)
    elif op.opcode == "conditional":
      total += max(_kernels(module, name, loops) for name in op.called)
    else:
      total += 1
  return total


def kernels_a_token(text: str) -> int:
  """Returns the kernels of one turn of the loop over tokens.

  It is the one that has the layers in it, and not in a loop of its own.
  """
  module = Module(text)
  bodies = [
      op.attribute("body")
      for name, ops in module.computations.items()
      if name not in module.fused
      for op in ops.values()
      if op.opcode == "while"
  ]
  if not bodies:
    return 0
  return _kernels(
      module, max(bodies, key=lambda body: _kernels(module, body, False))
  )
