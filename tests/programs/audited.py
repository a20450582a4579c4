"""The programs of an update on meshes of eight devices: audited.py.

Prints a JSON object for each mesh: for each program, what a device sends, the
sentences on what nothing plans, and the least that the gradient has to send.
At last the kinds of collectives that a draw takes on a split vocabulary.
"""

import functools
import json
import pathlib
import sys
import tempfile

import jax
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.models import transformer
from prefix_distill.plan import cost
from prefix_distill.plan import planner
from prefix_distill.plan import programs
from prefix_distill.rollout import generate

_MESHES = (
    MeshSpec(8, 1, 1),
    MeshSpec(1, 8, 1),
    MeshSpec(1, 8, 1, sampling_tensor=2),
    MeshSpec(2, 2, 2),
)


def look(config, name: str) -> dict:
  plan = programs.build(config, jax.devices())
  machine = programs.Machine(name, programs.CHIPS["v5e"], (8,))
  found = {}
  for stage in plan.stages(8):
    if stage.name not in programs.ORDER:
      continue
    one = programs.measure(programs.Job(plan, stage, 8), machine)
    found[stage.name] = {"sent": one.sent, "unplanned": one.unplanned}
  return found | {"least": planner.least_sent(plan)}


def draw() -> list[str]:
  mesh = sharding.make_mesh(MeshSpec(1, 2, 4))
  rows = sharding.batch_sharding(mesh)
  vocabulary = sharding.PartitionSpec(sharding.BATCH_AXES, "tensor")
  place = jax.sharding.NamedSharding(mesh, vocabulary)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
  choose = functools.partial(generate.choose, greedy=False, mesh=mesh)
  compiled = (
      jax.jit(choose, in_shardings=(rows, place))
      .lower(keys, jax.ShapeDtypeStruct((8, 16 * 300), "float32"))
      .compile()
  )
  return [one.kind for one in cost.collectives(compiled.as_text(), mesh.shape)]


def main() -> None:
  directory = pathlib.Path(tempfile.mkdtemp())
  student = toys.write_model(directory / "student", 0, "capable")
  teacher = toys.write_model(directory / "teacher", 1, "teacher")
  for mesh in _MESHES:
    config = toys.run_config(student, teacher, mesh=mesh)
    print(json.dumps(look(config, str(mesh))), flush=True)
  found = draw()
  # The faults that the audit is for: weights that nobody gathers outright, and
  # a table whose gradient is left to the partitioner.
  sharding.gather_layer = lambda layer, mesh: layer
  transformer.look_up = lambda table, tokens, dtype, mesh: table.astype(dtype)[
      tokens
  ]
  print(json.dumps(look(config, "faulty")), flush=True)
  print(json.dumps(found))


if __name__ == "__main__":
  sys.exit(main())
