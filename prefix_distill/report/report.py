"""A run's lines on disk, how answers end, and what the user sees; no jax.

`metrics.jsonl` has one flat JSON object a line. From it come the lines in the
terminal, the closing table and the plots; `page` puts them together. The files
of `samples/` have a JSON object a line as well; `train/samples.py` says what is
in it.

The report says how answers end, since a distilled student may forget how to
stop. Its loss looks good and its answers are right when they end, but fewer and
fewer of them end.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import sys
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from prefix_distill.config import Config
from prefix_distill.config import LoraSpec
from prefix_distill.config import LossSpec
from prefix_distill.errors import counted
from prefix_distill.errors import JsonError
from prefix_distill.errors import parse_json
from prefix_distill.errors import UserError

Line = dict[str, Any]

SAMPLES = "samples"
# The fields that every kept rollout and every kept answer has.
_ROLLOUT = {
    "step",
    "source",
    "record",
    "prompt",
    "length",
    "finished",
    "measure",
    "ids",
    "texts",
    "special",
    "divergence",
    "student",
    "alternatives",
}
_ANSWER = {
    "step",
    "model",
    "set",
    "mode",
    "problem",
    "prompt",
    "answer",
    "text",
    "length",
    "finished",
    "right",
}
# The terminal needs the line breaks, so that all columns fit side by side.
_HEADER = (
    "",
    "sampled\n(95 %)",
    "greedy\n(95 %)",
    "finish",
    "right if\nfinished",
    "tokens\n(p95)",
    "repeats",
)
_SCORED = "nats to\nteacher"
# The report warns if the finish rate falls by more than this in training.
_FALL = 0.05


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines, without those that a kill cut short or are damaged."""
  if not path.is_file():
    return []
  out = []
  for text in path.read_bytes().split(b"\n"):
    try:
      line = parse_json(text)
    except JsonError:
      continue
    step = line.get("step") if isinstance(line, dict) else None
    if isinstance(step, int) and 0 <= step < 2**31:
      out.append(line)
  return out


def updates(lines: Sequence[Line]) -> list[Line]:
  """Returns the lines of updates; the others are of evaluations."""
  return [line for line in lines if "prefix_len" in line]


def evaluations(lines: Sequence[Line], **wanted: str) -> list[Line]:
  """Returns the lines whose fields are the wanted ones.

  Args:
    lines: of the metrics.
    **wanted: `model`, `set` and `mode`, or some of them.
  """
  return [
      line
      for line in lines
      if all(line.get(name) == value for name, value in wanted.items())
  ]


def read_samples(workdir: pathlib.Path) -> tuple[list[Line], list[Line]]:
  """Returns a run's rollouts and answers, without damaged lines."""

  def lines(name: str, fields: set[str]) -> list[Line]:
    found = read_metrics(workdir / SAMPLES / f"{name}.jsonl")
    return [line for line in found if fields <= line.keys()]

  return lines("rollouts", _ROLLOUT), lines("answers", _ANSWER)


def spread(values: Sequence[int], most: int) -> set[int]:
  """Returns at most so many of the values, evenly: the ends among them."""
  at = np.linspace(0, len(values) - 1, min(len(values), most))
  return {values[int(i)] for i in np.round(at)}


def short_names(paths: Sequence[pathlib.Path]) -> list[str]:
  """Returns the shortest ends of the paths that tell them apart."""
  whole = [path.absolute().parts for path in paths]
  for count in range(1, max(map(len, whole)) + 1):
    names = ["/".join(parts[-count:]) for parts in whole]
    if len(set(names)) == len(names):
      return names
  return [str(path) for path in paths]


