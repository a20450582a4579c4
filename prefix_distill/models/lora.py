"""LoRA (arXiv 2106.09685): trees of adapters, and their files.

A model with adapters takes one tree, in which "layers/mlp/up" has the adapters
"layers/mlp/up_a" and "layers/mlp/up_b" beside it. Only the adapters are trained
and saved. So the run keeps two trees, the base's and the adapters', and joins
them where a model runs; to join them copies nothing.

Adapters are read and written in PEFT's format (huggingface.co/docs/peft): a
directory with `adapter_config.json` and `adapter_model.safetensors`. Adapters
that PEFT would compute in another way are refused in one sentence.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import LoraSpec
from prefix_distill.errors import check
from prefix_distill.models import families
from prefix_distill.models import huggingface as hf
from prefix_distill.models.config import Lora
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import PRODUCTS
from prefix_distill.models.config import sides
from prefix_distill.models.huggingface import ModelFilesError
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that change what is computed, and their values here. Empty
# ones, such as null and {}, are the same.
_OPTIONS = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": None,
    "use_dora": None,
    "use_qalora": None,
    "lora_bias": None,
    "fan_in_fan_out": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


def adapted(architecture: ModelConfig, config: Config) -> ModelConfig:
  """Returns the student's architecture with the adapters of the settings.

  Raises:
    ConfigError: a product has fewer inputs or outputs than `lora.rank`.
  """
  spec = config.lora
  if not spec.rank:
    return architecture
  found = sides(architecture)
  for name in spec.targets:
    outputs, inputs = found[PRODUCTS[name]]
    most = min(outputs, inputs)
    check(
        spec.rank <= most,
        f"lora.rank is {spec.rank}, but {name} of {config.student.path} has"
        f" {inputs} inputs and {outputs} outputs, and no change of it has a"
        f" higher rank than {most}; lower lora.rank to that, or leave {name}"
        " out of lora.targets.",
    )
  targets = tuple(PRODUCTS[name] for name in spec.targets)
  lora = Lora(spec.rank, spec.scale, targets)
  return dataclasses.replace(architecture, lora=lora)


def split(params: Params) -> tuple[Params, Params]:
  """Returns the weights of the base, and the adapters; either may be empty."""
  base, adapters = {}, {}
  for name, value in params.items():
    if isinstance(value, dict):
      parts = split(value)
      for tree, part in zip((base, adapters), parts, strict=True):
        if part:
          tree[name] = part
    elif name.endswith(("_a", "_b")):
      adapters[name] = value
    else:
      base[name] = value
  return base, adapters


def join(base: Params | None, trained: Params) -> Params:
  """Returns the tree that a model takes, of the parts of `split`.

  Args:
    base: the weights that are not trained; None if all are.
    trained: the adapters; or all weights.
  """
  out = dict(base or {})
  for name, value in trained.items():
    inner = isinstance(value, dict) and name in out
    out[name] = join(out[name], value) if inner else value
  return out


def _tensors(model: Model) -> list[tuple[str, Any, families.Tensor]]:
  """Returns our path of each adapter, its shape, and its tensor in a file."""
  _, adapters = split(model.abstract_params())
  family = families.FAMILIES[model.config.family]
  return list(hf.leaves(adapters, family))


def _alpha(spec: LoraSpec) -> float:
  return spec.alpha or float(spec.rank)


def check_config(spec: LoraSpec) -> None:
  """Checks that the adapters of `lora.path` are those of the settings.

  Raises:
    ModelFilesError: they cannot be read, are of another kind, or have another
      rank, alpha or other targets.
  """
  file = hf.resolve(spec.path) / CONFIG
  if not file.is_file():
    raise ModelFilesError(
        f"{file} is missing; let lora.path name a directory in PEFT's format,"
        f" with {CONFIG} and {WEIGHTS}."
    )
  settings = hf.read_json(file)
  for name, wanted in _OPTIONS.items():
    value = settings.get(name, wanted) or None
    if value != wanted:
      raise ModelFilesError(
          f"{file} has {name} {value!r}, which is not implemented; only"
          f" {wanted!r} is."
      )
  targets = settings.get("target_modules")
  if isinstance(targets, list):
    targets = tuple(sorted(map(str, targets)))
  rank, alpha = settings.get("r"), settings.get("lora_alpha")
  for name, found, ours in (
      ("rank", rank, spec.rank),
      ("alpha", alpha, _alpha(spec)),
      ("targets", targets, tuple(sorted(spec.targets))),
  ):
    if found != ours:
      raise ModelFilesError(
          f"lora.{name} is {ours!r}, but the adapters of lora.path have"
          f" {found!r} ({file}); set lora.{name} to that."
      )


def check_weights(path: str, model: Model) -> None:
  """Checks that all adapters are there, of the right shapes, and no others.

  Raises:
    ModelFilesError: one is not.
  """
  directory = hf.resolve(path, weights=True)
  weights, wanted = hf.Weights(directory, WEIGHTS), {}
  for _, leaf, tensor in _tensors(model):
    shape = tensor.shape(leaf.shape[1:], model.config.head_dim)
    wanted |= dict.fromkeys(tensor.names(model.config.num_layers), shape)
  file = directory / WEIGHTS
  for name, shape in wanted.items():
    if name not in weights.names():
      raise ModelFilesError(
          f"{file} lacks the tensor {name}; it belongs to another model or to"
          " other targets."
      )
    if weights.shape(name) != shape:
      raise ModelFilesError(
          f"{file}: tensor {name} has shape {weights.shape(name)}, and the"
          f" student's is {shape}; give adapters of this model."
      )
    if weights.dtype(name) not in hf.FLOATS:
      raise ModelFilesError(
          f"{file}: tensor {name} is of dtype {weights.dtype(name)}, and only"
          f" {', '.join(hf.FLOATS)} are read."
      )
  for name in sorted(weights.names() - set(wanted)):
    raise ModelFilesError(
        f"{file} has the tensor {name}, which the settings do not call for; add"
        " its product to lora.targets, or give other adapters."
    )


def load(path: str, model: Model, places: Any) -> Params:
  """Reads adapters in float32; `check_weights` has passed.

  Args:
    path: a directory or a hub id.
    model: the student, with adapters.
    places: a tree of shardings like the adapters'.

  Raises:
    ModelFilesError: a number is not finite.
  """
  weights = hf.Weights(hf.resolve(path, weights=True), WEIGHTS)
  width, arrays = model.config.head_dim, []
  for _, leaf, tensor in _tensors(model):
    index = tensor.index(tuple(slice(0, n) for n in leaf.shape[1:]), width)
    layers = [
        tensor.read(weights.read(name, index), width)
        for name in tensor.names(leaf.shape[0])
    ]
    arrays.append(np.stack(layers).astype(np.float32))

  def put(array: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, place, lambda index: array[index]
    )

  whole = jax.tree.unflatten(jax.tree.structure(places), arrays)
  return jax.tree.map(put, whole, places)


def _settings(spec: LoraSpec, base: str) -> dict[str, Any]:
  """Returns an `adapter_config.json`."""
  alpha = _alpha(spec)
  return {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": spec.rank,
      "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
      "lora_dropout": 0.0,
      "target_modules": sorted(spec.targets),
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
      "init_lora_weights": True,
      "modules_to_save": None,
      "use_rslora": False,
      "use_dora": False,
  }


def export(
    adapters: Params, spec: LoraSpec, source: str, directory: pathlib.Path
) -> None:
  """Writes adapters as PEFT does, in float32; every process must call it.

  The directory appears whole or not at all.

  Args:
    adapters: as `split` returns them.
    spec: their rank, alpha and targets.
    source: the path of the model that they belong to.
    directory: where to; replaced if it exists.

  Raises:
    ModelFilesError: there is no such model.
  """
  origin = hf.resolve(source)
  family = families.find(
      hf.read_json(origin / "config.json")["model_type"], source
  )
  arrays = {}
  for _, leaf, tensor in hf.leaves(adapters, family):
    whole = sharding.to_host(leaf)
    for name, one in zip(tensor.names(len(whole)), whole, strict=True):
      array = tensor.write(one).astype(jnp.float32)
      arrays[name] = np.ascontiguousarray(array)
  if jax.process_index():
    return
  partial = directory.with_name(directory.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  # A model that ships with the package has no name elsewhere.
  base = str(origin) if source.startswith("bundled:") else source
  hf.write_json(partial / CONFIG, _settings(spec, base))
  safetensors.numpy.save_file(
      arrays, partial / WEIGHTS, metadata={"format": "pt"}
  )
  (partial / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it.
  shutil.rmtree(directory, ignore_errors=True)
  partial.rename(directory)
