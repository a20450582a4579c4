"""A teacher that becomes the student now and then: exact, not compiled anew."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import CheckpointSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.errors import ConfigError
from prefix_distill.plan import programs as plan_lib
from prefix_distill.train import checkpoint
from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib

_STEPS, _EVERY = 7, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return toys.write_models(tmp_path_factory.mktemp("models"))


def _config(models, offload=False, dtype="float32", **changes):
  student, teacher = models
  spec = ModelSpec(teacher, param_dtype=dtype, offload=offload, refresh=_EVERY)
  values = {"steps": _STEPS, "checkpoint": CheckpointSpec(1, keep=10)}
  config = toys.run_config(student, teacher, **values | changes)
  return dataclasses.replace(config, teacher=spec)


def _start(config, workdir) -> loop.Run:
  return loop.Run(setup_lib.prepare(config, workdir), workdir)


def _close(run: loop.Run) -> None:
  run.programs.close()
  run.checkpointer.close()


def _bits(tree) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _same(line: dict) -> dict:
  """Returns a metrics line without what depends on the clock."""
  timed = ("seconds", "tokens_per_second", "compilations")
  return {k: v for k, v in line.items() if not k.startswith(timed)}


@pytest.mark.parametrize(
    "offload, dtype", [(False, "float32"), (True, "bfloat16")]
)
def test_a_refresh_is_a_copy_and_compiles_nothing(
    models, tmp_path, offload, dtype
):
  run = _start(_config(models, offload, dtype), tmp_path)
  run.programs.wait()  # All is compiled ahead.
  loaded = _bits(run.teacher_params)
  students, counts, taken = [jax.device_get(run.state.params)], [], []
  for step in range(_EVERY + 2):
    old = jax.tree.leaves(run.teacher_params)
    with toys.compilations() as names:
      line = run.update(step)
    taken += names
    students.append(jax.device_get(run.state.params))
    counts.append(run.programs.compilations())
    of = step // _EVERY * _EVERY
    wanted = [jnp.asarray(x, dtype) for x in jax.tree.leaves(students[of])]
    assert _bits(run.teacher_params) == (_bits(wanted) if of else loaded)
    assert line["teacher_update"] == of
    # The old weights are gone, and the new ones lie where those lay.
    assert {x.is_deleted() for x in old} == {step == _EVERY}
    new = jax.tree.leaves(run.teacher_params)
    assert [x.sharding for x in new] == [x.sharding for x in old]
    assert [x.dtype for x in new] == [x.dtype for x in old]
  # The student has gone on meanwhile, and took nothing of the copy with it.
  assert _bits(students[_EVERY]) != _bits(students[_EVERY + 1])
  assert counts == [counts[0]] * len(counts)
  phases = {"refresh", "score", "gradient", "apply", "decode", "prefill"}
  assert not phases & set(taken)
  _close(run)


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
  """A run that was never stopped: its directory, lines and last weights."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  loop.train(_config(models), workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return workdir, [_same(x) for x in map(json.loads, lines)]


def _stopped(whole: pathlib.Path, target: pathlib.Path, step: int) -> None:
  """Copies what a run that is killed behind a checkpoint leaves."""
  for name in ("config.json", "contents.json", "metrics.jsonl"):
    target.mkdir(exist_ok=True)
    shutil.copy(whole / name, target / name)
  for number in range(step + 1):
    name = f"checkpoints/{number}"
    shutil.copytree(whole / name, target / name)


def _goes_on(run: loop.Run, whole, step: int) -> None:
  """Checks that a run makes the updates of the whole one, and closes it."""
  workdir, lines = whole
  updates = [x for x in lines if "kl" in x]
  assert int(run.state.step) == step
  for number in range(step, _STEPS):
    assert _same(run.update(number)) == updates[number]
  last = checkpoint.read_params(
      workdir, _STEPS, run.programs.abstract_state().params
  )
  assert _bits(run.state.params) == _bits(last)
  _close(run)


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_killed_between_refreshes_ends_as_one_that_was_not(
    models, whole, tmp_path, step
):
  _stopped(whole[0], tmp_path, step)
  config = _config(models)
  run = _start(config, tmp_path)
  loaded = setup_lib.load_model(
      config.teacher, run.models.teacher, run.models.mesh, config.seed
  )
  teacher = _bits(run.teacher_params)
  # What update 4 is to copy is not copied before.
  assert (teacher == _bits(loaded)) is (step <= _EVERY)
  assert teacher != _bits(run.state.params)
  _goes_on(run, whole, step)


