r"""Right or wrong, by math-verify or by letter; how sure a mean of those is.

An answer is what the last \boxed{} holds after the last finished `</think>`. It
is cut out, and cleared of what does not count, as the right one is: of spacing,
a full stop, the separators of thousands, styles, "N =" before a value, and the
unit behind a number, whatever it is. Numbers and words are compared here, and
all else by math-verify (`judge`), with a time limit.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import fractions
import math
import re
import unicodedata

import numpy as np

from prefix_distill.data import gym
from prefix_distill.evaluate import judge

_JUDGE = judge.Judge()

# A longer answer than this, in characters, is left as it is.
_LONGEST = 1000

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|f(?:rame)?box)(?![a-zA-Z])\s*")
# What a box holds that shows where an answer goes.
_PLACE = re.compile(
    r"(?:\\(?:[lcdv]?dots[a-z]?|square|Box|underline|_)(?![a-zA-Z])"
    r"|(?<!\\)[{}()\[\]]|[ ?_.]|\b(?:your|the|final|answer|here)\b)*",
    re.IGNORECASE,
)
# What stands behind a \boxed without braces: one word or formula.
_BARE = re.compile(
    r"(?:[^\s${}\\]|\\(?![)\]])(?:[a-zA-Z]+|.)|\{(?:[^{}]|\{[^{}]*\})*\})+"
)

_SUBSCRIPT_AFTER = re.compile(r"\s*_\s*(?:\{[^{}]*\}|\d)")

_TEXT = (
    r"\\(?:text(?:bf|it|normal|rm|sf|tt|up)?|math(?:bf|it|rm|sf|tt)|mbox"
    r"|operatorname\*?)"
)
_WORDS = rf"{_TEXT}\s*\{{[^{{}}]*\}}"
_PLAIN_TEXT = re.compile(rf"{_TEXT}\s*\{{([^{{}}]*)\}}")
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
    "\u0305": "",
    "\u2103": r"^\circ C",
    "\u2109": r"^\circ F",
    "\u03a9": r"\Omega ",
    "\u2126": r"\Omega ",
    "\u00b5": r"\mu ",
    "\u03bc": r"\mu ",
    "º": r"^\circ ",
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
} | {
    sign: "\\frac{{{}}}{{{}}}".format(
        *unicodedata.normalize("NFKC", sign).split("\u2044")
    )
    for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
}
_SYMBOLS = str.maketrans(_UNICODE)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉₋₊"
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)")
_LEVEL = str.maketrans(_RAISED + _LOWERED, "0123456789-+" * 2)
_ROOT = re.compile(
    r"([√∛∜])\s*(?:\(((?:[^()√∛∜]|\([^()√∛∜]*\))*)\)|\{([^{}]*)\}"
    r"|(\d+(?:\.\d+)?|[a-zA-Z]|\\pi|\\frac\{[^{}]*\}\{[^{}]*\}"
    r"|\\sqrt(?:\[\d\])?\{[^{}]*\}))"
)
# Digits with a line or a dot above.
_LINED = re.compile(r"(?:\d[\u0304\u0305])+")
_DOTTED_DIGIT = re.compile(r"(\d)\u0307")
_DEGREES = {"√": "", "∛": "[3]", "∜": "[4]"}

_STYLE = re.compile(
    r"(?<!\\)(?:\\(?:left|right)\s*\.|\\(?:left|right)(?![a-zA-Z])"
    r"|\\(?:(?:display|text)style|limits|boxed|f(?:rame)?box|tiny"
    r"|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
    r"|\\(?:checkmark|blacksquare|therefore)(?![a-zA-Z])"
    r"|\\[hv]?phantom\s*\{[^{}]*\}|\\color\s*\{\w+\}(?!\s*\{)"
    r"|\\?\$|\\[()\[\]#]|\\!|\\(?:pounds|euro|cents?)(?![a-zA-Z]))|[€£¥¢₹]"
)
# {\rm cm} and \bf{7} are \mathrm{cm} and \mathrm{7}.
_OLD_STYLE = re.compile(
    r"\\(?:rm|bf|it|sf|tt)(?![a-zA-Z])\s*(?:\{([^{}]*)\}|([\w ]+))"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SPACE = re.compile(
    r"(?<!\\)(?:\\[,;: ]|\\q?quad(?![a-zA-Z])|\\thinspace"
    r"|\\hspace\*?\{[^{}]*\})|~|\s+"
)
_DEGREE = re.compile(
    rf"\\deg(?:ree)?(?![a-zA-Z])|(?<=\d)\s*\^\s*(?:o\b|{_TEXT}\s*\{{\s*o\s*\}})"
)
# An array of one cell.
_CELL = re.compile(
    r"\\begin\{(?:aligned|align\*?|gathered|array)\}(?:\{[lcr|]*\})?"
    r"([^&\\]*(?:\\(?![\\e])[^&\\]*)*)\\end\{[a-z*]+\}"
)
# \text{7 cm}^2 is 7 \text{cm}^2.
_WHOLE = re.compile(
    rf"{_TEXT}\s*\{{\s*([-+]?[\d.,]*\d)\s*([^{{}}\d]+)\}}"
    r"(\s*\^\s*(?:-?\d|\{\s*-?\d\s*\}))"
)
_NEARLY = re.compile(
    rf"(?:{_TEXT}\s*\{{\s*)?(?:about|approximately|around|roughly|exactly)\b"
    r"\s*\}?\s*(?=[-+.\d\\])",
    re.IGNORECASE,
)
_AFTER_NOON = re.compile(r"(?<=\d)\s*\b([ap])\.?\s?m\.?$", re.IGNORECASE)
_STOP_IN_TEXT = re.compile(rf"{_TEXT}\s*\{{[ .,;:]*\}}\s*$")
# (a + b) / 2, for which math-verify needs a fraction if it has a \pm.
_OVER = re.compile(r"(-?)\(([^()]*)\)\s*/\s*(\d+)")
# In 10\,080, 10{,}080 and 10,\!080; and in 10,080, but not in (10,080), though
# in (10,080, 7): no number of a list begins with 0.
_GAP = (
    r"(?:\{\s*(?:,|\\,)\s*\}|,?\\!|,\{\\!\}|\\[,;: ]|~|\\thinspace\s?"
    r"|\\(?:text|mathord|mathpunct)\s*\{,\})"
)
_APART = re.compile(
    rf"(?<![\d.])(\d{{1,3}})((?:,\d{{3}})*{_GAP}\d{{3}}(?:(?:,|{_GAP})\d{{3}})*)"
    r"(?!\d)"
)
_ZEROS = re.compile(r"(?<=[(\[{])(\d{1,3}(?:,0\d\d)+)(?=[)\]\s}]|,\s|\\)")
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
# \text{Direction: north} and \text{The area is } 7.
_TITLE = re.compile(rf"({_TEXT}\s*\{{)\s*[a-zA-Z][a-zA-Z ]*:\s+(?=[^{{}}\s])")
_IS = re.compile(rf"({_TEXT}\s*\{{[^{{}}]*?)\s*\b(?:is|equals)\s*\}}\s*")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_TIMES = re.compile(r"(?<=\d)\s*(?:[x*]|\\ast|\\cdot)\s*(?=10\s*\^)")
_POWER_OF_10 = re.compile(r"(?<=10)\s*\^\s*(?:\(\s*(-?\d+)\s*\)|(-?\d+))")

# 0.1\overline{6}, 0.1(6) and 0.\dot{1}4285\dot{7}; then 0.1666...
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)\s*"
    r"(?:\\(?:overline|bar|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\)"
    r"|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
    r"\s*(?:\.{3}|\\[lc]?dots)?(?![\d(])"
)
_DOTTED = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*(?:\.{3}|\\[lc]?dots)(?!\s*\d)")
_CYCLE = re.compile(r"(\d*?)(?:(\d)\2{2,}|(\d{2,})\3+)|()(\d)\5")

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
_RELATION = re.compile(r"[<>]|\\(?:l|g)(?:eq?|t)(?![a-z])")
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
_ONE_UNIT = (
    rf"(?:{_WORDS}{_EXPONENT}|\\frac\s*\{{\s*{_WORDS}{_EXPONENT}\s*\}}"
    rf"\s*\{{\s*{_WORDS}{_EXPONENT}\s*\}}|\\(?:Omega|ohm)(?![a-zA-Z])"
    rf"|\\mu(?![a-zA-Z])\s*(?:{_WORDS}|[a-zA-Z]){_EXPONENT})"
)
_TEXT_UNIT = re.compile(
    rf"(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}}))?"
    rf"(?:[\s/]|\\cdot|\\circ|{_ONE_UNIT})*{_ONE_UNIT}\s*"
)
# A unit in brackets: 7 (cm).
_ASIDE = re.compile(rf"(.*[\d}}])\s*\(\s*({_WORDS}|[a-zA-Z]{{2,}})\s*\)")
_UNIT_START = re.compile(
    r"\^\s*\{?\s*\\circ|[ /]"
    r"|\\(?:text|math|mbox|operatorname|frac|Omega|ohm|mu)"
)
# 7 squared, 7 cubed and 7 factorial, but not 7 cm squared.
_RAISES = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}
_RAISED_WORDS = re.compile(
    rf"(?<=\d)\s*(?:{_TEXT}\s*\{{\s*)?\b(squared|cubed|factorial)\b(?:\s*\}})?",
    re.IGNORECASE,
)
# A currency before a number.
_CURRENCY = re.compile(
    rf"^\s*(?:{_TEXT}\s*\{{\s*)?(?:Rs\.?|USD?|EUR|GBP|INR|CNY|JPY|AUD|CAD)\s*"
    r"(?:\}\s*)?(?=[-+.\d\\])"
)
_PERCENT = re.compile(r"(?<=[\d}])\s*\\?%$")
_DOT = re.compile(r"(?<=\d)\{([.:])\}(?=[\d\\])")
_NUMBER_HEAD = re.compile(
    r"[-+]?\s*(?:\d+(?:[.,]\d+)*|\.\d+)?\s*"
    r"(?:\\frac\s*(?:\{[-\d. ]+\}\s*\{[\d. ]+\}|\d\d)|/\s*\d+|\\pi"
    r"|\\sqrt\s*\{\d+\}|\\times\s*10\s*\^\s*\{-?\d+\})?"
)
_UNIT = re.compile(
    rf"(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}}))?\s*"
    rf"[a-zA-Z](?:[a-zA-Z .\-/]|\\cdot )*{_EXPONENT}"
    rf"(?:\s*/\s*[a-zA-Z]+{_EXPONENT})?"
)
_SHORT_UNITS = frozenset(
    "cm mm km nm ft in kg mg lb lbs oz hr hrs ml mL cc yd mi Hz kHz MHz ms kJ"
    " kWh Wh kB MB GB TB kN kW eV min sec mph kph day gal mol cal pts yen men"
    " deg rad rev cup bit"
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
    r"(?:_\{?\(?(?:base-?)?([0-9a-z]+)\)?\}?|,?\(?(?:in)?base([0-9a-z]+)\)?"
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

_STATED = re.compile(
    r"(?<!incorrect )(?<!wrong )\banswer"
    r"\s*(?:is\b|(?:must|should|would) be\b|:)"
    r"|\b(?:correct|right|best)\s+(?:option|choice|letter)\s*(?:is\b|:)",
    re.IGNORECASE,
)
# "option (C) is correct"; but "option (C) is not", and "(C) is incorrect".
_IS_RIGHT = re.compile(
    r"(?:(?i:\b(?:option|choice|answer)\s+)[(\[\s]*([a-zA-Z])[\s)\]]*"
    r"|(?<!or )[(\[]\s*([a-zA-Z])\s*[)\]]|(?<![\w'.-])(?<!or )([B-HJ-Z]))"
    r"\s+is\s+(?:indeed\s+|therefore\s+|thus\s+)?(?:the\s+)?"
    r"(?:correct|right|best|answer)\b(?!\s+(?:that|to|if|only|for)\b)"
)
# What only changes how a letter looks.
_MARKUP = re.compile(
    r"\\(?:boxed|f(?:rame)?box|boldsymbol|mbox|left|right"
    r"|(?:text|math)(?:bf|it|normal|rm|sf|tt)?)(?![a-z])"
    r"|\\[()\[\],;:! ]|[{}$*`~\"\u201c\u201d]|(?<![a-zA-Z])'|'(?![a-zA-Z])"
)
# A letter that is set apart from the text of its option.
_SET_APART = re.compile(
    r"(?<![a-zA-Z\\])([A-Z])([)\]}.]*)(?:\\[,;: ]|~|\s)*"
    r"(?:\\q?quad(?![a-z])|\\\\|\\newline(?![a-z])|\\hspace\*?\{[^{}]*\}|\|\s"
    r"|\\(?:text|math)[a-z]*\s*\{(?!\s*(?:(?:and|or)\b|\))))"
)
# A letter in brackets, or one that is no word: "a gas" and "I think" are not
# answers, and neither are two letters.
_LETTER = re.compile(
    r"""
    (?:(?:the|answer|option|choice|is)\b | [\s:])*
    (?:
      [(\[] \s* ([a-z]) \s* [)\]]
      | ([a-z]) (?= \s* (?: $ | [,;:)\]] | \.(?!\w) | (?:as|because|since)\b
          | [\u2013\u2014] | (?<=\s)-+\s (?!\s*[a-z]\s*$)
          | = \s* (?: [-+(]?[\d.] | \\ | [a-z]{3} ) | \s*[-=]+> \s*
          | \s*\\(?: approx | (?:right)?arrow | to ) (?![a-z])
          | \s+\(\s* [\d\\a-z] [^()\s] ))
    )
    (?! \s* (?:[,;/&] | and\b | or\b) \s* (?:and\b | or\b)?
        \s* [(\[]? [a-z] \s* (?: $ | [.,;:)\]] ))
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_WHOLE_TEXT = re.compile(r"\\text(?:bf|it|normal|rm|tt)?\{([^{}]*)\}")
_LINE = re.compile(
    r"^[ \t>#*_-]*(?:the\s+)?(?:final\s+)?answer[ \t*_]*[:\uff1a][ \t*_]*"
    r"(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)


_OPENED, _CLOSED = (
    re.compile(rf"<\s*{slash}think(?:ing)?\s*>", re.IGNORECASE)
    for slash in ("", "/")
)


def _after_thinking(completion: str) -> str:
  """Returns what is no thinking: none of it is before the last `</think>`.

  Nor does a `<think>` count that has no end, nor `<thinking>`.
  """
  if "<" not in completion:
    return completion
  final = _CLOSED.split(completion)[-1]
  return _OPENED.split(final, maxsplit=1)[0]


def boxes(text: str) -> list[tuple[int, int, str]]:
  r"""Returns each \boxed or \fbox: where it begins and ends, what it holds.

  Boxes in boxes are left out, and those that are empty or have no end.
  """
  if "box" not in text:
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
      outside = _SUBSCRIPT_AFTER.match(text, stop)  # Of \boxed{12}_5.
      if outside:
        inner, stop = inner + outside[0], outside.end()
    else:
      continue
    if not _PLACE.fullmatch(re.sub(_TEXT, "", _clean(inner))):
      out.append((start, stop, inner))
      end = stop
  return out


def _joined(text: str, found: list[tuple[int, int, str]]) -> str:
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


def _spelled(text: str) -> str:
  """Returns a text with LaTeX for symbols that math-verify does not know."""
  if text.isascii():
    return text
  text = _LINED.sub(
      lambda m: rf"\overline{{{''.join(filter(str.isdecimal, m[0]))}}}", text
  )
  text = _DOTTED_DIGIT.sub(r"\\dot{\1}", text)
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
      part = cycle[2] or cycle[3] or cycle[5]
      if part.startswith(decimals[len(kept) :]):
        return _as_fraction(whole, cycle[1] or "", part)
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


def _clean(text: str) -> str:
  """Returns an answer without what only changes its looks."""
  text = _spelled(text)
  if len(text) > _LONGEST:
    return text.strip()
  text = _APART.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
  text = _STYLE.sub("", text)
  text = _OLD_STYLE.sub(lambda m: rf"\mathrm{{{m[1] or m[2]}}}", text)
  text = _DEGREE.sub(r"^\\circ ", text)
  text = _SPACE.sub(" ", _FRACTION.sub(r"\\frac", text)).strip()
  text = _LABEL.sub("", text) if _LABEL.match(text) else text
  text = _TITLE.sub(r"\1", text, count=1) if _TITLE.match(text) else text
  text = _IS.sub(r"\1} = ", text)
  text = _DOT.sub(r"\1", text)
  text = _NEARLY.sub("", text) if _NEARLY.match(text) else text
  text = _AFTER_NOON.sub(r" \\text{ \1.m.}", text)
  text = _STOP_IN_TEXT.sub("", text)
  for form, inner in ((_CELL, r"\1"), (_WHOLE, r"\1 \\text{\2}\3")):
    whole = form.fullmatch(text)
    text = whole.expand(inner).strip() if whole else text
  text = _RAISED_WORDS.sub(lambda m: _RAISES[m[1].lower()], text)
  text = _CURRENCY.sub("", text)
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
  for commas in (_COMMAS, _ZEROS):
    text = commas.sub(lambda m: m[1].replace(",", ""), text)
  text = _SPACES.sub(lambda m: m[1].replace(" ", ""), text)
  text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text) if (
      _SCIENTIFIC.fullmatch(text)
  ) else _TIMES.sub(r" \\times ", text)
  text = _POWER_OF_10.sub(lambda m: f"^{{{m[1] or m[2]}}}", text)
  over = _OVER.fullmatch(text) if "\\pm" in text else None
  if over:
    text = f"{over[1]}\\frac{{{over[2]}}}{{{over[3]}}}"
  return _MAGNITUDE.sub(_magnified, text)


