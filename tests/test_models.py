"""The transformer, its cache and how Hugging Face configs are read."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
import transformers

from prefix_distill.models import attention
from prefix_distill.models import config as model_config
from prefix_distill.models import kv_cache
from prefix_distill.models import transformer
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig
from prefix_distill.models.config import UnsupportedModelError
from prefix_distill.models.transformer import Model

_TINY = toys.model_config(
    vocab_size=23,
    mlp_dim=24,
    head_dim=6,
    rope=RopeConfig(100.0),
    tied=True,
    max_length=64,
)
_LLAMA3 = RopeConfig(1000.0, "llama3", 8.0, 1.0, 4.0, 32)
_YARN = RopeConfig(
    100.0,
    "yarn",
    4.0,
    original_length=4,
    beta_fast=1.0,
    beta_slow=0.2,
    truncate=False,
    attention_factor=1.2,
)
_MODELS = {
    "qwen3": Model(_TINY),
    "qwen2": Model(
        dataclasses.replace(_TINY, family="qwen2", head_dim=4, tied=False)
    ),
    "llama": Model(
        dataclasses.replace(_TINY, family="llama", rope=_LLAMA3, tied=False)
    ),
    "smollm3": Model(
        dataclasses.replace(
            _TINY, family="smollm3", rope=_YARN, rotary=(True, False)
        )
    ),
}
_LENGTH = 8
_TOKENS = np.array([5, 3, 19, 7, 11, 2, 13, 1], np.int32)

families = pytest.mark.parametrize("family", _MODELS)


@functools.cache
def _params(family):
  """Random parameters, with biases and norms that matter."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    is_scale = path[-1].key == "scale"
    return 1 + 0.2 * noise if is_scale else 0.3 * noise

  abstract = _MODELS[family].abstract_params()
  return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, tokens, mask):
  return model.logits(params, model.apply(params, tokens, mask))


@functools.partial(jax.jit, static_argnums=0)
def _decode_one(model, params, tokens, live, cache):
  layout = model.decode_layout(params)
  hidden, cache = model.decode(layout, tokens, live, cache)
  return model.logits(params, hidden), cache


def _layout(columns):
  """Returns a row of tokens and a mask: the first tokens, in `columns`."""
  tokens, mask = np.zeros(_LENGTH, np.int32), np.zeros(_LENGTH, bool)
  tokens[columns], mask[columns] = _TOKENS[: len(columns)], True
  return tokens, mask


# The same tokens without padding, and padded left, right and in the middle.
_COLUMNS = (list(range(8)), [3, 4, 5, 6, 7], [0, 1, 2, 3, 4], [1, 2, 5, 6, 7])
_BATCH, _MASK = (
    np.stack(x) for x in zip(*(_layout(c) for c in _COLUMNS), strict=True)
)


def _decode(model, params, cache=None, start=0):
  """Runs the batch through a cache, a token at a time."""
  if cache is None:
    c = model.config
    shape = (len(_BATCH), c.num_kv_heads, _LENGTH + 2, c.head_dim)
    layout = model.cache_kernel(model.dtype).layout
    cache = kv_cache.empty(shape, c.num_layers, model.dtype, layout)
  out = []
  for column in range(start, _LENGTH):
    logits, cache = _decode_one(
        model, params, _BATCH[:, column], _MASK[:, column], cache
    )
    out.append(logits)
  np.testing.assert_array_equal(cache.lengths, _MASK.sum(axis=1))
  return jnp.stack(out, axis=1)


@functools.cache
def _full(family):
  return np.asarray(_run(_MODELS[family], _params(family), _BATCH, _MASK))


@families
def test_cached_decoding_equals_the_full_forward(family):
  np.testing.assert_allclose(
      _decode(_MODELS[family], _params(family))[_MASK],
      _full(family)[_MASK],
      atol=1e-5,
      rtol=1e-5,
  )


