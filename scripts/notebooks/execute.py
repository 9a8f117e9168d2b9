"""Runs notebooks in plain Python and keeps what their cells show: execute.py [NAME...], by default all.

Run it where the package is installed, after any change to a notebook or to what it prints. What a run writes
goes to a temporary folder.
"""

import ast
import io
import json
import os
import re
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

WIDTH = 900  # pixels of a picture that is kept
EVERY = 5  # of the frames of a film
FOLDER = Path(__file__).resolve().parent


def cells(notebook: dict, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def execute(
    notebook: dict, change: Callable[[dict], str] = source
) -> tuple[dict[str, Any], list[list[dict]]]:
    """The names that the code cells set, and the outputs of each; change: the code that runs for a cell."""
    names, found = {"__name__": "__main__"}, []
    for number, cell in enumerate(cells(notebook), start=1):
        tree = ast.parse(change(cell), f"cell {number}")
        match tree.body:
            case [*before, ast.Expr(last)]:
                tree.body = before
            case _:
                last = None
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = last and eval(compile(ast.Expression(last), f"cell {number}", "eval"), names)
        text = printed.getvalue()
        outputs = (
            [{"name": "stdout", "output_type": "stream", "text": _lines(text)}] if text else []
        )
        if value is not None:
            outputs.append({"data": shown(value), "metadata": {}, "output_type": "display_data"})
        found.append(outputs)
    return names, found


def shown(value: Any) -> dict[str, Any]:
    """What a notebook is given of a value, by type."""
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    elif hasattr(value, "_repr_png_"):
        data["image/png"] = b64encode(value._repr_png_()).decode()
    return data


def smaller(text: str) -> str:
    """The text with every PNG inside in few colours and at most WIDTH wide, every GIF of few frames."""
    text = re.sub(
        r"iVBORw0KGgo[A-Za-z0-9+/=]+", lambda found: _recoded(found[0], _few_colours), text
    )
    return re.sub(r"R0lGODlh[A-Za-z0-9+/=]+", lambda found: _recoded(found[0], _few_frames), text)


def _recoded(encoded: str, save: Callable[[Any, io.BytesIO], None]) -> str:
    file = io.BytesIO()
    with Image.open(io.BytesIO(b64decode(encoded))) as picture:
        save(picture, file)
    return b64encode(file.getvalue()).decode()


def _few_colours(picture: Any, file: io.BytesIO) -> None:
    picture = picture.convert("RGB")
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    picture.quantize(48).save(file, "PNG", optimize=True)


def _few_frames(picture: Any, file: io.BytesIO) -> None:
    frames = [frame.copy() for frame in ImageSequence.Iterator(picture)][::EVERY]
    duration = picture.info["duration"] * EVERY
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for path in [known[name] for name in sys.argv[1:] or known]:
        notebook = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            _, found = execute(notebook)
            os.chdir(FOLDER)
        for number, (cell, outputs) in enumerate(zip(cells(notebook), found, strict=True), start=1):
            cell |= {"outputs": outputs, "execution_count": number}
        path.write_text(smaller(json.dumps(notebook, indent=1, ensure_ascii=False)) + "\n")
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
