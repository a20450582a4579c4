"""transformers.generate on torch.

Arguments: the model's directory, and what to compute in. With a static cache
generate compiles the model where it can.
"""

import sys

import contest
import torch
import transformers


def main() -> None:
  path, dtype = sys.argv[1:]
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=getattr(torch, dtype)
  ).eval().to(device)

  @torch.inference_mode()
  def answer(tokens, new, static=False):
    tokens = torch.tensor(tokens, device=device)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
        cache_implementation="static" if static else None,
    )
    assert out.shape[1] == tokens.shape[1] + new
    return {"drawn": out[0, tokens.shape[1] :][:4].tolist()}

  contest.serve(answer)


if __name__ == "__main__":
  main()