class LineWriter:
  """Appends lines; a line is on the disk when `write` returns.

  Attributes:
    kept: the lines that the file already had and keeps.
  """

  def __init__(self, path: pathlib.Path, kept: list[dict[str, Any]]):
    """Opens the file, with nothing but the kept lines.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
      path.parent.mkdir(exist_ok=True)
      partial.write_text("".join(_json_line(values) for values in kept))
      partial.rename(path)
    except OSError as error:
      raise UserError(
          f"{path} cannot be written ({error.strerror}); make room, or remove"
          " what is in its place."
      ) from error
    self._path, self.kept = path, kept
    self._waiting: list[str] = []
    self._failed = False

  def write(self, values: dict[str, Any]) -> None:
    """Appends a line; if the disk fails, it is written with the next line."""
    self._waiting.append(_json_line(values))
    size = None
    try:
      with self._path.open("ab", buffering=0) as file:
        size = file.tell()
        data = "".join(self._waiting).encode()
        if file.write(data) < len(data):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
      if size is not None:
        with contextlib.suppress(OSError):
          os.truncate(self._path, size)
      if not self._failed:
        print(
            f"Warning: {self._path} cannot be written ({error.strerror}); its"
            " lines wait until it can be.",
            file=sys.stderr,
            flush=True,
        )
      self._failed = True
    else:
      self._waiting, self._failed = [], False


class MetricsWriter(LineWriter):
  """Writes `metrics.jsonl`."""

  def __init__(self, path: pathlib.Path, resume_step: int | None):
    """Opens the file.

    Args:
      path: the file.
      resume_step: keeps lines up to this step; the run writes later lines
        again. None starts with an empty file.

    Raises:
      UserError: it cannot be written.
    """
    kept = []
    if resume_step is not None:
      kept = [x for x in read_metrics(path) if x["step"] <= resume_step]
      missing = resume_step - sum("prefix_len" in x for x in kept)
      if missing > 0:
        print(
            f"Warning: {path} lacks the lines of {missing} of the first"
            f" {counted(resume_step, 'update')}; it was damaged or deleted."
            " The report will lack them too.",
            file=sys.stderr,
            flush=True,
        )
    super().__init__(path, kept)


def _json_line(values: dict[str, Any]) -> str:
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      values = {**values, name: None}  # JSON has no NaN.
  return json.dumps(values) + "\n"


def repetition(tokens: Sequence[int]) -> float:
  """Returns the fraction of an answer's 4-grams that occurred before.

    repetition = 1 - (distinct 4-grams) / (all 4-grams)

  It is 0 if no four tokens in a row occur twice, and goes to 1 in an answer
  that repeats itself.

  Args:
    tokens: the tokens of one answer; the result is 0 for fewer than four.
  """
  tokens = np.asarray(tokens).tolist()
  grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
  return 1 - len(set(grams)) / len(grams) if grams else 0.0


def length_p95(lengths: np.ndarray) -> int:
  """Returns the 95th percentile of the lengths.

  The result is one of the lengths, so it equals the cap as soon as more than
  5 % of the answers reach the cap.
  """
  return int(np.percentile(lengths, 95, method="inverted_cdf"))


# Where the positions of an answer are told apart, in tokens.
_BORDERS = (0, 16, 64, 256, 1024, 4096)


def spans(longest: int) -> list[tuple[int, int]]:
  """Returns 0 to 16, 16 to 64 and so on, the last up to the longest answer."""
  borders = [x for x in _BORDERS if x < longest]
  return [*itertools.pairwise([*borders, longest])]


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None


def divergence(nats: Sequence[np.ndarray]) -> dict[str, Any]:
  """Summarizes the reverse KL of whole answers, in nats an answer.

  Args:
    nats: of each answer, the divergence at each of its tokens.

  Returns:
    `answer_kl`, the mean over answers; `answer_kls`, that of each;
    `answer_kl_positions`, what of the mean lies at tokens 0 to 16, 16 to 64, 64
    to 256 and so on, as far as there are any. None is what is not finite.
  """
  totals = [float(np.sum(x)) for x in nats]
  longest = max(map(len, nats))
  return {
      "answer_kl": _finite(np.mean(totals)),
      "answer_kls": [_finite(float(f"{x:.4g}")) for x in totals],
      "answer_kl_positions": [
          _finite(np.mean([np.sum(x[start:end]) for x in nats]))
          for start, end in spans(longest)
      ],
  }


def finish_shares(finished: np.ndarray) -> dict[str, float]:
  """Returns the fractions of answers that finished and that were cut.

  Only a stop token or the cap ends an answer, so the two fractions add up to 1.
  An answer as long as the cap is finished if its last token is a stop token.

  Args:
    finished: bool, whether each answer ended with a stop token.
  """
  return {
      "finish_rate": float(np.mean(finished)),
      "cut": float(np.mean(~finished)),
  }


def rollout_metrics(
    tokens: np.ndarray, mask: np.ndarray, stop_ids: Sequence[int]
) -> dict[str, float]:
  """Returns an update's metrics of how its rollouts end.

  Args:
    tokens: int [B, P], the sampled tokens.
    mask: bool [B, P], true up to and including the stop token.
    stop_ids: tokens that end a rollout.
  """
  # No token follows a stop token, so a stop token is always the last.
  finished = np.any(np.isin(tokens, stop_ids) & mask, axis=1)
  repeated = [repetition(t[m]) for t, m in zip(tokens, mask, strict=True)]
  return finish_shares(finished) | {
      "rollout_len_p95": length_p95(mask.sum(1)),
      "repetition": float(np.mean(repeated)),
  }


def headline(
    config: Config, mesh: Mapping[str, int], workdir: pathlib.Path
) -> str:
  """Describes the run in a few lines."""
  axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
  who = f"student {config.student.path}"
  if config.teacher is not None and config.method != "sft":
    who += f", teacher {config.teacher.path}"
  if config.lora.rank:
    who += f", {lora_name(config.lora)}"
  text = (
      f"{config.method}: {who}\n"
      f"{counted(config.steps, 'update')} of {batch_of(config)}, mesh {axes}\n"
      f"workdir {workdir}"
  )
  if not config.is_supervised:
    text += (
        f"\ntemperature {config.rollout.temperature:g} in sampling and loss,"
        f" {loss_name(config.loss)}"
    )
  return text


def batch_of(config: Config) -> str:
  """Says how large an update is."""
  return (
      f"{counted(config.data.batch_size, 'prompt')} x"
      f" {counted(config.rollout.per_prompt, 'rollout')}"
  )


def lora_name(lora: LoraSpec) -> str:
  """Names the adapters that are trained, such as "LoRA of rank 8"."""
  return f"LoRA of rank {lora.rank}"


def loss_name(loss: LossSpec) -> str:
  """Names the loss, such as "exact reverse KL"."""
  if loss.form == "policy_gradient":
    return "policy gradient with k1"
  if loss.form == "relaxed":
    return f"relaxed policy gradient, weight {loss.relaxed.weight:g}"
  if loss.form == "direct":
    return "direct with k3"
  exact = loss.exact
  text = f"exact {exact.divergence.replace('_', ' ').replace('kl', 'KL')}"
  if exact.divergence == "jsd":
    text = f"exact JSD, beta {loss.jsd.beta:g}"
  if exact.top_k:
    text += f" of the teacher's top {exact.top_k}"
  if exact.max_entry:
    text += f", each entry cut at {exact.max_entry:g}"
  return text


def progress(line: Line) -> dict[str, str]:
  """Returns the metrics that the progress bar shows."""
  loss = "kl" if "kl" in line else "cross_entropy"
  return {
      loss: f"{line[loss]:.2g}",
      "prefix": str(line["prefix_len"]),
      "tok/s": f"{line['tokens_per_second']:,.0f}",
  }


def evaluation_line(which: str, step: int, values: Line) -> str:
  """Returns one evaluation as a line of text."""
  if values.get("teacher_update"):
    which += f" (the student after update {values['teacher_update']})"
  nats = ""
  if "answer_kl" in values:
    nats = f", {_nats(values)} nats from the teacher"
  return (
      f"step {step:>4}  {which} on {values['set']}, {values['mode']}:"
      f" {accuracy(values)}, {values['finish_rate']:.1%} finish,"
      f" {counted(round(values['mean_length']), 'token')}{nats}"
  )


def accuracy(line: Line) -> str:
  """Returns an evaluation's accuracy in % with its 95 % interval."""
  low, high = 100 * line["accuracy_low"], 100 * line["accuracy_high"]
  return f"{100 * line['accuracy']:.1f} % ({low:.1f}-{high:.1f})"


