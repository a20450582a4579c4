"""How long a prefix each update samples and supervises.

A schedule is a frozen dataclass of settings: statistics of the last update go
in, the next cap comes out. What it remembers is a flat dict of numbers that is
saved with every checkpoint, so a resumed run goes on with the cap that it
would have had.

  linear     the paper's: a fixed step after every update, or every so many;
             a step of 1 is POPD's (arXiv 2605.31490)
  fixed      the same cap throughout
  random     a cap drawn anew for every update: the control that a rule based
             on data has to beat
  drift      Prune-OPD (arXiv 2605.07804): grows while enough rollouts stay
             close to the teacher up to the cap, and shrinks otherwise; tokens
             after a drift weigh less in the loss
  plateau    Adaptive FastOPD (arXiv 2607.29494): grows when four signals on
             the last band before the cap have stopped falling, or when enough
             rollouts reach the cap
  agreement  KAT (arXiv 2606.09471): full rollouts, each cut where student and
             teacher began to agree for a while
  audited    this package's: when a prefix has been learned, an update at full
             length shows where the divergence sits; the cap goes where the
             first so much of it ends, and training stops when nothing is left.
             ADWIN (arXiv 2605.28396), whose full rollouts audit a prefix now
             and then, is its closest published relative

We know drift, plateau, agreement and ADWIN from secondary accounts and
abstracts. `docs/length_rules.md` says point by point what is published, what
is inferred and what is ours.

Some schedules see both models' distributions before the loss is summed. They
choose which tokens are trained on, and with which weights. That takes both
output heads once more, and no other pass.

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

# JSON.
State = dict[str, Any]
# Sums and counts at each position, [P] each.
Sums = dict[str, tuple[jax.Array, jax.Array]]
# How many buckets there are unless the config names them, and below which
# length one of its own saves nothing.
_MAX_BUCKETS = 7
_SMALLEST_BUCKET = 32
# Prune-OPD's weight of a token behind which nothing is reliable any more.
_LEAST_WEIGHT = 0.5
# A signal below this has nothing left to improve.
_NO_SIGNAL = 1e-6
# What begins the names of those metrics of an update that `Stats.shown` has.
SHOWN = "schedule_"
# Separates the draws of sources from others with the same seed.
_SALT = 17


@dataclasses.dataclass(frozen=True)
class Stats:
  """What one update showed.

  Attributes:
    lengths: [rollouts], tokens sampled of each.
    kl: [P], the mean divergence at each position; NaN where nobody was.
    count: [P], rollouts that reached the position.
    shown: [P] each, the means of what `Schedule.choose` summed; NaN where
      nobody was.
    minima: [rollouts], see `Chosen`; None if the schedule has none.
  """

  lengths: np.ndarray
  kl: np.ndarray
  count: np.ndarray
  shown: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  minima: np.ndarray | None = None

  def band(self, name: str, start: int, end: int) -> float:
    """Returns the mean of `shown[name]` per token in [start, end), or NaN."""
    count = self.count[start:end]
    if not count.sum():
      return float("nan")
    return float(np.nansum(self.shown[name][start:end] * count) / count.sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
  """What a schedule chose of a microbatch's rollouts.

  Attributes:
    trained: bool [B, P], the tokens that are trained on.
    minima: float32 [B], the smallest windowed divergence of each rollout, inf
      where it is shorter than the window; None if the schedule has no windows.
  """

  trained: jax.Array
  minima: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Chooses caps; as it is here, whole answers; hashable.

  Attributes:
    longest: the longest answer in tokens.
    is_planned: whether the caps are known before the run.
    varies: whether updates have different caps.
    sees: names of what `choose` sees of each token, of `loss.Sight`; empty if
      the schedule chooses nothing.
    top_tokens: how many of each model's most probable tokens that compares.
  """

  longest: int

  is_planned = True
  varies = False
  sees = ()
  top_tokens = 0

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
    """Returns the bound below which rollouts agree; None if it cuts none."""
    del state

  def choose(
      self,
      seen: dict[str, jax.Array],
      mask: jax.Array,
      threshold: jax.Array | None,
  ) -> tuple[Chosen, jax.Array | None, Sums]:
    """Chooses what is trained on, before the loss is summed; to be jitted.

    Args:
      seen: what `sees` names, of each token, [B, P]; it means nothing where
        the mask is false.
      mask: bool [B, P].
      threshold: float32 [], that of `threshold`; None if there is none.

    Returns:
      The choice; each token's weight in the loss, float32 [B, P], or None if
      all weigh the same; and what `next` wants as statistics.
    """
    raise NotImplementedError


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
  """Prune-OPD's rule for the cap M, and its weights.

  A position drifts if the overlap of student's and teacher's top tokens is
  below `min_overlap`. With D_t the number of drifted positions up to t, the
  reliability of a rollout at t is

    R_t = max(0, 1 - D_t / max_drifted)

  and a token's weight in the loss is R_t + 0.5. A rollout is reliable up to t
  if R_t > 0. If the share of rollouts that are reliable up to M - increment is
  at least `min_reliable_fraction`, M grows by `increment`; if it was below that
  for `patience_updates` updates running, M shrinks by as much.

  The source says that weights never rise along a rollout and are R_t + 0.5;
  that R_t falls in a straight line is inferred.
  """

  spec: config_lib.DriftSpec

  sees = ("overlap",)

  @property
  def top_tokens(self) -> int:
    return self.spec.overlap_tokens

  def choose(
      self,
      seen: dict[str, jax.Array],
      mask: jax.Array,
      threshold: jax.Array | None,
  ) -> tuple[Chosen, jax.Array | None, Sums]:
    del threshold
    low = seen["overlap"] < self.spec.min_overlap
    drifted = jnp.cumsum(mask & low, axis=1)
    left = jnp.maximum(self.spec.max_drifted - drifted, 0)
    weights = left / self.spec.max_drifted + _LEAST_WEIGHT
    rows = jnp.full(mask.shape[1], mask.shape[0])
    sums = {"reliable": (jnp.sum(mask & (left > 0), 0), rows)}
    return Chosen(mask), weights, sums

  def start(self) -> State:
    return {"cap": self.least, "below": 0}

  def next(self, state: State, stats: Stats) -> State:
    spec, cap, below = self.spec, state["cap"], state["below"]
    last = max(cap - spec.increment, 1) - 1
    if stats.shown["reliable"][last] >= spec.min_reliable_fraction:
      return {"cap": min(cap + spec.increment, self.longest), "below": 0}
    below += 1
    if below < spec.patience_updates:
      return {"cap": cap, "below": below}
    return {"cap": max(cap - spec.increment, self.least), "below": 0}