def test_an_offloaded_teacher_is_saved_and_restored_where_it_was(
    models, whole, tmp_path
):
  _stopped(whole[0], tmp_path, 4)
  run = _start(_config(models, offload=True), tmp_path)
  line = _same(run.update(4))
  assert line == [x for x in whole[1] if "kl" in x][4]
  run.save()
  found = run.checkpointer.restore(
      run.programs.abstract_state(), run.programs.abstract_teacher()
  )
  assert found.step == 5
  assert _bits(found.teacher) == _bits(run.teacher_params)
  for x in jax.tree.leaves([found.teacher, run.teacher_params]):
    assert x.sharding.memory_kind == "pinned_host"
  _close(run)


def test_a_refresh_is_not_charged(models, whole, tmp_path):
  config = _config(models)
  teacher = dataclasses.replace(config.teacher, refresh=0)
  config = dataclasses.replace(config, teacher=teacher)
  run = _start(config, tmp_path)
  refreshed = [x for x in whole[1] if "kl" in x]
  frozen = [_same(run.update(step)) for step in range(_EVERY + 1)]
  _close(run)
  for ours, theirs in zip(frozen, refreshed, strict=False):
    assert ours["flops"] == theirs["flops"]
    assert "teacher_update" in theirs and "teacher_update" not in ours
  # The same answers, scored by another teacher.
  kls = [(x["kl"], y["kl"]) for x, y in zip(frozen, refreshed, strict=False)]
  assert [x == y for x, y in kls] == [True, True, True, False]


def test_a_damaged_teacher_is_seen(models, whole, tmp_path, capsys):
  _stopped(whole[0], tmp_path, 5)
  host = tmp_path / "checkpoints" / "5" / "host" / "metadata"
  host.write_text(host.read_text().replace('"teacher/', '"treacher/', 1))
  run = _start(_config(models), tmp_path)
  assert int(run.state.step) == 4
  assert "is damaged" in capsys.readouterr().err
  _close(run)


def test_the_last_evaluation_says_which_teacher_it_is_of(whole):
  workdir, lines = whole
  found = [x for x in lines if x.get("model") == "teacher"]
  assert [x["step"] for x in found] == [_STEPS]
  # The last update that had a new teacher, and not the last update.
  assert [x["teacher_update"] for x in found] == [6]
  report = (workdir / "report" / "report.html").read_text()
  assert "update 6" in report


def test_a_teacher_of_another_architecture_cannot_be_refreshed(
    models, tmp_path
):
  student, _ = models
  other = _config((student, "bundled:teacher"))
  with pytest.raises(ConfigError) as caught:
    setup_lib.prepare(other, tmp_path / "run")
  sentence = str(caught.value)
  assert sentence.startswith("teacher.refresh is 3, but ")
  assert student in sentence and "bundled:teacher" in sentence
  assert "\n" not in sentence and not (tmp_path / "run").exists()
  with pytest.raises(ConfigError, match="teacher.refresh is 3, but "):
    plan_lib.build(other, jax.devices()[:1])


def test_a_plan_has_the_refresh_once_and_no_more_memory(models):
  held = []
  for offload in (False, True):
    config = _config(models, offload, "bfloat16")
    plan = plan_lib.build(config, jax.devices()[:1])
    found = plan_lib.jobs(plan, (8,))
    (job,) = [x for x in found if x.stage.name == "refresh"]
    assert plan_lib.reckon(job.stage, 8).flops == 0
    # Both models and the moments, and no third model.
    arguments = job.stage.variant.args[job.stage.variant.program.static :]
    lying = [arguments, plan.beside(job.stage)]
    if offload:
      lying.append(job.stage.variant.results)
    held.append(sharding.bytes_per_device(lying))
    state = plan.programs.abstract_state()
    both = (state.params, state.opt_state, plan.teacher_params)
    assert held[-1] == sharding.bytes_per_device(both)
  plain = dataclasses.replace(
      config, teacher=dataclasses.replace(config.teacher, refresh=0)
  )
  plan = plan_lib.build(plain, jax.devices()[:1])
  names = {x.stage.name for x in plan_lib.jobs(plan, (8,))}
  assert "refresh" not in names and "score" in names


def test_eight_devices_refresh_as_one():
  process = toys.start("refreshed.py", devices=8)
  (out,) = toys.finish([process], 240)
  one, eight = map(json.loads, out.strip().splitlines())
  assert one["same"] == eight["same"] == [False, False, True, False, True]
  np.testing.assert_allclose(one["losses"], eight["losses"], rtol=1e-4)
  np.testing.assert_allclose(one["norms"], eight["norms"], rtol=1e-3)
  assert min(one["norms"]) > 1e-2
  assert one["tokens"] == eight["tokens"]
  # A device holds its part of the copy alone.
  assert one["share"] == 1 and eight["share"] < 0.3
  assert eight["compiled"] == 0


def test_a_random_teacher_has_the_dtype_that_was_asked_for(models):
  mesh = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
  student, _ = models
  spec = ModelSpec(student, param_dtype="bfloat16", random_init=True)
  config = _config(models)
  made = toys.models(config, mesh)
  params = setup_lib.load_model(spec, made.teacher, mesh, 0)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
