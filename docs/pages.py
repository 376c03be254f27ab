"""What the scripts that fill pages with results share: parts between markers, tables, lists, scripts to run."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def replace_parts(page: str, parts: Mapping[str, str]) -> str:
    """A page with what stands between `<!-- name -->` and `<!-- end of name -->` replaced.

    Raises:
        ValueError: a part has not exactly one place in the page.
    """
    for name, text in parts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        marked = re.compile(f"(?<={re.escape(start)}).*?(?={re.escape(end)})", re.DOTALL)
        page, count = marked.subn(lambda _, text=text: text, page)
        if count != 1:
            raise ValueError(f"the page has {count} places {start.strip()!r}, where there must be one.")
    return page


def made_from(parts: Mapping[str, tuple[Path, Callable[[Any], str]]]) -> dict[str, str]:
    """The parts of a page by name, each made of the results in a JSON file."""
    return {name: make(json.loads(results.read_text(encoding="utf-8"))) for name, (results, make) in parts.items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def bullets(facts: Mapping[str, str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {name}: {fact}." for name, fact in facts.items())


def versions(results: Mapping[str, Any]) -> str:
    """Of the libraries that measured."""
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def in_words(steps: int) -> str:
    """1 step, 2 steps."""
    return f"{steps} step{'s' if steps > 1 else ''}"


def load_script(path: Path) -> Any:  # noqa: ANN401
    """A script of another folder, as a module; what stands under `if __name__ == "__main__"` does not run.

    Scripts that are loaded later can import it by its name.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
