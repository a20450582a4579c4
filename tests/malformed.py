"""Makes model directories with something wrong, or odd, in them.

`python tests/malformed.py DIRECTORY` writes one directory for each case, and
`python tests/malformed.py` what torch computes from those that transformers
loads: `golden/malformed.npz`. The latter needs torch.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import random
import shutil
import sys

import ml_dtypes
import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent / "golden"
LOGITS = GOLDEN / "malformed.npz"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
LAST = 4
TOKENS = np.random.default_rng(5).integers(1, 48, (1, 40)).astype(np.int32)

Damage = Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Case:
  """A directory.

  Attributes:
    base: the golden model that it is made of.
    damage: changes a copy of that.
    says: what the refusal says; empty if the directory loads.
  """

  base: str
  damage: Damage
  says: str = ""


def _config(**changes) -> Damage:
  def damage(directory):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

  return damage


def _without(*names: str, **changes) -> Damage:
  def damage(directory):
    _config(**changes)(directory)
    file = directory / "config.json"
    settings = json.loads(file.read_text())
    for name in names:
      del settings[name]
    file.write_text(json.dumps(settings))

  return damage


def _file(name: str, content: bytes | str) -> Damage:
  def damage(directory):
    data = content.encode() if isinstance(content, str) else content
    (directory / name).write_bytes(data)

  return damage


def _encoded(name: str, encoding: str) -> Damage:
  def damage(directory):
    file = directory / name
    text = file.read_text() if file.exists() else '{"eos_token_id": 3}'
    file.write_bytes(text.encode(encoding))

  return damage


def _cut(name: str, size: int) -> Damage:
  def damage(directory):
    file = directory / name
    file.write_bytes(file.read_bytes()[:size])

  return damage


def _weights(change: Callable[[dict], None]) -> Damage:
  def damage(directory):
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS)

  return damage


def _tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
  return _weights(lambda tensors: tensors.update({name: change(tensors[name])}))


def _number(name: str, value: float) -> Damage:
  def change(array):
    array = array.copy()
    array.flat[array.size // 2] = value
    return array

  return _tensor(name, change)


def _split(change: Callable[[dict, pathlib.Path], None]) -> Damage:
  """Puts the weights into two files; the change edits the index's map."""

  def damage(directory):
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
      file = f"model-{number:05}-of-00002.safetensors"
      safetensors.numpy.save_file(
          {name: tensors[name] for name in part}, directory / file
      )
      places |= dict.fromkeys(part, file)
    change(places, directory)
    text = json.dumps({"metadata": {}, "weight_map": places})
    (directory / INDEX).write_text(text)

  return damage


def _both(*damages: Damage) -> Damage:
  def damage(directory):
    for one in damages:
      one(directory)

  return damage


def _stray_single(_, directory):
  source = GOLDEN / "qwen3" / WEIGHTS
  shutil.copyfile(source, directory / WEIGHTS)


def _move(name: str, file: str) -> Damage:
  return _split(lambda places, _: places.update({name: file}))


def _twice(places, directory):
  first = directory / "model-00001-of-00002.safetensors"
  second = directory / "model-00002-of-00002.safetensors"
  name = next(n for n in places if places[n] == first.name)
  tensors = safetensors.numpy.load_file(second)
  tensors[name] = safetensors.numpy.load_file(first)[name] + 1
  safetensors.numpy.save_file(tensors, second)


def _outside(places, directory):
  name = "model-00001-of-00002.safetensors"
  (directory / name).rename(directory.parent / f"{directory.name}-{name}")
  for tensor, file in places.items():
    if file == name:
      places[tensor] = f"../{directory.name}-{name}"


def _subfolder(places, directory):
  name = "model-00001-of-00002.safetensors"
  (directory / "part").mkdir()
  (directory / name).rename(directory / "part" / name)
  for tensor, file in places.items():
    if file == name:
      places[tensor] = f"part/{name}"


