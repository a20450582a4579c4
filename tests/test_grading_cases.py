"""Verdicts on answers of every kind that was once marked wrongly."""

import collections
import pathlib

import pytest

from prefix_distill.evaluate import grading

_FILE = pathlib.Path(__file__).parent / "grading_cases.txt"
_KINDS = {
    "letters": "letter",
    "dual": "dual_math",
    "dual letters": "dual_letter",
}


def _read():
  cases, section = collections.defaultdict(list), ""
  for line in _FILE.read_text(encoding="utf-8").splitlines():
    if line.startswith("["):
      section = line.strip("[]")
    elif line[:2] in ("+ ", "- "):
      answer, _, text = line[2:].partition(" | ")
      plain = section not in ("letters", "dual", "dual letters", "thinking")
      if plain and "box" not in text and "</think>" not in text:
        text = f"\\boxed{{{text}}}"
      cases[section].append((line[0] == "+", answer, text.replace("¶", "\n")))
  return cases


_CASES = _read()


@pytest.mark.parametrize("section", _CASES)
def test_verdicts(section):
  grade = grading.GRADERS[_KINDS.get(section, "math")]
  wrong = [
      (right, answer, text)
      for right, answer, text in _CASES[section]
      if grade(text, answer) != right
  ]
  assert not wrong


@pytest.mark.parametrize("section", _CASES)
def test_there_are_right_and_wrong_ones_of_each_kind(section):
  verdicts = [right for right, _, _ in _CASES[section]]
  assert len(verdicts) >= 40 or section == "dual letters"
  assert 5 <= sum(verdicts) <= len(verdicts) - 5
