"""Hugging Face directories in and out, and torch's logits of them."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import toys

from prefix_distill import assets
from prefix_distill import sharding
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf
from prefix_distill.models.config import FAMILIES
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_params
from prefix_distill.models.config import RopeConfig
from prefix_distill.models.config import UnsupportedModelError
from prefix_distill.models.transformer import Model
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_NAMES = ("qwen3", "qwen2", "llama3_rope", "linear_rope", "smollm3", "yarn")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_QUERY = "model.layers.1.self_attn.q_proj.weight"

goldens = pytest.mark.parametrize("name", _NAMES)


def _load(directory, dtype="float32"):
  model = Model(hf.read_config(str(directory)))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: one, model.abstract_params())
  return model, hf.load_params(str(directory), model, shardings, dtype)


def _random_params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: rng.standard_normal(x.shape, np.float32) * x.shape[-1] ** -0.5,
      model.abstract_params(),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(model, config, length, params, batch):
  """Returns hidden states, logits and the greedy continuation of prompts."""
  hidden = model.apply(params, batch.tokens, batch.mask)
  rollout = generate.sample(
      model,
      config,
      length,
      params,
      batch,
      jax.random.key(0),
      generate.Draw.of(length, greedy=True),
  )
  return hidden, model.logits(params, hidden), rollout


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def _gradients(model, params, batch):
  """Of the summed cross-entropy of the next tokens."""
  hidden = model.apply(params, batch.tokens, batch.mask)
  log_probs = jax.nn.log_softmax(model.logits(params, hidden)[:, :-1])
  chosen = jnp.take_along_axis(log_probs, batch.tokens[:, 1:, None], axis=-1)
  return -jnp.sum(jnp.where(batch.mask[:, :-1], chosen[..., 0], 0))


def _batch(tokens, mask):
  return PromptBatch(tokens, mask, np.arange(len(tokens), dtype=np.int32))


def _close(found, wanted, rtol=0.0):
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=rtol)


def _check_golden(directory):
  """Compares what we compute with what torch did."""
  wanted = np.load(directory / "expected.npz")
  model, params = _load(directory)
  config = generate.SamplerConfig(
      stop_ids=(), pad_id=0, num_tokens=model.config.vocab_size
  )
  batch = _batch(wanted["tokens"], wanted["mask"])
  assert not batch.mask.all()
  length = wanted["greedy"].shape[1]
  hidden, logits, rollout = _answer(model, config, length, params, batch)
  real = wanted["mask"]
  _close(np.asarray(hidden)[real], wanted["hidden"][real])
  _close(np.asarray(logits)[real], wanted["logits"][real])
  np.testing.assert_array_equal(rollout.tokens, wanted["greedy"])
  _check_right_padding(model, params, batch, wanted["logits"])
  _check_gradients(directory, model, params, batch)


def _check_right_padding(model, params, batch, wanted):
  order = np.argsort(~batch.mask, axis=1, kind="stable")
  tokens, mask = (
      np.take_along_axis(x, order, axis=1) for x in (batch.tokens, batch.mask)
  )
  assert mask[:, 0].all()
  logits = model.logits(params, model.apply(params, tokens, mask))
  # Row by row, the real positions come in the same order.
  _close(np.asarray(logits)[mask], wanted[batch.mask])


def _check_gradients(directory, model, params, batch):
  wanted = safetensors.numpy.load_file(directory / "gradients.safetensors")
  seen = set()
  tensors = FAMILIES[model.config.family].tensors
  grads = _gradients(model, params, batch)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    ours = sharding.path_name(path)
    tensor = tensors[ours]
    for i, name in enumerate(tensor.names(model.config.num_layers)):
      part = leaf[i] if ours.startswith("layers/") else leaf
      scale = np.abs(wanted[name]).max()
      assert scale > 1e-2
      _close(tensor.write(np.asarray(part)) / scale, wanted[name] / scale)
      seen.add(name)
  assert seen == set(wanted)


def _assert_equal(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    other = functools.reduce(lambda tree, key: tree[key.key], path, found)
    assert other.dtype == leaf.dtype
    np.testing.assert_array_equal(other, leaf, err_msg=str(path))


def _copy(name, directory):
  return pathlib.Path(shutil.copytree(_GOLDEN / name, directory / name))


def _export(params, directory, dtype="float32"):
  source = "bundled:teacher"
  hf.export(params, source, source, directory, dtype)


@goldens
def test_all_that_torch_computes_is_computed_here(name):
  _check_golden(_GOLDEN / name)


@pytest.mark.torch
@pytest.mark.parametrize("name", (*_NAMES, "smollm3_yarn"))
def test_all_that_torch_computes_is_computed_here_live(name, tmp_path):
  from golden import make_golden

  make_golden.make(name, tmp_path, seed=10)
  _check_golden(tmp_path)


@pytest.mark.torch
def test_transformers_answers_as_we_do_after_an_export(tmp_path):
  from golden import make_golden
  import torch
  import transformers

  model = Model(hf.read_config("bundled:teacher"))
  params = _random_params(model)
  _export(params, tmp_path / "export")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "export", dtype=torch.float32, attn_implementation="eager"
  )
  assert all(p.dtype == torch.float32 for p in theirs.parameters())
  tokenizer = tokenizer_lib.load(str(tmp_path / "export"))
  rows = [
      tokenizer.encode(tokenizer.prompt(question, "<think>"))
      for question in ("How many pens does Ann have?", "Ann has 7 pens.")
  ]
  length = max(map(len, rows))
  tokens = np.full((2, length), tokenizer.pad_id, np.int32)
  for row, prompt in zip(tokens, rows, strict=True):
    row[-len(prompt) :] = prompt
  mask = np.arange(length) >= length - np.array([[len(r)] for r in rows])
  wanted = make_golden.expected(theirs, tokens, mask)
  config = generate.SamplerConfig(
      tokenizer.stop_ids, tokenizer.pad_id, tokenizer.num_tokens
  )
  _, logits, rollout = _answer(
      model, config, make_golden.NEW_TOKENS, params, _batch(tokens, mask)
  )
  np.testing.assert_allclose(
      np.asarray(logits)[mask], wanted["logits"][mask], atol=1e-4, rtol=0
  )
  ours = [tokenizer.decode(row) for row in np.asarray(rollout.tokens)]
  assert ours == [tokenizer.decode(row) for row in wanted["greedy"]]
  assert len(set(ours)) == 2


@pytest.mark.torch
@goldens
def test_transformers_reads_an_export_of_every_family(name, tmp_path):
  from golden import make_golden
  import torch
  import transformers

  source = str(_GOLDEN / name)
  model, _ = _load(source)
  params = _random_params(model)
  hf.export(params, source, source, tmp_path / "out", "float32")
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "out",
      dtype=torch.float32,
      attn_implementation="eager",
      output_loading_info=True,
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  expected = np.load(_GOLDEN / name / "expected.npz")
  tokens, mask = expected["tokens"], expected["mask"]
  wanted = make_golden.expected(theirs, tokens, mask)
  logits = model.logits(params, model.apply(params, tokens, mask))
  _close(np.asarray(logits)[mask], wanted["logits"][mask])


@goldens
def test_an_export_loads_back_bit_for_bit(name, tmp_path):
  source = str(_GOLDEN / name)
  _, params = _load(source)
  hf.export(params, source, source, tmp_path / "out", "float32")
  model, found = _load(tmp_path / "out")
  _assert_equal(found, params)
  assert model.config == hf.read_config(source)
  old, new = (
      safetensors.numpy.load_file(pathlib.Path(d) / _WEIGHTS)
      for d in (source, tmp_path / "out")
  )
  assert old.keys() == new.keys()
  for tensor in old:
    np.testing.assert_array_equal(new[tensor], old[tensor], err_msg=tensor)


def test_a_bfloat16_export_rounds_once(tmp_path):
  model = Model(hf.read_config("bundled:teacher"))
  params = _random_params(model)
  _export(params, tmp_path / "first", "bfloat16")
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  _, found = _load(tmp_path / "first", "bfloat16")
  _assert_equal(found, rounded)
  _, widened = _load(tmp_path / "first")
  _assert_equal(widened, jax.tree.map(lambda x: x.astype(np.float32), rounded))
  _export(widened, tmp_path / "second", "bfloat16")
  first, second = (
      (tmp_path / name / _WEIGHTS).read_bytes() for name in ("first", "second")
  )
  assert first == second
  assert len(first) < 0.6 * sum(x.nbytes for x in jax.tree.leaves(params))
  written = json.loads((tmp_path / "first" / "config.json").read_text())
  assert written["dtype"] == "bfloat16"


def test_float32_weights_load_as_bfloat16():
  _, wide = _load(_GOLDEN / "qwen2")
  _, narrow = _load(_GOLDEN / "qwen2", "bfloat16")
  _assert_equal(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))


def test_a_large_export_is_split_and_indexed(tmp_path, monkeypatch):
  source = str(_GOLDEN / "qwen2")
  _, params = _load(source)
  monkeypatch.setattr(hf, "_SHARD_BYTES", 4000)
  hf.export(params, source, source, tmp_path / "out", "float32")
  index = json.loads((tmp_path / "out" / _INDEX).read_text())
  files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
  count = len(files)
  assert count > 3
  assert files == [
      f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
  ]
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  assert index["metadata"]["total_size"] == total
  held = {
      tensor: (file, array)
      for file in files
      for tensor, array in safetensors.numpy.load_file(
          tmp_path / "out" / file
      ).items()
  }
  assert index["weight_map"] == {t: file for t, (file, _) in held.items()}
  sizes = [
      sum(a.nbytes for f, a in held.values() if f == file) for file in files
  ]
  assert max(sizes) <= 4000
  # No two neighbours would have fitted into one file.
  assert min(np.add(sizes[:-1], sizes[1:])) > 4000
  _, found = _load(tmp_path / "out")
  _assert_equal(found, params)


def test_a_small_export_is_one_file(tmp_path):
  source = str(_GOLDEN / "llama3_rope")
  _, params = _load(source)
  hf.export(params, source, source, tmp_path / "out", "float32")
  names = {p.name for p in (tmp_path / "out").iterdir()}
  assert names == {"config.json", "generation_config.json", _WEIGHTS}


def test_an_export_takes_its_tokenizer_from_where_it_is_told(tmp_path):
  model = Model(hf.read_config("bundled:teacher"))
  hf.export(
      _random_params(model),
      "bundled:teacher",
      "bundled:capable",
      tmp_path / "out",
      "float32",
  )
  companion = assets.path("capable")
  for name in (
      "generation_config.json", "chat_template.jinja", "tokenizer.json"
  ):
    written = (tmp_path / "out" / name).read_bytes()
    assert written == (companion / name).read_bytes()
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  origin = json.loads((assets.path("teacher") / "config.json").read_text())
  other = json.loads((companion / "config.json").read_text())
  assert origin["eos_token_id"] != other["eos_token_id"]
  assert written["eos_token_id"] == other["eos_token_id"]
  assert hf.read_config(str(tmp_path / "out")) == model.config


def test_an_export_appears_whole_or_not_at_all(tmp_path):
  source, out = str(_GOLDEN / "qwen3"), tmp_path / "out"
  _, params = _load(source)
  hf.export(params, source, source, out, "float32")
  (out / "stale").touch()
  before = (out / _WEIGHTS).read_bytes()
  changed = jax.tree.map(lambda x: x + 1, params)
  unknown = changed | {"zzz": jnp.ones(1)}
  with pytest.raises(KeyError):
    hf.export(unknown, source, source, out, "float32")
  assert (out / _WEIGHTS).read_bytes() == before
  assert (out / "stale").exists()
  hf.export(changed, source, source, out, "float32")
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  assert not (out / "stale").exists()
  _, found = _load(out)
  _assert_equal(found, changed)


def test_shards_may_lie_in_any_file(tmp_path):
  directory = _copy("qwen2", tmp_path)
  tensors = safetensors.numpy.load_file(directory / _WEIGHTS)
  _, wanted = _load(directory)
  weight_map = {t: f"part-{i % 3}.safetensors" for i, t in enumerate(tensors)}
  for file in set(weight_map.values()):
    safetensors.numpy.save_file(
        {t: a for t, a in tensors.items() if weight_map[t] == file},
        directory / file,
    )
  (directory / _INDEX).write_text(json.dumps({"weight_map": weight_map}))
  (directory / _WEIGHTS).unlink()
  _, found = _load(directory)
  _assert_equal(found, wanted)
  hf.check_weights(str(directory), hf.read_config(str(directory)))


def _rewrite(directory, change):
  tensors = safetensors.numpy.load_file(directory / _WEIGHTS)
  change(tensors)
  safetensors.numpy.save_file(tensors, directory / _WEIGHTS)


def _lose(directory):
  _rewrite(directory, lambda tensors: tensors.pop(_QUERY))
  return _QUERY


def _add(directory):
  name = "model.layers.0.self_attn.q_proj.lora_A.weight"
  _rewrite(directory, lambda tensors: tensors.update({name: np.ones(3)}))
  return name


def _misshape(directory):
  def change(tensors):
    tensors[_QUERY] = tensors[_QUERY][:-1]

  _rewrite(directory, change)
  return _QUERY


def _lose_shard(directory):
  (directory / _WEIGHTS).unlink()
  name = "model-00002-of-00002.safetensors"
  (directory / _INDEX).write_text(json.dumps({"weight_map": {_QUERY: name}}))
  return name


def _truncate(directory):
  whole = (directory / _WEIGHTS).read_bytes()
  (directory / _WEIGHTS).write_bytes(whole[:-100])
  return _WEIGHTS


def _truncate_header(directory):
  whole = (directory / _WEIGHTS).read_bytes()
  (directory / _WEIGHTS).write_bytes(whole[:20])
  return _WEIGHTS


def _remove(directory):
  (directory / _WEIGHTS).unlink()
  return _WEIGHTS


def _pickle(directory):
  (directory / _WEIGHTS).rename(directory / "pytorch_model.bin")
  return _WEIGHTS


def _break_index(directory):
  (directory / _INDEX).write_text('{"weight_map": {')
  return _INDEX


def _empty_index(directory):
  (directory / _INDEX).write_text("{}")
  return _INDEX


@pytest.mark.parametrize(
    "damage",
    (
        _lose, _add, _misshape, _lose_shard, _truncate, _truncate_header,
        _remove, _pickle, _break_index, _empty_index,
    ),
)
def test_damaged_weights_are_refused_by_name(damage, tmp_path):
  directory = _copy("qwen3", tmp_path)
  config = hf.read_config(str(directory))
  hf.check_weights(str(directory), config)
  named = damage(directory)
  with pytest.raises(hf.ModelFilesError) as error:
    _load(directory)
  assert named in str(error.value)
  assert str(directory) in str(error.value)
  with pytest.raises(hf.ModelFilesError) as again:
    hf.check_weights(str(directory), config)
  assert str(again.value) == str(error.value)


def test_misshapen_tensors_are_refused_with_both_shapes(tmp_path):
  directory = _copy("qwen3", tmp_path)
  _misshape(directory)
  with pytest.raises(hf.ModelFilesError, match=r"\(23, 16\).*\(24, 16\)"):
    _load(directory)


def test_a_tied_model_may_repeat_its_table(tmp_path):
  directory = _copy("qwen3", tmp_path)
  _, wanted = _load(directory)
  _rewrite(
      directory,
      lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
  )
  _, found = _load(directory)
  _assert_equal(found, wanted)


def test_an_untied_model_needs_its_head(tmp_path):
  directory = _copy("qwen2", tmp_path)
  _rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
  with pytest.raises(hf.ModelFilesError, match="lm_head.weight"):
    _load(directory)


def _edit_config(directory, **changes):
  file = directory / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_missing_and_broken_configs_are_refused(tmp_path):
  directory = _copy("qwen3", tmp_path)
  (directory / "config.json").write_text('{"model_type": "qwen3",')
  with pytest.raises(hf.ModelFilesError) as error:
    hf.read_config(str(directory))
  assert f"{directory}/config.json" in str(error.value)
  (directory / "config.json").unlink()
  with pytest.raises(hf.ModelFilesError) as error:
    hf.read_config(str(directory))
  assert f"{directory} has no config.json" in str(error.value)


@pytest.mark.parametrize("kind", ("gemma", "made_up", None))
def test_other_architectures_are_refused_before_transformers_sees_them(
    kind, tmp_path
):
  directory = _copy("qwen3", tmp_path)
  _edit_config(directory, model_type=kind, auto_map={"AutoConfig": "x.Y"})
  with pytest.raises(UnsupportedModelError) as error:
    hf.read_config(str(directory))
  assert f"{directory}: model type {kind!r}" in str(error.value)


def test_unsupported_rope_is_refused_from_a_file(tmp_path):
  directory = _copy("llama3_rope", tmp_path)
  dynamic = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
  _edit_config(directory, rope_parameters=dynamic)
  with pytest.raises(UnsupportedModelError, match="rope_type 'dynamic'"):
    hf.read_config(str(directory))


def _published(directory, settings):
  (directory / "config.json").write_text(json.dumps(settings))
  return hf.read_config(str(directory))


def test_the_published_config_of_smollm3_is_read(tmp_path):
  """That of HuggingFaceTB/SmolLM3-3B, with the names of transformers 4."""
  settings = {
      "architectures": ["SmolLM3ForCausalLM"],
      "attention_bias": False,
      "attention_dropout": 0.0,
      "bos_token_id": None,
      "eos_token_id": 128012,
      "hidden_act": "silu",
      "hidden_size": 2048,
      "initializer_range": 0.02,
      "intermediate_size": 11008,
      "layer_types": ["full_attention"] * 36,
      "max_position_embeddings": 65536,
      "max_window_layers": 28,
      "mlp_bias": False,
      "model_type": "smollm3",
      "no_rope_layer_interval": 4,
      "no_rope_layers": [1, 1, 1, 0] * 9,
      "num_attention_heads": 16,
      "num_hidden_layers": 36,
      "num_key_value_heads": 4,
      "pad_token_id": 128004,
      "pretraining_tp": 2,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 5000000.0,
      "sliding_window": None,
      "torch_dtype": "bfloat16",
      "transformers_version": "4.54.0.dev0",
      "use_cache": False,
      "use_sliding_window": False,
      "vocab_size": 128256,
  }
  found = _published(tmp_path, settings)
  assert found == ModelConfig(
      family="smollm3",
      vocab_size=128256,
      dim=2048,
      mlp_dim=11008,
      num_layers=36,
      num_heads=16,
      num_kv_heads=4,
      head_dim=128,
      norm_eps=1e-6,
      rope=RopeConfig(5e6),
      tied=True,
      max_length=65536,
      rotary=(True, True, True, False) * 9,
  )
  assert num_params(found) == 3_075_098_624
  # transformers makes the list of the interval.
  del settings["no_rope_layers"], settings["layer_types"]
  assert _published(tmp_path, settings) == found


def test_the_yarn_of_qwen3s_model_card_is_read(tmp_path):
  """For 131,072 tokens; Qwen2.5's card says "type"."""
  settings = {
      "architectures": ["Qwen3ForCausalLM"],
      "attention_bias": False,
      "attention_dropout": 0.0,
      "bos_token_id": 151643,
      "eos_token_id": 151645,
      "head_dim": 128,
      "hidden_act": "silu",
      "hidden_size": 4096,
      "initializer_range": 0.02,
      "intermediate_size": 12288,
      "max_position_embeddings": 40960,
      "max_window_layers": 36,
      "model_type": "qwen3",
      "num_attention_heads": 32,
      "num_hidden_layers": 36,
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-06,
      "rope_scaling": None,
      "rope_theta": 1000000,
      "sliding_window": None,
      "tie_word_embeddings": False,
      "torch_dtype": "bfloat16",
      "transformers_version": "4.51.0",
      "use_cache": True,
      "use_sliding_window": False,
      "vocab_size": 151936,
  }
  plain = _published(tmp_path, settings)
  wanted = RopeConfig(
      1e6,
      "yarn",
      4.0,
      original_length=32768,
      attention_factor=pytest.approx(1.1386294),
  )
  for name in ("rope_type", "type"):
    settings["rope_scaling"] = {
        name: "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    found = _published(tmp_path, settings)
    assert found.rope == wanted
    assert dataclasses.replace(found, rope=plain.rope) == plain
  assert found.max_length == 40960


@pytest.mark.parametrize(
    "changes",
    (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10.0}},
        {"hidden_size": "sixteen"},
        {"no_rope_layers": "all", "model_type": "smollm3"},
        {"no_rope_layers": [1, "no"], "model_type": "smollm3"},
        {"no_rope_layer_interval": 0, "model_type": "smollm3"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0}},
        {"rope_parameters": "yarn"},
    ),
    ids=(
        "rope without its factor",
        "a size that is a word",
        "a word for layers",
        "a word for a layer",
        "no interval",
        "yarn without its factor",
        "a word for rope",
    ),
)
def test_a_config_that_transformers_refuses_is_refused(changes, tmp_path):
  """What transformers 5.0 lets pass, its family refuses."""
  directory = _copy("llama3_rope", tmp_path)
  _edit_config(directory, **changes)
  with pytest.raises(UserError) as error:
    hf.read_config(str(directory))
  assert str(directory) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ("/no/such/model", "./model", "model", "a/b/c")
)
def test_what_is_no_directory_is_refused(path):
  with pytest.raises(hf.ModelFilesError) as error:
    hf.resolve(path)
  assert str(error.value).startswith(f"{path} is not a directory")


