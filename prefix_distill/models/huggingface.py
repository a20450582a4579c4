"""Reads and writes Hugging Face model directories: config and safetensors.

Only safetensors are read, and code from a model's repository is never run. What
a config means is what transformers computes from it. Files that say two things,
or nothing that can be computed, are refused in one sentence.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from prefix_distill import assets
from prefix_distill import errors
from prefix_distill import sharding
from prefix_distill.errors import JsonError
from prefix_distill.errors import UserError
from prefix_distill.models import config as model_config
from prefix_distill.models.config import FAMILIES
from prefix_distill.models.config import Family
from prefix_distill.models.config import find_family
from prefix_distill.models.config import Index
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import Tensor
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params

INDEX = "model.safetensors.index.json"
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
SINGLE = "model.safetensors"
# Bytes of a file of an export; larger models are split, as the hub does it.
_SHARD_BYTES = 5_000_000_000
_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"
# What an export takes along from the model it was made of.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Code of a repository, which an export does not have, and how answers were
# sampled, which old config.json say and generation_config.json says now.
_LEFT_OUT = (
    "auto_map",
    "torch_dtype",
    "do_sample",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
# What an export's config.json repeats from the tokenizer.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Tokenizer classes that only transformers 5 knows by these names.
_NEW_TOKENIZERS = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")
# An id on the hub, and maybe a branch, tag or commit.
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Numbers of a config.json that must be whole, and whether null is one.
_SIZES = {
    "vocab_size": False,
    "hidden_size": False,
    "intermediate_size": False,
    "num_hidden_layers": False,
    "num_attention_heads": False,
    "num_key_value_heads": True,
    "head_dim": True,
    "max_position_embeddings": False,
}
_MOST_LAYERS = 10_000
# Dtypes of tensors, and the bits that are all set in what is not finite.
FLOATS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
# Numbers that are checked at a time, and rows that are compared.
_CHUNK = 2**20
_ROWS = 4096


class ModelFilesError(UserError):
  """A model directory that is missing, incomplete or of another kind."""


class DownloadError(ModelFilesError):
  """A model that the hub does not give."""


def resolve(path: str, weights: bool = False) -> pathlib.Path:
  """Returns the local directory of a model.

  Args:
    path: a directory, `bundled:NAME`, or a hub id, which is downloaded. A hub
      id may end in `@REVISION`, a branch, tag or commit.
    weights: whether to download a hub model's weights, or only what is small.

  Raises:
    ModelFilesError: there is no such model.
    DownloadError: the hub does not give it.
  """
  if path.startswith("bundled:"):
    try:
      return assets.path(path.removeprefix("bundled:"))
    except KeyError as error:
      raise ModelFilesError(f"{path}: {error.args[0]}") from error
  path = os.path.expanduser(path)
  # Also asks for names that are too long for the file system.
  if os.path.isdir(path):
    return pathlib.Path(path)
  hub = _HUB_ID.fullmatch(path)
  if path.startswith((".", "/", "~")) or not hub:
    raise ModelFilesError(
        f"{path} is not a directory; give the directory of a Hugging Face"
        " model, a hub id (OWNER/NAME or OWNER/NAME@REVISION) or bundled:NAME."
    )
  wanted = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
  if weights:
    wanted.append("*.safetensors")
  try:
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            hub[1], revision=hub[2], allow_patterns=wanted
        )
    )
  except Exception as error:  # The hub's client raises many kinds.
    reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
    raise DownloadError(
        f"{path} is neither a directory here nor could it be downloaded"
        f" ({reason}); check the name, the network and HF_TOKEN."
    ) from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    ModelFilesError: the file is cut, is no JSON, or holds something else.
  """
  try:
    # transformers takes numbers that are not finite.
    found = errors.read_json(file, finite=False)
  except JsonError as error:
    reason = str(error)
    if "BOM" in reason:
      reason = "it begins with a byte order mark, which transformers refuses"
    raise ModelFilesError(
        f"{file} cannot be read ({reason}); save it as UTF-8, or download it"
        " again."
    ) from error
  if not isinstance(found, dict):
    raise ModelFilesError(
        f"{file} is a {type(found).__name__}, not a JSON object; download it"
        " again."
    )
  return found


