r"""Cuts an answer out of a text, and clears it of what does not count.

What does not count: spacing, a full stop, the separators of thousands, styles,
"N =" before a value, and the unit behind a number, whatever it is.
"""

import fractions
import re

# A longer answer than this, in characters, is left as it is.
_LONGEST = 1000

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
# What stands behind a \boxed without braces: one word or formula.
_BARE = re.compile(
    r"(?:[^\s${}\\]|\\(?![)\]])(?:[a-zA-Z]+|.)|\{(?:[^{}]|\{[^{}]*\})*\})+"
)

_TEXT = (
    r"\\(?:text(?:bf|it|normal|rm|sf|tt|up)?|math(?:bf|it|rm|sf|tt)|mbox"
    r"|operatorname\*?)"
)
_WORDS = rf"{_TEXT}\s*\{{[^{{}}]*\}}"
_INNER = r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)"

# Unicode that math-verify does not know, or not everywhere.
_UNICODE = {
    "\u2212": "-",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "\u200b": "",
    "\ufeff": "",
    "\uff0c": ",",
    "\uff0e": ".",
    "\u2026": "...",
    "\u2044": "/",
    "×": r"\times ",
    "·": r"\cdot ",
    "\u22c5": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "°": r"^\circ ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
}
_SYMBOLS = str.maketrans(_UNICODE)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉₋₊"
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)")
_LEVEL = str.maketrans(_RAISED + _LOWERED, "0123456789-+" * 2)
_ROOT = re.compile(
    r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}"
    r"|(\d+(?:\.\d+)?|[a-zA-Z]|\\pi|\\frac\{[^{}]*\}\{[^{}]*\}))"
)
_DEGREES = {"√": "", "∛": "[3]", "∜": "[4]"}

_STYLE = re.compile(
    r"(?<!\\)(?:\\(?:left|right)\s*\.|\\(?:left|right)(?![a-zA-Z])"
    r"|\\(?:(?:display|text)style|limits|boxed|fbox)(?![a-zA-Z])"
    r"|\\?\$|\\[()\[\]#]|\\!|\\(?:pounds|euro)(?![a-zA-Z]))|[€£¥]"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SPACE = re.compile(
    r"(?<!\\)(?:\\[,;: ]|\\q?quad(?![a-zA-Z])|\\thinspace"
    r"|\\hspace\*?\{[^{}]*\})|~|\s+"
)
_DEGREE = re.compile(r"\\degree(?![a-zA-Z])")
# (a + b) / 2, for which math-verify needs a fraction if it has a \pm.
_OVER = re.compile(r"(-?)\(([^()]*)\)\s*/\s*(\d+)")
# In 10\,080, 10{,}080 and 10,\!080; and in 10,080, but not in (10,080).
_APART = re.compile(
    r"(?<![\d.])(\d{1,3})((?:(?:\{\s*(?:,|\\,)\s*\}|,?\\!|\\[,;: ]|~"
    r"|\\thinspace\s?)\d{3})+)(?!\d)"
)
_COMMAS = re.compile(r"(?<![\d.,(\[])(?<!\\\{)(\d{1,3}(?:,\d{3})+)(?!\d|,\d)")
_SPACES = re.compile(r"(?<![\d.,] )(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d ])")
_STYLED = re.compile(
    rf"(?:{_TEXT}|\\(?:boldsymbol|bm|pmb|underline|emph|hbox|rm|bf)"
    rf"|\\(?:text)?color\s*\{{\w+\}})\s*\{{{_INNER}\}}"
)
_ORDINAL = re.compile(
    rf"(?<=\d)\s*\^?\s*\{{?\s*(?:{_TEXT}\s*\{{)?\s*(?:st|nd|rd|th)[\s}}]*"
)
_LABEL = re.compile(
    rf"{_TEXT}\s*\{{[^{{}}]*:\s*\}}\s*|(?:{_TEXT}\s*\{{\s*)?(?:(?:the|our|final|correct)\s+)*answers?"
    r"\s*(?:(?:is|are)\b:?|:|=)\s*\}?\s*",
    re.IGNORECASE,
)
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_TIMES = re.compile(r"(?<=\d)\s*(?:[x*]|\\ast|\\cdot)\s*(?=10\s*\^)")
_POWER_OF_10 = re.compile(r"(?<=10)\s*\^\s*(?:\(\s*(-?\d+)\s*\)|(-?\d+))")

# 0.1\overline{6}, 0.1(6) and 0.\dot{1}4285\dot{7}; then 0.1666...
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)"
    r"(?:\\(?:overline|bar|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\)"
    r"|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
    r"\s*(?:\.{3}|\\[lc]?dots)?(?![\d(])"
)
_DOTTED = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*(?:\.{3}|\\[lc]?dots)(?!\s*\d)")
_CYCLE = re.compile(r"(\d*?)(?:(\d)\2{2,}|(\d{2,})\3+)")

