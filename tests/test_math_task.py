"""The bundled task: its problems, its solutions and its tokenizer."""

import hashlib
import os
import random
import re
import subprocess
import sys

import pytest

from configs import bundled
from prefix_distill import assets
from prefix_distill.data import bundled_tasks
from prefix_distill.data import tokenizer as tokenizer_lib

_STOPS = {
    "teacher": "<|im_end|>",
    "capable": "<|endoftext|>",
    "weak": "<|endoftext|>",
    "chain-teacher": "<|im_end|>",
    "chain-weak": "<|endoftext|>",
}
_TEXTS = (
    "",
    " ",
    "  two  spaces\t\tand tabs \r\n\r\n  ",
    "naïve café, Ærø, ŧ",
    "日本語のテキストと한국어",
    "😀 👩‍👩‍👧‍👦 e\u0301 \u200f\u202eright to left",
    "\x00\x07\x7f\u2028\U0010ffff",
    "x = 12345 − 6 \\boxed{−7} <think> </think> 0041",
)


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.load("bundled:teacher")


def _boxed(completion: str) -> str | None:
  found = re.findall(r"\\boxed\{(\d+)\}", completion)
  return found[-1] if found else None


def _read_story(question: str) -> tuple[str, str, int]:
  """Solves a question from its text alone: person, item and count."""
  item, person = re.search(r"How many (\w+) does (\w+) have", question).groups()
  total = 0
  for sentence in question.split(". ")[:-1]:
    words = sentence.split()
    if words[-1] != item:
      continue
    amount, subject, verb = int(words[-2]), words[0], words[1]
    if verb == "gives":
      total += amount * ((words[2] == person) - (subject == person))
    elif subject == person:
      total += -amount if verb in bundled_tasks.LOSSES else amount
  return person, item, total


def test_a_record_depends_on_its_split_style_and_index_alone():
  program = (
      "from prefix_distill.data import bundled_tasks\n"
      "for split in bundled_tasks.SPLITS:\n"
      "  for style in bundled_tasks.STYLES:\n"
      "    task = bundled_tasks.MathTask(split, 10_000, style)\n"
      "    print([task[i] for i in (9_999, 3, 0)])\n"
  )
  elsewhere = subprocess.run(
      [sys.executable, "-c", program],
      env=os.environ | {"PYTHONHASHSEED": "7"},
      capture_output=True,
      text=True,
      check=True,
  ).stdout.splitlines()
  random.seed(5)
  here = [
      str([
          bundled_tasks.MathTask(split, 10_000, style)[i]
          for i in (9_999, 3, 0)
      ])
      for split in bundled_tasks.SPLITS
      for style in bundled_tasks.STYLES
  ]
  assert elsewhere == here
  assert len(set(here)) == len(here)


def test_splits_never_overlap():
  splits = [
      {bundled_tasks.problem(split, i).question for i in range(3000)}
      for split in ("train", "validation", "test")
  ]
  assert len(set.union(*splits)) == sum(map(len, splits))
  assert min(map(len, splits)) > 2900


@pytest.mark.parametrize("split", bundled_tasks.SPLITS)
def test_the_hash_of_the_text_decides_the_split(split):
  for i in range(500):
    text = bundled_tasks.problem(split, i).question
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little") % 100
    held_out = "validation" if number < 2 else "test"
    assert split == (held_out if number < 10 else "train")


def test_the_answer_follows_from_the_text():
  for i in range(500):
    prob = bundled_tasks.problem("test", i)
    assert _read_story(prob.question) == (
        prob.person,
        prob.item,
        prob.answer,
    )


def test_a_clean_solution_is_right_in_every_line():
  for i in range(500):
    record = bundled_tasks.MathTask("train", 500)[i]
    text = record["completion"]
    assert _boxed(text) == record["answer"]
    assert text.count("</think>") == 1
    total = int(re.search(r"so the total is (\d+)", text).group(1))
    sums = re.findall(
        r"(\d+) ([+-]) (\d+) = (\d+)\. Now the total is (\d+)", text
    )
    for before, sign, amount, after, now in sums:
      assert int(before) == total
      total += int(amount) if sign == "+" else -int(amount)
      assert int(after) == int(now) == total
      assert 0 <= total <= bundled_tasks.MAX_TOTAL
    assert len(sums) == text.count("Step ") - 1 >= 2
    assert str(total) == record["answer"]


def test_a_clean_plan_uses_exactly_the_sentences_about_the_question():
  for i in range(200):
    prob = bundled_tasks.problem("test", i)
    text = bundled_tasks.solution(prob, "clean", random.Random(0))
    plan = re.findall(r"^(.+): (use|skip)\.$", text, re.MULTILINE)
    assert [s for s, _ in plan] == [s.text for s in prob.sentences]
    for sentence, verdict in plan:
      words = sentence.split()
      about = words[0] == prob.person and words[-1] == prob.item
      assert (verdict == "use") == about
    assert any(verdict == "skip" for _, verdict in plan)
    steps = re.findall(r"^Step \d+: ([^.]+)\.", text, re.MULTILINE)
    assert steps == [s for s, verdict in plan if verdict == "use"]


