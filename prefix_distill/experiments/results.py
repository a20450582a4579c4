"""Gathers the runs of `reproduce` into tables and figures; no jax."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from prefix_distill.report import metrics as metrics_lib  # noqa: E402

Row = dict[str, Any]
_KEPT = ("step", "flops", "accuracy", "finish_rate", "mean_length",
         "repetition")  # fmt: skip
# The figure of the README: cells that are methods, and not ablations.
_MAIN = ("full", "seqkd", "fixed-16", "fixed-64", "linear", "plateau",
         "random", "audited")  # fmt: skip
# Accuracies on the figure's axis, and the smallest error that it shows.
_TICKS = (0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
_LEAST = 0.005


def read(workdir: pathlib.Path, cells: Sequence[str]) -> list[Row]:
  """Reads the evaluations of all finished runs; one row each."""
  rows = []
  for student in ("capable", "weak"):
    for cell in cells:
      for place in sorted((workdir / student / cell).glob("*")):
        if not (place / "export").is_dir():
          continue
        for line in metrics_lib.read(place / "metrics.jsonl"):
          if line.get("mode") == "sampled" and line["model"] == "student":
            rows.append(
                {"student": student, "cell": cell, "seed": int(place.name)}
                | {name: line[name] for name in _KEPT}
                | {"problems": line["problems"]}
            )
  return rows


def interval(rows: Sequence[Row]) -> tuple[float, float, float]:
  """Returns mean accuracy and its 95 % interval over seeds and problems.

  The variance of the mean is that of the seeds' means (which holds that of
  the problems as well), but at least that of as many independent trials.
  """
  values = np.array([r["accuracy"] for r in rows])
  mean, n = values.mean(), len(values)
  trials = mean * (1 - mean) / sum(r["problems"] for r in rows)
  seeds = values.var(ddof=1) / n if n > 1 else 0.0
  # Student's t for two degrees of freedom at three seeds and so on.
  t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(n, 1.96)
  half = max(1.96 * trials**0.5, t * seeds**0.5)
  return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def last(rows: Sequence[Row], student: str, cell: str) -> list[Row]:
  """Returns each seed's last evaluation."""
  mine = [r for r in rows if (r["student"], r["cell"]) == (student, cell)]
  seeds = sorted({r["seed"] for r in mine})
  return [
      max((r for r in mine if r["seed"] == s), key=lambda r: r["step"])
      for s in seeds
  ]


def curve(
    rows: Sequence[Row], student: str, cell: str
) -> list[list[Row]]:
  """Returns the seeds' evaluations along the run.

  At each update at which some seed was evaluated, every seed's latest: one
  that ended before stays where it ended.
  """
  mine = [r for r in rows if (r["student"], r["cell"]) == (student, cell)]
  seeds = {
      seed: sorted(
          (r for r in mine if r["seed"] == seed), key=lambda r: r["step"]
      )
      for seed in sorted({r["seed"] for r in mine})
  }
  return [
      [
          max((r for r in runs if r["step"] <= step), key=lambda r: r["step"])
          for runs in seeds.values()
      ]
      for step in sorted({r["step"] for r in mine})
  ]


def reached(rows: Sequence[Row], student: str, cell: str) -> float | None:
  """Returns the FLOPs at which the mean accuracy enters full's interval.

  The lower end of the 95 % interval of full distillation's final accuracy is
  what has to be reached; None if it never is.
  """
  full = last(rows, student, "full")
  if not full:
    return None
  goal = interval(full)[1]
  for at in curve(rows, student, cell):
    if np.mean([r["accuracy"] for r in at]) >= goal:
      return float(np.mean([r["flops"] for r in at]))
  return None


def _cells(values: Sequence[Any]) -> str:
  return "| " + " | ".join(str(v) for v in values) + " |"