_EQUALS = re.compile(r"(?<![\\<>!:=])=(?!=)")
# What a value may be called: x, x_1, f(2), AB, \theta, \text{Area of ABC}.
_NAME = re.compile(
    rf"(?:{_WORDS}|\\[a-zA-Z]+|[a-zA-Z' |:]|_\s*(?:\{{[^{{}}]*\}}|\w)"
    r"|\([\w, +-]*\))+"
)
_OPERATION = re.compile(
    r"\\(?:sqrt|frac|sin|cos|tan|log|ln|cdot|times|sum|int|leq?|geq?|neq?|pm"
    r"|div|to|approx|equiv|pmod|mod)(?![a-zA-Z])"
)
_ELEMENT = re.compile(r"[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_SEVERAL = re.compile(
    rf"[,;&]|\b(?:and|or)\b|\\pm|\\mp|{_TEXT}\s*\{{\s*(?:and|or)\s*\}}"
)

_POWERS = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
}
_MAGNITUDE = re.compile(
    rf"([-+]?\d+(?:\.\d+)?)\s*(?:{_TEXT}\s*\{{\s*({'|'.join(_POWERS)})\b"
    rf"([^{{}}]*)\}}|({'|'.join(_POWERS)})\b(.*))",
    re.DOTALL,
)
_EXPONENT = r"(?:\s*\^\s*(?:-?\d|\{\s*-?\d\s*\}))?"
_TEXT_UNIT = re.compile(
    rf"(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}}))?"
    rf"(?:[\s/]|\\cdot|\\circ|{_WORDS}{_EXPONENT})*{_WORDS}{_EXPONENT}\s*"
)
# A unit in brackets: 7 (cm).
_ASIDE = re.compile(rf"(.*[\d}}])\s*\(\s*({_WORDS}|[a-zA-Z]{{2,}})\s*\)")
_UNIT_START = re.compile(r"\^\s*\{?\s*\\circ|\\(?:text|math|mbox)|[ /]")
_NUMBER_HEAD = re.compile(
    r"[-+]?\s*(?:\d+(?:[.,]\d+)*|\.\d+)?\s*"
    r"(?:\\frac\s*(?:\{[-\d. ]+\}\s*\{[\d. ]+\}|\d\d)|/\s*\d+|\\pi"
    r"|\\sqrt\s*\{\d+\}|\\times\s*10\s*\^\s*\{-?\d+\})?"
)
_UNIT = re.compile(
    rf"(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}}))?\s*"
    rf"[a-zA-Z][a-zA-Z .\-/]*{_EXPONENT}(?:\s*/\s*[a-zA-Z]+{_EXPONENT})?"
)
_SHORT_UNITS = frozenset(
    "cm mm km nm ft in kg mg lb lbs oz hr hrs ml mL cc yd mi Hz kHz MHz ms kJ"
    " kN kW eV min sec mph kph day gal mol cal pts yen men deg rad rev cup bit"
    " Pa kPa atm USD EUR sq cu m s g h L J N W V A K F C".split()
)
_NO_UNITS = frozenset(
    "and or to mod times over choose percent percentage pct if when for than"
    " dozen infinity base sqrt sinh cosh tanh with where".split()
)
_NOON = re.compile(r"(?<![a-zA-Z])([ap])\s*\.?\s*m\b", re.IGNORECASE)

