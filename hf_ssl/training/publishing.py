"""The Hub side of the trainer: every push is a repository of two parts, as `hf_ssl.hub.publish` makes it."""

import json
import logging
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import run_as_future
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_ssl.hub.cards import FIGURES, SCORES_FILE, write_card
from hf_ssl.hub.landing import ExportReport, export_encoder
from hf_ssl.hub.landing_image_text import export_image_text
from hf_ssl.hub.publishing import PublishError, create_repository, prepare_repository, publish, upload
from hf_ssl.pictures.curves import draw_history

logger = logging.getLogger(__name__)

ENCODER = "encoder"
BOTH_TOWERS = "dual"


def complete_folder(
    folder: Path, log_history: list[dict[str, Any]], license: str | None = None
) -> ExportReport:
    """Add the native encoder, curves and card to the folder of a run.

    Args:
        folder: holds the pre-training checkpoint.
        log_history: of the trainer's state.
        license: identifier of the model's licence for the card; None: not stated.

    Raises:
        ValueError: the encoder fits no native class.
    """
    report = export_encoder(folder, folder / ENCODER, overwrite=True)
    logger.info("exported  %s, difference %.1e", report.native_class, report.max_abs_difference)
    if (folder / "tokenizer.json").is_file():
        _add_both_towers(folder)
    curves = draw_history(log_history)
    if curves is not None:
        (folder / FIGURES).mkdir(exist_ok=True)
        curves.save(folder / FIGURES / "curves.png")
    write_card(folder, report, license=license)
    return report


def _add_both_towers(folder: Path) -> None:
    """The native model of images and texts; what no native class computes stays in the run, and is said."""
    try:
        both = export_image_text(folder, folder / BOTH_TOWERS, overwrite=True)
    except ValueError as error:
        logger.warning("exported  no native model of both towers: %s", error)
        return
    logger.info("exported  %s, difference %.1e", both.native_class, both.max_abs_difference)


class PublishingTrainer(Trainer):
    """Trainer whose repositories hold the native encoder, and all of the pre-training model beside it.

    The token never stays in `args`, which are pickled with every checkpoint.
    """

    hub_token: str | None = None
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: Any

    def take_token(self, args: Any) -> None:
        """Keep the token of the arguments out of whatever is written."""
        self.hub_token, args.hub_token = args.hub_token, None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, so that a missing token or right shows before training.

        Raises:
            PublishError: it cannot be created.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        if private is None:
            private = self.args.hub_private_repo
        self.hub_model_id = create_repository(name, private, token or self.hub_token)
        self.push_in_progress = None

    def create_model_card(self, license: str | None = None) -> None:  # type: ignore[override]
        """Write the card of `output_dir` from what the run left, and the native encoder that it describes.

        Args:
            license: identifier of the model's licence; None: the card says that it is not stated.
        """
        folder = Path(str(self.args.output_dir))
        self.save_model(str(folder), _internal_call=True)
        self.save_state()
        if self.is_world_process_zero():
            complete_folder(folder, self.state.log_history, license)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
    ) -> Any:
        """Save the run and publish it.

        Args:
            commit_message: first line of the commit.
            blocking: wait until it is there.
            token: instead of the one of the arguments or of `hf auth login`.
            revision: branch; None: `hub_revision` of the arguments, or main.
            private: of a new repository; None: `hub_private_repo` of the arguments.
            license: see `create_model_card`.

        Returns:
            What the Hub says of the commit, or a Future of it; None in all processes but the first.

        Raises:
            PublishError: see `hf_ssl.hub.publish`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.create_model_card(license)
        return self.publish_folder(
            blocking, commit_message=commit_message, token=token, revision=revision, license=license
        )

    def publish_folder(self, blocking: bool = True, **options: Any) -> Any:
        """Publish `output_dir` as it is: a finished run; see `push_to_hub`."""
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        options["commit_message"] = options.get("commit_message") or "End of training"
        options["token"] = options.get("token") or self.hub_token
        options["revision"] = options.get("revision") or self.args.hub_revision
        push = publish if blocking else partial(run_as_future, publish)
        return push(str(self.args.output_dir), str(self.hub_model_id), **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint while training goes on; what fails is said and stops nothing."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        earlier = self.push_in_progress
        jobs = [] if earlier is None or earlier.is_done() else earlier.jobs
        if jobs and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        scores = getattr(getattr(self, "probe", None), "scores", None)
        scored = (entry["step"] for entry in reversed(self.state.log_history) if "eval_knn" in entry)
        if scores is not None and next(scored, None) == self.state.global_step:
            text = json.dumps(scores.to_dict(), indent=1)
            (Path(checkpoint_folder) / SCORES_FILE).write_text(text, encoding="utf-8")
        scratch = tempfile.mkdtemp()
        try:  # now, since the checkpoint may be gone when its turn comes
            prepare_repository(checkpoint_folder, Path(scratch) / "repository", self.hub_model_id)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("step %d was not pushed: %s", self.state.global_step, error)
            shutil.rmtree(scratch, ignore_errors=True)
            return
        message = f"Training in progress, step {self.state.global_step}"
        job = run_as_future(self._upload_and_remove, Path(scratch), message)
        self.push_in_progress = PushInProgress([*jobs, job])  # type: ignore[arg-type]

    def _upload_and_remove(self, scratch: Path, message: str) -> None:
        try:
            upload(
                scratch / "repository",
                str(self.hub_model_id),
                token=self.hub_token,
                revision=self.args.hub_revision,
                commit_message=message,
            )
        except PublishError as error:
            logger.warning("%s; training goes on", error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
