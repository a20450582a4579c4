"""What the plan says, as tables; and as JSON for scripts."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import rich.box
import rich.console
import rich.table
from rich.text import Text

from prefix_distill.plan.estimate import Assumptions
from prefix_distill.plan.machines import Machine
from prefix_distill.plan.programs import Measured

_GIB = 2**30
# The phases as a run's metrics call them, and their programs.
_PHASES = {
    "sample": ("move", "prefill", "layout", "decode"),
    "score": ("score",),
    "update": ("gradient", "apply"),
}


@dataclasses.dataclass(frozen=True)
class Update:
  """An update whose cap ends in a bucket.

  Attributes:
    bucket: P.
    seconds: least time, by program.
    limits: what limits each program's time.
    flops: FLOPs in all.
  """

  bucket: int
  seconds: dict[str, float]
  limits: dict[str, str]
  flops: float

  @property
  def total(self) -> float:
    return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Result:
  """The whole plan.

  Attributes:
    machine: the machine that was planned for.
    mesh: sizes of the axes.
    notes: what was assumed, in sentences.
    held: bytes on a device that a run keeps throughout.
    programs: the programs that were compiled.
    mended: the programs with other settings, if the first do not fit or larger
      batches were looked for.
    updates: one for each bucket.
    hours: least time of the run's updates, and of full distillation's.
    evaluation: hours of a run's evaluations, by what is evaluated.
    least_sent: bytes that one run of `gradient` has to send.
    advice: the settings of `mended`, or what cannot be made to fit.
    assumptions: what seconds are reckoned with.
  """

  machine: Machine
  mesh: dict[str, int]
  notes: list[str]
  held: dict[str, float]
  programs: list[Measured]
  mended: list[Measured]
  updates: list[Update]
  hours: dict[str, float]
  evaluation: dict[str, float]
  least_sent: float
  advice: list[str]
  assumptions: Assumptions

  @property
  def fits(self) -> bool:
    return all(one.verdict(self.machine) for one in self.programs)


def as_json(result: Result) -> dict[str, Any]:
  """Returns the result for a file."""
  return dataclasses.asdict(result) | {"fits": result.fits}


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


def show(result: Result, console: rich.console.Console) -> None:
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
  (updates, hours), full = result.hours.items()
  rows = [(f"Evaluation, {n}", h) for n, h in result.evaluation.items()]
  total = hours + sum(result.evaluation.values())
  rows = [(updates, hours), *rows, ("This run", total), full]
  price = result.assumptions.price * result.machine.size
  table = _table("at least", "hours", *(["price"] if price else []))
  for name, hours in rows:
    cost = [f"{price * hours:,.0f}"] if price else []
    table.add_row(name, f"{hours:.1f}", *cost)
  return table


def _verdict(result: Result, console: rich.console.Console) -> None:
  if result.fits:
    console.print(Text("It fits.", style="bold green"))
    return
  console.print(Text("It does not fit.", style="bold red"))
  mended = all(one.verdict(result.machine) for one in result.mended)
  for i, sentence in enumerate(result.advice):
    starts = "It fits with " if result.mended and mended and not i else ""
    console.print(Text(starts + sentence))


def short(result: Result) -> str:
  """Returns a sentence with the numbers of what does not fit."""
  limit = f"{result.machine.chip.memory / _GIB:.2f} GiB"
  return "; ".join(
      f"{one.name} at P = {one.bucket:,}"
      f" {one.refused or f'takes {one.memory / _GIB:.1f} of {limit}'}"
      for one in result.programs
      if not one.verdict(result.machine)
  )
