import dataclasses

import numpy as np
import pytest
import toys

from prefix_distill.report import report
from prefix_distill.train import loop


@pytest.mark.parametrize(
    "tokens, repeated",
    [
        ([], 0),
        ([5, 5, 5], 0),
        ([5, 5, 5, 5], 0),
        ([5, 5, 5, 5, 5], 1 / 2),
        ([5] * 103, 99 / 100),
        ([1, 2, 3, 4, 5, 6, 7], 0),
        # 1234 2341 3412 4123 1234: one of five was there before.
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        # Three tokens that come back are not a run of four.
        ([1, 2, 3, 4, 1, 2, 3, 5], 0),
    ],
)
def test_repetition_counts_runs_of_four_that_were_there_before(
    tokens, repeated
):
  assert report.repetition(tokens) == pytest.approx(repeated)
  assert report.repetition(np.array(tokens, np.int32)) == pytest.approx(
      repeated
  )


@pytest.mark.parametrize(
    "lengths, p95",
    [
        ([7], 7),
        ([3, 9], 9),
        (list(range(1, 101)), 95),
        ([10] * 19 + [99], 10),
        ([10] * 18 + [99] * 2, 99),
    ],
)
def test_95_percent_of_answers_are_no_longer_than_p95(lengths, p95):
  assert report.length_p95(np.array(lengths)) == p95
  shape = (-1, 2) if len(lengths) % 2 == 0 else (-1, 1)
  assert report.length_p95(np.array(lengths[::-1]).reshape(shape)) == p95


def test_answers_either_stop_or_are_cut():
  finished = np.array([[True, True], [True, False]])
  assert report.finish_shares(finished) == {"finish_rate": 0.75, "cut": 0.25}


def test_rollouts_that_stop_at_the_cap_were_not_cut():
  stop, pad, cap = 9, 0, 6
  rows = (
      [1, 1, 1, 1, 1, 1],  # Cut: 2 of 3 runs of four were there before.
      [1, 2, 3, 4, 5, stop],  # As long, and stopped.
      [1, 8],
      [stop],
  )
  mask = np.arange(cap) < np.array([[len(row)] for row in rows])
  # What lies behind the mask is never looked at, not even a stop token.
  tokens = np.array([row + [stop] * (cap - len(row)) for row in rows])
  found = report.rollout_metrics(tokens, mask, (8, stop))
  assert found == {
      "finish_rate": 0.75,
      "cut": 0.25,
      "rollout_len_p95": 6,
      "repetition": pytest.approx((2 / 3) / 4),
  }
  found = report.rollout_metrics(tokens, mask, (pad,))
  assert (found["finish_rate"], found["cut"]) == (0, 1)


def test_supervised_updates_say_nothing_of_rollouts(tmp_path):
  student = toys.write_model(tmp_path / "student", 0, "capable")
  config = toys.run_config(student, student)
  train = dataclasses.replace(config.data.train, completion="completion")
  config = dataclasses.replace(
      config,
      method="sft",
      steps=1,
      teacher=None,
      data=dataclasses.replace(config.data, train=train),
      rollout=dataclasses.replace(config.rollout, per_prompt=1, max_len=256),
      evaluation=dataclasses.replace(config.evaluation, teacher=False),
  )
  loop.train(config, tmp_path / "run")
  lines = report.read_metrics(tmp_path / "run" / "metrics.jsonl")
  (update,) = [x for x in lines if "cross_entropy" in x]
  fields = {"finish_rate", "cut", "rollout_len_p95", "repetition"}
  assert not fields & update.keys()
  for evaluation in (x for x in lines if "mode" in x):
    assert evaluation["cut"] == pytest.approx(1 - evaluation["finish_rate"])
    assert 0 <= evaluation["repetition"] <= 1
    assert 0 < evaluation["length_p95"] <= config.evaluation.max_len
  directory = tmp_path / "run" / "report"
  assert {x.name for x in directory.iterdir()} == {
      "accuracy_flops.svg",
      "termination.svg",
      "loss_step.svg",
      "report.html",
  }
  # Without a teacher, what is kept is how unlikely the answers are.
  rollouts, _ = report.read_samples(tmp_path / "run")
  assert [x["measure"] for x in rollouts] == ["cross_entropy"] * 4
  assert all(x["source"] == "data" and x["finished"] for x in rollouts)
  assert all("teacher" not in x for x in rollouts)
  assert min(np.mean(x["divergence"]) for x in rollouts) > 1
