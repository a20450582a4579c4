"""What the transformer needs to know, read from a Hugging Face config."""

import dataclasses
import math
from typing import Any

import transformers

from prefix_distill.errors import UserError

# Hugging Face model type -> (norm on queries and keys, bias on q, k and v).
FAMILIES = {
    "qwen3": (True, False),
    "qwen2": (False, True),
    "llama": (False, False),
}


class UnsupportedModelError(UserError):
  """A model that this package would compute wrongly, or not at all."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding.

  Attributes:
    theta: the base of the wavelengths.
    kind: "default", "linear" or "llama3".
    factor: by how much positions (linear) or long wavelengths (llama3) shrink.
    low_freq_factor: llama3: wavelengths above original_length / this shrink.
    high_freq_factor: llama3: wavelengths below original_length / this do not.
    original_length: llama3: the length the model was first trained on.
  """

  theta: float
  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; hashable, so jit takes it as static."""

  family: str
  vocab_size: int
  dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float
  rope: RopeConfig
  tied: bool
  max_length: int

  @property
  def qk_norm(self) -> bool:
    return FAMILIES[self.family][0]

  @property
  def qkv_bias(self) -> bool:
    return FAMILIES[self.family][1]


def _rope(config: transformers.PretrainedConfig, where: str) -> RopeConfig:
  rope = dict(config.rope_parameters)
  kind = rope.get("rope_type", "default")
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise UnsupportedModelError(
        f"{where}: partial_rotary_factor"
        f" {rope['partial_rotary_factor']} is not implemented; only 1.0 is."
    )
  theta = float(rope["rope_theta"])
  if kind == "default":
    return RopeConfig(theta)
  if kind == "linear":
    return RopeConfig(theta, kind, float(rope["factor"]))
  if kind == "llama3":
    return RopeConfig(
        theta, kind, float(rope["factor"]), float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )  # fmt: skip
  raise UnsupportedModelError(
      f"{where}: rope_type {kind!r} is not implemented; default, linear and"
      " llama3 are."
  )


def _refuse_unsupported(config: Any, where: str) -> None:
  """Raises if the config asks for what the transformer does not compute."""
  for field, wanted in (
      ("hidden_act", "silu"),
      ("attention_bias", False),
      ("mlp_bias", False),
      ("use_sliding_window", False),
      ("attention_dropout", 0.0),
      ("quantization_config", None),
  ):
    value = getattr(config, field, wanted)
    if value != wanted:
      raise UnsupportedModelError(
          f"{where}: {field} {value!r} is not implemented; only"
          f" {wanted!r} is."
      )


def from_hf(config: transformers.PretrainedConfig, where: str) -> ModelConfig:
  """Reads a Hugging Face config.

  Args:
    config: what `transformers.AutoConfig` returned.
    where: the model's path, for error messages.

  Raises:
    UnsupportedModelError: an architecture or an option is not implemented.
  """
  if config.model_type not in FAMILIES:
    raise UnsupportedModelError(
        f"{where}: model type {config.model_type!r} is not implemented;"
        f" {', '.join(FAMILIES)} are."
    )
  _refuse_unsupported(config, where)
  head_dim = getattr(config, "head_dim", None)
  return ModelConfig(
      family=config.model_type,
      vocab_size=config.vocab_size,
      dim=config.hidden_size,
      mlp_dim=config.intermediate_size,
      num_layers=config.num_hidden_layers,
      num_heads=config.num_attention_heads,
      num_kv_heads=config.num_key_value_heads,
      head_dim=head_dim or config.hidden_size // config.num_attention_heads,
      norm_eps=config.rms_norm_eps,
      rope=_rope(config, where),
      tied=bool(config.tie_word_embeddings),
      max_length=config.max_position_embeddings,
  )


def num_params(config: ModelConfig, embeddings: bool = True) -> int:
  """Counts parameters; a tied table counts once.

  Args:
    config: the model.
    embeddings: whether to count the embedding table as well. The output head
      always counts: it is a matrix product for every position, tied or not.
  """
  c = config
  attention = c.dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  if c.qkv_bias:
    attention += c.head_dim * (c.num_heads + 2 * c.num_kv_heads)
  if c.qk_norm:
    attention += 2 * c.head_dim
  layer = attention + 3 * c.dim * c.mlp_dim + 2 * c.dim
  table = math.prod((c.vocab_size, c.dim))
  tables = 2 if embeddings and not c.tied else 1
  return c.num_layers * layer + c.dim + tables * table