def _rename(directory):
  (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def _no_config(directory):
  (directory / "config.json").unlink()


def _folder_config(directory):
  (directory / "config.json").unlink()
  (directory / "config.json").mkdir()


def _folder_weights(directory):
  (directory / WEIGHTS).unlink()
  (directory / WEIGHTS).mkdir()


def _head(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
  return _weights(
      lambda tensors: tensors.update({HEAD: change(tensors[TABLE])})
  )


def _narrow(name: str, dtype) -> Damage:
  return _tensor(name, lambda array: array.astype(dtype))


def _all(dtype) -> Damage:
  return _weights(
      lambda tensors: tensors.update(
          {name: array.astype(dtype) for name, array in tensors.items()}
      )
  )


def _yarn(**changes):
  return {
      "rope_type": "yarn",
      "rope_theta": 100.0,
      "factor": 4.0,
      "original_max_position_embeddings": 16,
  } | changes


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}


def _lacks(settings, *names):
  return {k: v for k, v in settings.items() if k not in names}


def _configs() -> Iterator[tuple[str, Case]]:
  """Config files that are none, and sizes that are none."""
  file = "config.json"
  for name, content in {
      "empty": "",
      "cut": '{"model_type": "qwen3", "hidden_si',
      "a list": "[]",
      "a number": "3",
      "a word": '"qwen3"',
      "null": "null",
      "no JSON": "model_type: qwen3",
      "a comment": '{"model_type": "qwen3"} // mine',
      "a comma too many": '{"model_type": "qwen3",}',
      "two objects": "{}{}",
      "deep": "[" * 100_000,
      "latin-1": b'{"model_type": "qwen3", "name": "\xe9"}',
      "zeros": b"\0" * 200,
  }.items():
    yield f"config is {name}", Case("qwen3", _file(file, content), file)
  for encoding in ("utf-8-sig", "utf-16", "utf-32"):
    case = Case("qwen3", _encoded(file, encoding), file)
    yield f"config is {encoding}", case
  yield "no config", Case("qwen3", _no_config, "has no config.json")
  yield "config is a folder", Case("qwen3", _folder_config, "config.json")
  for field in (
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
      "num_attention_heads",
      "num_key_value_heads",
      "head_dim",
      "max_position_embeddings",
  ):
    for value in (0, -4, 2.5, "16", True, [16], 10**12):
      case = Case("qwen3", _config(**{field: value}), field)
      yield f"{field} {value!r}", case
  for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
    yield f"{field} null", Case("qwen3", _config(**{field: None}), field)
  yield "layers without end", Case(
      "qwen3", _config(num_hidden_layers=10**9), "num_hidden_layers"
  )
  yield "a layer more", Case(
      "llama3_rope", _config(num_hidden_layers=3), "lacks the tensor"
  )
  yield "a layer less", Case(
      "llama3_rope", _config(num_hidden_layers=1), "has the tensor"
  )
  yield "layer types of fewer layers", Case(
      "qwen3", _config(layer_types=["full_attention"]), "layer_types"
  )
  yield "layer types that slide", Case(
      "qwen3", _config(layer_types=["sliding_attention"] * 2), "layer_types"
  )
  yield "layer types that are words", Case(
      "qwen3", _config(layer_types="full_attention"), "config.json"
  )
  yield "heads that do not group", Case(
      "llama3_rope", _config(num_key_value_heads=3), "num_key_value_heads"
  )
  yield "odd heads", Case("qwen3", _config(head_dim=5), "5")
  yield "heads of one channel", Case("qwen3", _config(head_dim=1), "1")
  yield "another width", Case("qwen3", _config(hidden_size=24), "has shape")
  yield "another vocabulary", Case("qwen3", _config(vocab_size=50), "has shape")
  for value in (48, "0"):
    case = Case("qwen3", _config(pad_token_id=value), "pad_token_id")
    yield f"a padding {value!r}", case
  for value in (-1.0, float("nan"), float("inf"), "small", None, 1):
    case = Case("qwen3", _config(rms_norm_eps=value), "rms_norm_eps")
    yield f"rms_norm_eps {value!r}", case
  for kind in ("gemma3", "", None, ["qwen3"], {"a": 1}, 3):
    says = "config.json" if isinstance(kind, list | dict) else "model type"
    yield f"model type {kind!r}", Case("qwen3", _config(model_type=kind), says)
  for field, value in {
      "hidden_act": "gelu",
      "attention_bias": True,
      "use_sliding_window": True,
      "is_causal": False,
      "quantization_config": {"quant_method": "fp8"},
      "tie_word_embeddings": "yes",
      "attention_dropout": 0.5,
  }.items():
    case = Case("qwen3", _config(**{field: value}), field)
    yield f"{field} {value!r}", case
  yield "is_causal null", Case("qwen3", _config(is_causal=None), "is_causal")
  for value in (0, "false", []):
    case = Case("qwen3", _config(is_causal=value), "is_causal")
    yield f"is_causal {value!r}", case
  yield "is_causal of llama", Case(
      "llama3_rope", _config(is_causal=False), "is_causal"
  )
  yield "more heads than channels", Case(
      "linear_rope", _without("head_dim", num_attention_heads=64), "config.json"
  )
  yield "more key heads than heads", Case(
      "qwen3", _config(num_key_value_heads=8), "num_key_value_heads"
  )
  yield "hidden_size inf", Case(
      "qwen3", _config(hidden_size=float("inf")), "hidden_size"
  )
  yield "mlp_bias", Case("llama3_rope", _config(mlp_bias=True), "mlp_bias")
  yield "other weights named", Case(
      "qwen3", _config(transformers_weights="x.safetensors"), "transformers_w"
  )
  layer = {"1": {"num_attention_heads": 2}}
  yield "a layer of its own", Case(
      "qwen3", _config(per_layer_config=layer), "heterogeneous"
  )
  yield "as another family", Case(
      "qwen2", _config(model_type="llama"), "has the tensor"
  )
  yield "as a family with norms", Case(
      "qwen2", _config(model_type="qwen3", head_dim=4), "lacks the tensor"
  )
  yield "no_rope_layers of fewer", Case(
      "smollm3", _config(no_rope_layers=[1]), "no_rope_layers"
  )
  yield "no_rope_layers of 2", Case(
      "smollm3", _config(no_rope_layers=[1, 2]), "no_rope_layers"
  )
  # What is odd, and means something.
  yield "is_causal true", Case("qwen3", _config(is_causal=True))
  yield "unknown fields", Case("qwen3", _config(my_field=[1], rope=3))
  yield "as llama", Case("linear_rope", _config(architectures=None))
  yield "head_dim null", Case("linear_rope", _config(head_dim=None))
  yield "no head_dim", Case("linear_rope", _without("head_dim"))
  yield "norms without epsilon", Case("qwen3", _config(rms_norm_eps=0.0))
  yield "longer no_rope_layers", Case(
      "smollm3", _config(no_rope_layers=[0, 1, 1])
  )
  yield "no_rope_layers of the interval", Case(
      "smollm3", _without("no_rope_layers", no_rope_layer_interval=1)
  )
  yield "dtype float16", Case("qwen3", _config(dtype="float16"))
  yield "old dtype", Case("qwen3", _without("dtype", torch_dtype="bfloat16"))


def _ropes() -> Iterator[tuple[str, Case]]:
  """Rotary positions, with the names of transformers 4 and 5."""

  def new(says="", base="qwen3", **changes):
    return Case(base, _config(**changes), says)

  def old(says="", base="qwen3", **changes):
    return Case(base, _without("rope_parameters", **changes), says)

  rope = "rope_parameters"
  yield "rope given twice", new(
      rope, rope_scaling=_LINEAR, rope_parameters=_LLAMA3
  )
  yield "rope given twice, alike", new(
      rope_scaling=_LINEAR, rope_parameters=_LINEAR
  )
  for base in ("qwen3", "llama3_rope", "smollm3"):
    nested = {"full_attention": _lacks(_LINEAR)}
    case = Case(base, _config(rope_parameters=nested), "full_attention")
    yield f"rope by layer type, {base}", case
    nested |= {"rope_type": "default", "rope_theta": 100.0}
    case = Case(base, _config(rope_parameters=nested), "full_attention")
    yield f"rope by layer type and for all, {base}", case
  yield "theta null", old("rope_theta", rope_theta=None)
  yield "theta null inside", new(
      "rope_theta", rope_parameters=_LINEAR | {"rope_theta": None}
  )
  yield "theta null, and nothing else", new(
      "rope_theta", "llama3_rope", rope_theta=None, rope_parameters=None
  )
  yield "rope given twice, thetas differ", new(
      rope,
      rope_scaling=_LINEAR | {"rope_theta": 5.0},
      rope_parameters=_LINEAR,
  )
  yield "rope by two layer types", new(
      "full_attention",
      rope_parameters={
          "full_attention": _LINEAR,
          "sliding_attention": _LLAMA3,
      },
  )
  yield "theta null outside", new(rope_theta=None)
  yield "theta outside alone", old(rope_theta=50.0)
  yield "theta in both", new(rope_theta=50.0)
  yield "no theta", old()
  yield "no theta, smollm3", old(base="smollm3")
  yield "theta of rope_scaling", old(rope_scaling=_LINEAR)
  yield "theta beside rope_scaling", old(
      rope_theta=50.0, rope_scaling=_lacks(_LINEAR, "rope_theta")
  )
  yield "theta beside and inside", old(rope_theta=50.0, rope_scaling=_LINEAR)
  for value in (0, -1.0, "10000", float("nan"), float("inf"), True, [1.0]):
    case = new("rope_", rope_parameters=_LINEAR | {"rope_theta": value})
    yield f"theta {value!r}", case
  yield "rope null", new(rope_parameters=None)
  yield "rope empty", new(rope_parameters={})
  yield "rope of words", new("config.json", rope_parameters="yarn")
  yield "rope a list", new("config.json", rope_parameters=[_LINEAR])
  yield "rope_scaling null", old(rope_scaling=None, rope_theta=50.0)
  yield "rope of an unknown type", new(
      "rope_type 'spiral'", rope_parameters=_LINEAR | {"rope_type": "spiral"}
  )
  for kind in ("dynamic", "longrope", "proportional"):
    case = new("rope_", rope_parameters=_LINEAR | {"rope_type": kind})
    yield f"rope {kind}", case
  yield "type", old(
      rope_theta=50.0, rope_scaling={"type": "linear", "factor": 2.0}
  )
  yield "type and rope_type", old(
      rope_scaling=_LINEAR | {"type": "dynamic"}
  )
  yield "linear, no factor", new("factor", rope_parameters=_lacks(
      _LINEAR, "factor"
  ))
  for value in (0, -2.0, "2", None, float("nan"), True):
    case = new("factor", rope_parameters=_LINEAR | {"factor": value})
    yield f"linear factor {value!r}", case
  yield "linear factor below 1", new(rope_parameters=_LINEAR | {"factor": 0.5})
  yield "part of the channels", new(
      "partial_rotary_factor", partial_rotary_factor=0.5
  )
  yield "part of the channels inside", new(
      "partial_rotary_factor",
      rope_parameters=_LINEAR | {"partial_rotary_factor": 0.5},
  )
  yield "all of the channels", new(partial_rotary_factor=1.0)
  for base in ("llama3_rope", "qwen3"):
    for length in (16, 32):
      yield f"llama3, length {length} outside, {base}", new(
          base=base,
          rope_parameters=_lacks(_LLAMA3, "original_max_position_embeddings"),
          original_max_position_embeddings=length,
      )
    yield f"llama3, two lengths, {base}", new(
        base=base,
        rope_parameters=_LLAMA3,
        original_max_position_embeddings=32,
    )
    yield f"llama3, no length, {base}", new(
        base=base,
        rope_parameters=_lacks(_LLAMA3, "original_max_position_embeddings"),
    )
  yield "yarn, length outside", new(
      base="yarn",
      rope_parameters=_lacks(_yarn(), "original_max_position_embeddings"),
      original_max_position_embeddings=16,
  )
  yield "yarn, two lengths", new(
      base="yarn",
      rope_parameters=_yarn(),
      original_max_position_embeddings=32,
  )
  yield "yarn, old names", old(
      base="yarn",
      rope_theta=100.0,
      rope_scaling={
          "type": "yarn",
          "factor": 4.0,
          "original_max_position_embeddings": 16,
      },
  )
  yield "yarn, length outside null", new(
      "original_max_position_embeddings",
      base="yarn",
      rope_parameters=_yarn(),
      original_max_position_embeddings=None,
  )
  yield "yarn, length a word", new(
      "config.json",
      base="yarn",
      rope_parameters=_yarn(original_max_position_embeddings="16"),
  )
  yield "yarn, factor null", new(
      base="yarn", rope_parameters=_yarn(factor=None)
  )
  yield "yarn, no truncation", new(
      base="yarn", rope_parameters=_yarn(truncate=False)
  )
  yield "yarn, attention factor", new(
      base="yarn", rope_parameters=_yarn(attention_factor=0.5)
  )
  yield "yarn, mscales", new(
      base="yarn", rope_parameters=_yarn(mscale=1.0, mscale_all_dim=0.5)
  )
  yield "llama3 without its numbers", new(
      "factor", rope_parameters=_lacks(_LLAMA3, "low_freq_factor")
  )
  yield "llama3, numbers of words", new(
      "config.json", rope_parameters=_LLAMA3 | {"low_freq_factor": "1"}
  )
  yield "llama3, equal numbers", new(
      "high_freq_factor", rope_parameters=_LLAMA3 | {"high_freq_factor": 1.0}
  )
  yield "llama3, numbers the wrong way round", new(
      "high_freq_factor", rope_parameters=_LLAMA3 | {"high_freq_factor": 0.5}
  )


def _generations() -> Iterator[tuple[str, Case]]:
  """What says where an answer ends."""
  file = GENERATION
  for name, content in {
      "empty": "",
      "cut": '{"eos_token_id": [1,',
      "a list": "[1, 2]",
      "null": "null",
      "a number": "2",
      "no JSON": "eos_token_id = 2",
      "latin-1": b'{"name": "\xe9"}',
      "zeros": b"\0" * 64,
      "deep": "[" * 100_000,
      "an object and a zero": b'{"eos_token_id": 3}\0',
      "two objects": "{}{}",
  }.items():
    yield f"generation is {name}", Case("qwen3", _file(file, content), file)
  for encoding in ("utf-8-sig", "utf-16"):
    case = Case("qwen3", _encoded(file, encoding), file)
    yield f"generation is {encoding}", case
  for value in (
      "3", ["3"], [1, "3"], 48, [1, 48], -1, [-1], 1.0, [1.5], True, [None],
      [[1]], {"a": 1}, 10**30, float("nan"), "\ud800", [[]],
  ):
    text = json.dumps({"eos_token_id": value})
    case = Case("qwen3", _file(file, text), "eos_token_id")
    yield f"generation stops at {value!r}", case
  for value in (48, [1, 48], -1, [-1], "3", ["3"]):
    case = Case("qwen3", _config(eos_token_id=value), "eos_token_id")
    yield f"config stops at {value!r}", case
  for value in (None, [], 3, [3, 4]):
    text = json.dumps({"eos_token_id": value})
    yield f"generation stops at {value!r}", Case("qwen3", _file(file, text))
  yield "generation says nothing", Case("qwen3", _file(file, "{}"))
  yield "config stops at two", Case("qwen3", _config(eos_token_id=[3, 4]))


def _files() -> Iterator[tuple[str, Case]]:
  """Weights and indices."""
  for value in (np.nan, np.inf, -np.inf):
    for name in (TABLE, QUERY, "model.norm.weight"):
      case = Case("qwen3", _number(name, value), name)
      yield f"{value} in {name}", case
  yield "NaN in a head", Case("qwen2", _number(HEAD, np.nan), HEAD)
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
    name = np.dtype(dtype).name
    case = Case("qwen3", _both(_all(dtype), _number(QUERY, np.nan)), QUERY)
    yield f"NaN in {name}", case
    yield f"all in {name}", Case("qwen3", _all(dtype))
  for dtype in (
      np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_,
      ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
  ):
    name = np.dtype(dtype).name
    yield f"a tensor of {name}", Case("qwen3", _narrow(QUERY, dtype), QUERY)
  yield "all of int8", Case("qwen3", _all(np.int8), "dtype")
  for dtype in (np.uint16, np.uint64, np.complex64):
    name = np.dtype(dtype).name
    yield f"a tensor of {name}", Case("qwen3", _narrow(QUERY, dtype), QUERY)
  yield "all of float8", Case("qwen3", _all(ml_dtypes.float8_e4m3fn), "dtype")
  yield "a norm of booleans", Case(
      "qwen3", _narrow("model.norm.weight", np.bool_), "model.norm.weight"
  )
  for base, value, name in (
      ("qwen2", np.nan, "model.layers.0.self_attn.q_proj.bias"),
      ("qwen3", np.inf, "model.layers.0.self_attn.k_norm.weight"),
      ("llama3_rope", -np.inf, "model.layers.1.mlp.down_proj.weight"),
  ):
    yield f"{value} in {name}", Case(base, _number(name, value), name)
  yield "inf in float16", Case(
      "qwen3", _both(_all(np.float16), _number(QUERY, np.inf)), QUERY
  )
  yield "a scaled head, tied", Case("qwen3", _head(lambda x: x * 1.001), HEAD)
  yield "a head of NaN, tied", Case("qwen3", _head(lambda x: x * np.nan), HEAD)
  yield "another head, tied", Case("qwen3", _head(lambda x: x + 1), HEAD)
  yield "another head at the end", Case(
      "qwen3", _head(lambda x: np.concatenate([x[:-1], x[:1]])), HEAD
  )
  yield "a shorter head, tied", Case("qwen3", _head(lambda x: x[:-1]), HEAD)
  yield "a head of zeros, tied", Case("qwen3", _head(np.zeros_like), HEAD)
  yield "the head again, tied", Case("qwen3", _head(np.copy))
  yield "a head of int8, tied", Case(
      "qwen3", _head(lambda x: x.astype(np.int8)), HEAD
  )
  yield "another head, untied", Case(
      "qwen3",
      _both(
          _head(lambda x: x[::-1].copy()), _config(tie_word_embeddings=False)
      ),
  )
  yield "no head, untied", Case(
      "qwen3", _config(tie_word_embeddings=False), HEAD
  )
  yield "a head, now tied", Case(
      "qwen2", _config(tie_word_embeddings=True), HEAD
  )
  yield "frequencies", Case(
      "qwen3",
      _weights(
          lambda t: t.update({
              "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)
          })
      ),
  )
  yield "a tensor lost", Case("qwen3", _weights(lambda t: t.pop(QUERY)), QUERY)
  yield "a tensor more", Case(
      "qwen3",
      _weights(lambda t: t.update({QUERY + "_scale": np.ones(1)})),
      QUERY + "_scale",
  )
  yield "a tensor transposed", Case(
      "qwen3", _tensor(QUERY, lambda x: x.T.copy()), QUERY
  )
  yield "a tensor of no dimension", Case(
      "qwen3", _tensor("model.norm.weight", lambda x: x[0, ...]), "model.norm"
  )
  yield "a tensor of nothing", Case(
      "qwen3", _tensor(QUERY, lambda x: x[:0]), QUERY
  )
  yield "names with a prefix", Case(
      "qwen3",
      _weights(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)]),
      "lacks the tensor",
  )
  for size in (0, 4, 8, 20, 1000, 5000):
    yield f"weights cut at {size}", Case("qwen3", _cut(WEIGHTS, size), WEIGHTS)
  yield "weights of text", Case(
      "qwen3", _file(WEIGHTS, "version https://git-lfs"), WEIGHTS
  )
  yield "weights of a page", Case(
      "qwen3", _file(WEIGHTS, "<html>" * 100), WEIGHTS
  )
  yield "weights of zeros", Case("qwen3", _file(WEIGHTS, b"\0" * 99), WEIGHTS)
  yield "a header without end", Case(
      "qwen3", _file(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS
  )
  yield "a header that is a list", Case(
      "qwen3", _file(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), WEIGHTS
  )
  yield "no weights", Case("qwen3", _rename, WEIGHTS)
  yield "weights are a folder", Case("qwen3", _folder_weights, WEIGHTS)
  # Indices.
  yield "two files", Case("qwen3", _split(lambda *_: None))
  yield "a file in a folder", Case("qwen3", _split(_subfolder))
  yield "an index beside other weights", Case(
      "qwen2", _split(_stray_single), "has both"
  )
  yield "an index beside the same weights", Case(
      "qwen3", _split(_stray_single), "has both"
  )
  yield "a tensor in two files", Case("qwen3", _split(_twice), "both hold")
  yield "a file outside", Case("qwen3", _split(_outside), INDEX)
  for file in ("../x", "/etc/passwd", "", ".", "a/../../b", 3, None):
    yield f"an index to {file!r}", Case("qwen3", _move(QUERY, file), INDEX)
  yield "an index to no file", Case(
      "qwen3", _move(QUERY, "none.safetensors"), "none.safetensors"
  )
  yield "an index to the other file", Case(
      "qwen3", _move("made.up", "model-00001-of-00002.safetensors"), "made.up"
  )
  single = json.dumps({"weight_map": {TABLE: WEIGHTS}})
  yield "an index of the one file", Case("qwen3", _file(INDEX, single))
  for name, content in {
      "empty": "",
      "cut": '{"weight_map": {',
      "a list": "[]",
      "of nothing": "{}",
      "of no files": '{"weight_map": {}}',
      "of a list": '{"weight_map": ["a"]}',
      "of null": '{"weight_map": null}',
      "with a mark": b'\xef\xbb\xbf{"weight_map": {}}',
      "UTF-16": '{"weight_map": {}}'.encode("utf-16"),
      "of NaN": '{"weight_map": {"a": NaN}}',
      "of a file in a list": '{"weight_map": {"a": ["x"]}}',
  }.items():
    yield f"index is {name}", Case("qwen3", _file(INDEX, content), INDEX)


CASES = {
    name: case
    for group in (_configs, _ropes, _generations, _files)
    for name, case in group()
}


def make(name: str, directory: pathlib.Path) -> pathlib.Path:
  """Writes the directory of a case."""
  case = CASES[name]
  shutil.copytree(GOLDEN / case.base, directory)
  case.damage(directory)
  return directory


def make_at_random(seed: int, directory: pathlib.Path) -> pathlib.Path:
  """Writes a directory with a file that is cut, or that has another byte."""
  rng = random.Random(seed)
  base = rng.choice(("qwen3", "qwen2", "llama3_rope", "smollm3", "yarn"))
  shutil.copytree(GOLDEN / base, directory)
  name = rng.choice(("config.json", GENERATION, WEIGHTS, "config.json"))
  file = directory / name
  data = bytearray(file.read_bytes())
  # Of the weights the header alone, as another number may well be a number.
  size = len(data)
  if name == WEIGHTS:
    size = 8 + int.from_bytes(data[:8], "little")
  at = rng.randrange(size)
  if rng.random() < 0.3:
    data = data[:at]
  else:
    for _ in range(rng.randrange(1, 4)):
      other = rng.choice(b'0123456789-."{}[],: aefnt\x00\xff')
      data[rng.randrange(size)] = other
  file.write_bytes(data)
  return directory


# What a random config may say of rotary positions, and how often it does.
_INSIDE = {
    "rope_type": (0.5, ("default", "linear", "llama3", "yarn")),
    "type": (0.3, ("linear", "llama3", "yarn")),
    "rope_theta": (0.7, (10.0, 100.0, 10_000, None)),
    "factor": (0.8, (1.0, 2, 4.0, 0.5, None)),
    "original_max_position_embeddings": (0.5, (8, 16, 64, None)),
    "low_freq_factor": (0.5, (1.0, 2)),
    "high_freq_factor": (0.5, (4.0, 2)),
    "attention_factor": (0.2, (0.5, 1.3, None, 0)),
    "beta_fast": (0.2, (32, 4.0, 0, None)),
    "beta_slow": (0.2, (1, 0.5, 0)),
    "mscale": (0.2, (1.0, 0, 0.7)),
    "mscale_all_dim": (0.2, (1.0, 0, 0.3)),
    "truncate": (0.1, (True, False)),
    "partial_rotary_factor": (0.1, (1.0, 0.5)),
}
_OUTSIDE = {
    "rope_theta": (0.4, (10.0, 1000.0, None)),
    "original_max_position_embeddings": (0.3, (8, 16, 32, None)),
    "max_position_embeddings": (0.2, (64, 128, 40)),
    "partial_rotary_factor": (0.1, (1.0, 0.5, None)),
    "num_key_value_heads": (0.1, (None, 2, 4)),
}


def make_rope_at_random(seed: int, directory: pathlib.Path) -> pathlib.Path:
  """Writes a directory whose config says anything of rotary positions."""
  rng = random.Random(seed)
  base = rng.choice(("qwen3", "qwen2", "llama3_rope", "smollm3", "yarn"))
  shutil.copytree(GOLDEN / base, directory)

  def some(choices):
    return {
        name: rng.choice(values)
        for name, (often, values) in choices.items()
        if rng.random() < often
    }

  changes = some(_OUTSIDE)
  if rng.random() < 0.4:
    changes["rope_scaling"] = some(_INSIDE)
  if rng.random() < 0.6:
    inside = some(_INSIDE)
    nested = rng.random() < 0.1
    inside = {"full_attention": inside} if nested else inside
    _config(rope_parameters=inside, **changes)(directory)
  else:
    _without("rope_parameters", **changes)(directory)
  return directory


def torch_logits(directory: pathlib.Path) -> np.ndarray:
  """Returns transformers' float32 logits of the last of `TOKENS`."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager"
  )
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits[:, -LAST:].numpy()


def _make_logits() -> None:
  import tempfile

  found = {}
  with tempfile.TemporaryDirectory() as parent:
    for number, (name, case) in enumerate(CASES.items()):
      if not case.says:
        directory = make(name, pathlib.Path(parent) / str(number))
        found[name] = torch_logits(directory)
  np.savez_compressed(LOGITS, **found)
  print(f"{len(found)} of {len(CASES)} load")


if __name__ == "__main__":
  if len(sys.argv) > 1:
    for case_number, case_name in enumerate(CASES):
      make(case_name, pathlib.Path(sys.argv[1]) / f"{case_number:03}")
  else:
    _make_logits()
