"""Links to files of the repository that are no pages: the site has a page of each, which shows what is in it.

So a relative link leads to the same thing here and in the repository. Links from the API reference to the source lead
to the same pages, at the line.
"""

import importlib
import inspect
import operator
import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "files"  # of the site, where these pages are

# Pages whose text is a file of the root, with links as they are from there.
FROM_THE_ROOT = {"start": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?!#|[a-z]+:)")

LANGUAGES = {".json": "json", ".md": "markdown", ".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml"}

linked: set[Path] = set()  # files and folders, relative to the root


def text_from_the_root(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give a page of FROM_THE_ROOT its text."""
    if docname in FROM_THE_ROOT:
        source[0] = LINK.sub("../", (ROOT / FROM_THE_ROOT[docname]).read_text(encoding="utf-8"))


def uri(path: Path, docname: str) -> str:
    """From a page to that of a file or folder."""
    return "../" * docname.count("/") + f"{FOLDER}/{path.as_posix()}.html"


class LinksToFiles(SphinxTransform):
    """Links of Markdown pages that lead out of the folder of pages."""

    default_priority = 10

    def apply(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Lead them to the page that shows the file; what is not there is left for Sphinx to warn of."""
        for node in list(self.document.findall(_is_link)):
            is_page = node.get("refdomain") == "doc"  # of this name, if there were one
            if is_page and node["reftarget"] in self.env.found_docs:
                continue
            folder = self.env.srcdir if is_page else Path(self.env.doc2path(self.env.docname)).parent
            path = Path(os.path.normpath(folder / (node["reftarget"] + ".md" * is_page)))
            if not path.is_relative_to(ROOT) or not path.exists():
                continue
            path = path.relative_to(ROOT)
            page = {file: docname for docname, file in FROM_THE_ROOT.items()}.get(path.as_posix())
            if page is not None:
                node["reftarget"] = page
                continue
            linked.add(path)
            reference = nodes.reference("", "", internal=True, refuri=uri(path, self.env.docname))
            reference += nodes.inline("", "", *(child for inner in node.children for child in inner.children))
            node.replace_self(reference)


def _is_link(node: nodes.Node) -> bool:
    return isinstance(node, addnodes.pending_xref | addnodes.download_reference) and node.get("reftype") == "myst"


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page of each linked file, and of each linked folder with its files of text."""
    assert isinstance(app.builder, StandaloneHTMLBuilder)  # others have no such event
    for path in sorted(linked):
        if (ROOT / path).is_dir():
            texts = [file for file in (ROOT / path).iterdir() if file.suffix in LANGUAGES]
            linked.update(file.relative_to(ROOT) for file in texts)
    for path in sorted(linked):
        if (ROOT / path).is_dir():
            files = sorted(file for file in linked if file.parent == path)
            body = "".join(f'<li><a href="{path.name}/{file.name}.html">{escape(file.name)}</a></li>' for file in files)
            body = f"<ul>{body}</ul>"
        else:
            text = (ROOT / path).read_text(encoding="utf-8")
            language = LANGUAGES.get(path.suffix, "text")
            body = app.builder.highlighter.highlight_block(text, language, linenos="inline", lineanchors="line")
        name = escape(path.as_posix())
        yield f"{FOLDER}/{path.as_posix()}", {"title": name, "body": f"<h1>{name}</h1>{body}"}, "page.html"


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """From a page of the API reference, which all lie in one folder, to the line of the source."""
    if domain != "py" or not info["module"]:
        return None
    try:
        found = operator.attrgetter(info["fullname"])(importlib.import_module(info["module"]))
        found = inspect.unwrap(getattr(found, "fget", found))  # a property's function
        path = Path(inspect.getsourcefile(found) or "").relative_to(ROOT)
        line = inspect.getsourcelines(found)[1]
    except (AttributeError, TypeError, OSError, ValueError):  # a value, or of another library
        return None
    linked.add(path)
    return f"{uri(path, 'api/page')}#line-{line}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect all of it."""
    app.connect("source-read", text_from_the_root)
    app.add_transform(LinksToFiles)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
