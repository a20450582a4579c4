"""The report's pictures."""

from collections.abc import Sequence
import functools
import html
import math
import pathlib
from typing import Any

import matplotlib
from matplotlib import colors
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from prefix_distill.report import report
from prefix_distill.report.report import Line

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.hashsalt": "prefix_distill",  # The same picture is the same file.
}
_styled = matplotlib.rc_context(_STYLE)

# Panels of the agreement picture: title, unit, and the label of each field's
# curve. A panel is drawn if its first field was measured.
_AGREEMENT = (
    (
        "Same most probable token",
        "share of tokens",
        {"top1_agreement": "student and teacher"},
    ),
    (
        "Entropy",
        "nats per token",
        {"entropy_student": "student", "entropy_teacher": "teacher"},
    ),
    (
        "Reverse KL",
        "nats per token",
        {"kl_special": "special tokens", "kl": "all tokens"},
    ),
)
# On a linear scale, half of the values may lie in this part at the bottom.
_FLAT = 20
# What `draw` draws, and a sentence on each.
CAPTIONS = {
    "accuracy_flops.svg": (
        "How many problems the student answers right, over the FLOPs that"
        " training has spent; bars are 95 % intervals, and dashed lines the"
        " teacher."
    ),
    "answers_kl.svg": (
        "How far the student's whole answers are from the teacher, over the"
        " FLOPs that training has spent: the exact reverse KL of an answer,"
        " which tells students apart that are hardly ever right."
    ),
    "termination.svg": (
        "Above, how many answers end by themselves, beside the training"
        " rollouts that the cap cuts; below, how long both are."
    ),
    "kl_step.svg": (
        "How far the student's next tokens are from the teacher's on the"
        " student's own prefixes, and how many tokens were compared."
    ),
    "kl_position.svg": (
        "Where in the answer student and teacher differ, averaged over each"
        " quarter of the run."
    ),
    "agreement.svg": (
        "How often both models would choose the same token, how unsure each of"
        " them is, and what special tokens such as the stop cost."
    ),
    "loss_step.svg": (
        "How unlikely the given answers are to the student, and how many"
        " tokens it learned from."
    ),
}
# The bins of `signal_against_position`, in tokens.
_BIN = 8


def _save(figure: Figure, path: pathlib.Path) -> str:
  more = {}
  if path.suffix == ".svg":  # The page has a background, light or dark.
    more = {"transparent": True, "metadata": {"Date": None}}
  figure.savefig(path, **more)
  return path.name


def _label(axes: Any, title: str, x: str, y: str) -> None:
  axes.set(title=title, xlabel=x, ylabel=y)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
  figure = Figure(figsize=(5.4, 4), layout="constrained")
  axes = figure.subplots()
  _label(axes, title, x, y)
  return figure, axes


def _panels(count: int) -> tuple[Figure, Sequence[Any]]:
  """Returns a figure, and axes below each other over the same updates."""
  size = (5.4, 0.5 + 2.5 * count)
  figure = Figure(figsize=size, layout="constrained")
  panels = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
  _count(panels[-1].xaxis)
  return figure, panels


def _count(axis: Any) -> None:
  """Puts ticks on whole numbers: there is no half of an update."""
  axis.set_major_locator(ticker.MaxNLocator(8, integer=True, min_n_ticks=1))


def _legend(axes: Any, **more: Any) -> None:
  """Puts the legend below the axes, where no curve is."""
  below = -0.2 if axes.get_xlabel() else -0.04
  axes.legend(
      loc="upper center", bbox_to_anchor=(0.5, below), ncols=2, fontsize=9,
      **more,
  )


def _scale(axes: Any) -> None:
  """Begins at 0, or takes a log scale if most values would lie on 0.

  What is smaller than a hundred-thousandth of the largest value is left out.
  """
  values = np.concatenate([[0.0], *(x.get_ydata() for x in axes.get_lines())])
  values = values[np.isfinite(values) & (values > 0)]
  if not len(values) or np.median(values) >= values.max() / _FLAT:
    axes.set_ylim(bottom=0)
    return
  axes.set_yscale("log", nonpositive="mask")
  axes.set_ylim(bottom=0.8 * max(values.min(), values.max() / 1e5))


