"""Files that a pushed model has."""

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

WHOLE = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "results.json",
    "training_config.yaml",
    "samples.png",
    "usage.png",
    "neighbors.png",
    "bound.png",
    "loss.png",
}