def _row(
    name: str, lines: Sequence[Line], step: int, which: str, dataset: str
) -> tuple[str, ...]:
  found = {
      line["mode"]: line
      for line in lines
      if line.get("model") == which
      and line["step"] == step
      and line["set"] == dataset
  }
  if "sampled" not in found:
    return ()
  sampled = found["sampled"]
  return (
      name,
      _stacked(accuracy(sampled)),
      _stacked(accuracy(found["greedy"])) if "greedy" in found else "-",
      f"{sampled['finish_rate']:.1%}",
      f"{sampled['accuracy_finished']:.1%}" if sampled["finish_rate"] else "-",
      f"{sampled['mean_length']:.0f}\n({sampled['length_p95']})",
      f"{sampled['repetition']:.1%}",
      _nats(sampled),
  )


def _nats(sampled: Line) -> str:
  """Returns an answer's mean divergence; "-" if it was not finite."""
  if "answer_kl" not in sampled:
    return ""
  nats = sampled["answer_kl"]
  if nats is None:
    return "-"
  return f"{nats:.3g}" if nats < 100 else f"{nats:.0f}"


def _stacked(cell: str) -> str:
  return cell.replace(" (", "\n(")


def closing_table(
    lines: Sequence[Line], dataset: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Returns the header and the rows of the closing table of an evaluation set.

  The columns after the two accuracies describe the sampled answers. The last
  one, the reverse KL of whole answers, is there if the teacher scored any.
  """
  rows = _closing_rows(lines, dataset)
  if any(cells[-1] for cells in rows):
    return (*_HEADER, _SCORED), rows
  return _HEADER, [cells[:-1] for cells in rows]


def _closing_rows(
    lines: Sequence[Line], dataset: str
) -> list[tuple[str, ...]]:
  steps = [x["step"] for x in lines if x.get("model") == "student"]
  if not steps:
    return []
  update = max(x.get("teacher_update", 0) for x in lines)
  teacher = f"teacher\n(update {update})" if update else "teacher"
  rows = (
      _row(teacher, lines, steps[-1], "teacher", dataset),
      _row("student\nbefore", lines, steps[0], "student", dataset),
      _row("student\nafter", lines, steps[-1], "student", dataset),
  )
  return [row for row in rows if row]


def warning(lines: Sequence[Line], dataset: str) -> str:
  """Returns a warning if fewer answers of a set end than before training."""
  falls = []
  students = evaluations(lines, model="student", set=dataset)
  for mode in ("sampled", "greedy"):
    rates = [x["finish_rate"] for x in students if x["mode"] == mode]
    if rates and rates[0] - rates[-1] > _FALL:
      falls.append(f"{rates[-1]:.1%} {mode}, {rates[0]:.1%} before")
  if not falls:
    return ""
  return (
      f"Warning: on {dataset}, fewer answers end by themselves than before"
      f" training ({'; '.join(falls)}): look at how answers end in the report,"
      " check loss.merge_stop_tokens, and let the cap grow to the answers' end"
      " (prefix.linear.increment, prefix.fixed.length)."
  )


def alarms(lines: Sequence[Line]) -> dict[str, str]:
  """Returns a sentence for each kind of trouble, about its first update.

  The loss exploded if it is above 1 nat a token and ten times the median of the
  ten updates before. The entropy collapsed if the student's is less than a
  tenth of the teacher's in five updates running, where the teacher's is above
  0.05 nats a token. An update was skipped if its numbers were not finite.
  """
  found: dict[str, str] = {}
  all_updates = updates(lines)
  for i, line in enumerate(all_updates):
    step, loss = line["step"], line.get("loss")
    recent = all_updates[max(i - 10, 0) : i]
    before = [x["loss"] for x in recent if x.get("loss")]
    if loss and len(before) == 10 and loss > max(1, 10 * np.median(before)):
      found.setdefault(
          "loss",
          f"Warning: the loss exploded in update {step}: {loss:.3g} nats a"
          f" token, after {np.median(before):.3g}; lower"
          " optimizer.learning_rate, or look at that update's prompts.",
      )
    if i >= 4 and all(map(_collapsed, all_updates[i - 4 : i + 1])):
      found.setdefault(
          "entropy",
          f"Warning: the student's entropy collapsed by update {step}:"
          f" {line['entropy_student']:.2g} nats a token, the teacher's is"
          f" {line['entropy_teacher']:.2g}; its answers hardly vary any more.",
      )
    if line.get("skipped"):
      found["skipped"] = (
          f"Warning: the run skipped {counted(line['skipped'], 'update')}"
          " because of numbers that were not finite; the batches are in"
          " skipped/."
      )
  return found


def _collapsed(line: Line) -> bool:
  student, teacher = (
      line.get(f"entropy_{who}") for who in ("student", "teacher")
  )
  if student is None or teacher is None:
    return False
  return teacher > 0.05 and student < teacher / 10


def spent(lines: Sequence[Line]) -> str:
  """Compares the run's FLOPs with an estimate for full distillation."""
  made = updates(lines)
  if not made:
    return "No updates were made."
  last = made[-1]
  compiled = sum(
      last[f"compilations_{phase}"] for phase in ("sample", "score", "update")
  )
  text = (
      f"{last['flops']:.3g} FLOPs in {counted(len(made), 'update')}"
      f" ({last['seconds']:.0f} s, {counted(last['tokens'], 'token')},"
      f" {counted(compiled, 'compilation')} since the last start)"
  )
  if paper := last.get("flops_paper"):
    text += f", {paper:.3g} by the paper's formula"
  full = last.get("flops_full_estimate")
  if not full:
    return text + "."
  return (
      f"{text}; full distillation would have spent about {full:.3g}"
      f" ({last['flops'] / full:.0%} spent), going by the answers' lengths at"
      " the evaluations."
  )


def dropped(lines: Sequence[Line]) -> str:
  """Says how many records were dropped, for which reasons; "" if none."""
  last = next((x for x in reversed(lines) if x.get("dropped")), None)
  if last is None:
    return ""
  counts = ", ".join(
      f"{count} {name.removeprefix('dropped_')}"
      for name, count in last.items()
      if name.startswith("dropped_")
  )
  return f"Dropped {counted(last['dropped'], 'training record')} ({counts})."


def chosen(lines: Sequence[Line], dataset: str) -> str:
  """Says which update a set chose, and that its score there is no held-out one.

  Args:
    lines: of the metrics.
    dataset: `checkpoint.best`.

  Returns:
    A sentence; "" if no set chooses, or nothing was evaluated on it.
  """
  found = {
      line["step"]: line
      for line in evaluations(
          lines, set=dataset, mode="sampled", model="student"
      )
      if line["step"] > 0 and line.get("accuracy") is not None
  }
  if not found:
    return ""
  best = max(sorted(found), key=lambda step: found[step]["accuracy"])
  return (
      f"{dataset} chose update {best} of {len(found)} that were evaluated:"
      f" {found[best]['accuracy']:.1%} there, the highest of them, so it is no"
      f" held-out score. `prefix-distill export --step=best` writes"
      " that update's model; the tables have the last update's."
  )


def _empty_table(title: str) -> rich.table.Table:
  return rich.table.Table(
      title=rich.text.Text(title) if title else None,
      box=rich.box.SIMPLE_HEAD,
      show_edge=False,
      padding=(0, 1, 0, 0),
      pad_edge=False,
  )


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    title: str = "",
) -> rich.table.Table:
  """Returns a table whose lines break within words in the first column alone.

  So no number is cut while the first column can make room.

  Args:
    header: names of the columns.
    rows: cells, as many a row as there are columns.
    width: the terminal's, in characters.
    title: stands above the table.
  """
  out = _empty_table(title)
  columns = [*zip(header, *rows, strict=True)]
  words = [max(map(len, " ".join(cells).split())) for cells in columns]
  widths = [
      max([word, *(len(line) for cell in cells for line in cell.splitlines())])
      for word, (_, *cells) in zip(words, columns, strict=True)
  ]
  room = width - 2 * (len(columns) - 1)
  if sum(widths) > room:
    widths = [max(room - sum(words[1:]), 4), *words[1:]]
  for name, length in zip(header, widths, strict=True):
    out.add_column(name, overflow="fold", width=length)
  for row in rows:
    out.add_row(*map(rich.text.Text, row))
  return out


def _print_table(
    console: rich.console.Console, lines: Sequence[Line], dataset: str
) -> None:
  """Prints the closing table of a set, and its warning."""
  table = _empty_table(dataset)
  header, rows = closing_table(lines, dataset)
  for column, name in enumerate(header):
    table.add_column(name, no_wrap=not column)
  for row in rows:
    table.add_row(*map(rich.text.Text, row))
  console.print(table)
  if text := warning(lines, dataset):
    console.print(text, style="bold red", highlight=False, markup=False)


def print_closing(lines: Sequence[Line], config: Config) -> None:
  """Prints the closing tables, warnings, and what was spent."""
  console = rich.console.Console()
  for dataset in config.evaluation.sets:
    _print_table(console, lines, dataset)
  for text in alarms(lines).values():
    console.print(text, style="bold red", highlight=False, markup=False)
  console.print(spent(lines), highlight=False)
  if text := chosen(lines, config.checkpoint.best):
    console.print(text, highlight=False, markup=False)
