import json

import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill.config import AgreementSpec
from prefix_distill.config import LossSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.prefix_schedule import Stats
from prefix_distill.errors import ConfigError
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores

LONGEST = 100


def make(schedule: str, method: str = "prefix", **prefix):
  config = toys.run_config(
      "student",
      "teacher",
      method=method,
      steps=6,
      rollout=RolloutSpec(1, LONGEST),
      prefix=PrefixSpec(schedule, **{schedule: prefix}),
  )
  return prefix_schedule.make(config)


def stats(kl, lengths=(100, 100), reliable=None, minima=None) -> Stats:
  """Statistics of rollouts that all have some length."""
  kl = np.asarray(kl, float)
  lengths = np.asarray(lengths)
  count = (np.arange(len(kl)) < lengths[:, None]).sum(0)
  return Stats(lengths, np.where(count, kl, np.nan), count, reliable, minima)


def drive(controller, shown) -> list[int]:
  """Returns the caps before, between and after the statistics.

  The state goes through JSON, as it does in a checkpoint.
  """
  state, caps = controller.start(), []
  for update in shown:
    caps.append(controller.cap(state))
    state = json.loads(json.dumps(controller.next(state, update)))
  return [*caps, controller.cap(state)]


FLAT = stats(np.ones(LONGEST))


@pytest.mark.parametrize(
    "schedule, prefix, caps",
    [
        ("linear", {"increment": 30}, [1, 31, 61, 91, 100]),
        (
            "linear",
            {"start": 5, "increment": 10, "every": 2},
            [5, 5, 15, 15, 25],
        ),
        ("fixed", {"length": 32}, [32] * 5),
    ],
)
def test_planned_caps_look_at_no_data(schedule, prefix, caps):
  assert drive(make(schedule, **prefix), [FLAT] * 4) == caps


def test_full_distillation_is_a_cap_too():
  assert drive(make("linear", method="full"), [FLAT] * 2) == [LONGEST] * 3


def test_random_caps_are_those_of_the_seed_and_cover_the_range():
  controller = make("random", min_length=3)
  caps = drive(controller, [FLAT] * 400)
  assert caps == drive(controller, [FLAT] * 400)
  assert min(caps) >= 3
  assert max(caps) <= LONGEST
  assert np.mean(caps) == pytest.approx((3 + LONGEST) / 2, abs=6)


def reliable(length: int, share: float = 1.0) -> Stats:
  """A share of the rollouts is reliable up to a length."""
  return stats(np.ones(LONGEST), reliable=share * (np.arange(100) < length))


def test_drift_grows_holds_and_shrinks():
  controller = make(
      "drift", start=20, increment=10, min_reliable_fraction=0.1
  )
  grow, hold = reliable(100), reliable(5)
  # Reliable up to cap - increment suffices.
  assert drive(controller, [grow] * 3) == [20, 30, 40, 50]
  assert drive(controller, [reliable(10)] * 2) == [20, 30, 30]
  # A tenth of the rollouts is enough, less is not.
  assert drive(controller, [reliable(100, 0.1)]) == [20, 30]
  assert drive(controller, [reliable(100, 0.09)]) == [20, 20]
  # It shrinks after three bad updates running, and not below the start.
  shown = [grow, grow, hold, hold, grow, hold, hold, hold]
  assert drive(controller, shown) == [20, 30, 40, 40, 40, 50, 50, 50, 40]
  assert drive(controller, [hold] * 6) == [20] * 7
  assert drive(make("drift", start=95, increment=10), [grow] * 2) == [
      95, 100, 100,
  ]  # fmt: skip


def band(value: float, lengths=(100, 100)) -> Stats:
  return stats(np.full(LONGEST, value), lengths)


def test_plateau_grows_only_when_progress_ends_and_rollouts_reach_the_cap():
  controller = make(
      "plateau", start=20, increment=10, patience_updates=2
  )
  # Falling: hold. Two updates without a new best: grow, and start over.
  falling = [band(3.0), band(2.0), band(1.0)]
  assert drive(controller, falling) == [20] * 4
  stale = [band(1.0), band(1.2), band(1.1), band(5.0), band(5.0), band(5.0)]
  assert drive(controller, stale) == [20, 20, 20, 30, 30, 30, 40]
  # Too few rollouts reach the cap.
  short = [band(1.0), *[band(2.0, (100, 5, 5))] * 4]
  assert drive(controller, short) == [20] * 6
  # None has the band at all, which is no progress either.
  none = [band(1.0), *[band(2.0, (3, 3))] * 3]
  assert drive(controller, none) == [20] * 5


def test_plateau_looks_at_the_band_before_the_cap_only():
  controller = make(
      "plateau", start=20, increment=10, patience_updates=1
  )
  rest = np.linspace(9, 1, LONGEST)
  shown = []
  for update in range(4):
    kl = rest + update
    kl[10:20] = 5 - update
    shown.append(stats(kl))
  assert drive(controller, shown) == [20] * 5


def test_an_audit_puts_the_cap_where_the_divergence_is():
  controller = make("audited", start=4, divergence_fraction=0.9, audit_every=3)
  opening, later = np.zeros(LONGEST), np.zeros(LONGEST)
  opening[:10], later[50:60] = 1.0, 1.0
  # Three updates, then an audit: nine of ten tokens hold nine tenths.
  shown = [stats(opening)] * 4
  assert drive(controller, shown) == [4, 4, 4, LONGEST, 9]
  # It moves on when the opening is learned, and back when it is forgotten.
  shown = [stats(opening)] * 3 + [stats(later)] * 4 + [stats(opening)] * 4
  assert drive(controller, shown) == [
      4, 4, 4, 100, 59, 59, 59, 100, 9, 9, 9, 100,
  ]  # fmt: skip
  # Never below the start.
  first = np.zeros(LONGEST)
  first[0] = 1.0
  assert drive(controller, [stats(first)] * 4)[-1] == 4


