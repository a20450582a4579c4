"""Prefix-length controllers: statistics of the last update in, next cap out.

A controller is a frozen dataclass of settings. What it remembers is a flat
dict of numbers that is saved with every checkpoint, so a resumed run goes on
with the cap that it would have had.

  linear     the paper's: a fixed step after every update, or every so many
             (POPD, arXiv 2605.31490)
  fixed      the same cap throughout
  random     a cap drawn anew for every update: the control that a rule based
             on data has to beat
  drift      Prune-OPD (arXiv 2605.07804): grows while enough rollouts stay
             close to the teacher up to the cap, and shrinks otherwise
  plateau    Adaptive FastOPD (arXiv 2607.29494): grows when the divergence on
             the last band before the cap has stopped falling and enough
             rollouts reach it
  agreement  KAT (arXiv 2606.09471): full rollouts, each cut where student and
             teacher have agreed for a while; see `agreement.py`
  audited    this package's: when a prefix has been learned, an update at full
             length shows where the divergence sits; the cap goes where the
             first so much of it ends, and training stops when nothing is left
"""

import dataclasses
from typing import Any
from typing import Protocol

import numpy as np

from prefix_distill.config import Config
from prefix_distill.distill import prefix_length
from prefix_distill.recipe import PrefixSpec

# JSON.
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stats:
  """What one update showed.

  Attributes:
    lengths: [rollouts], tokens sampled of each.
    kl: [P], the mean divergence at each position; NaN where nobody was.
    count: [P], rollouts that reached the position.
    reliable: [P], share of rollouts that are reliable up to the position, for
      `drift`; None for the others.
    minima: [rollouts], for `agreement`; None for the others.
  """

  lengths: np.ndarray
  kl: np.ndarray
  count: np.ndarray
  reliable: np.ndarray | None = None
  minima: np.ndarray | None = None

  def band(self, start: int, end: int) -> float:
    """The mean divergence per token in [start, end); NaN without tokens."""
    count = self.count[start:end]
    if not count.sum():
      return float("nan")
    return float(np.nansum(self.kl[start:end] * count) / count.sum())


class Controller(Protocol):
  """Chooses caps."""

  def start(self) -> State:
    """Returns the state before the first update."""

  def cap(self, state: State) -> int:
    """Returns the next update's cap in tokens; 0 to stop training."""

  def next(self, state: State, stats: Stats) -> State:
    """Returns the state after an update with `cap(state)`."""


@dataclasses.dataclass(frozen=True)
class Planned:
  """Linear, fixed and full: the cap depends on the update's number alone."""

  config: Config

  def start(self) -> State:
    return {"step": 0}

  def cap(self, state: State) -> int:
    return prefix_length.cap(self.config, state["step"])

  def next(self, state: State, stats: Stats) -> State:
    del stats
    return {"step": state["step"] + 1}


@dataclasses.dataclass(frozen=True)
class Random:
  """Uniform between the start and the longest answer, anew for every update."""

  spec: PrefixSpec
  longest: int
  seed: int

  def start(self) -> State:
    return {"step": 0}

  def cap(self, state: State) -> int:
    rng = np.random.default_rng((self.seed, state["step"]))
    return int(rng.integers(self.spec.start, self.longest + 1))

  def next(self, state: State, stats: Stats) -> State:
    del stats
    return {"step": state["step"] + 1}


@dataclasses.dataclass(frozen=True)
class Drift:
  """Prune-OPD's rule for the cap M.

  A rollout is reliable as long as fewer than `1 / penalty` of its positions so
  far had an overlap of student's and teacher's top tokens below a threshold
  (`step.reliable`). If the share of rollouts that are reliable up to
  M - increment is at least `share`, M grows by `increment`; if it was below
  that for `patience` updates running, M shrinks by as much.
  """

  spec: PrefixSpec
  longest: int

  def start(self) -> State:
    return {"cap": min(self.spec.start, self.longest), "below": 0}

  def cap(self, state: State) -> int:
    return state["cap"]

  def next(self, state: State, stats: Stats) -> State:
    spec, cap, below = self.spec, state["cap"], state["below"]
    last = max(cap - spec.increment, 1) - 1
    if stats.reliable[last] >= spec.share:
      return {"cap": min(cap + spec.increment, self.longest), "below": 0}
    below += 1
    if below < spec.patience:
      return {"cap": cap, "below": below}
    least = min(spec.start, self.longest)
    return {"cap": max(cap - spec.increment, least), "below": 0}