@dataclasses.dataclass(frozen=True)
class Plateau(_Chosen):
  """Adaptive FastOPD's rule: plateau of four signals, and utilisation.

  The signals are means over the tokens of the band [cap - increment, cap).
  With S and T the student's and the teacher's `top_tokens` most probable
  tokens, p and q their probabilities:

    1 - |S & T| / |S|                               top-k overlap
    1 - sum of p over S & T                         shared mass
    sum of p |log p - log q| over S & T             penalty on shared tokens
    sum of p |log p - log q| over S without T       penalty on unshared tokens

  Each is divided by its value in the first update at this cap, and the largest
  quotient is smoothed: x' = smoothing x + (1 - smoothing) largest, from 1. The
  cap grows by `increment` when x has not fallen by `min_progress` below its
  best value for `patience_updates` updates, or as soon as
  `min_reached_fraction` of the rollouts reach it. While no rollout reaches the
  band there is no progress.

  We know the source from a secondary account. It names the four signals, the
  quotient, the largest, the smoothing and both reasons to grow. The formulas of
  the signals are ours.
  """

  spec: config_lib.PlateauSpec

  sees = ("overlap", "shared_mass", "shared_penalty", "unshared_penalty")

  @property
  def top_tokens(self) -> int:
    return self.spec.top_tokens

  def choose(
      self,
      seen: dict[str, jax.Array],
      mask: jax.Array,
      threshold: jax.Array | None,
  ) -> tuple[Chosen, jax.Array | None, Sums]:
    del threshold
    count = jnp.sum(mask, 0)
    sums = {
        name: (jnp.sum(jnp.where(mask, seen[name], 0), 0), count)
        for name in self.sees
    }
    return Chosen(mask), None, sums

  def start(self) -> State:
    return self._entered(self.least)

  def _entered(self, cap: int) -> State:
    """Returns the state of a cap at which nothing has been seen."""
    return {"cap": cap, "entry": None, "smooth": 1.0, "best": None, "stale": 0}

  def next(self, state: State, stats: Stats) -> State:
    spec, cap, entry = self.spec, state["cap"], state["entry"]
    smooth, best, stale = state["smooth"], state["best"], state["stale"] + 1
    band = [
        stats.band(name, max(cap - spec.increment, 0), cap)
        for name in self.sees
    ]
    if not np.isnan(band[0]):
      signals = [1 - band[0], 1 - band[1], *band[2:]]
      entry = signals if entry is None else entry
      largest = max(
          now / first if first > _NO_SIGNAL else 0.0
          for now, first in zip(signals, entry, strict=True)
      )
      smooth = spec.smoothing * smooth + (1 - spec.smoothing) * largest
      if best is None or smooth < best - spec.min_progress:
        best, stale = smooth, 0
    reached = float(np.mean(stats.lengths >= cap))
    full = 0 < spec.min_reached_fraction <= reached
    if full or stale >= spec.patience_updates:
      return self._entered(min(cap + spec.increment, self.longest))
    return {
        "cap": cap,
        "entry": entry,
        "smooth": smooth,
        "best": best,
        "stale": stale,
    }


