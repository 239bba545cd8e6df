"""Publishing: a run becomes a repository of two parts, in one commit.

    config.json model.safetensors preprocessor_config.json   the encoder, native; loads without this package
    *.py                                                     the code of the pre-training model
    README.md figures/                                       the card
    pretraining/                                             all weights, config, processor, recipe, log

The repository is first written into a local folder, whole or not at all, and is then sent as one commit,
which also removes what an earlier push left and this one no longer has.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ssl.hub.cards import (
    CARD_FILE,
    FIGURES,
    RECIPE_FILE,
    SCORES_FILE,
    STATE_FILE,
    RunRecord,
    build_card,
    public_recipe,
    read_run,
    recipe_of,
)
from hf_ssl.hub.folders import refuse_foreign_folder, write_whole_folder
from hf_ssl.hub.landing import ExportReport, export_encoder
from hf_ssl.hub.locations import CONFIG_FILE, PRETRAINING
from hf_ssl.hub.remote_code import auto_map, known_code_files, write_flat_code
from hf_ssl.modeling import method_of
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining, SSLModel, SSLPreTrainedModel

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

PROCESSOR_FILE = "preprocessor_config.json"
ROOT_FILES = (CONFIG_FILE, "model.safetensors", PROCESSOR_FILE, "export.json", CARD_FILE)
# What of a trainer's state says something to others; the rest names folders of this machine.
_PUBLIC_STATE = ("global_step", "max_steps", "epoch", "best_metric", "best_global_step", "log_history")


class PublishError(RuntimeError):
    """Something that cannot be published; the message is one line."""


def prepare_repository(
    source: SSLPreTrainedModel | str | Path,
    folder: str | Path,
    repo_id: str | None = None,
    *,
    processor: SSLImageProcessor | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the files of a repository into a folder; an error leaves the folder as it was.

    Args:
        source: the folder of a run, of a checkpoint or of a saved pre-training model, or a model itself. Of
            an `<M>Model` there is no pre-training part.
        folder: target; absent, empty or an earlier one of these.
        repo_id: `owner/name`, for the card.
        processor: the image processor of a model; None: the method's own for the training size.
        license: identifier for the card, such as "apache-2.0"; None: the card says that it is not stated.
        overwrite: replace whatever the target holds.

    Returns:
        The report of the encoder's export.

    Raises:
        FileExistsError: the target holds something else.
        PublishError: the source is no run, or has not finished.
        ValueError: the encoder fits no native class.
    """
    folder = Path(folder).absolute()
    own_files = (*ROOT_FILES, *known_code_files(), FIGURES, PRETRAINING)
    refuse_foreign_folder(folder, own_files, "export.json", overwrite)
    reports: list[ExportReport] = []

    with _checkpoint_of(source, processor) as checkpoint:
        record = read_run(checkpoint)

        def write(partial: Path) -> None:
            report = export_encoder(checkpoint, partial, processor, overwrite=True)
            if record.has_pretraining:
                write_flat_code(record.method, partial)
                _write_pretraining(checkpoint, record, partial / PRETRAINING)
            if record.figures:
                (partial / FIGURES).mkdir()
                for name in record.figures:
                    shutil.copy2(checkpoint / FIGURES / name, partial / FIGURES / name)
            card = build_card(record, report, repo_id or folder.name, license)
            (partial / CARD_FILE).write_text(str(card), encoding="utf-8")
            reports.append(report)

        write_whole_folder(folder, write)
    return reports[0]


