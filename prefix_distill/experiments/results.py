"""What the runs of `reproduce` show: intervals, tables, figures.

Every number here comes from `runs.jsonl`: for each run the FLOPs and the
verdict on every answer, evaluation by evaluation. A comparison of two methods
is paired: both were run with the same seeds and answered the same problems.

Intervals are 95 % percentile intervals of a bootstrap that draws seeds and
problems anew, each with replacement and independently of the other (Owen,
"The pigeonhole bootstrap", 2007); `scipy.stats.bootstrap` draws.

Terms:

  end    after its last update
  stop   its best stopping point: the cheapest evaluation whose accuracy on the
         validation split is at most `MARGIN` below the best on that split.
         The accuracy that is reported there is that of the test split.
  cost   FLOPs of sampling, scoring and updates; SeqKD pays for the teacher's
         answers as it uses them. Evaluation is left out for every method.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import types
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from prefix_distill.report import report

# A method is "as good" if the interval of its difference ends above minus this.
# Chosen before the runs.
MARGIN = 0.02
# Accuracies whose cost is compared.
GOALS = (0.5, 0.8, 0.9, 0.95)
TEST, VALIDATION = "heldout", "validation"
# Beside the sets: the teacher's scores of answers to the test split.
KL = "kl"
_RESAMPLES = 2000
_LEVEL = 0.95
_BEFORE = "the student before"
# Fields of an evaluation that the results keep, beside the verdicts.
_KEPT = ("finish_rate", "mean_length")


@dataclasses.dataclass(frozen=True)
class Curve:
  """The runs of a cell. S seeds, T evaluations, P problems.

  Attributes:
    task: its name.
    cell: its name.
    seeds: [S].
    steps: [T], updates; the first is 0.
    flops: [S, T], cumulative.
    right: by set, float [S, T, P], the share of right answers to a problem;
      under `KL`, where the teacher scored answers, nats of each, [S, T, K].
    positions: [S, T, B], nats of an answer by position, see
      `report.divergence`; None where the teacher scored nothing.
    seconds: [S, T], cumulative seconds of the updates.
  """

  task: str
  cell: str
  seeds: tuple[int, ...]
  steps: np.ndarray
  flops: np.ndarray
  right: Mapping[str, np.ndarray]
  seconds: np.ndarray
  positions: np.ndarray | None = None

  def of(self, seeds: Sequence[int]) -> "Curve":
    """Returns the runs of these seeds."""
    rows = [self.seeds.index(seed) for seed in seeds]
    return dataclasses.replace(
        self,
        seeds=tuple(seeds),
        flops=self.flops[rows],
        right={name: x[rows] for name, x in self.right.items()},
        seconds=self.seconds[rows],
        positions=None if self.positions is None else self.positions[rows],
    )

  @property
  def fastest(self) -> float:
    """Seconds of the updates of the fastest seed."""
    return float(self.seconds[:, -1].min())

  @property
  def is_scored(self) -> bool:
    """Whether the teacher scored the students' answers."""
    return KL in self.right

  def by_divergence(self) -> "Curve":
    """Returns the curve with minus the nats of an answer as its accuracy.

    More is better then. A curve that the teacher did not score stays as it is.
    """
    if not self.is_scored:
      return self
    return dataclasses.replace(self, right={TEST: -self.right[KL]})

  def mean(self, sample: "Sample", name: str = TEST) -> np.ndarray:
    """The mean over seeds and problems at each evaluation: [R, T]."""
    problems = self.right[name] @ sample.problems.T  # [S, T, R]
    return np.einsum("rs,str->rt", sample.seeds, problems)

  def cost(self, sample: "Sample") -> np.ndarray:
    """Mean cumulative FLOPs at each evaluation: [R, T]."""
    return sample.seeds @ self.flops

  @functools.cached_property
  def stop(self) -> int:
    """The index of the best stopping point, chosen on the validation split.

    It is the last one where there is no such split.
    """
    if VALIDATION not in self.right:
      return len(self.steps) - 1
    mean = self.right[VALIDATION].mean((0, 2))
    return int(np.argmax(mean >= mean.max() - MARGIN))


@dataclasses.dataclass(frozen=True)
class Sample:
  """Weights of seeds and problems, each row with the sum 1.

  Attributes:
    seeds: [R, S].
    problems: [R, P].
  """

  seeds: np.ndarray
  problems: np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval:
  """A number and its 95 % interval."""

  value: float
  low: float
  high: float

  def percent(self) -> str:
    """An accuracy: 98.3 (97.3-99.4)."""
    value, low, high = (100 * x for x in dataclasses.astuple(self))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"

  def points(self) -> str:
    """A difference of accuracies: +1.2 (-0.3 to +2.7)."""
    value, low, high = (100 * x for x in dataclasses.astuple(self))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"

  def ratio(self) -> str:
    """A ratio of costs: 0.42 (0.38-0.47); "never" where it is infinite."""
    if not np.isfinite(self.value):
      return "never"
    high = f"{self.high:.2f}" if np.isfinite(self.high) else "never"
    return f"{self.value:.2f} ({self.low:.2f}-{high})"

  def nats(self) -> str:
    """A difference of divergences: -7.1 (-8.3 to -6.0) nats."""
    return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f}) nats"

  def word(self, margin: float = MARGIN) -> str:
    """What may be said of a difference, of which more is better."""
    if self.low > 0:
      return "better"
    if self.low > -margin:
      return "as good"
    if self.high < 0:
      return "worse"
    return "undecided"


