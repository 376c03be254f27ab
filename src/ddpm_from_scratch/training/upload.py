"""The upload of a run: its model at every checkpoint in the background, and at the end with its page."""

import logging
import shlex
import shutil
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from ..hub.model_card import model_page
from ..hub.publish import CONFIG, TEMPLATE, hub_base_model, hub_datasets, publish
from ..hub.repository import BackgroundPush, open_repository, push
from ..runtime.privacy import as_yaml, public_config
from ..runtime.results import write_json
from .config import TrainingConfig
from .run import Run, results

logger = logging.getLogger(__name__)


class Upload:
    """The repository of a run.

    PermissionError, ValueError, ConnectionError as `open_repository`, which creates it.
    """

    def __init__(self, config: TrainingConfig) -> None:
        disable_progress_bars()  # they would break into that of the training
        self.config = config
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        self.repository = open_repository(name, private=config.hub_private_repo, token=config.hub_token)
        self._stages = Path(config.output_dir, ".push")
        shutil.rmtree(self._stages, ignore_errors=True)  # what a killed run left
        self._background = BackgroundPush(self._push)

    def snapshot(self, run: Run) -> None:
        """Push the model as it is now, one consistent whole, while the training goes on; a failure is logged."""
        stage = self._stages / f"step_{run.progress.step:08d}"
        try:
            self._write(run, stage)
        except Exception as error:  # whatever it is: the run is worth more
            logger.warning("step %d is not pushed: %s", run.progress.step, error)
            shutil.rmtree(stage, ignore_errors=True)
        else:
            self._background.submit(stage)

    def _write(self, run: Run, stage: Path) -> None:
        """Write the model, results and page of an unfinished run."""
        pipeline = run.pipeline
        pipeline.save_pretrained(stage)
        values = public_config(self.config.to_dict())
        (stage / CONFIG).write_text(as_yaml(values), encoding="utf-8")
        write_json(results(run), stage / "results.json")
        page = model_page(
            pipeline,
            stage,
            self.repository,
            TEMPLATE,
            license=self.config.hub_license,
            datasets=hub_datasets(self.config.to_dict()),
            base_model=hub_base_model(self.config.to_dict()),
            unfinished=(run.progress.step, run.known_steps or run.progress.step),
        )
        page.save(stage / "README.md")

    def finish(self) -> str:
        """Push the finished model, after what is under way; the address of the commit.

        ValueError, RuntimeError, PermissionError, ConnectionError as `publish`; a note says how to push it later.
        """
        self._background.wait()
        shutil.rmtree(self._stages, ignore_errors=True)
        folder = self.config.output_dir
        try:
            return publish(Path(folder), self.repository, token=self.config.hub_token)
        except Exception as error:
            command = shlex.join(["ddpm", "publish", folder, "--hub_model_id", self.repository])
            error.add_note(f"The trained model is whole in {folder}. Push it with: {command}")
            raise

    def _push(self, stage: Path) -> None:
        step = int(stage.name.removeprefix("step_"))
        # One try: the next snapshot makes up for it.
        address = push(stage, self.repository, message=f"Step {step}", token=self.config.hub_token, waits=())
        logger.info("pushed step %d: %s", step, address)
