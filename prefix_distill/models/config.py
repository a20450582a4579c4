"""Architectures: what sets each family apart, and what a config.json says.

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
import math
from typing import Any

import numpy as np
import transformers

from prefix_distill.errors import UserError

Index = tuple[slice, ...]
# Options of a config.json to the only value that is implemented.
_OPTIONS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
    "is_causal": True,
    "is_heterogeneous": False,
    "transformers_weights": None,
}
_LAYER_TYPE = "full_attention"
# A layer's products, as Hugging Face calls them and as this package does.
PRODUCTS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


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
_TENSORS = {
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
_TENSORS |= _adapters(_TENSORS)


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
            _TENSORS
            | _layer_tensors({
                "attention/query_norm/scale": ("self_attn.q_norm.weight", None),
                "attention/key_norm/scale": ("self_attn.k_norm.weight", None),
            }),
            qk_norm=True,
        ),
        Family(
            "qwen2",
            _TENSORS
            | _layer_tensors({
                "attention/query_bias": ("self_attn.q_proj.bias", 0),
                "attention/key_bias": ("self_attn.k_proj.bias", 0),
                "attention/value_bias": ("self_attn.v_proj.bias", 0),
            }),
            qkv_bias=True,
        ),
        Family("llama", _TENSORS),
        Family("smollm3", _TENSORS, rotary=_smollm3_rotary),
    )
}


def find_family(model_type: str | None, where: str) -> Family:
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


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding; `transformer.rope_frequencies` computes it.

  Attributes:
    theta: the base of the wavelengths.
    kind: "default", "linear", "llama3" or "yarn".
    factor: by how much positions (linear) or long wavelengths (llama3, yarn)
      shrink.
    low_freq_factor: llama3: wavelengths above original_length / this shrink.
    high_freq_factor: llama3: wavelengths below original_length / this do not.
    original_length: llama3, yarn: the length the model was first trained on, in
      tokens.
    beta_fast: yarn: pairs of channels that turn more often than this in
      original_length do not shrink.
    beta_slow: yarn: pairs that turn less often than this shrink.
    truncate: yarn: whether the blend between the two begins and ends at whole
      pairs.
    attention_factor: yarn: what rotated queries and keys are multiplied by.
  """

  theta: float
  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters (arXiv 2106.09685): W x becomes W x + scale * B A x.

  Attributes:
    rank: rows of A and columns of B.
    scale: what the adapters' product is multiplied by.
    targets: the products that have adapters, values of `PRODUCTS`.
  """

  rank: int
  scale: float = 1.0
  targets: tuple[str, ...] = tuple(PRODUCTS.values())


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; hashable, so jit takes it as static.

  Attributes:
    family: a key of `FAMILIES`.
    vocab_size: V, rows of the embedding table.
    dim: D, the width of the hidden states.
    mlp_dim: F, the width inside of the MLP.
    num_layers: L.
    num_heads: N, of queries.
    num_kv_heads: K, of keys and values.
    head_dim: H.
    norm_eps: what norms add to the mean square.
    rope: the rotary position embedding.
    tied: whether the embedding table is the output head.
    max_length: the config's `max_position_embeddings`, in tokens.
    rotary: for each layer whether it rotates queries and keys; () if all do.
    lora: the adapters that are trained, beside weights that are not; None for a
      model without any.
  """

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
  rotary: tuple[bool, ...] = ()
  lora: Lora | None = None

  @property
  def qk_norm(self) -> bool:
    return FAMILIES[self.family].qk_norm

  @property
  def qkv_bias(self) -> bool:
    return FAMILIES[self.family].qkv_bias