# As the kernels of a CPU, a GPU and a TPU want it, and as no kernel does.
_LAYOUTS = [
    ("bkhm", "bkmh"),
    ("bkmh", "bkmh"),
    ("bmkh", "bmkh"),
    ("kbmh", "kbmh"),
]


@pytest.mark.parametrize("keys, values", _LAYOUTS)
@pytest.mark.parametrize("family", ("qwen3", "smollm3"))
def test_a_cache_of_any_layout_decodes_the_same(
    family, keys, values, monkeypatch
):
  kernel = attention.CacheKernel("plain", kv_cache.Layout(keys, values))
  monkeypatch.setattr(attention, "cache_kernel", lambda *_: kernel)
  with jax.disable_jit():  # Or a program of another layout would be taken.
    found = _decode(_MODELS[family], _params(family))
  np.testing.assert_allclose(
      found[_MASK], _full(family)[_MASK], atol=1e-5, rtol=1e-5
  )


@pytest.mark.parametrize("keys, values", _LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_what_goes_into_a_cache_lies_where_its_layout_says(
    keys, values, dtype
):
  """A prefill, a fan-out, an inserted prompt and a token, in turn."""
  rng, layout = np.random.default_rng(0), kv_cache.Layout(keys, values)
  rows, heads, columns, size = 3, 2, 6, 4

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  # An axis at a time, [B, K, M, H].
  wanted = np.zeros((2, 2 * rows, heads, columns, size), np.float32)
  lengths = np.array([3, 1, 2])
  prompts = draw(2, rows, 3, heads, size)
  prefilled = kv_cache.from_prefill(
      *(x[None] for x in prompts), jnp.array(lengths), columns, dtype, layout
  )
  wanted[:, :, :, :3] = np.repeat(prompts, 2, axis=1).swapaxes(2, 3)
  cache = kv_cache.repeat(prefilled, 2)
  np.testing.assert_array_equal(cache.lengths, np.repeat(lengths, 2))
  new = draw(2, 2, 3, heads, size)
  inserted = kv_cache.from_prefill(
      *(x[None] for x in new), jnp.array([2, 3]), 3, dtype, layout
  )
  # The second is not to be inserted.
  cache = kv_cache.insert(cache, inserted, jnp.array([4, 9]))
  wanted[:, 4, :, :3] = new[:, 0].swapaxes(1, 2)
  np.testing.assert_array_equal(cache.lengths, [3, 3, 1, 1, 2, 2])
  token = draw(2, 2 * rows, heads, size)
  at = np.array([3, 5, 1, 1, 2, 6])  # The last row is full.
  (layer,) = cache.layers
  layer = kv_cache.write(layout, layer, *token, jnp.array(at))
  for row in range(5):
    wanted[:, row, :, at[row]] = token[:, row]
  found = [np.asarray(layer.keys, np.float32)]
  found += [np.asarray(layer.values, np.float32)]
  for i, axes in enumerate((keys, values)):
    whole = found[i].transpose([axes.index(axis) for axis in "bkmh"])
    if dtype == jnp.int8:
      scales = (layer.key_scales, layer.value_scales)[i]
      whole = whole * np.asarray(scales)[..., None]
      largest = np.abs(wanted[i]).max(axis=-1, keepdims=True)
      assert (np.abs(whole - wanted[i]) <= largest / 253).all()
    else:
      np.testing.assert_array_equal(whole, wanted[i])


@families
def test_decoding_after_a_prefill_equals_the_full_forward(family):
  """Prompts of 3, 0, 3 and 2 tokens, padded on either side."""
  model, params, split = _MODELS[family], _params(family), 3
  order = np.argsort(_MASK[:, :split], axis=1, kind="stable")
  padded, left = (
      np.take_along_axis(x[:, :split], order, axis=1) for x in (_BATCH, _MASK)
  )
  hidden, cache = jax.jit(model.prefill, static_argnums=3)(
      params, padded, left, _LENGTH
  )
  rows = left.any(axis=1)
  last = np.array([np.flatnonzero(m).max(initial=0) for m in _MASK[:, :split]])
  np.testing.assert_allclose(
      model.logits(params, hidden)[rows],
      _full(family)[np.arange(len(rows)), last][rows],
      atol=1e-5,
      rtol=1e-5,
  )
  after = _decode(model, params, cache, split)
  np.testing.assert_allclose(
      after[_MASK[:, split:]],
      _full(family)[:, split:][_MASK[:, split:]],
      atol=1e-5,
      rtol=1e-5,
  )


@families
@pytest.mark.parametrize(
    "row", (1, 2, 3), ids=("left", "right", "in the middle")
)
def test_padding_changes_nothing(family, row):
  logits = _full(family)
  np.testing.assert_allclose(
      logits[row, _COLUMNS[row]], logits[0, :5], atol=1e-5, rtol=1e-5
  )


@families
def test_the_order_of_tokens_matters(family):
  swapped = _BATCH.copy()
  swapped[0, [1, 2]] = swapped[0, [2, 1]]
  logits = _run(_MODELS[family], _params(family), swapped, _MASK)
  assert np.abs(logits[0, -1] - _full(family)[0, -1]).max() > 1e-2


@pytest.mark.parametrize("rotates", (True, False))
def test_a_layer_without_rotation_does_not_see_the_order_of_tokens(rotates):
  """Of those before the last one, which stays."""
  model, params = _MODELS["smollm3"], _params("smollm3")
  config = dataclasses.replace(model.config, num_layers=1, rotary=(rotates,))
  params = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
  swapped = _BATCH.copy()
  swapped[0, [1, 5]] = swapped[0, [5, 1]]
  first, second = (
      _run(Model(config), params, tokens, _MASK)[0, -1]
      for tokens in (_BATCH, swapped)
  )
  difference = np.abs(first - second).max()
  assert difference > 1e-2 if rotates else difference < 1e-5


def test_layers_that_all_rotate_need_no_flags():
  """The flags are one more of the scan's arrays, and are made and read."""

  def inputs(rotary):
    config = dataclasses.replace(_MODELS["smollm3"].config, rotary=rotary)
    jaxpr = jax.make_jaxpr(Model(config).apply)(
        _params("smollm3"), _BATCH, _MASK
    )
    (scan,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    return len(scan.invars), len(str(jaxpr))

  (count, size), (more, longer) = inputs(()), inputs((True, True))
  assert more == count + 1
  assert longer > size


@families
def test_no_gradient_reaches_later_positions(family):
  model, params = _MODELS[family], _params(family)
  cotangent = np.random.default_rng(2).standard_normal(
      (_LENGTH, model.config.vocab_size), np.float32
  )

  @jax.jit
  @jax.jacrev
  def jacobian(table):
    changed = params | {"embed": {"weight": table}}
    hidden = model.apply(changed, _TOKENS[None], np.ones((1, 8), bool))
    return (model.logits(params, hidden)[0] * cotangent).sum(-1)

  # The tokens differ, so a row of the table is one position's embedding.
  grads = np.asarray(jacobian(params["embed"]["weight"]))[:, _TOKENS]
  reached = np.abs(grads).max(-1)
  np.testing.assert_array_equal(reached[np.triu_indices(_LENGTH, 1)], 0.0)
  assert (reached[np.tril_indices(_LENGTH)] > 1e-4).all()


@pytest.mark.aot
@pytest.mark.parametrize("machine", ["v5e:2x2", "h100:1"])
def test_the_layers_inputs_wait_on_the_host_and_not_on_the_device(machine):
  process = toys.start("offloaded.py", machine, devices=1)
  (printed,) = toys.finish([process], seconds=300)
  found = json.loads(printed.strip().splitlines()[-1])
  (full, kept), (offload, host) = found["full"], found["offload"]
  assert kept == 0
  assert host == pytest.approx(found["inputs"], rel=0.1)
  # A few lie there at a time, on the way out and back.
  assert full - offload == pytest.approx(found["inputs"], rel=0.3)


@pytest.mark.parametrize("policy", ["full", "dots", "offload"])
def test_remat_changes_no_gradient(policy):
  params = _params("llama")

  def gradient(model):
    def loss(params):
      hidden = model.apply(params, _BATCH, _MASK)
      return jnp.where(_MASK[..., None], hidden, 0).sum()

    return jax.jit(jax.grad(loss))

  plain = gradient(_MODELS["llama"])
  remat = gradient(dataclasses.replace(_MODELS["llama"], remat=policy))
  assert "remat" not in str(jax.make_jaxpr(plain)(params))
  traced = str(jax.make_jaxpr(remat)(params))
  assert "remat" in traced
  assert ("<host>" in traced) == (policy == "offload")
  wanted, found = plain(params), remat(params)
  for leaf in jax.tree.leaves(wanted["layers"]):
    assert np.abs(leaf).max() > 1e-3
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
      wanted,
      found,
  )


def test_bfloat16_computes_nearly_the_same():
  model = dataclasses.replace(_MODELS["qwen3"], compute_dtype="bfloat16")
  params = _params("qwen3")
  hidden = jax.eval_shape(model.apply, params, _BATCH, _MASK)
  assert hidden.dtype == jnp.bfloat16
  logits = _run(model, params, _BATCH, _MASK)
  assert logits.dtype == jnp.float32
  exact = _full("qwen3")[_MASK]
  error = np.abs(np.asarray(logits)[_MASK] - exact).max() / exact.std()
  assert 1e-4 < error < 0.1


@families
@pytest.mark.parametrize("tied", (True, False))
def test_num_params_counts_what_init_makes(family, tied):
  config = dataclasses.replace(_MODELS[family].config, tied=tied)
  tree = Model(config).abstract_params()
  counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  assert model_config.num_params(config) == counted
  table = 0 if tied else config.vocab_size * config.dim
  without = model_config.num_params(config, embeddings=False)
  assert without == counted - table


def test_init_depends_on_its_key():
  init = jax.jit(_MODELS["qwen2"].init)
  # Keys of this kind compile fast.
  keys = (jax.random.key(seed, impl="rbg") for seed in (3, 3, 4))
  first, same, other = map(init, keys)
  assert jax.tree.all(jax.tree.map(np.array_equal, first, same))
  for name in ("embed", "head"):
    assert not np.array_equal(first[name]["weight"], other[name]["weight"])
  assert not np.array_equal(first["embed"]["weight"], first["head"]["weight"])
  up = first["layers"]["mlp"]["up"]
  assert not np.array_equal(up[0], up[1])


def _wavelengths(theta, head_dim):
  return np.array(
      [2 * math.pi * theta ** (i / head_dim) for i in range(0, head_dim, 2)]
  )


def test_default_and_linear_rope_frequencies():
  wanted = 2 * math.pi / _wavelengths(500.0, 10)
  found = transformer.rope_frequencies(RopeConfig(500.0), 10)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  found = transformer.rope_frequencies(RopeConfig(500.0, "linear", 4.0), 10)
  np.testing.assert_allclose(found, wanted / 4, rtol=1e-5)


def test_llama3_rope_frequencies():
  """Compares with the rule of Llama 3.1, one wavelength at a time."""
  theta, factor, low, high, original = 500000.0, 8.0, 1.0, 4.0, 8192
  wanted, kinds = [], set()
  for wave in _wavelengths(theta, 128):
    if wave < original / high:
      kinds.add("short")
      wanted.append(2 * math.pi / wave)
    elif wave > original / low:
      kinds.add("long")
      wanted.append(2 * math.pi / wave / factor)
    else:
      kinds.add("between")
      smooth = (original / wave - low) / (high - low)
      scaled = (1 - smooth) / factor + smooth
      wanted.append(2 * math.pi / wave * scaled)
  assert kinds == {"short", "between", "long"}
  rope = RopeConfig(theta, "llama3", factor, low, high, original)
  np.testing.assert_allclose(
      transformer.rope_frequencies(rope, 128), wanted, rtol=1e-4
  )


@pytest.mark.parametrize("truncate", (True, False))
def test_yarn_rope_frequencies(truncate):
  """Compares with the paper's rule, one pair of channels at a time."""
  theta, factor, fast, slow, original = 1e6, 4.0, 32.0, 1.0, 32768

  def number(turns):  # Of the pair that turns so often.
    wave = original / turns
    return 128 * math.log(wave / (2 * math.pi)) / (2 * math.log(theta))

  low, high = number(fast), number(slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  assert 0 < low < high < 64
  wanted = []
  for i, wave in enumerate(_wavelengths(theta, 128)):
    shrunk = min(max((i - low) / (high - low), 0), 1)
    freq = 2 * math.pi / wave
    wanted.append(shrunk * freq / factor + (1 - shrunk) * freq)
  rope = RopeConfig(
      theta, "yarn", factor, original_length=original, truncate=truncate
  )
  found = transformer.rope_frequencies(rope, 128)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


_YARNS = (
    {},
    {"truncate": False},
    {"beta_fast": 16, "beta_slow": 2.5},
    {"beta_fast": None, "beta_slow": 0},
    {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    {"factor": 1.0},
    {"factor": None},
    {"original_max_position_embeddings": 4},
    {"original_max_position_embeddings": 10**9},
    {"attention_factor": 0.7},
    {"mscale": 0.707, "mscale_all_dim": 1.0},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"mscale": 2.0},
    {"mscale": 2.0, "mscale_all_dim": 0},
    {"rope_theta": 1e4, "factor": 40},
)


@pytest.mark.torch
@pytest.mark.parametrize("changes", _YARNS)
def test_yarn_is_that_of_transformers(changes):
  from transformers import modeling_rope_utils

  rope = {
      "rope_type": "yarn",
      "rope_theta": 1e6,
      "factor": 4.0,
      "original_max_position_embeddings": 32768,
  }
  config = transformers.Qwen3Config(
      **(_HF_SIZES | {"max_position_embeddings": 131072}),
      head_dim=128,
      rope_parameters=rope | changes,
  )
  ours = model_config.from_hf(config, "some/model").rope
  wanted, scale = modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
  found = transformer.rope_frequencies(ours, 128)
  np.testing.assert_allclose(found, wanted.numpy(), rtol=3e-7)
  assert ours.attention_factor == pytest.approx(scale, rel=1e-12)
  rotation = transformer.Rotation.of(ours, 128, jnp.array([[131071]]))
  angles = 131071 * wanted.numpy()
  np.testing.assert_allclose(
      rotation.cos[0, 0], np.cos(angles) * np.float32(scale), atol=3e-2
  )


def test_rope_keeps_lengths_and_relative_angles():
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 1, 1, 1, 8), np.float32)
  rope = RopeConfig(100.0)

  def at(vector, position):
    rotation = transformer.Rotation.of(rope, 8, jnp.array([[position]]))
    return np.asarray(rotation.apply(jnp.array(vector))).ravel()

  np.testing.assert_allclose(at(x, 0), x.ravel(), rtol=1e-6)
  np.testing.assert_allclose(
      np.linalg.norm(at(x, 9)), np.linalg.norm(x), rtol=1e-5
  )
  near, far = at(x, 2) @ at(y, 5), at(x, 12) @ at(y, 15)
  np.testing.assert_allclose(near, far, rtol=1e-4)
  assert abs(near - at(x, 2) @ at(y, 9)) > 1e-2