def table(rows: Sequence[Row], student: str, cells: Mapping[str, str]) -> str:
  """Returns a student's table in Markdown."""
  head = ("", "seeds", "updates", "accuracy, % (95 %)", "finish, %", "tokens",
          "FLOPs", "of full's", "FLOPs to full's accuracy")  # fmt: skip
  out = [_cells(head), _cells(["---"] * len(head))]
  full = last(rows, student, "full")
  whole = np.mean([r["flops"] for r in full]) if full else None
  start = [
      r for r in rows
      if r["student"] == student and r["step"] == 0 and r["cell"] == "full"
  ]  # fmt: skip
  entries = [("before", start)] if start else []
  entries += [(name, last(rows, student, name)) for name in cells]
  # What the same runs had reached on a smaller budget.
  for place, cell, step, name in (
      (1, "full", 10, "full, 10 updates"),
      (3, "seqkd", 20, "SeqKD, 20 updates"),
  ):
    early = [
        r for r in rows
        if (r["student"], r["cell"], r["step"]) == (student, cell, step)
    ]  # fmt: skip
    if early:
      entries.insert(place, (name, early))
  for name, found in entries:
    if not found:
      continue
    mean, low, high = interval(found)
    spent = float(np.mean([r["flops"] for r in found]))
    goal = reached(rows, student, name) if name in cells else None
    out.append(
        _cells((
            cells.get(name, name),
            len(found),
            f"{np.mean([r['step'] for r in found]):.0f}",
            f"{100 * mean:.1f} ({100 * low:.1f}-{100 * high:.1f})",
            f"{100 * np.mean([r['finish_rate'] for r in found]):.1f}",
            f"{np.mean([r['mean_length'] for r in found]):.0f}",
            f"{spent:.2g}" if spent else "-",
            f"{spent / whole:.0%}" if whole and spent else "-",
            f"{goal:.2g} ({goal / whole:.0%})" if goal and whole else "-",
        ))
    )
  return "\n".join(out) + "\n"


def draw(rows: Sequence[Row], cells: Sequence[str], path: pathlib.Path) -> None:
  """Draws accuracy against cumulative FLOPs, a panel for each student.

  The axis is logarithmic in what is wrong, or all methods would lie on one
  line at the top.
  """
  students = [s for s in ("capable", "weak")
              if any(r["student"] == s for r in rows)]  # fmt: skip
  figure, panels = plt.subplots(
      1, len(students), figsize=(5.2 * len(students), 4.2), squeeze=False,
      sharey=True,
  )  # fmt: skip
  colors = plt.get_cmap("tab10")
  for axes, student in zip(panels[0], students, strict=True):
    for i, cell in enumerate(cells):
      points = [
          (np.mean([r["flops"] for r in at]), *interval(at))
          for at in curve(rows, student, cell)
          if all(r["flops"] for r in at)
      ]
      if not points:
        continue
      x, mean, low, high = np.array(points).T
      mean, low, high = (np.maximum(1 - y, _LEAST) for y in (mean, low, high))
      # The end of a run is what its table says; the way there needs no bars.
      axes.plot(x, mean, marker="o", markersize=3, linewidth=1.2, label=cell,
                color=colors(i % 10))  # fmt: skip
      axes.errorbar(
          x[-1:], mean[-1:], (mean[-1:] - high[-1:], low[-1:] - mean[-1:]),
          fmt="o", markersize=6, elinewidth=1, capsize=3, color=colors(i % 10),
      )  # fmt: skip
    axes.set(title=f"{student} student", xlabel="cumulative FLOPs",
             xscale="log")  # fmt: skip
    axes.set(yscale="log", ylim=(0.95, _LEAST * 0.9))
    axes.set_yticks([1 - y for y in _TICKS], [f"{y:.0%}" for y in _TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0][0].set_ylabel("accuracy, sampled (log scale of errors)")
  panels[0][-1].legend(frameon=False, fontsize=8, loc="center left",
                       bbox_to_anchor=(1, 0.5))  # fmt: skip
  figure.tight_layout()
  figure.savefig(path, dpi=130)
  plt.close(figure)


def gather(
    workdir: pathlib.Path, cells: Mapping[str, str], out: pathlib.Path
) -> None:
  """Writes `results.jsonl`, `tables.md` and the figures, and prints tables."""
  rows = read(workdir, list(cells))
  if not rows:
    print(f"No finished runs in {workdir}.")
    return
  out.mkdir(parents=True, exist_ok=True)
  with (out / "results.jsonl").open("w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  parts = []
  for student in ("capable", "weak"):
    if any(r["student"] == student for r in rows):
      parts.append(f"## {student} student\n\n" + table(rows, student, cells))
  (out / "tables.md").write_text("\n".join(parts))
  print("\n".join(parts))
  draw(rows, _MAIN, out / "accuracy_flops.png")
