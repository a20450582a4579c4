"""What an export says of itself, and who can load it."""

import json
import os
import pathlib
import stat

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy

from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_SERVING = hf.Serving((3, 466), temperature=0.7, top_k=20, top_p=0.95)


def _params(source):
  model = Model(hf.read_config(source))
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: rng.standard_normal(x.shape, np.float32) * x.shape[-1] ** -0.5,
      model.abstract_params(),
  )


def _export(directory, source="bundled:capable", serving=_SERVING, **changes):
  """Exports a model whose files have been changed before."""
  origin = hf.resolve(source)
  copy = directory / "source"
  copy.mkdir()
  for file in origin.iterdir():
    if file.suffix in (".json", ".jinja"):
      (copy / file.name).write_bytes(file.read_bytes())
  for name, values in changes.items():
    file = copy / f"{name}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | values))
  out = directory / "export"
  hf.export(_params(source), str(copy), str(copy), out, "float32", serving)
  return out


def _read(directory, name):
  return json.loads((pathlib.Path(directory) / f"{name}.json").read_text())


def test_an_export_stops_and_samples_as_the_run_did(tmp_path):
  out = _export(
      tmp_path,
      generation_config={
          "max_new_tokens": 2048,
          "max_length": 4096,
          "do_sample": False,
          "repetition_penalty": 1.1,
          "temperature": 0.6,
          "eos_token_id": 466,
      },
  )
  assert _read(out, "generation_config") == {
      "do_sample": True,
      "eos_token_id": [3, 466],
      "pad_token_id": 466,
      "temperature": 0.7,
      "top_k": 20,
      "top_p": 0.95,
  }
  assert _read(out, "config")["eos_token_id"] == [3, 466]
  assert hf.stop_ids(out, 471) == (3, 466)


def test_one_stop_token_is_a_number(tmp_path):
  out = _export(tmp_path, serving=hf.Serving((466,)))
  for name in ("config", "generation_config"):
    assert _read(out, name)["eos_token_id"] == 466


def test_a_base_without_a_generation_config_gets_one(tmp_path):
  source = str(_GOLDEN / "qwen3")
  hf.export(
      _params(source), source, source, tmp_path / "out", "float32", _SERVING
  )
  found = _read(tmp_path / "out", "generation_config")
  assert found["eos_token_id"] == [3, 466]
  assert "max_new_tokens" not in found


def test_stop_tokens_are_those_of_the_generation_config_or_the_config(tmp_path):
  def write(name, value):
    (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))

  assert hf.stop_ids(tmp_path, 10) == ()
  write("config", [5, 3])
  assert hf.stop_ids(tmp_path, 10) == (3, 5)
  write("config", 7)
  assert hf.stop_ids(tmp_path, 10) == (7,)
  write("generation_config", [9, 2, 2])
  assert hf.stop_ids(tmp_path, 10) == (2, 9)
  write("generation_config", None)
  assert hf.stop_ids(tmp_path, 10) == ()
  write("generation_config", [9, 10])
  with pytest.raises(UserError, match=r"generation_config.json .* 10 is no id"):
    hf.stop_ids(tmp_path, 10)


def test_an_export_names_no_code_and_says_once_how_it_samples(tmp_path):
  left_out = {
      "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
      "max_length": 2048,
      "max_new_tokens": 16,
      "do_sample": False,
      "temperature": 0.1,
      "repetition_penalty": 1.2,
      "torch_dtype": "bfloat16",
  }
  auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
  out = _export(
      tmp_path, config=left_out, tokenizer_config={"auto_map": auto_map}
  )
  assert not left_out.keys() & _read(out, "config").keys()
  assert "auto_map" not in _read(out, "tokenizer_config")
  assert _read(out, "config")["dtype"] == "float32"


@pytest.mark.parametrize("umask", (0o022, 0o027, 0o077))
def test_everybody_may_read_an_export(tmp_path, umask):
  old = os.umask(umask)
  try:
    out = _export(tmp_path)
  finally:
    os.umask(old)
  for file in out.iterdir():
    assert stat.S_IMODE(file.stat().st_mode) == 0o644, file.name