def _is_bound(text: str) -> bool:
  """Whether an answer bounds a value that it does not name, as "< 7" does."""
  return bool(re.match(r"[<>]|\\(?:l|g|n)eq?(?![a-z])", text))


def _is_list(text: str) -> bool:
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
  if len(sides) > 2 and _is_list(text):
    return "", text
  return sides[0], sides[-1]


def _without_names(gold: str, found: str) -> tuple[str, str]:
  """Returns both answers without a name that one of them has, or both."""
  (name, right), (other, given) = _value(gold), _value(found)
  if name and other:
    same = _squeezed(name) == _squeezed(other)
    return (right, given) if same else (gold, found)
  return right, given


def _squeezed(text: str) -> str:
  return re.sub(r"\s+", "", text)


def _unstyled(text: str) -> str:
  return _squeezed(_PLAIN_TEXT.sub(r"\1", text))


def _words(text: str) -> tuple[str, ...]:
  """Returns a text's words in lower case, sorted parts of a list of them."""
  plain = re.sub(rf"{_TEXT}|[{{}}()\[\].'\"`\u201c\u201d]", " ", text).replace(
      "\\&", ","
  )
  if not re.fullmatch(r"[a-zA-Z ,\-]*[a-zA-Z][a-zA-Z ,\-]*", plain):
    return ()
  parts = re.split(r",|\band\b|\bor\b", plain.lower())
  parts = (re.sub(r"^\s*(?:an?|the)\s+(?=\w)", "", part) for part in parts)
  return tuple(sorted(" ".join(p.split()) for p in parts if p.strip()))