def read_config(path: str) -> ModelConfig:
  """Reads a model's architecture.

  Raises:
    ModelFilesError: no readable config.json, or a generation_config.json whose
      stop tokens cannot be.
    UnsupportedModelError: an architecture this package does not implement.
  """
  directory = resolve(path)
  file = directory / "config.json"
  if (directory / "adapter_config.json").is_file() and not file.is_file():
    raise ModelFilesError(
        f"{directory} has adapters alone; give the model that they were merged"
        " into (export beside export-adapter), or their base, and lora.path for"
        " them."
    )
  if not file.is_file():
    raise ModelFilesError(
        f"{directory} has no config.json; give the directory of a Hugging Face"
        " model."
    )
  settings = read_json(file)
  if "method" in settings and "model_type" not in settings:
    raise ModelFilesError(
        f"{directory} is the directory of a run; give the model that the run"
        f" wrote, {directory / 'export'}."
    )
  try:
    # Before transformers sees a model type that it may know and we do not.
    find_family(settings.get("model_type"), path)
    _check_settings(settings, file)
    config = model_config.from_hf(
        transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=False
        ),
        path,
    )
  except UserError:
    raise
  except Exception as error:  # transformers' validation raises many kinds.
    reason = " ".join(str(error).split()) or repr(error)
    raise ModelFilesError(
        f"{file} cannot be read ({reason}); download it again."
    ) from error
  _token_ids(settings, file, config.vocab_size)
  stop_ids(directory, config.vocab_size)
  return config


def _check_settings(
    settings: Mapping[str, Any], file: pathlib.Path
) -> None:
  """Refuses sizes that are none, and settings that are given twice."""
  for field, may_lack in _SIZES.items():
    value = settings.get(field, 1)
    most = _MOST_LAYERS if field == "num_hidden_layers" else 2**31 - 1
    real = isinstance(value, int) and not isinstance(value, bool)
    if not (real and 1 <= value <= most) and not (value is None and may_lack):
      raise ModelFilesError(
          f"{file} has {field} {value!r}, which must be a whole number from 1"
          f" to {most}; mend it, or download it again."
      )
  pad, rows = settings.get("pad_token_id"), settings.get("vocab_size")
  if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
    raise ModelFilesError(
        f"{file} has pad_token_id {pad}, which is not among the {rows} ids of"
        " its vocab_size; give the id of a token, or null."
    )
  old, new = settings.get("rope_scaling"), settings.get("rope_parameters")
  if old and new and old != new:
    raise ModelFilesError(
        f"{file} has rope_scaling {old!r} and rope_parameters {new!r}, which"
        " differ; delete the one that the model was not trained with."
    )


def _token_ids(
    settings: Mapping[str, Any], file: pathlib.Path, rows: int
) -> tuple[int, ...]:
  """Returns `eos_token_id`, which is a number, a list of them or null."""
  value = settings.get("eos_token_id")
  listed = value if isinstance(value, list) else [value]
  listed = [] if value is None else listed
  for token in listed:
    real = isinstance(token, int) and not isinstance(token, bool)
    if not (real and 0 <= token < rows):
      raise ModelFilesError(
          f"{file} has eos_token_id {value!r}, of which {token!r} is no id of"
          f" a token, 0 to {rows - 1}; give the ids of the tokenizer's tokens"
          " that end an answer."
      )
  return tuple(sorted({*listed}))


def stop_ids(directory: pathlib.Path, rows: int) -> tuple[int, ...]:
  """Returns the tokens at which transformers ends an answer, sorted.

  They are those of generation_config.json; without that file they are those of
  config.json.

  Args:
    directory: of the model.
    rows: how many ids there are: the tokenizer's tokens, or the vocabulary's
      rows.

  Raises:
    ModelFilesError: a file that cannot be read, or an id that cannot be.
  """
  names = (_GENERATION, "config.json")
  files = [directory / name for name in names if (directory / name).is_file()]
  return _token_ids(read_json(files[0]), files[0], rows) if files else ()


def _stacked(ours: str) -> bool:
  """Whether our parameter has an axis of layers, which a file's lacks."""
  return ours.startswith("layers/")


