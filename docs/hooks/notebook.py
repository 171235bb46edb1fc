"""The tutorial: ``python docs/hooks/notebook.py`` runs it and keeps what it prints; MkDocs gets it as a page.

The notebook is the one source. It is read and written as JSON, and its cells are executed in one namespace, so nothing
of Jupyter is needed.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "tutorial.ipynb"


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with what its cells print; raises what a cell raises."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
            text = printed.getvalue().splitlines(keepends=True)
            outputs = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
            cell = {**cell, "execution_count": None, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def markdown(notebook: dict[str, Any]) -> str:
    """The notebook as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell["outputs"]]
        else:
            parts.append(source)
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, *, config: Any) -> Any:
    """MkDocs calls this before it lays out the site: the page stands where the notebook would."""
    from mkdocs.structure.files import File

    text = markdown(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    files.append(File.generated(config, "tutorial.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links to the notebook lead to the page."""
    return markdown.replace("(tutorial.ipynb)", "(tutorial.md)")


if __name__ == "__main__":
    result = executed(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    NOTEBOOK.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {NOTEBOOK}")
