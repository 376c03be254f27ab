"""The documentation site: it builds without a warning, takes nothing from elsewhere, and its links lead somewhere.

`make docs` builds the same. The site's own parts are in docs/extensions.
"""

import base64
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from docs.extensions.notebooks import as_markdown
from filelock import FileLock
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from playwright.sync_api import sync_playwright

from ddpm_from_scratch import ScratchDDPMScheduler
from helpers.paths import DOCS, ROOT

pytestmark = pytest.mark.full

SPHINX = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n")
FROM_THE_ROOT = {"start": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
PAGES = [path.stem for path in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]]
MODULES = [path.stem for path in DOCS.glob("api/*.md") if path.stem != "index"]


@pytest.fixture(scope="module")
def site(tmp_path_factory, worker_id):
    """The folder of the site, built once for all test processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            done = subprocess.run([*SPHINX, DOCS, folder], capture_output=True, text=True, cwd=ROOT)
            (folder / "log.txt").write_text(f"{done.returncode}\n{done.stderr}")
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.rglob("*.html")}


def source(name):
    """The Markdown that a page is made of."""
    if name in FROM_THE_ROOT:
        return (ROOT / FROM_THE_ROOT[name]).read_text(encoding="utf-8")
    if (DOCS / f"{name}.ipynb").exists():
        return as_markdown(json.loads((DOCS / f"{name}.ipynb").read_text(encoding="utf-8")))
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


# --- the whole site -------------------------------------------------------------------------------------------------


def test_it_builds_without_a_warning(site):
    assert (site / "log.txt").read_text() == "0\n"


def test_make_builds_the_same():
    command = " ".join(SPHINX[1:])
    assert f"$(BIN)/python {command} docs build/docs\n" in (ROOT / "Makefile").read_text()


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = {"link": "href", "use": "href", "object": "data"}
    for path, page in pages.items():
        for element in page.find_all(["link", "use", "object", "script", "img", "iframe", "source", "video", "audio"]):
            address = element.get(loads.get(element.name, "src"), "")
            assert urlsplit(address).scheme in ("", "data") and not address.startswith("//"), (path, address)
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    inside = "".join(str(style) for page in pages.values() for style in page.find_all("style"))
    assert not re.search(r"(url\(|@import)\s*['\"]?(\w+:)?//", styles + inside)


def test_every_link_inside_leads_somewhere(site, pages):
    anchors = {
        path: {element["id"] for element in page.find_all(id=True)}
        | {a["name"] for a in page.find_all("a", attrs="name")}
        for path, page in pages.items()
    }
    count = 0
    for path, page in pages.items():
        for element in page.select("a[href], img[src], link[href], script[src]"):
            address = urlsplit(element.get("href") or element.get("src"))
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.is_file() and target.is_relative_to(site.resolve()), (path.name, element)
            if address.fragment and target in anchors:
                assert unquote(address.fragment) in anchors[target], (path.name, element)
            count += 1
    assert count > 1000


def test_pages_from_the_root_are_named_alike():
    from docs.extensions.files import FROM_THE_ROOT as names

    assert names == FROM_THE_ROOT


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_formula_is_mathml(site, name):
    tokens = MarkdownIt().enable("table").use(dollarmath_plugin, double_inline=True).parse(source(name))
    inline = [token for block in tokens for token in [block, *(block.children or ())]]
    formulas = sum(token.type.startswith("math_") for token in inline)
    page = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser").find("article")
    assert len(page.find_all("math")) == formulas
    assert page.find("merror") is None
    for element in page.find_all(["math", "code", "pre"]):
        element.extract()
    left = page.get_text()
    assert not re.search(r"\$|\\[a-zA-Z]", left)


def test_pages_have_formulas_and_their_language(site):
    for name, language in (("theory", "en"), ("theory.zh", "zh-CN")):
        page = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        assert len(page.find_all("math")) > 50
        assert page.html["lang"] == language


def test_links_to_sources_show_them(site):
    page = BeautifulSoup((site / "theory.html").read_text(encoding="utf-8"), "html.parser").find("article")
    links = {link["href"] for link in page.find_all("a")}
    file = "src/ddpm_from_scratch/training/loop.py"
    assert f"files/{file}.html" in links
    shown = BeautifulSoup((site / f"files/{file}.html").read_text(encoding="utf-8"), "html.parser")
    for number in shown.find_all(class_="linenos"):
        number.extract()
    assert (ROOT / file).read_text(encoding="utf-8").strip() in shown.find("pre").get_text()


# --- API reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_an_entry(site, name):
    source = (DOCS / "api" / f"{name}.md").read_text(encoding="utf-8")
    module = importlib.import_module(re.search(r"automodule:: (\S+)", source)[1])
    entries = set(re.findall(r'<dt [^>]*id="([^"]+)"', (site / "api" / f"{name}.html").read_text(encoding="utf-8")))
    own = {
        key: value
        for key, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
        and key[0] != "_"
    }
    assert own and {f"{module.__name__}.{key}" for key in own} <= entries
    for key, value in own.items():
        if "__call__" in vars(value):
            assert f"{module.__name__}.{key}.__call__" in entries


def test_every_method_of_the_scheduler_has_an_entry(site):
    methods = [
        name for name, value in vars(ScratchDDPMScheduler).items() if inspect.isfunction(value) and name[0] != "_"
    ]
    assert {"q_posterior", "step", "vlb_term"} <= set(methods)
    page = BeautifulSoup((site / "api" / "scheduler.html").read_text(encoding="utf-8"), "html.parser")
    for name in methods:
        entry = page.find(id=f"ddpm_from_scratch.diffusion.scheduler.ScratchDDPMScheduler.{name}")
        words = (inspect.getdoc(getattr(ScratchDDPMScheduler, name)) or "").split(maxsplit=1)
        assert words[0].strip("`.,;:") in entry.find_next_sibling("dd").get_text()
        line = entry.find("a", string="[source]") or entry.find("a", class_="reference")
        assert line["href"].startswith("../files/src/ddpm_from_scratch/diffusion/scheduler.py.html#line-")


def test_names_in_pages_lead_to_their_entries(site):
    links = BeautifulSoup((site / "theory.html").read_text(encoding="utf-8"), "html.parser").select(
        "article a:has(code)"
    )
    found = {link.get_text(): link["href"].partition("#")[2] for link in links}
    assert found["q_posterior"] == "ddpm_from_scratch.diffusion.scheduler.ScratchDDPMScheduler.q_posterior"
    assert found["likelihood.bits_per_dim"] == "ddpm_from_scratch.evaluation.likelihood.bits_per_dim"


# --- in a browser ---------------------------------------------------------------------------------------------------


def test_no_page_is_wider_than_a_phone(site):
    """Wide formulas, tables and code scroll inside themselves; and the browser asks for nothing outside the site."""
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("no Chromium was found: apt-get install chromium")
    asked = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        tab.on("request", lambda request: asked.append(request.url))
        wide = {}
        for name in [*PAGES, *(f"api/{module}" for module in MODULES)]:
            tab.goto((site / f"{name}.html").as_uri())
            wide[name] = tab.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert {name: width for name, width in wide.items() if width > 390} == {}
    assert [url for url in asked if not url.startswith((site.as_uri(), "data:"))] == []


# --- the parts ------------------------------------------------------------------------------------------------------


def test_what_is_wrong_stops_the_build(tmp_path):
    (tmp_path / "index.md").write_text("# Wrong\n\n[nowhere](nowhere.md), [no file](../src/nothing.py), $\\frob$\n")
    done = subprocess.run([*SPHINX, "-c", DOCS, tmp_path, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1
    for name in ("nowhere.md", "../src/nothing.py", "frob"):
        assert name in done.stderr


def test_notebooks_show_the_outputs_that_they_were_saved_with():
    image = base64.b64encode(b"picture").decode()
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "$x$"]},
            {
                "cell_type": "code",
                "source": "print('```')",
                "outputs": [
                    {"output_type": "stream", "name": "stdout", "text": ["\x1b[1m```\x1b[0m\n", "two\n"]},
                    {
                        "data": {"image/png": image + "\n", "text/plain": ["<Figure [1]>"]},
                        "output_type": "display_data",
                    },
                    {"data": {"text/plain": ["3"]}, "output_type": "execute_result"},
                ],
            },
            {"cell_type": "code", "source": "", "outputs": []},
        ]
    }
    assert as_markdown(notebook) == (
        "# Title\n$x$\n\n"
        "````python\nprint('```')\n````\n\n"
        "````{code-block} text\n:class: output\n\n```\ntwo\n````\n\n"
        f"![Figure 1](data:image/png;base64,{image})\n\n"
        "```{code-block} text\n:class: output\n\n3\n```\n"
    )
