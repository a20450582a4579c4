"""Looks at runs: one's report again, or several in one table and one figure.

  prefix-distill report runs/math
  prefix-distill compare runs/full runs/prefix --to=runs/compared

In a comparison the first run is the one that the others are compared with. A
difference of accuracies, or of how far answers are from the teacher where
`evaluation.scored` measured that, has a 95 % interval from a paired bootstrap
over the problems of the set; it says nothing of other seeds of the same run
(`prefix_distill/experiments/reproduce.py` does runs with several).
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import sys
from typing import Any

from matplotlib.figure import Figure
import numpy as np
import rich.console
from rich.text import Text
from scipy import stats

from prefix_distill.config import Config
from prefix_distill.errors import ArgumentParser
from prefix_distill.errors import check
from prefix_distill.errors import check_path
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.report import page
from prefix_distill.report import report
from prefix_distill.train import workdir as workdir_lib

_HEADER = (
    "run",
    "method",
    "updates",
    "FLOPs",
    "time, s",
    "before, %",
    "last, %",
    "minus the first's, points",
)
_SCORED_HEADER = (
    "run",
    "teacher",
    "before, nats",
    "last, nats",
    "minus the first's, nats",
)


@dataclasses.dataclass(frozen=True)
class RunSummary:
  """A run as it is compared.

  Attributes:
    name: how tables and figures call it.
    config: its settings.
    updates: its lines of updates.
    sets: by set, the lines of the student's sampled evaluations.
  """

  name: str
  config: Config
  updates: Sequence[Mapping[str, Any]]
  sets: Mapping[str, Sequence[Mapping[str, Any]]]

  @property
  def method(self) -> str:
    """The method, and the schedule if there is one."""
    if self.config.method != "prefix":
      return self.config.method
    return f"prefix, {self.config.schedule}"


def read(workdir: pathlib.Path, name: str) -> RunSummary:
  """Reads a run; it may still go on.

  Raises:
    UserError: no run is there.
  """
  config = workdir_lib.read_config(workdir)
  lines = report.read_metrics(workdir / "metrics.jsonl")
  sampled = report.evaluations(lines, mode="sampled", model="student")
  check(
      bool(config.evaluation.sets),
      f"{workdir} has no evaluation set (evaluation.sets), so that nothing can"
      " be compared; leave it out.",
  )
  check(
      bool(sampled),
      f"{workdir} has no evaluation yet; leave it out, or wait for one.",
  )
  names = dict.fromkeys(x["set"] for x in sampled)
  return RunSummary(
      name,
      config,
      report.updates(lines),
      {n: [x for x in sampled if x["set"] == n] for n in names},
  )


def difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[float, float, float]:
  """Returns the difference of two accuracies and its 95 % interval.

  Args:
    ours: a line of an evaluation, with `verdicts`.
    theirs: one of the same problems.
  """
  first, second = (
      np.array([*map(int, x["verdicts"])], float)
      .reshape(-1, x["samples"])
      .mean(1)
      for x in (ours, theirs)
  )
  return _mean(first - second)


def _mean(found: np.ndarray) -> tuple[float, float, float]:
  """Returns the mean over problems and its 95 % interval."""
  if np.ptp(found) == 0:  # No resampling changes it.
    return found[0], found[0], found[0]
  low, high = stats.bootstrap(
      (found,),
      np.mean,
      method="percentile",
      rng=np.random.default_rng(0),
  ).confidence_interval
  return float(found.mean()), float(low), float(high)


def _same_problems(ours: RunSummary, theirs: RunSummary, name: str) -> bool:
  """Whether two runs answered the same problems with the same settings."""
  specs = [run.config.evaluation for run in (ours, theirs)]
  a, b = (
      (x.sets[name], x.max_len, x.temperature, x.top_k, x.top_p) for x in specs
  )
  x, y = (run.sets[name][-1] for run in (ours, theirs))
  return a == b and all(x[k] == y[k] for k in ("problems", "dropped"))


def _same_teacher(ours: Config, theirs: Config) -> bool:
  """Whether one teacher scored the answers of both runs, in the same way."""
  a, b = ((x.teacher.path, x.loss.merge_stop_tokens) for x in (ours, theirs))
  # A teacher that is refreshed is another one at the end of each run.
  return a == b and not (ours.teacher.refresh or theirs.teacher.refresh)


def _row(run: RunSummary, first: RunSummary, name: str) -> tuple[str, ...]:
  lines = run.sets[name]
  last = run.updates[-1] if run.updates else {"flops": 0, "seconds": 0}
  start = report.accuracy(lines[0]) if lines[0]["step"] == 0 else "-"
  shown = "-"
  if run is not first and _same_problems(run, first, name):
    values = difference(lines[-1], first.sets[name][-1])
    value, low, high = (100 * x for x in values)
    shown = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
  elif run is not first:
    shown = "other problems"
  return (
      run.name,
      run.method,
      f"{len(run.updates)}",
      f"{last['flops']:.3g}",
      f"{last['seconds']:.0f}",
      start.replace(" %", ""),
      report.accuracy(lines[-1]).replace(" %", ""),
      shown,
  )


def rows(runs: Sequence[RunSummary], name: str) -> list[tuple[str, ...]]:
  """Returns the table of a set, without its header."""
  mine = [run for run in runs if name in run.sets]
  return [_row(run, mine[0], name) for run in mine]


def _scored_row(
    run: RunSummary, first: RunSummary, name: str, teacher: str
) -> tuple[str, ...]:
  lines, theirs = run.sets[name], first.sets[name][-1]
  start, last = lines[0], lines[-1]
  shown = "-"
  if run is not first:
    same = _same_problems(run, first, name)
    counts = {len(x["answer_kls"]) for x in (last, theirs)}
    if not same or len(counts) > 1:
      shown = "other problems"
    elif not _same_teacher(run.config, first.config):
      shown = "another teacher"
    else:
      nats = (np.array(x["answer_kls"]) for x in (last, theirs))
      value, low, high = _mean(np.subtract(*nats))
      shown = f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
  return (
      run.name,
      teacher,
      f"{start['answer_kl']:.2f}" if start["step"] == 0 else "-",
      f"{last['answer_kl']:.2f}",
      shown,
  )


def scored_rows(runs: Sequence[RunSummary], name: str) -> list[tuple[str, ...]]:
  """Returns the table of how far whole answers are from the teacher.

  Without its header, and empty unless the teacher scored two runs' answers.
  """
  mine = _with_scores(runs, name)
  if len(mine) < 2:
    return []
  teachers = [pathlib.Path(run.config.teacher.path) for run in mine]
  named = list(dict.fromkeys(teachers))
  short = dict(zip(named, report.short_names(named), strict=True))
  return [
      _scored_row(run, mine[0], name, short[teacher])
      for run, teacher in zip(mine, teachers, strict=True)
  ]


def _with_scores(runs: Sequence[RunSummary], name: str) -> list[RunSummary]:
  return [
      run
      for run in runs
      if name in run.sets
      and all(x.get("answer_kl") is not None for x in run.sets[name])
  ]


def figure(runs: Sequence[RunSummary], name: str) -> Figure:
  """Draws accuracy over cumulative training FLOPs, a curve for each run.

  Below is how far answers are from the teacher, where that was measured.
  """
  scored = _with_scores(runs, name)
  size = (8, 8 if scored else 4.5)
  out = Figure(figsize=size, layout="constrained")
  panels = out.subplots(2 if scored else 1, squeeze=False)[:, 0]
  axes, colors = panels[0], {}
  for run in runs:
    lines = run.sets.get(name, ())
    if not lines:
      continue
    mean, low, high = (
        np.array([100 * x[key] for x in lines])
        for key in ("accuracy", "accuracy_low", "accuracy_high")
    )
    cost = [x["flops"] for x in lines]
    drawn = axes.plot(cost, mean, "o-", label=f"{run.name} ({run.method})")
    color = colors[run.name] = drawn[0].get_color()
    axes.fill_between(cost, low, high, alpha=0.15, color=color, linewidth=0)
  axes.set(
      title=f"{name}: sampled accuracy",
      xlabel="cumulative training FLOPs",
      ylabel="accuracy, %",
      ylim=(0, 100),
      xlim=(0, None),
  )
  for run in scored:
    lines = run.sets[name]
    panels[1].plot(
        [x["flops"] for x in lines],
        [x["answer_kl"] for x in lines],
        "o-",
        color=colors[run.name],
    )
  if scored:
    panels[1].set(
        title=f"{name}: distance of whole answers from the teacher",
        xlabel="cumulative training FLOPs",
        ylabel="reverse KL, nats per answer",
        ylim=(0, None),
        xlim=(0, None),
    )
  for each in panels:
    each.grid(alpha=0.3)
    each.spines[["top", "right"]].set_visible(False)
  out.legend(loc="outside right upper", frameon=False)
  return out


def compare(
    workdirs: Sequence[pathlib.Path],
    to: pathlib.Path | None,
    console: rich.console.Console,
) -> None:
  """Prints a table for each set, and writes a figure for each.

  Raises:
    UserError: a directory holds no run, or no set is common to two runs.
  """
  runs = [
      read(workdir, name)
      for workdir, name in zip(
          workdirs, report.short_names(workdirs), strict=True
      )
  ]
  names = list(dict.fromkeys(name for run in runs for name in run.sets))
  shared = [n for n in names if sum(n in run.sets for run in runs) > 1]
  check(
      bool(shared),
      "The runs have no evaluation set in common; they have"
      f" {', '.join(names)}.",
  )
  for name in shared:
    console.print(report.table(_HEADER, rows(runs, name), console.width, name))
    if scored := scored_rows(runs, name):
      title = f"{name}: reverse KL of whole answers to the teacher"
      table = report.table(_SCORED_HEADER, scored, console.width, title)
      console.print(table)
    if to is not None:
      file = to / f"{name.replace('/', '_')}.png"
      to.mkdir(parents=True, exist_ok=True)
      figure(runs, name).savefig(file, dpi=120)
      console.print(Text(f"Figure in {file}."), soft_wrap=True)


def _report(args: argparse.Namespace) -> None:
  given = [name for name in (args.run, args.workdir) if name]
  check(bool(given), "--workdir is missing; set it.")
  check(
      len(given) == 1,
      f"Two runs are named, {shown(args.run)} and --workdir="
      f"{shown(args.workdir)}; name one.",
  )
  check_path("workdir", given[0])
  workdir = pathlib.Path(given[0])
  workdir_lib.read_config(workdir)  # Or no run is there.
  check(
      (workdir / "metrics.jsonl").is_file(),
      f"{workdir} has no metrics.jsonl; the run has not begun yet.",
  )
  page.write(workdir)


def _compare(args: argparse.Namespace) -> None:
  check(len(args.workdirs) > 1, "Give the directories of two runs or more.")
  for name in [*args.workdirs, args.to]:
    check_path("to", name)
  to = pathlib.Path(args.to) if args.to else None
  workdirs = [pathlib.Path(name) for name in args.workdirs]
  compare(workdirs, to, rich.console.Console(highlight=False))


def start() -> None:
  """Does what the command line says, or exits with one sentence."""
  command = sys.argv[0].split()[-1]
  parser = ArgumentParser(command, __doc__)
  add, home = parser.add_argument, os.path.expanduser
  if command == "report":
    add("run", nargs="?", default="", help="The run.")
    add("--workdir", type=home, default="", help="The same, by a flag.")
  else:
    add("workdirs", nargs="*", help="Two runs or more.")
    add("--to", type=home, default="", help="A directory for figures.")
  args = parser.parse_args(sys.argv[1:])
  try:
    {"report": _report, "compare": _compare}[command](args)
  except UserError as error:
    sys.exit(f"error: {error}")
  except OSError as error:
    sys.exit(f"error: what was asked for cannot be written ({error}).")
