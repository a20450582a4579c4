"""The compiled phases of a run: how many there are, and when they compile."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import AgreementSpec
from prefix_distill.config import DatasetSpec
from prefix_distill.config import DataSpec
from prefix_distill.config import LinearSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.distill import prefix_schedule
from prefix_distill.models.transformer import Model
from prefix_distill.train import update
from prefix_distill.train.update import Programs

_ROWS, _PROMPT = 4, 5


def _make(stop_ids=(), own=0, **changes):
  """Programs of toy models, with a student's state and a batch.

  With `own` the teacher's prompts are others, of up to so many tokens.
  """
  mesh = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
  task = DatasetSpec("math_task", answer="answer", size=1)
  config = toys.run_config(
      "student", "teacher", data=DataSpec(task, _ROWS, _PROMPT), **changes
  )
  if own:
    data = dataclasses.replace(
        config.data, teacher_prompt="{question}", max_teacher_prompt_len=own
    )
    config = dataclasses.replace(config, data=data)
  models = toys.models(config, mesh, stop_ids=stop_ids)
  student, programs = models.student, Programs(models)
  shardings = sharding.param_shardings(student.abstract_params(), mesh)
  params, teacher_params = (
      jax.device_put(student.init(jax.random.key(seed)), shardings)
      for seed in (0, 1)
  )
  batch = toys.prompts(_ROWS, _PROMPT)
  if own:
    theirs = toys.prompts(_ROWS, own, seed=1)
    batch = dataclasses.replace(
        batch, teacher_tokens=theirs.tokens, teacher_mask=theirs.mask
    )
  batch = jax.tree.map(np.asarray, batch)
  batch = sharding.global_batch(batch, mesh)
  return config, programs, programs.init(params), teacher_params, batch


def _update(made, cap, *, threshold=None, source="student"):
  _, programs, state, teacher_params, prompts = made
  request = update.Request(cap, jax.random.key(cap), source, threshold)
  state, shown = programs.update(
      state, teacher_params, prompts, None, request, update.Clock()
  )
  return (*made[:2], state, teacher_params, prompts), shown


def _ahead(made):
  """Returns the names of the programs that are compiled ahead."""
  _, programs, *_ = made
  with toys.compilations() as names:
    programs.compile_ahead()
    programs.wait()
  return collections.Counter(names)


# The programs of an update, and not what it does to a few numbers on the side.
_PHASES = (
    "move",
    "deal",
    "prefill",
    "layout",
    "start",
    "decode",
    "append",
    "resize",
    "look",
    "cut",
    "repeat",
    "take",
    "score",
    "zeros",
    "gradient",
    "apply",
)


@pytest.fixture(scope="module")
def schedule():
  """Sixty updates of the paper's schedule, at a sixty-fourth of its length."""
  made = _make(
      steps=60,
      prefix=PrefixSpec(
          buckets=(4, 8, 16, 32, 64, 128, 256), linear=LinearSpec(increment=4)
      ),
      rollout=RolloutSpec(per_prompt=1, max_len=256),
  )
  ahead, caps, config = _ahead(made), [], made[0]
  with toys.compilations() as late:
    for step in range(config.steps):
      cap = prefix_schedule.cap(config, step)
      made, shown = _update(made, cap)
      assert shown.mask.sum(axis=1).max() == cap
      assert np.isfinite(shown.metrics["kl"])
      caps.append(cap)
  assert caps[-1] == 237
  return made[1], ahead, late


def test_the_papers_schedule_compiles_at_most_eight_programs_a_phase(schedule):
  programs, _, _ = schedule
  assert programs.compilations() == {
      "compilations_sample": 7,
      "compilations_score": 7,
      "compilations_update": 7,
  }


def test_what_was_compiled_ahead_is_what_runs(schedule):
  _, ahead, late = schedule
  wanted = {"prefill": 1, "layout": 1, "decode": 7}
  wanted |= {"cut": 7, "score": 7, "gradient": 7}
  assert {name: ahead[name] for name in wanted} == wanted
  assert not set(late) & set(_PHASES)


def test_what_was_compiled_ahead_runs_with_prompts_of_the_teachers_own():
  made = _make(
      own=9,
      steps=3,
      prefix=PrefixSpec(buckets=(4, 16), linear=LinearSpec(increment=4)),
      rollout=RolloutSpec(per_prompt=2, max_len=16),
  )
  assert _ahead(made)["score"] == 2
  with toys.compilations() as late:
    for step in range(3):
      made, _ = _update(made, prefix_schedule.cap(made[0], step))
  assert not set(late) & set(_PHASES)


def test_a_cap_above_the_runs_longest_prefix_is_refused(schedule):
  programs, _, _ = schedule
  with pytest.raises(ValueError, match="cap is 257, .* longest prefix is 256"):
    programs.sample(None, None, None, 257)


