"""What a run hears of signals."""

import signal
import time

import pytest
import toys

from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib


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


@pytest.fixture
def run(tmp_path):
  models = toys.write_models(tmp_path)
  workdir = tmp_path / "run"
  workdir.mkdir()
  setup = setup_lib.prepare(toys.run_config(*models, steps=9), workdir)
  run = loop.Run(setup, workdir)
  yield run
  run.programs.close()
  run.checkpointer.close()


def test_an_update_that_hangs_says_in_which_phase(run, monkeypatch, capsys):
  monkeypatch.setattr(loop, "_SLOW_SECONDS", 0.2)
  for step in range(5):
    run.update(step)
  assert "has taken" not in capsys.readouterr().out
  score = run.programs.score

  def slow(*args):
    time.sleep(2 + 10 * max(run._durations))
    return score(*args)

  monkeypatch.setattr(run.programs, "score", slow)
  run.update(5)
  out = capsys.readouterr().out
  assert "Process 0: update 6 has taken" in out and "phase 'score'" in out
  assert out.count("has taken") == 1


def test_an_update_is_given_up_when_the_deadline_is_near(run):
  before = run.setup.data.get_state(), int(run.state.step)
  run.update(0)
  middle = run.setup.data.get_state(), int(run.state.step)
  run.stop.deadline = time.monotonic()
  with pytest.raises(loop.Abandoned):
    run.update(1)
  assert middle == (run.setup.data.get_state(), int(run.state.step))
  assert before != middle
  run.stop.deadline = time.monotonic() + 600
  assert run.update(1)["step"] == 2