def _rope(config: transformers.PretrainedConfig, where: str) -> RopeConfig:
  """Reads `rope_parameters`, which transformers makes of older names, too."""
  # transformers' layers do the same, and it moves an original length in there.
  config.standardize_rope_params()
  rope = dict(config.rope_parameters)
  kind = rope.get("rope_type", "default")
  for name, value in rope.items():
    if isinstance(value, dict):
      raise UnsupportedModelError(
          f"{where}: rope_parameters for {name!r} alone are not implemented;"
          " only the same for all layers are."
      )

  def number(
      field: str, default: float | None = None, low: float = 0.0
  ) -> float:
    """Returns a number that is above 0, and `low` or more."""
    value = rope.get(field)
    if value is None:
      value = default
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not (real and 0 < value < math.inf and value >= low):
      bound = f"a number from {low:g} on" if low else "a positive number"
      raise UnsupportedModelError(
          f"{where}: {field} {value!r} of rope_type {kind!r} is not"
          f" implemented; only {bound} is."
      )
    return float(value)

  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise UnsupportedModelError(
        f"{where}: partial_rotary_factor"
        f" {rope['partial_rotary_factor']} is not implemented; only 1.0 is."
    )
  theta = number("rope_theta")
  if kind == "default":
    return RopeConfig(theta)
  if kind == "linear":
    return RopeConfig(theta, kind, number("factor"))
  if kind not in ("llama3", "yarn"):
    raise UnsupportedModelError(
        f"{where}: rope_type {kind!r} is not implemented; default, linear,"
        " llama3 and yarn are."
    )
  length = int(number("original_max_position_embeddings", low=1))
  if kind == "llama3":
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
      raise UnsupportedModelError(
          f"{where}: high_freq_factor {high:g} of rope_type 'llama3' is not"
          f" above low_freq_factor {low:g}; only one that is is implemented."
      )
    return RopeConfig(theta, kind, number("factor"), low, high, length)
  factor = number("factor", config.max_position_embeddings / length, low=1)
  # transformers takes a 0 for a value that is missing.
  fast, slow = (
      number(field, default) if rope.get(field) != 0 else default
      for field, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
  )
  truncate = rope.get("truncate", True)
  if theta <= 1 or fast < slow or not isinstance(truncate, bool):
    raise UnsupportedModelError(
        f"{where}: rope_type 'yarn' with rope_theta {theta:g}, beta_fast"
        f" {fast:g}, beta_slow {slow:g} and truncate {truncate!r} is not"
        " implemented; only a rope_theta above 1, a beta_fast from beta_slow on"
        " and a truncate of true or false are."
    )

  def mscale(weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0

  attention = mscale(1.0)
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    attention = mscale(number("mscale")) / mscale(number("mscale_all_dim"))
  return RopeConfig(
      theta,
      kind,
      factor,
      original_length=length,
      beta_fast=fast,
      beta_slow=slow,
      truncate=truncate,
      attention_factor=number("attention_factor", attention),
  )


def _refuse_unsupported(config: Any, where: str) -> None:
  """Raises if the config asks for what the transformer does not compute."""
  for field, wanted in _OPTIONS.items():
    value = getattr(config, field, wanted)
    if value != wanted:
      raise UnsupportedModelError(
          f"{where}: {field} {value!r} is not implemented; only"
          f" {wanted!r} is."
      )
  heads, groups = config.num_attention_heads, config.num_key_value_heads
  if heads % groups:
    raise UnsupportedModelError(
        f"{where}: num_attention_heads {heads} is no multiple of"
        f" num_key_value_heads {groups}; mend config.json, or download it"
        " again."
    )
  width = getattr(config, "head_dim", None) or config.hidden_size // heads
  if width < 2 or width % 2:
    raise UnsupportedModelError(
        f"{where}: heads of {width} channels (head_dim, or hidden_size"
        f" {config.hidden_size} by num_attention_heads {heads}) cannot be"
        " rotated in pairs; only an even number can."
    )
  eps = config.rms_norm_eps
  if not 0 <= eps < math.inf:
    raise UnsupportedModelError(
        f"{where}: rms_norm_eps {eps!r} is not implemented; only a number from"
        " 0 on is."
    )
  for kind in getattr(config, "layer_types", None) or ():
    if kind != _LAYER_TYPE:
      raise UnsupportedModelError(
          f"{where}: layer_types with {kind!r} is not implemented; only"
          f" {_LAYER_TYPE!r} is."
      )


def from_hf(config: transformers.PretrainedConfig, where: str) -> ModelConfig:
  """Reads a Hugging Face config.

  Args:
    config: what `transformers.AutoConfig` returned.
    where: the model's path, for error messages.

  Raises:
    UnsupportedModelError: an architecture or an option is not implemented.
  """
  family = find_family(config.model_type, where)
  _refuse_unsupported(config, where)
  head_dim = getattr(config, "head_dim", None)
  return ModelConfig(
      family=family.model_type,
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
      rotary=family.rotary(config, where),
  )


def sides(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Returns the outputs and inputs of each of a layer's products."""
  c = config
  heads, groups = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  return {
      "query": (heads, c.dim),
      "key": (groups, c.dim),
      "value": (groups, c.dim),
      "out": (c.dim, heads),
      "gate": (c.mlp_dim, c.dim),
      "up": (c.mlp_dim, c.dim),
      "down": (c.dim, c.mlp_dim),
  }


def num_adapters(config: ModelConfig) -> int:
  """Counts the numbers in all adapters; 0 without `lora`."""
  if config.lora is None:
    return 0
  found = sides(config)
  ends = sum(sum(found[name]) for name in config.lora.targets)
  return config.num_layers * config.lora.rank * ends


def num_trained(config: ModelConfig) -> int:
  """Counts the parameters that the optimizer updates."""
  return num_params(config) if config.lora is None else num_adapters(config)


def num_params(config: ModelConfig, embeddings: bool = True) -> int:
  """Counts parameters; a tied table counts once, and adapters do not.

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


def _qwen3(
    layers: int, dim: int, mlp: int, heads: int, positions: int = 32768
) -> ModelConfig:
  return ModelConfig(
      family="qwen3",
      vocab_size=151936,
      dim=dim,
      mlp_dim=mlp,
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=8,
      head_dim=128,
      norm_eps=1e-6,
      rope=RopeConfig(1e6),
      tied=dim < 4096,
      max_length=positions,
  )


def _r1_qwen(
    dim: int, mlp: int, heads: int, kv_heads: int, vocab: int
) -> ModelConfig:
  return ModelConfig(
      family="qwen2",
      vocab_size=vocab,
      dim=dim,
      mlp_dim=mlp,
      num_layers=28,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=128,
      norm_eps=1e-6,
      rope=RopeConfig(1e4),
      tied=False,
      max_length=131072,
  )


# Published architectures, for what needs no weights: plans and tables.
QWEN3_0_6B = _qwen3(28, 1024, 3072, 16)
QWEN3_1_7B = _qwen3(28, 2048, 6144, 16)
QWEN3_4B = _qwen3(36, 2560, 9728, 32)
QWEN3_8B = _qwen3(36, 4096, 12288, 32)
R1_QWEN_1_5B = _r1_qwen(1536, 8960, 12, 2, 151936)
R1_QWEN_7B = _r1_qwen(3584, 18944, 28, 4, 152064)
QWEN3_14B = _qwen3(40, 5120, 17408, 40, 40960)
R1_DISTILL_LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    dim=4096,
    mlp_dim=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    tied=False,
    max_length=131072,
)