_NUMERALS = (
    "two three four five six seven eight nine ten eleven twelve thirteen"
    " fourteen fifteen sixteen"
)
_BASES = {name: i for i, name in enumerate(_NUMERALS.split(), 2)} | {
    "binary": 2,
    "bin": 2,
    "octal": 8,
    "oct": 8,
    "decimal": 10,
    "dec": 10,
    "hexadecimal": 16,
    "hex": 16,
    "twenty": 20,
}
_BASED = re.compile(
    r"\(?([0-9A-Za-z]+?(?:\.[0-9A-Za-z]+?)?)\)?"
    r"(?:_\{?\(?(?:base)?([0-9a-z]+)\)?\}?|,?\(?(?:in)?base([0-9a-z]+)\)?"
    r"|,?\(?(?:in)?(binary|octal|hexadecimal)\)?)",
    re.IGNORECASE,
)
_SUBSCRIPT = re.compile(r"(?<=[\d)])_(?:\{([^{}]*)\}|(\w))")

_FRACTIONS = re.compile(
    r"([-+]?)\s*\\frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))"
)
_RATIO = re.compile(r"([-+]?\d+)\s*/\s*(\d+)")
_DECIMAL = re.compile(
    r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:\s*\\times\s*10\s*\^\s*\{(-?\d{1,3})\})?"
)


def final(completion: str) -> str:
  """Returns what is no thinking: none of it is before the last `</think>`.

  Nor does a `<think>` count that has no end.
  """
  return completion.rpartition("</think>")[2].partition("<think>")[0]


def boxes(text: str) -> list[tuple[int, int, str]]:
  r"""Returns each \boxed or \fbox: where it begins and ends, what it holds.

  Boxes in boxes are left out, and those that are empty or have no end.
  """
  if "\\boxed" not in text and "\\fbox" not in text:
    return []
  closing, stack = {}, []
  for brace in _BRACES.finditer(text):
    if brace[0] == "{":
      stack.append(brace.start())
    elif brace[0] == "}" and stack:
      closing[stack.pop()] = brace.start()
  out, end = [], 0
  for box in _BOX.finditer(text):
    start, at = box.span()
    if start < end or at == len(text):
      continue
    if text[at] != "{":
      bare = _BARE.match(text, at)
      inner, stop = (bare[0].rstrip(".,;:"), bare.end()) if bare else ("", at)
    elif at in closing:
      inner, stop = text[at + 1 : closing[at]], closing[at] + 1
    else:
      continue
    if re.sub(_TEXT, "", clean(inner)).strip("{} ?_"):
      out.append((start, stop, inner))
      end = stop
  return out


def joined(text: str, found: list[tuple[int, int, str]]) -> str:
  """Returns the last boxes that are one list, as a list; "" if it is one box.

  They are near each other, with a comma, "and" or "or" between.
  """
  last = len(found) - 1
  while last > 0:
    between = text[found[last - 1][1] : found[last][0]]
    if len(between) > 60 or "\n\n" in between or not _SEVERAL.search(between):
      break
    last -= 1
  return ", ".join(inner for _, _, inner in found[last:][-20:]) * (
      last < len(found) - 1
  )


def spelled(text: str) -> str:
  """Returns a text with LaTeX for symbols that math-verify does not know."""
  if text.isascii():
    return text
  for _ in range(4):  # Roots of roots.
    text = _ROOT.sub(
        lambda m: f"\\sqrt{_DEGREES[m[1]]}{{{m[2] or m[3] or m[4]}}}", text
    )
  text = _SCRIPTS.sub(
      lambda m: f"{'^' if m[1] else '_'}{{{m[0].translate(_LEVEL)}}}", text
  )
  return text.translate(_SYMBOLS)


def _repeated(match: re.Match) -> str:
  """Turns a repeating decimal into a fraction."""
  whole, fixed, *cycles, first, middle, end = match.groups()
  cycle = "".join(filter(None, cycles)) or first + (middle or "") + (end or "")
  return _as_fraction(whole, fixed, cycle)


def _dotted(match: re.Match) -> str:
  """Turns 0.1666... into a fraction, and leaves 3.14159..."""
  whole, decimals = match.groups()
  # Whole cycles may be followed by a part of one.
  for cut in range(min(len(decimals), 12)):
    kept = decimals[: len(decimals) - cut]
    cycle = _CYCLE.fullmatch(kept)
    if cycle:
      part = cycle[2] or cycle[3]
      if part.startswith(decimals[len(kept) :]):
        return _as_fraction(whole, cycle[1], part)
  return f"{whole}.{decimals}"