def _is_text(text: str) -> bool:
  """Whether an answer is marked as words, not as variables."""
  return bool(re.match(rf"\(?{_TEXT}", text))


def _without_unit(text: str) -> str:
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
  names = re.findall("[a-zA-Z]+", re.sub(r"\\c(?:irc|dot)", "", tail))
  if _NO_UNITS & {name.lower() for name in names}:
    return False
  # One letter may be a variable, and math-verify knows most units.
  if len(names) == 1 and len(names[0]) == 1 and "circ" not in tail:
    return bool(
        re.search(r"\s(?:[NJWVKL]|m\s*\^\s*\{?\s*[23]\s*\}?)\s*$", text)
    )
  return all(len(n) > 3 or n in _SHORT_UNITS or n == "per" for n in names)


def _half_day(text: str) -> str:
  """Returns "a" or "p" of 3 a.m. and 3 p.m., or nothing."""
  found = _NOON.search(re.sub(rf"{_TEXT}|[{{}}]", " ", text))
  return found[1].lower() if found and re.search(r"\d", text) else ""


def _based(text: str) -> tuple[str, int]:
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


def _subscripts(text: str) -> list[str]:
  """Returns the subscripts of numbers, sorted."""
  found = [x or y for x, y in _SUBSCRIPT.findall(text)]
  return sorted(_squeezed(re.sub(rf"{_TEXT}|[{{}}]", "", x)) for x in found)


