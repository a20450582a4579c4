"""The fault-injection command, with a few faults of each kind."""

import injection
import pytest


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("injection")


@pytest.mark.slow
@pytest.mark.parametrize("kind", injection.KINDS)
def test_what_is_promised_of_faults_holds(kind, directory):
  count = 8 if kind == "kill" else 2  # A kill in each phase.
  done = injection.run(directory / kind, [kind], count, seed=1)
  assert len(done) == count
  assert [x for x in done if not x["held"]] == []


def test_the_table_counts_what_held():
  results = [
      {"kind": "a", "held": held, "said": said, "seconds": 3.0}
      for held, said in ((True, "fine"), (False, "broken"), (True, "fine"))
  ]
  lines = injection.table(results).splitlines()
  assert lines[2:] == [
      "| a | 3 | 2 | fine; or broken | 3 |",
      "| all | 3 | 2 | | |",
  ]


def test_a_small_count_is_spread_over_all():
  assert injection._spread(range(10), 3) == [0, 3, 6]
  assert injection._spread(range(3), 9) == [0, 1, 2]