def _as_fraction(whole: str, fixed: str, cycle: str) -> str:
  shift = 10 ** len(fixed)
  value = fractions.Fraction(int((whole + fixed) or "0"), shift)
  value += fractions.Fraction(int(cycle), shift * (10 ** len(cycle) - 1))
  return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _magnified(match: re.Match) -> str:
  """Turns 2.5 million into 2500000."""
  power = 10 ** _POWERS[match[2] or match[4]]
  value = fractions.Fraction(match[1]) * power
  if value.denominator != 1:
    return match[0]
  rest = match[3] or match[5] or ""
  return f"{value.numerator} \\text{{{rest}}}" if rest.strip() else str(value)


def clean(text: str) -> str:
  """Returns an answer without what only changes its looks."""
  text = spelled(text)
  if len(text) > _LONGEST:
    return text.strip()
  text = _APART.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
  text = _STYLE.sub("", text)
  text = _DEGREE.sub(r"^\\circ ", text)
  text = _SPACE.sub(" ", _FRACTION.sub(r"\\frac", text)).strip()
  text = _LABEL.sub("", text) if _LABEL.match(text) else text
  if "." in text:
    text = _DOTTED.sub(_dotted, _REPEATING.sub(_repeated, text))
  before = ""
  while text != before:
    before = text
    text = text.strip().rstrip(".,;:").strip()
    ordinal = _ORDINAL.search(text)
    if ordinal and ordinal.end() == len(text):
      text = text[: ordinal.start()]
    styled = _STYLED.fullmatch(text) or re.fullmatch(rf"\{{{_INNER}\}}", text)
    if styled and (text[0] == "{" or re.search(r"[\d=\\]", styled[1])):
      text = styled[1]
  text = _COMMAS.sub(lambda m: m[1].replace(",", ""), text)
  text = _SPACES.sub(lambda m: m[1].replace(" ", ""), text)
  text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text) if (
      _SCIENTIFIC.fullmatch(text)
  ) else _TIMES.sub(r" \\times ", text)
  text = _POWER_OF_10.sub(lambda m: f"^{{{m[1] or m[2]}}}", text)
  over = _OVER.fullmatch(text) if "\\pm" in text else None
  if over:
    text = f"{over[1]}\\frac{{{over[2]}}}{{{over[3]}}}"
  return _MAGNITUDE.sub(_magnified, text)


def is_bound(text: str) -> bool:
  """Whether an answer bounds a value that it does not name, as "< 7" does."""
  return bool(re.match(r"[<>]|\\(?:l|g|n)eq?(?![a-z])", text))


def is_list(text: str) -> bool:
  """Whether an answer has several values."""
  return bool(_SEVERAL.search(text))


def _value(text: str) -> tuple[str, str]:
  """Splits "N = 7" into its name and its value; the name may be ""."""
  element = _ELEMENT.match(text)
  if element and not _EQUALS.search(text):
    return element[0], text[element.end() :].strip()
  sides = [side.strip() for side in _EQUALS.split(text)]
  name = _NAME.fullmatch(sides[0]) and not _OPERATION.search(sides[0])
  if not name or len(sides) == 1 or not sides[-1]:
    return "", text
  if len(sides) > 2 and is_list(text):
    return "", text
  return sides[0], sides[-1]


def values(gold: str, found: str) -> tuple[str, str]:
  """Returns both answers without a name that one of them has, or both."""
  (name, right), (other, given) = _value(gold), _value(found)
  if name and other:
    same = squeezed(name) == squeezed(other)
    return (right, given) if same else (gold, found)
  return right, given


def squeezed(text: str) -> str:
  return re.sub(r"\s+", "", text)


def words(text: str) -> tuple[str, ...]:
  """Returns a text's words in lower case, sorted parts of a list of them."""
  plain = re.sub(rf"{_TEXT}|[{{}}()\[\].'\"]", " ", text).replace("\\&", ",")
  if not re.fullmatch(r"[a-zA-Z ,\-]*[a-zA-Z][a-zA-Z ,\-]*", plain):
    return ()
  parts = re.split(r",|\band\b|\bor\b", plain.lower())
  parts = (re.sub(r"^\s*(?:an?|the)\s+(?=\w)", "", part) for part in parts)
  return tuple(sorted(" ".join(p.split()) for p in parts if p.strip()))


