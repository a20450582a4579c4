"""What a model family is, and what the families share.

This module and the families' own import neither jax nor each other.
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


def layer_tensors(
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
} | layer_tensors({
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
