r"""The bundled task: grade-school word problems with worked solutions.

A story tells, in order, what two people have of two things and what happens to
it. The question asks for one person's count of one thing, so some sentences
are distractors. The solution first plans (it goes through the story and says
which sentences to use), then works out one needed quantity a line, and ends
with the boxed answer:

  Ann has 7 pens. Bob has 3 pens. Ann finds 4 pens. Ann gives Bob 2 pens.
  How many pens does Ann have now?

  We want the pens of Ann.
  Ann has 7 pens: pens for Ann, pens for Ann, use.
  Bob has 3 pens: pens for Bob, pens for Ann, skip.
  ...
  Step 1: Ann has 7 pens. That is the start, so the total is 7 pens.
  Step 2: Ann finds 4 pens. That means more pens for Ann, so we add. ...
  In the end the total is 9 pens.
  </think>

  Ann has \boxed{9} pens.

Everything is a pure function of `(split, index)`. A problem belongs to the
test split if the hash of its text says so, hence no problem is in both.

Solutions come in four styles. `clean` is what the teacher learns; its plan
says of each sentence what it is about and what is wanted, since a small model
that does not spell this out confuses the two; `terse` leaves it out. The other
two stand for what a base model saw on the web: `capable` goes wrong in the
opening (it guesses, skips the plan, plans for something else, or plans
carelessly) and then works without a slip; `weak` does all that and slips in
every later part as well.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import random

PEOPLE = (
    "Ann", "Bob", "Cara", "Dan", "Eva", "Finn", "Gina", "Hal", "Ivy", "Jon",
    "Kim", "Leo",
)  # fmt: skip
ITEMS = (
    "pens", "cups", "books", "coins", "cards", "balls", "caps", "keys",
    "rings", "boxes", "maps", "shells",
)  # fmt: skip
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("sells", "loses", "breaks", "uses")
MAX_TOTAL = 30
SPLITS = ("train", "test")
STYLES = ("clean", "terse", "capable", "weak")
# A percentage of all problem texts, chosen by hash, is never trained on.
_TEST_PERCENT = 10


@dataclasses.dataclass(frozen=True)
class Sentence:
  """One statement of a story.

  Attributes:
    text: the sentence without its full stop.
    changes: what it does to each `(person, item)` it touches.
    is_start: whether it states a count rather than a change.
  """

  text: str
  changes: tuple[tuple[tuple[str, str], int], ...]
  is_start: bool = False

  def change(self, target: tuple[str, str]) -> int | None:
    """The change of `target`'s count; None if the sentence is not about it."""
    return dict(self.changes).get(target)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A story, its question and its answer."""

  sentences: tuple[Sentence, ...]
  target: tuple[str, str]
  others: tuple[tuple[str, str], ...]
  question: str
  answer: int


def _start(owner: tuple[str, str], amount: int) -> Sentence:
  person, item = owner
  text = f"{person} has {amount} {item}"
  return Sentence(text, ((owner, amount),), is_start=True)


def _event(
    rng: random.Random, owner: tuple[str, str], other: str, delta: int
) -> Sentence:
  """A sentence by which `owner`'s count changes by `delta`."""
  person, item = owner
  amount = abs(delta)
  if delta < 0 and rng.random() < 0.5:
    text = f"{person} gives {other} {amount} {item}"
    return Sentence(text, ((owner, delta), ((other, item), amount)))
  verb = rng.choice(GAINS if delta > 0 else LOSSES)
  return Sentence(f"{person} {verb} {amount} {item}", ((owner, delta),))


def _delta(rng: random.Random, total: int) -> int:
  """A change of 2 to 9, up or down, that keeps the total in [0, MAX_TOTAL]."""
  changes = [d for d in range(-9, 10) if abs(d) > 1]
  choices = [d for d in changes if 0 <= total + d <= MAX_TOTAL]
  return rng.choice(choices)


