import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from prefix_distill import sharding
from prefix_distill.config import LinearSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import PrefixSpec
from prefix_distill.distill import prefix_schedule
from prefix_distill.models import attention
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.rollout.generate import Draw
from prefix_distill.rollout.generate import SamplerConfig
from prefix_distill.rollout.generate import Truncation
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

ROWS = 32
LENGTH = 10
KEY = jax.random.key(3)
CONFIG = SamplerConfig(toys.STOPS, toys.PAD, toys.NUM_TOKENS)
MODEL, PARAMS = toys.model()
PROMPTS = toys.prompts(ROWS)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _sample(config, length, batch, key, draw, parts):
  """A prefill, and a decode in parts of so many tokens."""
  columns = batch.tokens.shape[1] + length
  state, first = generate.prefill(
      MODEL, config, columns, PARAMS, batch, key, draw
  )
  layout = MODEL.decode_layout(PARAMS)
  whole = 1 + sum(parts)
  rollout = generate.start(whole, config.pad_id, first)
  at = 1
  for steps in parts:
    state, drawn = generate.decode(MODEL, config, steps, layout, state, draw)
    rollout = generate.append(rollout, drawn, at)
    at += steps
  return jax.tree.map(lambda x: x[:, :length], rollout)


def sample(
    config: SamplerConfig = CONFIG,
    batch: PromptBatch = PROMPTS,
    key: jax.Array = KEY,
    cap: int = LENGTH,
    length: int = LENGTH,
    temperature: float = 1.0,
    greedy: bool = False,
    parts: tuple[int, ...] = (),
) -> Rollout:
  draw = Draw.of(cap, temperature, greedy)
  out = _sample(config, length, batch, key, draw, parts or (length - 1,))
  return jax.tree.map(np.asarray, out)


def rows(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


def assert_same(ours: Rollout, theirs: Rollout) -> None:
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)
  np.testing.assert_array_equal(ours.mask, theirs.mask)
  np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


def forced_log_probs(
    batch: PromptBatch, rollout: Rollout, temperature: float
) -> np.ndarray:
  """Every real token's log-probability [B, P, V], from one forward pass."""
  hidden = MODEL.prefix_hidden(PARAMS, batch, rollout)
  logits = np.asarray(MODEL.logits(PARAMS, hidden), np.float64)
  scaled = logits[..., : toys.NUM_TOKENS] / temperature
  return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature, per_prompt", [(1.0, 1), (0.7, 3)])
def test_log_probs_are_the_teacher_forced_ones(temperature, per_prompt):
  config = dataclasses.replace(CONFIG, per_prompt=per_prompt)
  rollout = sample(config, temperature=temperature)
  batch = generate.repeat_prompts(per_prompt, PROMPTS)
  whole = forced_log_probs(batch, rollout, temperature)
  wanted = np.take_along_axis(whole, rollout.tokens[..., None], -1)[..., 0]
  assert rollout.mask.sum() > ROWS * per_prompt
  np.testing.assert_allclose(
      rollout.log_probs, np.where(rollout.mask, wanted, 0), atol=1e-5
  )


def test_a_key_gives_one_rollout_and_another_key_another():
  assert_same(sample(), sample())
  assert (sample().tokens != sample(key=jax.random.key(4)).tokens).any()


def test_a_row_does_not_depend_on_its_place_in_the_batch():
  order = np.random.default_rng(1).permutation(ROWS)
  assert_same(sample(batch=rows(PROMPTS, order)), rows(sample(), order))


def test_a_row_does_not_depend_on_the_rest_of_its_batch():
  some = np.array([20, 3, 7])
  assert_same(sample(batch=rows(PROMPTS, some)), rows(sample(), some))


def test_rows_with_one_prompt_differ_by_their_index():
  batch = dataclasses.replace(
      rows(PROMPTS, np.zeros(ROWS, int)), index=PROMPTS.index
  )
  assert len({tuple(row) for row in sample(batch=batch).tokens}) > ROWS // 2


