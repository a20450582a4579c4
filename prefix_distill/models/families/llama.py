"""Llama, and models of its kind such as SmolLM2 (arXiv 2302.13971)."""

from prefix_distill.models.families import family

FAMILY = family.Family("llama", family.TENSORS)