_HF = {
    "qwen3": transformers.Qwen3Config,
    "qwen2": transformers.Qwen2Config,
    "llama": transformers.LlamaConfig,
    "smollm3": transformers.SmolLM3Config,
}
_HF_SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def _read(family, **changes):
  config = _HF[family](**(_HF_SIZES | changes))
  return model_config.from_hf(config, "some/model")


@families
@pytest.mark.parametrize("tied", (True, False))
def test_from_hf_reads_every_size(family, tied):
  rope = {"rope_type": "default", "rope_theta": 700.0}
  found = _read(
      family, tie_word_embeddings=tied, head_dim=6, rope_parameters=rope
  )
  assert found == ModelConfig(
      family=family,
      vocab_size=23,
      dim=16,
      mlp_dim=24,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=6,
      norm_eps=1e-5,
      rope=RopeConfig(700.0),
      tied=tied,
      max_length=64,
  )
  assert hash(found) == hash(dataclasses.replace(found))


@pytest.mark.parametrize("family", ("qwen2", "llama", "smollm3"))
def test_head_width_defaults_to_an_even_split(family):
  assert _read(family).head_dim == 4


def test_from_hf_reads_published_rope_settings():
  """Llama 3.1's config.json has the names of before transformers 5."""
  published = {
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
      "rope_type": "llama3",
  }
  found = _read("llama", rope_theta=1000.0, rope_scaling=published)
  assert found.rope == _LLAMA3
  linear = {"type": "linear", "factor": 2.0}
  found = _read("llama", rope_theta=1000.0, rope_scaling=linear)
  assert found.rope == RopeConfig(1000.0, "linear", 2.0)


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}


