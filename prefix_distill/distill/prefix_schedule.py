"""How long a prefix each update samples and supervises.

A schedule is a frozen dataclass of settings: statistics of the last update go
in, the next cap comes out. What it remembers is a flat dict of numbers that is
saved with every checkpoint, so a resumed run goes on with the cap that it
would have had.

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
             teacher have agreed for a while
  audited    this package's: when a prefix has been learned, an update at full
             length shows where the divergence sits; the cap goes where the
             first so much of it ends, and training stops when nothing is left

A new schedule is a class here, a line in `_SCHEDULES`, and its settings in
`config.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import config as config_lib
from prefix_distill.config import Config
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores

# JSON.
State = dict[str, Any]
# How many buckets there are unless the config names them, and below which
# length one of its own saves nothing.
_MAX_BUCKETS = 7
_SMALLEST_BUCKET = 32
# Windows running below the threshold after which KAT cuts, as in its paper.
_CUT_AFTER = 4
# Sets the draws of sources apart from others made of the same seed.
_SALT = 17


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


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Chooses caps; as it is here, whole answers; hashable.

  Attributes:
    longest: the longest answer in tokens.
    is_planned: whether the caps are known before the run.
    varies: whether updates have different caps.
    overlap_of: how many of both models' most probable tokens the loss is to
      compare for `shown`; 0 for none.
    score_tokens: whether the teacher must score the sampled tokens.
  """

  longest: int

  is_planned = True
  varies = False
  overlap_of = 0
  score_tokens = False

  def planned(self, step: int) -> int:
    """Returns the cap of update `step` (from 0) as far as it is known before.

    Unless the caps are planned, it is the longest that may be chosen.
    """
    del step
    return self.longest

  def start(self) -> State:
    """Returns the state before the first update."""
    return {"step": 0}

  def cap(self, state: State) -> int:
    """Returns the next update's cap in tokens; 0 to stop training."""
    return self.planned(state["step"])

  def next(self, state: State, stats: Stats) -> State:
    """Returns the state after an update with `cap(state)`."""
    del stats
    return {"step": state["step"] + 1}

  def threshold(self, state: State) -> float | None:
    """Below which rollouts agree; None if the schedule does not cut them."""
    del state

  def shown(
      self, metrics: dict[str, jax.Array], mask: jax.Array
  ) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns sums and counts [P] that `next` wants as statistics.

    Args:
      metrics: of each token, [B, P].
      mask: bool [B, P].
    """
    del metrics, mask
    return {}


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """The paper's (section 3): L starts at 1 and grows after every update."""

  spec: config_lib.LinearSpec

  varies = True

  def planned(self, step: int) -> int:
    spec = self.spec
    grown = spec.start + spec.increment * (step // spec.every)
    return min(grown, self.longest)


@dataclasses.dataclass(frozen=True)
class Fixed(Schedule):
  """The same cap throughout."""

  spec: config_lib.FixedSpec

  def planned(self, step: int) -> int:
    del step
    return min(self.spec.length, self.longest)


@dataclasses.dataclass(frozen=True)
class Random(Schedule):
  """Uniform up to the longest answer, anew for every update."""

  spec: config_lib.RandomSpec
  seed: int

  is_planned = False
  varies = True

  def cap(self, state: State) -> int:
    rng = np.random.default_rng((self.seed, state["step"]))
    return int(rng.integers(self.spec.min_length, self.longest + 1))


@dataclasses.dataclass(frozen=True)
class _Chosen(Schedule):
  """From data: the cap is a part of the state."""

  spec: Any

  is_planned = False
  varies = True

  @property
  def least(self) -> int:
    return min(self.spec.start, self.longest)

  def cap(self, state: State) -> int:
    return state["cap"]


@dataclasses.dataclass(frozen=True)
class Drift(_Chosen):
  """Prune-OPD's rule for the cap M.

  A rollout is reliable as long as fewer than `max_drifted` of its positions so
  far had an overlap of student's and teacher's top tokens below `min_overlap`.
  If the share of rollouts that are reliable up to M - increment is at least
  `min_reliable_fraction`, M grows by `increment`; if it was below that for
  `patience_updates` updates running, M shrinks by as much.
  """

  spec: config_lib.DriftSpec

  @property
  def overlap_of(self) -> int:
    return self.spec.overlap_tokens

  def shown(
      self, metrics: dict[str, jax.Array], mask: jax.Array
  ) -> dict[str, tuple[jax.Array, jax.Array]]:
    low = metrics["overlap"] < self.spec.min_overlap
    drifted = jnp.cumsum(mask & low, axis=1)
    reliable = mask & (drifted < self.spec.max_drifted)
    rows = jnp.full(mask.shape[1], mask.shape[0])
    return {"reliable": (jnp.sum(reliable, 0), rows)}

  def start(self) -> State:
    return {"cap": self.least, "below": 0}

  def next(self, state: State, stats: Stats) -> State:
    spec, cap, below = self.spec, state["cap"], state["below"]
    last = max(cap - spec.increment, 1) - 1
    if stats.reliable[last] >= spec.min_reliable_fraction:
      return {"cap": min(cap + spec.increment, self.longest), "below": 0}
    below += 1
    if below < spec.patience_updates:
      return {"cap": cap, "below": below}
    return {"cap": max(cap - spec.increment, self.least), "below": 0}


@dataclasses.dataclass(frozen=True)
class Plateau(_Chosen):
  """Adaptive FastOPD's rule: plateau and utilisation.

  The divergence on the band [cap - increment, cap) has reached a plateau when
  it did not fall below its best value for `patience_updates` updates. The cap
  then grows by `increment` if at least `min_reached_fraction` of the rollouts
  reach it.
  """

  spec: config_lib.PlateauSpec

  def start(self) -> State:
    return {"cap": self.least, "best": None, "stale": 0}

  def next(self, state: State, stats: Stats) -> State:
    spec, cap, best = self.spec, state["cap"], state["best"]
    value = stats.band(max(cap - spec.increment, 0), cap)
    if not np.isnan(value) and (best is None or value < best):
      return {"cap": cap, "best": value, "stale": 0}
    stale = state["stale"] + 1
    reached = float(np.mean(stats.lengths >= cap))
    if stale < spec.patience_updates or reached < spec.min_reached_fraction:
      return {"cap": cap, "best": best, "stale": stale}
    grown = min(cap + spec.increment, self.longest)
    return {"cap": grown, "best": None, "stale": 0}


@dataclasses.dataclass(frozen=True)
class Audited(_Chosen):
  """Where the divergence sits, looked up when a prefix has been learned.

  An audit is an update at full length. It is due when less than `min_nats` are
  left in a prefix, and after `audit_every` updates at the latest. It shows the
  divergence at every position; the cap is then the shortest prefix that holds
  `divergence_fraction` of all of it, so it moves past what has been learned,
  and back if something was forgotten. An audit that finds less than `min_nats`
  in a whole rollout ends the training: there is nothing left to distil.
  """

  spec: config_lib.AuditedSpec

  def start(self) -> State:
    return {"cap": self.least, "wait": self.spec.audit_every}

  def next(self, state: State, stats: Stats) -> State:
    spec, wait = self.spec, state["wait"]
    mass = np.nan_to_num(stats.kl) * stats.count / len(stats.lengths)
    learned = mass.sum() < spec.min_nats
    if wait:
      wait = 0 if learned else wait - 1
      return {"cap": state["cap"] if wait else self.longest, "wait": wait}
    if learned:
      return {"cap": 0, "wait": 0}
    covered = np.cumsum(mass) >= spec.divergence_fraction * mass.sum()
    cap = max(int(np.argmax(covered)) + 1, spec.start)
    return {"cap": min(cap, self.longest), "wait": spec.audit_every}


@dataclasses.dataclass(frozen=True)
class Agreement(Schedule):
  """KAT's threshold; `cut` makes the cuts.

  Every rollout has a smallest windowed divergence; a rollout is cut once it
  stays below the `quantile` of those of the last `memory_rollouts` rollouts.
  Nothing is cut in the first `warmup_updates` updates.

  In the paper sampling itself stops; here whole segments of rollouts are
  sampled and scored at a time, so what follows the cut is sampled and scored,
  and only not trained on. The FLOP ledger charges it accordingly.
  """

  spec: config_lib.AgreementSpec

  is_planned = False
  score_tokens = True

  def start(self) -> State:
    return {"step": 0, "minima": []}

  def threshold(self, state: State) -> float:
    if state["step"] < self.spec.warmup_updates or not state["minima"]:
      return float("-inf")
    return float(np.quantile(state["minima"], self.spec.quantile))

  def next(self, state: State, stats: Stats) -> State:
    minima = [*state["minima"], *(float(x) for x in stats.minima)]
    kept = minima[-self.spec.memory_rollouts :]
    return {"step": state["step"] + 1, "minima": kept}


_SCHEDULES = {
    "linear": Linear,
    "fixed": Fixed,
    "random": Random,
    "drift": Drift,
    "plateau": Plateau,
    "agreement": Agreement,
    "audited": Audited,
}


def make(config: Config) -> Schedule:
  """Returns the schedule that the settings name."""
  name, longest = config.schedule, config.rollout.max_len
  if not name:
    return Schedule(longest)
  seed = (config.seed,) if name == "random" else ()
  return _SCHEDULES[name](longest, getattr(config.prefix, name), *seed)


def cap(config: Config, step: int) -> int:
  """Returns the planned cap of update `step`, counted from 0."""
  return make(config).planned(step)


def longest(config: Config) -> int:
  """Returns the largest cap that the run can reach."""
  return cap(config, max(config.steps - 1, 0))


def buckets(config: Config) -> tuple[int, ...]:
  """Returns the static lengths that programs are compiled for.

  Those of `prefix.buckets`, as far as the run's longest cap needs them, and
  that cap itself if none of them holds it; or else that cap and its halves.
  """
  most = longest(config)
  if config.is_supervised:
    return (most,)
  given = config.prefix.buckets or tuple(
      -(-most // 2**i)
      for i in range(_MAX_BUCKETS)[::-1]
      if most >= _SMALLEST_BUCKET * 2**i
  )
  shorter = tuple(length for length in given if length < most)
  return (*shorter, min((b for b in given if b >= most), default=most))


def needed(config: Config) -> tuple[int, ...]:
  """Returns the buckets that some cap of the run ends in."""
  return buckets(config) if make(config).varies else buckets(config)[-1:]


def cut(
    window: int,
    rollout: Rollout,
    scores: TeacherScores,
    threshold: jax.Array,
    after: int = _CUT_AFTER,
) -> tuple[Rollout, jax.Array]:
  """Shortens rollouts where both models agree; to be jitted, `window` static.

  With z_t the mean of the last `window` tokens' divergences (k1 on the sampled
  token), a rollout ends at the first t at which z has been below the threshold
  `after` times running.

  Args:
    window: tokens.
    rollout: [B, P], with log-probabilities.
    scores: with the teacher's log-probabilities of the same tokens.
    threshold: float32 [].
    after: times.

  Returns:
    The rollouts with shorter masks, and the smallest z of each, inf where a
    rollout is shorter than the window: float32 [B].
  """
  kl = rollout.log_probs - scores.log_probs
  total = jnp.cumsum(jnp.where(rollout.mask, kl, 0), axis=1)
  before = jnp.pad(total, ((0, 0), (window, 0)))[:, : total.shape[1]]
  full = jnp.arange(total.shape[1]) >= window - 1
  z = jnp.where(rollout.mask & full, (total - before) / window, jnp.inf)
  running = jnp.stack([
      jnp.pad(z < threshold, ((0, 0), (i, 0)))[:, : z.shape[1]]
      for i in range(after)
  ]).all(axis=0)
  # The token at which it is seen still counts.
  seen = jnp.cumsum(running, axis=1) - running
  mask = rollout.mask & (seen == 0)
  return dataclasses.replace(rollout, mask=mask), jnp.min(z, axis=1)


def source(config: Config, step: int) -> str:
  """Returns whose answers update `step` (from 0) learns from."""
  spec = config.rollout
  rng = np.random.default_rng((config.seed, _SALT, step))
  return spec.source if rng.random() < spec.source_share else "student"


def stats(
    metrics: dict[str, Any], mask: np.ndarray, minima: np.ndarray | None
) -> Stats:
  """Returns what an update showed.

  Args:
    metrics: of the update.
    mask: bool [rollouts, P], of the tokens that were sampled.
    minima: see `Stats`.
  """
  return Stats(
      lengths=mask.sum(1),
      kl=np.asarray(metrics.get("kl_position", np.zeros(0))),
      count=mask.sum(0),
      reliable=metrics.get("reliable"),
      minima=minima,
  )
