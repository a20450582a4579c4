"""Makes the golden files: `python tests/golden/make_golden.py`.

Each directory is a tiny random model that transformers saved, with what torch
computed from it: `expected.npz` holds a batch padded on the left, its float32
logits, last hidden states and greedy continuation, and `gradients.safetensors`
what a loss on its logits gives for every parameter. Needs torch.
"""

import pathlib

import numpy as np
import safetensors.torch
import torch
import transformers

_SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# The prompts and what follows them are longer than the original length.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
_LENGTHS = (24, 9, 17)
NEW_TOKENS = 12

NAMES = ("qwen3", "qwen2", "llama3_rope", "linear_rope", "smollm3", "yarn")


def _config(name: str) -> transformers.PretrainedConfig:
  if name == "qwen3":
    return transformers.Qwen3Config(
        **_SIZES, head_dim=6, tie_word_embeddings=True
    )
  if name == "qwen2":
    return transformers.Qwen2Config(**_SIZES, tie_word_embeddings=False)
  if name == "llama3_rope":
    return transformers.LlamaConfig(
        **_SIZES, head_dim=8, rope_parameters=_LLAMA3, tie_word_embeddings=False
    )
  if name == "smollm3":
    return transformers.SmolLM3Config(**_SIZES, no_rope_layer_interval=2)
  if name == "smollm3_yarn":
    return transformers.SmolLM3Config(
        **_SIZES, no_rope_layers=[0, 1], rope_parameters=_YARN
    )
  if name == "yarn":
    sizes = _SIZES | {"max_position_embeddings": 64}
    return transformers.Qwen3Config(
        **sizes, head_dim=16, rope_parameters=_YARN, tie_word_embeddings=True
    )
  return transformers.LlamaConfig(
      **_SIZES, rope_parameters=_LINEAR, tie_word_embeddings=True
  )


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
  """Fills every parameter, norms and biases too, with what must matter."""
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 1:
        parameter.add_(0.3 * noise)
      else:
        parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)


def _inputs(tokens: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
  attention = torch.from_numpy(mask).long()
  return {
      "input_ids": torch.from_numpy(tokens).long(),
      "attention_mask": attention,
      "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
  }


@torch.no_grad()
def expected(
    model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns torch's logits, hidden states and greedy text of a batch.

  Args:
    model: in float32.
    tokens: [B, S], padded on the left.
    mask: bool [B, S].
  """
  inputs = _inputs(tokens, mask)
  out = model(**inputs, output_hidden_states=True)
  greedy = model.generate(
      inputs["input_ids"],
      attention_mask=inputs["attention_mask"],
      do_sample=False,
      max_new_tokens=NEW_TOKENS,
  )
  return {
      "tokens": tokens,
      "mask": mask,
      "logits": out.logits.float().numpy(),
      "hidden": out.hidden_states[-1].float().numpy(),
      "greedy": greedy[:, tokens.shape[1] :].numpy().astype(np.int32),
  }


def gradients(
    model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, torch.Tensor]:
  """Returns the gradients of the summed cross-entropy of the next tokens.

  Args:
    model: in float32.
    tokens: [B, S], padded on the left.
    mask: bool [B, S].
  """
  inputs = _inputs(tokens, mask)
  model.zero_grad()
  logits = model(**inputs).logits
  losses = torch.nn.functional.cross_entropy(
      logits[:, :-1].flatten(0, 1),
      inputs["input_ids"][:, 1:].flatten(),
      reduction="none",
  )
  torch.sum(losses * inputs["attention_mask"][:, :-1].flatten()).backward()
  return {name: p.grad.clone() for name, p in model.named_parameters()}


def make(name: str, directory: pathlib.Path, seed: int) -> None:
  """Writes one model and what torch computes from it."""
  generator = torch.Generator().manual_seed(seed)
  config = _config(name)
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  _randomise(model, generator)
  model.save_pretrained(directory)
  rng = np.random.default_rng(seed)
  length = max(_LENGTHS)
  mask = np.arange(length) >= length - np.array(_LENGTHS)[:, None]
  tokens = rng.integers(1, _SIZES["vocab_size"], mask.shape, np.int32)
  tokens = np.where(mask, tokens, 0).astype(np.int32)
  np.savez_compressed(
      directory / "expected.npz", **expected(model, tokens, mask)
  )
  safetensors.torch.save_file(
      gradients(model, tokens, mask), directory / "gradients.safetensors"
  )


if __name__ == "__main__":
  for number, model_name in enumerate(NAMES):
    make(model_name, pathlib.Path(__file__).parent / model_name, number)
