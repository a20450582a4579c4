"""Numbers that a device's arithmetic is held against, from float64 on a CPU.

  JAX_PLATFORMS=cpu python benchmarks/make_reference.py

Writes `benchmarks/reference.npz`: what a tiny student and a tiny teacher say of
a fixed rollout, and the gradients of the exact and of the sampled loss. The
models are written out here once more, plainly, with whole attention matrices
and whole logits, and use nothing of the package. Their weights are drawn by
NumPy, so they need not be kept, and are numbers that bfloat16 has, so that all
precisions start from the same ones.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FILE = pathlib.Path(__file__).parent / "reference.npz"
# Real token ids; the rows of both vocabularies above them are padding.
NUM_TOKENS = 300
# Directions that a parameter's gradient is projected on.
_DIRECTIONS = 16


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A Qwen3-like architecture; heads are as wide as GPU kernels want them."""

  vocab_size: int
  tied: bool
  seed: int
  dim: int = 128
  mlp_dim: int = 256
  num_layers: int = 3
  num_heads: int = 6
  num_kv_heads: int = 2
  head_dim: int = 64
  norm_eps: float = 1e-6
  theta: float = 1e4


STUDENT = Tiny(vocab_size=320, tied=True, seed=1)
TEACHER = Tiny(vocab_size=304, tied=False, seed=2, dim=192, num_layers=2)


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Prompts, padded on the left, and what follows them, on the right.

  Attributes:
    prompt: int32 [B, S].
    prompt_mask: bool [B, S].
    tokens: int32 [B, P].
    mask: bool [B, P].
    sampled_at: float32 [B, P], log-probabilities that the tokens are taken to
      have been sampled with.
  """

  prompt: np.ndarray
  prompt_mask: np.ndarray
  tokens: np.ndarray
  mask: np.ndarray
  sampled_at: np.ndarray


def inputs(rows: int = 8, prompt: int = 24, prefix: int = 40) -> Inputs:
  rng = np.random.default_rng(3)
  prompts = rng.integers(prompt // 2, prompt + 1, rows)
  lengths = rng.integers(prefix // 3, prefix + 1, rows)
  lengths[0] = prefix
  tokens = rng.integers(0, NUM_TOKENS, (rows, prompt + prefix)).astype(np.int32)
  return Inputs(
      tokens[:, :prompt],
      np.arange(prompt) >= prompt - prompts[:, None],
      tokens[:, prompt:],
      np.arange(prefix) < lengths[:, None],
      (-4 - 2 * rng.random((rows, prefix))).astype(np.float32),
  )


def weights(model: Tiny) -> dict[str, np.ndarray]:
  """Returns weights by their paths, in float32; layers are stacked."""
  m, rng = model, np.random.default_rng(model.seed)
  layers, heads = m.num_layers, (m.num_heads, m.head_dim)
  keys = (m.num_kv_heads, m.head_dim)
  inside = m.num_heads * m.head_dim
  matrices = {
      "embed/weight": ((m.vocab_size, m.dim), m.dim),
      "layers/attention/key": ((layers, *keys, m.dim), m.dim),
      "layers/attention/out": ((layers, m.dim, *heads), inside),
      "layers/attention/query": ((layers, *heads, m.dim), m.dim),
      "layers/attention/value": ((layers, *keys, m.dim), m.dim),
      "layers/mlp/down": ((layers, m.dim, m.mlp_dim), m.mlp_dim),
      "layers/mlp/gate": ((layers, m.mlp_dim, m.dim), m.dim),
      "layers/mlp/up": ((layers, m.mlp_dim, m.dim), m.dim),
  }
  scales = {
      "final_norm/scale": (m.dim,),
      "layers/attention/key_norm/scale": (layers, m.head_dim),
      "layers/attention/query_norm/scale": (layers, m.head_dim),
      "layers/attention_norm/scale": (layers, m.dim),
      "layers/mlp_norm/scale": (layers, m.dim),
  }
  if not m.tied:
    matrices["head/weight"] = ((m.vocab_size, m.dim), m.dim)
  drawn = {
      name: rng.standard_normal(shape) * fan_in**-0.5
      for name, (shape, fan_in) in matrices.items()
  }
  drawn |= {
      name: 1 + 0.1 * rng.standard_normal(shape)
      for name, shape in scales.items()
  }
  return {
      name: x.astype(ml_dtypes.bfloat16).astype(np.float32)
      for name, x in drawn.items()
  }


def project(name: str, gradient: np.ndarray) -> np.ndarray:
  """Returns a parameter's gradient along random directions of its own.

  Their mean square is that of the gradient's norm, so errors can be told from
  them without keeping the gradient.
  """
  rng = np.random.default_rng(list(name.encode()))
  flat = np.asarray(gradient, np.float64).reshape(-1)
  along = [
      rng.standard_normal(flat.size) @ flat for _ in range(_DIRECTIONS)
  ]
  return np.array(along) * _DIRECTIONS**-0.5


def _norm(x: Any, scale: Any, eps: float) -> Any:
  return x * ((x**2).mean(-1, keepdims=True) + eps) ** -0.5 * scale


def _rotate(x: Any, theta: float) -> Any:
  """Rotates [T, N, H], channel i with channel i + H / 2."""
  half = x.shape[-1] // 2
  angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _hidden(model: Tiny, params: dict[str, Any], tokens: np.ndarray) -> Any:
  """Returns one row's final hidden states [T, D]."""
  m, x = model, params["embed/weight"][tokens]
  causal = np.tri(tokens.shape[0], dtype=bool)
  for i in range(m.num_layers):
    layer = {
        name.removeprefix("layers/"): value[i]
        for name, value in params.items()
        if name.startswith("layers/")
    }
    y = _norm(x, layer["attention_norm/scale"], m.norm_eps)
    query, key, value = (
        jnp.einsum("td,nhd->tnh", y, layer[f"attention/{name}"])
        for name in ("query", "key", "value")
    )
    query, key = (
        _rotate(
            _norm(z, layer[f"attention/{name}_norm/scale"], m.norm_eps), m.theta
        )
        for name, z in (("query", query), ("key", key))
    )
    key, value = (
        jnp.repeat(z, m.num_heads // m.num_kv_heads, axis=1)
        for z in (key, value)
    )
    scores = jnp.einsum("tnh,snh->nts", query, key) * m.head_dim**-0.5
    share = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    y = jnp.einsum("nts,snh->tnh", share, value)
    x = x + jnp.einsum("tnh,dnh->td", y, layer["attention/out"])
    y = _norm(x, layer["mlp_norm/scale"], m.norm_eps)
    gate = jax.nn.silu(y @ layer["mlp/gate"].T)
    x = x + (gate * (y @ layer["mlp/up"].T)) @ layer["mlp/down"].T
  return _norm(x, params["final_norm/scale"], m.norm_eps)


def _states(model: Tiny, params: dict[str, Any], given: Inputs) -> Any:
  """Returns the states that predict the prefix tokens, row by row: [N, D]."""
  rows, places = [], []
  for i in range(len(given.tokens)):
    prompt = given.prompt[i][given.prompt_mask[i]]
    prefix = given.tokens[i][given.mask[i]]
    rows.append(np.concatenate([prompt, prefix[:-1]]))
    places += [(i, len(prompt) - 1 + j) for j in range(len(prefix))]
  # What is added on the right, no token looks at.
  longest = max(map(len, rows))
  tokens = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
  hidden = jax.vmap(functools.partial(_hidden, model, params))(tokens)
  return hidden[tuple(np.array(places).T)]


def _log_probs(model: Tiny, params: dict[str, Any], states: Any) -> Any:
  head = params["embed/weight" if model.tied else "head/weight"]
  return jax.nn.log_softmax((states @ head.T)[:, :NUM_TOKENS], axis=-1)


def _loss(
    given: Inputs, log_q: Any, form: str, params: dict[str, Any]
) -> Any:
  """Sums the reverse KL over all tokens, or the paper's loss on them."""
  log_p = _log_probs(STUDENT, params, _states(STUDENT, params, given))
  if form == "exact":
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))
  index = np.arange(len(log_p)), given.tokens[given.mask]
  sampled_at = given.sampled_at[given.mask].astype(np.float64)
  verdict = jax.lax.stop_gradient(log_p[index] - log_q[index])
  return jnp.sum(jnp.exp(log_p[index] - sampled_at) * verdict)


