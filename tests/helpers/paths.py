"""Where the project is."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TRAINING = ROOT / "training"


def python_path(*folders):
    """PYTHONPATH with folders of the project."""
    return os.pathsep.join(str(ROOT / folder) for folder in folders)
