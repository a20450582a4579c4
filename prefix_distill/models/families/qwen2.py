"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values."""

from prefix_distill.models.families import family

FAMILY = family.Family(
    "qwen2",
    tensors=family.TENSORS
    | family.layer_tensors({
        "attention/query_bias": ("self_attn.q_proj.bias", 0),
        "attention/key_bias": ("self_attn.k_proj.bias", 0),
        "attention/value_bias": ("self_attn.v_proj.bias", 0),
    }),
    qkv_bias=True,
)
