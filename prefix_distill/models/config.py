"""What the transformer needs to know, read from a Hugging Face config."""

import dataclasses
import math
from typing import Any

import transformers

from prefix_distill.models import families
from prefix_distill.models.families import UnsupportedModelError

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
    family: a key of `families.FAMILIES`.
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
    return families.FAMILIES[self.family].qk_norm

  @property
  def qkv_bias(self) -> bool:
    return families.FAMILIES[self.family].qkv_bias


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
  family = families.find(config.model_type, where)
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
