"""A run's report, one HTML page, and the model card of its export, in Markdown.

The page needs nothing else, and no network. It is made from the files of the
workdir alone: `config.json`, `metrics.jsonl` and `samples/`. Figures are inside
the page, and lie beside it as well.

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
import re
from typing import Any

import jinja2
import markupsafe

from prefix_distill import config as config_lib
from prefix_distill.config import BUNDLED_TASKS
from prefix_distill.config import Config
from prefix_distill.errors import counted
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
_CITATION = """@misc{prefix-distillation,
  title = {Fast and Effective On-policy Distillation from Reasoning Prefixes},
  eprint = {2602.15260},
  archivePrefix = {arXiv},
  year = {2026}
}"""
_METHODS = {
    "prefix": "on-policy distillation from reasoning prefixes",
    "full": "on-policy distillation",
    "sft": "supervised training",
    "seqkd": "training on the teacher's answers (SeqKD)",
}


def facts(config: Config) -> list[tuple[str, str]]:
  """Returns the settings that one looks for first: name and value."""
  data, rollout = config.data, config.rollout
  out = [("method", config.method), ("student", config.student.path)]
  if config.teacher is not None and config.method != "sft":
    out.append(("teacher", config.teacher.path))
  if config.lora.rank:
    out.append(("trained", report.lora_name(config.lora)))
  out += [
      ("prompts", data.train.source),
      ("updates", f"{config.steps:,} of {report.batch_of(config)}"),
      ("learning rate", f"{config.optimizer.learning_rate:g}"),
      ("longest answer", counted(rollout.max_len, "token")),
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


def _tables(
    lines: Sequence[Line],
) -> list[tuple[str, list[str], list[list[str]]]]:
  """Returns name, header and rows of each evaluation set."""
  out = []
  for name in sorted({line["set"] for line in lines if "set" in line}):
    header, rows = report.closing_table(lines, name)
    out.append((name, *_flat([header]), _flat(rows)))
  return out


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


def _kept(workdir: pathlib.Path, config: Config) -> dict[str, Any]:
  """Returns the rollouts and answers, without what the page does not show."""
  rollouts, answers = report.read_samples(workdir)
  return {
      "rollouts": [
          {k: v for k, v in line.items() if k != "ids"} for line in rollouts
      ],
      "answers": answers,
      "evaluates": bool(config.evaluation.sets),
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
      *(report.warning(lines, name) for name, *_ in tables),
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
      tables=tables,
      evaluates=bool(config.evaluation.sets),
      figures=figures,
      columns=columns,
      updates=rows,
      count=counted(len(updates), "update"),
      settings=json.dumps(values, indent=2),
      samples=_embedded(_kept(workdir, config)),
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
  places, export = [f"Report in {directory / FILE}"], workdir / "export"
  places.append(f"model in {export}")
  if config.lora.rank:
    places.append(f"adapter in {adapter_directory(export)}")
  print(f"{', '.join(places)}.", flush=True)


def adapter_directory(export: pathlib.Path) -> pathlib.Path:
  """Returns where the adapters of an export are."""
  return export.with_name(f"{export.name}-adapter")


def licence(directory: pathlib.Path) -> str:
  """Returns the licence in a model's own card; empty if it states none."""
  try:
    text = (directory / "README.md").read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError):
    return ""
  head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
  found = head and re.search(
      r"^license:\s*['\"]?([\w.+-]+)", head[1], re.MULTILINE
  )
  return found[1] if found else ""


def card(
    config: Config,
    lines: Sequence[Line],
    step: int,
    base_licence: str,
) -> str:
  """Returns the model card of an export: what it is, its cost, how to serve it.

  It is a README.md in Markdown, with the hub's metadata.

  Args:
    config: the run's settings.
    lines: of its metrics.jsonl.
    step: the update after which the student is exported.
    base_licence: of the model that it was made of; empty if unknown.
  """
  lines = [line for line in lines if line["step"] <= step]
  parts = [
      _metadata(config, base_licence),
      f"# {_names(config)[0]}, distilled\n",
      _about(config, step),
      _recipe(config, lines),
      _results(lines),
      _serving(config),
      _licence(config, base_licence),
      f"## Citation\n\n```\n{_CITATION}\n```",
  ]
  return "\n".join(part for part in parts if part) + "\n"


def _base(path: str) -> str:
  """Names a model without the directories of the machine it lay on."""
  return path if _is_hub(path) else path.rstrip("/").rsplit("/", 1)[-1]


def _names(config: Config) -> tuple[str, str]:
  """Names the student and the teacher, apart if they are not the same.

  A directory has as much of its path as that takes.
  """
  paths = [spec.path for spec in (config.student, config.teacher) if spec]
  names = [_base(path) for path in paths]
  places = [pathlib.Path(path).absolute() for path in paths]
  if len({*places}) == 2 and len({*names}) == 1:
    names = report.short_names(places)
  return names[0], names[-1]