def is_text(text: str) -> bool:
  """Whether an answer is marked as words, not as variables."""
  return bool(re.match(rf"\(?{_TEXT}", text))


def without_unit(text: str) -> str:
  """Returns a number or formula without the unit behind it."""
  aside = _ASIDE.fullmatch(text)
  if aside:
    text = f"{aside[1]} {aside[2]}"
  for start in _UNIT_START.finditer(text) if "\\" in text else ():
    if _TEXT_UNIT.fullmatch(text, start.start()):
      head, unit = text[: start.start()].rstrip(), text[start.start() :]
      if _is_value(head) and _is_unit(unit):
        return head
      break
  head = _NUMBER_HEAD.match(text)
  tail = text[head.end() :]
  if head[0].strip(" +-") and _UNIT.fullmatch(tail) and _is_named(tail, text):
    return head[0].strip()
  return text


def _is_value(head: str) -> bool:
  """Whether what stands before a unit is whole."""
  return bool(head) and head[-1] not in "+-=*/,;(<>_^&"


def _is_unit(text: str) -> bool:
  """Whether marked words are a unit, and not "or", "million" or "7 cm"."""
  if re.search(r"\\text[a-z]*\s*\{[^{}]*\d", text):
    return False
  return not _NO_UNITS & {*re.findall("[a-zA-Z]+", text.lower())}


def _is_named(tail: str, text: str) -> bool:
  """Whether plain letters behind a number are a unit, and not variables."""
  names = re.findall("[a-zA-Z]+", tail.replace("\\circ", ""))
  if _NO_UNITS & {name.lower() for name in names}:
    return False
  # One letter may be a variable, and math-verify knows most units.
  if len(names) == 1 and len(names[0]) == 1 and "circ" not in tail:
    return bool(
        re.search(r"\s(?:[NJWVKL]|m\s*\^\s*\{?\s*[23]\s*\}?)\s*$", text)
    )
  return all(len(n) > 3 or n in _SHORT_UNITS or n == "per" for n in names)


def half_day(text: str) -> str:
  """Returns "a" or "p" of 3 a.m. and 3 p.m., or nothing."""
  found = _NOON.search(re.sub(rf"{_TEXT}|[{{}}]", " ", text))
  return found[1].lower() if found and re.search(r"\d", text) else ""


def based(text: str) -> tuple[str, int]:
  """Returns digits and the base that is stated for them, or ("", 0)."""
  text = re.sub(rf"{_TEXT}|\\overline|\s", "", text)
  found = _BASED.fullmatch(text)
  found = found or _BASED.fullmatch(re.sub(r"[{}]", "", text))
  if not found:
    return "", 0
  digits = found[1].upper().lstrip("0") or "0"
  base = (found[2] or found[3] or found[4]).lower()
  base = int(base) if base.isdigit() else _BASES.get(base, 0)
  if not 2 <= base <= 36 or not re.search(r"\d", digits) and base < 11:
    return "", 0
  allowed = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:base] + "."
  # 1002_2 is no number, but it is not 1002_3 either.
  return (digits, base) if digits[0].isdigit() or all(
      digit in allowed for digit in digits
  ) else ("", 0)


def bases(text: str) -> list[str]:
  """Returns the subscripts of numbers, sorted."""
  found = [x or y for x, y in _SUBSCRIPT.findall(text)]
  return sorted(squeezed(re.sub(rf"{_TEXT}|[{{}}]", "", x)) for x in found)


def number(text: str) -> tuple[fractions.Fraction, bool] | None:
  """Returns a plain number, and whether it is written as a decimal."""
  text = text.strip()
  if len(text) > 80:
    return None
  decimal = _DECIMAL.fullmatch(text)
  if decimal:
    value = fractions.Fraction(decimal[1])
    value *= fractions.Fraction(10) ** int(decimal[2] or 0)
    return value, "." in text or "-" in (decimal[2] or "")
  found = _FRACTIONS.fullmatch(text)
  if found:
    sign, over, under = found[1], found[2] or found[4], found[3] or found[5]
  else:
    found = _RATIO.fullmatch(text)
    if not found:
      return None
    sign, over, under = "", found[1], found[2]
  if not int(under):
    return None
  value = fractions.Fraction(int(over), int(under))
  return (-value if sign == "-" else value), False
