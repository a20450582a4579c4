"""How the next token is drawn from logits."""

import jax
import jax.numpy as jnp


def mask_padding(logits: jax.Array, num_tokens: int) -> jax.Array:
  """Rules out a vocabulary's padded rows: ids of `num_tokens` and above.

  Model vocabularies are padded (151,936 rows for 151,669 ids in Qwen3, 152,064
  in others), and two models agree only on the real ids.
  """
  if num_tokens >= logits.shape[-1]:
    return logits
  real = jnp.arange(logits.shape[-1]) < num_tokens
  return jnp.where(real, logits, -jnp.inf)


def log_probs(
    logits: jax.Array, temperature: float, num_tokens: int
) -> jax.Array:
  """Returns log softmax(logits / temperature) over the real ids: [..., V]."""
  scaled = mask_padding(logits.astype(jnp.float32), num_tokens) / temperature
  return jax.nn.log_softmax(scaled, axis=-1)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns a key per row, so that a row does not depend on its batch.

  Args:
    key: a scalar key.
    rows: int32 [B, ...], the numbers that identify a row, folded in in turn.
  """
  rows = rows.reshape(rows.shape[0], -1)

  def fold(numbers):
    folded = key
    for i in range(rows.shape[1]):
      folded = jax.random.fold_in(folded, numbers[i])
    return folded

  return jax.vmap(fold)(rows)


def choose(
    keys: jax.Array, distribution: jax.Array, greedy: bool
) -> tuple[jax.Array, jax.Array]:
  """Draws a token a row.

  Args:
    keys: [B], one key a row.
    distribution: [B, V], log-probabilities.
    greedy: take the most probable token instead of a random one.

  Returns:
    Tokens int32 [B] and their log-probabilities [B].
  """
  if greedy:
    tokens = jnp.argmax(distribution, axis=-1)
  else:
    tokens = jax.vmap(jax.random.categorical)(keys, distribution)
  tokens = tokens.astype(jnp.int32)
  chosen = jnp.take_along_axis(distribution, tokens[:, None], axis=-1)
  return tokens, chosen[:, 0]
