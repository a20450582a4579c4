"""Qwen3 (arXiv 2505.09388): norms on each head's queries and keys."""

from prefix_distill.models.families import family

FAMILY = family.Family(
    "qwen3",
    tensors=family.TENSORS
    | family.layer_tensors({
        "attention/query_norm/scale": ("self_attn.q_norm.weight", None),
        "attention/key_norm/scale": ("self_attn.k_norm.weight", None),
    }),
    qk_norm=True,
)
