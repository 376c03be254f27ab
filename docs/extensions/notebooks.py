"""Notebooks as pages: their cells, and the outputs that they were saved with. Nothing is executed."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

IMAGES = ("image/png", "image/jpeg", "image/gif")
TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _text(lines: str | Sequence[str]) -> str:
    """Text, which notebooks keep whole or in lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def _fenced(text: str, *head: str) -> str:
    """A code block, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([fence + head[0], *head[1:], text.rstrip("\n"), fence])


def _output(output: dict[str, Any]) -> str:
    """An output of a cell, in the best of its forms that a page can show."""
    data = output.get("data", {})
    plain = _text(output.get("text") or data.get("text/plain") or output.get("traceback") or "")
    for form in IMAGES:
        if form in data:
            words, picture = re.sub(r"[<>\[\]]", "", plain), "".join(_text(data[form]).split())
            return f"![{words}](data:{form};base64,{picture})"
    if "text/markdown" in data:
        return _text(data["text/markdown"])
    return _fenced(TERMINAL_COLOURS.sub("", plain), "{code-block} text", ":class: output", "") if plain else ""


def _parts(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        yield source if cell["cell_type"] == "markdown" else _fenced(source, "python") if source.strip() else ""
        yield from map(_output, cell.get("outputs", ()))


def as_markdown(notebook: dict[str, Any]) -> str:
    """The whole notebook as a page."""
    return "\n\n".join(part for part in _parts(notebook) if part) + "\n"


class NotebookParser(MystParser):
    """Reads a notebook as the Markdown page that it amounts to."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the text of an .ipynb file."""
        super().parse(as_markdown(json.loads(inputstring)), document)


def setup(app: Sphinx) -> dict[str, bool]:
    """Take .ipynb files for pages."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