@pytest.mark.parametrize("style", ("capable", "weak"))
def test_sloppy_solutions_are_right_at_times(style):
  size = 400
  clean = bundled_tasks.MathTask("test", size)
  sloppy = bundled_tasks.MathTask("test", size, style)
  right, same = 0, 0
  for i in range(size):
    assert sloppy[i]["question"] == clean[i]["question"]
    assert sloppy[i]["answer"] == clean[i]["answer"]
    right += _boxed(sloppy[i]["completion"]) == clean[i]["answer"]
    same += sloppy[i]["completion"] == clean[i]["completion"]
  assert 0.15 < right / size < 0.60
  assert same / size < 0.40


def test_a_capable_solver_slips_in_the_opening_only():
  for i in range(200):
    text = bundled_tasks.MathTask("test", 200, "capable")[i]["completion"]
    for before, sign, amount, after in re.findall(
        r": (\d+) ([+-]) (\d+) = (\d+)\.", text
    ):
      change = int(amount) if sign == "+" else -int(amount)
      # A careless plan can leave the range of the task; it is cut there.
      assert int(after) == min(max(int(before) + change, 0), 60)
    last = re.findall(r"total is (\d+)", text)[-1]
    assert _boxed(text) == last


def test_sequence_ends_at_its_size():
  task = bundled_tasks.MathTask("test", 3)
  assert [r["question"] for r in task] == [
      bundled_tasks.problem("test", i).question for i in range(3)
  ]
  with pytest.raises(IndexError):
    task[3]


@pytest.mark.parametrize("split", ("valid", "", "Train"))
def test_unknown_split_is_refused(split):
  with pytest.raises(ValueError, match=f"no split '{split}'.*'test'"):
    bundled_tasks.MathTask(split, 3)
  with pytest.raises(ValueError, match=f"no split '{split}'"):
    bundled_tasks.problem(split, 0)


def test_unknown_style_is_refused():
  with pytest.raises(ValueError, match="no style 'tidy'.*'clean'"):
    bundled_tasks.MathTask("train", 3, "tidy")
  with pytest.raises(ValueError, match="no style 'tidy'"):
    bundled_tasks.solution(
        bundled_tasks.problem("train", 0), "tidy", random.Random(0)
    )


def test_a_completion_is_at_least_four_times_its_prompt(tokenizer):
  for split in bundled_tasks.SPLITS:
    task = bundled_tasks.MathTask(split, 500)
    for i in range(500):
      prompt = tokenizer.encode(
          tokenizer.prompt(task[i]["question"], "<think>")
      )
      completion = tokenizer.encode(task[i]["completion"])
      assert len(completion) >= 4 * len(prompt), (split, i)


@pytest.mark.parametrize("style", bundled_tasks.STYLES)
def test_every_word_of_the_task_is_one_token(tokenizer, style):
  pre_tokenizer = tokenizer.pretrained.backend_tokenizer.pre_tokenizer
  task = bundled_tasks.MathTask("train", 300, style)
  for i in range(300):
    record = task[i]
    prompt = tokenizer.prompt(record["question"], "<think>")
    for text in (prompt, record["completion"]):
      pieces = []
      for part in re.split(r"(<\|im_start\|>|<\|im_end\|>|</?think>)", text):
        if part.startswith("<"):
          pieces.append(part)
        else:
          pieces += [p for p, _ in pre_tokenizer.pre_tokenize_str(part)]
      assert (
          tokenizer.pretrained.convert_ids_to_tokens(tokenizer.encode(text))
          == pieces
      )


def test_decoding_inverts_encoding(tokenizer):
  texts = list(_TEXTS)
  task = bundled_tasks.MathTask("test", 20, "weak")
  for i in range(20):
    texts.append(tokenizer.prompt(task[i]["question"], "<think>"))
    texts.append(task[i]["completion"] + "<|im_end|>")
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", sorted(_STOPS))
def test_the_bundled_tokenizer_is_what_its_maker_makes(name, tmp_path):
  made = bundled.make_tokenizer(_STOPS[name])
  loaded = tokenizer_lib.load(f"bundled:{name}").pretrained
  assert loaded.get_vocab() == made.get_vocab()
  assert loaded.chat_template == made.chat_template
  assert loaded.eos_token == made.eos_token == _STOPS[name]
  assert loaded.pad_token == made.pad_token
  made.save_pretrained(tmp_path)
  shipped = (assets.path(name) / "tokenizer.json").read_text()
  assert (tmp_path / "tokenizer.json").read_text() == shipped
