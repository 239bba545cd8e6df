"""The model card of a run, written from the files that the run left; nothing in it is typed by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_ssl import __version__
from hf_ssl.hub.locations import PRETRAINING, is_local_name
from hf_ssl.hub.native import loading_lines
from hf_ssl.modeling import Method, method_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from hf_ssl.hub.landing import ExportReport

CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
STATE_FILE = "trainer_state.json"
SCORES_FILE = "scores.json"
FIGURES = "figures"
TEMPLATE = Path(__file__).with_name("card_template.md")

UNKNOWN_LICENCE = "unknown: fill in"
_SAMPLE = "the built-in emoji of hf_ssl: Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0)"
_CAPTIONS = {  # known pictures in the order of the card
    "curves": "Loss, learning rate and scores over the steps",
    "views": "Training views",
    "reconstructions": "Hidden patches and their reconstruction",
    "patch_features": "Main directions of the patch features as colours",
    "attention": "Attention of the class token, by head",
    "neighbors": "Nearest neighbours by the encoder's features",
}
_METRICS = {
    "knn": "kNN, plain",
    "knn_centered": "kNN, centred",
    "knn_standardized": "kNN, standardised",
    "linear": "linear probe",
}


@dataclass
class RunRecord:
    """What a run or checkpoint folder says about itself.

    Attributes:
        method: row of `METHODS`.
        config: of the pre-training model.
        recipe: content of its recipe; empty for a model that was trained from Python.
        state: content of `trainer_state.json`; empty where there is none.
        scores: content of `scores.json`; empty without labels.
        figures: names of the pictures.
    """

    method: Method
    config: Any
    recipe: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        """Section data of the recipe."""
        return self.recipe.get("data") or {}

    @property
    def has_pretraining(self) -> bool:
        """Whether there is more than an encoder."""
        return list(self.config.architectures or []) != [self.method.model_class.__name__]

    @property
    def datasets(self) -> list[str]:
        """Names of the training data, as the recipe has them."""
        names = self.data.get("dataset") or []
        return [names] if isinstance(names, str) else list(names)

    @property
    def probe_dataset(self) -> str:
        """Name of the labelled data."""
        return str(self.data.get("probe_dataset") or (self.datasets or ["unknown"])[0])

    def probe_name(self, part: int) -> str:
        """What may be said of the labelled images in public: part 0 names, part 1 is named."""
        details = [
            (self.data.get(key) or [None, None])[part] for key in ("probe_config_names", "probe_splits")
        ]
        name, found = public_name(self.probe_dataset), [str(detail) for detail in details if detail]
        return f"{name} ({', '.join(found)})" if found else name


def read_run(folder: Path) -> RunRecord:
    """Read a run, a checkpoint (its recipe is in the folder above) or a saved pre-training model.

    Raises:
        ValueError: `config.json` belongs to no method.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = method_of(content)
    recipe = recipe_of(folder)
    figures = {path.stem: path.name for path in sorted((folder / FIGURES).glob("*.png"))}
    return RunRecord(
        method=method,
        config=method.config_class.from_pretrained(folder),
        recipe={} if recipe is None else yaml.safe_load(recipe.read_text(encoding="utf-8")),
        state=_read_json(folder / STATE_FILE),
        scores=_read_json(folder / SCORES_FILE),
        figures=[
            figures[name] for name in (*_CAPTIONS, *sorted(figures.keys() - _CAPTIONS)) if name in figures
        ],
    )