def _curve(axes: Any, lines: Sequence[Line], name: str, **style: Any) -> Any:
  """Draws a field over the updates; null, which stands for NaN, is a gap."""
  values = [math.nan if x[name] is None else x[name] for x in lines]
  return axes.plot([x["step"] for x in lines], values, **style)[0]


def _accuracy(axes: Any, lines: Sequence[Line], x: str, label: str) -> Any:
  """Draws accuracies over a field, in percent, with their intervals."""
  names = ("accuracy", "accuracy_low", "accuracy_high")
  rows = [[100 * line[name] for name in names] for line in lines]
  mean, low, high = np.reshape(rows, (-1, 3)).T
  axes.set_ylim(0, 100)
  return axes.errorbar(
      [line[x] for line in lines],
      mean,
      (mean - low, high - mean),
      fmt="o-",
      capsize=3,
      label=label,
  )


def _updates(first: int, last: int) -> str:
  return f"update {first}" if first == last else f"updates {first}-{last}"


@_styled
def accuracy_against_flops(
    lines: Sequence[Line], path: pathlib.Path, label: str
) -> str:
  """Draws each set's sampled accuracy over cumulative training FLOPs."""
  figure, axes = _axes(
      "Accuracy against training FLOPs",
      "cumulative FLOPs",
      "accuracy, sampled (%)",
  )
  sampled = report.evaluations(lines, mode="sampled")
  for dataset in sorted({x["set"] for x in sampled}):
    mine = [x for x in sampled if x["set"] == dataset]
    students = [x for x in mine if x["model"] == "student"]
    drawn = _accuracy(axes, students, "flops", f"student, {label}, {dataset}")
    for x in mine:
      if x["model"] == "teacher":
        axes.axhline(
            100 * x["accuracy"],
            linestyle="--",
            color=drawn.lines[0].get_color(),
            label=f"teacher, {dataset}",
        )
  _legend(axes)
  return _save(figure, path)


@_styled
def loss_against_step(
    lines: Sequence[Line], path: pathlib.Path, name: str, title: str
) -> str:
  """Draws the loss per token, and the prefix length beside it."""
  updates = [x for x in lines if name in x]
  figure, axes = _axes(title, "update", "nats per token")
  _curve(axes, updates, name, color="C0", label=title)
  _scale(axes)
  _count(axes.xaxis)
  right = axes.twinx()
  right.plot(
      [x["step"] for x in updates],
      [x["rollout_len"] for x in updates],
      color="C1",
      label="mean tokens supervised",
  )
  right.set_ylabel("tokens per rollout")
  right.set_ylim(bottom=0)
  right.spines["right"].set_visible(True)
  right.grid(False)
  _legend(axes, handles=axes.get_lines() + right.get_lines())
  return _save(figure, path)


