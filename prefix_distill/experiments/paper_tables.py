"""The FLOP columns of the paper's two tables, by the paper's formula.

  python -m prefix_distill.experiments.paper_tables

The paper (arXiv 2602.15260) gives totals, the formula and the recipe, but not
the lengths of its prompts and rollouts. This script assumes that every rollout
reaches its cap, and fits one mean prompt to the rows with prefixes of 256 to
2048 tokens. For longer rollouts that is too much, so their rows also show the
length that gives the paper's total. SeqKD's answers have one fitted length for
both tables.

As written, the formula gives 1.5 to 1.9 times the totals of the prefix rows.
With a forward pass of a ninth of training instead of a third it gives them
within 3 %, and no other row contradicts that. The ninth is inferred from the
totals.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses

import numpy as np
import rich.box
import rich.console
import rich.table

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import QWEN3_1_7B
from prefix_distill.models.config import QWEN3_8B
from prefix_distill.report import flops
from prefix_distill.report.flops import Convention
from prefix_distill.report.flops import Lengths

UPDATES, ROLLOUTS = 60, 512 * 4
SEQKD_BATCH = 128
PREFIXES = (256, 512, 1024, 2048)
LONGEST = 16384
# The caps of the schedule: 1 at first, and 256 more each update.
SCHEDULE = tuple(1 + 256 * np.arange(UPDATES))
# The rows of distillation, with the cap of each update; and of supervised
# training on the teacher's answers, with the number of steps.
CAPS = {f"prefix {length}": (length,) * UPDATES for length in PREFIXES} | {
    "full, 10": (LONGEST,) * 10,
    "full": (LONGEST,) * UPDATES,
    "schedule": SCHEDULE,
}
SEQKD_STEPS = {"SeqKD, 300": 300, "SeqKD, 1500": 1500}
WRITTEN = Convention()
FITTED = Convention(forward=1 / 9)
# Other readings, for comparison.
READINGS = {
    "the layers": {},
    "the head too": {"head": True},
    "the table too": {"head": True, "table": True},
}


@dataclasses.dataclass(frozen=True)
class Table:
  """The FLOP column of one of the paper's tables; the teacher is Qwen3-8B.

  Attributes:
    name: the student's name.
    student: the student's architecture.
    column: the totals, in the order of CAPS and SEQKD_STEPS.
  """

  name: str
  student: ModelConfig
  column: str

  @property
  def totals(self) -> dict[str, float]:
    """The total of each row."""
    values = map(float, self.column.split())
    return dict(zip((*CAPS, *SEQKD_STEPS), values, strict=True))


TABLES = (
    Table(
        "Qwen3-1.7B-Base",
        QWEN3_1_7B,
        "9.4e17 1.4e18 2.5e18 4.7e18 8.2e18 5.7e19 2.4e19 1.3e19 6.6e19",
    ),
    Table(
        "Qwen3-8B-Base",
        QWEN3_8B,
        "3.4e18 5.2e18 8.9e18 1.7e19 2.7e19 1.8e20 7.5e19 4.4e19 2.2e20",
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row: the paper's total, and ours by two readings of the formula.

  Attributes:
    method: the paper's name of the method.
    paper: the paper's total.
    written: our total with a forward pass of a third of training.
    fitted: our total with a forward pass of a ninth.
    note: the assumed tokens per answer, and in brackets the tokens that the
      paper's total implies.
  """

  method: str
  paper: float
  written: float
  fitted: float
  note: str


def rollouts(
    student: ModelConfig,
    prompt: float,
    sampled: tuple[float, ...],
    convention: Convention,
) -> float:
  """FLOPs of updates; `sampled` has the rollouts' length in each update."""
  lengths = Lengths(np.full(len(sampled), prompt), np.array(sampled))
  return ROLLOUTS * flops.paper_distillation(
      student, QWEN3_8B, lengths, convention=convention
  )


def implied(cost: Callable[[float], float], total: float) -> float:
  """Returns the length at which a growing cost is the total, by bisection."""
  low, high = 0.0, 1e6
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (low, middle) if cost(middle) > total else (middle, high)
  return low


def fit_prompt(convention: Convention) -> tuple[int, float]:
  """Fits the mean prompt to the prefix rows of both tables.

  Returns:
    The tokens of the prompt, and the largest factor between a row's total and
    the paper's.
  """
  best = 0, np.inf
  for prompt in range(0, 401, 2):
    off = [
        np.log(
            rollouts(table.student, prompt, CAPS[row], convention)
            / table.totals[row]
        )
        for table in TABLES
        for row in CAPS
        if row.startswith("prefix")
    ]
    worst = float(np.exp(np.abs(off).max()))
    if worst < best[1]:
      best = prompt, worst
  return best


