"""The report of a run: one HTML page that needs nothing else, and no network.

The page is made from the files of the workdir alone: `config.json`,
`metrics.jsonl` and `samples/`. Figures are inside the page, and lie beside it
as well.

What a model wrote is data. Jinja escapes all that stands in the HTML; the texts
of `samples/` are JSON without a "<", which the page's script makes into text,
never into HTML; and the page's own policy runs that script alone.
"""

import base64
from collections.abc import Sequence
import datetime
import hashlib
import json
import pathlib
from typing import Any

import jinja2
import markupsafe

from prefix_distill import config as config_lib
from prefix_distill.config import Config
from prefix_distill.errors import read_json
from prefix_distill.report import plots
from prefix_distill.report import report
from prefix_distill.report.report import Line

FILE = "report.html"
_TEMPLATE = pathlib.Path(__file__).parent / "template"
# The most rows of the table of updates.
_ROWS = 50
# Its columns: name, field, format.
_COLUMNS = (
    ("update", "step", "d"),
    ("KL", "kl", ".4g"),
    ("cross-entropy", "cross_entropy", ".4g"),
    ("cap", "prefix_len", "d"),
    ("mean tokens", "rollout_len", ".1f"),
    ("finished", "finish_rate", ".1%"),
    ("same top token", "top1_agreement", ".1%"),
    ("student's entropy", "entropy_student", ".3f"),
    ("teacher's entropy", "entropy_teacher", ".3f"),
    ("gradient's norm", "grad_norm", ".3g"),
    ("FLOPs", "flops", ".3g"),
    ("tokens/s", "tokens_per_second", ",.0f"),
)


def facts(config: Config) -> list[tuple[str, str]]:
  """Returns the settings that one looks for first: name and value."""
  data, rollout = config.data, config.rollout
  out = [("method", config.method), ("student", config.student.path)]
  if config.teacher is not None and config.method != "sft":
    out.append(("teacher", config.teacher.path))
  out += [
      ("prompts", data.train.source),
      (
          "updates",
          f"{config.steps} of {data.batch_size} prompts x"
          f" {rollout.per_prompt} rollouts",
      ),
      ("learning rate", f"{config.optimizer.learning_rate:g}"),
      ("longest answer", f"{rollout.max_len} tokens"),
  ]
  if config.schedule:
    out.append(("length of the prefix", config.schedule))
  if not config.is_supervised:
    out += [
        ("temperature", f"{rollout.temperature:g}"),
        ("loss", report.loss_name(config.loss)),
    ]
  return [*out, ("seed", str(config.seed))]


def _date(metrics: pathlib.Path) -> str:
  """Returns when the run last wrote its metrics, in UTC."""
  if not metrics.is_file():
    return "unknown"
  found = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC)
  return f"{found:%Y-%m-%d %H:%M} UTC"


def _tables(lines: Sequence[Line]) -> list[tuple[str, list[list[str]]]]:
  """Returns name and rows of each evaluation set."""
  names = sorted({line["set"] for line in lines if "set" in line})
  return [(name, _flat(report.closing_rows(lines, name))) for name in names]


def _flat(rows: Sequence[Sequence[str]]) -> list[list[str]]:
  return [[cell.replace("\n", " ") for cell in row] for row in rows]


def _updates(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
  """Returns the header and the rows of the table of updates."""
  if not lines:
    return [], []
  columns = [
      column for column in _COLUMNS if any(column[1] in x for x in lines)
  ]
  chosen = report.spread(range(len(lines)), _ROWS)
  rows = [
      [_cell(lines[i].get(field), form) for _, field, form in columns]
      for i in sorted(chosen)
  ]
  return [name for name, _, _ in columns], rows


def _cell(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _embedded(value: Any) -> markupsafe.Markup:
  """Returns JSON for a script element, which nothing in it can end."""
  text = json.dumps(value, separators=(",", ":"))
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return markupsafe.Markup(text)


def _kept(workdir: pathlib.Path) -> dict[str, list[Line]]:
  """Returns the rollouts and answers, without what the page does not show."""
  rollouts, answers = report.read_samples(workdir)
  return {
      "rollouts": [
          {k: v for k, v in line.items() if k != "ids"} for line in rollouts
      ],
      "answers": answers,
  }


def _render(
    workdir: pathlib.Path,
    lines: Sequence[Line],
    config: Config,
    values: dict[str, Any],
) -> str:
  """Returns the page; draws its figures into `report/`.

  Args:
    workdir: of the run.
    lines: of `metrics.jsonl`.
    config: the settings.
    values: of `config.json`.
  """
  figures = [
      {
          "data": base64.b64encode(
              (workdir / "report" / name).read_bytes()
          ).decode(),
          "caption": plots.CAPTIONS[name],
      }
      for name in plots.draw(lines, workdir / "report", config.method)
  ]
  updates = report.updates(lines)
  tables = _tables(lines)
  warnings = [
      report.dropped(updates),
      report.chosen(lines, config.checkpoint.best),
      *report.alarms(lines).values(),
      *(report.warning(lines, name) for name, _ in tables),
  ]
  style, script = (
      (_TEMPLATE / f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
  )
  digest = hashlib.sha256(script.encode()).digest()
  columns, rows = _updates(updates)
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(_TEMPLATE),
      autoescape=True,
      undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("page.html").render(
      name=workdir.resolve().name,
      spent=report.spent(lines),
      facts=[
          *facts(config),
          ("last written", _date(workdir / "metrics.jsonl")),
      ],
      warnings=[text for text in warnings if text],
      header=_flat([report.HEADER])[0],
      tables=tables,
      figures=figures,
      columns=columns,
      updates=rows,
      count=len(updates),
      settings=json.dumps(values, indent=2),
      samples=_embedded(_kept(workdir)),
      style=markupsafe.Markup(style),
      script=markupsafe.Markup(script),
      script_hash=base64.b64encode(digest).decode(),
  )


def write(workdir: pathlib.Path) -> None:
  """Writes `report/` from the workdir's files; prints the closing table."""
  lines = report.read_metrics(workdir / "metrics.jsonl")
  values = read_json(workdir / "config.json")
  config = config_lib.from_dict(values)
  directory = workdir / "report"
  directory.mkdir(exist_ok=True)
  text = _render(workdir, lines, config, values)
  (directory / FILE).write_text(text, "utf-8")
  report.print_closing(lines, config)
  report_at, model_at = directory / FILE, workdir / "export"
  print(f"Report in {report_at}, model in {model_at}.", flush=True)
