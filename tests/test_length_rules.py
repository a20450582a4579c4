"""The rules for a prefix's length, against references in plain Python.

Each reference is written from the sources' description, one token and one
rollout after the other, and shares nothing with the package.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import AgreementSpec
from prefix_distill.config import DatasetSpec
from prefix_distill.config import DataSpec
from prefix_distill.config import DriftSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import PlateauSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.prefix_schedule import Agreement
from prefix_distill.distill.prefix_schedule import Drift
from prefix_distill.distill.prefix_schedule import Plateau
from prefix_distill.distill.prefix_schedule import Stats
from prefix_distill.report import flops
from prefix_distill.train import step as step_lib
from prefix_distill.train import update
from prefix_distill.train.update import Programs

NEVER = float("-inf")
SEEDS = pytest.mark.parametrize("seed", range(5))


def masks(lengths, columns: int) -> np.ndarray:
  return np.arange(columns) < np.asarray(lengths)[:, None]


def through_json(state):
  """Returns the state as a checkpoint gives it back."""
  return json.loads(json.dumps(state))


# KAT.


def stopped(kl, window, low_windows, threshold) -> tuple[int, float]:
  """Samples a rollout token by token; returns what trains, and the least z."""
  least, low = math.inf, 0
  for t in range(len(kl)):
    first = t - window + 1
    if first < 0:
      continue
    z = sum(kl[first : t + 1]) / window
    least = min(least, z)
    # The window that starts with the rollout is exempt.
    low = low + 1 if first > 0 and z < threshold else 0
    if low == low_windows:
      return first - (low_windows - 1), least
  return len(kl), least


@SEEDS
@pytest.mark.parametrize("window, low_windows", [(1, 4), (4, 1), (8, 4)])
def test_rollouts_end_where_the_first_low_window_starts(
    seed, window, low_windows
):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, 60, 64)
  mask = masks(lengths, 64)
  # Agreement comes in stretches. Eighths have exact sums.
  kl = rng.integers(0, 9, mask.shape) / 8.0
  calm = rng.random(mask.shape) < 0.06
  kl = np.where(np.cumsum(calm, 1) % 2 == 1, kl / 8, kl)
  chosen = prefix_schedule.cut(
      window,
      low_windows,
      jnp.asarray(np.where(mask, kl, np.nan)),
      jnp.asarray(mask),
      jnp.float32(0.2),
  )
  wanted = [
      stopped(row[:length], window, low_windows, 0.2)
      for row, length in zip(kl, lengths, strict=True)
  ]
  kept, least = (np.array(x) for x in zip(*wanted, strict=True))
  np.testing.assert_array_equal(chosen.trained, masks(kept, 64))
  np.testing.assert_array_equal(chosen.minima, least.astype(np.float32))
  is_cut = kept < lengths
  assert 5 < is_cut.sum() < 60
  assert kept[is_cut].min() >= 1


def test_low_windows_must_follow_each_other():
  kl = np.ones((3, 12))
  kl[0, 5:] = 0.0
  kl[1, 5:8] = kl[1, 9:] = 0.0  # Three low windows, one that is not, three.
  mask = masks([12, 12, 8], 12)
  chosen = prefix_schedule.cut(
      1, 4, jnp.asarray(kl), jnp.asarray(mask), jnp.float32(0.5)
  )
  assert chosen.trained.sum(axis=1).tolist() == [5, 12, 8]


def test_the_first_window_is_exempt_and_nothing_is_cut_without_a_threshold():
  kl, mask = jnp.zeros((2, 12)), jnp.asarray(masks([12, 6], 12))
  chosen = prefix_schedule.cut(3, 4, kl, mask, jnp.float32(0.5))
  # The second window starts at the second token; the fourth after the exempt
  # one ends at the seventh, which the second rollout has not.
  assert chosen.trained.sum(axis=1).tolist() == [1, 6]
  for threshold in (NEVER, 0.0):  # Nothing is below 0.
    chosen = prefix_schedule.cut(3, 4, kl, mask, jnp.float32(threshold))
    np.testing.assert_array_equal(chosen.trained, mask)


def quantile(values, share: float) -> float:
  """The quantile between neighbours, in a straight line."""
  values, at = sorted(values), share * (len(values) - 1)
  low, high = values[math.floor(at)], values[math.ceil(at)]
  return low + (high - low) * (at - math.floor(at))


def shows(minima) -> Stats:
  return Stats(np.ones(len(minima)), np.zeros(0), np.zeros(0), minima=minima)


@SEEDS
def test_the_threshold_is_a_quantile_of_the_last_rollouts_with_a_window(seed):
  rng = np.random.default_rng(seed)
  spec = AgreementSpec(
      window_tokens=8,
      quantile=float(rng.random()),
      memory_rollouts=50,
      warmup_updates=3,
      min_rollouts=30,
  )
  rule = Agreement(100, spec)
  state, past, active = rule.start(), [], 0
  for step in range(20):
    threshold = rule.threshold(state)
    if step < 3 or len(past) < 30:
      assert threshold == NEVER
    else:
      active += 1
      assert threshold == pytest.approx(quantile(past[-50:], spec.quantile))
    minima = rng.random(8).astype(np.float32)
    minima[rng.random(8) < 0.4] = np.inf  # Shorter than a window.
    past += [float(x) for x in minima if x < np.inf]
    state = through_json(rule.next(state, shows(minima)))
  assert active > 5
  assert len(state["minima"]) == 50


def test_nothing_is_cut_before_50_updates_and_512_rollouts():
  rule = Agreement(16_384, AgreementSpec())
  for rollouts, first in ((64, 50), (8, 64), (5, 103)):
    state, active = rule.start(), []
    for step in range(110):
      if rule.threshold(state) > NEVER:
        active.append(step)
      state = rule.next(state, shows(np.full(rollouts, 0.25)))
    assert active[0] == first
    assert len(state["minima"]) == min(110 * rollouts, 4096)


def test_rollouts_that_are_all_short_cut_nothing():
  rule = Agreement(100, AgreementSpec(8, warmup_updates=0, min_rollouts=1))
  state = rule.start()
  for _ in range(3):
    state = rule.next(state, shows(np.full(4, np.inf)))
    assert rule.threshold(state) == NEVER and not state["minima"]
  state = rule.next(state, shows(np.array([np.inf, 0.5])))
  assert rule.threshold(state) == 0.5


# Prune-OPD.


@SEEDS
def test_weights_fall_with_every_drifted_token(seed):
  rng = np.random.default_rng(seed)
  mask = masks(rng.integers(1, 41, 16), 40)
  overlap = rng.integers(0, 17, mask.shape) / 16
  spec = DriftSpec(min_overlap=0.7, max_drifted=int(rng.integers(1, 20)))
  seen = {"overlap": jnp.asarray(np.where(mask, overlap, np.nan), jnp.float32)}
  chosen, weights, sums = Drift(40, spec).choose(seen, jnp.asarray(mask), None)
  np.testing.assert_array_equal(chosen.trained, mask)
  assert chosen.minima is None
  reliable = np.zeros(40)
  for row in range(16):
    drifted = 0
    for t in range(mask[row].sum()):
      drifted += overlap[row, t] < 0.7
      trust = max(0.0, 1 - drifted / spec.max_drifted)
      assert float(weights[row, t]) == pytest.approx(trust + 0.5, abs=1e-6)
      reliable[t] += trust > 0
  assert sums["reliable"][0].tolist() == reliable.tolist()
  assert sums["reliable"][1].tolist() == [16] * 40


def drift_caps(spec: DriftSpec, longest: int, shares) -> list[int]:
  cap, bad, caps = min(spec.start, longest), 0, []
  for share in shares:
    caps.append(cap)
    if share[max(cap - spec.increment, 1) - 1] >= spec.min_reliable_fraction:
      cap, bad = min(cap + spec.increment, longest), 0
      continue
    bad += 1
    if bad == spec.patience_updates:
      cap, bad = max(cap - spec.increment, min(spec.start, longest)), 0
  return caps


@SEEDS
def test_drift_moves_the_cap_as_the_rule_says(seed):
  rng = np.random.default_rng(seed)
  spec = DriftSpec(start=10, increment=7)
  shares = -np.sort(-rng.random((60, 100)) ** 8, axis=1)
  rule = Drift(100, spec)
  state, caps = rule.start(), []
  for share in shares:
    caps.append(rule.cap(state))
    shown = Stats(np.ones(4), share, share, {"reliable": share})
    state = through_json(rule.next(state, shown))
  assert caps == drift_caps(spec, 100, shares)
  assert len({*caps}) > 3 and any(np.diff(caps) < 0)


def test_defaults_are_those_that_are_published():
  agreement, drift = AgreementSpec(), DriftSpec()
  assert dataclasses.astuple(agreement) == (64, 0.7, 4096, 50, 512, 4, 64)
  assert drift.min_reliable_fraction == 0.1


# Adaptive FastOPD.


class PlateauReference:
  """The rule for one run, with numbers of whole bands."""

  def __init__(self, spec: PlateauSpec, longest: int):
    self.spec, self.longest = spec, longest
    self.enter(min(spec.start, longest))

  def enter(self, cap: int) -> None:
    self.cap, self.first, self.smooth = cap, None, 1.0
    self.best, self.waited = math.inf, 0

  def see(self, signals: list[float] | None, reached: float) -> None:
    """Signals are those to be lowered; None if nobody has the band."""
    self.waited += 1
    if signals is not None:
      self.first = self.first or signals
      quotients = [
          now / then if then > 1e-6 else 0.0
          for now, then in zip(signals, self.first, strict=True)
      ]
      keep = self.spec.smoothing
      self.smooth = keep * self.smooth + (1 - keep) * max(quotients)
      if self.smooth < self.best - self.spec.min_progress:
        self.best, self.waited = self.smooth, 0
    enough = self.spec.min_reached_fraction
    if (enough and reached >= enough) or (
        self.waited == self.spec.patience_updates
    ):
      self.enter(min(self.cap + self.spec.increment, self.longest))


NAMES = ("overlap", "shared_mass", "shared_penalty", "unshared_penalty")


@SEEDS
@pytest.mark.parametrize("enough", [0.0, 0.8])
def test_plateau_moves_the_cap_as_the_rule_says(seed, enough):
  rng = np.random.default_rng(seed)
  spec = PlateauSpec(
      start=10, increment=10, patience_updates=2, min_reached_fraction=enough
  )
  rule, reference = Plateau(100, spec), PlateauReference(spec, 100)
  state, waits, levels = rule.start(), [], rng.random(4)
  for _ in range(80):
    assert rule.cap(state) == reference.cap
    cap = reference.cap
    lengths = rng.integers(0, 1.4 * cap, 12)
    count = masks(lengths, 100).sum(0)
    levels *= rng.uniform(0.7, 1.1, 4)
    shown = levels[:, None] * rng.uniform(0.9, 1.1, (4, 100))
    shown[:2] = 1 - np.minimum(shown[:2], 1)
    inside = slice(max(cap - 10, 0), cap)
    signals = None
    if count[inside].sum():
      means = [np.average(x[inside], weights=count[inside]) for x in shown]
      signals = [1 - means[0], 1 - means[1], *means[2:]]
    shown = np.where(count, shown, np.nan)
    found = Stats(
        lengths, np.zeros(100), count, dict(zip(NAMES, shown, strict=True))
    )
    before = rule.cap(state)
    state = through_json(rule.next(state, found))
    reference.see(signals, np.mean(lengths >= cap))
    waits.append(rule.cap(state) == before)
    if rule.cap(state) == 100:
      break
  assert any(waits) and not all(waits)


def banded(level: float, lengths=(100, 100), names=NAMES) -> Stats:
  """Signals that are all `level` of what they can be at most."""
  count = masks(lengths, 100).sum(0)
  shown = {name: np.full(100, level) for name in names}
  for name in ("overlap", "shared_mass"):
    shown[name] = 1 - shown[name]
  return Stats(np.asarray(lengths), np.zeros(100), count, shown)


def caps_of(rule, shown) -> list[int]:
  state, caps = rule.start(), []
  for one in shown:
    caps.append(rule.cap(state))
    state = through_json(rule.next(state, one))
  return [*caps, rule.cap(state)]


def test_plateau_waits_while_the_worst_signal_falls():
  spec = PlateauSpec(
      20, 10, smoothing=0.0, min_reached_fraction=0.0, patience_updates=2
  )
  rule = Plateau(100, spec)
  falling = [banded(0.9**i) for i in range(12)]
  assert caps_of(rule, falling) == [20] * 13
  # Two updates without progress.
  assert caps_of(rule, [*falling[:3], *falling[2:]]) == [20] * 14
  assert caps_of(rule, [*falling[:3], *falling[:2]]) == [20] * 5 + [30]
  # Three signals fall, and one does not.
  mixed = []
  for i, one in enumerate(falling[:6]):
    shown = one.shown | {"shared_penalty": np.full(100, 1.0 + i)}
    mixed.append(dataclasses.replace(one, shown=shown))
  assert caps_of(rule, mixed) == [20] * 3 + [30] * 3 + [40]
  # Signals with nothing left to improve do not count.
  done = [
      dataclasses.replace(x, shown=x.shown | {"overlap": np.ones(100)})
      for x in falling
  ]
  assert caps_of(rule, done) == [20] * 13
  # Nobody has the band, which is no progress.
  assert caps_of(rule, [banded(0.9**i, (3, 3)) for i in range(2)]) == [
      20,
      20,
      30,
  ]


def test_plateau_grows_at_once_when_enough_rollouts_reach_the_cap():
  rule = Plateau(100, PlateauSpec(20, 10, min_reached_fraction=0.5))
  falling = [banded(0.9**i, (25, 25, 3, 3)) for i in range(6)]
  assert caps_of(rule, falling) == [20] + [30] * 6
  assert caps_of(rule, [banded(1.0)] * 9)[-1] == 100


def test_plateau_looks_at_the_band_before_the_cap_only():
  spec = PlateauSpec(20, 10, min_reached_fraction=0.0, patience_updates=1)
  shown = []
  for i in range(6):
    one = banded(0.9**i)
    for values in one.shown.values():
      values[:10] = values[20:] = 0.5 + 0.05 * i
    shown.append(one)
  assert caps_of(Plateau(100, spec), shown) == [20] * 7


# What they see of a token.

ROWS, COLUMNS, VOCABULARY = 8, 10, 16
LENGTHS = [3, 8, 1, 5, 8, 2, 7, 4]
STUDENT, PARAMS = toys.model(0, num_layers=1, vocab_size=VOCABULARY)
TEACHER, TEACHER_PARAMS = toys.model(1, num_layers=1, dim=24)
HEAD = TEACHER.head(TEACHER_PARAMS)
PROMPTS, ROLLOUT = toys.prompts(ROWS), toys.rollout(LENGTHS, COLUMNS)
EXACT = ExactLoss(toys.distribution(stop_ids=toys.STOPS, temperature=0.7))
SCORES = loss_lib.score(TEACHER, EXACT, TEACHER_PARAMS, PROMPTS, ROLLOUT)
MASK = np.asarray(ROLLOUT.mask)


@functools.cache
def logits() -> tuple[np.ndarray, np.ndarray]:
  """Both models' logits of real tokens, [B, P, V], by whole forward passes."""
  tokens = jnp.concatenate([PROMPTS.tokens, ROLLOUT.tokens], axis=1)
  mask = jnp.concatenate([PROMPTS.mask, ROLLOUT.mask], axis=1)
  first, found = PROMPTS.tokens.shape[1] - 1, []
  for model, params in ((STUDENT, PARAMS), (TEACHER, TEACHER_PARAMS)):
    hidden = model.apply(params, tokens, mask)[:, first:-1]
    values = np.asarray(model.logits(params, hidden), np.float64)
    found.append(values[..., : toys.NUM_TOKENS])
  return tuple(found)


