r"""Says what a run takes on a machine before it is paid for.

  python -m prefix_distill.plan --config=configs/math.py:qwen3-1.7b \
    --topology=v5e:4x4

Compiles the run's own programs for the machine, which need not be there. Prints
whether they fit, what they send, and how long they take at least. The exit
status is 0 if all fits, 1 if not, 2 if the question is wrong.
"""

import json
import os
import pathlib
import sys

from prefix_distill.plan import machines

# Before JAX is imported.
os.environ.update(machines.ENVIRONMENT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Compilers log a lot.

from absl import app  # noqa: E402
from absl import flags  # noqa: E402
from absl import logging  # noqa: E402
import rich.console  # noqa: E402

from prefix_distill import command_line  # noqa: E402
from prefix_distill.errors import ConfigError  # noqa: E402
from prefix_distill.errors import UserError  # noqa: E402
from prefix_distill.plan import estimate  # noqa: E402
from prefix_distill.plan import planner  # noqa: E402
from prefix_distill.plan import show  # noqa: E402
from prefix_distill.plan.estimate import Assumptions  # noqa: E402
from prefix_distill.plan.estimate import TooLargeError  # noqa: E402

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The machine: v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8, ..."
)
_PREFIX = flags.DEFINE_list(
    "prefix",
    [],
    "Lengths to compile for, rounded up to the config's buckets. Default: the"
    " first, the one nearest to 2048, and the last.",
)
_MESH = flags.DEFINE_string(
    "mesh",
    "",
    "data x fsdp x tensor, as 1x16x1. Default: the config's, if it fills the"
    " machine, or one that is chosen.",
)
_UTILIZATION = flags.DEFINE_float(
    "utilization", 0.5, "Share of the peak FLOPs that products reach."
)
_MEASURED = flags.DEFINE_string(
    "measured",
    "",
    "The results.jsonl of benchmarks/accelerator.py, whose shares of the peak"
    " FLOPs and of the memory's bandwidth are used instead of assumed ones.",
)
_PRICE = flags.DEFINE_float(
    "price", 0.0, "Of a device and hour, in any currency; 0 for none."
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Whether to look for the largest batches that fit; it is done anyway if"
    " those of the config do not.",
)
_JSON = flags.DEFINE_string("json", "", "A file for the results.")


def _assumptions() -> Assumptions:
  """Returns what was measured, or what is assumed."""
  if not _MEASURED.value:
    return Assumptions(_UTILIZATION.value, price=_PRICE.value)
  if flags.FLAGS["utilization"].present:
    raise ConfigError(
        "--measured and --utilization are both given; leave one out."
    )
  return estimate.measured(pathlib.Path(_MEASURED.value), _PRICE.value)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  if not _TOPOLOGY.value:
    sys.exit(f"error: --topology is missing; there are {machines.known()}.")
  try:
    question = planner.Question(
        command_line.config(),
        machines.parse(_TOPOLOGY.value),
        planner.read_lengths(_PREFIX.value),
        _MESH.value,
        _assumptions(),
        _SEARCH.value,
    )
    result = planner.plan(question, rich.console.Console(stderr=True))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1 if isinstance(error, TooLargeError) else 2)
  show.show(result, rich.console.Console())
  if _JSON.value:
    text = json.dumps(show.as_json(result), indent=2)
    pathlib.Path(_JSON.value).write_text(text + "\n")
  if not result.fits:
    sys.exit(f"error: {show.short(result)}.")


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