def test_a_longer_bucket_with_the_same_cap_adds_only_padding():
  longer = sample(length=LENGTH + 6)
  head = jax.tree.map(lambda x: x[:, :LENGTH], longer)
  assert_same(head, sample())
  assert (longer.tokens[:, LENGTH:] == toys.PAD).all()
  assert not longer.mask[:, LENGTH:].any()
  assert not longer.log_probs[:, LENGTH:].any()


def test_the_mask_covers_up_to_and_with_the_stop_token_or_the_cap():
  cap = LENGTH - 2
  rollout = sample(cap=cap)
  lengths = []
  for tokens, mask, log_probs in zip(
      rollout.tokens, rollout.mask, rollout.log_probs, strict=True
  ):
    stops = [i for i, t in enumerate(tokens) if t in toys.STOPS]
    length = stops[0] + 1 if stops else cap
    assert mask.tolist() == [True] * length + [False] * (LENGTH - length)
    assert (tokens[length:] == toys.PAD).all()
    assert (log_probs[:length] < 0).all()
    assert (log_probs[length:] == 0).all()
    lengths.append(length)
  # Rows that stop at once, midway and not at all are all among them.
  assert {1, cap} < set(lengths)


def test_a_schedule_of_caps_compiles_once_for_each_bucket():
  prefix = PrefixSpec(
      buckets=(LENGTH, LENGTH + 6), linear=LinearSpec(increment=3)
  )
  run = toys.run_config("student", "teacher", steps=6, prefix=prefix)
  buckets = prefix_schedule.buckets(run)
  for bucket in buckets:
    sample(length=bucket, cap=1)
  before, used = _sample._cache_size(), set()
  for step in range(run.steps):
    cap = prefix_schedule.cap(run, step)
    bucket = min(b for b in buckets if b >= cap)
    rollout = sample(length=bucket, cap=cap)
    assert rollout.tokens.shape == (ROWS, bucket)
    assert rollout.mask.sum(1).max() == cap
    used.add(bucket)
  assert used == {LENGTH, LENGTH + 6}
  assert _sample._cache_size() == before


def test_a_short_cap_gives_the_first_tokens_of_a_long_one():
  short, whole = sample(cap=4), sample()
  head = jax.tree.map(lambda x: x[:, :4], whole)
  assert_same(jax.tree.map(lambda x: x[:, :4], short), head)


def test_rollouts_of_a_prompt_are_neighbours_that_differ():
  three = sample(
      dataclasses.replace(CONFIG, per_prompt=3), temperature=0.7
  )
  groups = three.tokens.reshape(ROWS, 3, LENGTH)
  one = sample(temperature=0.7)
  np.testing.assert_array_equal(groups[:, 0], one.tokens)
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert (groups[:, i] != groups[:, j]).any(axis=1).mean() > 0.8


def test_every_token_of_a_row_is_drawn_anew():
  """No single random number would give all tokens of a row."""
  rollout = sample()
  probs = np.exp(forced_log_probs(PROMPTS, rollout, 1.0))
  after, own = (
      np.take_along_axis(x, rollout.tokens[..., None], -1)[..., 0]
      for x in (np.cumsum(probs, axis=-1), probs)
  )
  most = np.where(rollout.mask, after, 1).min(axis=1)
  least = np.where(rollout.mask, after - own, 0).max(axis=1)
  long = rollout.mask.sum(axis=1) > 3
  assert long.sum() > ROWS // 4
  assert (least > most)[long].mean() > 0.8


