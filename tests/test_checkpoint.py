"""Checkpoints: what is restored is what was saved, or a sentence says not."""

import dataclasses
import json
import pathlib
import shutil

from damage import Damage
from damage import DAMAGES
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import CheckpointSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.report.flops import StepFlops
from prefix_distill.report.flops import Totals
from prefix_distill.train import checkpoint
from prefix_distill.train import step as step_lib
from prefix_distill.train.checkpoint import Checkpointer
from prefix_distill.train.checkpoint import CheckpointError
from prefix_distill.train.checkpoint import Restored
from prefix_distill.train.step import TrainState

# What this damages is not read.
_UNREAD = (
    "a bit of the arrays at 100%",
    "arrays without their last byte",
    "no mark of success",
    "no metadata",
)
MESH = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
TX = step_lib.optimizer(OptimizerSpec(1e-3), 8)


def _shapes() -> TrainState:
  model, _ = toys.model()
  shapes = jax.eval_shape(
      lambda params: step_lib.init_state(params, TX), model.abstract_params()
  )
  return sharding.with_shardings(shapes, MESH)


ABSTRACT = _shapes()


def _state(step: int) -> TrainState:
  """A state of random arrays, moments included."""
  rng = np.random.default_rng(step)

  def draw(x):
    values = rng.normal(size=x.shape).astype(x.dtype)
    return jax.device_put(values, x.sharding)

  state = jax.tree.map(draw, ABSTRACT)
  return dataclasses.replace(state, step=jnp.int32(step))


def _totals(step: int) -> Totals:
  schedule = {"cap": step, "past": [0.1, 1e-30]}
  return Totals(schedule, 0.1 * step, 7, 1e18, StepFlops(1.0, 2.0))


def _save(workdir: pathlib.Path, *steps: int, **spec) -> Checkpointer:
  saver = Checkpointer(workdir, CheckpointSpec(**spec))
  for step in steps:
    saver.save(_state(step), f'{{"grain": {step}}}', _totals(step))
  return saver


def _restore(workdir: pathlib.Path) -> Restored | None:
  return Checkpointer(workdir, CheckpointSpec()).restore(ABSTRACT)


def _assert_same(found: Restored, step: int) -> None:
  """Checks every bit."""
  assert (found.step, found.data) == (step, f'{{"grain": {step}}}')
  assert found.totals == _totals(step)
  wanted = jax.tree.leaves(_state(step))
  for ours, theirs in zip(jax.tree.leaves(found.state), wanted, strict=True):
    assert ours.dtype == theirs.dtype
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def _steps(workdir: pathlib.Path) -> list[int]:
  return sorted(checkpoint.listed(workdir))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("good")
  _save(workdir, 2, 4).close()
  return workdir


@pytest.fixture
def workdir(good, tmp_path):
  shutil.copytree(good, tmp_path / "run")
  return tmp_path / "run"


def test_what_is_saved_is_restored(workdir, capsys):
  _assert_same(_restore(workdir), 4)
  assert not capsys.readouterr().err
  assert _steps(workdir) == [2, 4]


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert _restore(tmp_path) is None
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_seen_and_the_one_before_restored(
    damage: Damage, workdir, capsys
):
  damage.do(workdir / "checkpoints" / "4")
  found = _restore(workdir)
  err = capsys.readouterr().err
  _assert_same(found, found.step)
  # Not only bits that nobody reads are flipped.
  assert found.step == (4 if damage.name in _UNREAD else 2)
  if found.step == 4 or damage.name == "no checkpoint":
    assert not err
    _save(workdir, 6).close()
    _assert_same(_restore(workdir), 6)
    return
  (sentence,) = err.strip().splitlines()
  assert sentence.startswith("warning: The checkpoint of step 4 is damaged: ")
  assert sentence.endswith("the run goes on from step 2.")
  assert _steps(workdir) == [2]
  assert [p.name for p in (workdir / "damaged").iterdir()] == ["4"]
  # And the step is saved again, and restored.
  _save(workdir, 4).close()
  _assert_same(_restore(workdir), 4)


@pytest.mark.parametrize(
    "damage", DAMAGES[::4], ids=lambda damage: damage.name
)
def test_damage_of_an_older_one_does_not_matter(damage, workdir, capsys):
  checkpoints = workdir / "checkpoints"
  shutil.copytree(checkpoints / "2", checkpoints / "1")
  damage.do(checkpoints / "2")
  _assert_same(_restore(workdir), 4)
  saver = Checkpointer(workdir, CheckpointSpec(every=1, keep=2))
  for step in (6, 8):
    saver.save(_state(step), f'{{"grain": {step}}}', _totals(step))
  saver.close()
  assert not capsys.readouterr().err
  _assert_same(_restore(workdir), 8)