def _yarn(**changes):
  return {
      "rope_parameters": {
          "rope_type": "yarn",
          "rope_theta": 1000.0,
          "factor": 4.0,
          "original_max_position_embeddings": 16,
      }
      | changes
  }


_PARTIAL = {
    "rope_type": "default",
    "rope_theta": 10.0,
    "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize(
    "family, changes, named",
    (
        ("qwen3", {"rope_parameters": _DYNAMIC}, "rope_type 'dynamic'"),
        ("llama", {"rope_parameters": _PARTIAL}, "partial_rotary_factor 0.5"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config",
        ),
        ("smollm3", {"attention_bias": True}, "attention_bias True"),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 8},
            "use_sliding_window True",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types with 'sliding_attention'",
        ),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers [1, 2]"),
        (
            "smollm3",
            {"no_rope_layers": [1], "layer_types": ["full_attention"] * 2},
            "no_rope_layers [1]",
        ),
        ("qwen3", _yarn(factor="four"), "factor 'four'"),
        ("qwen3", _yarn(factor=0.5), "factor 0.5"),
        ("qwen3", _yarn(factor=math.nan), "factor nan"),
        ("qwen3", _yarn(factor=True), "factor True"),
        (
            "qwen3",
            _yarn(original_max_position_embeddings=0.5),
            "original_max_position_embeddings 0.5",
        ),
        ("qwen3", _yarn(beta_fast=-1), "beta_fast -1"),
        ("qwen3", _yarn(beta_slow=-1), "beta_slow -1"),
        ("qwen3", _yarn(beta_fast=1, beta_slow=2), "rope_type 'yarn' with"),
        ("qwen3", _yarn(rope_theta=1.0), "rope_type 'yarn' with rope_theta 1,"),
        ("qwen3", _yarn(truncate="no"), "rope_type 'yarn' with"),
        ("qwen3", _yarn(attention_factor=-1.0), "attention_factor -1.0"),
        (
            "qwen3",
            _yarn(mscale="a", mscale_all_dim=1.0),
            "mscale 'a'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
            "factor 'two'",
        ),
    ),
)
def test_from_hf_refuses_by_name(family, changes, named):
  with pytest.raises(UnsupportedModelError) as error:
    _read(family, **changes)
  assert str(error.value).startswith(f"some/model: {named}")
  assert "not implemented" in str(error.value)
  assert "\n" not in str(error.value)


def test_from_hf_refuses_other_architectures_by_name():
  with pytest.raises(UnsupportedModelError) as error:
    model_config.from_hf(transformers.GemmaConfig(), "some/model")
  assert str(error.value).startswith("some/model: model type 'gemma'")
  assert "qwen3, qwen2, llama, smollm3 are" in str(error.value)
