"""Every method and schedule as a whole run, small; and what they cost."""

import ast
import dataclasses
import importlib
import itertools
import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import toys

from prefix_distill import config as config_lib
from prefix_distill.config import AgreementSpec
from prefix_distill.config import AuditedSpec
from prefix_distill.config import DriftSpec
from prefix_distill.config import ExactSpec
from prefix_distill.config import FixedSpec
from prefix_distill.config import LossSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import PlateauSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.config import RandomSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.data import records
from prefix_distill.experiments import reproduce
from prefix_distill.models import huggingface as hf
from prefix_distill.report import flops
from prefix_distill.train import loop
from prefix_distill.train import setup


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return toys.write_models(tmp_path_factory.mktemp("models"))


def run(models, workdir, **changes) -> list[dict]:
  """Runs to the end; returns the lines of the updates."""
  config = toys.run_config(*models, **changes)
  config = dataclasses.replace(
      config,
      evaluation=dataclasses.replace(config.evaluation, teacher=False),
      prefix=dataclasses.replace(config.prefix, buckets=(4, 16)),
  )
  loop.train(config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [x for x in map(json.loads, lines) if "prefix_len" in x]


@pytest.mark.parametrize(
    "prefix",
    [
        PrefixSpec("drift", drift=DriftSpec(2, 3, min_reliable_fraction=0.0)),
        PrefixSpec("audited", audited=AuditedSpec(2, audit_every=1)),
        PrefixSpec(
            "agreement",
            agreement=AgreementSpec(2, 1.0, warmup_updates=1, min_rollouts=8),
        ),
        # Nothing but their rules sets these apart; see test_prefix_schedule.
        pytest.param(
            PrefixSpec(
                "plateau", plateau=PlateauSpec(2, 3, patience_updates=2)
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PrefixSpec("random", random=RandomSpec(2)), marks=pytest.mark.slow
        ),
    ],
    ids=lambda p: p.schedule,
)
def test_a_schedule_runs_and_is_resumed_where_it_was(
    models, tmp_path, prefix, monkeypatch
):
  changes = {"prefix": prefix, "steps": 4}
  whole = run(models, tmp_path / "whole", **changes)
  caps = [x["prefix_len"] for x in whole]
  assert len(caps) == 4
  wanted = {"drift": [2, 5, 8, 11], "agreement": [16] * 4}
  if prefix.schedule in wanted:
    assert caps == wanted[prefix.schedule]
  if prefix.schedule == "audited":
    # One update, an audit, and again.
    assert (caps[0], caps[1], caps[3]) == (2, 16, 16)
    assert 2 <= caps[2] < 16
  if prefix.schedule == "agreement":
    # From the second update on, rollouts that agree are cut.
    assert whole[0]["trained_len"] == whole[0]["rollout_len"]
    assert whole[-1]["trained_len"] < whole[-1]["rollout_len"]

  # The same, stopped after two updates.
  update, done = loop.Run.update, []

  def stop_after_two(self, step):
    if len(done) == 2:
      raise KeyboardInterrupt
    done.append(step)
    return update(self, step)

  config = toys.run_config(*models, **changes)
  checkpoint = dataclasses.replace(config.checkpoint, every=1)
  changes["checkpoint"] = checkpoint
  monkeypatch.setattr(loop.Run, "update", stop_after_two)
  with pytest.raises(KeyboardInterrupt):
    run(models, tmp_path / "parts", **changes)
  monkeypatch.setattr(loop.Run, "update", update)
  again = run(models, tmp_path / "parts", **changes)
  for name in ("prefix_len", "kl", "flops", "tokens"):
    assert [x[name] for x in again] == [x[name] for x in whole]


def test_every_update_draws_rollouts_anew(models, tmp_path):
  # The student stays, and each update has the same prompts in some order, so
  # that nothing but the draws sets the updates apart.
  config = toys.run_config(
      *models, optimizer=OptimizerSpec(learning_rate=1e-30)
  )
  train = dataclasses.replace(config.data.train, size=config.data.batch_size)
  config = dataclasses.replace(
      config, data=dataclasses.replace(config.data, train=train)
  )
  one = loop.Run(setup.prepare(config, tmp_path), tmp_path)
  lines = [one.update(step) for step in range(3)]
  one.programs.close()
  one.checkpointer.close()
  assert [x["dropped"] for x in lines] == [0] * 3
  for name in ("kl", "entropy_student"):
    values = sorted(x[name] for x in lines)
    apart = [b - a for a, b in itertools.pairwise(values)]
    assert min(apart) > 1e-4 * values[0]


def test_a_run_whose_audit_finds_nothing_ends_early(models, tmp_path):
  prefix = PrefixSpec("audited", audited=AuditedSpec(2, min_nats=1e9))
  lines = run(models, tmp_path / "run", prefix=prefix, steps=5)
  # A prefix in which so little is left, and the audit.
  assert [x["prefix_len"] for x in lines] == [2, 16]
  assert (tmp_path / "run" / "export" / "config.json").is_file()
  metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert [json.loads(x)["step"] for x in metrics.splitlines()] == [0, 1, 2, 2]


def test_seqkd_asks_the_teacher_once_and_charges_it(
    models, tmp_path, monkeypatch
):
  # Random models do not stop, so one that is trained answers.
  models = [models[0], "bundled:teacher"]
  changes = {
      "method": "seqkd",
      "steps": 2,
      "rollout": RolloutSpec(1, 250),
  }
  lines = run(models, tmp_path / "run", **changes)
  table = pq.read_table(tmp_path / "run" / "answers.parquet").to_pylist()
  assert len(table) == 16
  assert all("boxed" in row["completion"] for row in table)
  assert len({row["question"] for row in table}) == 16
  assert len(lines) == 2
  assert "kl" not in lines[0]
  # Each update pays for the eight answers that it is the first to use.
  half = lines[0]["flops_decode"]
  assert lines[1]["flops_decode"] == pytest.approx(2 * half) and half > 0
  teacher = hf.read_config("bundled:teacher")
  lengths = np.array([[x["prompt_tokens"], x["tokens"]] for x in table])
  whole = flops.answers(teacher, *lengths.T)
  assert 2 * half == pytest.approx(whole.decode)
  assert lines[0]["flops_score"] == 0


def test_answers_that_do_not_end_are_an_error(models, tmp_path):
  with pytest.raises(records.DataError, match="rollout.max_len 4 tokens"):
    run(
        models,
        tmp_path / "run",
        method="seqkd",
        steps=1,
        rollout=RolloutSpec(1, 4),
        prefix=PrefixSpec("fixed", fixed=FixedSpec(4)),
    )


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_the_teachers_own_prefixes_are_off_policy(models, tmp_path, kind):
  lines = run(
      models,
      tmp_path / "run",
      rollout=RolloutSpec(2, 16, source="teacher"),
      loss=LossSpec(exact=ExactSpec(kind)),
  )
  assert [x["source"] for x in lines] == ["teacher"] * 3
  assert all(x["rollout_len"] <= 8 for x in lines)


def test_a_share_of_updates_is_off_policy(models, tmp_path):
  rollout = RolloutSpec(1, 16, source="data", source_share=0.5)
  config = toys.run_config(*models)
  train = dataclasses.replace(config.data.train, completion="completion")
  data = dataclasses.replace(config.data, train=train)
  # Stored answers must fit.
  rollout = dataclasses.replace(rollout, max_len=256)
  lines = run(
      models,
      tmp_path / "run",
      rollout=rollout,
      data=data,
      steps=8,
      prefix=PrefixSpec("fixed", fixed=FixedSpec(8)),
  )
  sources = [x["source"] for x in lines]
  assert set(sources) == {"student", "data"}
  decoded = [x["flops_decode"] for x in lines]
  for i in range(1, 8):
    # What is read from a file is not sampled.
    assert (decoded[i] == decoded[i - 1]) == (sources[i] == "data")


def _literal(text: str):
  try:
    return ast.literal_eval(text)
  except ValueError:
    return text


@pytest.mark.parametrize("task", reproduce.TASKS)
def test_every_cell_of_the_reproduction_is_a_valid_config(task, tmp_path):
  seen = []
  asked = reproduce.TASKS[task]
  sums = ("full", "linear", "fixed-8")
  for name in asked.cells or sums if asked.is_language else reproduce.CELLS:
    line = reproduce.command(
        reproduce.Experiment(task, name, 3),
        tmp_path,
        [],
        {"student": "mine", "half": "half", "teacher": "theirs"},
    )
    (flag,) = [x for x in line if x.startswith("--config=")]
    file, _, argument = flag.removeprefix("--config=").partition(":")
    module = importlib.import_module(f"configs.{pathlib.Path(file).stem}")
    settings = module.get_config(argument)
    given = []
    for flag in line:
      if flag.startswith("--config."):
        field, _, value = flag.removeprefix("--config.").partition("=")
        settings.update_from_flattened_dict({field: _literal(value)})
        given.append(field)
    # As the command line has it.
    config = config_lib.from_dict(
        config_lib.without_idle_groups(settings.to_dict(), given)
    )
    assert config.seed == 3
    seen.append(config)
  # No cell says the same as another.
  assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_the_time_left_counts_evaluations(models, tmp_path):
  """An evaluation is due after updates 2 and 4, and none of the teacher."""
  config = toys.run_config(*models, steps=4)
  evaluation = dataclasses.replace(config.evaluation, every=2, teacher=False)
  config = dataclasses.replace(config, evaluation=evaluation)
  run = loop.Run(setup.prepare(config, tmp_path), tmp_path)
  run.evaluate(0)
  run.update(0)
  left = [run.seconds_left(step) for step in range(1, 5)]
  update, evaluated = left[0] - left[1], left[3]
  assert update > 0 and evaluated > 0
  assert left[1] - left[2] == pytest.approx(update + evaluated)
  assert left[2] - left[3] == pytest.approx(update)
  run.programs.close()
  run.checkpointer.close()
