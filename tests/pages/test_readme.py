"""The README's blocks run as they stand, in processes with and without the package; its links lead somewhere."""

import os
import re
import subprocess
import sys

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline
from helpers.networks import TINY_NETWORK
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"<!-- test: (\w+) the package -->\n```python\n(.*?)```", re.DOTALL)
WITHOUT = 'import sys\nsys.modules["ddpm_from_scratch"] = None\n'


def blocks(kind):
    return [code for found, code in BLOCK.findall(README) if found == kind]


def test_every_python_block_is_tested():
    assert README.count("```python") == len(blocks("with")) + len(blocks("without")) == 10


@pytest.mark.parametrize("kind", ["with", "without"])
def test_blocks_run(kind, tmp_path):
    unet = UNet2DModel(**TINY_NETWORK)
    ScratchDDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "outputs" / "ddpm-fashion-mnist-quick")
    names = dict(enumerate(["T-shirt/top", "Sneaker", "Bag", "Dress"]))
    classes = ScratchDDPMPipeline(UNet2DModel(**TINY_NETWORK, num_class_embeds=5), DDPMScheduler(), id2label=names)
    classes.save_pretrained(tmp_path / "outputs" / "ddpm-fashion-mnist-conditional-quick")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "another-ddpm-model")
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
