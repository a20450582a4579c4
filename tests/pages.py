"""Runs as their files show them, made by hand, for tests of the report."""

import dataclasses
import json
import pathlib

import toys

from prefix_distill import config as config_lib
from prefix_distill.report import page

# What a model may write, and no page may obey.
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=1>"


def update(step: int, **changes) -> dict:
  return {
      "step": step,
      "prefix_len": 4 * step,
      "rollout_len": 3.5 * step,
      "tokens": 100 * step,
      "flops": 1e9 * step,
      "flops_full_estimate": 3e9 * step,
      "seconds": 2.0 * step,
      "compilations_sample": 1,
      "compilations_score": 1,
      "compilations_update": 1,
      "kl": 1 / step,
      "kl_at_0": 1 / step,
      "finish_rate": 0.25,
      "cut": 0.75,
      "rollout_len_p95": 4 * step,
      "repetition": 0.01,
      **changes,
  }


def evaluation(step: int, finish: float = 1.0, **changes) -> dict:
  return {
      "step": step,
      "model": "student",
      "set": "heldout",
      "mode": "sampled",
      "flops": 1e9 * step,
      "accuracy": 0.5 * finish,
      "accuracy_low": 0.4 * finish,
      "accuracy_high": 0.6 * finish,
      "accuracy_finished": 0.5 if finish else 0.0,
      "finish_rate": finish,
      "cut": 1 - finish,
      "mean_length": 120.4,
      "length_p95": 231,
      "repetition": 0.125,
      "problems": 480,
      "samples": 1,
      **changes,
  }


RUN = [
    evaluation(0),
    evaluation(0, mode="greedy"),
    *(update(step) for step in (1, 2)),
    evaluation(2),
    evaluation(2, mode="greedy"),
    evaluation(2, model="teacher"),
    evaluation(2, model="teacher", mode="greedy"),
]


def rollout(step: int, record: int, finished: bool) -> dict:
  texts = ["We", " want\n", EVIL, "", "<|im_end|>"]
  return {
      "step": step,
      "source": "student",
      "record": record,
      "length": 5 if finished else 9,
      "finished": finished,
      "measure": "reverse_kl",
      "prompt": [["<|im_start|>", 1], [f"user\nHow many? {EVIL}", 0]],
      "ids": [5, 6, 7, 8, 9],
      "texts": texts,
      "special": [4],
      "divergence": [0.0, 0.5, 2.5, None, 1e-05],
      "student": [0.25, 0.5, 1.0, None, 1e-05],
      "teacher": [0.75, 0.5, 0.125, None, 1.0],
      "alternatives": [
          [["We", 0.75], [f" guess{i}{EVIL}", 0.125]] for i in range(5)
      ],
  }


def answer(step: int, problem: int, right: bool, finished: bool, **changes):
  return {
      "step": step,
      "model": "student",
      "set": "heldout",
      "mode": "sampled",
      "problem": problem,
      "prompt": [[f"How many? {EVIL}", 0]],
      "answer": f"7 {EVIL}",
      "text": [["<think>", 1], [f"It is {EVIL}", 0]],
      "length": 12,
      "finished": finished,
      "right": right,
      **changes,
  }


ROLLOUTS = [
    *(rollout(1, record, finished=False) for record in (3, 4)),
    *(rollout(2, record, finished=record == 6) for record in (5, 6)),
]
ANSWERS = [
    answer(0, 0, right=False, finished=False),
    answer(0, 5, right=False, finished=True),
    answer(2, 0, right=True, finished=True),
    answer(2, 5, right=True, finished=False),
    answer(2, 0, right=True, finished=True, model="teacher"),
    answer(2, 5, right=True, finished=True, model="teacher"),
    answer(2, 0, right=False, finished=True, mode="greedy"),
]


def write(
    lines: list[dict],
    workdir: pathlib.Path,
    rollouts=(),
    answers=(),
    best: str = "",
    **changes,
) -> str:
  """Writes a run's files and its report; returns the page.

  Args:
    lines: of `metrics.jsonl`.
    workdir: of the run.
    rollouts: lines of its samples.
    answers: lines of its samples.
    best: the set that chooses the checkpoint.
    **changes: of the settings.
  """
  config = toys.run_config("bundled:capable", "bundled:teacher")
  config = dataclasses.replace(
      config,
      student=config_lib.ModelSpec("me/<b>student</b>"),
      evaluation=dataclasses.replace(config.evaluation, every=10),
      checkpoint=config_lib.CheckpointSpec(best=best),
  )
  config = dataclasses.replace(config, **changes)
  (workdir / "samples").mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(config_lib.plain(config)))
  for name, values in (
      ("metrics", lines),
      ("samples/rollouts", rollouts),
      ("samples/answers", answers),
  ):
    (workdir / f"{name}.jsonl").write_text(
        "".join(json.dumps(value) + "\n" for value in values)
    )
  page.write(workdir)
  return (workdir / "report" / page.FILE).read_text("utf-8")