def _draw(rng: random.Random) -> Problem:
  person, other = rng.sample(PEOPLE, 2)
  item, thing = rng.sample(ITEMS, 2)
  target = (person, item)
  decoys = [(other, item), (person, thing), (other, thing)]
  total = rng.randint(2, 20)
  story = [_start(target, total)]
  for _ in range(rng.randint(2, 3)):
    delta = _delta(rng, total)
    total += delta
    story.append(_event(rng, target, other, delta))
  # The distractors: a count of something else, and perhaps a change of it.
  decoy = rng.choice(decoys)
  amount = rng.randint(2, 20)
  place = rng.randint(0, len(story))
  story.insert(place, _start(decoy, amount))
  if len(story) == 5 and rng.random() < 0.4:
    # A transfer would touch the target as well if it is about the same item.
    delta = _delta(rng, amount)
    verb = rng.choice(GAINS if delta > 0 else LOSSES)
    text = f"{decoy[0]} {verb} {abs(delta)} {decoy[1]}"
    story.insert(
        rng.randint(place + 1, len(story)), Sentence(text, ((decoy, delta),))
    )
  end = rng.choice(("now", "in the end"))
  ask = f"How many {item} does {person} have {end}?"
  text = " ".join(s.text + "." for s in story) + " " + ask
  return Problem(tuple(story), target, tuple(decoys), text, total)


def _is_test(question: str) -> bool:
  digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little") % 100 < _TEST_PERCENT


def problem(split: str, index: int) -> Problem:
  """Returns problem `index` of a split ("train" or "test")."""
  if split not in SPLITS:
    raise ValueError(f"The math task has no split {split!r}; it has {SPLITS}.")
  rng = random.Random(f"problem {split} {index}")
  while True:
    drawn = _draw(rng)
    if _is_test(drawn.question) == (split == "test"):
      return drawn


@dataclasses.dataclass(frozen=True)
class _Habits:
  """How a solver works: the defects of one solution."""

  target: tuple[str, str]
  use: tuple[bool, ...]
  plan: bool = True
  spell_out: bool = True
  slip: float = 0.0  # Chance of a wrong sum, a line.
  drop: float = 0.0  # Chance of leaving out a line.
  wrong_sign: float = 0.0  # Chance of adding for subtracting, a line.
  wrong_end: float = 0.0  # Chance of another number in the answer.
  no_box: float = 0.0  # Chance of an answer that is not boxed.


def _needed(prob: Problem, target: tuple[str, str]) -> tuple[bool, ...]:
  return tuple(s.change(target) is not None for s in prob.sentences)


def _line(
    number: int,
    sentence: Sentence,
    target: tuple[str, str],
    total: int,
    rng: random.Random,
    habits: _Habits,
) -> tuple[str, int]:
  """One line of working; returns it and the new total."""
  head = f"Step {number}: {sentence.text}."
  item = target[1]
  change = sentence.change(target)
  if change is None:  # A sloppy plan uses a sentence about something else.
    change = sentence.changes[0][1]
  if sentence.is_start and number == 1:
    text = f"{head} That is the start, so the total is {change} {item}.\n"
    return text, change
  if rng.random() < habits.wrong_sign:
    change = -change
  new = min(max(total + change, 0), 40)
  if rng.random() < habits.slip:
    new = min(max(new + rng.choice((-2, -1, 1, 2)), 0), 40)
  more, verb, sign = (
      ("more", "add", "+") if change > 0 else ("less", "subtract", "-")
  )
  text = (
      f"{head} That means {more} {item} for {target[0]}, so we {verb}."
      f" The total was {total} {item}. We {verb} {abs(change)}:"
      f" {total} {sign} {abs(change)} = {new}."
      f" Now the total is {new} {item}.\n"
  )
  return text, new


def _plan_line(sentence: Sentence, use: bool, habits: _Habits) -> str:
  verdict = "use" if use else "skip"
  if not habits.spell_out:
    return f"{sentence.text}: {verdict}.\n"
  (about, thing), (person, item) = sentence.changes[0][0], habits.target
  return (
      f"{sentence.text}: {thing} for {about}, {item} for {person}, {verdict}.\n"
  )


def _answer(prob: Problem, target: tuple[str, str], total: int, box: bool):
  value = f"\\boxed{{{total}}}" if box else f"{total}"
  return (
      f"In the end the total is {total} {target[1]}.\n</think>\n\n"
      f"{target[0]} has {value} {target[1]}."
  )


