import time

import numpy as np
import pytest

from prefix_distill.evaluate import evaluator
from prefix_distill.evaluate import grading

Z = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
  """Wilson's interval as the roots of (p - share)^2 = z^2 p (1 - p) / n."""
  share, square = successes / trials, Z * Z / trials
  roots = np.roots([1 + square, -(2 * share + square), share * share])
  return tuple(sorted(roots.real))


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("Ann has \\boxed{12} pens.", "12"),
        ("so it is \\boxed{\\frac{1}{2}}", "0.5"),
        ("so it is \\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}"),
        ("\\boxed{x^2 + 2x}", "x(x+2)"),
        ("\\boxed{1,000}", "1000"),
        ("\\boxed{3}\n</think>\n\n\\boxed{4}", "4"),
        ("</think> \\boxed{3} </think>\n\\boxed{4}", "4"),
        ("The answer is 7", "7"),
    ],
)
def test_equal_answers_are_right(completion, answer):
  assert grading.is_correct(completion, answer)


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("Ann has \\boxed{12} pens.", "13"),
        ("\\boxed{\\frac{1}{3}}", "0.5"),
        ("", "0"),
        ("no number at all", "1"),
        ("\\boxed{", "1"),
        ("\\boxed{4}\n</think>\n\n\\boxed{3}", "4"),
        ("\\boxed{4}\n</think>\n\nso we are done", "4"),
    ],
)
def test_other_answers_are_wrong(completion, answer):
  assert not grading.is_correct(completion, answer)


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{C}",
        "\\boxed{c}",
        "\\boxed{ C }",
        "\\boxed{(C)}",
        "\\boxed{[C]}",
        "\\boxed{C)}",
        "\\boxed{C.}",
        "\\boxed{$C$}",
        "\\boxed{C. foo}",
        "\\boxed{C: foo}",
        "\\boxed{(C) foo bar}",
        "\\boxed{\\text{C}}",
        "\\boxed{\\text{(C)}}",
        "\\boxed{\\mathrm{C}.}",
        "\\boxed{\\textbf{C}}",
        "\\boxed{\\text{C. \\textbf{foo}}}",
        "\\boxed{\\text{Option C}}",
        "\\boxed{\\boxed{C}}",
        "First \\boxed{A}, but then \\boxed{C}, which is not A.",
        "\\boxed{A}\n</think>\n\n\\boxed{C}",
        "The answer is (A).\n</think>\n\nThe answer is (C).",
        "\\boxed{42}, so that the answer is (C).",
        "The answer is C",
        "The answer is c.",
        "The answer is (C) neon.",
        "The answer is C. Neon",
        "the answer is: **C**",
        "**Answer:** C\n\nIt is noble.",
        "The answer is \\(C\\), as A reacts.",
        "The answer is \\text{(C)}.",
        "The answer is option C.",
        "The correct option is C because A reacts.",
        "The answer is (A). No: the answer is (C).",
    ],
)
def test_the_right_letter_is_found(completion):
  assert grading.is_letter(completion, "C")
  for other in "ABD":
    assert not grading.is_letter(completion, other)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "C",
        "C is the third letter.",
        "Option C: neon",
        "Carbon, B, C and D",
        "\\boxed{",
        "\\boxed{C",
        "\\boxed{Carbon}",
        "\\boxed{CD}",
        "\\boxed{C, D}",
        "\\boxed{C and D}",
        "\\boxed{(C) and (D)}",
        "\\boxed{c^2}",
        "\\boxed{\\sqrt{c}}",
        "\\boxed{C_2}",
        "\\boxed{C}, no, \\boxed{A}",
        "\\boxed{C}\n</think>\n\nso we are done",
        "\\boxed{C}\n</think>\n\n\\boxed{A}",
        "The answer is not C.",
        "The answer is Carbon.",
        "The answer is C-shaped.",
        "The answer is C or D.",
        "The answer is (C) or (D).",
        "The answer is A.C. current.",
        "The wrong answer is C.",
        "The incorrect answer is (C).",
        "The best option is to cool it.",
    ],
)
def test_letters_in_other_places_are_no_answer(completion):
  assert not grading.is_letter(completion, "C")