def test_greedy_takes_the_argmax_of_a_full_forward_step_by_step():
  rollout = sample(greedy=True)
  columns = PROMPTS.tokens.shape[1]
  forward = jax.jit(MODEL.apply)
  tokens = np.full((ROWS, columns + LENGTH), toys.PAD, np.int32)
  mask = np.zeros(tokens.shape, bool)
  tokens[:, :columns], mask[:, :columns] = PROMPTS.tokens, PROMPTS.mask
  live = np.ones(ROWS, bool)
  for step in range(LENGTH):
    np.testing.assert_array_equal(rollout.mask[:, step], live)
    hidden = forward(PARAMS, tokens, mask)
    logits = MODEL.logits(PARAMS, hidden[:, columns + step - 1])
    best = np.argmax(logits[:, : toys.NUM_TOKENS], axis=-1)
    best = np.where(live, best, toys.PAD)
    np.testing.assert_array_equal(rollout.tokens[:, step], best)
    tokens[:, columns + step], mask[:, columns + step] = best, live
    live &= ~np.isin(best, toys.STOPS)


@pytest.mark.parametrize("greedy", [False, True])
def test_padded_ids_are_never_drawn_though_they_have_most_of_the_mass(greedy):
  rollout = sample(greedy=greedy)
  assert rollout.tokens.max() < toys.NUM_TOKENS
  hidden = MODEL.prefix_hidden(PARAMS, PROMPTS, rollout)
  best = np.argmax(MODEL.logits(PARAMS, hidden), axis=-1)
  assert (best[rollout.mask] >= toys.NUM_TOKENS).mean() > 0.3


def test_draws_follow_the_distribution():
  count = 20_000
  logits = jnp.array([0.0, 1.0, 2.0, -1.0, 9.0])
  log_probs = generate.log_probs(logits, 0.7, 4)
  keys = generate.row_keys(KEY, jnp.arange(count))
  whole = jnp.broadcast_to(log_probs, (count, 5))
  tokens = generate.choose(keys, whole, greedy=False)
  chosen = generate.log_prob_of(tokens, whole)
  probs = np.exp(np.array([0, 1, 2, -1]) / 0.7)
  probs /= probs.sum()
  error = np.sqrt(probs * (1 - probs) / count)
  share = np.bincount(tokens, minlength=5) / count
  assert share[4] == 0
  assert (np.abs(share[:4] - probs) < 4 * error).all()
  np.testing.assert_allclose(np.exp(chosen), probs[tokens], rtol=1e-5)


@pytest.mark.parametrize("size", [471, 512, 4800, 8 * 263, 16 * 512])
def test_draws_invert_the_cumulated_probabilities(size):
  probs = np.random.default_rng(size).dirichlet(np.full(size, 0.1))
  keys = generate.row_keys(KEY, jnp.arange(1000))
  whole = jnp.broadcast_to(jnp.log(probs), (1000, size))
  tokens = np.asarray(generate.choose(keys, whole, greedy=False))
  uniform = np.asarray(jax.vmap(jax.random.uniform)(keys))
  after = np.cumsum(probs)[tokens]
  assert (after > uniform - 1e-5).all()
  assert (after - probs[tokens] < uniform + 1e-5).all()


@pytest.mark.parametrize("parts", [(1, LENGTH - 2), (4, 4, 4), (LENGTH + 7,)])
def test_decoding_in_segments_is_decoding_at_once(parts):
  """Also where the last one goes past the cap, and the cache is full."""
  assert_same(sample(parts=parts), sample())


@pytest.mark.parametrize(
    "truncation, kept",
    [
        (Truncation(), 4),
        (Truncation(top_k=2), 2),
        (Truncation(top_k=9), 4),
        (Truncation(top_p=0.5), 1),
        (Truncation(top_p=0.51), 2),
        (Truncation(top_p=0.81), 3),
        (Truncation(top_k=1, top_p=0.9), 1),
        (Truncation(top_k=3, top_p=0.6), 2),
        (Truncation(top_p=1e-9), 1),
    ],
)
def test_truncation_keeps_the_most_probable_and_renormalises(truncation, kept):
  probs = np.array([0.05, 0.5, 0.15, 0.3])
  cut = np.exp(generate.truncate(jnp.log(probs), truncation))
  order = np.argsort(-probs)
  wanted = np.zeros(4)
  wanted[order[:kept]] = probs[order[:kept]] / probs[order[:kept]].sum()
  np.testing.assert_allclose(cut, wanted, rtol=1e-5)


