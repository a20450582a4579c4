import json

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


def stats(kl, lengths=(100, 100), minima=None, **shown) -> Stats:
  """Statistics of rollouts that all have some length."""
  kl = np.asarray(kl, float)
  lengths = np.asarray(lengths)
  count = (np.arange(len(kl)) < lengths[:, None]).sum(0)
  return Stats(lengths, np.where(count, kl, np.nan), count, shown, minima)


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
      95,
      100,
      100,
  ]


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
      4,
      4,
      4,
      100,
      59,
      59,
      59,
      100,
      9,
      9,
      9,
      100,
  ]
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


def test_a_share_of_the_updates_has_another_source():
  rollout = RolloutSpec(1, 16, source="teacher", source_share=0.25)
  config = toys.run_config("student", "teacher", rollout=rollout)
  sources = [prefix_schedule.source(config, step) for step in range(400)]
  assert set(sources) == {"teacher", "student"}
  assert sources.count("teacher") == pytest.approx(100, abs=30)


@pytest.mark.parametrize(
    "changes, named",
    [
        *(
            (
                {"prefix": {"schedule": name, **settings},
                 "loss": {"form": "policy_gradient"}},
                f"prefix.schedule is '{name}' but loss.form is 'policy_grad",
            )
            for name, settings in (
                ("drift", {}),
                ("plateau", {}),
                ("agreement", {"agreement": AgreementSpec(window_tokens=4)}),
            )
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
)
def test_settings_that_do_not_fit_are_refused(changes, named):
  with pytest.raises(ConfigError, match=named):
    toys.run_config(
        "student",
        "teacher",
        prefix=PrefixSpec(**changes.get("prefix", {})),
        loss=LossSpec(**changes.get("loss", {})),
        rollout=RolloutSpec(1, 16, **changes.get("rollout", {})),
    )
