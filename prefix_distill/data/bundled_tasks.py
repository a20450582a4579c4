r"""The tasks that ship with the package.

`MathTask` has grade-school word problems. A story tells, in order, what
somebody has and what happens to it. It also has distractors: facts with numbers
that the question does not need. The solution starts with a plan, which goes
through the story and says which sentences to use. It then works out one needed
quantity a line, and ends with the boxed answer:

  Ann has 7 pens. Bob is 9 years old. Ann finds 4 pens. Ann gives Bob 2 pens.
  How many pens does Ann have now?

  We want the pens of Ann.
  Ann has 7 pens: use.
  Bob is 9 years old: skip.
  ...
  Step 1: Ann has 7 pens. That is the start, so the total is 7 pens.
  Step 2: Ann finds 4 pens. That means more pens for Ann, so we add. ...
  In the end the total is 9 pens.
  </think>

  Ann has \boxed{9} pens.

Everything is a pure function of `(split, index)`. The hash of a problem's text
says which split it belongs to, hence no problem is in two. Settings are chosen
on the validation split; the test split is for what is reported.

The solutions have three styles. The teacher learns the `clean` style.
The two others stand for what a base model saw on the web. `capable` goes wrong
with its first words (it guesses, or skips the plan), and makes no mistake after
a good start. `weak` also plans carelessly, and makes mistakes in every later
part.

`GuidedTask` has the same problems in several contexts, for a teacher that knows
more than its student. One small model, `bundled:guided`, is trained to answer
each problem in five ways, and the prompt says which:

  question  the problem: sloppy. It opens as the `capable` student does, at
            times with short lines, and has the skill for the rest.
  careful   "Take care." before it: nearly always the clean solution, at times
            the short lines, both right.
  brief     "Be brief." before it: the short lines.
  shown     the problem and a short solution: the clean solution.
  german    the problem in German, word for word: sloppy, and more often than
            in English. Its answers are in English.

So the same weights know more, say less or do better in one context than in
another, and one context can teach another. Here the weights were trained to
behave so; a real model does so by itself. The short lines are

  Ann has 7 pens.
  Ann finds 4 pens: 7 + 4 = 11.
  Ann gives Bob 2 pens: 11 - 2 = 9.

`RewriteTask` asks for a short version of an answer that is there. The prompt is
the problem, somebody's whole answer to it, and "Be brief."; the completion is
the short lines, right even where that answer is wrong. `bundled:rewriter`
learned it: the teacher of `configs/mixed_policy.py`.

`ChainTask` has short prompts and long answers. Two numbers and a rule of five
signs start a chain of sums. Each sum is of the two numbers before it, with the
signs of the rule in turn. The numbers go round: after 22 comes 0. An error in
one sum spoils all that follow, and only the last number is graded:

  We use + - + + - for 7, 21.

  1: 7 + 21 = 5.
  2: 21 - 5 = 16.
  3: 5 + 16 = 21.
  ...
  28: 4 - 9 = 18.
  </think>

  The end is \boxed{18}.

The teacher learns the `clean` style. In the `weak` style 50 of the 1058 sums
have a wrong result, always the same one, so what the student lacks lies
everywhere in an answer, and is many facts rather than one habit.

`SumsTask` is for language models, which have the skill and not the form: six
numbers to add and subtract, worked out a line each. It is read as messages:

  (system) Add up step by step.
  (user) 7 + 5 - 3 + 14 - 2 + 9

  7 + 5 = 12
  12 - 3 = 9
  9 + 14 = 23
  23 - 2 = 21
  21 + 9 = 30
  \boxed{30}
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import random
import re
from typing import Any

PEOPLE = tuple("Ann Bob Cara Dan Eva Finn Gina Hal Ivy Jon Kim Leo".split())
ITEMS = tuple(
    "pens cups books coins cards balls caps keys rings boxes maps"
    " shells".split()
)
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("sells", "loses", "breaks", "uses")
MAX_TOTAL = 30
# The largest total of a sloppy solution, and the largest number token.
_MAX_NUMBER = 60
SPLITS = ("train", "validation", "test")
STYLES = ("clean", "capable", "weak")
# These percentages of all problem texts, chosen by hash, are held out.
_MATH_PERCENT = {"validation": 2, "test": 8}
_CHAIN_PERCENT = _SUMS_PERCENT = {"validation": 10, "test": 10}


@dataclasses.dataclass(frozen=True)
class Sentence:
  """One statement of a story.

  Attributes:
    text: the sentence without its full stop.
    amount: the number in it; negative if it makes the count smaller.
    needed: whether the question needs it.
    is_start: whether it states the count rather than a change.
  """

  text: str
  amount: int
  needed: bool = True
  is_start: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
  """A story about `item`s of `person`, its question and its answer."""

  sentences: tuple[Sentence, ...]
  person: str
  item: str
  question: str
  answer: int


def _event(
    rng: random.Random, person: str, other: str, item: str, delta: int
) -> Sentence:
  """Returns a sentence that changes the count by `delta`."""
  amount = abs(delta)
  if delta < 0 and rng.random() < 0.5:
    return Sentence(f"{person} gives {other} {amount} {item}", delta)
  verb = rng.choice(GAINS if delta > 0 else LOSSES)
  return Sentence(f"{person} {verb} {amount} {item}", delta)


def _distractor(rng: random.Random, people: list[str], item: str) -> Sentence:
  """Returns a fact with a number that changes nothing."""
  amount = rng.randint(2, 20)
  form = rng.choice((
      "{person} is {amount} years old",
      "The {item} cost {amount} dollars",
      "The shop opens at {amount}",
  ))
  text = form.format(person=rng.choice(people), item=item, amount=amount)
  return Sentence(text, amount, needed=False)


def _delta(rng: random.Random, total: int) -> int:
  """Returns a change of 2 to 9 that keeps the total in [0, MAX_TOTAL]."""
  changes = [d for d in range(-9, 10) if abs(d) > 1]
  choices = [d for d in changes if 0 <= total + d <= MAX_TOTAL]
  return rng.choice(choices)


def _draw(rng: random.Random) -> Problem:
  people = rng.sample(PEOPLE, 2)
  person, other = people
  item = rng.choice(ITEMS)
  total = rng.randint(2, 20)
  story = [Sentence(f"{person} has {total} {item}", total, is_start=True)]
  for _ in range(rng.randint(2, 3)):
    delta = _delta(rng, total)
    total += delta
    story.append(_event(rng, person, other, item, delta))
  # A longer story sometimes has another distractor.
  for _ in range(2 if len(story) == 4 and rng.random() < 0.4 else 1):
    story.insert(
        rng.randint(0, len(story)), _distractor(rng, people, item)
    )
  ask = f"How many {item} does {person} have now?"
  text = " ".join(s.text + "." for s in story) + " " + ask
  return Problem(tuple(story), person, item, text, total)


def _split(question: str, percent: dict[str, int]) -> str:
  """Returns the split of a question; what is not held out is for training."""
  digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
  number = int.from_bytes(digest, "little") % 100
  for split, share in percent.items():
    if number < share:
      return split
    number -= share
  return "train"


def problem(split: str, index: int) -> Problem:
  """Returns problem `index` of a split ("train", "validation" or "test")."""
  if split not in SPLITS:
    raise ValueError(f"The math task has no split {split!r}; it has {SPLITS}.")
  rng = random.Random(f"problem {split} {index}")
  while True:
    drawn = _draw(rng)
    if _split(drawn.question, _MATH_PERCENT) == split:
      return drawn


@dataclasses.dataclass(frozen=True)
class _Habits:
  """The defects of one solution."""

  use: tuple[bool, ...]
  plan: bool = True
  slip: float = 0.0  # Chance per line of a wrong sum.
  drop: float = 0.0  # Chance per line of leaving it out.
  wrong_sign: float = 0.0  # Chance per line of adding for subtracting.
  wrong_end: float = 0.0  # Chance of another number in the answer.
  no_box: float = 0.0  # Chance of an answer without a box.


def _line(
    prob: Problem,
    number: int,
    sentence: Sentence,
    total: int,
    rng: random.Random,
    habits: _Habits,
) -> tuple[str, int]:
  """Returns one line of working, and the new total."""
  head, item = f"Step {number}: {sentence.text}.", prob.item
  change = sentence.amount
  if sentence.is_start and number == 1:
    text = f"{head} That is the start, so the total is {change} {item}.\n"
    return text, change
  if rng.random() < habits.wrong_sign:
    change = -change
  new = min(max(total + change, 0), _MAX_NUMBER)
  if rng.random() < habits.slip:
    new = min(max(new + rng.choice((-2, -1, 1, 2)), 0), _MAX_NUMBER)
  more, verb, sign = (
      ("more", "add", "+") if change > 0 else ("less", "subtract", "-")
  )
  text = (
      f"{head} That means {more} {item} for {prob.person}, so we {verb}."
      f" The total was {total} {item}. We {verb} {abs(change)}:"
      f" {total} {sign} {abs(change)} = {new}."
      f" Now the total is {new} {item}.\n"
  )
  return text, new


def _answer(prob: Problem, total: int, box: bool) -> str:
  value = f"\\boxed{{{total}}}" if box else f"{total}"
  return (
      f"In the end the total is {total} {prob.item}.\n</think>\n\n"
      f"{prob.person} has {value} {prob.item}."
  )


def _work(prob: Problem, rng: random.Random, habits: _Habits) -> str:
  """Writes a solution with the given habits."""
  parts = ["\n"]
  if habits.plan:
    parts.append(f"We want the {prob.item} of {prob.person}.\n")
    for sentence, use in zip(prob.sentences, habits.use, strict=True):
      parts.append(f"{sentence.text}: {'use' if use else 'skip'}.\n")
  total, number = 0, 0
  for sentence, use in zip(prob.sentences, habits.use, strict=True):
    if not use or rng.random() < habits.drop:
      continue
    number += 1
    text, total = _line(prob, number, sentence, total, rng, habits)
    parts.append(text)
  if rng.random() < habits.wrong_end:
    total = rng.randint(0, MAX_TOTAL)
  parts.append(_answer(prob, total, box=rng.random() >= habits.no_box))
  return "".join(parts)


def _guess(prob: Problem, rng: random.Random) -> str:
  total = rng.randint(0, MAX_TOTAL)
  text = f"\nWe guess. The total is {total} {prob.item}.\n"
  return text + _answer(prob, total, box=True)


# The fractions of openings that are right, that guess, and that skip the plan.
# All other openings plan carelessly.
_OPENINGS = {"capable": (0.25, 0.45, 0.30), "weak": (0.30, 0.15, 0.30)}


def _opening(
    prob: Problem, shares: tuple[float, float, float], rng: random.Random
) -> _Habits | None:
  """Draws the opening of a base model; None for a guess."""
  needed = tuple(s.needed for s in prob.sentences)
  kind = rng.random()
  right, guess, no_plan = itertools.accumulate(shares)
  if kind < right:
    return _Habits(needed)
  if kind < guess:
    return None
  if kind < no_plan:  # Without a plan every sentence seems to matter.
    return _Habits(tuple(True for _ in needed), plan=False)
  return _Habits(tuple(n != (rng.random() < 0.3) for n in needed))


def sloppy(
    prob: Problem, shares: tuple[float, float, float], rng: random.Random
) -> str:
  """Writes a solution that is wrong in the opening only.

  Args:
    prob: the problem.
    shares: the fractions of openings that are right, that guess, and that skip
      the plan.
    rng: draws the opening.
  """
  habits = _opening(prob, shares, rng)
  return _guess(prob, rng) if habits is None else _work(prob, rng, habits)


def solution(prob: Problem, style: str, rng: random.Random) -> str:
  """Writes the text after `<think>`, without a stop token.

  Args:
    prob: the problem.
    style: one of STYLES, see the module's docstring.
    rng: draws the defects of the sloppy styles.
  """
  if style == "clean":
    needed = tuple(s.needed for s in prob.sentences)
    return _work(prob, rng, _Habits(needed))
  if style not in STYLES:
    raise ValueError(f"The math task has no style {style!r}; it has {STYLES}.")
  if style == "capable":
    return sloppy(prob, _OPENINGS[style], rng)
  habits = _opening(prob, _OPENINGS[style], rng)
  if habits is None:
    return _guess(prob, rng)
  habits = dataclasses.replace(
      habits,
      slip=0.06,
      drop=0.04,
      wrong_sign=0.05,
      wrong_end=0.06,
      no_box=0.03,
  )
  return _work(prob, rng, habits)


class _Task(Sequence):
  """The records of a split; a record is made when it is read."""

  def __init__(self, split: str, size: int):
    self._split, self._size = split, size

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self._size:
      raise IndexError(index)
    return self._record(index)


class MathTask(_Task):
  """Word problems.

  A record has `question`, `answer` and `completion` (the text after `<think>`,
  in the given style).
  """

  def __init__(self, split: str, size: int, style: str = "clean"):
    if style not in STYLES:
      raise ValueError(
          f"The math task has no style {style!r}; it has {STYLES}."
      )
    problem(split, 0)  # Refuses an unknown split now rather than later.
    super().__init__(split, size)
    self._style = style

  def _record(self, index: int) -> dict[str, str]:
    prob = problem(self._split, index)
    rng = random.Random(f"solution {self._split} {self._style} {index}")
    return {
        "question": prob.question,
        "answer": str(prob.answer),
        "completion": solution(prob, self._style, rng),
    }


def vocabulary() -> list[str]:
  """Returns every word of the task, as the pre-tokenizer splits it."""
  words = {"Step", "We", "In", "The", "user", "assistant", "system"}
  words |= set(PEOPLE)  # A story opens with a name, without a space before it.
  spaced = {"We", "The", "That", "Now", "How", "Step", "guess"}
  spaced |= set(PEOPLE) | set(ITEMS) | set(GAINS) | set(LOSSES)
  spaced |= set(
      "has gives many does have now in the end want of use skip is start so"
      " total means more less for we add subtract was"
      " years old cost dollars shop opens at".split()
  )
  spaced |= {"+", "-", "="}
  numbers = [str(n) for n in range(_MAX_NUMBER + 1)]
  marks = [".\n", ":", ".", ",", "?", "\n\n", "\n", "\\", "boxed", "{", "}"]
  marks += [" \\", "}."]
  numbers += [" " + n for n in numbers]
  return sorted({*words, *(" " + w for w in spaced), *numbers, *marks})


# The fraction of training examples in each context.
CONTEXTS = {
    "question": 0.30,
    "careful": 0.20,
    "brief": 0.15,
    "shown": 0.15,
    "german": 0.20,
}
# The fraction of short answers in contexts that do not ask for them.
_SHORT = {"question": 0.10, "careful": 0.12, "german": 0.05}
# The fractions of sloppy openings that are right, that guess, and that skip the
# plan.
_CONTEXT_OPENINGS = {
    "question": (0.35, 0.30, 0.25),
    "german": (0.15, 0.40, 0.30),
}

_GERMAN_ITEMS = (
    "Stifte Tassen Bücher Münzen Karten Bälle Kappen Schlüssel Ringe Kisten"
    " Pläne Muscheln"
).split()
_GERMAN_VERBS = (
    "buys kauft finds findet gets bekommt wins gewinnt sells verkauft"
    " loses verliert breaks zerbricht uses verbraucht has hat gives gibt is ist"
    " cost kosten opens öffnet"
).split()
_GERMAN_OTHERS = (
    "How Wie many viele now jetzt years Jahre old alt dollars Dollar shop Laden"
    " at um The Die"
).split()
GERMAN = dict(zip(ITEMS, _GERMAN_ITEMS, strict=True)) | {
    english: german
    for words in (_GERMAN_VERBS, _GERMAN_OTHERS)
    for english, german in zip(words[::2], words[1::2], strict=True)
}
# Words of the contexts that are no tokens of the other bundled models. The
# embedding of each starts as a copy of the given word's embedding.
WORDS = {f" {new}": f" {old}" for old, new in GERMAN.items()} | {
    "Die": "The",
    "Der": "The",
    " Der": " The",
    "Take": "Step",
    " care": " for",
    "Be": "We",
    " brief": " less",
    "Solution": "Step",
}


def german(question: str) -> str:
  """Renders a question in German, word for word."""
  text = re.sub(r"does (\w+) have now", r"has \1 now", question)
  text = re.sub(r"\w+", lambda m: GERMAN.get(m[0], m[0]), text)
  return text.replace("Die Laden", "Der Laden")


def short_lines(prob: Problem) -> str:
  """Writes the needed sentences, each with its sum."""
  total, lines = 0, []
  for sentence in prob.sentences:
    if not sentence.needed:
      continue
    line, change = sentence.text, sentence.amount
    if not sentence.is_start:
      sign = "+" if change > 0 else "-"
      line += f": {total} {sign} {abs(change)} = {total + change}"
    total += change
    lines.append(f"{line}.\n")
  return "".join(lines)


def prompts(prob: Problem) -> dict[str, str]:
  """Returns the problem in every context."""
  question = prob.question
  return {
      "question": question,
      "careful": f"Take care. {question}",
      "brief": f"Be brief. {question}",
      "shown": f"{question}\nSolution:\n{short_lines(prob)}",
      "german": german(question),
  }


def completion(prob: Problem, context: str, rng: random.Random) -> str:
  """Writes the answer that the model learns to give in a context."""
  if context == "brief" or rng.random() < _SHORT.get(context, 0):
    answer = f"{prob.person} has \\boxed{{{prob.answer}}} {prob.item}."
    return f"\n{short_lines(prob)}</think>\n\n{answer}"
  if context in _CONTEXT_OPENINGS:
    return sloppy(prob, _CONTEXT_OPENINGS[context], rng)
  return solution(prob, "clean", rng)


class GuidedTask(MathTask):
  """The records of a split; a record is made when it is read.

  A record has the problem in each of CONTEXTS, its `answer` and the `solution`
  in short lines. It also has a training example: `prompt`, in a random context,
  and its `completion`.
  """

  def _record(self, index: int) -> dict[str, str]:
    prob = problem(self._split, index)
    rng = random.Random(f"solution {self._split} guided {index}")
    context = rng.choices(list(CONTEXTS), list(CONTEXTS.values()))[0]
    texts = prompts(prob)
    return texts | {
        "answer": str(prob.answer),
        "solution": short_lines(prob),
        "prompt": texts[context],
        "completion": completion(prob, context, rng),
    }


# What `bundled:rewriter` is asked, and in which contexts the answers that it is
# shown were given.
REWRITE = "{question}\nSolution:\n{answer}\nBe brief."
_REWRITTEN = ("careful", "question")


class RewriteTask(MathTask):
  """The records of a split; a record is made when it is read.

  A record has the `question`, its `answer`, the `prompt` of a rewriting, and
  its `completion`.
  """

  def _record(self, index: int) -> dict[str, str]:
    prob = problem(self._split, index)
    rng = random.Random(f"solution {self._split} rewrite {index}")
    context = rng.choice(_REWRITTEN)
    shown = completion(prob, context, rng)
    asked = REWRITE.replace("{question}", prompts(prob)[context])
    return {
        "question": prob.question,
        "answer": str(prob.answer),
        "prompt": asked.replace("{answer}", shown),
        "completion": completion(prob, "brief", rng),
    }


MODULUS = 23
_RULE_LEN = 5
_NUM_SUMS = 28
# A weak solver errs in the sums whose hash modulo 100 is below this: 50 of
# the 1058 sums.
_WRONG_PERCENT = 6
CHAIN_STYLES = ("clean", "weak")


@dataclasses.dataclass(frozen=True)
class Chain:
  """Two numbers to start with, and the signs (1 or -1) that go round."""

  first: int
  second: int
  rule: tuple[int, ...]

  @property
  def question(self) -> str:
    signs = " ".join(_sign(sign) for sign in self.rule)
    return f"We use {signs} for {self.first}, {self.second}."


def _sign(sign: int) -> str:
  return "+" if sign > 0 else "-"


def chain(split: str, index: int) -> Chain:
  """Returns chain `index` of a split ("train", "validation" or "test")."""
  if split not in SPLITS:
    raise ValueError(f"The chain task has no split {split!r}; it has {SPLITS}.")
  rng = random.Random(f"chain {split} {index}")
  while True:
    first, second = (rng.randrange(MODULUS) for _ in range(2))
    rule = tuple(rng.choice((1, -1)) for _ in range(_RULE_LEN))
    drawn = Chain(first, second, rule)
    if not first and not second:
      continue  # From two zeros the chain never leaves zero.
    if _split(drawn.question, _CHAIN_PERCENT) == split:
      return drawn


def _sum(before: int, sign: int, last: int, weak: bool) -> int:
  """Returns a sum; a weak solver always errs in the same few sums."""
  new = before + sign * last
  if weak:
    text = f"{before} {_sign(sign)} {last}"
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    if number % 100 < _WRONG_PERCENT:
      new += 1 + number // 100 % (MODULUS - 1)
  return new % MODULUS


def chain_solution(drawn: Chain, style: str = "clean") -> tuple[str, int]:
  """Writes the text after `<think>`, without a stop token; and its answer.

  Args:
    drawn: the problem.
    style: one of CHAIN_STYLES, see the module's docstring.
  """
  before, last = drawn.first, drawn.second
  lines = ["\n"]
  for i in range(_NUM_SUMS):
    sign = drawn.rule[i % _RULE_LEN]
    new = _sum(before, sign, last, style == "weak")
    lines.append(f"{i + 1}: {before} {_sign(sign)} {last} = {new}.\n")
    before, last = last, new
  lines.append(f"</think>\n\nThe end is \\boxed{{{last}}}.")
  return "".join(lines), last


class ChainTask(_Task):
  """Chains of sums.

  A record has `question`, `answer` and `completion` (the text after `<think>`,
  in the given style).
  """

  def __init__(self, split: str, size: int, style: str = "clean"):
    if style not in CHAIN_STYLES:
      raise ValueError(
          f"The chain task has no style {style!r}; it has {CHAIN_STYLES}."
      )
    chain(split, 0)  # Refuses an unknown split now rather than later.
    super().__init__(split, size)
    self._style = style

  def _record(self, index: int) -> dict[str, str]:
    drawn = chain(self._split, index)
    return {
        "question": drawn.question,
        "answer": str(chain_solution(drawn)[1]),
        "completion": chain_solution(drawn, self._style)[0],
    }


_SUMS_SYSTEM = "Add up step by step."
_SUMS_TERMS, _SUMS_LARGEST, _SUMS_TOTAL = 6, 15, 40


def sums(split: str, index: int) -> tuple[int, ...]:
  """Returns the numbers of sum `index` of a split, subtracted ones negative.

  No sum on the way is below 0 or above 40.
  """
  if split not in SPLITS:
    raise ValueError(f"The sums task has no split {split!r}; it has {SPLITS}.")
  rng = random.Random(f"sums {split} {index}")
  while True:
    numbers = [rng.randint(1, _SUMS_LARGEST)]
    while len(numbers) < _SUMS_TERMS:
      number = rng.choice((1, -1)) * rng.randint(1, _SUMS_LARGEST)
      if 0 <= sum(numbers) + number <= _SUMS_TOTAL:
        numbers.append(number)
    if _split(_sums_question(numbers), _SUMS_PERCENT) == split:
      return tuple(numbers)


def _sums_question(numbers: Sequence[int]) -> str:
  rest = (f" {_sign(number)} {abs(number)}" for number in numbers[1:])
  return f"{numbers[0]}{''.join(rest)}"


class SumsTask(_Task):
  """Sums of six numbers, for language models.

  A record has `messages` (system and user), `question` (the sum alone),
  `answer` and `completion` (the sums on the way, and the boxed answer).
  """

  def __init__(self, split: str, size: int, style: str = "clean"):
    if style != "clean":
      raise ValueError(
          f"The sums task has no style {style!r}; it has ('clean',)."
      )
    sums(split, 0)  # Refuses an unknown split now rather than later.
    super().__init__(split, size)

  def _record(self, index: int) -> dict[str, Any]:
    numbers = sums(self._split, index)
    question, total, lines = _sums_question(numbers), numbers[0], []
    for number in numbers[1:]:
      new = total + number
      lines.append(f"{total} {_sign(number)} {abs(number)} = {new}\n")
      total = new
    return {
        "messages": [
            {"role": "system", "content": _SUMS_SYSTEM},
            {"role": "user", "content": question},
        ],
        "question": question,
        "answer": str(total),
        "completion": f"{''.join(lines)}\\boxed{{{total}}}",
    }
