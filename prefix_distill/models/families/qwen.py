"""Qwen2, Qwen2.5 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388)."""

from prefix_distill.models.families import family

# Biases on queries, keys and values.
QWEN2 = family.Family(
    "qwen2",
    tensors=family.TENSORS
    | family.layer_tensors({
        "attention/query_bias": ("self_attn.q_proj.bias", 0),
        "attention/key_bias": ("self_attn.k_proj.bias", 0),
        "attention/value_bias": ("self_attn.v_proj.bias", 0),
    }),
    qkv_bias=True,
)

# Norms on each head's queries and keys, and no biases.
QWEN3 = family.Family(
    "qwen3",
    tensors=family.TENSORS
    | family.layer_tensors({
        "attention/query_norm/scale": ("self_attn.q_norm.weight", None),
        "attention/key_norm/scale": ("self_attn.k_norm.weight", None),
    }),
    qk_norm=True,
)

FAMILIES = (QWEN3, QWEN2)
