"""Notebooks run without Jupyter, cell after cell, as it would run them.

`python -m tests.support.notebooks FILE` writes the outputs into the notebook.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def cells(notebook: Path) -> list[dict[str, Any]]:
    """Return the cells with code."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(notebook: Path) -> list[list[dict[str, Any]]]:
    """Run the cells in the working folder; return the outputs of each, in the notebook's own format."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_run("".join(cell["source"]), names, number) for number, cell in enumerate(cells(notebook), 1)]


def _run(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    body = ast.parse(source)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    outputs: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(body, f"cell {number}", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode()
        outputs.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    return outputs


def store(notebook: Path) -> None:
    """Run a notebook in a folder of its own and write its outputs into it."""
    content, here = json.loads(notebook.read_text(encoding="utf-8")), notebook.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = run(here)
        os.chdir(here.parent)
    with_code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    for number, (cell, found) in enumerate(zip(with_code, outputs, strict=True), 1):
        cell |= {"execution_count": number, "outputs": found}
    here.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
