"""The model card of an export: what it is, what it cost, how to serve it."""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
import re
from typing import Any

from prefix_distill.config import BUNDLED_TASKS
from prefix_distill.config import Config
from prefix_distill.report import report

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


def text(
    config: Config,
    lines: Sequence[Mapping[str, Any]],
    step: int,
    base_licence: str,
) -> str:
  """Returns a README.md in Markdown, with the hub's metadata.

  Args:
    config: the run's settings.
    lines: of its metrics.jsonl.
    step: the update after which the student is exported.
    base_licence: of the model that it was made of; empty if unknown.
  """
  lines = [line for line in lines if line["step"] <= step]
  parts = [
      _metadata(config, base_licence),
      f"# {_base(config.student.path)}, distilled\n",
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
  who = ""
  if config.teacher is not None and config.method != "sft":
    who = f" from {_base(config.teacher.path)}"
  return (
      f"{_base(config.student.path)} after {step} updates of"
      f" {_METHODS[config.method]}{who}, with prefix_distill"
      " (arXiv 2602.15260).\n"
  )


def _recipe(config: Config, lines: Sequence[Mapping[str, Any]]) -> str:
  data, optimizer = config.data, config.optimizer
  train = data.train.source
  if train not in BUNDLED_TASKS:
    train = _base(train)
  rows = {
      "data": train,
      "an update": (
          f"{data.batch_size} prompts x {config.rollout.per_prompt} rollouts"
      ),
      "learning rate": f"{optimizer.learning_rate:g}, AdamW",
      "seed": f"{config.seed}",
  }
  if not config.is_supervised:
    rows |= {
        "loss": report.loss_name(config.loss),
        "temperature": f"{config.rollout.temperature:g}",
        "longest answer": f"{config.rollout.max_len} tokens",
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


def _results(lines: Sequence[Mapping[str, Any]]) -> str:
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
  opened = ""
  if suffix:
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
    prompt + {suffix!r}, add_special_tokens=False, return_tensors="pt")
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
  base = _base(config.student.path)
  if found:
    return f"## Licence\n\n{found}, that of {base}.\n"
  return f"## Licence\n\nThat of {base}; see there.\n"