def seqkd(
    table: Table, length: float, steps: int, convention: Convention = FITTED
) -> float:
  """FLOPs of steps on sequences of a length, prompt included."""
  each = flops.paper_train(table.student, length, convention)
  return steps * SEQKD_BATCH * each


def seqkd_length(convention: Convention = FITTED) -> float:
  """Returns the length for which both tables are off by the same factor."""

  def off(length: float) -> float:
    ratios = [
        seqkd(table, length, steps, convention) / table.totals[row]
        for table in TABLES
        for row, steps in SEQKD_STEPS.items()
        if steps == 1500
    ]
    return float(np.prod(ratios))

  return implied(off, 1.0)


def _row(table: Table, prompt: int, method: str) -> Row:
  """Returns a row of distillation, with rollouts that reach their caps."""
  caps, total = CAPS[method], table.totals[method]

  def cost(longest: float, convention: Convention = FITTED) -> float:
    sampled = tuple(np.minimum(caps, longest))
    return rollouts(table.student, prompt, sampled, convention)

  note = "cap"
  if max(caps) not in PREFIXES:
    note += f" ({implied(cost, total):,.0f})"
  return Row(method, total, cost(LONGEST, WRITTEN), cost(LONGEST), note)


def rows(table: Table, prompt: int) -> Iterator[Row]:
  """Yields a table's rows, for a mean prompt."""
  for method in CAPS:
    yield _row(table, prompt, method)
  length = seqkd_length()
  for method, steps in SEQKD_STEPS.items():
    total, ours = table.totals[method], seqkd(table, length, steps)
    alone = implied(lambda x, n=steps: seqkd(table, x, n), total)
    note = f"{length - prompt:,.0f} ({alone - prompt:,.0f})"
    yield Row(method, total, ours, ours, note)


def _grid(title: str, columns: tuple[str, ...]) -> rich.table.Table:
  out = rich.table.Table(
      title=title,
      box=rich.box.SIMPLE_HEAD,
      show_edge=False,
      padding=(0, 1, 0, 0),
      title_justify="left",
  )
  for name in columns:
    out.add_column(name)
  return out


def _table(table: Table, prompt: int) -> rich.table.Table:
  columns = (
      "method",
      "paper",
      "F_fwd =\nF_train / 3",
      "ours /\npaper",
      "F_fwd =\nF_train / 9",
      "ours /\npaper",
      "tokens of an\nanswer (implied)",
  )
  out = _grid(f"Student {table.name}, teacher Qwen3-8B, FLOPs", columns)
  for row in rows(table, prompt):
    out.add_row(
        row.method,
        f"{row.paper:.1e}",
        f"{row.written:.1e}",
        f"{row.written / row.paper:.2f}",
        f"{row.fitted:.1e}",
        f"{row.fitted / row.paper:.2f}",
        row.note,
    )
  return out


def _readings() -> rich.table.Table:
  """Tabulates how well other readings of the formula fit."""
  columns = (
      "N counts",
      "pairs of\ntokens",
      "F_fwd /\nF_train",
      "prompt,\nfitted",
      "prefix rows\noff by",
      "schedule\nat its caps",
      "SeqKD,\n8B / 1.7B",
  )
  out = _grid("What the formula may mean", columns)
  for name, counted in READINGS.items():
    for attention, pairs in ((12, "all"), (6, "causal")):
      for part in (3, 9):
        reading = Convention(**counted, attention=attention, forward=1 / part)
        out.add_row(name, pairs, f"1/{part}", *_fits(reading))
  return out


def _fits(reading: Convention) -> tuple[str, ...]:
  """Returns the last four columns of `_readings`."""
  prompt, worst = fit_prompt(reading)
  capped = min(
      rollouts(t.student, prompt, SCHEDULE, reading) / t.totals["schedule"]
      for t in TABLES
  )
  length = seqkd_length(reading)
  small, large = (seqkd(t, length, 1, reading) for t in TABLES)
  fits = f"{worst - 1:.0%}", f"{capped:.2f}", f"{large / small:.2f}"
  return f"{prompt}", *fits


_EXPLANATION = """\
The mean prompt, {} tokens, is fitted. With a forward pass of a ninth of
training, the eight prefix rows are then off by at most {:.1%}. The ninth is
inferred: appendix B has a third, and with a third the formula gives 1.5 to
1.9 times the tables' totals. The lengths of answers in the other rows are
not published. The brackets have the length at which a row would fit, by the
ninth, if all its answers were equally long. A reading cannot be meant if the
schedule comes out below 1, although all its rollouts reach their caps. SeqKD
has no other forward pass. One length for both students misses the tables' 8B /
1.7B, 3.33."""


def main() -> None:
  console = rich.console.Console()
  prompt, worst = fit_prompt(FITTED)
  for table in TABLES:
    console.print(_table(table, prompt))
  console.print(_readings())
  console.print(_EXPLANATION.format(prompt, worst - 1), highlight=False)


if __name__ == "__main__":
  main()