class Weights:
  """The tensors of a model directory, read a slice at a time."""

  def __init__(self, directory: pathlib.Path, file: str = ""):
    """Opens the files of a model, or only the one that is named.

    Raises:
      ModelFilesError: a file is missing, cut, or contradicts the index.
    """
    self._files = {}
    self._paths = {}
    files = {file: set()} if file else self._file_names(directory)
    for file, promised in files.items():
      path = directory / file
      if not path.is_file():
        raise ModelFilesError(
            f"{path} is missing; the download is incomplete, so fetch the"
            " model again."
        )
      try:
        handle = safetensors.safe_open(path, "np")
        names = set(handle.keys())
      except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelFilesError(
            f"{path} is not a whole safetensors file ({reason}); fetch it"
            " again."
        ) from error
      for name in sorted(promised - names):
        raise ModelFilesError(
            f"{directory / INDEX} says that {name} is in {file}, and {path}"
            " lacks it; they belong to different models, so fetch the model"
            " again."
        )
      for name in sorted(names & set(self._files)):
        raise ModelFilesError(
            f"{path} and {self._paths[name]} both hold the tensor {name};"
            " delete the file that is not the model's."
        )
      self._files |= dict.fromkeys(names, handle)
      self._paths |= dict.fromkeys(names, path)

  @staticmethod
  def _file_names(directory: pathlib.Path) -> dict[str, set[str]]:
    """Returns the files, and which tensors the index says each of them has."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
      if single.is_file():
        return {SINGLE: set()}
      raise ModelFilesError(
          f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors are"
          " read, so convert the weights or finish the download."
      )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
      raise ModelFilesError(
          f"{index} is not a whole index: its weight_map names no files; fetch"
          " it again."
      )
    files = {}
    for name, file in places.items():
      path = pathlib.PurePosixPath(file if isinstance(file, str) else "..")
      if path.is_absolute() or ".." in path.parts or not path.name:
        raise ModelFilesError(
            f"{index} says that {name} is in {file!r}, which is no file in"
            f" {directory}; fetch the model again."
        )
      files.setdefault(file, set()).add(name)
    if single.is_file() and SINGLE not in files:
      raise ModelFilesError(
          f"{directory} has both {SINGLE} and {INDEX}, which names other files;"
          " delete the one that is not the model's."
      )
    return dict(sorted(files.items()))

  def names(self) -> set[str]:
    return set(self._files)

  def path(self, name: str) -> pathlib.Path:
    return self._paths[name]

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._files[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    return self._files[name].get_slice(name).get_dtype()

  def read(self, name: str, index: Index) -> np.ndarray:
    """Reads a block.

    Raises:
      ModelFilesError: a number in it is not finite.
    """
    block = self._files[name].get_slice(name)[index]
    kind, bits = FLOATS[self.dtype(name)]
    numbers = np.ascontiguousarray(block).view(kind).reshape(-1)
    for start in range(0, numbers.size, _CHUNK):
      if ((numbers[start : start + _CHUNK] & kind(bits)) == bits).any():
        raise ModelFilesError(
            f"{self.path(name)}: tensor {name} holds NaN or infinite numbers;"
            " download it again, or take an earlier checkpoint."
        )
    return block

  def equal(self, one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers."""
    if self.shape(one) != self.shape(other):
      return False
    count = self.shape(one)[0]
    for start in range(0, count, _ROWS):
      rows = (slice(start, min(start + _ROWS, count)),)
      first, second = (
          self._files[name].get_slice(name)[rows].astype(np.float32)
          for name in (one, other)
      )
      if not np.array_equal(first, second, equal_nan=True):
        return False
    return True


def leaves(tree: Any, family: Family) -> Iterator[tuple[str, Any, Tensor]]:
  """Yields our path of each parameter, its leaf, and its tensor in a file."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = sharding.path_name(path)
    yield name, leaf, family.tensors[name]


def file_shapes(tree: Any, config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the name and the shape in a file of each tensor of a tree."""
  shapes = {}
  for ours, leaf, tensor in leaves(tree, FAMILIES[config.family]):
    shape = leaf.shape[1:] if _stacked(ours) else leaf.shape
    shape = tensor.shape(shape, config.head_dim)
    shapes |= dict.fromkeys(tensor.names(config.num_layers), shape)
  return shapes


def _check_tensors(weights: Weights, model: Model, path: str) -> None:
  """Refuses missing, unexpected and misshapen tensors, by name."""
  config, found = model.config, weights.names()
  wanted = file_shapes(model.abstract_params(), config)
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
  harmless = {_HEAD} if config.tied else set()
  for name in sorted(found - set(wanted) - harmless):
    if not name.endswith("rotary_emb.inv_freq"):
      raise ModelFilesError(
          f"{path} has the tensor {name}, which this package would ignore; it"
          f" does not implement this variant of {config.family}."
      )
  for name in sorted((set(wanted) | harmless) & found):
    if weights.dtype(name) not in FLOATS:
      raise ModelFilesError(
          f"{weights.path(name)}: tensor {name} is of dtype"
          f" {weights.dtype(name)}, and only {', '.join(FLOATS)} are read;"
          " give the model before it was quantized."
      )
  if harmless & found and not weights.equal(_HEAD, _TABLE):
    raise ModelFilesError(
        f"{weights.path(_HEAD)}: tensor {_HEAD} differs from {_TABLE}, but"
        f" config.json of {path} ties them; set its tie_word_embeddings to"
        f" false to use {_HEAD}, or delete that tensor."
    )


