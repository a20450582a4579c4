r"""Says what a run takes on a machine before it is paid for.

  python -m prefix_distill.plan --config=configs/math.py:qwen3-1.7b \
    --topology=v5e:4x4

Compiles the run's own programs for the machine, which need not be there. Prints
whether they fit, what they send, and how long they take at least. The exit
status is 0 if all fits, 1 if not, 2 if the question is wrong.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import sys
from typing import NoReturn

from prefix_distill.plan import ENVIRONMENT

# Before JAX is imported.
os.environ.update(ENVIRONMENT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Compilers log a lot.

from absl import flags  # noqa: E402
from absl import logging  # noqa: E402
import rich.box  # noqa: E402
import rich.console  # noqa: E402
import rich.table  # noqa: E402
from rich.text import Text  # noqa: E402

from prefix_distill import command_line  # noqa: E402
from prefix_distill.errors import check  # noqa: E402
from prefix_distill.errors import check_path  # noqa: E402
from prefix_distill.errors import ConfigError  # noqa: E402
from prefix_distill.errors import shown  # noqa: E402
from prefix_distill.plan import planner  # noqa: E402
from prefix_distill.plan.planner import Assumptions  # noqa: E402
from prefix_distill.plan.planner import Result  # noqa: E402
from prefix_distill.plan.planner import TooLargeError  # noqa: E402
from prefix_distill.plan.programs import known_machines  # noqa: E402
from prefix_distill.plan.programs import Machine  # noqa: E402
from prefix_distill.plan.programs import Measured  # noqa: E402
from prefix_distill.plan.programs import parse_machine  # noqa: E402
from prefix_distill.plan.programs import REWRITING  # noqa: E402

_GIB = 2**30
# The phases as a run's metrics call them, and their programs.
_PHASES = {
    "sample": ("move", "prefill", "layout", "decode", *REWRITING),
    "score": ("score",),
    "update": ("gradient", "apply"),
}

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
_LIMIT = flags.DEFINE_float(
    "time_limit",
    24.0,
    "Hours after which a turn of the run ends, as of launch/slurm.sh --time; 0"
    " for no limit. --notice is how many seconds before that it is told.",
)
_BUDGET = flags.DEFINE_float(
    "budget",
    0.0,
    "Hours of the machine, or with --price a sum, that the run may cost; says"
    " how many updates that are. 0 for none.",
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Whether to look for the largest batches that fit; it is done anyway if"
    " those of the config do not.",
)
_JSON = flags.DEFINE_string("json", "", "A file for the results.")


def _assumptions() -> Assumptions:
  """Returns what was measured, or what is assumed.

  Raises:
    ConfigError: a flag that cannot be.
  """
  check(
      0 < _UTILIZATION.value <= 1,
      f"--utilization={_UTILIZATION.value:g} is no share of the peak; set it"
      " above 0 and to 1 at most.",
  )
  check(
      0 <= _PRICE.value <= 1e9,
      f"--price={_PRICE.value:g} is no price of an hour; set it from 0 to 1e9.",
  )
  for name, flag in {"time_limit": _LIMIT, "budget": _BUDGET}.items():
    check(
        0 <= flag.value <= 1e9,
        f"--{name}={flag.value:g} cannot be; set it from 0 to 1e9.",
    )
  check_path("measured", _MEASURED.value)
  if not _MEASURED.value:
    return Assumptions(_UTILIZATION.value, price=_PRICE.value)
  if flags.FLAGS["utilization"].present:
    raise ConfigError(
        "--measured and --utilization are both given; leave one out."
    )
  return planner.measured(pathlib.Path(_MEASURED.value), _PRICE.value)


def _check_json() -> None:
  """Refuses a file for the results that cannot be written, before the work.

  Raises:
    ConfigError: it cannot.
  """
  check_path("json", _JSON.value)
  file = os.path.abspath(os.path.expanduser(_JSON.value) or "json")
  folder = os.path.dirname(file)
  check(
      os.access(folder, os.W_OK)
      and os.path.isdir(folder)
      and not os.path.isdir(file)
      and len(os.fsencode(os.path.basename(file))) <= 255,
      f"--json={shown(_JSON.value)[1:-1]} cannot be written; give a file in a"
      " directory that is there.",
  )


def _table(*columns: str) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for i, column in enumerate(columns):
    table.add_column(column, justify="right" if i else "left", no_wrap=True)
  return table


def _programs(
    programs: Sequence[Measured], machine: Machine
) -> rich.table.Table:
  table = _table(
      "program", "P", "rows", "times", "GiB", "fits", "FLOPs", "GB sent"
  )
  for one in programs:
    fits = one.verdict(machine)
    sent = sum(one.sent.values()) / 1e9
    table.add_row(
        one.name,
        f"{one.bucket:,}",
        f"{one.rows:,}" if one.rows else "-",
        f"{one.times:,}",
        f"{one.memory / _GIB:.1f}" if one.memory else "-",
        Text("yes" if fits else "no", style="green" if fits else "bold red"),
        f"{one.flops:.2e}",
        f"{'' if one.exact else '>= '}{sent:.2f}",
    )
  return table


def _traffic(programs: Sequence[Measured]) -> rich.table.Table:
  """Returns what a device sends in one run of a program, at each length."""
  lengths = sorted({one.bucket for one in programs})
  table = _table("GB sent in one run, at P =", *(f"{n:,}" for n in lengths))
  rows = {}
  for one in programs:
    for name, total in sorted(one.sent.items(), key=lambda x: -x[1]):
      if total >= 1e7:
        row = rows.setdefault(f"{one.name}: {name}", {})
        row[one.bucket] = f"{total / 1e9:.2f}"
  for name, row in rows.items():
    table.add_row(name, *(row.get(n, "") for n in lengths))
  return table


def _updates(result: Result) -> rich.table.Table:
  table = _table("s an update", *_PHASES, "sum", "mostly", "FLOPs")
  for one in result.updates:
    longest = max(one.seconds, key=one.seconds.__getitem__)
    phases = (
        sum(one.seconds.get(name, 0.0) for name in names)
        for names in _PHASES.values()
    )
    table.add_row(
        f"{one.bucket:,}",
        *(f"{seconds:.1f}" for seconds in phases),
        f"{one.total:.1f}",
        f"{longest}, {one.limits[longest]}",
        f"{one.flops:.2e}",
    )
  return table


def _show(result: Result, console: rich.console.Console) -> None:
  """Prints the plan."""
  machine, chip = result.machine, result.machine.chip
  mesh = " x ".join(f"{name} {size}" for name, size in result.mesh.items())
  console.print(
      Text(f"Plan for {machine.name}: {machine.size} devices, mesh {mesh}"),
      style="bold",
  )
  for note in result.notes:
    console.print(Text(note))
  held = ", ".join(f"{n} {b / _GIB:.2f}" for n, b in result.held.items())
  console.print(Text(f"A device keeps, in GiB: {held}."))
  kind = "the compiler's word"
  if chip.platform != "tpu":
    kind = "an estimate against nine tenths of the memory; the libraries'"
    kind += " workspaces are not known"
  limit = f"{chip.memory / _GIB:.1f} GiB a device"
  console.print(Text(f"Memory: of {limit}, {kind}."))
  console.print(_programs(result.programs, machine))
  if result.mended:
    console.print(Text(f"With {result.advice[0]}:"), style="bold")
    console.print(_programs(result.mended, machine))
  programs = result.mended or result.programs
  console.print(_traffic(programs))
  least = result.least_sent
  for one in programs:
    if least and one.sent and one.name == "gradient":
      sent = sum(one.sent.values())
      text = (
          f"gradient at P = {one.bucket:,} sends {sent / 1e9:.2f} GB, the least"
          f" for this mesh is {least / 1e9:.2f}: {sent / least:.2f} times."
      )
      console.print(Text(text))
  unplanned = [s for one in programs for s in one.unplanned]
  for sentence in unplanned[:8]:
    console.print(Text(f"Unplanned: {sentence}", style="yellow"))
  if not unplanned:
    console.print(Text("No collective that is not planned."))
  console.print(_updates(result))
  console.print(Text(_assumed(result)))
  console.print(_hours(result))
  notice = command_line.NOTICE.value
  for line in planner.turns(result, _LIMIT.value, notice, _BUDGET.value):
    console.print(Text(line))
  _verdict(result, console)


def _assumed(result: Result) -> str:
  chip, a = result.machine.chip, result.assumptions
  start = (
      f"Seconds are reckoned with shares measured on {a.source}"
      if a.source
      else "Seconds are a bound from below"
  )
  assumed = f" (the share of {a.missing} is assumed)" if a.missing else ""
  return (
      f"{start}{assumed}: every rollout reaches its cap, products"
      f" run at {a.utilization:.0%} of {chip.flops / 1e12:.0f} TFLOP/s, memory"
      f" at {a.reach:.0%} of {chip.bandwidth / 1e9:.0f} GB/s, links at"
      f" {a.links:.0%} of {chip.link / 1e9:.0f} GB/s a device, one way; nothing"
      " overlaps but these three; every answer of an evaluation is as long as"
      " it may be; checkpoints and compiling are left out."
  )


def _hours(result: Result) -> rich.table.Table:
  """Returns hours of the run and of its evaluations, and the price."""
  updates, *full = result.hours.items()
  graded = [(f"Evaluation, {n}", h) for n, h in result.evaluation.items()]
  rows = [*result.answers.items(), updates, *graded]
  rows += [("This run", result.total_hours), *full]
  price = result.assumptions.price * result.machine.size
  table = _table("at least", "hours", *(["price"] if price else []))
  for name, hours in rows:
    cost = [f"{price * hours:,.0f}"] if price else []
    table.add_row(name, f"{hours:.1f}", *cost)
  return table


def _verdict(result: Result, console: rich.console.Console) -> None:
  """Prints whether it fits, how long it takes and what it costs."""
  hours, price = result.total_hours, result.assumptions.price
  takes = f"takes at least {hours:.1f} h with all answers at full length"
  if price:
    takes += f", which costs {price * result.machine.size * hours:,.0f}"
  if result.fits:
    console.print(Text(f"It fits, and {takes}.", style="bold green"))
    return
  console.print(Text("It does not fit.", style="bold red"))
  mended = all(one.verdict(result.machine) for one in result.mended)
  for i, sentence in enumerate(result.advice):
    if result.mended and mended and not i:
      console.print(Text(f"It fits with {sentence}"))
      console.print(Text(f"With that it {takes}."))
    else:
      console.print(Text(sentence))


def _short(result: Result) -> str:
  """Returns a sentence with the numbers of what does not fit."""
  limit = f"{result.machine.chip.memory / _GIB:.2f} GiB"
  return "; ".join(
      f"{one.name} at P = {one.bucket:,}"
      f" {one.refused or f'takes {one.memory / _GIB:.1f} of {limit}'}"
      for one in result.programs
      if not one.verdict(result.machine)
  )


def main() -> None:
  logging.set_verbosity(logging.ERROR)
  check(
      bool(_TOPOLOGY.value),
      f"--topology is missing; there are {known_machines()}.",
  )
  _check_json()
  question = planner.Question(
      command_line.config(),
      parse_machine(_TOPOLOGY.value),
      planner.read_lengths(_PREFIX.value),
      _MESH.value,
      _assumptions(),
      _SEARCH.value,
  )
  try:
    result = planner.plan(question, rich.console.Console(stderr=True))
  except TooLargeError as error:
    _end(f"error: {error}", 1)
  _show(result, rich.console.Console())
  if _JSON.value:
    found = dataclasses.asdict(result) | {"fits": result.fits}
    text = json.dumps(found, indent=2)
    pathlib.Path(_JSON.value).expanduser().write_text(text + "\n")
  if not result.fits:
    _end(f"error: {_short(result)}.", 1)


def _end(sentence: str, status: int) -> NoReturn:
  print(sentence, file=sys.stderr)
  sys.exit(status)


def start() -> None:
  """Reads the command line and plans."""
  try:
    command_line.run(main, __doc__)
  except SystemExit as ended:
    if isinstance(ended.code, str):  # A sentence on what was asked.
      _end(ended.code, 2)
    raise


if __name__ == "__main__":
  start()