@dataclasses.dataclass(frozen=True)
class Audited(_Chosen):
  """Where the divergence sits, looked up when a prefix has been learned.

  An audit is an update at full length. It is due when less than `min_nats` are
  left in a prefix, and after `audit_every` updates at the latest. It shows the
  divergence at every position; the cap is then the shortest prefix that holds
  `divergence_fraction` of all of it, so it moves past what has been learned,
  and back if something was forgotten. An audit that finds less than `min_nats`
  in a whole rollout ends the training: there is nothing left to distil.

  ADWIN (arXiv 2605.28396) came to the same means: short prefixes, and now and
  then full rollouts that audit them. As its abstract has it, those audit how
  well the prefix is aligned with the full rollout, are delayed, and are
  discounted when stale. Here an audit is an update like the others, it measures
  where the divergence is, and it can end the training.
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
  """KAT's rule: rollouts end where the models have come to agree.

  d_t is the reverse KL over the student's `top_tokens` most probable tokens
  one by one and the others as one event, the tail; z_t is the mean of the last
  `window_tokens` of them. A rollout ends when z_t has been below the threshold
  `low_windows` times running, and what follows the start of the first of these
  windows is not trained on. The window that starts with the rollout never
  counts as low, so at least one token is left.

  The threshold is the `quantile` of the smallest z of the last
  `memory_rollouts` rollouts. A rollout without a whole window has no smallest
  z and is not among them. Nothing is cut in the first `warmup_updates` updates
  and before there are `min_rollouts` of them.

  In the paper sampling itself stops; here whole segments of rollouts are
  sampled and scored at a time, so what follows the cut is sampled and scored,
  and only not trained on. The FLOP ledger charges it accordingly. The smallest
  z is that of the windows that the paper's sampling would have reached.
  """

  spec: config_lib.AgreementSpec

  is_planned = False
  sees = ("top_kl",)

  @property
  def top_tokens(self) -> int:
    return self.spec.top_tokens

  def start(self) -> State:
    return {"step": 0, "minima": []}

  def threshold(self, state: State) -> float:
    spec, minima = self.spec, state["minima"]
    if state["step"] < spec.warmup_updates or len(minima) < spec.min_rollouts:
      return float("-inf")
    return float(np.quantile(minima, spec.quantile))

  def next(self, state: State, stats: Stats) -> State:
    new = [float(x) for x in stats.minima if np.isfinite(x)]
    kept = [*state["minima"], *new][-self.spec.memory_rollouts :]
    return {"step": state["step"] + 1, "minima": kept}

  def choose(
      self,
      seen: dict[str, jax.Array],
      mask: jax.Array,
      threshold: jax.Array | None,
  ) -> tuple[Chosen, jax.Array | None, Sums]:
    spec = self.spec
    chosen = cut(
        spec.window_tokens, spec.low_windows, seen["top_kl"], mask, threshold
    )
    return chosen, None, {}


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
    low_windows: int,
    kl: jax.Array,
    mask: jax.Array,
    threshold: jax.Array,
) -> Chosen:
  """Ends rollouts where both models agree; see `Agreement`.

  Args:
    window: tokens that a mean is of; static.
    low_windows: how many means running must be below the threshold; static.
    kl: [B, P], each token's divergence.
    mask: bool [B, P].
    threshold: float32 [].
  """
  position = jnp.arange(mask.shape[1])
  means = _last(jnp.where(mask, kl, 0.0), window) / window
  z = jnp.where(mask & (position >= window - 1), means, jnp.inf)
  # The first window ends at `window - 1`.
  low = (z < threshold) & (position >= window)
  running = _last(low.astype(jnp.int32), low_windows) == low_windows
  seen = jnp.argmax(running, axis=1)[:, None]
  is_cut = jnp.any(running, axis=1, keepdims=True)
  # The first of these windows ends so many tokens earlier, and begins so many
  # before that.
  start = seen - (low_windows - 1) - (window - 1)
  trained = mask & (~is_cut | (position < start))
  sampled = ~is_cut | (position <= seen)
  return Chosen(trained, jnp.min(jnp.where(sampled, z, jnp.inf), axis=1))


def _last(x: jax.Array, count: int) -> jax.Array:
  """Sums the last `count` of [B, P] at each position, or those there are.

  These are no differences of running sums, beside which a small sum of late
  positions would be lost.
  """
  zero = np.zeros((), x.dtype)
  padding = ((0, 0), (count - 1, 0))
  return jax.lax.reduce_window(
      x, zero, jax.lax.add, (1, count), (1, 1), padding
  )


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
      shown={
          name.removeprefix(SHOWN): value
          for name, value in metrics.items()
          if name.startswith(SHOWN)
      },
      minima=minima,
  )