def test_truncated_rollouts_record_both_distributions():
  config = dataclasses.replace(CONFIG, truncation=Truncation(top_k=3))
  rollout = sample(config)
  whole = forced_log_probs(PROMPTS, rollout, 1.0)
  own = np.take_along_axis(whole, rollout.tokens[..., None], -1)[..., 0]
  best = np.sort(whole, axis=-1)[..., -3:]
  mask = rollout.mask
  np.testing.assert_allclose(rollout.log_probs[mask], own[mask], atol=1e-5)
  assert (own >= best[..., 0] - 1e-5)[mask].all()
  renormalised = own - np.log(np.exp(best).sum(-1))
  np.testing.assert_allclose(
      rollout.behavior_log_probs[mask], renormalised[mask], atol=1e-5
  )
  plain = sample()
  np.testing.assert_array_equal(plain.behavior_log_probs, plain.log_probs)


MESH = sharding.make_mesh(MeshSpec(), jax.devices()[:1])


@pytest.mark.parametrize("rows", [1, 3, 8, 64])
@pytest.mark.parametrize("cap", [1, 9, 90])
def test_the_engine_answers_as_a_batch_of_its_own_does(rows, cap):
  """More prompts than rows: rows are reused, and the cache grows."""
  model, params = toys.model(vocab_size=toys.NUM_TOKENS)
  model = dataclasses.replace(model, mesh=MESH)
  # Weights that seldom stop, so that lengths differ by much.
  params["head"]["weight"] = params["head"]["weight"].at[
      jnp.array(toys.STOPS)
  ].multiply(0.1)
  draw = Draw.of(cap)
  engine = continuous_batching.Engine(model, CONFIG, params, rows)
  prompts = jax.tree.map(np.asarray, toys.prompts(20))
  found = {n: (t, s) for n, t, s in engine.answers(prompts, KEY, draw)}
  assert sorted(found) == list(range(20))
  wanted = generate.sample(model, CONFIG, cap, params, prompts, KEY, draw)
  lengths = set()
  for number, (tokens, stopped) in found.items():
    mask = np.asarray(wanted.mask[number])
    np.testing.assert_array_equal(tokens, wanted.tokens[number][mask])
    assert stopped == (tokens[-1] in toys.STOPS)
    lengths.add(len(tokens))
  assert cap < 90 or max(lengths) > 5 * min(lengths)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_a_narrow_cache_changes_log_probs_a_little(cache_dtype):
  config = dataclasses.replace(CONFIG, cache_dtype=cache_dtype)
  state, _ = jax.eval_shape(
      lambda: generate.prefill(
          MODEL, config, 20, PARAMS, PROMPTS, KEY, Draw.of(LENGTH)
      )
  )
  for layer in state.cache.layers:
    assert {layer.keys.dtype, layer.values.dtype} == {jnp.dtype(cache_dtype)}
  ours, wanted = sample(config), sample()
  # Up to the first token that it turns.
  same = np.cumprod(ours.tokens == wanted.tokens, axis=1).astype(bool)
  same &= wanted.mask
  assert same.mean() > 0.5 * wanted.mask.mean()
  error = np.abs(ours.log_probs - wanted.log_probs)[same]
  assert 1e-6 < error.max() < 0.1


