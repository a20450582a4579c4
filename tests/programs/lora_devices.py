"""Three updates of adapters on one device and on meshes of eight: DIR.

Prints a JSON object for each run: what the updates computed, and the shares of
the adapters and of the base that a device holds.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import toys

from prefix_distill import sharding
from prefix_distill.config import LoraSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import update

STEPS = 3


def share(tree) -> float:
  leaves = jax.tree.leaves(tree)
  held = sum(x.addressable_data(0).nbytes for x in leaves)
  return held / sum(x.nbytes for x in leaves)


def run(path, devices, mesh, workdir) -> dict:
  config = toys.run_config(
      path,
      path,
      mesh=mesh,
      steps=STEPS,
      lora=LoraSpec(2, alpha=4.0),
      optimizer=OptimizerSpec(learning_rate=2e-3),
  )
  data = dataclasses.replace(
      config.data,
      teacher_prompt="{question} It is {answer}.",
      max_teacher_prompt_len=112,
  )
  config = dataclasses.replace(config, data=data)
  made = sharding.make_mesh
  sharding.make_mesh = lambda spec: made(spec, devices)
  try:
    setup = setup_lib.prepare(config, workdir)
  finally:
    sharding.make_mesh = made
  one = loop.Run(setup, workdir)
  state, kl, norms, tokens = one.state, [], [], []
  for step in range(STEPS):
    prompts = sharding.global_batch(next(setup.data)[0], one.models.mesh)
    request = update.Request(8, jax.random.key(step))
    state, shown = one.programs.update(
        state,
        one.teacher_params,
        prompts,
        None,
        request,
        update.Clock(),
        one.base,
    )
    kl.append(float(shown.metrics["kl"]))
    norms.append(float(shown.metrics["grad_norm"]))
    tokens.append(shown.tokens.tolist())
  one.programs.close()
  sums = [
      float(np.abs(np.asarray(x)).sum())
      for x in jax.tree.leaves(state.params)
  ]
  return {
      "kl": kl,
      "norms": norms,
      "tokens": tokens,
      "sums": sums,
      "share": share(state.params),
      "base_share": share(one.base),
      "shared": one.teacher_params is one.base,
  }


def main() -> None:
  directory = pathlib.Path(sys.argv[1])
  path = toys.write_model(directory / "model", 0, "capable")
  devices = jax.devices()
  assert len(devices) == 8
  for i, (used, mesh) in enumerate(
      (
          (devices[:1], MeshSpec()),
          (devices, MeshSpec(2, 2, 2)),
          (devices, MeshSpec(1, 2, 4)),
          (devices, MeshSpec(1, 8, 1, sampling_tensor=4)),
      )
  ):
    found = run(path, used, mesh, directory / str(i))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main()
