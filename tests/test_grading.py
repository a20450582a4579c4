import random
import threading
import time

import numpy as np
import pytest

from prefix_distill.config import DatasetSpec
from prefix_distill.data import gym
from prefix_distill.evaluate import evaluator
from prefix_distill.evaluate import grading
from prefix_distill.evaluate import judge

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
  begin = time.process_time()  # The machine may be busy with others.
  assert not grading.is_letter(text, "C")
  assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed 7 ", "1,234 ", "0.333", "Answer: ", "{", "~"]
)
def test_long_answers_are_cleaned_at_once(piece, monkeypatch):
  monkeypatch.setattr(judge.Judge, "equal", lambda *_: False)
  monkeypatch.setattr(gym, "score", lambda *_: 0.0)
  begin = time.process_time()  # The machine may be busy with others.
  for length in (990, 60_000):
    text = piece * (length // len(piece))
    for grade in grading.GRADERS.values():
      grade("\\boxed{" + text, "7 cm")
      grade("\\boxed{" + text + "}", "7 cm")
  assert time.process_time() - begin < 2


def test_no_text_ends_in_an_error(monkeypatch):
  monkeypatch.setattr(judge.Judge, "equal", lambda *_: False)
  monkeypatch.setattr(gym, "score", lambda *_: 0.0)
  rng = random.Random(0)
  pieces = (
      "\\boxed{ } \\frac \\text{ 12 . ... \\overline{ ^ _ \\dot ( ) \\left \\ x"
      " = and , $ √ % base </think> <think> \ud800 \x00 Answer: ½ ⁻ 3 million"
  ).split()
  for _ in range(2000):
    text = "".join(rng.choices([*pieces, " ", "\n"], k=20))
    for grade in grading.GRADERS.values():
      assert grade(text, "".join(rng.choices(pieces, k=4))) in (True, False)
      assert grade(f"\\boxed{{{text}}}", text) in (True, False)


_TOWER = "\\boxed{9^{9^{9^9}}}"


def test_the_time_limit_holds_in_any_thread():
  limited, found = judge.Judge(limit=1.0), []

  def ask():
    begin = time.perf_counter()
    found.append(limited.equal("\\boxed{3}", _TOWER))
    found.append(limited.equal("\\boxed{x+1}", "\\boxed{1+x}"))
    found.append(time.perf_counter() - begin)

  thread = threading.Thread(target=ask)
  thread.start()
  thread.join(60)
  limited.close()
  assert found[:2] == [False, True]
  assert found[2] < 20  # Two starts of a process are in it.


def test_threads_share_a_judge():
  shared, found = judge.Judge(), {}

  def ask(number):
    text = f"\\boxed{{x+{number}}}"
    found[number] = [
        shared.equal(text, f"\\boxed{{{other}+x}}") for other in range(4)
    ]

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  shared.close()
  assert found == {i: [i == j for j in range(4)] for i in range(4)}


def test_a_judge_that_was_killed_is_started_again():
  judged = judge.Judge()
  assert judged.equal("\\boxed{x+1}", "\\boxed{1+x}")
  judged._process.kill()
  judged._process.wait()
  assert judged.equal("\\boxed{x+1}", "\\boxed{1+x}")
  judged.close()


def test_plain_numbers_need_no_judge(monkeypatch):
  monkeypatch.setattr(judge.Judge, "equal", None)
  assert grading.is_correct("so \\boxed{10{,}080 \\text{ ways}}.", "10,080")
  assert not grading.is_correct("so \\boxed{\\frac{3}{4}}.", "0.5")
  assert not grading.is_correct("no number at all", "12")


def test_right_answers_that_cannot_be_read_are_named():
  answers = ["7.", "\\frac{1}{2}", "", "x = \\text{east}", "\\frac{1}{", "1, 2"]
  assert grading.unreadable_golds(answers, "math") == [2, 4]
  assert grading.unreadable_golds(answers, "dual_math") == [2, 4]
  letters = ["A", "J", "neon", "", "b"]
  assert grading.unreadable_golds(letters, "letter") == [2, 3, 4]
  assert grading.unreadable_golds(letters, "dual_letter") == [2, 3, 4]


def test_the_settings_name_a_rule_that_there_is():
  for rule in ("plain", "dual"):
    for choices in ((), ("options",)):
      spec = DatasetSpec("x", answer="a", choices=choices, rule=rule)
      assert spec.grading in grading.GRADERS
  assert DatasetSpec("x", answer="a").grading == "math"


def test_boxes_are_cut_out_whole():
  text = "\\boxed{} a \\boxed{\\frac{1}{2}} b \\fbox 7, c \\boxed{d"
  found = grading.boxes(text)
  assert [inner for _, _, inner in found] == ["\\frac{1}{2}", "7"]
  assert [text[a:b] for a, b, _ in found][0] == "\\boxed{\\frac{1}{2}}"


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
      "verdicts": "1011",
  }


def test_a_summary_grades_as_it_is_told():
  texts = [["\\boxed{\\text{B}}", "\\boxed{2}"]]
  completions = evaluator.Completions(
      texts, np.full((1, 2), 3), np.full((1, 2), True), np.zeros((1, 2))
  )
  for kind, answer in (("letter", "B"), ("math", "2")):
    summary = evaluator.summarize(completions, [answer], kind)
    assert summary["accuracy"] == 0.5
