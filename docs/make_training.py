"""Write the table of docs/training.md from docs/results/memory.json, which `python benchmarks/memory.py` measures.

python docs/make_training.py
"""

import json
from pathlib import Path
from typing import Any

from pages import bullets, replace_parts, table, versions

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "memory.json"
PAGE = DOCS / "training.md"
GB = 1e9
COLUMNS = ("without the set", "streaming it", "beyond")

Numbers = dict[str, Any]


def memory_table(results: Numbers) -> str:
    """Peaks with and without the large set, by number of loader processes, in Markdown."""
    titles = ("loader processes", *(f"{who}, {what}" for who in ("training process", "all") for what in COLUMNS))
    rows = []
    for run in results["runs"]:
        cells = [str(run["workers"])]
        for kind in ("resident", "together"):
            alone, streamed = (run[name][kind] / GB for name in ("model_alone", "streamed"))
            cells += [f"{alone:.2f} GB", f"{streamed:.2f} GB", f"**{streamed - alone:.2f} GB**"]
        rows.append(cells)
    return table(titles, rows)


def memory_facts(results: Numbers) -> str:
    """What was measured and with what."""
    held = results["in_memory"]
    ratio, peak = held["held"] / held["decoded"], held["while_reading"] / held["decoded"]
    facts = {
        "Set": f"{results['rows']:,} images of 28x28 in Parquet, {results['file_bytes'] / GB:.2f} GB; "
        f"{results['runs'][0]['streamed']['images']:,} images trained on, in windows of "
        f"{results['shuffle_window_mb']} MiB. Without the set: the same network on the embedded images",
        "Peaks": "resident set of the process that trains; of all processes together, shared pages counted once",
        "In memory": f"of {held['decoded'] / GB:.2f} GB of decoded images, {ratio:.2f} times as much is held once they "
        f"are read, and up to {peak:.2f} times while the file is read",
        "Device": f"{results['device']}; {versions(results)}",
    }
    return bullets(facts)


PARTS = {"memory": memory_table, "memory facts": memory_facts}


def fill(page: str) -> str:
    """The page with what stands between its markers replaced."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return replace_parts(page, {name: make(results) for name, make in PARTS.items()})


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