def _is_hub(path: str) -> bool:
  return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", path) is not None


def _metadata(config: Config, base_licence: str) -> str:
  rows = ["library_name: transformers", "pipeline_tag: text-generation"]
  if base_licence:
    rows.append(f"license: {base_licence}")
  student, source = config.student.path, config.data.train.source
  if _is_hub(student):
    rows.append(f"base_model: {student.partition('@')[0]}")
  if _is_hub(source):
    rows.append(f"datasets:\n- {source}")
  rows.append("tags:\n- distillation\n- on-policy-distillation")
  return "---\n" + "\n".join(rows) + "\n---\n"


def _about(config: Config, step: int) -> str:
  student, teacher = _names(config)
  who = ""
  if config.teacher is not None and config.method != "sft":
    who = f" from {teacher}"
  return (
      f"{student} after {counted(step, 'update')} of"
      f" {_METHODS[config.method]}{who}, with prefix_distill"
      " (arXiv 2602.15260).\n"
  )


def _recipe(config: Config, lines: Sequence[Line]) -> str:
  data, optimizer = config.data, config.optimizer
  train = data.train.source
  if train not in BUNDLED_TASKS:
    train = _base(train)
  rows = {"data": train}
  if config.lora.rank:
    rows["trained"] = f"{report.lora_name(config.lora)}, merged here"
  rows |= {
      "an update": report.batch_of(config),
      "learning rate": f"{optimizer.learning_rate:g}, AdamW",
      "seed": f"{config.seed}",
  }
  if not config.is_supervised:
    rows |= {
        "loss": report.loss_name(config.loss),
        "temperature": f"{config.rollout.temperature:g}",
        "longest answer": counted(config.rollout.max_len, "token"),
    }
  if config.schedule:
    rows["prefix"] = f"{config.schedule} schedule"
  updates = report.updates(lines)
  if updates:
    last = updates[-1]
    rows["training FLOPs"] = f"{last['flops']:.3g}"
    rows["tokens"] = f"{last['tokens']:,}"
    rows["seconds of updates"] = f"{last['seconds']:.0f}"
  table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
  return f"## Recipe\n\n| | |\n|---|---|\n{table}\n"


def _results(lines: Sequence[Line]) -> str:
  """Returns what was measured: before, at this step, and the teacher."""
  found = [line for line in lines if "mode" in line]
  if not found:
    return "## Results\n\nNothing was evaluated.\n"
  rows = []
  for name, mode in dict.fromkeys((x["set"], x["mode"]) for x in found):
    mine = [x for x in found if (x["set"], x["mode"]) == (name, mode)]
    student = [x for x in mine if x["model"] == "student"]
    teacher = [x for x in mine if x["model"] == "teacher"]
    before = student[0] if student and student[0]["step"] == 0 else None
    cells = [
        report.accuracy(x) if x else "-"
        for x in (
            before,
            student[-1] if student else None,
            teacher[-1] if teacher else None,
        )
    ]
    one = mine[-1]
    asked = f"{one['problems']} x {one['samples']}"
    after = f"{student[-1]['step']}" if student else "-"
    rows.append(
        f"| {name}, {mode} | {asked} | {cells[0]} | {cells[1]} | {after} |"
        f" {cells[2]} |"
    )
  head = (
      "| set | problems x answers | before | this model | at update | teacher"
      " |\n|---|---|---|---|---|---|"
  )
  table = "\n".join([head, *rows])
  return (
      f"## Results\n\nAccuracy with 95 % intervals over the problems.\n\n"
      f"{table}\n"
  )


def _serving(config: Config) -> str:
  suffix, system = config.data.suffix, config.data.system
  spec = config.evaluation
  asked = '[{"role": "user", "content": "What is 7 + 5?"}]'
  if system:
    asked = (
        f'[{{"role": "system", "content": {system!r}}},\n'
        '            {"role": "user", "content": "What is 7 + 5?"}]'
    )
  opened, prompt = "", "prompt"
  if suffix:
    prompt = f"prompt + {suffix!r}"
    opened = (
        f"The student was trained and evaluated with {suffix!r} behind the chat"
        " template's generation prompt, so give it that too.\n"
    )
  return f"""## Use

{opened}
```python
import transformers

path = "."  # This directory, or its id on the hub.
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.AutoModelForCausalLM.from_pretrained(path)
messages = {asked}
prompt = tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(
    {prompt}, add_special_tokens=False, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens={spec.max_len})
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:]))
```

`generation_config.json` has the stop tokens and the run's sampling settings
(temperature {spec.temperature:g}). To serve it:

```
vllm serve PATH
python -m sglang.launch_server --model-path PATH
```

and send the prompt as above to `/v1/completions`, with `max_tokens`; neither
server was tried with this model.
"""


def _licence(config: Config, found: str) -> str:
  base = _names(config)[0]
  if found:
    return f"## Licence\n\n{found}, that of {base}.\n"
  return f"## Licence\n\nThat of {base}; see there.\n"
