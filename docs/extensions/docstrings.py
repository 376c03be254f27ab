"""What docstrings mean: Google's style with the marks of Markdown, which are tables, and names in single backticks."""

import itertools
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

LINKS = (nodes.reference, nodes.title, pending_xref, download_reference)  # and titles, where there are none


def markdown(app: Sphinx, kind: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Turn tables into those of reStructuredText, and take every other | for itself, as in p(x | y).

    What is returned has its type in the signature: a colon in its description is none between a type and a text.
    """
    result: list[str] = []
    for is_table, group in itertools.groupby(lines, lambda line: line.lstrip().startswith(("| ", "|-"))):
        rows = list(group)
        result += _table(rows) if is_table else [row.replace("|", r"\|") for row in rows]
    for i, line in enumerate(result[:-1]):
        if line.strip() == "Returns:":
            text = result[i + 1].lstrip()
            result[i + 1] = result[i + 1].removesuffix(text) + ": " + text
    lines[:] = result


def _table(rows: list[str]) -> list[str]:
    """A table whose second row is the rule below its head."""
    indent = rows[0][: rows[0].index("|")]
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in [rows[0], *rows[2:]]]
    lines = [("* - " if i == 0 else "  - ") + cell for row in cells for i, cell in enumerate(row)]
    return [indent + line for line in [".. list-table::", "   :header-rows: 1", "", *(f"   {line}" for line in lines)]]


def is_field(app: Sphinx, kind: str, name: str, found: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, which the signature has, with their types."""
    return True if (found.__doc__ or "").startswith("Alias for field number") else None


class NamesInPages(SphinxTransform):
    """Names in pages that are not made of docstrings, as `q_posterior`, may be links, too."""

    default_priority = 900

    def apply(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Make each a reference, which `link_or_code` resolves."""
        for literal in list(self.document.findall(nodes.literal)):
            if not _is_inside(literal, LINKS):
                reference = pending_xref("", refdomain="py", reftype="obj", reftarget=literal.astext(), refwarn=False)
                reference["refdoc"] = self.env.docname
                literal.replace_self(reference)
                reference += literal


def _is_inside(node: nodes.Node, kinds: tuple[type[nodes.Element], ...]) -> bool:
    return node.parent is not None and (isinstance(node.parent, kinds) or _is_inside(node.parent, kinds))


def link_or_code(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """A name in backticks is a link if it is that of one entry alone, and code if not.

    Words of everyday language are links where they name a method of the scheduler. References of other kinds must lead
    somewhere.
    """
    if node.get("reftype") != "obj":
        return None
    name, domain = node["reftarget"].removesuffix("()"), env.domains.python_domain
    entries = [entry for entry in domain.objects if f".{entry}".endswith(f".{name}")]
    method = f"ddpm_from_scratch.diffusion.scheduler.ScratchDDPMScheduler.{name}"
    if name.islower() and name.isalpha():
        entries = [method] if method in entries else []
    if len(entries) != 1:
        return content
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", entries[0], node, content) or content


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect all of it; docstrings are Markdown before napoleon reads their sections."""
    app.config.default_role = "py:obj"
    app.connect("autodoc-process-docstring", markdown, priority=100)
    app.connect("autodoc-skip-member", is_field)
    app.add_transform(NamesInPages)
    app.connect("missing-reference", link_or_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