def log_softmax(x: np.ndarray) -> np.ndarray:
  return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def seen_at(student, teacher, top: int) -> dict[str, float]:
  """What a schedule sees at a token, from its logits, in float64."""
  log_p, log_q = (log_softmax(x / 0.7) for x in (student, teacher))
  p, q = np.exp(log_p), np.exp(log_q)
  own, theirs = ({*np.argsort(-x)[:top]} for x in (student, teacher))

  def penalty(tokens) -> float:
    return sum(p[v] * abs(log_p[v] - log_q[v]) for v in tokens)

  # Both stop tokens are one event, which belongs to no top.
  events = [[*toys.STOPS]]
  ranked = [v for v in np.argsort(-student) if v not in toys.STOPS]
  events += [[v] for v in ranked[:top]] + [ranked[top:]]
  pairs = [(p[e].sum(), q[e].sum()) for e in events if e]
  return {
      "overlap": len(own & theirs) / top,
      "shared_mass": sum(p[v] for v in own & theirs),
      "shared_penalty": penalty(own & theirs),
      "unshared_penalty": penalty(own - theirs),
      "top_kl": sum(a * np.log(a / b) for a, b in pairs),
  }


@dataclasses.dataclass(frozen=True)
class Curious(prefix_schedule.Schedule):
  """Sees everything."""

  sees = (*NAMES, "top_kl")
  top_tokens = 4


