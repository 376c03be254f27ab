"""`ddpm export`: a checkpoint as a model folder, which draws what the run's own folder draws."""

import shutil

import pytest
import torch
from diffusers import DDPMPipeline

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.training import export
from helpers.runs import STEPS, run_main


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "np"}
    return pipeline(batch_size=2, **options).images


@pytest.mark.parametrize("flags", [(), ("--use_ema", "false"), ("--class_conditional",)], ids=" ".join)
def test_the_last_checkpoint_is_the_model(inputs, tmp_path, flags):
    model = run_main(inputs, tmp_path / "model", "--checkpointing_steps", STEPS, "--max_train_steps", STEPS, *flags)
    export.main([str(model / "checkpoints" / f"step_{STEPS:08d}"), str(tmp_path / "exported")])
    kinds = [ScratchDDPMPipeline] if flags == ("--class_conditional",) else [ScratchDDPMPipeline, DDPMPipeline]
    for kind in kinds:
        ours, run = (kind.from_pretrained(tmp_path / name) for name in ("exported", "model"))
        assert (drawn(ours) == drawn(run)).all()
        assert ours.config.get("id2label") == run.config.get("id2label")
    for file in ("model_index.json", "pipeline.py", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "exported" / file).read_bytes() == (model / file).read_bytes(), file
    assert (tmp_path / "exported" / "training_config.yaml").is_file()


def test_what_is_no_whole_checkpoint_is_refused(whole_run, tmp_path):
    checkpoint = tmp_path / "step_00000004"
    shutil.copytree(whole_run / "checkpoints" / "step_00000004", checkpoint)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export.export(whole_run, tmp_path / "exported")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        export.export(checkpoint, tmp_path / "there")
    (checkpoint / "ema.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        export.export(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