def check_weights(path: str, config: ModelConfig) -> None:
  """Checks that all tensors are there, without reading more than it must.

  Only a head is read that config.json says is the embedding table.

  Raises:
    ModelFilesError: the files are incomplete or do not fit the config.
  """
  weights = Weights(resolve(path, weights=True))
  _check_tensors(weights, Model(config), path)


def load_params(
    path: str,
    model: Model,
    shardings: Any,
    dtype: str = "float32",
    poll: Callable[[], None] = lambda: None,
) -> Params:
  """Reads and checks a model's weights, see `read_tree`.

  Args:
    path: see `resolve`.
    model: the architecture that `read_config` gave.
    shardings: a tree like the parameters'.
    dtype: what to convert to.
    poll: called before each parameter; it may raise to stop.

  Raises:
    ModelFilesError: the files are incomplete or do not fit the config.
  """
  weights = Weights(resolve(path, weights=True))
  _check_tensors(weights, model, path)
  return read_tree(
      weights, model.abstract_params(), model.config, shardings, dtype, poll
  )


def read_tree(
    weights: Weights,
    tree: Any,
    config: ModelConfig,
    shardings: Any,
    dtype: str = "float32",
    poll: Callable[[], None] = lambda: None,
) -> Params:
  """Reads weights straight into their shards.

  Each device's block is read from the file by itself, so a host holds no more
  than its own shards and the one that is being read.

  Args:
    weights: that hold all tensors of the tree, of the right shapes.
    tree: the shapes of the parameters to read.
    config: the architecture.
    shardings: a tree like that of the shapes.
    dtype: what to convert to.
    poll: called before each parameter; it may raise to stop.

  Raises:
    ModelFilesError: a number is not finite.
  """
  target = jnp.dtype(dtype)
  tensors = FAMILIES[config.family].tensors

  def load(tree_path, leaf, placement):
    poll()
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

  return jax.tree_util.tree_map_with_path(load, tree, shardings)


def _write_weights(
    params: Params,
    adapters: Params,
    family: Family,
    directory: pathlib.Path,
    dtype: jnp.dtype,
    scale: float,
) -> None:
  """Writes the weights in as many files as they need, as the hub has it.

  Every process gathers every file's tensors, and the first one writes them.
  Adapters are merged into a tensor as it is written.
  """
  changes = {name: leaf for name, leaf, _ in leaves(adapters, family)}
  # A tensor's name to its bytes, its parameter, the layer's number, how it lies
  # in a file, and its adapters.
  tensors = {}
  for ours, leaf, tensor in leaves(params, family):
    count = leaf.shape[0] if _stacked(ours) else 1
    size = leaf.size * dtype.itemsize // count
    pair = [
        (changes[f"{ours}_{x}"], family.tensors[f"{ours}_{x}"])
        for x in "ba"
        if f"{ours}_{x}" in changes
    ]
    for i, name in enumerate(tensor.names(count)):
      i = i if _stacked(ours) else None
      tensors[name] = (size, leaf, i, tensor, pair)
  split = huggingface_hub.split_state_dict_into_shards_factory(
      tensors,
      get_storage_size=lambda entry: entry[0],
      filename_pattern=SINGLE.replace(".", "{suffix}."),
      max_shard_size=_SHARD_BYTES,
  )
  writes = jax.process_index() == 0
  for file, names in split.filename_to_tensors.items():
    arrays = {}
    for name in names:
      _, leaf, i, tensor, pair = tensors[name]
      whole = tensor.write(sharding.to_host(leaf if i is None else leaf[i]))
      if pair:
        b, a = (place.write(sharding.to_host(part[i])) for part, place in pair)
        whole = whole.astype(np.float32) + scale * (b @ a)
      arrays[name] = np.ascontiguousarray(whole.astype(dtype))
    if writes:
      safetensors.numpy.save_file(
          arrays, directory / file, metadata={"format": "pt"}
      )
  if split.is_sharded and writes:
    index = {
        "metadata": split.metadata,
        "weight_map": split.tensor_to_filename,
    }
    write_json(directory / INDEX, index)


