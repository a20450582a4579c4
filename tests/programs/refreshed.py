"""Five updates with two refreshes, on one device and on eight.

Prints a JSON object for each: what the updates computed, whether the teacher
was the student when it scored, the share of the teacher that a device holds,
and how many programs the second refresh and the update after it compiled. The
loss is divided by each rollout's length, and rollouts end early.
"""

import dataclasses
import json

import jax
import numpy as np
import toys

from prefix_distill import sharding
from prefix_distill.config import LossSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.train import checkpoint
from prefix_distill.train import update
from prefix_distill.train.update import Programs


def run(devices: list, spec: MeshSpec) -> dict:
  mesh = sharding.make_mesh(spec, devices)
  config = toys.run_config(
      "student",
      "teacher",
      loss=LossSpec(normalize="length"),
      optimizer=OptimizerSpec(learning_rate=1e-2, batch_tokens=104),
  )
  teacher = ModelSpec("teacher", refresh=2)
  config = dataclasses.replace(config, teacher=teacher)
  models = toys.models(config, mesh, stop_ids=toys.STOPS)
  programs = Programs(models)
  shardings = sharding.param_shardings(models.student.abstract_params(), mesh)
  params, teacher = (
      jax.device_put(models.student.init(jax.random.key(seed)), shardings)
      for seed in (0, 1)
  )
  state = programs.init(params)
  # The teacher reads prompts of its own, or a copy of the student would agree.
  prompts, theirs = toys.prompts(8), toys.prompts(8, 7, seed=1)
  prompts = dataclasses.replace(
      prompts, teacher_tokens=theirs.tokens, teacher_mask=theirs.mask
  )
  prompts = jax.tree.map(np.asarray, prompts)
  prompts = sharding.global_batch(prompts, mesh)
  losses, norms, tokens, same, compiled = [], [], [], [], []
  for step in range(5):
    with toys.compilations() as names:
      if step and step % 2 == 0:
        teacher = programs.refresh(state.params, teacher)
      sums = checkpoint.checksums_of((state.params, teacher))[0]
      values = [
          [v for k, v in sums.items() if k.startswith(part)] for part in "01"
      ]
      same.append(values[0] == values[1])
      request = update.Request(8, jax.random.key(step))
      state, shown = programs.update(
          state, teacher, prompts, None, request, update.Clock()
      )
    compiled.append(len(names))
    losses.append(float(shown.metrics["loss"]))
    norms.append(float(shown.metrics["grad_norm"]))
    tokens.append(shown.tokens.tolist())
  held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(teacher))
  return {
      "losses": losses,
      "norms": norms,
      "tokens": tokens,
      "same": same,
      "share": held / sum(x.nbytes for x in jax.tree.leaves(teacher)),
      "compiled": compiled[-1],
  }


def main() -> None:
  devices = jax.devices()
  assert len(devices) == 8
  for used, spec in ((devices[:1], MeshSpec()), (devices, MeshSpec(2, 2, 2))):
    print(json.dumps(run(used, spec)), flush=True)


if __name__ == "__main__":
  main()