def seen(mesh=None, memory=2**28, schedule=Curious(COLUMNS)):
  model = dataclasses.replace(STUDENT, mesh=mesh)
  loss = dataclasses.replace(EXACT, memory=memory)
  hidden = STUDENT.prefix_hidden(PARAMS, PROMPTS, ROLLOUT)
  return jax.jit(loss_lib.seen, static_argnums=(0, 1, 2))(
      model, loss, schedule, PARAMS, HEAD, hidden, SCORES, ROLLOUT.mask
  )


@pytest.mark.parametrize("memory", [2**28, 7 * 16 * VOCABULARY])
def test_what_is_seen_is_what_whole_logits_say(memory):
  found = seen(memory=memory)
  student, teacher = logits()
  for row, column in np.argwhere(MASK):
    wanted = seen_at(student[row, column], teacher[row, column], 4)
    ours = {name: float(x[row, column]) for name, x in found.items()}
    assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-5)


# What becomes of it in the update.


def summed(schedule, rollout=ROLLOUT, threshold=None):
  """Returns the loss, the metrics' sums, and the student's gradients."""
  watch = step_lib.Watch(COLUMNS, toys.STOPS, schedule)

  def loss(params):
    return step_lib.distillation_loss(
        STUDENT,
        EXACT,
        watch,
        step_lib.Window(),
        params,
        HEAD,
        (PROMPTS, rollout, SCORES),
        threshold,
    )

  (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
  return value, sums, grads


def assert_close(ours, theirs) -> None:
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_agreement_cuts_off_is_as_if_it_had_not_been_sampled():
  rule = Agreement(COLUMNS, AgreementSpec(2, low_windows=2, top_tokens=4))
  student, teacher = logits()
  kl = [
      [seen_at(s, t, 4)["top_kl"] for s, t in zip(*rows, strict=True)]
      for rows in zip(student, teacher, strict=True)
  ]
  smallest = [
      stopped(row[:length], 2, 2, NEVER)[1]
      for row, length in zip(kl, LENGTHS, strict=True)
  ]
  threshold = 1.01 * np.median([x for x in smallest if x < math.inf])
  kept = [
      stopped(row[:length], 2, 2, threshold)[0]
      for row, length in zip(kl, LENGTHS, strict=True)
  ]
  value, sums, grads = summed(rule, threshold=jnp.float32(threshold))
  assert sums["chosen"].trained.sum(axis=1).tolist() == kept
  assert kept != LENGTHS
  short = dataclasses.replace(ROLLOUT, mask=jnp.asarray(masks(kept, COLUMNS)))
  plain, plain_sums, plain_grads = summed(prefix_schedule.Schedule(0), short)
  assert_close(value, plain)
  assert_close(grads, plain_grads)
  chosen = sums.pop("chosen")
  assert_close(sums, plain_sums)
  uncut = summed(rule, threshold=jnp.float32(NEVER))[1]["chosen"]
  np.testing.assert_allclose(uncut.minima, smallest, rtol=1e-4)
  assert not (chosen.trained & ~MASK).any()


def test_weights_scale_each_tokens_loss_and_gradient():
  rule = Drift(COLUMNS, DriftSpec(2, 2, 4, 0.6, max_drifted=3))
  value, sums, grads = summed(rule)
  student, teacher = logits()
  weights = np.zeros(MASK.shape)
  for row, length in enumerate(LENGTHS):
    drifted = 0
    for t in range(length):
      overlap = seen_at(student[row, t], teacher[row, t], 4)["overlap"]
      drifted += overlap < 0.6
      weights[row, t] = max(0.0, 1 - drifted / 3) + 0.5
  assert len({*weights[MASK]}) == 4
  hidden = STUDENT.prefix_hidden(PARAMS, PROMPTS, ROLLOUT)

  def dense(params):
    hidden = STUDENT.prefix_hidden(params, PROMPTS, ROLLOUT)
    other = TEACHER.logits(TEACHER_PARAMS, SCORES.hidden)
    logits = STUDENT.logits(params, hidden)
    kl = toys.reverse_kl(logits, other, EXACT.dist)
    return jnp.sum(jnp.where(MASK, weights * kl, 0))

  wanted, slopes = jax.value_and_grad(dense)(PARAMS)
  assert hidden.shape[:2] == MASK.shape
  assert float(value) == pytest.approx(float(wanted), rel=1e-5)
  assert_close(grads, slopes)
  assert float(sums["loss"][1]) == pytest.approx(weights.sum())
  # Metrics are of all tokens alike.
  assert int(sums["kl"][1]) == MASK.sum()


def test_plateau_changes_no_update_and_sums_its_signals():
  rule = Plateau(COLUMNS, PlateauSpec(top_tokens=4))
  value, sums, grads = summed(rule)
  plain, plain_sums, plain_grads = summed(prefix_schedule.Schedule(0))
  assert float(value) == float(plain)
  assert_close(grads, plain_grads)
  assert set(sums) - set(plain_sums) == {
      "chosen",
      *(f"schedule_{name}" for name in NAMES),
  }
  student, teacher = logits()
  for name in NAMES:
    total, count = sums[f"schedule_{name}"]
    wanted = [
        sum(
            seen_at(student[row, t], teacher[row, t], 4)[name]
            for row in range(ROWS)
            if MASK[row, t]
        )
        for t in range(COLUMNS)
    ]
    np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-5)
    assert count.tolist() == MASK.sum(0).tolist()