def test_an_audit_weighs_positions_by_the_rollouts_that_reach_them():
  kl = np.zeros(LONGEST)
  kl[5], kl[80] = 1.0, 1.0
  many = stats(kl, [10] * 19 + [100])
  controller = make("audited", divergence_fraction=0.9, audit_every=1)
  assert drive(controller, [many] * 2) == [1, LONGEST, 6]


def test_a_prefix_that_is_learned_is_audited_at_once():
  controller = make("audited", start=4, min_nats=0.5)
  # 0.8 nats are left in four tokens, then 0.4; in a hundred there are 12.5.
  much, little = (stats(np.full(4, kl), [4] * 8) for kl in (0.2, 0.1))
  audit = stats(np.full(LONGEST, 0.125))
  shown = [much, much, little, audit]
  assert drive(controller, shown) == [4, 4, 4, LONGEST, 50]
  # Not before, but after so many updates at the latest.
  assert drive(controller, [much] * 7) == [4] * 8
  assert drive(controller, [much] * 8)[-1] == LONGEST


def test_training_ends_when_an_audit_finds_nothing():
  controller = make("audited", min_nats=0.5)
  little, much = stats(np.full(LONGEST, 0.004)), stats(np.full(LONGEST, 0.006))
  # Any prefix has so little; an audit of the whole says whether all has.
  assert drive(controller, [little, little]) == [1, LONGEST, 0]
  assert drive(controller, [little, much])[-1] > 0
  never = make("audited", audit_every=2)
  assert 0 not in drive(never, [stats(np.zeros(LONGEST))] * 9)


def test_agreement_cuts_below_a_quantile_of_past_minima():
  controller = make(
      "agreement", warmup_updates=2, quantile=0.5, memory_rollouts=3
  )
  state = controller.start()
  assert controller.cap(state) == LONGEST
  for minima in ([0.1, 0.2], [0.3, 0.5]):
    assert controller.threshold(state) == float("-inf")
    state = controller.next(state, stats(np.ones(9), minima=minima))
  # The oldest of the four is forgotten.
  assert controller.threshold(state) == pytest.approx(0.3)
  assert json.loads(json.dumps(state)) == state


def test_rollouts_shorter_than_a_window_do_not_make_the_threshold_nan():
  controller = make("agreement", warmup_updates=1, quantile=0.7)
  state = controller.start()
  # Half of the rollouts have no window, so no smallest average.
  minima = [0.1, np.inf, 0.2, np.inf, 0.3, np.inf]
  for _ in range(3):
    state = controller.next(state, stats(np.ones(9), minima=minima))
  wanted = np.quantile([0.1, 0.2, 0.3] * 3, 0.7)
  assert controller.threshold(state) == pytest.approx(wanted)


def test_rollouts_are_cut_after_four_windows_of_agreement():
  kl = np.ones((4, 12))
  kl[0, 3:] = 0.0  # agrees from the fourth token on
  kl[1, 3:6] = 0.0  # not for long enough
  kl[2, :] = 0.0  # from the first on
  lengths = np.array([12, 12, 12, 2])
  mask = jnp.asarray(np.arange(12) < lengths[:, None])
  zeros = jnp.zeros((4, 12))
  rollout = Rollout(zeros.astype(int), mask, jnp.asarray(kl), zeros)
  scores = TeacherScores(log_probs=zeros)
  short, minima = prefix_schedule.cut(3, rollout, scores, jnp.float32(0.5))
  # Windows of three are below 0.5 from token 4 (0-based, one of three left);
  # the fourth time is at token 7, which still counts.
  assert short.mask.sum(axis=1).tolist() == [8, 12, 6, 2]
  np.testing.assert_allclose(minima, [0, 0, 0, np.inf], atol=1e-6)
  never, _ = prefix_schedule.cut(3, rollout, scores, jnp.float32(-np.inf))
  assert (never.mask == mask).all()


def test_a_share_of_the_updates_has_another_source():
  rollout = RolloutSpec(1, 16, source="teacher", source_share=0.25)
  config = toys.run_config("student", "teacher", rollout=rollout)
  sources = [prefix_schedule.source(config, step) for step in range(400)]
  assert set(sources) == {"teacher", "student"}
  assert sources.count("teacher") == pytest.approx(100, abs=30)


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"prefix": {"schedule": "drift"},
             "loss": {"form": "policy_gradient"}},
            "prefix.schedule is 'drift' but loss.form is 'policy_gradient'",
        ),
        (
            {"prefix": {"schedule": "agreement",
                        "agreement": AgreementSpec(window_tokens=4)},
             "rollout": {"source": "teacher"}},
            "prefix.schedule is 'agreement' but rollout.source is 'teacher'",
        ),
        (
            {"rollout": {"source": "data"}},
            "rollout.source is 'data' but data.train.completion is empty",
        ),
        (
            {"rollout": {"source": "teacher"},
             "loss": {"form": "policy_gradient"}},
            "rollout.source is 'teacher' but loss.form is 'policy_gradient'",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, named):
  with pytest.raises(ConfigError, match=named):
    toys.run_config(
        "student",
        "teacher",
        prefix=PrefixSpec(**changes.get("prefix", {})),
        loss=LossSpec(**changes.get("loss", {})),
        rollout=RolloutSpec(1, 16, **changes.get("rollout", {})),
    )
