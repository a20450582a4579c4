"""Hugging Face model directories in and out: config and safetensors.

Only safetensors are read, and code from a model's repository is never run.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import huggingface_hub
import jax
from jax.experimental import multihost_utils
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from prefix_distill import assets
from prefix_distill.config import UserError
from prefix_distill.models import config as model_config
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params

# Bytes of a file of an export; larger models are split, as the hub does it.
_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What an export takes along from the model it was made of.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip

Index = tuple[slice, ...]


class ModelFilesError(UserError):
  """A model directory that is missing, incomplete or of another kind."""


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How a parameter's axes lie in the file.

  Attributes:
    index: our index (and H) to the index in the file.
    read: the file's block (and H) to ours.
    write: our array to the file's.
  """

  index: Callable[[Index, int], Index]
  read: Callable[[np.ndarray, int], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


def _rows(heads: slice, head_dim: int) -> slice:
  return slice(heads.start * head_dim, heads.stop * head_dim)


_SAME = _Layout(lambda i, h: i, lambda x, h: x, lambda x: x)
# [in, out] here, [out, in] in torch.
_MATRIX = _Layout(lambda i, h: i[::-1], lambda x, h: x.T, lambda x: x.T)
# [D, N, H] here, [N * H, D] in torch.
_TO_HEADS = _Layout(
    lambda i, h: (_rows(i[1], h), i[0]),
    lambda x, h: x.reshape(-1, h, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
)
# [N, H, D] here, [D, N * H] in torch.
_FROM_HEADS = _Layout(
    lambda i, h: (i[2], _rows(i[0], h)),
    lambda x, h: x.reshape(x.shape[0], -1, h).transpose(1, 2, 0),
    lambda x: x.transpose(2, 0, 1).reshape(x.shape[2], -1),
)
# [N, H] here, [N * H] in torch.
_HEAD_BIAS = _Layout(
    lambda i, h: (_rows(i[0], h),),
    lambda x, h: x.reshape(-1, h),
    lambda x: x.reshape(-1),
)

# The one table of names. Ours -> (theirs, layout); a layer's number goes into
# the braces.
_NAMES = {
    "embed/weight": ("model.embed_tokens.weight", _SAME),
    "final_norm/scale": ("model.norm.weight", _SAME),
    "head/weight": ("lm_head.weight", _SAME),
} | {
    f"layers/{ours}": (f"model.layers.{{}}.{theirs}", layout)
    for ours, theirs, layout in (
        ("attention_norm/scale", "input_layernorm.weight", _SAME),
        ("mlp_norm/scale", "post_attention_layernorm.weight", _SAME),
        ("attention/query", "self_attn.q_proj.weight", _TO_HEADS),
        ("attention/key", "self_attn.k_proj.weight", _TO_HEADS),
        ("attention/value", "self_attn.v_proj.weight", _TO_HEADS),
        ("attention/out", "self_attn.o_proj.weight", _FROM_HEADS),
        ("attention/query_bias", "self_attn.q_proj.bias", _HEAD_BIAS),
        ("attention/key_bias", "self_attn.k_proj.bias", _HEAD_BIAS),
        ("attention/value_bias", "self_attn.v_proj.bias", _HEAD_BIAS),
        ("attention/query_norm/scale", "self_attn.q_norm.weight", _SAME),
        ("attention/key_norm/scale", "self_attn.k_norm.weight", _SAME),
        ("mlp/gate", "mlp.gate_proj.weight", _MATRIX),
        ("mlp/up", "mlp.up_proj.weight", _MATRIX),
        ("mlp/down", "mlp.down_proj.weight", _MATRIX),
    )
}  # fmt: skip


def resolve(path: str) -> pathlib.Path:
  """Returns the local directory of a model.

  Args:
    path: a directory, `bundled:NAME`, or a hub id, which is downloaded.

  Raises:
    ModelFilesError: there is no such model.
  """
  if path.startswith("bundled:"):
    try:
      return assets.path(path.removeprefix("bundled:"))
    except KeyError as error:
      raise ModelFilesError(f"{path}: {error.args[0]}") from error
  local = pathlib.Path(path)
  if local.is_dir():
    return local
  if path.startswith((".", "/", "~")) or path.count("/") != 1:
    raise ModelFilesError(
        f"{path} is not a directory; give the directory of a Hugging Face"
        " model, a hub id (OWNER/NAME) or bundled:NAME."
    )
  try:
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    )
  except Exception as error:  # The hub's client raises many kinds.
    reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
    raise ModelFilesError(
        f"{path} is neither a directory here nor could it be downloaded"
        f" ({reason}); check the name, the network and HF_TOKEN."
    ) from error


def read_config(path: str) -> ModelConfig:
  """Reads a model's architecture.

  Raises:
    ModelFilesError: no readable config.json.
    UnsupportedModelError: an architecture this package does not implement.
  """
  directory = resolve(path)
  if not (directory / "config.json").is_file():
    raise ModelFilesError(
        f"{directory} has no config.json; give the directory of a Hugging Face"
        " model."
    )
  try:
    raw = json.loads((directory / "config.json").read_text())
    kind = raw.get("model_type")
    if kind not in model_config.FAMILIES:
      raise model_config.UnsupportedModelError(
          f"{path}: model type {kind!r} is not implemented;"
          f" {', '.join(model_config.FAMILIES)} are."
      )
    config = transformers.AutoConfig.from_pretrained(
        directory, trust_remote_code=False
    )
  except (json.JSONDecodeError, OSError) as error:
    raise ModelFilesError(
        f"{directory}/config.json cannot be read ({error}); download it again."
    ) from error
  return model_config.from_hf(config, path)


class _Weights:
  """The tensors of a model directory, read a slice at a time."""

  def __init__(self, directory: pathlib.Path):
    self._files = {}
    for file in self._file_names(directory):
      path = directory / file
      if not path.is_file():
        raise ModelFilesError(
            f"{path} is missing; the download is incomplete, so fetch the"
            " model again."
        )
      try:
        handle = safetensors.safe_open(path, "np")
      except Exception as error:
        raise ModelFilesError(
            f"{path} is not a whole safetensors file ({error}); fetch it again."
        ) from error
      for name in handle.keys():
        self._files[name] = handle
    self._directory = directory

  @staticmethod
  def _file_names(directory: pathlib.Path) -> list[str]:
    if (directory / _INDEX).is_file():
      weight_map = json.loads((directory / _INDEX).read_text())["weight_map"]
      return sorted(set(weight_map.values()))
    if (directory / _SINGLE).is_file():
      return [_SINGLE]
    raise ModelFilesError(
        f"{directory} has neither {_SINGLE} nor {_INDEX}; only safetensors are"
        " read, so convert the weights or finish the download."
    )

  def names(self) -> set[str]:
    return set(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def read(self, name: str, index: Index) -> np.ndarray:
    return self._files[name].get_slice(name)[index]


def _hf_names(ours: str, num_layers: int) -> list[str]:
  theirs = _NAMES[ours][0]
  if "{}" not in theirs:
    return [theirs]
  return [theirs.format(i) for i in range(num_layers)]


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _check_tensors(weights: _Weights, model: Model, path: str) -> None:
  """Refuses missing, unexpected and misshapen tensors, by name."""
  config = model.config
  wanted = {}
  for ours, leaf in _leaves(model.abstract_params()):
    layout = _NAMES[ours][1]
    shape = leaf.shape[1:] if ours.startswith("layers/") else leaf.shape
    whole = tuple(slice(0, n) for n in shape)
    stops = tuple(s.stop for s in layout.index(whole, config.head_dim))
    for name in _hf_names(ours, config.num_layers):
      wanted[name] = stops
  found = weights.names()
  for name in wanted:
    if name not in found:
      raise ModelFilesError(
          f"{path} lacks the tensor {name}, which its config.json calls for;"
          " the download is incomplete or the config is another model's."
      )
    if weights.shape(name) != wanted[name]:
      raise ModelFilesError(
          f"{path}: tensor {name} has shape {weights.shape(name)}, but its"
          f" config.json says {wanted[name]}; the two do not belong together."
      )
  harmless = {"lm_head.weight"} if config.tied else set()
  for name in sorted(found - set(wanted) - harmless):
    if not name.endswith("rotary_emb.inv_freq"):
      raise ModelFilesError(
          f"{path} has the tensor {name}, which this package would ignore; it"
          f" does not implement this variant of {config.family}."
      )


def check_weights(path: str, config: ModelConfig) -> None:
  """Checks that all tensors are there, without reading them.

  Raises:
    ModelFilesError: the files are incomplete or do not fit the config.
  """
  _check_tensors(_Weights(resolve(path)), Model(config), path)


def load_params(
    path: str, model: Model, shardings: Any, dtype: str = "float32"
) -> Params:
  """Reads weights straight into their shards.

  Each device's block is read from the file by itself, so a host holds no more
  than its own shards and the one that is being read.

  Args:
    path: see `resolve`.
    model: the architecture that `read_config` gave.
    shardings: a tree like the parameters'.
    dtype: what to convert to.

  Raises:
    ModelFilesError: the files are incomplete or do not fit the config.
  """
  weights = _Weights(resolve(path))
  _check_tensors(weights, model, path)
  target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  head_dim = model.config.head_dim

  def load(tree_path, leaf, sharding):
    ours = jax.tree_util.keystr(tree_path, simple=True, separator="/")
    layout = _NAMES[ours][1]
    names = _hf_names(ours, model.config.num_layers)
    stacked = ours.startswith("layers/")

    def read(name: str, index: Index) -> np.ndarray:
      block = weights.read(name, layout.index(index, head_dim))
      return layout.read(block, head_dim).astype(target)

    def block(index: Index) -> np.ndarray:
      index = tuple(
          slice(*s.indices(n)[:2])
          for s, n in zip(index, leaf.shape, strict=True)
      )
      if not stacked:
        return read(names[0], index)
      out = np.empty([s.stop - s.start for s in index], target)
      for i, name in enumerate(names[index[0]]):
        out[i] = read(name, index[1:])
      return out

    return jax.make_array_from_callback(leaf.shape, sharding, block)

  return jax.tree_util.tree_map_with_path(
      load, model.abstract_params(), shardings
  )


def _to_host(array: jax.Array) -> np.ndarray:
  if jax.process_count() > 1:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def _tensors(params: Params, dtype: np.dtype) -> Iterator[tuple[str, Any]]:
  """Yields names in the file and arrays, one layer's tensor at a time."""
  for ours, leaf in _leaves(params):
    layout = _NAMES[ours][1]
    for i, name in enumerate(_hf_names(ours, leaf.shape[0])):
      part = leaf[i] if ours.startswith("layers/") else leaf
      array = layout.write(_to_host(part)).astype(dtype)
      yield name, np.ascontiguousarray(array)


def _write_weights(
    params: Params, directory: pathlib.Path, dtype: np.dtype, writes: bool
) -> None:
  total = sum(x.size * dtype.itemsize for x in jax.tree.leaves(params))
  count = math.ceil(total / _SHARD_BYTES)
  files, names, pending, size = [], {}, {}, 0

  def flush():
    file = f"part-{len(files)}"
    if writes:
      safetensors.numpy.save_file(
          pending, directory / file, metadata={"format": "pt"}
      )
    files.append(file)
    names.update(dict.fromkeys(pending, len(files) - 1))
    pending.clear()

  for name, array in _tensors(params, dtype):
    if pending and count > 1 and size + array.nbytes > _SHARD_BYTES:
      flush()
      size = 0
    pending[name] = array
    size += array.nbytes
  flush()
  if not writes:
    return
  if len(files) == 1:
    (directory / files[0]).rename(directory / _SINGLE)
    return
  final = [
      f"model-{i + 1:05}-of-{len(files):05}.safetensors"
      for i in range(len(files))
  ]
  for old, new in zip(files, final, strict=True):
    (directory / old).rename(directory / new)
  weight_map = {name: final[i] for name, i in names.items()}
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / _INDEX).write_text(json.dumps(index, indent=2))


def _token_ids(directory: pathlib.Path) -> dict[str, Any]:
  """The special tokens that a config repeats from the tokenizer."""
  settings = json.loads((directory / "config.json").read_text())
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  return {name: settings[name] for name in names if name in settings}


def export(
    params: Params,
    source: str,
    tokenizer: str,
    directory: pathlib.Path,
    dtype: str,
) -> None:
  """Writes a Hugging Face model directory; every process must call it.

  The directory appears whole or not at all.

  Args:
    params: the weights.
    source: the model they were made of, whose config goes along.
    tokenizer: the model whose tokenizer, template and generation config do.
    directory: where to; replaced if it exists.
    dtype: what the weights are stored in.
  """
  origin, companion = resolve(source), resolve(tokenizer)
  partial = directory.with_name(directory.name + ".partial")
  writes = jax.process_index() == 0
  if writes:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = json.loads((origin / "config.json").read_text())
    settings.pop("torch_dtype", None)
    settings["dtype"] = dtype
    settings |= _token_ids(companion)
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in _COMPANIONS:
      if (companion / name).is_file():
        shutil.copyfile(companion / name, partial / name)
  target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  _write_weights(params, partial, target, writes)
  if writes:
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
