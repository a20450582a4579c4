import pytest
import toys

from prefix_distill.config import Config
from prefix_distill.config import FixedSpec
from prefix_distill.config import LinearSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.distill import prefix_schedule


def run(max_len: int, steps: int = 60, method: str = "prefix", **prefix):
  """Makes settings; those of the linear schedule are named alone."""
  linear = {n: prefix.pop(n) for n in ("start", "increment") if n in prefix}
  return toys.run_config(
      "student",
      "teacher",
      method=method,
      steps=steps,
      rollout=RolloutSpec(1, max_len),
      prefix=PrefixSpec(linear=LinearSpec(**linear), **prefix),
  )


def caps(config: Config) -> list[int]:
  return [prefix_schedule.cap(config, step) for step in range(config.steps)]


def test_the_default_is_the_papers_schedule():
  schedule = caps(run(16_384))
  assert schedule[:4] == [1, 257, 513, 769]
  assert schedule[59] == 15_105


def test_a_linear_cap_grows_up_to_the_longest_answer():
  config = run(100, 6, start=10, increment=40)
  assert caps(config) == [10, 50, 90, 100, 100, 100]
  assert prefix_schedule.longest(config) == 100


def test_a_fixed_cap_stays():
  assert caps(run(100, 3, schedule="fixed", fixed=FixedSpec(7))) == [7, 7, 7]


def test_full_distillation_has_the_cap_of_the_longest_answer():
  config = run(100, 3, "full", schedule="fixed", fixed=FixedSpec(7))
  assert caps(config) == [100, 100, 100]
  assert prefix_schedule.buckets(config) == (50, 100)
  assert prefix_schedule.needed(config) == (100,)


@pytest.mark.parametrize(
    "config",
    [
        run(16_384),
        run(300, 60, start=3, increment=7),
        run(20, 3),
        run(100, 3, schedule="fixed", fixed=FixedSpec(7)),
        run(100, 3, "full"),
        run(64, 9, start=1, increment=8, buckets=(5, 40, 64)),
    ],
)
def test_buckets_increase_and_cover_every_cap(config):
  buckets = prefix_schedule.buckets(config)
  assert list(buckets) == sorted(set(buckets))
  assert buckets[-1] >= prefix_schedule.longest(config) == max(caps(config))
  for cap in caps(config):
    assert min(b for b in buckets if b >= cap) in prefix_schedule.needed(config)


def test_sixty_caps_like_the_papers_need_seven_buckets():
  config = run(16_384)
  buckets = prefix_schedule.buckets(config)
  assert len(buckets) == 7
  assert buckets[-1] == prefix_schedule.longest(config) == 59 * 256 + 1


def test_named_buckets_are_taken_as_far_as_the_run_needs_them():
  config = run(64, 3, start=1, increment=16, buckets=(5, 40, 64))
  assert prefix_schedule.longest(config) == 33
  assert prefix_schedule.buckets(config) == (5, 40)
