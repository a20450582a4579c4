"""Updates on rewritten answers, on one device and eight: prints JSON.

A line for each run: what the updates computed and what was learned from.
"""

import json
import pathlib
import sys

import jax
import toys

from prefix_distill import sharding
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.data.prompts import Asking
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.data.prompts import Rewriting
from prefix_distill.train import update

STEPS = 2


def run(config, devices) -> dict:
  mesh = sharding.make_mesh(config.mesh, devices)
  models, tokenizer, (params, teacher_params) = toys.load_models(config, mesh)
  data, stops = PromptIterator(config.data, tokenizer, seed=0), models.stop_ids
  rewriting = Rewriting(config, tokenizer, tokenizer, stops, stops)
  programs = update.Programs(models)
  state = programs.init(params)
  shown = []
  for step in range(STEPS):
    batch = next(data)[0]
    request = update.Request(
        config.prefix.fixed.length,
        jax.random.key(step),
        "rewrite",
        asking=Asking(rewriting, data.questions(batch.index), batch.index),
    )
    prompts = sharding.global_batch(batch, mesh)
    state, done = programs.update(
        state, teacher_params, prompts, None, request, update.Clock()
    )
    shown.append({
        "tokens": [
            row[kept].tolist()
            for row, kept in zip(done.tokens, done.mask, strict=True)
        ],
        "failed": list(done.rewritten.failed),
        "written": done.rewritten.lengths.written.tolist(),
        "turns": done.rewritten.lengths.prompts.tolist(),
        "kl_rollout": float(done.metrics["kl_rollout"]),
        "grad_norm": float(done.metrics["grad_norm"]),
    })
  programs.close()
  return {"updates": shown}


def main() -> None:
  directory = pathlib.Path(sys.argv[1])
  student = toys.write_model(directory / "student", 0, "teacher")
  teacher = toys.write_model(directory / "teacher", 1, "teacher")
  devices = jax.devices()
  for at_once, used, mesh in (
      (0, devices[:1], MeshSpec()),
      (512, devices, MeshSpec(1, 4, 2, sampling_tensor=4)),
  ):
    config = toys.run_config(
        student,
        teacher,
        mesh=mesh,
        optimizer=OptimizerSpec(learning_rate=1e-2, batch_tokens=at_once),
        rollout=RolloutSpec(
            2, 16, source="rewrite", batch_tokens=at_once, rewrite=toys.REWRITE
        ),
    )
    print(json.dumps(run(config, used)), flush=True)


if __name__ == "__main__":
  main()