def _number(text: str) -> tuple[fractions.Fraction, bool] | None:
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


def _boxed(text: str) -> str:
  return f"\\boxed{{{text}}}"


def _equal(answer: str, found: str, verbatim: bool = True) -> bool:
  """Whether an answer that was cut out is the right one.

  Args:
    answer: the right one.
    found: the other.
    verbatim: whether the same characters are enough.
  """
  gold, given = _clean(answer), _clean(found)
  if not gold or not given:
    return False
  if verbatim and _unstyled(gold) == _unstyled(given):
    return True
  gold, given = _without_names(gold, given)
  for compare in (_compare_bases, _compare_marks, _compare_words):
    verdict = compare(gold, given)
    if verdict is not None:
      return verdict
  gold, given = _without_unit(gold), _without_unit(given)
  if verbatim and _squeezed(gold) == _squeezed(given):
    return True
  if all(_PERCENT.search(text) for text in (gold, given)):
    gold, given = (_PERCENT.sub("", text) for text in (gold, given))
  numbers = _number(gold), _number(given)
  if all(numbers):
    return _same_number(*numbers)
  # math-verify takes an interval for an inequality, but not the other way.
  if gold[:1] in ("(", "[") and _RELATION.search(given):
    gold, given = given, gold
  return _JUDGE.equal(_boxed(gold), _boxed(given))


