"""Plans recipes at full size without a compiler: planned.py NAME:VARIANT ...

Prints a JSON object for each. Eight devices of a CPU stand in for those of
h100:8, and decode as many tokens at a time. Programs are traced as they are,
and taken to fit.
"""

import dataclasses
import importlib
import json
import sys

import jax
import rich.console

from prefix_distill import config as config_lib
from prefix_distill.plan import machines
from prefix_distill.plan import planner
from prefix_distill.plan import programs
from prefix_distill.rollout import generate


def _traced(job, machine):
  del machine
  found = programs.reckon(job.stage, job.bucket)
  return dataclasses.replace(found, memory=1.0)


def main() -> None:
  machines.devices = lambda machine: jax.devices()
  programs.measure = _traced
  generate.segment = lambda model: 64
  console = rich.console.Console(stderr=True)
  for text in sys.argv[1:]:
    name, _, variant = text.partition(":")
    module = importlib.import_module(f"configs.{name}")
    config = config_lib.from_dict(module.get_config(variant).to_dict())
    result = planner.plan(
        planner.Question(config, machines.parse("h100:8")), console
    )
    print(
        json.dumps({
            "fits": result.fits,
            "mesh": result.mesh,
            "notes": result.notes,
            "held": result.held,
            "rows": {one.name: one.rows for one in result.programs},
            "times": {one.name: one.times for one in result.programs},
            "hours": result.hours,
            "answers": result.answers,
            "evaluation": result.evaluation,
            "updates": len(result.each),
        }),
        flush=True,
    )


if __name__ == "__main__":
  main()