@pytest.mark.parametrize("word", ["a gas", "a noble gas.", "I think neon"])
def test_words_of_one_letter_are_no_answer(word):
  assert not grading.is_letter(f"The answer is {word}", word[0].upper())


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{x", "\\boxed{{{{", "answer is ", "a{b} "]
)
def test_answers_that_repeat_for_pages_are_graded_at_once(piece):
  text = "\\boxed{" + piece * (60_000 // len(piece))
  begin = time.perf_counter()
  assert not grading.is_letter(text, "C")
  assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("successes, trials", [(3, 10), (50, 200), (1, 2)])
def test_one_sample_a_problem_gives_wilsons_interval(successes, trials):
  correct = np.arange(trials)[:, None] < successes
  ours = grading.interval(correct)
  assert ours == pytest.approx(wilson(successes, trials), abs=1e-6)


@pytest.mark.parametrize("trials", [1, 6, 7, 400])
def test_none_or_all_right_give_wilsons_interval(trials):
  for successes in (0, trials):
    correct = np.full((trials, 3), bool(successes))
    low, high = grading.interval(correct)
    assert 0 <= low < high <= 1
    assert low <= correct.mean() <= high  # Not off by a rounding error.
    assert (low, high) == pytest.approx(wilson(successes, trials), abs=1e-6)


def test_the_interval_holds_the_mean_and_lies_between_0_and_1():
  rng = np.random.default_rng(0)
  for share in (0.02, 0.5, 0.98):
    for shape in ((2, 2), (5, 1), (40, 4)):
      correct = rng.random(shape) < share
      low, high = grading.interval(correct)
      assert 0 <= low <= correct.mean() <= high <= 1


def width(correct: np.ndarray) -> float:
  low, high = grading.interval(correct)
  return high - low


def test_the_interval_shrinks_with_more_problems():
  correct = np.arange(20)[:, None] % 3 == 0
  widths = [width(np.tile(correct, (n, 1))) for n in (1, 4, 16)]
  assert widths[0] > 1.8 * widths[1] > 1.8 * 1.8 * widths[2]


def test_samples_that_agree_do_not_shrink_the_interval():
  correct = np.random.default_rng(0).random((50, 1)) < 0.4
  repeated = np.repeat(correct, 8, axis=1)
  assert width(repeated) == pytest.approx(width(correct), rel=1e-6)


def test_independent_samples_shrink_the_interval_as_more_trials_would():
  correct = np.random.default_rng(0).random((100, 8)) < 0.4
  successes = int(correct.sum())
  low, high = wilson(successes, 800)
  assert width(correct) == pytest.approx(high - low, rel=0.3)


def test_the_interval_is_never_that_of_more_trials_than_there_are():
  # Nearly equal shares by chance: 5 problems, each half right but for one.
  correct = np.array([[1, 0]] * 4 + [[1, 1]], bool)
  low, high = wilson(6, 10)
  assert width(correct) >= high - low - 1e-6


def test_a_summary_counts_what_was_graded():
  texts = [["\\boxed{1}", "\\boxed{2}"], ["\\boxed{3}", "\\boxed{3}"]]
  completions = evaluator.Completions(
      texts,
      lengths=np.array([[2, 4], [6, 8]]),
      finished=np.array([[True, True], [True, False]]),
      repetition=np.array([[0.0, 0.0], [0.5, 0.9]]),
  )
  summary = evaluator.summarize(completions, ["1", "3"])
  low, high = summary.pop("accuracy_low"), summary.pop("accuracy_high")
  assert low < 0.75 < high
  assert summary == {
      "accuracy": 0.75,
      "accuracy_finished": pytest.approx(2 / 3),
      "finish_rate": 0.75,
      "cut": 0.25,
      "mean_length": 5.0,
      "length_p95": 8,
      "repetition": pytest.approx(0.35),
      "problems": 2,
      "samples": 2,
  }


def test_a_summary_grades_as_it_is_told():
  texts = [["\\boxed{\\text{B}}", "\\boxed{2}"]]
  completions = evaluator.Completions(
      texts, np.full((1, 2), 3), np.full((1, 2), True), np.zeros((1, 2))
  )
  for kind, answer in (("letter", "B"), ("math", "2")):
    summary = evaluator.summarize(completions, [answer], kind)
    assert summary["accuracy"] == 0.5