def _compare_bases(gold: str, given: str) -> bool | None:
  """Compares numbers of which one has a base at least; None for others."""
  right, base = _based(gold)
  # In 21_3 = 7_{10} the side with the right answer's base counts.
  sides = [_based(side) for side in _EQUALS.split(given)]
  given_in = {other: digits for digits, other in sides}
  if base and 0 not in given_in and base in given_in:
    return given_in[base] == right
  digits, other = _based(given)
  if not base and not other:
    return None
  if base and other:
    return (right, base) == (digits, other)
  plain = _squeezed(given if base else gold).upper()
  return (plain.lstrip("0") or "0") == (right or digits)


def _compare_marks(gold: str, given: str) -> bool | None:
  """Compares what math-verify does not look at; None if it does not differ."""
  if _is_bound(gold) != _is_bound(given):
    return False
  for marks in (_subscripts, _half_day):
    right, other = marks(gold), marks(given)
    if right and other and right != other:
      return False
  return None


def _compare_words(gold: str, given: str) -> bool | None:
  """Compares words; None if they may be variables that are equal."""
  right, other = _words(gold), _words(given)
  if not right or not other:
    return None
  marked = _is_text(gold)
  sure = marked or _is_text(given) or gold == given or len(gold) > 2
  if right == other and sure:
    return True
  return False if marked else None