@contextlib.contextmanager
def whole_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields where to write a directory that appears whole or not at all.

  It replaces what was there. Any process may enter; the first one writes.
  """
  partial = directory.with_name(directory.name + ".partial")
  if jax.process_index():
    yield partial
    return
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  yield partial
  # Whatever the umask lets others read, and safetensors lets nobody else.
  for file in partial.iterdir():
    file.chmod(0o644)
  shutil.rmtree(directory, ignore_errors=True)
  partial.rename(directory)


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes JSON as the hub has it."""
  file.write_text(json.dumps(value, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Serving:
  """How a run sampled answers, and so how its export should be served.

  Attributes:
    stop_ids: the tokens that end an answer, the student's and the teacher's.
    temperature: of the softmax.
    top_k: 0 for all tokens.
    top_p: 1 for all tokens.
  """

  stop_ids: tuple[int, ...]
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


def export_dtype(asked: str, path: str) -> str:
  """Returns what an export is stored in.

  Args:
    asked: "float32" or "bfloat16"; "auto" for bfloat16 if that is what the
      model at `path` is stored in, and else float32.
    path: the teacher's, or the student's if there is none.
  """
  if asked != "auto":
    return asked
  settings = read_json(resolve(path) / "config.json")
  stored = settings.get("dtype") or settings.get("torch_dtype")
  return "bfloat16" if stored == "bfloat16" else "float32"


def _served(companion: pathlib.Path, serving: Serving) -> dict[str, Any]:
  """Returns an export's generation config: how the run sampled, no length."""
  file = companion / _GENERATION
  old = read_json(file) if file.is_file() else {}
  kept = {k: old[k] for k in ("bos_token_id", "pad_token_id") if k in old}
  return kept | {
      "do_sample": True,
      "eos_token_id": _one_or_all(serving.stop_ids),
      "temperature": serving.temperature,
      "top_k": serving.top_k,
      "top_p": serving.top_p,
  }


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
  return ids[0] if len(ids) == 1 else list(ids)


def _old_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `rope_parameters` by the names that transformers 4 knows.

  It would take its own theta instead, without a word.
  """
  rope = settings.get("rope_parameters")
  if not rope or settings.get("rope_scaling"):
    return {}
  old = {}
  if "rope_theta" in rope:
    old["rope_theta"] = rope["rope_theta"]
  if rope.get("rope_type", rope.get("type", "default")) != "default":
    old["rope_scaling"] = rope
  return old


def _tokenizer_settings(file: pathlib.Path) -> dict[str, Any]:
  """Returns a tokenizer's settings in words that transformers 4 knows too."""
  settings = read_json(file)
  settings.pop("auto_map", None)
  if settings.get("tokenizer_class") in _NEW_TOKENIZERS:
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
  extra = settings.get("extra_special_tokens")
  if isinstance(extra, list):
    del settings["extra_special_tokens"]
    settings.setdefault("additional_special_tokens", extra)
  return settings


def export(
    params: Params,
    source: str,
    tokenizer: str,
    directory: pathlib.Path,
    dtype: str,
    serving: Serving | None = None,
    card: str = "",
    adapters: Params | None = None,
    scale: float = 1.0,
) -> None:
  """Writes a Hugging Face model directory; every process must call it.

  The directory appears whole or not at all.

  Args:
    params: the weights.
    source: the model they were made of, whose config goes along.
    tokenizer: the model whose tokenizer and template do.
    directory: where to; replaced if it exists.
    dtype: what the weights are stored in, "float32" or "bfloat16".
    serving: what goes into the generation config; None for that of `tokenizer`.
    card: the README.md; empty for none.
    adapters: as `lora.split` returns them, to be merged; None for none.
    scale: what the adapters' products are multiplied by.

  Raises:
    ModelFilesError: there is no such model.
  """
  origin, companion = resolve(source), resolve(tokenizer)
  settings = read_json(origin / "config.json")
  family = find_family(settings["model_type"], source)
  with whole_directory(directory) as partial:
    if jax.process_index() == 0:
      settings = {k: v for k, v in settings.items() if k not in _LEFT_OUT}
      ids = read_json(companion / "config.json")
      settings |= {name: ids[name] for name in _TOKEN_IDS if name in ids}
      settings["dtype"] = dtype
      settings |= _old_rope(settings)
      if serving:
        settings["eos_token_id"] = _one_or_all(serving.stop_ids)
        write_json(partial / _GENERATION, _served(companion, serving))
      write_json(partial / "config.json", settings)
      _copy_companions(companion, partial, with_generation=serving is None)
      if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    _write_weights(
        params, adapters or {}, family, partial, jnp.dtype(dtype), scale
    )


def _copy_companions(
    source: pathlib.Path, directory: pathlib.Path, with_generation: bool
) -> None:
  names = (*_COMPANIONS, *([_GENERATION] if with_generation else ()))
  for name in names:
    if (source / name).is_file():
      shutil.copyfile(source / name, directory / name)
  if (source / _TOKENIZER).is_file():
    settings = _tokenizer_settings(source / _TOKENIZER)
    write_json(directory / _TOKENIZER, settings)