PREFIXES = {
    "drift": PrefixSpec(
        "drift", (4, 8), drift=DriftSpec(8, 4, 4, 0.6, max_drifted=3)
    ),
    "plateau": PrefixSpec(
        "plateau", (4, 8), plateau=PlateauSpec(8, 4, top_tokens=4)
    ),
    "agreement": PrefixSpec(
        "agreement",
        (4, 8),
        agreement=AgreementSpec(2, low_windows=2, top_tokens=4),
    ),
}


NOT_AGREEMENT = ("drift", "plateau")


def made(prefix, shape=(1, 1, 1), **optimizer):
  """Programs, a state, a teacher and prompts on a mesh."""
  mesh = sharding.make_mesh(MeshSpec(*shape), jax.devices()[: math.prod(shape)])
  task = DatasetSpec("math_task", answer="answer", size=1)
  config = toys.run_config(
      "student",
      "teacher",
      data=DataSpec(task, 8, 5),
      prefix=prefix,
      rollout=RolloutSpec(per_prompt=1, max_len=8),
      optimizer=OptimizerSpec(learning_rate=1e-2, **optimizer),
  )
  models = toys.models(config, mesh)
  shardings = sharding.param_shardings(models.student.abstract_params(), mesh)
  params, teacher_params = (
      jax.device_put(models.student.init(jax.random.key(seed)), shardings)
      for seed in (0, 1)
  )
  prompts = jax.tree.map(np.asarray, toys.prompts(8, 5))
  programs = Programs(models)
  prompts = sharding.global_batch(prompts, mesh)
  return programs, programs.init(params), teacher_params, prompts


