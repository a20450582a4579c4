"""Small files in the schema of each benchmark, as the hub has them."""

from collections.abc import Sequence
import csv
import json
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet


def _math500(n: int) -> dict[str, Any]:
  return {
      "problem": f"What is ${n} + \\frac{{1}}{{2}}$?",
      "solution": "We add.",
      "answer": f"\\frac{{{2 * n + 1}}}{{2}}",
      "subject": "Algebra",
      "level": 2,
      "unique_id": f"test/algebra/{n}.json",
  }


def _aime24(n: int) -> dict[str, Any]:
  return {
      "id": 60 + n,
      "problem": f"Find {n} + 7.",
      "solution": "We add.",
      "answer": f"{n + 7:03}",
      "url": "https://example.org",
      "year": "2024",
  }


def _aime25(n: int) -> dict[str, Any]:
  return {"problem": f"Find {n} + 70.", "answer": str(n + 70), "id": str(n)}


def _gpqa(n: int) -> dict[str, Any]:
  return {
      "Pre-Revision Question": "An older one.",
      "Question": f"Which gas, {n}?",
      "Correct Answer": f"neon {n}\n",
      "Incorrect Answer 1": "oxygen, O2",
      "Incorrect Answer 2": "nitrogen",
      "Incorrect Answer 3": "steam",
      "Explanation": "It is noble.",
      "Record ID": f"rec{n}",
  }


def _mmlu_pro(n: int) -> dict[str, Any]:
  options = [f"option {i} of {n}" for i in range(3 + n % 8)]
  right = n % len(options)
  return {
      "question_id": 70 + n,
      "question": f"Which one, {n}?",
      "options": options,
      "answer": "ABCDEFGHIJ"[right],
      "answer_index": right,
      "cot_content": "",
      "category": "other",
      "src": "none",
  }


def _hmmt(n: int) -> dict[str, Any]:
  return {
      "problem_idx": n + 1,
      "problem": f"Compute $\\sqrt{{{n + 2}}} - \\pi$.",
      "answer": f"\\sqrt{{{n + 2}}}-\\pi",
      "problem_type": ["Algebra"],
  }


def _amc(n: int) -> dict[str, Any]:
  return {
      "id": n,
      "question": f"What is {n} + 20?",
      "answer": f"{n + 20}.0",
      "url": "https://example.org",
  }


_ROWS = {
    "math500": _math500,
    "aime24": _aime24,
    "aime25": _aime25,
    "gpqa": _gpqa,
    "mmlu_pro": _mmlu_pro,
    "hmmt": _hmmt,
    "amc": _amc,
}


def rows(name: str, count: int) -> list[dict[str, Any]]:
  return [_ROWS[name](n) for n in range(count)]


def write_jsonl(path: pathlib.Path, records: Sequence[dict]) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return str(path)


def write_parquet(path: pathlib.Path, records: Sequence[dict]) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
  return str(path)


def write_csv(path: pathlib.Path, records: Sequence[dict]) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
  return str(path)


def _card(path: pathlib.Path, configs: dict[str, tuple[str, str]]) -> None:
  """Writes a data set's README: configuration -> split and files."""
  lines = ["---", "configs:"]
  for config, (split, files) in configs.items():
    lines += [
        f"- config_name: {config}",
        "  data_files:",
        f"  - split: {split}",
        f"    path: {files}",
    ]
  (path / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_directory(
    name: str, path: pathlib.Path, records: Sequence[dict]
) -> str:
  """Writes a clone of a benchmark's repository."""
  if name == "gpqa":
    write_csv(path / "gpqa_diamond.csv", records)
    write_csv(path / "gpqa_main.csv", [records[0], *records])
    subsets = ("gpqa_main", "gpqa_diamond")
    _card(path, {x: ("train", f"{x}.csv") for x in subsets})
  elif name in ("math500", "aime25"):
    write_jsonl(path / "test.jsonl", records)
    _card(path, {"default": ("test", "test.jsonl")})
  else:
    split = "train" if name in ("aime24", "hmmt") else "test"
    file = f"{split}-00000-of-00001.parquet"
    write_parquet(path / "data" / file, records)
    _card(path, {"default": (split, f"data/{split}-*")})
  return str(path)


def write(name: str, kind: str, path: pathlib.Path, records: Sequence) -> str:
  """Writes a local copy of a kind; returns what to name as its source."""
  if kind == "directory":
    return write_directory(name, path / name, records)
  writer = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
  return writer(path / f"{name}.{kind}", records)