def read_run(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns what the results keep of a finished run; None if it goes on."""
  if not (directory / "export").is_dir():
    return None
  lines = report.read_metrics(directory / "metrics.jsonl")
  found = [
      x for x in lines if x.get("mode") == "sampled" and x["model"] == "student"
  ]
  seconds = {x["step"]: x["seconds"] for x in lines if "loss" in x}
  # A trial has no test set.
  last = [x for x in found if x["set"] == found[-1]["set"]]
  tested = [
      x
      for x in found
      if x["set"] == TEST and x.get("answer_kl") is not None
  ]
  scores = {
      "kl": [x["answer_kls"] for x in tested],
      "kl_positions": [
          [round(y, 4) for y in x["answer_kl_positions"]] for x in tested
      ],
  }
  return {
      **(scores if len(tested) == len(last) else {}),
      "steps": [x["step"] for x in last],
      "flops": [x["flops"] for x in last],
      "seconds": [round(seconds.get(x["step"], 0.0), 2) for x in last],
      **{name: [round(x[name], 4) for x in last] for name in _KEPT},
      "samples": last[0]["samples"],
      "problems": {
          name: next(x["problems"] for x in found if x["set"] == name)
          for name in sorted({x["set"] for x in found})
      },
      "verdicts": {
          name: [pack(x["verdicts"]) for x in found if x["set"] == name]
          for name in sorted({x["set"] for x in found})
      },
  }


def pack(verdicts: str) -> str:
  """Packs "0110..." four to a hexadecimal digit."""
  padded = verdicts + "0" * (-len(verdicts) % 4)
  return f"{int(padded, 2):0{len(padded) // 4}x}"


def unpack(packed: str, count: int) -> np.ndarray:
  """Returns the first `count` verdicts of `pack`: float [count]."""
  bits = f"{int(packed, 16):0{4 * len(packed)}b}"
  return np.array([float(bit) for bit in bits[:count]])


def _along(values: Sequence[Any], steps: Sequence[int], all_steps) -> list:
  """Repeats a run's last value where other runs go on."""
  at = np.searchsorted(steps, all_steps, side="right") - 1
  return [values[i] for i in at]


def curves(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Curve]:
  """Returns the curves by (task, cell).

  A seed that ended early keeps its last evaluation.
  """
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for run in sorted(runs, key=lambda run: run["seed"]):
    groups.setdefault((run["task"], run["cell"]), []).append(run)
  return {key: _curve(*key, group) for key, group in groups.items()}


def _curve(task: str, cell: str, runs: list[dict[str, Any]]) -> Curve:
  steps = sorted({step for run in runs for step in run["steps"]})

  def stacked(read: Callable[[dict[str, Any]], Sequence[Any]]) -> np.ndarray:
    return np.array([_along(read(run), run["steps"], steps) for run in runs])

  def verdicts(name: str) -> Callable[[dict[str, Any]], Sequence[Any]]:
    def read(run: dict[str, Any]) -> Sequence[Any]:
      problems, samples = run["problems"][name], run["samples"]
      return [
          unpack(x, problems * samples).reshape(problems, samples).mean(1)
          for x in run["verdicts"][name]
      ]

    return read

  right = {name: stacked(verdicts(name)) for name in runs[0]["verdicts"]}
  positions = None
  if all("kl" in run for run in runs):
    right[KL] = stacked(lambda run: run["kl"])
    bins = min(len(x) for run in runs for x in run["kl_positions"])
    positions = stacked(
        lambda run: [[*x[: bins - 1], sum(x[bins - 1 :])]
                     for x in run["kl_positions"]]
    )
  return Curve(
      task,
      cell,
      tuple(run["seed"] for run in runs),
      np.array(steps),
      stacked(lambda run: run["flops"]),
      right,
      stacked(lambda run: run["seconds"]),
      positions,
  )


def _weights(drawn: np.ndarray, count: int) -> np.ndarray:
  """Turns drawn indices [R, n] into weights [R, count]."""
  drawn = np.atleast_2d(drawn).astype(int)
  flat = drawn + count * np.arange(len(drawn))[:, None]
  counts = np.bincount(flat.ravel(), minlength=count * len(drawn))
  return counts.reshape(len(drawn), count) / drawn.shape[1]


def interval(
    statistic: Callable[..., np.ndarray], *found: Curve, of: str = TEST
) -> Interval:
  """Returns a statistic of some curves with its interval.

  Args:
    statistic: takes a `Sample` and the curves, all with the same seeds;
      returns [R]. It may be infinite.
    *found: the curves; seeds that one of them lacks are left out.
    of: what the problems are those of, a key of `Curve.right`.
  """
  seeds = sorted(set.intersection(*(set(curve.seeds) for curve in found)))
  found = tuple(curve.of(seeds) for curve in found)
  problems = found[0].right[of].shape[2]

  def resampled(drawn_seeds, drawn_problems, axis):
    del axis
    sample = Sample(
        _weights(drawn_seeds, len(seeds)), _weights(drawn_problems, problems)
    )
    values = statistic(sample, *found)
    return values if np.ndim(drawn_seeds) > 1 else values[0]

  # One seed says nothing of the spread of seeds, and the bootstrap refuses it.
  indices = np.arange(len(seeds)) if len(seeds) > 1 else np.zeros(2, int)
  with np.errstate(invalid="ignore"):  # Its standard error of infinite costs.
    drawn = stats.bootstrap(
        (indices, np.arange(problems)),
        resampled,
        n_resamples=_RESAMPLES,
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
  tail = (1 - _LEVEL) / 2
  # Without interpolation, since costs may be infinite.
  low, high = np.quantile(drawn, (tail, 1 - tail), method="nearest")
  return Interval(value(statistic, *found, of=of), float(low), float(high))


def value(
    statistic: Callable[..., np.ndarray], *found: Curve, of: str = TEST
) -> float:
  """Returns a statistic of curves with the same seeds."""
  seeds, problems = len(found[0].seeds), found[0].right[of].shape[2]
  every = Sample(
      np.full((1, seeds), 1 / seeds), np.full((1, problems), 1 / problems)
  )
  return float(statistic(every, *found)[0])


# Statistics: (sample, curves) -> [R].


def at_evaluation(number: int, of: str = TEST) -> Callable[..., np.ndarray]:
  """The mean at an evaluation, counted from 0; to be taken with the same `of`.

  It is an accuracy, or with `KL` the nats of a whole answer.
  """
  return lambda sample, curve: curve.mean(sample, of)[:, number]


at_start, at_end = at_evaluation(0), at_evaluation(-1)
kl_at_end = at_evaluation(-1, KL)


def at_stop(sample: Sample, curve: Curve) -> np.ndarray:
  return curve.mean(sample)[:, curve.stop]


def end_cost(sample: Sample, curve: Curve) -> np.ndarray:
  return curve.cost(sample)[:, -1]


def stop_cost(sample: Sample, curve: Curve) -> np.ndarray:
  return curve.cost(sample)[:, curve.stop]


def cost_to(goal: float) -> Callable[..., np.ndarray]:
  """FLOPs at which the accuracy first reaches a goal; infinite if never.

  Between two evaluations the accuracy is taken to rise in a straight line.
  """

  def statistic(sample: Sample, curve: Curve) -> np.ndarray:
    accuracy, cost = curve.mean(sample), curve.cost(sample)
    reached = accuracy >= goal
    after = np.argmax(reached, axis=1)
    rows, before = np.arange(len(after)), np.maximum(after - 1, 0)
    (y0, x0), (y1, x1) = (
        (accuracy[rows, at], cost[rows, at]) for at in (before, after)
    )
    share = np.where(after > before, (goal - y0) / np.maximum(y1 - y0, 1e-9), 1)
    return np.where(reached.any(1), x0 + share * (x1 - x0), np.inf)

  return statistic


def at_cost(share: float) -> Callable[..., np.ndarray]:
  """Accuracy at a share of what all updates of another curve cost.

  The statistic takes the curve and that other one. A run that ended cheaper
  keeps its last accuracy.
  """

  def statistic(sample: Sample, curve: Curve, whole: Curve) -> np.ndarray:
    return _read(sample, curve, share * whole.cost(sample)[:, -1])

  return statistic


def at_equal_cost(sample: Sample, a: Curve, b: Curve) -> np.ndarray:
  """Accuracy of `a` minus that of `b`, where the cheaper one of them ends."""
  budget = np.minimum(a.cost(sample)[:, -1], b.cost(sample)[:, -1])
  return _read(sample, a, budget) - _read(sample, b, budget)


def _read(sample: Sample, curve: Curve, budget: np.ndarray) -> np.ndarray:
  """Reads accuracies at FLOPs [R] along a curve."""
  along = zip(budget, curve.cost(sample), curve.mean(sample), strict=True)
  return np.array([np.interp(*point) for point in along])


def difference(
    first: Callable[..., np.ndarray], second: Callable[..., np.ndarray]
) -> Callable[..., np.ndarray]:
  """Returns `first` of the first curve minus `second` of the second."""
  return lambda sample, a, b: first(sample, a) - second(sample, b)


def quotient(
    first: Callable[..., np.ndarray], second: Callable[..., np.ndarray]
) -> Callable[..., np.ndarray]:
  """Returns `first` of the first curve over `second` of the second."""

  def statistic(sample: Sample, a: Curve, b: Curve) -> np.ndarray:
    top, bottom = first(sample, a), second(sample, b)
    # Where the second never gets there, the first is infinitely cheaper,
    # unless it does not get there either.
    with np.errstate(invalid="ignore"):
      return np.where(
          np.isinf(top), np.inf, np.where(np.isinf(bottom), 0, top / bottom)
      )

  return statistic


# What is compared.


def load(file: pathlib.Path) -> list[dict[str, Any]]:
  """Reads `runs.jsonl`; nothing if there is none."""
  if not file.is_file():
    return []
  return [json.loads(line) for line in file.read_text().splitlines()]


def chosen_rate(
    runs: Sequence[dict[str, Any]], task: str, cell: str
) -> float | None:
  """Returns the learning rate that a cell's trials chose; None without trials.

  It is the one with the highest accuracy on the validation split at any
  evaluation, that is at its best stopping point.
  """
  scores = {
      run["rate"]: trial_score(run)
      for run in runs
      if "rate" in run and (run["task"], run["cell"]) == (task, cell)
  }
  return max(scores, key=scores.__getitem__) if scores else None


def trial_score(run: dict[str, Any]) -> float:
  """Returns what `chosen_rate` compares."""
  count = run["problems"][VALIDATION] * run["samples"]
  found = [unpack(x, count).mean() for x in run["verdicts"][VALIDATION]]
  return float(max(found))


def compare_seed(curve: Curve, run: dict[str, Any]) -> tuple[str, bool]:
  """Says whether a run with a new seed lands where the others say.

  That is the 95 % prediction interval of one more seed: Student's t with the
  seeds' standard deviation, which is at least that of independent problems.
  """
  new = _curve(curve.task, curve.cell, [run])
  before, after = curve.right[TEST][:, -1], new.right[TEST][0, -1]
  means, count = before.mean(1), len(before)
  mean, spread = means.mean(), means.std(ddof=1) if count > 1 else 0.0
  spread = max(spread, np.sqrt(mean * (1 - mean) / before.shape[1]))
  quantile = stats.t.ppf((1 + _LEVEL) / 2, max(count - 1, 1))
  half = quantile * spread * np.sqrt(1 + 1 / count)
  value = after.mean()
  inside = bool(abs(value - mean) <= half)
  low, high = max(mean - half, 0), min(mean + half, 1)
  return (
      f"{curve.task} {curve.cell} seed {run['seed']}: {value:.1%};"
      f" {count} seeds say {low:.1%} to {high:.1%} for one more:"
      f" {'inside' if inside else 'OUTSIDE'}. It took"
      f" {new.seconds[0, -1]:.0f} s of updates and {new.flops[0, -1]:.3g}"
      f" FLOPs, the others {curve.flops[:, -1].mean():.3g}."
  ), inside


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two cells and what is compared.

  Attributes:
    finding: what the paper, or the package, says.
    first: a cell.
    second: a cell.
    what: "end", "stop", "equal" (the end of the cheaper one, and the other at
      the same FLOPs), a share of full distillation's FLOPs, or "to 90%". A
      share that comes before the first evaluation of one of the two is raised
      to that.
  """

  finding: str
  first: str
  second: str
  what: str | float


def _shares(finding: str, first: str, second: str) -> list[Comparison]:
  shares = (0.1, 0.25, 0.5)
  return [Comparison(finding, first, second, x) for x in shares]


def _goals(finding: str, first: str, second: str) -> list[Comparison]:
  return [Comparison(finding, first, second, f"to {x:.0%}") for x in GOALS]


_GROWING = "1. A growing prefix matches full distillation at fewer FLOPs"
_SHORT = "2. A short prefix is best under a small budget, a longer one later"
_SPOILED = "3. A fixed short prefix can spoil the rest; a growing one does not"
_FIRST = "4. The first tokens carry the signal"
_DIVERGENCE = "5. Reverse KL on the student's own prefixes is best"
_OTHERS = "Other schedules and SeqKD beside full distillation"
_ALTERNATIVES = (
    *("fixed-8", "fixed-16", "fixed-64"),
    *("random", "audited", "plateau", "seqkd"),
)
_SHORTEST = "shortest"
# What is compared under a name: the first of these that was run. A task with
# short answers has a prefix of 8, and whole answers instead of prefixes of 64.
_STAND_INS = {
    _SHORTEST: ("fixed-8", "fixed-16"),
    "fixed-64": ("fixed-64", "full"),
    "forward": ("forward", "full-forward"),
}
COMPARISONS = (
    Comparison(_GROWING, "linear", "full", "end"),
    Comparison(_GROWING, "linear", "full", "stop"),
    Comparison(_GROWING, "linear", "full", "equal"),
    Comparison(_GROWING, "linear", "full-fast", "equal"),
    Comparison(_GROWING, "linear", "full-forward", "equal"),
    *_shares(_GROWING, "linear", "full"),
    *_goals(_GROWING, "linear", "full"),
    *_shares(_SHORT, "fixed-64", "full"),
    *_shares(_SHORT, "fixed-64-fast", "full-fast"),
    *_shares(_SHORT, _SHORTEST, "full"),
    Comparison(_SHORT, _SHORTEST, "full", "equal"),
    Comparison(_SHORT, "fixed-64", _SHORTEST, "end"),
    Comparison(_SPOILED, "fixed-64", "before", "end"),
    Comparison(_SPOILED, _SHORTEST, "before", "end"),
    Comparison(_SPOILED, "linear", "fixed-64", "end"),
    Comparison(_SPOILED, "linear", _SHORTEST, "end"),
    Comparison(_FIRST, "first-32", "32-64", "end"),
    Comparison(_FIRST, "first-32", "last-32", "end"),
    Comparison(_DIVERGENCE, "fixed-64", "forward", "end"),
    Comparison(_DIVERGENCE, "fixed-64", "off-reverse", "end"),
    Comparison(_DIVERGENCE, "fixed-64", "off-forward", "end"),
    Comparison(_DIVERGENCE, "off-forward", "forward", "end"),
    Comparison(_DIVERGENCE, "full", "full-forward", "end"),
    Comparison(_DIVERGENCE, "full", "full-forward", "stop"),
    *(
        Comparison(_DIVERGENCE, cell, other, what)
        for cell in ("forward", "off-forward")
        for other in ("full", "full-forward")
        for what in ("end", "equal")
    ),
    Comparison(_DIVERGENCE, "off-forward", "full-fast", "equal"),
    Comparison(_DIVERGENCE, "off-forward", "linear", "equal"),
    Comparison(_DIVERGENCE, "forward", "before", "end"),
    Comparison(_DIVERGENCE, "off-forward", "before", "end"),
    *(
        Comparison(_OTHERS, cell, "full", what)
        for cell in _ALTERNATIVES
        for what in ("end", "stop", "equal")
    ),
    Comparison(_OTHERS, "random", "linear", "end"),
    *(
        Comparison(_OTHERS, cell, "full-fast", "equal")
        for cell in _ALTERNATIVES
    ),
    *(
        Comparison(_OTHERS, cell, "seqkd", "equal")
        for cell in ("linear", "fixed-64")
    ),
)


@dataclasses.dataclass(frozen=True)
class Finding:
  """A finding of the paper, and what decides it on a task.

  Attributes:
    text: what it says.
    by: comparisons, and the words that each must have if it holds. It does not
      hold if one has the opposite word.
  """

  text: str
  by: tuple[tuple[Comparison, tuple[str, ...]], ...]


_LOSES_NOTHING = ("better", "as good")
FINDINGS = (
    Finding(
        _GROWING,
        (
            (Comparison(_GROWING, "linear", "full", "end"), _LOSES_NOTHING),
            (Comparison(_GROWING, "linear", "full", "equal"), ("better",)),
        ),
    ),
    Finding(
        _SHORT,
        (
            (Comparison(_SHORT, _SHORTEST, "full", 0.1), ("better",)),
            (Comparison(_SHORT, _SHORTEST, "full", "end"), ("worse",)),
        ),
    ),
    Finding(
        _SPOILED,
        (
            (Comparison(_SPOILED, _SHORTEST, "before", "end"), ("worse",)),
            (Comparison(_SPOILED, "linear", _SHORTEST, "end"), ("better",)),
        ),
    ),
    Finding(
        _FIRST,
        (
            (Comparison(_FIRST, "first-32", "32-64", "end"), ("better",)),
            (Comparison(_FIRST, "first-32", "last-32", "end"), ("better",)),
        ),
    ),
    Finding(
        _DIVERGENCE,
        tuple(
            (Comparison(_DIVERGENCE, "fixed-64", other, "end"), _LOSES_NOTHING)
            for other in ("forward", "off-reverse", "off-forward")
        ),
    ),
)
_OPPOSITE = {"better": "worse", "as good": "worse", "worse": "better"}


def verdict(finding: Finding, found: Mapping[str, Curve]) -> tuple[str, str]:
  """Returns whether a finding holds on a task, and the differences.

  "Holds" and "does not hold" are said by intervals alone, "in one run" if there
  is one seed; "open" is all else, and "not run" where a cell is missing that
  has no stand-in.
  """
  done = [
      (compare(_as_run(of, found), found), wanted) for of, wanted in finding.by
  ]
  if any(one is None for one, _ in done):
    return "not run", ""
  words = [(one.word(), wanted) for one, wanted in done]
  differences = "; ".join(
      f"{one.of.first} - {one.of.second} {_when(one.of.what)}"
      f" {one.gain()}"
      for one, _ in done
  )
  seeds = min(one.seeds for one, _ in done)
  said = f"{differences} ({seeds} seed{'s' if seeds > 1 else ''})"
  # The intervals of one seed do not know how much runs differ.
  once = " in one run" if seeds == 1 else ""
  if all(word in wanted for word, wanted in words):
    return f"holds{once}", said
  if any(word == _OPPOSITE[wanted[0]] for word, wanted in words):
    return f"does not hold{once}", said
  return "open", said


def _as_run(of: Comparison, found: Mapping[str, Curve]) -> Comparison:
  """Puts stand-ins in the place of cells that were not run."""
  first, second = (
      next((x for x in _STAND_INS.get(name, ()) if x in found), name)
      for name in (of.first, of.second)
  )
  return dataclasses.replace(of, first=first, second=second)


def _statistics(what: str | float) -> tuple[Callable | None, Callable | None]:
  """Returns the statistics of accuracy and of cost that "what" compares."""
  if what == "end":
    return at_end, end_cost
  if what == "stop":
    return at_stop, stop_cost
  if isinstance(what, str):
    return None, cost_to(float(what.removeprefix("to ").rstrip("%")) / 100)
  return at_cost(what), None


@dataclasses.dataclass(frozen=True)
class Compared:
  """A comparison's outcome.

  Attributes:
    of: what was compared.
    seeds: how many.
    accuracy: the difference of accuracies, or of minus the nats of an answer
      where the teacher scored answers; None if only costs are compared.
    cost: the ratio; None if only accuracies are compared.
    nats: of an answer before training; None where accuracies are compared.
  """

  of: Comparison
  seeds: int
  accuracy: Interval | None
  cost: Interval | None
  nats: float | None = None

  def gain(self) -> str:
    """The difference with its interval; empty if only costs are compared."""
    if self.accuracy is None:
      return ""
    scored = self.nats is not None
    return self.accuracy.nats() if scored else self.accuracy.points()

  def word(self) -> str:
    """What may be said of the first."""
    if self.accuracy is not None:
      return self.accuracy.word(MARGIN * (self.nats or 1))
    if not np.isfinite(self.cost.value):
      return "never there"
    if self.cost.high < 1:
      return "cheaper"
    return "dearer" if self.cost.low > 1 else "undecided"


def compare(of: Comparison, found: Mapping[str, Curve]) -> Compared | None:
  """Compares two cells of a task.

  Returns:
    The outcome; None if the cells have no seed in common, and where the
    divergence is compared, which has neither goals nor stopping points.
  """
  whole, first = found.get("full"), found.get(of.first)
  second = first if of.second == "before" else found.get(of.second)
  if whole is None or first is None or second is None:
    return None
  seeds = len(set(first.seeds) & set(second.seeds) & set(whole.seeds))
  if not seeds:
    return None
  nats = None
  if whole.is_scored:
    if of.what == "stop" or str(of.what).startswith("to "):
      return None
    nats = float(whole.right[KL][:, 0].mean())
    whole, first, second = (x.by_divergence() for x in (whole, first, second))
  if of.second == "before":
    gain = interval(difference(at_end, at_start), first, first)
    return Compared(of, seeds, gain, None, nats)
  if of.what == "equal":
    gain = interval(at_equal_cost, first, second)
    return Compared(of, seeds, gain, None, nats)
  if not isinstance(of.what, str):
    spent = whole.flops[:, -1].mean()
    first_seen = max(x.flops[:, 1].mean() for x in (first, second)) / spent
    of = dataclasses.replace(of, what=max(of.what, float(first_seen)))
  accuracy, cost = _statistics(of.what)
  if not isinstance(of.what, str):

    def gain_at(sample: Sample, a: Curve, b: Curve, c: Curve) -> np.ndarray:
      return accuracy(sample, a, c) - accuracy(sample, b, c)

    gain = interval(gain_at, first, second, whole)
    return Compared(of, seeds, gain, None, nats)
  return Compared(
      of,
      seeds,
      accuracy and interval(difference(accuracy, accuracy), first, second),
      interval(quotient(cost, cost), first, second),
      nats,
  )


# Pages.


def _row(values: Sequence[Any]) -> str:
  return "| " + " | ".join(str(v) for v in values) + " |"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(_row(line) for line in lines) + "\n"


def _share(curve: Curve, cost: Callable, whole: Curve) -> str:
  seeds = sorted({*curve.seeds} & {*whole.seeds})
  share = value(quotient(cost, end_cost), curve.of(seeds), whole.of(seeds))
  return f"{share:.1%}" if np.isfinite(share) else "-"


def methods_table(
    found: Mapping[str, Curve], about: Mapping[str, str]
) -> str:
  """Returns a task's table of methods; shares are of full's whole FLOPs."""
  whole = found["full"]
  before = interval(at_start, whole).percent()
  rows = [["before", len(whole.seeds), 0, before] + [""] * 9]
  for name, text in about.items():
    if name not in found:
      continue
    curve = found[name]
    rows.append([
        text,
        len(curve.seeds),
        curve.steps[-1],
        interval(at_end, curve).percent(),
        _share(curve, end_cost, whole),
        f"{curve.fastest / whole.fastest:.0%}",
        curve.steps[curve.stop],
        interval(at_stop, curve).percent(),
        _share(curve, stop_cost, whole),
        *(_share(curve, cost_to(goal), whole) for goal in GOALS),
    ])
  header = [
      "", "seeds", "updates", "at the end, %", "FLOPs", "time", "stop after",
      "there, %", "FLOPs", *(f"to {goal:.0%}" for goal in GOALS),
  ]
  return _markdown(header, rows)


def divergence_table(
    found: Mapping[str, Curve],
    about: Mapping[str, str],
    again: Mapping[str, Curve] = types.MappingProxyType({}),
) -> str:
  """Returns how far whole answers are from the teacher; empty if unknown.

  Args:
    found: the curves of a task, by cell.
    about: what the cells are called.
    again: other runs of the cells, which stand in a column of their own.
  """
  scored = {n: c for n, c in found.items() if n in about and KL in c.right}
  if "full" not in scored:
    return ""
  whole = scored["full"]
  rows = [_nats_row("before", whole, 0, "", again.get("full"))]
  for name, text in about.items():
    if name in scored:
      curve, beside = scored[name], ""
      if name != "full":
        gap = interval(
            difference(kl_at_end, kl_at_end), curve, whole, of=KL
        )
        beside = f"{gap.value:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"
      rows.append(_nats_row(text, curve, -1, beside, again.get(name)))
  header = [
      "reverse KL, nats an answer",
      "seeds",
      "whole answer",
      "minus full's",
      "tokens 0 to 16",
      "behind",
      "in another run",
  ]
  width = len(header) if again else -1
  return _markdown(header[:width], [row[:width] for row in rows])


def _nats_row(
    text: str, curve: Curve, at: int, beside: str, other: Curve | None
) -> list[Any]:
  found = interval(at_evaluation(at, KL), curve, of=KL)
  first, *rest = curve.positions[:, at].mean(0)
  return [
      text,
      len(curve.seeds),
      f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})",
      beside,
      f"{first:.2f}",
      f"{sum(rest):.2f}",
      f"{other.right[KL][:, at].mean():.2f}" if other else "",
  ]


def verdicts_table(
    by_task: Mapping[str, Mapping[str, Curve]], tasks: Mapping[str, str]
) -> str:
  """Returns a row for each finding and task: what is said of it, and why."""
  rows = []
  for finding in FINDINGS:
    for task, found in by_task.items():
      said, why = verdict(finding, found)
      first = "" if rows and rows[-1][-1] == finding.text else finding.text
      rows.append([first, tasks[task], said, why, finding.text])
  header = [
      "the paper's finding",
      "task",
      "verdict",
      "differences, in points or nats nearer to the teacher",
  ]
  return _markdown(header, [row[:-1] for row in rows])


def _when(what: str | float) -> str:
  if isinstance(what, str):
    words = {
        "end": "at the end",
        "stop": "each at its best stop",
        "equal": "at equal FLOPs",
    }
    return words.get(what, what)
  return f"at {what:.0%} of full's FLOPs"


def comparisons_table(
    found: Mapping[str, Curve], about: Mapping[str, str]
) -> str:
  """Returns a task's comparisons, with intervals and what they allow to say."""
  rows, names = [], about | {"before": _BEFORE}
  for of in dict.fromkeys(_as_run(of, found) for of in COMPARISONS):
    done = compare(of, found) if of.first != of.second else None
    if done is None or done.of != of:  # A share that was raised.
      continue
    rows.append([
        of.finding if not rows or rows[-1][-1] != of.finding else "",
        f"{names[of.first]} - {names[of.second]}",
        _when(of.what),
        done.gain(),
        done.cost.ratio() if done.cost else "",
        done.seeds,
        done.word(),
        of.finding,
    ])
  header = [
      "the paper's finding", "compared", "when",
      "difference, points" if not found["full"].is_scored
      else "nearer to the teacher",
      "ratio of FLOPs", "seeds", "the first is",
  ]
  return _markdown(header, [row[:-1] for row in rows])


def trials_table(
    runs: Sequence[dict[str, Any]], task: str, about: Mapping[str, str]
) -> str:
  """Returns a task's trials of learning rates; the chosen one is bold."""
  trials = [run for run in runs if "rate" in run and run["task"] == task]
  rates = sorted({run["rate"] for run in trials})
  rows = []
  for cell in dict.fromkeys(run["cell"] for run in trials):
    chosen = chosen_rate(trials, task, cell)
    scores = {
        run["rate"]: f"{trial_score(run):.1%}"
        for run in trials
        if run["cell"] == cell
    }
    rows.append([
        about[cell],
        *(
            f"**{scores[rate]}**" if rate == chosen else scores.get(rate, "")
            for rate in rates
        ),
    ])
  return _markdown(["", *(f"{rate:g}" for rate in rates)], rows)


def summary(
    by_task: Mapping[str, Mapping[str, Curve]],
    tasks: Mapping[str, str],
    mechanism: Sequence[dict[str, Any]],
) -> str:
  """Returns the README's table: the paper's method on each task.

  Beside it stands what can be measured before training: where the gradient on
  8 tokens points, and what 8 tokens of the teacher's answer are worth.
  """
  rows = []
  for task, found in by_task.items():
    if "linear" not in found:
      continue
    end, equal, fast = (
        compare(Comparison(_GROWING, "linear", other, what), found)
        for other, what in (
            ("full", "end"), ("full", "equal"), ("full-fast", "equal"),
        )
    )
    mine = {x["what"]: x for x in mechanism if x["task"] == task}
    rows.append([
        tasks[task],
        end.seeds,
        *_before_training(mine),
        end.gain(),
        _share(found["linear"], end_cost, found["full"]),
        equal.gain(),
        fast.gain() if fast else "",
    ])
  header = [
      "student", "seeds", "gradient on 8 tokens: cosine",
      "8 tokens of the teacher's: accuracy, %", "at the end",
      "for so much of full's FLOPs", "at equal FLOPs",
      "and full with a larger rate",
  ]
  return _markdown(header, rows)


def _before_training(found: Mapping[str, dict[str, Any]]) -> tuple[str, str]:
  """Returns the cosine, and the accuracy without and with 8 tokens."""
  if not {"gradient", "teacher_prefix"} <= set(found):
    return "", ""
  (cosine,) = (
      x["cosine"] for x in found["gradient"]["prefixes"] if x["length"] == 8
  )
  right = {
      x["length"]: 100 * x["accuracy"] for x in found["teacher_prefix"]["rows"]
  }
  return f"{cosine:.2f}", f"{right[0]:.1f} to {right[8]:.1f}"


# Positions are told apart at these borders, in tokens.
_BORDERS = (0, 16, 64)


def binned(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """Returns nats per rollout between the borders, of `analyze`'s positions."""
  count, kl = (np.array(values[name]) for name in ("rollouts", "kl"))
  total = np.add.reduceat(count * kl, _BORDERS) / count[0]
  return {"nats": [round(float(x), 5) for x in total]}


def _seeds_interval(values: Sequence[float]) -> str:
  """A mean over seeds, with its interval by Student's t."""
  mean, count = np.mean(values), len(values)
  if count < 2:
    return f"{mean:.2f}"
  half = stats.sem(values) * stats.t.ppf((1 + _LEVEL) / 2, count - 1)
  return f"{mean:.2f} ({max(mean - half, 0):.2f}-{mean + half:.2f})"


# What is kept of an analysis of the teacher's prefixes.
PREFIX_FIELDS = (
    "length",
    "problems",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_alone",
)


def mechanism_tables(
    lines: Sequence[dict[str, Any]], task: str, about: Mapping[str, str]
) -> str:
  """Returns where a task's divergence is and where its gradient points."""
  mine = [x for x in lines if x["task"] == task]
  parts = [
      _positions([x for x in mine if x["what"] == "position"], about),
      *(_gradient(x) for x in mine if x["what"] == "gradient"),
      *(_prefixes(x["rows"]) for x in mine if x["what"] == "teacher_prefix"),
  ]
  return "\n".join(filter(None, parts))


def _positions(
    lines: Sequence[dict[str, Any]], about: Mapping[str, str]
) -> str:
  cells: dict[str, list[dict[str, Any]]] = {}
  for line in lines:
    cells.setdefault(line["cell"], []).append(line)
  if not cells:
    return ""
  names = {"before": "the student before"} | about
  rows = [
      [
          names[cell],
          len(found),
          *(
              _seeds_interval([x["nats"][i] for x in found])
              for i in range(len(_BORDERS))
          ),
      ]
      for cell, found in cells.items()
  ]
  header = [
      "reverse KL, nats a rollout",
      "seeds",
      "tokens 0 to 16",
      "16 to 64",
      "behind",
  ]
  return (
      "Where the divergence to the teacher is, on whole rollouts of the student"
      " after training (to 128 prompts of the training set):\n\n"
      + _markdown(header, rows)
  )


def _gradient(line: Mapping[str, Any]) -> str:
  prefixes = line["prefixes"]
  table = _markdown(
      ["prefix", *(x["length"] for x in prefixes)],
      [
          ["cosine", *(f"{x['cosine']:.2f}" for x in prefixes)],
          ["norm, of the whole", *(f"{x['norm']:.2f}" for x in prefixes)],
      ],
  )
  return (
      "Before training, the cosine of the gradient of the loss on a prefix with"
      f" that on whole rollouts, from {line['rollouts']} rollouts. (That of two"
      f" halves of the rollouts, whole, is {line['halves']:.2f}.)\n\n{table}"
  )


def _prefixes(rows: Sequence[Mapping[str, Any]]) -> str:
  def percent(row: Mapping[str, Any]) -> str:
    return Interval(
        row["accuracy"], row["accuracy_low"], row["accuracy_high"]
    ).percent()

  table = _markdown(
      ["tokens of the teacher's answer", *(x["length"] for x in rows)],
      [
          ["accuracy, %", *map(percent, rows)],
          ["without them", *(f"{100 * x['accuracy_alone']:.1f}" for x in rows)],
          ["problems", *(x["problems"] for x in rows)],
      ],
  )
  return (
      "Before training, the student goes on from the first tokens of the"
      " teacher's answers, whose last 40 tokens at least stay hidden (the"
      " paper's figure 3); sampled, intervals of 95 % over problems:\n\n"
      + table
  )


_COLORS = (*(f"C{i}" for i in range(10)), "black", "olive")


def draw(
    panels: Mapping[str, Mapping[str, Curve]],
    about: Mapping[str, str],
    path: pathlib.Path,
) -> None:
  """Draws what methods reach against cumulative FLOPs, a panel for each task.

  That is the accuracy on the test split; or the divergence of whole answers,
  where the teacher scored them.

  Args:
    panels: by what stands over a panel, the curves by cell.
    about: the cells that are drawn, and their names in the legend.
    path: of the PNG.
  """
  columns = min(len(panels), 2)
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(5.4 * columns, 4.0 * rows))
  grid = figure.subplots(rows, columns, squeeze=False).flat
  unused = grid[len(panels) :]
  for axes in unused:
    axes.set_axis_off()
  lines = {}
  for axes, (title, found) in zip(grid, panels.items(), strict=False):
    whole = found["full"].flops[:, -1].mean()
    of = KL if found["full"].is_scored else TEST
    for i, name in enumerate(about):
      if name in found:
        color = _COLORS[i % len(_COLORS)]
        lines[name] = _draw_curve(axes, found[name], whole, color, of)
    before = found["full"].right[of][:, 0].mean()
    lines[_BEFORE] = axes.axhline(before, color="gray", linestyle=":")
    axes.set(title=title, xlabel="FLOPs, % of full distillation's")
    axes.set(xscale="log", ylim=(0, None if of == KL else 1))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if of == KL:
      axes.set_ylabel("reverse KL to the teacher, nats an answer")
    else:
      axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
      axes.set_ylabel("accuracy on the test split, sampled")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  lines[_BEFORE] = lines.pop(_BEFORE)  # The last one.
  host, place = figure, {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
  if len(unused):
    host, place = unused[0], {"loc": "center"}
  host.legend(
      lines.values(),
      [about.get(name, name) for name in lines],
      frameon=False,
      fontsize=9,
      **place,
  )
  figure.tight_layout()
  figure.savefig(path, dpi=120, bbox_inches="tight")


def _draw_curve(
    axes: Any, curve: Curve, whole: float, color: str, of: str
) -> Any:
  """Draws a curve with its band and its best stopping point."""
  points = [
      interval(at_evaluation(number, of), curve, of=of)
      for number in range(1, len(curve.steps))
  ]
  x = 100 * curve.flops.mean(0)[1:] / whole
  value, low, high = np.array([dataclasses.astuple(p) for p in points]).T
  axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
  (line,) = axes.plot(x, value, color=color, linewidth=1.4)
  at = max(curve.stop - 1, 0)
  axes.plot(x[at], value[at], color=color, marker="o", markersize=5)
  return line


_INTRODUCTION = """# Results on the bundled tasks

    python -m prefix_distill.experiments.reproduce

makes every number on this page and adds each finished run to `runs.jsonl`
(FLOPs and the verdict on every answer); `--report` writes the page from that
file again. One run with a seed of your own, beside what the others say:

    python -m prefix_distill.experiments.reproduce --check chain/linear/77

- **FLOPs** are those of sampling, the teacher's scoring and the updates,
  whole rollouts of the audited schedule included. SeqKD pays for the
  teacher's answers as it uses them. Evaluation is left out for all. In the
  tables they are shares of what full distillation spends to its end.
- **Time** is that of the updates of a method's fastest seed, compilation
  included, as a share of full distillation's. It is rough: runs shared machines
  with other work, and not all were on the same kind. SeqKD's is without the
  teacher's sampling.
- **Stop** is a method's best stopping point: the cheapest evaluation within
  {margin:.0f} points of its best on the validation split. All choices
  (stopping points, learning rates) look at the validation split alone;
  accuracies are those of the test split, sampled at temperature 1.
- **Intervals** are of 95 %, from a bootstrap over seeds and problems, paired
  where two methods are compared. "As good" means that the interval of the
  difference ends above minus {margin:.0f} points, a margin that was set
  before the runs; "better" and "worse" that it leaves out 0. With one seed an
  interval is over problems alone.
- **Learning rates** are those of the best stop in the trials. This rule was
  chosen after the trials had been seen: by the mean over a run, full
  distillation, the growing and the audited prefix would have taken 1e-3 on
  the chains of sums. So two cells with 1e-3 were added.
- **To 90 %**: FLOPs at which the mean accuracy first reaches it, along the
  curve. **At 10 %**: both at that share of full distillation's FLOPs. Between
  two evaluations the curve is a straight line. **At equal FLOPs**: where the
  cheaper one of the two ends.
- **Sizes**: the teacher is as large as the student, except for the student with
  every second layer. A larger teacher makes its scores dearer, and its
  answers much dearer.

The bundled tasks have models of half a million parameters; the paper's are
Qwen3 of 1.7 and 8 billion. What holds here need not hold there, and the other
way round.

## Verdicts

A finding holds on a task if its comparisons' intervals say so, one by one; it
does not hold if an interval says the opposite; else it is open. The language
model's students are hardly ever right yet, so there the divergence of answers
decides; its margin is {margin:.0f} % of what it was before training, and was
set when one seed of each method had been seen. One seed says what holds in one
run: its intervals do not know how much runs differ, and those of the last
student differ much, as its column "in another run" shows. These other runs, of
the same seed, computed in float32 on another processor, with 60 problems, a
teacher of the same recipe and, at the end, 30 answers scored (2026-11-30 and
2026-12-01); they are in `again.jsonl`.

{verdicts}

![accuracy against cumulative FLOPs](accuracy_flops.png)

Dots are best stopping points, bands 95 % intervals; the dotted line is the
student before training.
"""


def with_summary(text: str, table: str) -> str:
  """Puts a table between `<!-- results -->` and `<!-- end -->` of a page."""
  begin, end = "<!-- results -->\n", "<!-- end -->"
  before, opened, rest = text.partition(begin)
  if not opened:
    return text
  return before + begin + table + end + rest.partition(end)[2]


def write(
    runs: Sequence[dict[str, Any]],
    docs: pathlib.Path,
    tasks: Mapping[str, str],
    cells: Mapping[str, str],
    drawn: Sequence[str],
    mechanism: Sequence[dict[str, Any]] = (),
    notes: Mapping[str, str] = types.MappingProxyType({}),
    again: Sequence[dict[str, Any]] = (),
) -> None:
  """Writes the page and its figure, and the table of the README above them.

  Args:
    runs: of `runs.jsonl`.
    docs: the directory.
    tasks: their names and what stands over their tables.
    cells: their names and what they are called in tables.
    drawn: the cells in the figure.
    mechanism: of `mechanism.jsonl`.
    notes: by task, what a reader should know of it.
    again: of `again.jsonl`, runs that stand beside those.
  """
  by_task = _by_task(runs, tasks)
  text = page(runs, tasks, cells, mechanism, notes, again)
  if not text:
    print("There are no two runs of one cell yet.")
    return
  (docs / "README.md").write_text(text)
  readme = docs.parents[1] / "README.md"
  if readme.is_file():
    table = summary(by_task, tasks, mechanism)
    readme.write_text(with_summary(readme.read_text(), table))
  panels = {tasks[task]: found for task, found in by_task.items()}
  chosen = {name: cells[name] for name in drawn}
  draw(panels, chosen, docs / "accuracy_flops.png")
  print(text.partition("## Verdicts")[2].partition("![")[0].strip())
  print(f"Written: {docs / 'README.md'}, accuracy_flops.png beside it.")


def _by_task(
    runs: Sequence[dict[str, Any]], tasks: Iterable[str]
) -> dict[str, dict[str, Curve]]:
  """Returns the curves by task and cell; tasks without `full` are left out."""
  known = curves(run for run in runs if "rate" not in run)
  found = {
      task: {cell: x for (name, cell), x in known.items() if name == task}
      for task in tasks
  }
  return {task: cells for task, cells in found.items() if "full" in cells}


def _sizes(curve: Curve) -> str:
  """Says how many problems a task has, and what full distillation costs."""
  count = {name: x.shape[2] for name, x in curve.right.items()}
  text = f"{count[TEST]} test problems"
  if VALIDATION in count:
    text += f", {count[VALIDATION]} validation problems"
  flops = curve.flops[:, -1].mean()
  return (
      f"{text}. Full distillation takes {flops:.2g} FLOPs and"
      f" {curve.fastest:.0f} s."
  )


def page(
    runs: Sequence[dict[str, Any]],
    tasks: Mapping[str, str],
    cells: Mapping[str, str],
    mechanism: Sequence[dict[str, Any]] = (),
    notes: Mapping[str, str] = types.MappingProxyType({}),
    again: Sequence[dict[str, Any]] = (),
) -> str:
  """Returns `docs/results/README.md`; empty without runs."""
  by_task = _by_task(runs, tasks)
  if not by_task:
    return ""
  others = _by_task(again, tasks)
  parts = [
      _INTRODUCTION.format(
          margin=100 * MARGIN,
          verdicts=verdicts_table(by_task, tasks),
      )
  ]
  for task, found in by_task.items():
    parts += [
        f"## {tasks[task][0].upper()}{tasks[task][1:]}\n",
        f"{_sizes(found['full'])} {notes.get(task, '')}".rstrip() + "\n",
        methods_table(found, cells),
        divergence_table(found, cells, others.get(task, {})),
        comparisons_table(found, cells),
    ]
    if any("rate" in run and run["task"] == task for run in runs):
      parts += [
          "Trials of learning rates, one seed that is used for nothing else;"
          " highest accuracy on the validation split:\n",
          trials_table(runs, task, cells),
      ]
    parts.append(mechanism_tables(mechanism, task, cells))
  return "\n".join(filter(None, parts))
