"""How the next token is drawn from logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from prefix_distill import sharding

# Tokens of a block, near the square root of large vocabularies.
_BLOCK = 256
# No block crosses the border of a sixteenth of the vocabulary, so that those of
# a vocabulary that is split over as many devices, or fewer, are made in place.
_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Truncation:
  """Which tokens may be drawn; hashable. All of them by default.

  Attributes:
    top_k: only so many of the most probable ones; 0 for all.
    top_p: only the most probable ones that together reach this probability
      (nucleus sampling, arXiv 1904.09751); 1 for all.
  """

  top_k: int = 0
  top_p: float = 1.0

  @property
  def is_off(self) -> bool:
    return self.top_k == 0 and self.top_p == 1.0


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
    logits: jax.Array, temperature: jax.Array | float, num_tokens: int
) -> jax.Array:
  """Returns log softmax(logits / temperature) over the real ids: [..., V]."""
  scaled = mask_padding(logits.astype(jnp.float32), num_tokens) / temperature
  return jax.nn.log_softmax(scaled, axis=-1)


def entropy(distribution: jax.Array) -> jax.Array:
  """Returns -sum p log p in nats, of log-probabilities [..., V]: [...]."""
  shares = jnp.exp(distribution) * distribution
  return -jnp.sum(jnp.where(distribution > -jnp.inf, shares, 0), axis=-1)


def truncate(distribution: jax.Array, truncation: Truncation) -> jax.Array:
  """Keeps the most probable tokens and renormalises: [..., V] to [..., V].

  A token is kept if it is among the `top_k`, and if the tokens that are more
  probable have less than `top_p` together; so at least one is kept. Tokens as
  probable as the last one kept are kept as well.

  Args:
    distribution: log-probabilities.
    truncation: what to keep.

  Returns:
    Log-probabilities; -inf for the tokens left out.
  """
  if truncation.is_off:
    return distribution
  size = distribution.shape[-1]
  k = min(truncation.top_k or size, size)
  ordered, _ = jax.lax.top_k(distribution, k)
  above = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
  # The first is always kept, whatever rounding makes of a top_p near 0.
  kept = (above < truncation.top_p).at[..., 0].set(True)
  least = jnp.min(
      jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True
  )
  left = jnp.where(distribution >= least, distribution, -jnp.inf)
  return jax.nn.log_softmax(left, axis=-1)


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
    keys: jax.Array,
    distribution: jax.Array,
    greedy: jax.Array | bool,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Draws a token a row: int32 [B].

  Args:
    keys: [B], one key a row.
    distribution: [B, V], log-probabilities.
    greedy: take the most probable token instead of a random one; may be
      traced.
    mesh: whose `tensor` axis may split the vocabulary; None for one device.
  """
  best = jnp.argmax(distribution, axis=-1)
  # Both are computed: for a conditional a GPU would wait for the host.
  uniform = jax.vmap(jax.random.uniform)(keys)
  tokens = _invert_cdf(uniform, distribution, mesh)
  return jnp.where(greedy, best, tokens).astype(jnp.int32)


def _invert_cdf(
    uniform: jax.Array,
    distribution: jax.Array,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
  """Returns the tokens at which the cumulated probabilities pass `uniform`.

  First the block of tokens, then the token in it: one random number a row,
  where Gumbel noise takes one for each token of the vocabulary, and no
  cumulated sum over all of that.
  """
  batch, size = distribution.shape
  parts = math.gcd(size, _PARTS)
  width = min(_BLOCK, size // parts)
  count = -(-size // parts // width)
  blocks = jnp.exp(distribution).reshape(batch, parts, size // parts)
  padding = ((0, 0), (0, 0), (0, count * width - size // parts))
  blocks = jnp.pad(blocks, padding).reshape(batch, parts * count, width)
  mass = blocks.sum(axis=-1)
  if mesh is not None:
    # Gathered outright, or each step of the search crosses the devices.
    mass = jax.lax.with_sharding_constraint(
        mass, sharding.batch_sharding(mesh)
    )
  before = jnp.cumsum(mass, axis=-1)
  goal = uniform[:, None] * before[:, -1:]
  block = _first_past(goal, before, mass)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  start = jnp.where(
      block[:, None] > 0,
      jnp.take_along_axis(before, block[:, None] - 1, axis=1),
      0,
  )
  token = _first_past(goal, start + jnp.cumsum(inside, axis=-1), inside)
  return block // count * (size // parts) + block % count * width + token


def _first_past(
    goal: jax.Array, cumulated: jax.Array, mass: jax.Array
) -> jax.Array:
  """Returns where sums first exceed the goal [B, 1]: [B] of [B, N] each.

  Sums are rounded, each in its own way. So the goal may fall on an entry
  without mass, which must not be drawn, or just past the last one: then it is
  the last entry that has mass.
  """
  drawn = (cumulated > goal) & (mass > 0)
  last = mass.shape[-1] - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
  return jnp.where(
      jnp.any(drawn, axis=-1), jnp.argmax(drawn, axis=-1), last
  )


def log_prob_of(tokens: jax.Array, distribution: jax.Array) -> jax.Array:
  """Picks the tokens' log-probabilities: [B] and [B, V] to [B]."""
  chosen = jnp.take_along_axis(distribution, tokens[:, None], axis=-1)
  return chosen[:, 0]
