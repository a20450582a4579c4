"""Reads and writes Hugging Face model directories: config and safetensors.

Only safetensors are read, and code from a model's repository is never run.
"""

from collections.abc import Iterator
import json
import pathlib
import shutil
from typing import Any

import huggingface_hub
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from prefix_distill import assets
from prefix_distill import sharding
from prefix_distill.errors import UserError
from prefix_distill.models import config as model_config
from prefix_distill.models import families
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.families import Family
from prefix_distill.models.families.family import Index
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Bytes of a file of an export; larger models are split, as the hub does it.
_SHARD_BYTES = 5_000_000_000
# What an export takes along from the model it was made of.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What an export's config.json repeats from the tokenizer.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class ModelFilesError(UserError):
  """A model directory that is missing, incomplete or of another kind."""


def resolve(path: str, weights: bool = False) -> pathlib.Path:
  """Returns the local directory of a model.

  Args:
    path: a directory, `bundled:NAME`, or a hub id, which is downloaded.
    weights: whether to download a hub model's weights, or only what is small.

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
  wanted = ["*.json", "*.txt", "*.jinja"]
  if weights:
    wanted.append("*.safetensors")
  try:
    return pathlib.Path(
        huggingface_hub.snapshot_download(path, allow_patterns=wanted)
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
    # Before transformers sees a model type that it may know and we do not.
    families.find(_settings(directory).get("model_type"), path)
    config = transformers.AutoConfig.from_pretrained(
        directory, trust_remote_code=False
    )
  except UserError:
    raise
  except Exception as error:  # transformers' validation raises many kinds.
    reason = " ".join(str(error).split())
    raise ModelFilesError(
        f"{directory}/config.json cannot be read ({reason}); download it again."
    ) from error
  return model_config.from_hf(config, path)


def _settings(directory: pathlib.Path) -> dict[str, Any]:
  return json.loads((directory / "config.json").read_text())


def _stacked(ours: str) -> bool:
  """Whether a parameter has an axis of layers, and the file has it not."""
  return ours.startswith("layers/")


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
    if (directory / INDEX).is_file():
      try:
        index = json.loads((directory / INDEX).read_text())
        return sorted(set(index["weight_map"].values()))
      except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelFilesError(
            f"{directory / INDEX} is not a whole index ({error!r}); fetch it"
            " again."
        ) from error
    if (directory / SINGLE).is_file():
      return [SINGLE]
    raise ModelFilesError(
        f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors are"
        " read, so convert the weights or finish the download."
    )

  def names(self) -> set[str]:
    return set(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def read(self, name: str, index: Index) -> np.ndarray:
    return self._files[name].get_slice(name)[index]


def _leaves(tree: Any, family: Family) -> Iterator[tuple[str, Any, Any]]:
  """Yields our path of each parameter, its leaf, and its tensor in a file."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = sharding.path_name(path)
    yield name, leaf, family.tensors[name]


def _check_tensors(weights: _Weights, model: Model, path: str) -> None:
  """Refuses missing, unexpected and misshapen tensors, by name."""
  config = model.config
  family = families.FAMILIES[config.family]
  wanted = {}
  for ours, leaf, tensor in _leaves(model.abstract_params(), family):
    shape = leaf.shape[1:] if _stacked(ours) else leaf.shape
    whole = tuple(slice(0, n) for n in shape)
    stops = tuple(s.stop for s in tensor.index(whole, config.head_dim))
    wanted |= dict.fromkeys(tensor.names(config.num_layers), stops)
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
  weights = _Weights(resolve(path, weights=True))
  _check_tensors(weights, Model(config), path)


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
  weights = _Weights(resolve(path, weights=True))
  _check_tensors(weights, model, path)
  target, config = jnp.dtype(dtype), model.config
  tensors = families.FAMILIES[config.family].tensors

  def load(tree_path, leaf, placement):
    ours = sharding.path_name(tree_path)
    tensor = tensors[ours]
    names = tensor.names(config.num_layers)

    def read(name: str, index: Index) -> np.ndarray:
      block = weights.read(name, tensor.index(index, config.head_dim))
      return tensor.read(block, config.head_dim).astype(target)

    def block(index: Index) -> np.ndarray:
      index = tuple(
          slice(*s.indices(n)[:2])
          for s, n in zip(index, leaf.shape, strict=True)
      )
      if not _stacked(ours):
        return read(names[0], index)
      out = np.empty([s.stop - s.start for s in index], target)
      for i, name in enumerate(names[index[0]]):
        out[i] = read(name, index[1:])
      return out

    # One parameter at a time, or several blocks would wait in host memory.
    return jax.block_until_ready(
        jax.make_array_from_callback(leaf.shape, placement, block)
    )

  return jax.tree_util.tree_map_with_path(
      load, model.abstract_params(), shardings
  )


def _to_host(array: jax.Array) -> np.ndarray:
  if jax.process_count() > 1:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def _write_weights(
    params: Params, family: Family, directory: pathlib.Path, dtype: jnp.dtype
) -> None:
  """Writes the weights in as many files as they need.

  Every process gathers every file's tensors, and the first one writes them.
  """
  # The tensors of each file: name, parameter, number of the layer, how it lies.
  files, room, total = [], 0, 0
  for ours, leaf, tensor in _leaves(params, family):
    count = leaf.shape[0] if _stacked(ours) else 1
    size = leaf.size * dtype.itemsize // count
    for i, name in enumerate(tensor.names(count)):
      if size > room:
        files.append([])
        room = _SHARD_BYTES
      files[-1].append((name, leaf, i if _stacked(ours) else None, tensor))
      room -= size
      total += size
  places = {}
  for number, tensors in enumerate(files, 1):
    file = f"model-{number:05}-of-{len(files):05}.safetensors"
    arrays = {
        name: np.ascontiguousarray(
            tensor.write(_to_host(leaf if i is None else leaf[i])).astype(dtype)
        )
        for name, leaf, i, tensor in tensors
    }
    if jax.process_index() == 0:
      safetensors.numpy.save_file(
          arrays,
          directory / (file if len(files) > 1 else SINGLE),
          metadata={"format": "pt"},
      )
    places |= dict.fromkeys(arrays, file)
  if len(files) > 1 and jax.process_index() == 0:
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2))


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
    dtype: what the weights are stored in, "float32" or "bfloat16".

  Raises:
    ModelFilesError: there is no such model.
  """
  origin, companion = resolve(source), resolve(tokenizer)
  settings = _settings(origin)
  family = families.find(settings["model_type"], source)
  partial = directory.with_name(directory.name + ".partial")
  writes = jax.process_index() == 0
  if writes:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings.pop("torch_dtype", None)
    ids = _settings(companion)
    settings |= {name: ids[name] for name in _TOKEN_IDS if name in ids}
    settings["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in _COMPANIONS:
      if (companion / name).is_file():
        shutil.copyfile(companion / name, partial / name)
  _write_weights(params, family, partial, jnp.dtype(dtype))
  if writes:
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