def _same_number(
    right: tuple[fractions.Fraction, bool],
    other: tuple[fractions.Fraction, bool],
) -> bool:
  """Compares as math-verify does, but for tiny numbers.

  Args:
    right: a number, and whether it is written as a decimal.
    other: another.
  """
  (gold, is_decimal), (given, also) = right, other
  if gold == given:
    return True
  if not (is_decimal or also):
    return False
  places = judge.digits(float(max(abs(gold), abs(given))))
  return round(gold, places) == round(given, places)


def _is_boxed(final: str, answer: str) -> bool | None:
  """Grades the last box; None if there is none."""
  found = boxes(final)
  if not found:
    return None
  if _equal(answer, found[-1][2]):
    return True
  # Some write the values of a list into a box each.
  several = _joined(final, found) if _is_list(answer) else ""
  return bool(several) and _equal(answer, several)


def is_correct(completion: str, answer: str) -> bool:
  """Grades a completion against the right answer.

  Only what follows the last `</think>` counts, where there is one: the last
  box, or else what math-verify finds in the text.
  """
  final = _after_thinking(completion)
  verdict = _is_boxed(final, answer)
  if verdict is not None:
    return verdict
  if re.search(r"\d", answer) and not re.search(r"\d", final):
    return False  # Most answers of a model that has not learned to answer.
  if not final.strip():
    return False
  text = _spelled(final)
  golds = dict.fromkeys((answer, _without_unit(_clean(answer))))
  return any(_JUDGE.equal(_boxed(gold), text) for gold in golds if gold)


def _stated(final: str) -> str:
  """Returns what the last line says that begins with "Answer:"."""
  lines = _LINE.findall(final)
  if not lines:
    return ""
  found = boxes(lines[-1])
  return found[-1][2] if found else lines[-1].strip(" *_`")


def is_correct_either(completion: str, answer: str) -> bool:
  """Grades by the dual-path rule: the last box, or the last "Answer:" line.

  Either may be right, after the last `</think>`, and no other text counts.
  """
  final = _after_thinking(completion)
  line = _stated(final)
  if _is_boxed(final, answer):
    return True
  return bool(line) and _equal(answer, line)


def _letter(text: str) -> str:
  """Returns the letter that a text begins with, or nothing."""
  text = _SET_APART.sub(r"\1\2: ", text)
  found = _LETTER.match(_MARKUP.sub(" ", text))
  return (found[1] or found[2]).upper() if found else ""


