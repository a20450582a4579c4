"""The report's pictures."""

from collections.abc import Sequence
import html
import math
import pathlib
from typing import Any

import matplotlib
from matplotlib import colors

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # pylint: disable=wrong-import-position

Line = dict[str, Any]

# Panels of the agreement picture: title, unit, and what each curve is called.
# The first of its fields says whether a panel is drawn.
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


def _save(figure: Any, path: pathlib.Path) -> str:
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path.name


def _label(axes: Any, title: str, x: str, y: str) -> None:
  axes.set(title=title, xlabel=x, ylabel=y)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
  figure, axes = plt.subplots(figsize=(6, 4))
  _label(axes, title, x, y)
  return figure, axes


def _panels(count: int) -> tuple[Any, list[Any]]:
  """Returns a figure with axes below each other, over the same updates."""
  figure, axes = plt.subplots(
      count, figsize=(8, 0.5 + 2.5 * count), sharex=True, squeeze=False
  )
  return figure, list(axes[:, 0])


def _legend_beside(axes: Any) -> None:
  axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")


def _curve(axes: Any, lines: Sequence[Line], name: str, **style: Any) -> Any:
  """Draws a field over the updates; what JSON has no number for is a gap."""
  values = [math.nan if x[name] is None else x[name] for x in lines]
  return axes.plot([x["step"] for x in lines], values, **style)[0]


def accuracy_against_flops(
    lines: Sequence[Line], path: pathlib.Path, label: str
) -> str:
  """Draws each set's sampled accuracy over cumulative training FLOPs."""
  figure, axes = _axes(
      "Accuracy against training FLOPs", "cumulative FLOPs",
      "accuracy, sampled (%)",
  )  # fmt: skip
  sampled = [x for x in lines if x.get("mode") == "sampled"]
  for dataset in sorted({x["set"] for x in sampled}):
    mine = [
        x for x in sampled if x["set"] == dataset and x["model"] == "student"
    ]
    mean = [100 * x["accuracy"] for x in mine]
    below = [100 * (x["accuracy"] - x["accuracy_low"]) for x in mine]
    above = [100 * (x["accuracy_high"] - x["accuracy"]) for x in mine]
    drawn = axes.errorbar(
        [x["flops"] for x in mine], mean, (below, above), fmt="o-", capsize=3,
        label=f"student, {label}, {dataset}",
    )  # fmt: skip
    for x in sampled:
      if x["set"] == dataset and x["model"] == "teacher":
        axes.axhline(
            100 * x["accuracy"], linestyle="--",
            color=drawn.lines[0].get_color(), label=f"teacher, {dataset}",
        )  # fmt: skip
  axes.set_ylim(0, 100)
  axes.legend(frameon=False)
  return _save(figure, path)


def loss_against_step(
    lines: Sequence[Line], path: pathlib.Path, name: str, title: str
) -> str:
  """Draws the loss per token, and the prefix length beside it."""
  updates = [x for x in lines if name in x]
  figure, axes = _axes(title, "update", "nats per token")
  steps = [x["step"] for x in updates]
  axes.plot(steps, [x[name] for x in updates], color="C0", label=title)
  axes.set_ylim(bottom=0)
  right = axes.twinx()
  right.plot(
      steps, [x["rollout_len"] for x in updates], color="C1", alpha=0.7,
      label="mean tokens supervised",
  )  # fmt: skip
  right.set_ylabel("tokens per rollout")
  right.set_ylim(bottom=0)
  right.spines["top"].set_visible(False)
  handles = axes.get_lines() + right.get_lines()
  axes.legend(handles, [h.get_label() for h in handles], frameon=False)
  return _save(figure, path)