def main() -> None:
  jax.config.update("jax_enable_x64", True)
  given = inputs()
  student, teacher = (
      {name: np.asarray(x, np.float64) for name, x in weights(m).items()}
      for m in (STUDENT, TEACHER)
  )
  states = jax.jit(lambda p: _states(STUDENT, p, given))(student)
  log_q = jax.jit(
      lambda p: _log_probs(TEACHER, p, _states(TEACHER, p, given))
  )(teacher)
  log_p = _log_probs(STUDENT, student, states)
  last = np.cumsum(given.mask.sum(1)) - 1
  found = {
      "hidden": states,
      # Of each row's last token.
      "logits": states[last] @ student["embed/weight"].T,
      "log_probs": log_p[np.arange(len(log_p)), given.tokens[given.mask]],
  }
  for form in ("exact", "sampled"):
    loss = functools.partial(_loss, given, log_q, form)
    value, gradient = jax.jit(jax.value_and_grad(loss))(student)
    found[f"{form}/loss"] = value
    for name, x in gradient.items():
      found[f"{form}/{name}"] = project(name, x)
  assert found["hidden"].dtype == np.float64
  found = {
      name: np.asarray(x, np.float32 if np.ndim(x) > 1 else np.float64)
      for name, x in found.items()
  }
  np.savez_compressed(FILE, **found)
  print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
  main()
