"""Blocks of the README and of pages of use run as they stand, with and without the package; links lead somewhere."""

import os
import re
import subprocess
import sys

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.cli import COMMANDS
from helpers.networks import TINY_NETWORK
from helpers.paths import ROOT

PAGES = ("README.md", "docs/loading.md", "docs/reproduction.md")
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
HUB_MODEL = "google/ddpm-cifar10-32"  # stands in a folder of that name here
BLOCK = re.compile(r"<!-- test: (\w+) the package -->\n```python\n(.*?)```", re.DOTALL)
WITHOUT = 'import sys\nsys.modules["ddpm_from_scratch"] = None\n'


def blocks(kind):
    return [code for found, code in BLOCK.findall(TEXT) if found == kind]


def test_every_python_block_is_tested():
    assert TEXT.count("```python") == len(blocks("with")) + len(blocks("without")) > 9


@pytest.mark.parametrize("kind", ["with", "without"])
def test_blocks_run(kind, tmp_path):
    unet = UNet2DModel(**TINY_NETWORK)
    ScratchDDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "outputs" / "ddpm-fashion-mnist-quick")
    names = dict(enumerate(["T-shirt/top", "Sneaker", "Bag", "Dress"]))
    classes = ScratchDDPMPipeline(UNet2DModel(**TINY_NETWORK, num_class_embeds=5), DDPMScheduler(), id2label=names)
    classes.save_pretrained(tmp_path / "outputs" / "ddpm-fashion-mnist-conditional-quick")
    for name in ("another-ddpm-model", HUB_MODEL):
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / name)
    (tmp_path / "models").symlink_to(ROOT / "models")
    code = "\n".join(blocks(kind))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": ""}
    if kind == "with":
        environment["PYTHONPATH"] = str(ROOT / "src")
    else:
        code = WITHOUT + code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_local_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in t]
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert missing == []


def test_every_command_that_pages_name_exists():
    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    commands = set(re.findall(r"^ddpm (\w+)|`ddpm (\w+)", text, flags=re.MULTILINE))
    assert {first or second for first, second in commands} <= {*COMMANDS, "train"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make (\w[\w-]*)", text, flags=re.MULTILINE)) <= targets


def test_every_test_that_pages_name_exists():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(test_\w+\.py)", page.read_text(encoding="utf-8"))}
    assert named and named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
