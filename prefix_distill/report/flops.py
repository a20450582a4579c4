"""The FLOP ledger: what each phase costs, from actual lengths."""

import dataclasses

import numpy as np

from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import num_params


def forward(config: ModelConfig, lengths: np.ndarray) -> float:
  """FLOPs of a forward pass over sequences, summed.

    F_fwd(M, T) = 2 N T + 2 L n_heads d_head T^2

  N counts every matrix product of a position (the output head, not the
  embedding look-up); the second term is causal attention, half of 4 L n d T^2.
  Decoding with a cache to length T costs the same. Source: arXiv 2602.15260,
  appendix B, which takes a forward pass as a third of training.

  Args:
    config: the model.
    lengths: tokens of each sequence, prompt included.
  """
  lengths = np.asarray(lengths, np.float64)
  dense = 2.0 * num_params(config, embeddings=False) * lengths
  width = config.num_layers * config.num_heads * config.head_dim
  return float(np.sum(dense + 2.0 * width * lengths**2))


def backward(config: ModelConfig, lengths: np.ndarray) -> float:
  """FLOPs of a backward pass: twice the forward's."""
  return 2.0 * forward(config, lengths)


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """One update, by phase."""

  prefill: float
  decode: float
  score: float
  update: float

  @property
  def total(self) -> float:
    return self.prefill + self.decode + self.score + self.update


def distillation(
    student: ModelConfig,
    teacher: ModelConfig,
    prompts: np.ndarray,
    lengths: np.ndarray,
) -> StepFlops:
  """FLOPs of an on-policy update over rollouts of the given lengths.

  The phases that this package runs: the student reads each prompt once and
  samples its rollouts, the teacher scores them, the student is trained (its own
  log-probabilities come out of that pass). The paper's formula reads the prompt
  again for every rollout, and adds one more student forward for those
  log-probabilities.

  Args:
    student: its architecture.
    teacher: its architecture.
    prompts: [prompts], tokens of each prompt.
    lengths: [prompts * n], prefix tokens of each rollout, as sampled and not
      as capped; those of one prompt next to each other.
  """
  read = np.repeat(prompts, len(lengths) // len(prompts))
  prefill, whole = forward(student, prompts), read + lengths
  return StepFlops(
      prefill=prefill,
      decode=forward(student, whole) - forward(student, read),
      score=forward(teacher, whole),
      update=forward(student, whole) + backward(student, whole),
  )


def supervised(student: ModelConfig, lengths: np.ndarray) -> StepFlops:
  """FLOPs of a supervised update."""
  update = forward(student, lengths) + backward(student, lengths)
  return StepFlops(0.0, 0.0, 0.0, update)