def recipe_of(folder: Path) -> Path | None:
    """The recipe of a run or of one of its checkpoints."""
    candidates = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((path / RECIPE_FILE for path in candidates if (path / RECIPE_FILE).is_file()), None)


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def build_card(
    record: RunRecord, report: "ExportReport", repo_id: str | None = None, license: str | None = None
) -> "ModelCard":
    """The card.

    Args:
        record: the run.
        report: of its exported encoder.
        repo_id: where it will be published; None: for the folder of the run, whose encoder is in `encoder/`.
        license: identifier for the model, such as "apache-2.0"; None: the card says that it is not stated.
    """
    from huggingface_hub import ModelCard

    method, title = record.method, (repo_id or str(record.recipe.get("name") or record.method.name))
    recipe_path = f"{PRETRAINING}/{RECIPE_FILE}" if repo_id else RECIPE_FILE
    native = "transformers' `" + report.native_class + "`"
    scores = record.scores or {"rows": [], "protocol": {}}
    return ModelCard.from_template(
        _card_data(record, report, title, license),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title.rpartition("/")[2],
        repo_id=repo_id,
        has_pretraining=record.has_pretraining and repo_id is not None,
        method=method,
        backbone=record.config.backbone_config.describe(),
        parameters=f"{report.num_parameters / 1e6:.2f}",
        loads_as=native + (" and timm" if _is_timm(report) else ""),
        training=_describe_training(record),
        data=describe_data(record),
        start=_start(record),
        how_to_load="\n".join(loading_lines(report.native_class, repo_id or "encoder", repo_id is not None)),
        notes=report.notes,
        rows=scores["rows"],
        protocol=scores["protocol"],
        bank=record.probe_name(0),
        queries=record.probe_name(1),
        chance=f"{100 * chance_margin(scores['protocol']['test_images']):.1f}" if record.scores else "",
        has_linear=any(row["linear"] is not None for row in scores["rows"]),
        percent=lambda share: "-" if share is None else f"{100 * share:.1f}",
        recipe_path=recipe_path,
        recipe=public_recipe(record.recipe) if record.recipe else "",
        command=_command(repo_id, recipe_path),
        versions=_versions(_is_timm(report)),
        figures=[(name, _CAPTIONS.get(Path(name).stem, Path(name).stem)) for name in record.figures],
        license=license,
        citation=citation(method),
    )


def chance_margin(num_test_images: int) -> float:
    """Difference of two accuracies that can be chance: about two standard errors, 0.03 at 2,000 images."""
    return float(0.03 * (2000 / num_test_images) ** 0.5)


def write_card(
    folder: Path, report: "ExportReport", repo_id: str | None = None, license: str | None = None
) -> Path:
    """Write README.md into the folder of a run, from what the folder holds; see `build_card`."""
    card = build_card(read_run(folder), report, repo_id, license)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    return folder / CARD_FILE


def _card_data(record: RunRecord, report: "ExportReport", title: str, license: str | None) -> Any:
    from huggingface_hub import ModelCardData

    start = record.recipe.get("init_from")
    results = eval_results(record)
    hub_data = [name.partition("@")[0] for name in record.datasets if not is_local_data(name)]
    tags = ["self-supervised-learning", "hf_ssl", record.method.name, "custom_code"]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[*tags, "timm"] if _is_timm(report) else tags,
        datasets=hub_data or None,
        base_model=start.partition("@")[0] if start and not is_local_data(start) else None,
        model_name=title.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def eval_results(record: RunRecord) -> "list[EvalResult]":
    """The encoder's scores for `model-index`; none for a run without labels."""
    from huggingface_hub import EvalResult

    test = record.probe_dataset
    splits = record.data.get("probe_splits") or [None, None]
    kind = test if test == "sample" else "local" if is_local_data(test) else test.partition("@")[0]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="classification by frozen features",
            dataset_type=kind,
            dataset_name=record.probe_name(1),
            dataset_split=splits[1],
            metric_type="accuracy",
            metric_name=f"{_METRICS[name]}, features {row['pool']}",
            metric_value=round(row[name], 4),
        )
        for row in record.scores.get("rows", [])
        if row["features"] == "encoder"
        for name in _METRICS
        if row[name] is not None
    ]


def _is_timm(report: "ExportReport") -> bool:
    return report.native_class == "TimmWrapperModel"


def _describe_training(record: RunRecord) -> str:
    step, total = record.state.get("global_step"), record.state.get("max_steps")
    if not step:
        return "not stated"
    batch = record.recipe.get("training", {}).get("global_batch_size")
    images = f" of {batch} images" if batch else ""
    done = f"{step:,} steps{images}"
    return done if step >= (total or 0) else f"{done}; stopped early, {total:,} were planned"