def updated(prefix, threshold=None, **kwargs):
  """Returns the parameters after an update, and what it showed."""
  programs, state, teacher_params, prompts = made(prefix, **kwargs)
  request = update.Request(8, jax.random.key(0), "student", threshold)
  state, shown = programs.update(
      state, teacher_params, prompts, None, request, update.Clock()
  )
  return jax.tree.map(np.asarray, state.params), shown


def assert_same_update(rule: str, **variant) -> None:
  """Checks an update against that of one device in one microbatch."""
  prefix, threshold = PREFIXES[rule], None
  if rule == "agreement":
    _, shown = updated(prefix, NEVER)
    assert (shown.trained == shown.mask).all()
    threshold = float(np.median(shown.minima)) + 1e-3
  params, one = updated(prefix, threshold)
  other_params, other = updated(prefix, threshold, **variant)
  for field in ("tokens", "mask", "trained"):
    np.testing.assert_array_equal(getattr(other, field), getattr(one, field))
  if rule == "agreement":
    np.testing.assert_allclose(other.minima, one.minima, rtol=1e-4)
    assert one.trained.sum() < one.mask.sum()
  for metric, value in one.metrics.items():
    np.testing.assert_allclose(
        other.metrics[metric], value, rtol=2e-3, atol=1e-5, err_msg=metric
    )
  for x, y in zip(
      jax.tree.leaves(other_params), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=2e-4)


