"""TRL's DistillationTrainer."""

import sys
import tempfile
import time

import contest
import datasets
import torch
import transformers
import trl


class _Times(transformers.TrainerCallback):
  """Seconds of every step."""

  def __init__(self):
    self.seconds = []

  def on_step_begin(self, *args, **kwargs):
    self._start = time.perf_counter()

  def on_step_end(self, *args, **kwargs):
    self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
  teacher, student = (
      transformers.AutoModelForCausalLM.from_pretrained(
          path, dtype=torch.float32
      )
      for path in sys.argv[1:]
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
  tokenizer.padding_side = "left"
  # So that every completion has the length that is asked for.
  student.generation_config.eos_token_id = None

  def answer(tokens, new):
    # A word that is one token, so that prompts have their length.
    prompts = [" the" * len(row) for row in tokens]
    assert len(tokenizer.encode(prompts[0])) == len(tokens[0])
    args = trl.DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=len(tokens),
        max_completion_length=new,
        gradient_accumulation_steps=1,
        beta=1.0,
        temperature=1.0,
        top_k=0,
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
    )
    times = _Times()
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts * 2}),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return {"seconds": times.seconds[-1]}

  contest.serve(answer)


if __name__ == "__main__":
  main()