@pytest.mark.parametrize(
    "damage",
    [x for x in DAMAGES if x.name.startswith(("half", "a file", "zeros"))],
    ids=lambda damage: damage.name,
)
def test_without_a_whole_checkpoint_a_sentence_says_so(damage, workdir):
  damage.do(workdir / "checkpoints" / "4")
  shutil.rmtree(workdir / "checkpoints" / "2" / "state")
  for _ in range(2):  # Nothing is moved, so the next start says it too.
    with pytest.raises(CheckpointError) as caught:
      _restore(workdir)
    sentence = str(caught.value)
    assert "step 2: its arrays cannot be read" in sentence
    assert "step 4: " in sentence and "\n" not in sentence
  assert _steps(workdir) == [2, 4]


def test_checkpoints_that_are_a_file(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(CheckpointError, match="cannot be read"):
    _restore(tmp_path)


def test_damage_of_the_same_step_again_keeps_both(workdir):
  for _ in range(2):
    (workdir / "checkpoints" / "4" / "host" / "metadata").write_text("{")
    assert _restore(workdir).step == 2
    _save(workdir, 4).close()
  names = sorted(p.name for p in (workdir / "damaged").iterdir())
  assert names == ["4", "4-2"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_saved(value, workdir):
  state = _state(6)
  scale = state.params["final_norm"]["scale"]
  state.params["final_norm"]["scale"] = scale.at[3].set(value)
  saver = Checkpointer(workdir, CheckpointSpec())
  with pytest.raises(CheckpointError) as caught:
    saver.save(state, "", _totals(6))
  sentence = str(caught.value)
  assert "After update 6 the array params/final_norm/scale" in sentence
  assert "the last checkpoint is that of step 4" in sentence
  saver.close()
  assert _steps(workdir) == [2, 4]


def test_a_leftover_of_a_killed_save_is_removed(workdir):
  left = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
  shutil.copytree(workdir / "checkpoints" / "4", left)
  (left / "commit_success.txt").unlink(missing_ok=True)
  _assert_same(_restore(workdir), 4)
  _save(workdir, 6).close()
  assert not left.exists()
  _assert_same(_restore(workdir), 6)


def _damage_a_moment(workdir: pathlib.Path, capsys) -> None:
  """Flips a bit of a moment; arrays lie in the file in any order."""
  checkpoints = workdir / "checkpoints"
  shutil.copytree(checkpoints / "4", workdir / "whole")
  for damage in DAMAGES:
    if damage.name.startswith("a bit of the arrays"):
      damage.do(checkpoints / "4")
      _restore(workdir)
      if "the array opt_state/" in capsys.readouterr().err:
        damage.do(workdir / "whole")
        shutil.rmtree(checkpoints / "4", ignore_errors=True)
        (workdir / "whole").rename(checkpoints / "4")
        return
      shutil.rmtree(checkpoints / "4", ignore_errors=True)
      shutil.copytree(workdir / "whole", checkpoints / "4")
  raise AssertionError("no bit of a moment was flipped")


def test_weights_are_read_alone(workdir, capsys):
  _damage_a_moment(workdir, capsys)  # And nobody asks for it.
  found = checkpoint.read_params(workdir, 4, ABSTRACT.params)
  wanted = _state(4).params
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  (workdir / "checkpoints" / "4" / "host" / "metadata").write_text("{}")
  with pytest.raises(CheckpointError, match="step 4 in .* is damaged"):
    checkpoint.read_params(workdir, 4, ABSTRACT.params)


# Retention.


def _evaluate(workdir: pathlib.Path, step: int, accuracy: float | None):
  lines = [
      {"step": step, "model": model, "set": name, "mode": mode, "accuracy": a}
      for model, name, mode, a in (
          ("student", "aime24", "greedy", 1 - (accuracy or 0)),
          ("teacher", "aime24", "sampled", 1.0),
          ("student", "other", "sampled", step / 100),
          ("student", "aime24", "sampled", accuracy),
      )
  ]
  with (workdir / "metrics.jsonl").open("a") as file:
    file.writelines(json.dumps(line) + "\n" for line in lines)


def test_the_last_ones_are_kept(tmp_path):
  _save(tmp_path, 0, 1, 2, 3, 4, keep=3).close()
  assert _steps(tmp_path) == [2, 3, 4]


def test_every_so_many_are_kept(tmp_path):
  spec = {"every": 2, "keep": 1, "keep_every": 4}
  _save(tmp_path, 0, 2, 4, 6, 8, 10, **spec).close()
  assert _steps(tmp_path) == [4, 8, 10]


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ((0.1, 0.5, 0.2, 0.3), [1, 3]),
        ((0.1, 0.5, 0.5, 0.3), [1, 3]),  # Of equals the first.
        ((0.1, 0.2, 0.3, 0.9), [2, 3]),  # The last one has no successor yet.
        ((0.6, None, 0.5, 0.3), [0, 3]),
        ((None, None, None, None), [3]),
    ],
)
def test_the_best_is_kept_and_none_goes_before_its_verdict(
    accuracies, kept, tmp_path
):
  saver = Checkpointer(
      tmp_path, CheckpointSpec(every=1, keep=1, best="aime24")
  )
  for step, accuracy in enumerate(accuracies):
    saver.save(_state(step), "", _totals(step))
    assert step in _steps(tmp_path)
    _evaluate(tmp_path, step, accuracy)  # After the checkpoint.
  saver.close()
  assert _steps(tmp_path) == kept