def kl_against_position(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws KL in bins of positions, averaged over quarters of the run."""
  updates = [x for x in lines if "kl" in x]
  figure, axes = _axes(
      "Reverse KL by position in the answer", "position (tokens)",
      "nats per token",
  )  # fmt: skip
  colors = plt.get_cmap("viridis")
  quarters = 4
  for q in range(quarters):
    part = updates[
        q * len(updates) // quarters : (q + 1) * len(updates) // quarters
    ]
    bins: dict[int, list[float]] = {}
    for line in part:
      for name, value in line.items():
        if name.startswith("kl_at_"):
          bins.setdefault(int(name.removeprefix("kl_at_")), []).append(value)
    if not bins:
      continue
    starts = sorted(bins)
    axes.plot(
        starts, [sum(bins[s]) / len(bins[s]) for s in starts], "o-",
        color=colors(q / (quarters - 1) * 0.9),
        label=f"updates {part[0]['step']}-{part[-1]['step']}",
    )  # fmt: skip
  axes.set_ylim(bottom=0)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False)
  return _save(figure, path)


def termination(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws which answers end and how long they are, over the updates."""
  figure, (ends, lengths) = _panels(2)
  _label(ends, "Do answers end?", "", "share of answers")
  _label(lengths, "Length of answers", "update", "tokens")
  sampled = [
      x
      for x in lines
      if x.get("mode") == "sampled" and x["model"] == "student"
  ]
  for dataset in sorted({x["set"] for x in sampled}):
    mine = [x for x in sampled if x["set"] == dataset]
    color = _curve(
        ends, mine, "finish_rate", marker="o",
        label=f"{dataset}: end by themselves",
    ).get_color()  # fmt: skip
    _curve(
        lengths, mine, "mean_length", marker="o", color=color,
        label=f"{dataset}: mean",
    )  # fmt: skip
    _curve(
        lengths, mine, "length_p95", marker="v", linestyle="--", color=color,
        label=f"{dataset}: 95th percentile",
    )  # fmt: skip
  updates = [x for x in lines if "rollout_len_p95" in x]
  if updates:
    # Broad and behind, for both shares are 1 while the cap is short.
    style = {"color": "0.75", "linewidth": 3, "zorder": 1}
    _curve(ends, updates, "cut", label="training: cut at the cap", **style)
    _curve(lengths, updates, "prefix_len", label="training: cap", **style)
  ends.set_ylim(-0.03, 1.03)
  lengths.set_ylim(bottom=0)
  for axes in (ends, lengths):
    _legend_beside(axes)
  return _save(figure, path)


def agreement(lines: Sequence[Line], path: pathlib.Path) -> str:
  """Draws how student and teacher differ on the rollouts, where measured."""
  panels = _agreement_panels(lines)
  figure, all_axes = _panels(len(panels))
  for axes, (title, unit, names) in zip(all_axes, panels, strict=True):
    _label(axes, title, "", unit)
    for name, label in names.items():
      if updates := [x for x in lines if name in x]:
        _curve(axes, updates, name, marker=".", label=label)
    _legend_beside(axes)
  all_axes[-1].set_xlabel("update")
  return _save(figure, path)


def _agreement_panels(lines: Sequence[Line]) -> list[tuple]:
  return [
      panel
      for panel in _AGREEMENT
      if any(next(iter(panel[2])) in x for x in lines)
  ]


def signal_against_position(
    found: dict[str, Any], path: pathlib.Path, width: int = 8
) -> str:
  """Draws |log ratio| and exact KL over positions, in bins of `width`."""
  figure, panels = plt.subplots(1, 2, figsize=(10, 4))
  titles = {"log_ratio": "|log p_S - log p_T| of drawn tokens",
            "kl": "exact reverse KL"}  # fmt: skip
  for axes, (name, title) in zip(panels, titles.items(), strict=True):
    for student, values in found.items():
      count = values["rollouts"]
      total = [v * n for v, n in zip(values[name], count, strict=True)]
      starts = range(0, len(count), width)
      bins = [
          (i, sum(total[i : i + width]) / sum(count[i : i + width]))
          for i in starts
          if sum(count[i : i + width])
      ]
      axes.plot(*zip(*bins, strict=True), "o-", markersize=3, label=student)
    axes.set(title=title, xlabel="position (tokens)", ylabel="nats per token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  panels[1].legend(frameon=False, fontsize=8)
  return _save(figure, path)


def accuracy_against_prefix(found: dict[str, Any], path: pathlib.Path) -> str:
  """Draws the student's accuracy over the length of a teacher's prefix."""
  figure, axes = _axes(
      "The student goes on from the teacher's prefix",
      "tokens of the teacher's answer", "accuracy, sampled (%)",
  )  # fmt: skip
  for name, rows in found.items():
    mean = [100 * r["accuracy"] for r in rows]
    below = [100 * (r["accuracy"] - r["accuracy_low"]) for r in rows]
    above = [100 * (r["accuracy_high"] - r["accuracy"]) for r in rows]
    axes.errorbar([r["length"] for r in rows], mean, (below, above),
                  fmt="o-", capsize=3, label=name)  # fmt: skip
    axes.plot([r["length"] for r in rows],
              [100 * r["accuracy_alone"] for r in rows], "--", color="gray",
              label=f"{name}, same problems without")  # fmt: skip
  axes.set_ylim(0, 100)
  axes.legend(frameon=False)
  return _save(figure, path)


def draw(
    lines: Sequence[Line], directory: pathlib.Path, method: str
) -> list[str]:
  """Draws the pictures that the metrics allow; returns their file names."""
  out = []
  if any("mode" in x for x in lines):
    out.append(
        accuracy_against_flops(
            lines, directory / "accuracy_flops.png", method
        )
    )
  if any("finish_rate" in x for x in lines):
    out.append(termination(lines, directory / "termination.png"))
  if any("kl" in x for x in lines):
    out.append(
        loss_against_step(
            lines, directory / "kl_step.png", "kl", "Reverse KL"
        )
    )
    out.append(kl_against_position(lines, directory / "kl_position.png"))
  if _agreement_panels(lines):
    out.append(agreement(lines, directory / "agreement.png"))
  if any("cross_entropy" in x for x in lines):
    out.append(
        loss_against_step(
            lines, directory / "loss_step.png", "cross_entropy",
            "Cross-entropy",
        )
    )  # fmt: skip
  return out


def shade(
    tokens: Sequence[str], values: Sequence[float], top: float | None = None
) -> str:
  """Returns HTML: tokens on a background from white (0) to red (`top`).

  Args:
    tokens: decoded one by one.
    values: one for each; it shows when the mouse rests on the token.
    top: the value that gets the full colour; the largest one if None.
  """
  top = top or max([*values, 1e-9])
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
