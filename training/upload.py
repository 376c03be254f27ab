"""The upload of a finished run: the model and what documents it, never checkpoints or logs."""

from pathlib import Path

from huggingface_hub import HfApi

from config import TrainingConfig

UPLOADED = (
    "model_index.json",
    "pipeline.py",
    "unet/*",
    "scheduler/*",
    "samples.png",
    "neighbors.png",
    "bound.png",
    "loss.png",
    "results.json",
    "training_config.yaml",
)


def push_to_hub(config: TrainingConfig) -> str:
    """Create the repository if it is not there and upload the model folder in one commit.

    Returns:
        The repository's id.
    """
    folder = Path(config.output_dir)
    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or folder.resolve().name
    repository: str = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository, folder_path=folder, allow_patterns=list(UPLOADED), commit_message="Add the trained model"
    )
    return repository
