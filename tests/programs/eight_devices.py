"""Five updates on one device, and on a mesh of eight.

eight_devices.py DIR [relaxed]; with the exact loss or, on one mesh, the relaxed
one. Prints a JSON object for each run: what the updates computed, the share of
the weights that a device holds, and whether they were loaded as without a mesh.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import toys

from prefix_distill import sharding
from prefix_distill.config import LossSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import RelaxedSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.train import checkpoint
from prefix_distill.train import update
from prefix_distill.train.update import Programs

STEPS = 5


def same(ours, theirs) -> bool:
  equal = jax.tree.map(
      lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), ours, theirs
  )
  return all(jax.tree.leaves(equal))


def _first(inspected, count: int) -> dict:
  """Returns what was seen of the rollouts that are kept, where it counts."""
  mask = inspected.mask[:count]
  return {
      name: values[:count][mask].tolist()
      for name, values in (
          ("tokens", inspected.tokens), *inspected.found.items()
      )
  }


def run(config, devices, mesh_spec) -> dict:
  mesh = sharding.make_mesh(mesh_spec, devices)
  models, tokenizer, (params, teacher_params) = toys.load_models(config, mesh)
  plain = sharding.make_mesh(MeshSpec(), jax.devices()[-1:])
  others = toys.load_models(config, plain)[2][0]
  loads_equal = same(params, others)
  sums = [checkpoint.checksums_of(x) for x in (params, others)]
  checksums_equal = sums[0] == sums[1]
  held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(params))
  share = held / sum(x.nbytes for x in jax.tree.leaves(params))
  data = PromptIterator(config.data, tokenizer, seed=0)
  programs = Programs(models)
  state = programs.init(params)
  losses, norms, tokens, lengths, counted = [], [], [], [], []
  inspected = None
  for step in range(STEPS):
    prompts = sharding.global_batch(next(data)[0], mesh)
    request = update.Request(
        config.prefix.fixed.length,
        jax.random.key(step),
        refines=config.loss.refines(step),
        inspected=not step,
    )
    state, shown = programs.update(
        state, teacher_params, prompts, None, request, update.Clock()
    )
    inspected = inspected or shown.inspected
    losses.append(float(shown.metrics["kl_rollout"]))
    norms.append(float(shown.metrics["grad_norm"]))
    tokens.append(shown.tokens.tolist())
    lengths += shown.mask.sum(1).tolist()
    names = ("counted", "least_entropy", "loss")
    counted.append([float(shown.metrics.get(name, 0)) for name in names])
  return {
      "losses": losses,
      "norms": norms,
      "tokens": tokens,
      "lengths": lengths,
      "inspected": _first(inspected, config.samples.rollouts),
      "counted": counted,
      "share": share,
      "loads_equal": loads_equal,
      "checksums_equal": checksums_equal,
      "compilations": programs.compilations(),
  }


def main() -> None:
  directory = pathlib.Path(sys.argv[1])
  student = toys.write_model(directory / "student", 0, "capable")
  teacher = toys.write_model(directory / "teacher", 1, "teacher")
  devices, cube = jax.devices(), MeshSpec(2, 2, 2)
  assert len(devices) == 8
  two_meshes = MeshSpec(1, 8, 1, sampling_tensor=4)
  loss, cases = LossSpec(), [
      (0, devices[:1], MeshSpec()),
      (0, devices, cube),
      (416, devices, cube),
      (0, devices, two_meshes),
      (416, devices, two_meshes),
  ]
  if sys.argv[2:] == ["relaxed"]:
    relaxed = RelaxedSpec(weight=0.4, switch_step=2)
    loss = LossSpec("relaxed", normalize="tokens", relaxed=relaxed)
    cases = [cases[0], cases[2]]
  for at_once, used, mesh in cases:
    # At 416, two groups of prompts are sampled, and two parts of each scored
    # where eight rows need not be one for each device.
    config = toys.run_config(
        student,
        teacher,
        mesh=mesh,
        loss=loss,
        optimizer=OptimizerSpec(learning_rate=1e-2, batch_tokens=at_once),
        rollout=RolloutSpec(per_prompt=2, max_len=16, batch_tokens=2 * at_once),
    )
    print(json.dumps(run(config, used, mesh)), flush=True)


if __name__ == "__main__":
  main()