def _work(prob: Problem, rng: random.Random, habits: _Habits) -> str:
  """Writes a solution with the given habits."""
  person, item = habits.target
  parts = ["\n"]
  if habits.plan:
    parts.append(f"We want the {item} of {person}.\n")
    for sentence, use in zip(prob.sentences, habits.use, strict=True):
      parts.append(_plan_line(sentence, use, habits))
  total, number = 0, 0
  for sentence, use in zip(prob.sentences, habits.use, strict=True):
    if not use or rng.random() < habits.drop:
      continue
    number += 1
    text, total = _line(number, sentence, habits.target, total, rng, habits)
    parts.append(text)
  if rng.random() < habits.wrong_end:
    total = rng.randint(0, MAX_TOTAL)
  box = rng.random() >= habits.no_box
  parts.append(_answer(prob, habits.target, total, box))
  return "".join(parts)


def _guess(prob: Problem, rng: random.Random) -> str:
  person, item = prob.target
  total = rng.randint(0, MAX_TOTAL)
  text = f"\nWe guess. The total is {total} {item}.\n"
  return text + _answer(prob, prob.target, total, box=True)


def _opening(prob: Problem, rng: random.Random) -> _Habits | None:
  """Draws how a base model opens; None for a guess."""
  needed = _needed(prob, prob.target)
  kind = rng.random()
  if kind < 0.30:  # As it should be.
    return _Habits(prob.target, needed)
  if kind < 0.42:
    return None
  if kind < 0.65:  # No plan, so every sentence seems to matter.
    use = tuple(n or rng.random() < 0.8 for n in needed)
    return _Habits(prob.target, use, plan=False)
  if kind < 0.80:  # Plans for something that was not asked.
    stated = [o for o in prob.others if any(_needed(prob, o))]
    target = rng.choice(stated)
    return _Habits(target, _needed(prob, target))
  use = tuple(n != (rng.random() < 0.3) for n in needed)
  return _Habits(prob.target, use)


def solution(prob: Problem, style: str, rng: random.Random) -> str:
  """Writes what follows `<think>`, without a stop token.

  Args:
    prob: the problem.
    style: one of STYLES, see the module's docstring.
    rng: where the sloppy styles draw their defects.
  """
  if style in ("clean", "terse"):
    habits = _Habits(
        prob.target,
        _needed(prob, prob.target),
        spell_out=style == "clean",
    )
    return _work(prob, rng, habits)
  if style not in STYLES:
    raise ValueError(f"The math task has no style {style!r}; it has {STYLES}.")
  habits = _opening(prob, rng)
  if habits is None:
    return _guess(prob, rng)
  if style == "weak":
    habits = dataclasses.replace(
        habits, slip=0.06, drop=0.04, wrong_sign=0.05, wrong_end=0.06,
        no_box=0.03,
    )  # fmt: skip
  return _work(prob, rng, habits)


class MathTask(Sequence):
  """A split as a sequence of records, made when they are asked for.

  A record has `question`, `answer` and `completion` (the text after `<think>`,
  in the given style).
  """

  def __init__(self, split: str, size: int, style: str = "clean"):
    if style not in STYLES:
      raise ValueError(
          f"The math task has no style {style!r}; it has {STYLES}."
      )
    problem(split, 0)  # Refuses an unknown split now rather than later.
    self._split, self._size, self._style = split, size, style

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict[str, str]:
    if not 0 <= index < self._size:
      raise IndexError(index)
    prob = problem(self._split, index)
    rng = random.Random(f"solution {self._split} {self._style} {index}")
    return {
        "question": prob.question,
        "answer": str(prob.answer),
        "completion": solution(prob, self._style, rng),
    }


def vocabulary() -> list[str]:
  """Every word of the task as the tokenizer's pre-tokenizer cuts it."""
  words = {"Step", "We", "In", "user", "assistant", "system"}
  words |= set(PEOPLE)  # A story opens with a name, without a space before it.
  spaced = {"We", "The", "That", "Now", "How", "Step", "guess"}
  spaced |= set(PEOPLE) | set(ITEMS) | set(GAINS) | set(LOSSES)
  spaced |= set(
      "has gives many does have now in the end want of use skip is start so"
      " total means more less for we add subtract was".split()
  )
  spaced |= {"+", "-", "="}
  numbers = [str(n) for n in range(41)]
  marks = [".\n", ":", ".", ",", "?", "\n\n", "\n", "\\", "boxed", "{", "}"]
  marks += [" \\", "}."]
  return sorted(
      words | {" " + w for w in spaced} | set(numbers)
      | {" " + n for n in numbers} | set(marks)
  )  # fmt: skip
