"""`metrics.jsonl`: one flat JSON object a line."""

import json
import math
import pathlib
from typing import Any


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines; one that a kill cut short is left out."""
  if not path.is_file():
    return []
  out = []
  for line in path.read_text().splitlines():
    try:
      out.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return out


class Writer:
  """Appends lines, each whole on the disk before the next step starts."""

  def __init__(self, path: pathlib.Path, resume_step: int | None):
    """Opens the file.

    Args:
      path: the file.
      resume_step: keep lines up to this step, for later ones will be written
        again; None to start anew.
    """
    kept = []
    if resume_step is not None:
      # The teacher is evaluated after the last checkpoint, so once more.
      kept = [
          line
          for line in read(path)
          if line["step"] <= resume_step and line.get("model") != "teacher"
      ]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_line(values) for values in kept))
    partial.rename(path)
    self._path = path

  def write(self, values: dict[str, Any]) -> None:
    with self._path.open("a") as file:
      file.write(_line(values))


def _line(values: dict[str, Any]) -> str:
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      values = {**values, name: None}  # JSON has no NaN.
  return json.dumps(values) + "\n"
