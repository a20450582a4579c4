"""The one table of parameter names and layouts: ours and Hugging Face's."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import numpy as np

from prefix_distill import sharding

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a parameter's axes lie in the file.

  Attributes:
    index: our index (and H) to the index in the file.
    read: the file's block (and H) to ours.
    write: our array to the file's.
  """

  index: Callable[[Index, int], Index]
  read: Callable[[np.ndarray, int], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


def _rows(heads: slice, head_dim: int) -> slice:
  return slice(heads.start * head_dim, heads.stop * head_dim)


_SAME = Layout(lambda i, h: i, lambda x, h: x, lambda x: x)
# [N, H, D] here, [N * H, D] in torch.
_TO_HEADS = Layout(
    lambda i, h: (_rows(i[0], h), i[2]),
    lambda x, h: x.reshape(-1, h, x.shape[1]),
    lambda x: x.reshape(-1, x.shape[2]),
)
# [D, N, H] here, [D, N * H] in torch.
_FROM_HEADS = Layout(
    lambda i, h: (i[0], _rows(i[1], h)),
    lambda x, h: x.reshape(x.shape[0], -1, h),
    lambda x: x.reshape(x.shape[0], -1),
)
# [N, H] here, [N * H] in torch.
_HEAD_BIAS = Layout(
    lambda i, h: (_rows(i[0], h),),
    lambda x, h: x.reshape(-1, h),
    lambda x: x.reshape(-1),
)

# The one table of names. Ours -> (theirs, layout); a layer's number goes into
# the braces.
NAMES = {
    "embed/weight": ("model.embed_tokens.weight", _SAME),
    "final_norm/scale": ("model.norm.weight", _SAME),
    "head/weight": ("lm_head.weight", _SAME),
} | {
    f"layers/{ours}": (f"model.layers.{{}}.{theirs}", layout)
    for ours, theirs, layout in (
        ("attention_norm/scale", "input_layernorm.weight", _SAME),
        ("mlp_norm/scale", "post_attention_layernorm.weight", _SAME),
        ("attention/query", "self_attn.q_proj.weight", _TO_HEADS),
        ("attention/key", "self_attn.k_proj.weight", _TO_HEADS),
        ("attention/value", "self_attn.v_proj.weight", _TO_HEADS),
        ("attention/out", "self_attn.o_proj.weight", _FROM_HEADS),
        ("attention/query_bias", "self_attn.q_proj.bias", _HEAD_BIAS),
        ("attention/key_bias", "self_attn.k_proj.bias", _HEAD_BIAS),
        ("attention/value_bias", "self_attn.v_proj.bias", _HEAD_BIAS),
        ("attention/query_norm/scale", "self_attn.q_norm.weight", _SAME),
        ("attention/key_norm/scale", "self_attn.k_norm.weight", _SAME),
        ("mlp/gate", "mlp.gate_proj.weight", _SAME),
        ("mlp/up", "mlp.up_proj.weight", _SAME),
        ("mlp/down", "mlp.down_proj.weight", _SAME),
    )
}  # fmt: skip


def hf_names(ours: str, num_layers: int) -> list[str]:
  """Returns the file's names of a parameter: one for each layer, or one."""
  theirs = NAMES[ours][0]
  if "{}" not in theirs:
    return [theirs]
  return [theirs.format(i) for i in range(num_layers)]


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields "layers/mlp/up" and the like, with the leaf."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    yield sharding.path_name(path), leaf