@_styled
def kl_against_position(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws KL in bins of positions, averaged over quarters of the run."""
  updates = [x for x in lines if "kl" in x]
  figure, axes = _axes(
      "Reverse KL by position in the answer",
      "position (tokens)",
      "nats per token",
  )
  shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 4))
  bounds = [i * len(updates) // 4 for i in range(5)]
  for start, end, color in zip(bounds, bounds[1:], shades, strict=False):
    part = updates[start:end]
    bins: dict[int, list[float]] = {}
    for line in part:
      for name, value in line.items():
        if name.startswith("kl_at_"):
          bins.setdefault(int(name.removeprefix("kl_at_")), []).append(value)
    if bins:
      axes.plot(
          sorted(bins),
          [np.mean(bins[position]) for position in sorted(bins)],
          "o-",
          color=color,
          label=_updates(part[0]["step"], part[-1]["step"]),
      )
  _scale(axes)
  _count(axes.xaxis)
  if axes.get_legend_handles_labels()[0]:
    _legend(axes)
  return _save(figure, path)


@_styled
def answers_kl_against_flops(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws the reverse KL of whole answers over cumulative training FLOPs."""
  figure, axes = _axes(
      "Distance of whole answers from the teacher",
      "cumulative FLOPs",
      "reverse KL (nats per answer)",
  )
  scored = [x for x in lines if x.get("answer_kl") is not None]
  for dataset in sorted({x["set"] for x in scored}):
    mine = [x for x in scored if x["set"] == dataset]
    axes.plot(
        [x["flops"] for x in mine],
        [x["answer_kl"] for x in mine],
        "o-",
        label=f"student, {dataset}",
    )
  _scale(axes)
  _legend(axes)
  return _save(figure, path)


@_styled
def termination(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws how many answers end, and how long they are, over the updates."""
  figure, (ends, lengths) = _panels(2)
  _label(ends, "Do answers end?", "", "share of answers")
  _label(lengths, "Length of answers", "update", "tokens")
  sampled = report.evaluations(lines, mode="sampled", model="student")
  for dataset in sorted({x["set"] for x in sampled}):
    mine = [x for x in sampled if x["set"] == dataset]
    label = f"{dataset}: end by themselves"
    drawn = _curve(ends, mine, "finish_rate", marker="o", label=label)
    style = {"color": drawn.get_color()}
    label = f"{dataset}: mean"
    _curve(lengths, mine, "mean_length", marker="o", label=label, **style)
    label, style["linestyle"] = f"{dataset}: 95th percentile", "--"
    _curve(lengths, mine, "length_p95", marker="v", label=label, **style)
  updates = [x for x in lines if "rollout_len_p95" in x]
  if updates:
    # Broad and behind: both fractions are 1 while the cap is short.
    style = {"color": "0.75", "linewidth": 3, "zorder": 1}
    _curve(ends, updates, "cut", label="training: cut at the cap", **style)
    _curve(lengths, updates, "prefix_len", label="training: cap", **style)
  ends.set_ylim(-0.03, 1.03)
  lengths.set_ylim(bottom=0)
  for axes in (ends, lengths):
    _legend(axes)
  return _save(figure, path)


@_styled
def agreement(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws how student and teacher differ on the rollouts."""
  panels = _agreement_panels(lines)
  figure, all_axes = _panels(len(panels))
  for axes, (title, unit, names) in zip(all_axes, panels, strict=True):
    _label(axes, title, "", unit)
    for name, label in names.items():
      if updates := [x for x in lines if name in x]:
        _curve(axes, updates, name, marker=".", label=label)
    if axes is all_axes[-1]:
      axes.set_xlabel("update")
    if name.startswith("kl"):
      _scale(axes)
    _legend(axes)
  return _save(figure, path)


def _agreement_panels(lines: Sequence[Line]) -> list[tuple]:
  return [
      panel
      for panel in _AGREEMENT
      if any(next(iter(panel[2])) in x for x in lines)
  ]


@_styled
def signal_against_position(found: dict[str, Any], path: pathlib.Path) -> str:
  """Draws |log ratio| and exact KL over positions, in bins of 8 tokens."""
  figure = Figure(figsize=(10, 4), layout="constrained")
  panels = figure.subplots(1, 2)
  titles = {
      "log_ratio": "|log p_S - log p_T| of sampled tokens",
      "kl": "exact reverse KL",
  }
  for axes, (name, title) in zip(panels, titles.items(), strict=True):
    for student, values in found.items():
      count = np.array(values["rollouts"])
      starts = np.arange(0, len(count), _BIN)
      weights = np.add.reduceat(count, starts)
      total = np.add.reduceat(count * np.array(values[name]), starts)
      some = weights > 0
      axes.plot(
          starts[some],
          total[some] / weights[some],
          "o-",
          markersize=3,
          label=student,
      )
    _label(axes, title, "position (tokens)", "nats per token")
    axes.set_yscale("log")
  panels[1].legend(fontsize=8)
  return _save(figure, path)


@_styled
def accuracy_against_prefix(found: dict[str, Any], path: pathlib.Path) -> str:
  """Draws the student's accuracy over the length of a teacher's prefix."""
  figure, axes = _axes(
      "The student continues the teacher's prefix",
      "tokens of the teacher's answer",
      "accuracy, sampled (%)",
  )
  for name, rows in found.items():
    _accuracy(axes, rows, "length", name)
    axes.plot(
        [row["length"] for row in rows],
        [100 * row["accuracy_alone"] for row in rows],
        "--",
        color="gray",
        label=f"{name}, same problems without a prefix",
    )
  axes.legend()
  return _save(figure, path)


def draw(
    lines: Sequence[Line],
    directory: pathlib.Path,
    method: str,
    kind: str = "svg",
) -> list[str]:
  """Draws the pictures that the metrics allow; returns their file names.

  A picture that cannot be drawn is a warning: no picture is worth a run.
  """
  # In a label, dollars would begin a formula.
  lines = [
      line | {"set": line["set"].replace("$", r"\$")}
      if "set" in line
      else line
      for line in lines
  ]
  fields = set().union(*lines)
  kl, cross_entropy = (
      functools.partial(loss_against_step, name=name, title=title)
      for name, title in (
          ("kl", "Reverse KL"),
          ("cross_entropy", "Cross-entropy"),
      )
  )
  accuracy = functools.partial(accuracy_against_flops, label=method)
  pictures = (
      ("mode" in fields, "accuracy_flops.svg", accuracy),
      ("answer_kl" in fields, "answers_kl.svg", answers_kl_against_flops),
      ("finish_rate" in fields, "termination.svg", termination),
      ("kl" in fields, "kl_step.svg", kl),
      ("kl" in fields, "kl_position.svg", kl_against_position),
      (_agreement_panels(lines), "agreement.svg", agreement),
      ("cross_entropy" in fields, "loss_step.svg", cross_entropy),
  )
  out = []
  for wanted, name, picture in pictures:
    name = name.replace("svg", kind)
    if wanted:
      try:
        out.append(picture(lines, directory / name))
      except Exception as error:  # pylint: disable=broad-except
        print(f"Warning: {name} could not be drawn ({error}).", flush=True)
  return out


def shade(tokens: Sequence[str], values: Sequence[float], top: float) -> str:
  """Returns HTML: tokens on a background from white (0) to red (`top`).

  Args:
    tokens: decoded one by one.
    values: one for each token, in nats; the mouse pointer shows it.
    top: values from here on are full red.
  """
  reds = matplotlib.colormaps["Reds"]
  spans = []
  for token, value in zip(tokens, values, strict=True):
    color = colors.to_hex(reds(0.8 * min(max(value / top, 0.0), 1.0)))
    text = html.escape(token).replace("\n", "&crarr;<br>")
    spans.append(
        f'<span title="{value:.3f} nats"'
        f' style="background:{color};color:#000">{text}</span>'
    )
  return (
      '<div style="font-family:monospace;white-space:pre-wrap;line-height:1.6;'
      f'background:#fff;padding:8px">{"".join(spans)}</div>'
  )


@_styled
def cosine_against_prefix(found: dict[str, Any], path: pathlib.Path) -> str:
  """Draws how a prefix's gradient points beside that of the whole rollout."""
  figure, axes = _axes(
      "Gradient of the loss on a prefix",
      "tokens of the prefix",
      "cosine with the whole gradient",
  )
  for i, (name, values) in enumerate(found.items()):
    rows = values["prefixes"]
    x, y = ([row[key] for row in rows] for key in ("length", "cosine"))
    axes.plot(x, y, "o-", color=f"C{i}", label=name)
    axes.axhline(values["halves"], color=f"C{i}", linestyle=":", linewidth=1)
  axes.set_ylim(top=1.02)
  axes.legend(title="dotted: two halves of the whole", title_fontsize=8)
  return _save(figure, path)
