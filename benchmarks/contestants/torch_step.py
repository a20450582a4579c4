"""A plain torch loop: generate, both forwards, exact reverse KL, AdamW.

Arguments: the teacher's directory, the student's, and what to compute in. In
bfloat16 the student's weights are kept in float32, and a copy of them writes.
"""

import copy
import sys

import contest
import torch
import transformers


def main() -> None:
  *paths, dtype = [*sys.argv[1:], "float32"][:3]
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, dtype)
  half = dtype != torch.float32
  teacher, student = (
      transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kept).to(
          device
      )
      for path, kept in zip(paths, (dtype, torch.float32), strict=True)
  )
  teacher.eval()
  writer = copy.deepcopy(student).to(dtype).eval() if half else student
  optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

  def answer(tokens, new):
    tokens = torch.tensor(tokens, device=device)
    prompt = tokens.shape[1]
    if half:
      pairs = zip(writer.parameters(), student.parameters(), strict=True)
      with torch.no_grad():
        for mine, theirs in pairs:
          mine.copy_(theirs)
    with torch.inference_mode():
      out = writer.generate(
          tokens,
          attention_mask=torch.ones_like(tokens),
          do_sample=True,
          temperature=1.0,
          top_k=0,
          top_p=1.0,
          max_new_tokens=new,
          min_new_tokens=new,
          pad_token_id=0,
      )
    out = out.clone()
    keep = new + 1
    with torch.no_grad():
      theirs = teacher(out, logits_to_keep=keep).logits[:, :-1].float()
      theirs = theirs.log_softmax(-1)
    with torch.autocast(device, dtype, enabled=half):
      ours = student(out, logits_to_keep=keep).logits[:, :-1]
    ours = ours.float().log_softmax(-1)
    loss = (ours.exp() * (ours - theirs)).sum(-1).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    if device == "cuda":
      torch.cuda.synchronize()
    assert out.shape[1] == prompt + new and torch.isfinite(loss)

  contest.serve(answer)


if __name__ == "__main__":
  main()
