"""A rollout as text, each token shaded by a number."""

from collections.abc import Sequence
import html

import matplotlib
from matplotlib import colors


def shade(
    tokens: Sequence[str], values: Sequence[float], top: float | None = None
) -> str:
  """Returns HTML: tokens on a background from white (0) to red (`top`).

  Args:
    tokens: decoded one by one.
    values: one for each; it shows when the mouse rests on the token.
    top: the value that gets the full colour; the largest one if None.
  """
  top = top or max([*values, 1e-9])
  reds = matplotlib.colormaps["Reds"]
  spans = []
  for token, value in zip(tokens, values, strict=True):
    color = colors.to_hex(reds(0.8 * min(max(value / top, 0.0), 1.0)))
    text = html.escape(token).replace("\n", "&crarr;<br>")
    spans.append(
        f'<span title="{value:.3f} nats"'
        f' style="background:{color};color:#000">{text}</span>'
    )
  return (
      '<div style="font-family:monospace;white-space:pre-wrap;line-height:1.6;'
      f'background:#fff;padding:8px">{"".join(spans)}</div>'
  )
