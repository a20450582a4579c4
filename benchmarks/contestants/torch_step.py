"""A plain torch loop: generate, both forwards, exact reverse KL, AdamW."""

import sys

import contest
import torch
import transformers


def main() -> None:
  teacher, student = (
      transformers.AutoModelForCausalLM.from_pretrained(
          path, dtype=torch.float32
      )
      for path in sys.argv[1:]
  )
  teacher.eval()
  optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

  def answer(tokens, new):
    tokens = torch.tensor(tokens)
    prompt = tokens.shape[1]
    with torch.inference_mode():
      out = student.generate(
          tokens, attention_mask=torch.ones_like(tokens), do_sample=True,
          temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
          min_new_tokens=new, pad_token_id=0,
      )  # fmt: skip
    out = out.clone()
    keep = new + 1
    with torch.no_grad():
      theirs = teacher(out, logits_to_keep=keep).logits[:, :-1]
      theirs = theirs.log_softmax(-1)
    ours = student(out, logits_to_keep=keep).logits[:, :-1].log_softmax(-1)
    loss = (ours.exp() * (ours - theirs)).sum(-1).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    assert out.shape[1] == prompt + new and torch.isfinite(loss)

  contest.serve(answer)


if __name__ == "__main__":
  main()