def _stated_letter(final: str) -> str:
  """Returns the last letter that the text calls the answer, or nothing."""
  found = []
  final = _MARKUP.sub(" ", _SET_APART.sub(r"\1\2: ", final))
  for match in _STATED.finditer(final):
    # The end of the statement is near, and answers may repeat it for pages.
    found.append((match.end(), _letter(final[match.end() : match.end() + 80])))
  for match in _IS_RIGHT.finditer(final):
    found.append((match.end(), (match[1] or match[2] or match[3]).upper()))
  return ([letter for _, letter in sorted(found) if letter] or [""])[-1]


def _boxed_letter(final: str) -> str:
  found = boxes(final)
  return _letter(found[-1][2]) if found else ""


def is_letter(completion: str, answer: str) -> bool:
  r"""Grades a completion against the letter of the right option.

  Only what follows the last `</think>` counts, where there is one: the letter
  in the last \boxed{}, or else that of the last "The answer is (C)" or "option
  (C) is correct". Any other text is wrong, whatever letters are in it.
  """
  final = _after_thinking(completion)
  found = _boxed_letter(final) or _stated_letter(final)
  return bool(found) and found == answer


def is_letter_either(completion: str, answer: str) -> bool:
  """Grades a letter by the dual-path rule; see `is_correct_either`."""
  final = _after_thinking(completion)
  found = {_boxed_letter(final), _letter(_stated(final))}
  return bool(answer) and answer in found


def final_answer(completion: str) -> str:
  r"""Returns the answer that a verifier of reasoning-gym is to read.

  Only what follows the last `</think>` counts, where there is one: what the
  last <answer> and </answer> enclose, or else all; and of that what the last
  \boxed{} holds, without \text{}, or else all.
  """
  text = _after_thinking(completion)
  before, closed, _ = text.rpartition("</answer>")
  if closed and "<answer>" in before:
    text = before.rpartition("<answer>")[2]
  found = boxes(text)
  text = found[-1][2] if found else text
  plain = _WHOLE_TEXT.fullmatch(text.strip())
  return (plain[1] if plain else text).strip()


def verified(completion: str, reference: str) -> float:
  """Returns what the verifier of a task of reasoning-gym gives, from 0 to 1.

  Args:
    completion: the answer of a model.
    reference: a record's, see `gym`.
  """
  answer = final_answer(completion)
  return gym.score(reference, answer) if answer else 0.0


# The rule of a set, by what it asks for; below 1 is wrong.
GRADERS: Mapping[str, Callable[[str, str], float]] = {
    "math": is_correct,
    "letter": is_letter,
    "dual_math": is_correct_either,
    "dual_letter": is_letter_either,
    "gym": verified,
}


def unreadable_golds(answers: Sequence[str], kind: str) -> list[int]:
  """Returns the numbers of the right answers that are not equal to themselves.

  The same answer in other words would be marked wrong.

  Args:
    answers: the right ones of a set.
    kind: how they are graded, one of `GRADERS`.
  """
  if kind == "gym":
    return []  # Its verifiers say what is right.
  if kind.endswith("letter"):
    return [
        i for i, x in enumerate(answers) if not GRADERS[kind](_boxed(x), x)
    ]
  out = []
  for i, answer in enumerate(answers):
    found = boxes(_boxed(answer))
    if len(found) != 1 or not _equal(answer, found[0][2], verbatim=False):
      out.append(i)
  return out


def interval(correct: np.ndarray) -> tuple[float, float]:
  """Returns the 95 % Wilson interval of mean accuracy.

  Several samples of one problem are not independent, so the interval is that
  of as many independent trials as would have the same standard error.

  Args:
    correct: bool [problems, samples].
  """
  per_problem = correct.mean(axis=1)
  n, mean = len(per_problem), per_problem.mean()
  variance = per_problem.var() / n
  trials = float(n)
  if variance > 0:
    trials = min(mean * (1 - mean) / variance, float(correct.size))
  z = 1.959964
  centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
  half = (
      z
      / (1 + z * z / trials)
      * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
  )
  # Rounding must not leave the mean outside: 0 of 6 right gives a low of 3e-17.
  low, high = min(centre - half, mean), max(centre + half, mean)
  return max(float(low), 0.0), min(float(high), 1.0)