def publish(
    source: SSLPreTrainedModel | str | Path,
    repo_id: str,
    *,
    processor: SSLImageProcessor | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> "CommitInfo":
    """Push a run or a model to the Hub; what is there afterwards is all of it or what was there before.

    Args:
        source: see `prepare_repository`.
        repo_id: `owner/name`; it is created if there is none.
        processor: see `prepare_repository`.
        license: see `prepare_repository`.
        private: of a new repository; None: as the owner's account has it.
        token: by default the one of `hf auth login` or of the environment.
        revision: branch; a new one starts from main. None: main.
        commit_message: title of the commit.

    Returns:
        What the Hub says of the commit.

    Raises:
        PublishError: no token, no right to write, the Hub fails or cannot be reached, the source is no run.
        ValueError: the encoder fits no native class.
    """
    token = require_token(token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repository"
        prepare_repository(source, folder, repo_id, processor=processor, license=license)
        return upload(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Push {repo_id.rpartition('/')[2]} with hf_ssl",
        )


def require_token(token: str | None = None) -> str:
    """The given token, or the one that the Hub's own tools use.

    Raises:
        PublishError: there is none.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise PublishError("no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN")
    return token


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that a repository exists; returns its full name.

    Raises:
        PublishError: no token, no right to write, or the Hub cannot be reached.
    """
    token = require_token(token)
    with _in_one_line(repo_id, token) as api:
        return str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str,
) -> "CommitInfo":
    """Send a prepared folder as one commit; see `publish`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    token = require_token(token)
    with _in_one_line(repo_id, token) as api:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        parent = _head(api, repo_id, revision)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        stale = {path for path in api.list_repo_files(repo_id, revision=parent) if _is_ours(path)} - set(
            files
        )
        # Not upload_folder, which sends large folders in several commits.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
            parent_commit=parent,
        )


def _head(api: "HfApi", repo_id: str, revision: str | None) -> str:
    """The commit that a branch stands at; a branch that does not exist is created."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return str(api.repo_info(repo_id, revision=revision).sha)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision))
        return str(api.repo_info(repo_id, revision=revision).sha)


def _is_ours(path: str) -> bool:
    """Whether a file of a repository comes from a push of ours; what else is there stays."""
    return path in (*ROOT_FILES, *known_code_files()) or path.startswith((f"{PRETRAINING}/", f"{FIGURES}/"))


@contextlib.contextmanager
def _in_one_line(repo_id: str, token: str) -> "Iterator[HfApi]":
    """An API client; whatever goes wrong with it becomes a PublishError without the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield HfApi(token=token)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = _cause(error, repo_id).replace(token, "<token>")
        raise PublishError(
            f"cannot push to {repo_id}: {cause}. A push is one commit: it is there whole or not at all"
        ) from error


def _cause(error: BaseException, repo_id: str) -> str:
    """What went wrong, in words; uploads wrap it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    responses = (getattr(link, "response", None) for link in chain)
    status = next((response.status_code for response in responses if response is not None), None)
    known = {
        401: "the Hub does not accept the token; log in with `hf auth login`",
        403: "this account or token may not write there",
        404: f"there is no {repo_id}, or this account may not see it",
        409: "it was changed meanwhile; push again",
        412: "it was changed meanwhile; push again",
        429: "the Hub asks to slow down (429); push again later",
    }
    if status in known:
        return known[status]
    if status is not None and status >= 500:
        return f"the Hub fails ({status}); push again later"
    if status is None and any("httpx" in type(link).__module__ for link in chain):
        return f"the Hub cannot be reached ({type(chain[0]).__name__}); push again"
    return " ".join(str(error).split()).rstrip(".")


@contextlib.contextmanager
def _checkpoint_of(
    source: SSLPreTrainedModel | str | Path, processor: SSLImageProcessor | None
) -> Iterator[Path]:
    """The folder to publish from; a model is saved into a passing one."""
    if isinstance(source, str | Path):
        _refuse_unpublishable(Path(source))
        yield Path(source)
        return
    if not isinstance(source, SSLModel | SSLForPreTraining):
        raise PublishError(f"{type(source).__name__} is no model of hf_ssl; use its own push_to_hub")
    with tempfile.TemporaryDirectory() as folder:
        if processor is None:
            processor = method_of(source.config).processor_class.for_image_size(source.config.image_size)
        source.save_pretrained(folder)
        processor.save_pretrained(folder)
        yield Path(folder)


def _refuse_unpublishable(folder: Path) -> None:
    """Raise PublishError for what is no run, or a run that has not finished."""
    if not folder.is_dir():
        raise PublishError(f"there is no folder '{folder}'; give the folder of a run")
    newest = _newest_checkpoint(folder)
    if not (folder / CONFIG_FILE).is_file():
        if newest is not None:
            raise PublishError(_unfinished(folder, newest))
        raise PublishError(f"'{folder}' is no run: it has no {CONFIG_FILE}")
    model_type = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    if not str(model_type).startswith("hf_ssl_"):
        raise PublishError(f"'{folder}' holds a native model and no pre-training checkpoint; give the run")
    if not list(folder.glob("model*.safetensors")):
        raise PublishError(f"'{folder}' has no weights (model.safetensors); give a finished run")
    if newest is not None and (folder / STATE_FILE).is_file():
        done = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        if newest > done:
            raise PublishError(_unfinished(folder, newest))


def _newest_checkpoint(run: Path) -> int | None:
    """Steps of the last whole checkpoint of a run."""
    steps = [path.parent.name.removeprefix("checkpoint-") for path in run.glob(f"checkpoint-*/{STATE_FILE}")]
    return max((int(step) for step in steps if step.isdigit()), default=None)


def _unfinished(run: Path, step: int) -> str:
    return (
        f"the run '{run}' has not finished; continue it with hf-ssl train --resume {run}, or push its last "
        f"checkpoint, {run / f'checkpoint-{step}'}"
    )


def _write_pretraining(checkpoint: Path, record: RunRecord, folder: Path) -> None:
    """Everything that training needs to go on; no pickles."""
    folder.mkdir()
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        if (checkpoint / name).is_file():
            content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
            _write_json(folder / name, {**content, "auto_map": auto_map(record.method)})
    patterns = ("model*.safetensors", "model.safetensors.index.json", "tokenizer*.json")
    for path in (path for pattern in patterns for path in checkpoint.glob(pattern)):
        shutil.copy2(path, folder / path.name)
    if recipe_of(checkpoint) is not None:
        (folder / RECIPE_FILE).write_text(public_recipe(record.recipe), encoding="utf-8")
    if record.state:
        _write_json(folder / STATE_FILE, {key: record.state.get(key) for key in _PUBLIC_STATE})
    if record.scores:
        names = {"train": record.probe_name(0), "test": record.probe_name(1)}
        _write_json(folder / SCORES_FILE, {**record.scores, "protocol": record.scores["protocol"] | names})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