@pytest.mark.parametrize("name", ("TokenizersBackend", "PythonBackend"))
def test_tokenizers_get_a_name_that_transformers_4_knows(name, tmp_path):
  out = _export(
      tmp_path,
      tokenizer_config={
          "tokenizer_class": name,
          "extra_special_tokens": ["<a>", "<b>"],
      },
  )
  found = _read(out, "tokenizer_config")
  assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
  # A list by this name ends transformers 4 in an AttributeError.
  assert "extra_special_tokens" not in found
  assert found["additional_special_tokens"] == ["<a>", "<b>"]


def test_other_tokenizer_settings_stay(tmp_path):
  out = _export(
      tmp_path,
      tokenizer_config={
          "tokenizer_class": "Qwen2Tokenizer",
          "extra_special_tokens": {"image": "<i>"},
      },
  )
  found, old = _read(out, "tokenizer_config"), _read(
      tmp_path / "source", "tokenizer_config"
  )
  assert found == old


def test_an_exports_tokenizer_says_the_same(tmp_path):
  import transformers

  out = _export(tmp_path)
  old, new = (
      transformers.AutoTokenizer.from_pretrained(d)
      for d in (assets.path("capable"), out)
  )
  assert old.get_vocab() == new.get_vocab()
  turn = [{"role": "user", "content": "Ann has 3 pens."}]
  for tokenizer in (old, new):
    tokenizer.padding_side = "left"
  assert old.apply_chat_template(turn) == new.apply_chat_template(turn)
  assert old.eos_token_id == new.eos_token_id


@pytest.mark.parametrize("name", ("qwen3", "llama3_rope", "yarn", "smollm3"))
def test_rotary_positions_have_their_old_names_too(name, tmp_path):
  source = str(_GOLDEN / name)
  hf.export(_params(source), source, source, tmp_path / "out", "float32")
  found, old = (
      _read(directory, "config") for directory in (tmp_path / "out", source)
  )
  rope = old["rope_parameters"]
  assert found["rope_parameters"] == rope
  assert found["rope_theta"] == rope["rope_theta"]
  scaled = rope["rope_type"] != "default"
  assert found.get("rope_scaling") == (rope if scaled else None)
  assert hf.read_config(str(tmp_path / "out")) == hf.read_config(source)


@pytest.mark.parametrize("limit", (1, 700, 4000, 20_000, 10**9))
def test_files_are_named_and_filled_as_the_hub_has_it(
    limit, tmp_path, monkeypatch
):
  source = str(_GOLDEN / "qwen2")
  monkeypatch.setattr(hf, "_SHARD_BYTES", limit)
  hf.export(_params(source), source, source, tmp_path / "out", "float32")
  files = {
      path.name: safetensors.numpy.load_file(path)
      for path in (tmp_path / "out").glob("*.safetensors")
  }
  total = sum(a.nbytes for held in files.values() for a in held.values())
  index = tmp_path / "out" / hf.INDEX
  if limit == 10**9:
    assert list(files) == [hf.SINGLE] and not index.exists()
    return
  written = json.loads(index.read_text())
  assert written["metadata"]["total_size"] == total
  assert written["weight_map"] == {
      name: file for file, held in files.items() for name in held
  }
  tensors = {n: files[f][n] for n, f in written["weight_map"].items()}
  wanted = huggingface_hub.split_state_dict_into_shards_factory(
      tensors,
      get_storage_size=lambda a: a.nbytes,
      filename_pattern="model{suffix}.safetensors",
      max_shard_size=limit,
  )
  assert set(files) == set(wanted.filename_to_tensors)
  hf.check_weights(str(tmp_path / "out"), hf.read_config(source))


