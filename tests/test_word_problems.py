"""The word problems' page says what its raw numbers say."""

import collections
import json
import pathlib
import re

import numpy as np

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "results"
# Of the updates for which SeqKD's teacher answered, in these runs.
_ANSWERED = 100


def _runs() -> dict[tuple[str, str], dict[int, list[dict]]]:
  """Returns evaluations by (student, cell) and step."""
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for line in (DOCS / "word_problems.jsonl").read_text().splitlines():
    row = json.loads(line)
    found[row["student"], row["cell"]][row["step"]].append(row)
  return found


def _mean(rows: list[dict], name: str) -> float:
  return float(np.mean([row[name] for row in rows]))


def _cells(student: str, cell: str) -> list[str]:
  """Returns "FLOPs: accuracy" at the page's steps."""
  runs = _runs()
  whole = _mean(runs[student, "full"][50], "flops")
  mine = runs[student, cell]
  # The answers' cost, which was charged before the first update.
  answers = _mean(mine[0], "flops")
  out = []
  for step in (10, 20, 30, 40, 50):
    unused = answers * (1 - min(step / _ANSWERED, 1))
    share = (_mean(mine[step], "flops") - unused) / whole
    out.append(f"{share:.0%}: {100 * _mean(mine[step], 'accuracy'):.1f}")
  return out


def test_the_curves_are_those_of_the_raw_numbers():
  text, count = (DOCS / "word_problems.md").read_text(), 0
  for student in ("capable", "weak"):
    part = text.partition(f"## {student.capitalize()} student")[2]
    part = part.partition("\n## ")[0]
    for line in part.splitlines():
      named = re.match(r"\| [^|]* `([a-z0-9-]+)` \| (.*) \|$", line)
      if named:
        assert named[2].split(" | ") == _cells(student, named[1])
        count += 1
  assert count == 14


def test_the_ends_are_those_of_the_raw_numbers():
  text, count = (DOCS / "word_problems.md").read_text(), 0
  part = text.partition("## Losses, windows and schedules")[2]
  runs = _runs()
  for line in part.splitlines():
    named = re.match(r"\| [^|]* `([a-z0-9-]+)` \| (.*) \| (.*) \|$", line)
    if named:
      for student, said in (("capable", named[2]), ("weak", named[3])):
        mine = runs[student, named[1]]
        ends = [max(mine.items())[1]][0]
        low, high = (100 * f(x["accuracy"] for x in ends) for f in (min, max))
        mean = 100 * _mean(ends, "accuracy")
        assert said == f"{mean:.1f} ({low:.1f}-{high:.1f})"
      count += 1
  assert count == 12
