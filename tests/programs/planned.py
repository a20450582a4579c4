"""Plans recipes for h100:8 as they are: planned.py NAME:VARIANT ...

Prints a JSON object for each. Programs are traced and not compiled, and taken
to fit.
"""

import dataclasses
import importlib
import json
import os
import sys

from prefix_distill.plan import ENVIRONMENT

os.environ.update(ENVIRONMENT)
os.environ["HF_HUB_OFFLINE"] = "1"

import rich.console  # noqa: E402

from prefix_distill import config as config_lib  # noqa: E402
from prefix_distill.plan import planner  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402


def _traced(job, machine):
  del machine
  found = programs.reckon(job.stage, job.bucket)
  return dataclasses.replace(found, memory=1.0)


def main() -> None:
  programs.measure = _traced
  console = rich.console.Console(stderr=True)
  for text in sys.argv[1:]:
    name, _, variant = text.partition(":")
    module = importlib.import_module(f"configs.{name}")
    config = config_lib.from_dict(module.get_config(variant).to_dict())
    result = planner.plan(
        planner.Question(config, programs.parse_machine("h100:8")), console
    )
    found = {
        "mesh": result.mesh,
        "rows": {one.name: one.rows for one in result.programs},
        "hours": result.hours,
        "answers": result.answers,
        "evaluation": result.evaluation,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main()