def test_rollouts_that_end_early_are_cut_to_a_shorter_bucket():
  # No token ends an answer, or every one does.
  every = tuple(range(toys.NUM_TOKENS))
  for stop_ids, columns, length in (((), 16, 16), (every, 4, 1)):
    _, programs, state, _, batch = _make(
        stop_ids,
        method="full",
        prefix=PrefixSpec(buckets=(4, 16)),
        rollout=RolloutSpec(per_prompt=2, max_len=16),
    )
    rollout = programs.sample(state.params, batch, jax.random.key(0), 16)
    assert rollout.tokens.shape == (2 * _ROWS, columns)
    assert (rollout.mask.sum(axis=1) == length).all()


def _kinds(tree) -> set[str]:
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_what_is_offloaded_rests_on_the_host_and_changes_nothing():
  caps, found = (3, 8), []
  for offload in (False, True):
    _, programs, state, teacher_params, batch = _make(
        optimizer=OptimizerSpec(learning_rate=1e-2, offload=offload)
    )
    resting = {"pinned_host"} if offload else {"device"}
    if offload:
      places = jax.tree.map(lambda x: x.sharding, teacher_params)
      teacher_params = jax.device_put(
          teacher_params, sharding.on_host(places)
      )
    made = (None, programs, state, teacher_params, batch)
    for cap in caps:
      assert _kinds(made[2].opt_state) == resting
      assert _kinds(made[2].params) == {"device"}
      assert _kinds(programs.on_device(teacher_params)) == {"device"}
      made, _ = _update(made, cap)
    assert _kinds(made[2].opt_state) == resting
    assert programs.compilations()["compilations_update"] == 1
    found.append(jax.tree.map(np.asarray, made[2].params))
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_batches_that_go_through_in_parts_are_compiled_ahead_too():
  # At a cap of 8 a row has 13 tokens: two microbatches of two prompts are
  # sampled, and each is scored in two. At 4 there are 9, and one is sampled.
  made = _make(
      prefix=PrefixSpec(buckets=(4, 8), linear=LinearSpec(4, 4)),
      steps=2,
      rollout=RolloutSpec(per_prompt=1, max_len=8, batch_tokens=36),
      optimizer=OptimizerSpec(learning_rate=1e-2, batch_tokens=13),
  )
  _ahead(made)
  with toys.compilations() as late:
    for cap, sampled in ((4, 1), (8, 2)):
      made, shown = _update(made, cap)
      _, programs, _, _, batch = made
      assert len(programs.microbatches.for_sampling(batch, cap)) == sampled
      assert shown.mask.shape[0] == _ROWS
      assert np.isfinite(shown.metrics["kl"])
  assert not set(late) & set(_PHASES)


def test_a_run_samples_and_compares_as_its_settings_say():
  spec = RolloutSpec(per_prompt=2, max_len=8, temperature=0.5, top_p=0.6)
  made = _make(rollout=spec)
  _, programs, state, teacher_params, prompts = made
  rollout = programs.sample(state.params, prompts, jax.random.key(8), 8)
  batch = programs.microbatches.repeat(prompts)
  model = Model(toys.model_config(num_layers=1))
  logits = [
      model.logits(params, model.prefix_hidden(params, batch, rollout))
      for params in (state.params, teacher_params)
  ]
  mask = np.asarray(rollout.mask)
  real = np.asarray(logits[0])[..., : toys.NUM_TOKENS]
  whole = np.asarray(jax.nn.log_softmax(real / spec.temperature))
  tokens = np.asarray(rollout.tokens)[..., None]
  own = np.take_along_axis(whole, tokens, -1)
  np.testing.assert_allclose(
      np.asarray(rollout.log_probs)[mask], own[mask][:, 0], atol=1e-5
  )
  above = np.where(whole > own, np.exp(whole), 0).sum(-1)[mask]
  assert 0.3 < above.max() < spec.top_p
  dist = toys.distribution(temperature=spec.temperature)
  kl = np.asarray(toys.reverse_kl(*logits, dist))[mask].mean()
  _, shown = _update(made, 8)
  np.testing.assert_array_equal(shown.tokens, np.asarray(rollout.tokens))
  assert float(shown.metrics["loss"]) == pytest.approx(kl, rel=1e-4)
  assert float(shown.metrics["kl"]) != pytest.approx(kl, rel=0.1)


def test_what_was_cut_off_is_not_trained_on():
  made = _make(
      prefix=PrefixSpec("agreement", agreement=AgreementSpec(window_tokens=1)),
      rollout=RolloutSpec(per_prompt=2, max_len=8),
  )
  _, shown = _update(made, 8, threshold=np.inf)
  assert shown.mask.all()
  # All agree. The first window does not count, so the first low one starts at
  # the second token.
  assert shown.trained.any(axis=0).tolist() == [True] + [False] * 7
  np.testing.assert_array_equal(
      np.isfinite(shown.metrics["kl_position"]), shown.trained.any(axis=0)
  )


def test_answers_of_the_teacher_are_the_teachers():
  made = _make(rollout=RolloutSpec(per_prompt=2, max_len=8, source="teacher"))
  _, programs, state, teacher_params, prompts = made
  key = jax.random.key(8)
  wanted, other = (
      np.asarray(programs.sample(params, prompts, key, 8, "teacher").tokens)
      for params in (teacher_params, state.params)
  )
  assert (wanted != other).any()
  _, shown = _update(made, 8, source="teacher")
  np.testing.assert_array_equal(shown.tokens, wanted)