def test_unknown_bundled_names_are_refused():
  with pytest.raises(hf.ModelFilesError) as error:
    hf.resolve("bundled:giant")
  assert str(error.value).startswith("bundled:giant: ")
  assert f"there are {', '.join(assets.names())}." in str(error.value)
  assert hf.resolve("bundled:weak") == assets.path("weak")


def test_loading_needs_one_shard_above_the_models_size(tmp_path, monkeypatch):
  """Of 218 MB in several files."""
  source = tmp_path / "source"
  source.mkdir()
  settings = json.loads((assets.path("teacher") / "config.json").read_text())
  settings |= {
      "hidden_size": 512,
      "intermediate_size": 1536,
      "num_hidden_layers": 16,
      "layer_types": ["full_attention"] * 16,
      "max_window_layers": 16,
      "vocab_size": 8192,
      "head_dim": 64,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
  }
  (source / "config.json").write_text(json.dumps(settings))
  model = Model(hf.read_config(str(source)))
  params = jax.tree.map(
      lambda x: np.full(x.shape, 0.01, np.float32), model.abstract_params()
  )
  monkeypatch.setattr(hf, "_SHARD_BYTES", 2**26)
  directory = tmp_path / "model"
  hf.export(
      params, str(source), "bundled:teacher", directory, "float32"
  )
  # Or malloc would keep freed blocks of up to 32 MB, much at this size.
  monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
  process = toys.start("load_memory.py", str(directory), devices=1)
  (printed,) = toys.finish([process], seconds=120)
  found = json.loads(printed)
  assert found["weights"] > 3 * found["largest_file"] > 2**27
  assert found["weights"] * 0.9 < found["peak"]
  assert found["peak"] < found["weights"] + found["largest_file"]
