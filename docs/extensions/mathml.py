"""TeX in pages becomes MathML when the site is built: browsers draw it without a script, and nothing is loaded for it.

A font for formulas, which not every system has, goes with the site: STIX Two Math, from the package ziamath.
"""

import importlib.resources
import logging
import re
from pathlib import Path

from docutils import nodes
from fontTools import subset
from fontTools.ttLib import TTFont
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

logger = getLogger(__name__)
CONVERTER = LatexToMathML()
# A bracket of chosen size with an index: Chromium gives it that size only in a row.
SIZED_BASE = re.compile(r"(<m(?:sup|sub|subsup)>)(<mo [^>]*minsize[^>]*>[^<]*</mo>)")
# Latin and Greek letters, accents, punctuation, letter-like symbols, arrows, operators, brackets, letters in italics.
CHARACTERS = ((0x20, 0xFF), (0x2C6, 0x338), (0x391, 0x3F6), (0x2000, 0x23FF), (0x27E6, 0x27EF), (0x1D400, 0x1D7FF))


def _mathml(node: nodes.Element, display: bool) -> str:
    """The formula of a node; one that cannot be converted is a warning, which says where it stands."""
    tex = re.sub(r"(?<!\\)\\\n", r"\\ ", node.astext())  # a space, where the line was broken at it
    try:
        mathml = CONVERTER.convert_with_local_state(tex, displaystyle=display)
    except LatexError as error:
        logger.warning("no MathML of %r: %s", node.astext(), error, location=node, type="mathml")
        return "<merror></merror>"
    return SIZED_BASE.sub(r"\1<mrow>\2</mrow>", mathml)


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    after = node.next_node(nodes.Text, descend=False, siblings=True)
    joined = "&#8288;" if after is not None and after[0] in ",.;:?!)" else ""  # a line does not begin with these
    self.body.append(f'<span class="math">{_mathml(node, display=False)}</span>{joined}')
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula by itself, which scrolls where it is wider than the page."""
    self.body.append(f'<div class="math" tabindex="0">{_mathml(node, display=True)}</div>\n')
    raise nodes.SkipNode


def write_font(app: Sphinx, error: Exception | None) -> None:
    """Put the font beside the styles, with what formulas need of it."""
    if error is None and app.builder.format == "html":
        with importlib.resources.as_file(
            importlib.resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
        ) as path:
            font = TTFont(path)
        _make_roots_alike(font)
        logging.getLogger("fontTools.subset").setLevel(logging.WARNING)
        subsetter = subset.Subsetter(subset.Options(layout_features=["*"], notdef_outline=True))
        subsetter.populate(unicodes=[code for first, last in CHARACTERS for code in range(first, last + 1)])
        subsetter.subset(font)
        font.flavor = "woff"
        font.save(Path(app.outdir) / "_static" / "math.woff")


def _make_roots_alike(font: TTFont) -> None:
    """Make all heights of the root sign as wide as the lowest: Chromium leaves room for the widest beside each."""
    variants = font["MATH"].table.MathVariants
    lowest = font.getBestCmap()[ord("√")]
    sizes = variants.VertGlyphConstruction[variants.VertGlyphCoverage.glyphs.index(lowest)]
    names = {size.VariantGlyph for size in sizes.MathGlyphVariantRecord}
    names |= {part.glyph for part in sizes.GlyphAssembly.PartRecords}
    width, _ = font["hmtx"][lowest]
    for name in names - {lowest}:
        glyph = font["glyf"][name]
        glyph.coordinates.scale((width / font["hmtx"][name][0], 1))
        glyph.coordinates.toInt()
        glyph.recalcBounds(font["glyf"])
        font["hmtx"][name] = (width, glyph.xMin)


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the renderer to `html_math_renderer`."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
