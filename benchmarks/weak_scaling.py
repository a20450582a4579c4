"""Weak scaling, compiled: the same work a device on 8 to 256 of them.

  JAX_PLATFORMS=cpu python benchmarks/weak_scaling.py

Compiles the program that scores and differentiates the student, with the same
rows a device, for slices of growing size, and prints what a device computes,
holds and sends. Weights are split over 8 devices and copied beyond that. Needs
jax[tpu], and no TPU; minutes for each slice.
"""

import argparse
import dataclasses
import importlib.util
import os
import pathlib

from prefix_distill.plan import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import rich.box  # noqa: E402
import rich.console  # noqa: E402
import rich.table  # noqa: E402

from prefix_distill import config as config_lib  # noqa: E402
from prefix_distill.config import Config  # noqa: E402
from prefix_distill.config import MeshSpec  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402

_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "math.py"
_FSDP = 8


def _config(model: str, prefix: int, size: int, rows: int) -> Config:
  """The recipe of a model, with so many rows a device."""
  spec = importlib.util.spec_from_file_location("recipe_file", _CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = config_lib.from_dict(module.get_config(model).to_dict())
  length = config.data.max_prompt_len + prefix
  return dataclasses.replace(
      config,
      data=dataclasses.replace(config.data, batch_size=4 * rows * size),
      rollout=dataclasses.replace(config.rollout, batch_tokens=0),
      optimizer=dataclasses.replace(
          config.optimizer, batch_tokens=rows * size * length
      ),
      evaluation=dataclasses.replace(config.evaluation, batch_size=size),
      mesh=MeshSpec(data=size // _FSDP, fsdp=_FSDP),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="qwen3-1.7b")
  parser.add_argument("--prefix", type=int, default=256)
  # What optimizer.batch_tokens of the recipe makes of sixteen devices.
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument(
      "--topologies", nargs="+", default=["v5e:2x4", "v5e:8x8", "v5e:16x16"]
  )
  args = parser.parse_args()
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for name in ("slice", "devices", "mesh", "FLOPs a device", "GiB", "GB sent"):
    table.add_column(name, no_wrap=True)
  first = None
  for name in args.topologies:
    machine = programs.parse_machine(name)
    config = _config(args.model, args.prefix, machine.size, args.rows)
    plan = programs.build(config, programs.devices(machine))
    (stage,) = (s for s in plan.stages(args.prefix) if s.name == "gradient")
    one = programs.measure(programs.Job(plan, stage, args.prefix), machine)
    values = (
        one.flops / machine.size,
        one.memory / 2**30,
        sum(one.sent.values()) / 1e9,
    )
    first = first or values
    mesh = "x".join(map(str, plan.models.mesh.shape.values()))
    table.add_row(
        name,
        str(machine.size),
        mesh,
        *(f"{v:.4g} ({v / f:.2f})" for v, f in zip(values, first, strict=True)),
    )
  rich.console.Console(width=100).print(table)


if __name__ == "__main__":
  main()
