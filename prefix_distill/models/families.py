"""The model families: what sets each apart, and what its tensors are called.

  llama     Llama and models of its kind, such as SmolLM2 (arXiv 2302.13971)
  smollm3   SmolLM3 (huggingface.co/blog/smollm3): Llama, but some layers do not
            rotate. Such a layer (NoPE, arXiv 2305.19466) attends by content
            alone; causality and the other layers tell it the order of tokens.
  qwen2     Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and
            values
  qwen3     Qwen3 (arXiv 2505.09388): norms on each head's queries and keys, and
            no biases

This module imports no jax.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from prefix_distill.errors import UserError

Index = tuple[slice, ...]


class UnsupportedModelError(UserError):
  """A model that this package would compute wrongly, or not at all."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """What a parameter is called, and how it lies, in a safetensors file.

  Attributes:
    name: in the file; a layer's number goes into the braces, if it has any.
    heads: the file's axis that holds N * H numbers, which are two axes, N and
      H, here; None if the axes are the same.
  """

  name: str
  heads: int | None = None

  def names(self, num_layers: int) -> list[str]:
    """Returns the names in the file: one for each layer, or one."""
    if "{}" not in self.name:
      return [self.name]
    return [self.name.format(i) for i in range(num_layers)]

  def shape(
      self, shape: tuple[int, ...], head_dim: int
  ) -> tuple[int, ...]:
    """Returns the file's shape of our array, or of one layer of ours."""
    index = self.index(tuple(slice(0, n) for n in shape), head_dim)
    return tuple(s.stop for s in index)

  def index(self, index: Index, head_dim: int) -> Index:
    """Turns an index of our array, whole along H, into one of the file's."""
    if self.heads is None:
      return index
    rows = index[self.heads]
    rows = slice(rows.start * head_dim, rows.stop * head_dim)
    return (*index[: self.heads], rows, *index[self.heads + 2 :])

  def read(self, block: np.ndarray, head_dim: int) -> np.ndarray:
    """Turns a block of the file into ours."""
    if self.heads is None:
      return block
    before, after = block.shape[: self.heads], block.shape[self.heads + 1 :]
    return block.reshape(*before, -1, head_dim, *after)

  def write(self, array: np.ndarray) -> np.ndarray:
    """Turns our array into the file's."""
    if self.heads is None:
      return array
    before, after = array.shape[: self.heads], array.shape[self.heads + 2 :]
    return array.reshape(*before, -1, *after)


def _layer_tensors(
    tensors: Mapping[str, tuple[str, int | None]],
) -> dict[str, Tensor]:
  """Returns the entries of a layer's parameters.

  Args:
    tensors: our name within a layer to the file's name within a layer and to
      `Tensor.heads`.
  """
  return {
      f"layers/{ours}": Tensor(f"model.layers.{{}}.{theirs}", heads)
      for ours, (theirs, heads) in tensors.items()
  }


def _adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Returns the adapters of products, as PEFT calls them.

  A has the product's inputs and B its outputs, and so their heads.
  """
  out = {}
  for ours, tensor in tensors.items():
    if ours.startswith(("layers/attention/", "layers/mlp/")):
      stem, heads = tensor.name.removesuffix("weight"), tensor.heads
      for end, letter, axis in (("a", "A", 1), ("b", "B", 0)):
        out[f"{ours}_{end}"] = Tensor(
            f"base_model.model.{stem}lora_{letter}.weight",
            heads if heads == axis else None,
        )
  return out


# What every family has: our path of a parameter to the file's tensor.
TENSORS = {
    "embed/weight": Tensor("model.embed_tokens.weight"),
    "final_norm/scale": Tensor("model.norm.weight"),
    "head/weight": Tensor("lm_head.weight"),
} | _layer_tensors({
    "attention_norm/scale": ("input_layernorm.weight", None),
    "mlp_norm/scale": ("post_attention_layernorm.weight", None),
    "attention/query": ("self_attn.q_proj.weight", 0),
    "attention/key": ("self_attn.k_proj.weight", 0),
    "attention/value": ("self_attn.v_proj.weight", 0),
    "attention/out": ("self_attn.o_proj.weight", 1),
    "mlp/gate": ("mlp.gate_proj.weight", None),
    "mlp/up": ("mlp.up_proj.weight", None),
    "mlp/down": ("mlp.down_proj.weight", None),
})
TENSORS |= _adapters(TENSORS)


def _everywhere(config: Any, where: str) -> tuple[bool, ...]:
  """Returns the `rotary` of a family whose layers all rotate."""
  del config, where
  return ()


@dataclasses.dataclass(frozen=True)
class Family:
  """What sets a family apart.

  Attributes:
    model_type: what its config.json calls it.
    tensors: our path of a parameter, such as "layers/mlp/up", to the file's
      tensor.
    qk_norm: whether each head's queries and keys are normed.
    qkv_bias: whether queries, keys and values have biases.
    rotary: reads `ModelConfig.rotary` out of a Hugging Face config; the second
      argument is the model's path, for error messages.
  """

  model_type: str
  tensors: Mapping[str, Tensor]
  qk_norm: bool = False
  qkv_bias: bool = False
  rotary: Callable[[Any, str], tuple[bool, ...]] = _everywhere


def _smollm3_rotary(config: Any, where: str) -> tuple[bool, ...]:
  """Returns which layers rotate; () if all do.

  Args:
    config: a `transformers.SmolLM3Config`. Its `no_rope_layers`, which
      transformers makes of `no_rope_layer_interval` if it is missing, has 1 for
      a layer that rotates and 0 for one that does not.
    where: the model's path, for error messages.

  Raises:
    UnsupportedModelError: `no_rope_layers` has another value or is too short.
  """
  flags, count = config.no_rope_layers, config.num_hidden_layers
  if len(flags) < count or set(flags) - {0, 1}:
    raise UnsupportedModelError(
        f"{where}: no_rope_layers {flags!r} is not implemented; only a 0 or a 1"
        f" for each of the {count} layers is."
    )
  rotary = tuple(map(bool, flags[:count]))
  return () if all(rotary) else rotary


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen3",
            TENSORS
            | _layer_tensors({
                "attention/query_norm/scale": ("self_attn.q_norm.weight", None),
                "attention/key_norm/scale": ("self_attn.k_norm.weight", None),
            }),
            qk_norm=True,
        ),
        Family(
            "qwen2",
            TENSORS
            | _layer_tensors({
                "attention/query_bias": ("self_attn.q_proj.bias", 0),
                "attention/key_bias": ("self_attn.k_proj.bias", 0),
                "attention/value_bias": ("self_attn.v_proj.bias", 0),
            }),
            qkv_bias=True,
        ),
        Family("llama", TENSORS),
        Family("smollm3", TENSORS, rotary=_smollm3_rotary),
    )
}


def find(model_type: str | None, where: str) -> Family:
  """Returns the family of a model type.

  Args:
    model_type: of a config.json.
    where: the model's path, for the error message.

  Raises:
    UnsupportedModelError: no family has this type.
  """
  if model_type not in FAMILIES:
    raise UnsupportedModelError(
        f"{where}: model type {model_type!r} is not implemented;"
        f" {', '.join(FAMILIES)} are."
    )
  return FAMILIES[model_type]