def test_the_best_is_chosen_among_those_that_are_there(tmp_path):
  for step, accuracy in enumerate([0.9, 0.2, 0.4]):
    _evaluate(tmp_path, step, accuracy)
  assert checkpoint.best(tmp_path, "aime24", [1, 2]) == 2
  assert checkpoint.best(tmp_path, "none", [1, 2]) is None


# Checksums.


def _sums(x: np.ndarray) -> list[int]:
  found, _ = checkpoint.checksums_of({"x": jnp.asarray(x)})
  return found["x"]


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]
)
def test_every_flipped_bit_changes_a_checksum(dtype):
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(3, 4)) * 3).astype(jnp.dtype(dtype))
  seen = {tuple(_sums(x))}
  bits = 1 if dtype == "bool" else 8 * x.dtype.itemsize
  for place in range(x.size):
    for bit in range(bits):
      raw = x.copy()
      words = raw.reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
      words[place] ^= words.dtype.type(1 << bit)
      seen.add(tuple(_sums(raw)))
  assert len(seen) == 1 + x.size * bits


def test_a_checksum_sees_flipped_signs_and_swaps():
  x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
  changed = [-x, x.T, x[::-1], x[:, ::-1], np.roll(x, 1), np.roll(x, 8)]
  two = x.copy()
  two[0, :2] *= -1
  sums = [tuple(_sums(y)) for y in (x, two, *changed)]
  assert len(set(sums)) == len(sums)


def test_a_checksum_by_hand():
  a, b, mix, wrap = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 2**32
  x = np.array([[1.5, -2.0], [0.0, 3e-5]], np.float32)
  first = second = 0
  for i, word in enumerate(x.reshape(-1).view(np.uint32).tolist()):
    factor = (2 * a * i + 1) % wrap
    mixed = (word + b * i) * factor % wrap
    mixed ^= mixed >> 16
    mixed = mixed * mix % wrap
    mixed ^= mixed >> 13
    first, second = (first + mixed) % wrap, (second + factor * mixed) % wrap
  assert _sums(x) == [first, second]


def test_moments_in_the_hosts_memory_are_measured_and_restored(tmp_path):
  state = _state(3)
  places = jax.tree.map(lambda x: x.sharding, ABSTRACT.opt_state)
  moved = sharding.put(state.opt_state, sharding.on_host(places))
  offloaded = dataclasses.replace(state, opt_state=moved)
  assert checkpoint.checksums_of(offloaded) == checkpoint.checksums_of(state)
  saver = Checkpointer(tmp_path, CheckpointSpec())
  saver.save(offloaded, '{"grain": 3}', _totals(3))
  saver.close()
  abstract = dataclasses.replace(
      ABSTRACT, opt_state=sharding.moved(sharding.on_host, ABSTRACT.opt_state)
  )
  found = Checkpointer(tmp_path, CheckpointSpec()).restore(abstract)
  _assert_same(found, 3)
  for x in jax.tree.leaves(found.state.opt_state):
    assert x.sharding.memory_kind == "pinned_host"


def test_what_is_not_finite_is_named():
  tree = {
      "good": jnp.arange(3.0),
      "whole": jnp.arange(3),
      "bad": [jnp.ones(2), jnp.array([0.0, jnp.nan], jnp.bfloat16)],
  }
  assert checkpoint.checksums_of(tree)[1] == ["bad/1"]


def test_few_programs_serve_a_state():
  with toys.compilations() as names:
    checkpoint.checksums_of(_state(0))
  assert len(names) <= 3, names