def is_local_data(name: str) -> bool:
    """Whether a recipe's name of data or of a starting point is no name on the Hub."""
    is_file = name.endswith((".parquet", ".tar")) or Path(name).exists()
    return name == "sample" or is_file or is_local_name(name)


def public_name(name: str) -> str:
    """A name that may be published: of a path only its last part, of a repository not its commit."""
    return Path(name).name if is_local_data(name) else name.partition("@")[0]


def describe_data(record: RunRecord) -> list[str]:
    """What the model was trained on and under which licence, one line for each source."""
    lines = []
    for name in record.datasets:
        if name == "sample":
            lines.append(_SAMPLE)
        elif is_local_data(name):
            lines.append(f"images in a local folder or file, `{Path(name).name}`; licence not stated")
        else:
            repository, _, commit = name.partition("@")
            link = f"[{repository}](https://huggingface.co/datasets/{repository})"
            link += f" at `{commit}`" if commit else ""
            lines.append(f"{link}, licence {licence_of_dataset(repository, commit or None)}")
    return lines or ["not stated"]


def licence_of_dataset(name: str, revision: str | None = None) -> str:
    """What the card of a dataset on the Hub says, or that it has to be filled in."""
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def card(**options: Any) -> str:
        return hf_hub_download(name, CARD_FILE, repo_type="dataset", revision=revision, **options)

    try:
        try:
            file = card(local_files_only=True)  # reading the images has fetched it
        except LocalEntryNotFoundError:
            file = card()
        licence = DatasetCard.load(file).data.license
    except Exception:  # whatever stands between us and someone else's card
        return UNKNOWN_LICENCE
    return ", ".join(licence) if isinstance(licence, list) else str(licence or UNKNOWN_LICENCE)


def _start(record: RunRecord) -> str:
    start = record.recipe.get("init_from")
    if not start:
        return ""
    if is_local_data(start):
        return f"a local checkpoint, `{Path(start).name}`"
    repository, _, revision = str(start).partition("@")
    at = f" at `{revision}`" if revision else ""
    return f"[{repository}](https://huggingface.co/{repository}){at}"


def public_recipe(recipe: dict[str, Any]) -> str:
    """A recipe that may be published: without what belongs to one account or one machine.

    Local paths keep their last part, written `./name`; arguments of pushing and of trackers are left out.
    """
    training = {
        key: value
        for key, value in (recipe.get("training") or {}).items()
        if not key.startswith(("hub_", "push_to_hub", "report_to", "trackio_")) and "token" not in key
    }
    data = dict(recipe.get("data") or {})
    for key in ("dataset", "probe_dataset"):
        if data.get(key):
            data[key] = _public_paths(data[key])
    content = {**recipe, "data": data, "training": training}
    for key in ("init_from", "distill_from", "tokenizer"):
        if content.get(key):
            content[key] = _public_paths(content[key])
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _public_paths(names: str | list[str]) -> str | list[str]:
    if isinstance(names, list):
        return [str(_public_paths(name)) for name in names]
    return f"./{Path(names).name}" if names != "sample" and is_local_data(names) else names


def _command(repo_id: str | None, recipe_path: str) -> str:
    train = f"hf-ssl train --recipe {recipe_path}"
    return f"hf download {repo_id} {recipe_path} --local-dir .\n{train}" if repo_id else train


def _versions(with_timm: bool) -> str:
    packages: Sequence[str] = ("transformers", "torch", "datasets", *(["timm"] if with_timm else []))
    found = [f"hf_ssl {__version__}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def citation(method: Method) -> str:
    """BibTeX of a method's paper."""
    fields = {
        "title": f"{{{method.title}}}",
        "author": method.authors,
        "year": f"20{method.paper[:2]}",
        "eprint": method.paper,
        "archivePrefix": "arXiv",
    }
    lines = [f"  {key} = {{{value}}}" for key, value in fields.items()]
    return ",\n".join([f"@misc{{{method.name}", *lines]) + "\n}"
