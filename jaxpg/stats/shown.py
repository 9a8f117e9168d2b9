"""Results as a notebook shows them: a figure as PNG bytes, a table as HTML."""

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from jaxpg.stats.figures import drawn

MOST_ROWS = 40


def png(draw: Callable[[Any], None], dots: int = 100) -> bytes:
    """The figure that `draw` fills, as PNG with this many dots per inch."""
    file = io.BytesIO()
    drawn(draw).savefig(file, format="png", dpi=dots)
    return file.getvalue()


def picture(data: bytes, kind: str = "png") -> str:
    """An image inside HTML.

    >>> picture(b"GIF8", "gif")
    '<img style="max-width: 100%" src="data:image/gif;base64,R0lGOA==">'
    """
    return (
        f'<img style="max-width: 100%" src="data:image/{kind};base64,{b64encode(data).decode()}">'
    )


def table(columns: Mapping[str, Sequence[Any]]) -> str:
    """An HTML table, numbers to four digits, of the columns that have a value.

    >>> table({"name": ["a"], "value": [1 / 3], "note": [None]})
    '<table><tr><th>name</th><th>value</th></tr><tr><td>a</td><td>0.3333</td></tr></table>'
    """
    kept = {name: values for name, values in columns.items() if any(x is not None for x in values)}
    rows = list(zip(*kept.values(), strict=True))
    lines = [_row("th", list(kept)), *(_row("td", row) for row in rows[:MOST_ROWS])]
    more = f"<p>{MOST_ROWS} of {len(rows)} rows</p>" if len(rows) > MOST_ROWS else ""
    return f"<table>{''.join(lines)}</table>{more}"


def text(lines: Sequence[str]) -> str:
    """Lines of equal characters inside HTML.

    >>> text(["a < b"])
    '<pre>a &lt; b</pre>'
    """
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _row(tag: str, cells: Sequence[Any]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(_text(x))}</{tag}>' for x in cells)}</tr>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
