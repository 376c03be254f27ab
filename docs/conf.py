"""Configuration of the documentation site, which `make docs` builds.

Pages are Markdown that reads well in the repository too; what the site does with them beyond that is in `extensions/`.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

# Sphinx is run from the root, so that `docs.extensions` is found.
from docs.extensions.files import linkcode_resolve as linkcode_resolve
from sphinx.application import Sphinx

DOCS = Path(__file__).parent

project = "ddpm_from_scratch"
version = release = importlib.metadata.version("ddpm-from-scratch")
author = "the authors of ddpm_from_scratch"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "docs.extensions.docstrings",
    "docs.extensions.files",
    "docs.extensions.mathml",
    "docs.extensions.notebooks",
]
exclude_patterns = ["extensions", "figures", "results", "**/.ipynb_checkpoints"]

# --- pages ----------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # headings are targets under the names that repositories' pages give them
highlight_language = "text"

# --- API reference --------------------------------------------------------------------------------------------------

autodoc_default_options = {
    "members": True,
    "special-members": "__call__, __len__, __getitem__",
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute that is described is not another entry
nitpick_ignore_regex = [
    # Other libraries' names lead into their own documentation, which a build without a network cannot look up.
    ("py:class", r"(accelerate|collections|diffusers|huggingface_hub|numpy|os|pathlib|PIL|torch)\..+"),
    ("py:exc", r"HfHubHTTPError"),
    # No entries: a type variable, the base of the editing pipelines, and a row of a table of the network's levels.
    (
        "py:class",
        r"ddpm_from_scratch\.(hub\.repository\.T|sampling\.editing\._EditingPipeline|diffusion\.unet_config\.BlockKind)",
    ),
]

# --- appearance -----------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"ddpm_from_scratch {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False


def name_language(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    """Say that Chinese pages are Chinese, so that browsers choose their characters' forms."""
    if pagename.endswith(".zh"):
        context["language"] = "zh-CN"


def setup(app: Sphinx) -> None:
    """Connect it."""
    app.connect("html-page-context", name_language)
