"""Published architectures that are known without a network.

`plan` and the paper's tables need a model's shapes and none of its weights.
"""

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig


def _qwen3(layers: int, dim: int, mlp: int, heads: int) -> ModelConfig:
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
      max_length=32768,
  )


QWEN3_1_7B = _qwen3(28, 2048, 6144, 16)
QWEN3_8B = _qwen3(36, 4096, 12288, 32)