def test_the_dtype_is_the_teachers_or_what_is_asked(tmp_path):
  def stored(**settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return hf.export_dtype("auto", str(tmp_path))

  assert stored(dtype="bfloat16") == "bfloat16"
  assert stored(torch_dtype="bfloat16") == "bfloat16"
  assert stored(dtype="float32", torch_dtype="bfloat16") == "float32"
  assert stored(torch_dtype="float16") == stored() == "float32"
  stored(dtype="bfloat16")
  for asked in ("float32", "bfloat16"):
    assert hf.export_dtype(asked, str(tmp_path)) == asked
  assert config_lib.ExportSpec().dtype == "auto"


@pytest.mark.parametrize(
    "path, name, revision",
    (
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@0a1b2c3", "org/name", "0a1b2c3"),
        ("org/name-1.5@refs/pr/7", "org/name-1.5", "refs/pr/7"),
    ),
)
def test_a_hub_id_may_carry_a_revision(
    path, name, revision, tmp_path, monkeypatch
):
  seen = []

  def download(repository, revision=None, allow_patterns=None):
    seen.append((repository, revision, "*.safetensors" in allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  for weights in (False, True):
    assert hf.resolve(path, weights) == tmp_path
  assert seen == [(name, revision, False), (name, revision, True)]


@pytest.mark.parametrize("path", ("org/name@", "org@main", "a/b/c@main", "@x"))
def test_what_is_no_hub_id_with_a_revision_is_refused(path):
  with pytest.raises(hf.ModelFilesError, match="is not a directory"):
    hf.resolve(path)


@pytest.mark.torch
def test_transformers_ends_an_exports_answers_where_the_run_does(tmp_path):
  """On 20 prompts, with as many stop tokens as make answers end."""
  import torch
  import transformers

  from prefix_distill.rollout import generate
  from prefix_distill.structs import PromptBatch

  source, length = "bundled:capable", 40
  params = jax.device_put(_params(source))
  stops = tuple(range(5, 471, 5))
  out = tmp_path / "out"
  hf.export(params, source, source, out, "float32", hf.Serving(stops))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      out, dtype=torch.float32, attn_implementation="eager"
  )
  tokens = np.random.default_rng(1).integers(0, 400, (20, 9)).astype(np.int32)
  batch = PromptBatch(tokens, np.ones(tokens.shape, bool), np.arange(20))
  sampler = generate.SamplerConfig(stop_ids=stops, pad_id=466, num_tokens=471)
  model = Model(hf.read_config(source))

  @jax.jit
  def answer(params):
    draw = generate.Draw.of(length, greedy=True)
    key = jax.random.key(0)
    return generate.sample(model, sampler, length, params, batch, key, draw)

  ours = answer(params)
  ended = 0
  for row, prompt in enumerate(tokens):
    answer = theirs.generate(
        torch.from_numpy(prompt[None]).long(),
        do_sample=False,
        max_new_tokens=length,
    )[0, 9:].numpy()
    mine = np.asarray(ours.tokens[row])[np.asarray(ours.mask[row])]
    np.testing.assert_array_equal(mine, answer)
    ended += int(mine[-1] in stops)
  assert ended >= 10


@pytest.mark.torch
def test_an_exported_student_ends_its_answers_where_the_run_does(tmp_path):
  """A base that ends with <|endoftext|>, and a teacher that has <|im_end|>."""
  import torch
  import transformers

  from configs import math as experiment
  from prefix_distill.evaluate import evaluator
  from prefix_distill.rollout import generate
  from prefix_distill.train import setup

  config = config_lib.from_dict(experiment.get_config().to_dict())
  torch.set_num_threads(1)  # Many threads on a busy machine take minutes.
  inputs = setup.check(config)
  tokenizers = [one.tokenizer for one in inputs.fed]
  stops, _ = setup.stop_ids(config, tokenizers)
  assert len(stops) == 2
  model = Model(inputs.student.config)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: one, model.abstract_params())
  params = hf.load_params(config.student.path, model, shardings)
  out = tmp_path / "out"
  setup.export_student(config, params, stops, out, tmp_path, 0)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      out, dtype=torch.float32, attn_implementation="eager"
  )
  assert theirs.generation_config.eos_token_id == list(stops)
  tokenizer = tokenizers[0]
  sampler = evaluator.sampler_config(
      config.evaluation, stops, tokenizer.pad_id, tokenizer.num_tokens
  )
  batch = jax.tree.map(lambda x: x[:20], inputs.problems["heldout"].batch)
  length = 128

  @jax.jit
  def answer(params):
    draw = generate.Draw.of(length, greedy=True)
    key = jax.random.key(0)
    return generate.sample(model, sampler, length, params, batch, key, draw)

  ours, ended = answer(params), 0
  for row in range(20):
    prompt = batch.tokens[row][batch.mask[row]]
    wanted = theirs.generate(
        torch.from_numpy(prompt[None]).long(),
        do_sample=False,
        max_new_tokens=length,
    )[0, len(prompt) :].numpy()
    mine = np.asarray(ours.tokens[row])[np.asarray(ours.mask[row])]
    np.testing.assert_array_equal(mine, wanted)
    ended += int(mine[-1] in stops)
  assert ended >= 10