@pytest.mark.parametrize("size", [12, 15, 40])
def test_rows_change_the_cache_and_keep_all_that_they_hold(size):
  model = dataclasses.replace(MODEL, mesh=MESH)
  draw = Draw.of(LENGTH)
  state, _ = generate.prefill(model, CONFIG, 15, PARAMS, PROMPTS, KEY, draw)
  layout = model.decode_layout(PARAMS)
  state, _ = generate.decode(model, CONFIG, 6, layout, state, draw)
  place = generate.state_shardings(model, CONFIG)
  state = jax.device_put(state, place)
  before = jax.tree.map(_plain, state)
  resizer = generate.Resizer(place)
  shapes = resizer(sharding.placed(state, place), size)
  old = jax.tree.leaves(state.cache.layers)
  found = resizer(state, size)
  assert all(x.is_deleted() for x in old) == (size != 15)
  for ours, shape in zip(*map(jax.tree.leaves, (found, shapes)), strict=True):
    assert (shape.shape, shape.dtype) == (ours.shape, ours.dtype)
  assert found.cache.columns == size
  kept = min(size, 15)
  for ours, theirs in zip(found.cache.layers, before.cache.layers, strict=True):
    np.testing.assert_array_equal(
        ours.keys[..., :kept], theirs.keys[..., :kept]
    )
    np.testing.assert_array_equal(
        ours.values[:, :, :kept], theirs.values[:, :, :kept]
    )
  np.testing.assert_array_equal(found.newest, before.newest)


@pytest.mark.parametrize("prompt", [5, 52, 512])
def test_a_cache_grows_by_an_eighth_at_most_and_in_whole_segments(prompt):
  rooms = generate.rooms(MODEL, CONFIG, prompt, 16_384)
  assert rooms[-1] == 16_384
  for small, large in itertools.pairwise(rooms):
    step = large - small
    assert 0 < step <= max(128, (prompt + large) / 8)
    assert small % generate.segment(MODEL) == 0
  assert len(rooms) < 45


def test_a_kernel_that_reads_lengths_gets_its_cache_at_once(monkeypatch):
  kernel = attention.CacheKernel("cudnn", attention.CPU.layout, True)
  monkeypatch.setattr(attention, "cache_kernel", lambda *_: kernel)
  assert generate.rooms(MODEL, CONFIG, 512, 16_384) == (16_384,)


def _plain(x):
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def test_answers_that_cannot_be_kept_are_said_once(capsys):
  full = pathlib.Path("/dev/full")
  if not full.exists():
    pytest.skip("There is no /dev/full here.")
  with continuous_batching._kept(full) as keep:
    keep([0, [3, 4], True])
    keep([1, [5], False])
  err = capsys.readouterr().err
  assert err.startswith("Warning: /dev/full cannot be written (No space left")
  assert err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"5",
        b"[1, [2]]",
        b"[" * 100_000,
        b"[1, [2, " + b"9" * 5000 + b"], true]",
        b"[1, [2, 1e3], true]",
        b"[1, [-2], true]",
        b"[1, [], true]",
        b"[1, [2], NaN]",
        b"[7, [2], true]",
        b"[true, [2], true]",
    ],
    ids=range(11),
)
def test_kept_answers_end_at_a_line_that_is_none(line, tmp_path):
  good = (b"[2, [3, 4], true]", b"[0, [5], false]")
  file = tmp_path / "answers"
  file.write_bytes(b"\n".join((*good, line, b"[3, [6], true]")))
  found = continuous_batching._read_answers(file, 4)
  assert found == {2: ([3, 4], True), 0: ([5], False)}


def test_kept_answers_that_are_no_file_are_none(tmp_path):
  for place in (tmp_path, tmp_path / "none", tmp_path / "none" / "answers"):
    assert continuous_batching._read_answers(place, 4) == {}
    continuous_batching.forget_answers(place)
  assert tmp_path.is_dir()


def test_answers_whose_directory_cannot_be_made_are_not_kept(capsys, tmp_path):
  (tmp_path / "file").write_text("no directory")
  with continuous_batching._kept(tmp_path / "file" / "answers") as keep:
    keep([0, [3, 4], True])
  assert capsys.readouterr().err.count("\n") == 1