SLOW = pytest.mark.slow
RULES = ("agreement", *(pytest.param(x, marks=SLOW) for x in NOT_AGREEMENT))


@pytest.mark.parametrize("rule", RULES)
def test_microbatches_do_not_change_an_update(rule):
  # Two rollouts at a time.
  assert_same_update(rule, batch_tokens=26)


@pytest.mark.parametrize(
    "rules", [("agreement",), pytest.param(NOT_AGREEMENT, marks=SLOW)]
)
def test_eight_devices_do_not_change_an_update(rules):
  started = toys.start("length_rules_on_devices.py", *rules, devices=8)
  (printed,) = toys.finish([started], seconds=600)
  assert printed.endswith("OK\n")


def test_what_is_compiled_ahead_is_what_runs():
  programs, state, teacher_params, prompts = made(PREFIXES["agreement"])
  programs.compile_ahead()
  programs.wait()
  request = update.Request(8, jax.random.key(0), "student", NEVER)
  with toys.compilations() as late:
    programs.update(
        state, teacher_params, prompts, None, request, update.Clock()
    )
  assert not {"gradient", "score", "decode", "apply", "zeros"} & {*late}


def test_the_ledger_charges_both_heads_and_all_sampled_tokens():
  student, teacher = toys.model_config(), toys.model_config(dim=24)
  lengths = flops.Lengths(
      np.array([5, 7]), np.array([9, 4]), trained=np.array([3, 4])
  )
  plain, sees = (
      flops.distillation(student, teacher, lengths, sees=x)
      for x in (False, True)
  )
  assert sees.score - plain.score == flops.head(teacher, 13)
  more = flops.layers(student, [13], [7]) + flops.head(student, 13)
  assert sees.forward - plain.forward == pytest.approx(more)
  for phase in ("prefill", "decode", "backward", "optimizer"):
    assert getattr(sees, phase) == getattr(plain, phase)


def test_per_token_has_no_gradient():
  def total(hidden):
    found = chunked_head.per_token(
        loss_lib.Sight(EXACT.dist, ("top_kl",), 4),
        chunked_head.HeadInputs(
            hidden, STUDENT.head(PARAMS), SCORES.hidden, HEAD
        ),
        chunked_head.TokenInputs(ROLLOUT.mask, ROLLOUT.mask),
    )
    return jnp.sum(found["top_kl"])

  hidden = STUDENT.prefix_hidden(PARAMS, PROMPTS, ROLLOUT)
  assert float(total(hidden)) > 0.1
  assert not np.asarray(jax.grad(total)(hidden)).any()