@dataclasses.dataclass(frozen=True)
class Plateau:
  """Adaptive FastOPD's rule: plateau and utilisation.

  The divergence on the band [cap - increment, cap) has reached a plateau when
  it did not fall below its best value for `patience` updates. The cap then
  grows by `increment` if at least `share` of the rollouts reach it.
  """

  spec: PrefixSpec
  longest: int

  def start(self) -> State:
    return {"cap": min(self.spec.start, self.longest), "best": None, "stale": 0}

  def cap(self, state: State) -> int:
    return state["cap"]

  def next(self, state: State, stats: Stats) -> State:
    spec, cap, best = self.spec, state["cap"], state["best"]
    value = stats.band(max(cap - spec.increment, 0), cap)
    if not np.isnan(value) and (best is None or value < best):
      return {"cap": cap, "best": value, "stale": 0}
    stale = state["stale"] + 1
    reached = float(np.mean(stats.lengths >= cap))
    if stale < spec.patience or reached < spec.share:
      return {"cap": cap, "best": best, "stale": stale}
    grown = min(cap + spec.increment, self.longest)
    return {"cap": grown, "best": None, "stale": 0}


@dataclasses.dataclass(frozen=True)
class Audited:
  """Where the divergence sits, looked up when a prefix has been learned.

  An audit is an update at full length. It is due when less than `tolerance`
  nats are left in a prefix, and after `audit_every` updates at the latest. It
  shows the divergence at every position; the cap is then the shortest prefix
  that holds `share` of all of it, so it moves past what has been learned, and
  back if something was forgotten. An audit that finds less than `tolerance`
  nats in a whole rollout ends the training: there is nothing left to distil.
  """

  spec: PrefixSpec
  longest: int

  def start(self) -> State:
    least = min(self.spec.start, self.longest)
    return {"cap": least, "wait": self.spec.audit_every}

  def cap(self, state: State) -> int:
    return state["cap"]

  def next(self, state: State, stats: Stats) -> State:
    spec, wait = self.spec, state["wait"]
    mass = np.nan_to_num(stats.kl) * stats.count / len(stats.lengths)
    learned = mass.sum() < spec.tolerance
    if wait:
      wait = 0 if learned else wait - 1
      return {"cap": state["cap"] if wait else self.longest, "wait": wait}
    if learned:
      return {"cap": 0, "wait": 0}
    covered = np.cumsum(mass) >= spec.share * mass.sum()
    cap = max(int(np.argmax(covered)) + 1, spec.start)
    return {"cap": min(cap, self.longest), "wait": spec.audit_every}


@dataclasses.dataclass(frozen=True)
class Agreement:
  """KAT's threshold; the cuts themselves are made in `agreement.py`.

  Every rollout has a smallest windowed divergence; a rollout is cut once it
  stays below the `quantile` of those of the last `memory` rollouts. Nothing
  is cut in the first `patience` updates.
  """

  spec: PrefixSpec
  longest: int

  def start(self) -> State:
    return {"step": 0, "minima": []}

  def cap(self, state: State) -> int:
    del state
    return self.longest

  def threshold(self, state: State) -> float:
    """Below which a rollout agrees; -inf while nothing is to be cut."""
    if state["step"] < self.spec.patience or not state["minima"]:
      return float("-inf")
    return float(np.quantile(state["minima"], self.spec.quantile))

  def next(self, state: State, stats: Stats) -> State:
    minima = [*state["minima"], *(float(x) for x in stats.minima)]
    return {"step": state["step"] + 1, "minima": minima[-self.spec.memory :]}


def make(config: Config) -> Controller:
  """Returns the controller that the settings name."""
  spec, longest = config.prefix, config.rollout.max_len
  if config.method != "prefix" or spec.schedule in ("linear", "fixed"):
    return Planned(config)
  if spec.schedule == "random":
    return Random(spec, longest, config.seed)
  return {
      "drift": Drift,
      "plateau": Plateau,
      "agreement": Agreement,
      "audited": Audited,
  }[spec.schedule](spec, longest)
