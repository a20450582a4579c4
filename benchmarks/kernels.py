"""Counts the kernels of a compiled program, from its HLO text."""

from prefix_distill.plan.cost import Module

# Instructions that start no kernel.
_FREE = (
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
)


def _kernels(module: Module, computation: str, loops: bool = True) -> int:
  """Counts the kernels that a computation starts.

  A conditional counts as its larger branch.

  Args:
    module: the program.
    computation: the computation's name.
    loops: whether to count what is in the computation's loops.
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
  """Returns the kernels of one turn of the loop over tokens; 0 if none is.

  That loop has the layers in its own body, not in a loop within.

  Args:
    text: result of `compiled.as_text()`.
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
