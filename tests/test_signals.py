"""What a run hears of signals."""

import signal

import pytest

from prefix_distill.train import loop


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def inherited(request):
  """What SIGINT does when the run starts."""
  before = signal.signal(signal.SIGINT, request.param)
  yield request.param
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_a_run_unless_whoever_started_it_ignores_it(inherited):
  with loop.stop_on_signal() as stop:
    signal.raise_signal(signal.SIGINT)
    assert stop.wanted is (inherited != signal.SIG_IGN)
  assert signal.getsignal(signal.SIGINT) == inherited


def test_a_preemption_stops_it_and_an_ignored_ctrl_c_stays_ignored(inherited):
  before = signal.getsignal(signal.SIGTERM)
  with loop.stop_on_signal() as stop:
    assert not stop.wanted
    signal.raise_signal(signal.SIGTERM)
    assert stop.wanted
    # What a second one does; where it was ignored it still is.
    assert signal.getsignal(signal.SIGINT) == inherited
  assert signal.getsignal(signal.SIGTERM) == before
