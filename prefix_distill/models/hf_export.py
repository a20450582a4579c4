"""Writes Hugging Face model directories: config, tokenizer, safetensors."""

from collections.abc import Iterator
import json
import math
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
import ml_dtypes
import numpy as np
import safetensors.numpy

from prefix_distill.models import hf
from prefix_distill.models import hf_names
from prefix_distill.models.transformer import Params

# Bytes of a file of an export; larger models are split, as the hub does it.
_SHARD_BYTES = 5_000_000_000
# What an export takes along from the model it was made of.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


def _to_host(array: jax.Array) -> np.ndarray:
  if jax.process_count() > 1:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
  return np.asarray(array)


def _tensors(params: Params, dtype: np.dtype) -> Iterator[tuple[str, Any]]:
  """Yields names in the file and arrays, one layer's tensor at a time."""
  for ours, leaf in hf_names.leaves(params):
    layout = hf_names.NAMES[ours][1]
    for i, name in enumerate(hf_names.hf_names(ours, leaf.shape[0])):
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
    (directory / files[0]).rename(directory / hf.SINGLE)
    return
  final = [
      f"model-{i + 1:05}-of-{len(files):05}.safetensors"
      for i in range(len(files))
  ]
  for old, new in zip(files, final, strict=True):
    (directory / old).rename(directory / new)
  weight_map = {name: final[i] for name, i in names.items()}
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / hf.INDEX).write_text(json.dumps(index, indent=2))


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
  origin, companion = hf.resolve(source), hf.resolve(tokenizer)
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
