"""Recipes: one YAML file holds a method's model, data and training arguments.

Every key can be overridden by its plain name (`temperature=0.5`, `hidden_size=192`, `max_steps=100`); where
it belongs is found by looking it up in the method's config, its backbone's config, `DataArguments` and
`SSLTrainingArguments`, in this order. Unknown keys are refused with the nearest known name.
"""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from hf_ssl.hub.folders import write_whole_file
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.configuration import BACKBONE_CONFIGS, SSLConfig, resolve_backbone_config
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.names import unknown_name_message
from hf_ssl.modeling.shared.precision import has_fast_bf16
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.values import dump_yaml, fit_types, load_yaml, parse_value

RECIPES_DIR = Path(__file__).parent / "recipes"
SECTIONS = ("model", "data", "training", "processor")
TOP_KEYS = ("name", "method", "init_from", "allow_new_heads", "distill_from", "tokenizer", *SECTIONS)
PROCESSOR_KEYS = frozenset({"views", "image_mean", "image_std"})
TOKEN_KEY = "hub_token"  # is used, and never written: files of a run are copied and published
AUTO_BF16 = "auto"

# Of each pair the second follows from, or yields to, the first: who overrides one means it to count.
_RIVALS = (
    ("base_learning_rate", "learning_rate"),
    ("warmup_epochs", "warmup_steps"),
    ("max_steps", "num_train_epochs"),
    ("global_batch_size", "gradient_accumulation_steps"),
)
_REPLACED = {  # arguments of transformers that have no effect here
    "optim": "optimizer",
    "lr_scheduler_type": "learning_rate_schedule",
    "lr_scheduler_kwargs": "learning_rate_schedule",
    "output_dir": "train's own output_dir",
    "ignore_data_skip": "nothing; data are positioned exactly",
    "remove_unused_columns": "nothing; columns are kept",
}


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message is one line."""


@dataclass
class DataArguments:
    """Where images come from, and the labelled images that probes use.

    Attributes:
        dataset: Hub name (with @ a branch, tag or commit; a run stores the commit it reads), local folder of
            images, parquet or tar files, or "sample"; a list mixes several.
        config_name: configuration of a Hub dataset; of the sample: a design.
        split: split to train on.
        image_column: column of the images; None finds it by its type.
        text_column: column of captions, of methods that learn from texts; None finds it by name and type.
        text_tokenizer: folder or Hub name of the tokenizer of texts; None: one is trained on the captions.
        weights: sampling weights of several datasets; None weighs by size.
        streaming: read while training instead of downloading first.
        probe_dataset: labelled images for the online probe; None: the training dataset, if it has labels.
        probe_config_names: configurations of the probe's bank and queries, where they differ.
        probe_splits: splits of the probe's bank and queries.
        probe_label_column: column of the labels; None finds it by its type.
        probe_pools: features that are probed; the first one decides which checkpoint is best.
        probe_num_neighbors: neighbours of the kNN.
        probe_linear: also fit a linear probe.
        probe_limit: at most so many images of each split.
    """

    dataset: str | list[str] = "sample"
    config_name: str | None = None
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    text_tokenizer: str | None = None
    weights: list[float] | None = None
    streaming: bool = True
    probe_dataset: str | None = None
    probe_config_names: list[str] | None = None
    probe_splits: list[str] | None = None
    probe_label_column: str | None = None
    probe_pools: list[str] | None = None
    probe_num_neighbors: int = 20
    probe_linear: bool = True
    probe_limit: int = 2000


@dataclass
class Recipe:
    """A resolved recipe.

    Attributes:
        name: file name without ending.
        method: name in `METHODS`.
        model: fields of the method's config, with `backbone_config`.
        data: see `DataArguments`.
        training: fields of `SSLTrainingArguments`.
        processor: `views`, `image_mean` or `image_std` of the image processor.
        init_from: what the model started from, a repository at its commit; None: fresh weights.
        allow_new_heads: heads that the starting point lacks, or has in another shape, start fresh.
        distill_from: a frozen teacher, of a smaller DINOv2 or of a tokenizer, named as `init_from`.
        tokenizer: what makes the tokens that BEiT predicts, named as `init_from`.
    """

    name: str
    method: str
    model: dict[str, Any] = field(default_factory=dict)
    data: DataArguments = field(default_factory=DataArguments)
    training: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    allow_new_heads: bool = False
    distill_from: str | None = None
    tokenizer: str | None = None

    def config(self) -> SSLConfig:
        """The method's config.

        Raises:
            RecipeError: a field is unknown, of the wrong type or out of range.
        """
        try:
            return METHODS[self.method].config_class(**self.model)
        except Exception as error:
            raise RecipeError(_innermost_message(error)) from error

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads; a token is not part of it."""
        content = {key: getattr(self, key) for key in TOP_KEYS} | {"data": asdict(self.data)}
        content["training"] = {key: value for key, value in self.training.items() if key != TOKEN_KEY}
        return dump_yaml(content)

    def save(self, path: Path) -> None:
        """Write it."""
        write_whole_file(path, f"# {self.name}: all values that this run gave\n{self.to_yaml()}")


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe file, or one of the package by name.

    Raises:
        RecipeError: there is no such recipe, or it holds unknown sections, methods or keys.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        raise RecipeError(unknown_name_message("recipe", name_or_path, recipe_names()))
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "method" not in content:
        raise RecipeError(f"{path} must be a mapping with a 'method' and the sections {', '.join(SECTIONS)}")
    for section in content:
        if section not in TOP_KEYS:
            raise RecipeError(unknown_name_message(f"section of {path.name}", section, TOP_KEYS))
    check_method(content["method"])
    return _build(path.stem, content)


def _build(name: str, content: dict[str, Any]) -> Recipe:
    sections = {section: _section(section, content.get(section)) for section in SECTIONS}
    _check_keys("data", sections["data"], _field_names(DataArguments))
    _check_keys("training", sections["training"], _field_names(SSLTrainingArguments))
    _check_keys("processor", sections["processor"], PROCESSOR_KEYS)
    _refuse_replaced(sections["training"])
    try:
        data = DataArguments(**fit_types(sections["data"], DataArguments))
        training = fit_types(_without_auto(sections["training"]), SSLTrainingArguments)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return Recipe(
        str(content.get("name") or name),
        content["method"],
        model=sections["model"],
        data=data,
        training={key: training.get(key, value) for key, value in sections["training"].items()},
        processor=sections["processor"],
        init_from=content.get("init_from"),
        allow_new_heads=bool(content.get("allow_new_heads")),
        distill_from=content.get("distill_from"),
        tokenizer=content.get("tokenizer"),
    )


def _section(name: str, content: Any) -> dict[str, Any]:
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"section {name} must be a mapping of keys to values, got {content!r}")
    return dict(content or {})


def _without_auto(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if (key, value) != ("bf16", AUTO_BF16)}


def _refuse_replaced(training: dict[str, Any]) -> None:
    for key in training:
        if key in _REPLACED:
            raise RecipeError(f"'{key}' has no effect here; use {_REPLACED[key]}")


def check_method(name: str) -> None:
    """Raise RecipeError, with the nearest name, unless the method exists."""
    if name not in METHODS:
        raise RecipeError(unknown_name_message("method", name, METHODS))


def override(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Change keys of a recipe by their plain names.

    Args:
        recipe: left as it is.
        values: new values; texts are read as YAML values, as they come from a command line.

    Raises:
        RecipeError: a key that nothing knows, or a value of the wrong type.
    """
    values = {key: parse_value(value) for key, value in values.items()}
    content = load_yaml(recipe.to_yaml())
    backbone = dict(content["model"].get("backbone_config") or _default_backbone(recipe.method))
    backbone |= values.pop("backbone_config", {})
    if "model_type" in values:
        backbone = {"model_type": values.pop("model_type")}
    content["model"]["backbone_config"] = backbone
    homes = [
        (content["model"], _own_fields(METHODS[recipe.method].config_class)),
        (backbone, _own_fields(type(_backbone_config(backbone)))),
        (content["data"], _field_names(DataArguments)),
        (content["training"], _field_names(SSLTrainingArguments)),
        (content["processor"], PROCESSOR_KEYS),
    ]
    _drop_rivals(content["training"], values)
    for key, value in values.items():
        home = next((section for section, known in homes if key in known), None)
        if home is None:
            raise RecipeError(nearest_key_message(key, {"model_type"}.union(*(known for _, known in homes))))
        home[key] = value
    return _build(recipe.name, content)


def with_model_of(recipe: Recipe, config: SSLConfig, processor: SSLImageProcessor | None) -> Recipe:
    """The recipe with the model of a starting point in place of its own.

    Args:
        recipe: gives data and training; left as it is.
        config: of a pre-training model of the recipe's method.
        processor: its image processor; None: the recipe's own views and normalisation.
    """
    model = _values_with_backbone(config)
    options: dict[str, Any] = recipe.processor
    if processor is not None:
        options = {name: getattr(processor, name) for name in sorted(PROCESSOR_KEYS)}
        # A view of the training size follows it when it is overridden.
        options["views"] = [
            {key: value for key, value in view.items() if (key, value) != ("size", config.image_size)}
            for view in processor.views
        ]
    return _adopting(recipe, model, options)


def with_backbone_of(recipe: Recipe, backbone: dict[str, Any], statistics: dict[str, Any]) -> Recipe:
    """The recipe with a published backbone in place of its own, and the method's default views for its size.

    Args:
        recipe: gives heads, data and training; left as it is.
        backbone: a `backbone_config`.
        statistics: `image_mean` and `image_std`, where known.
    """
    side, patch = backbone["image_size"], backbone.get("patch_size", 1)
    views = METHODS[recipe.method].processor_class.default_views(side)
    for view in views:  # 96 px are no whole number of patches of 14
        view["size"] = max(round(view.get("size", side) / patch), 1) * patch
        if view["size"] == side:
            del view["size"]  # follows the training size when that is overridden
    model = {**recipe.model, "backbone_config": backbone}
    return _adopting(recipe, model, {**statistics, "views": views})


def with_distiller_of(recipe: Recipe, config: Any) -> Recipe:
    """The recipe for a student of a frozen teacher: its prototypes in number, and no drop path (DINOv2).

    Args:
        recipe: gives everything else; left as it is.
        config: of the teacher's pre-training model.
    """
    there = _values_with_backbone(config) | {"distiller_config": None}
    shared = {name: there[name] for name in ("num_prototypes", "num_patch_prototypes", "separate_patch_head")}
    own_backbone = recipe.model.get("backbone_config") or _default_backbone(recipe.method)
    model = recipe.model | shared | {"distiller_config": there}
    model["backbone_config"] = dict(own_backbone) | {"drop_path_rate": 0.0}
    return _adopting(recipe, model, recipe.processor)


def with_distilled_encoder(recipe: Recipe, backbone: dict[str, Any], statistics: dict[str, Any]) -> Recipe:
    """The recipe of a tokenizer whose codes must say what an encoder sees.

    Args:
        recipe: gives everything else; left as it is.
        backbone: a `backbone_config` of the encoder.
        statistics: `image_mean` and `image_std` that it wants, where known.
    """
    model = recipe.model | {"distiller_config": {"backbone_config": backbone}}
    return _adopting(recipe, model, {**statistics, **recipe.processor})


def with_tokenizer_of(recipe: Recipe, config: Any, statistics: dict[str, Any]) -> Recipe:
    """The recipe of a model that predicts the tokens of a trained tokenizer.

    Args:
        recipe: gives everything else; left as it is.
        config: of the tokenizer.
        statistics: `image_mean` and `image_std` that it wants, where known.
    """
    there = _values_with_backbone(config)
    kept = {name: there[name] for name in ("backbone_config", "num_codes", "code_size")}
    model = recipe.model | {"tokenizer_config": kept}
    return _adopting(recipe, model, {**statistics, **recipe.processor})


def _adopting(recipe: Recipe, model: dict[str, Any], processor: dict[str, Any]) -> Recipe:
    """The recipe with other sections; through YAML, as every recipe: plain lists, no tuples."""
    adopted = replace(recipe, model=_plain(model), processor=_plain(processor))
    return _build(recipe.name, load_yaml(adopted.to_yaml()))


def _values_with_backbone(config: Any) -> dict[str, Any]:
    backbone = config.backbone_config
    return own_values(config) | {
        "backbone_config": {"model_type": backbone.model_type, **own_values(backbone)}
    }


def own_values(config: Any) -> dict[str, Any]:
    """Values of the fields that our classes declare."""
    names = _own_fields(type(config))
    return {name: getattr(config, name) for name in sorted(names)}


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _drop_rivals(training: dict[str, Any], values: dict[str, Any]) -> None:
    """Remove what would silently win over a new value.

    Raises:
        RecipeError: both of a pair are given.
    """
    for first, second in _RIVALS:
        if first in values and second in values:
            raise RecipeError(f"{first} and {second} decide the same thing; give one of them")
        for new, old in ((first, second), (second, first)):
            if new in values:
                training.pop(old, None)


def changed_values(earlier: Recipe, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Plain names of the keys whose values differ, with the earlier and the new value."""
    then, now = _by_place(earlier), _by_place(recipe)
    places = [*then, *(place for place in now if place not in then)]
    pairs = [(place[-1], then.get(place), now.get(place)) for place in places]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _by_place(recipe: Recipe) -> dict[tuple[str, str], Any]:
    content = load_yaml(recipe.to_yaml())
    sections = {name: dict(content[name]) for name in SECTIONS}
    sections["backbone"] = sections["model"].pop("backbone_config", None) or {}
    return {(name, key): value for name, section in sections.items() for key, value in section.items()}


def nearest_key_message(key: str, known: Set[str], section: str = "") -> str:
    """One line for an unknown key: the list of all known ones is too long to print."""
    what = f"key of section {section}" if section else "key"
    hint = unknown_name_message(what, key, known).split(" (known:")[0]
    return f"{hint}; `hf-ssl methods NAME` lists all keys"


def known_keys(method: str) -> dict[str, set[str]]:
    """Keys of a method's recipes by section."""
    backbone = _backbone_config(_default_backbone(method))
    return {
        "model": _own_fields(METHODS[method].config_class),
        "backbone": _own_fields(type(backbone)),
        "data": _field_names(DataArguments),
        "training": _field_names(SSLTrainingArguments) - set(_REPLACED),
        "processor": set(PROCESSOR_KEYS),
    }


def training_arguments(recipe: Recipe, output_dir: str) -> SSLTrainingArguments:
    """Build the arguments; `bf16: auto` is decided by the machine.

    Raises:
        RecipeError: an argument of the wrong type or value.
    """
    values = dict(recipe.training)
    if values.get("bf16") == AUTO_BF16:
        values["bf16"] = has_fast_bf16()
    try:
        return SSLTrainingArguments(output_dir=output_dir, **values)
    except (ValueError, TypeError) as error:
        raise RecipeError(_innermost_message(error)) from error


def _check_keys(section: str, values: dict[str, Any], known: Set[str]) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(nearest_key_message(str(key), known, section))


def _field_names(dataclass_type: type) -> set[str]:
    return {item.name for item in fields(dataclass_type)}


def _own_fields(config_class: type) -> set[str]:
    """Fields declared by our classes, not the ones every transformers config has."""
    ours = [base for base in config_class.__mro__ if base.__module__.startswith("hf_ssl.")]
    declared = {name for base in ours for name in base.__dict__.get("__annotations__", {})}
    return declared & _field_names(config_class)  # no constants of the class


def _default_backbone(method: str) -> dict[str, Any]:
    return dict(METHODS[method].config_class.default_backbone)


def _backbone_config(backbone: dict[str, Any]) -> Any:
    """The backbone's config class by its type alone; values are checked when the model is built."""
    model_type = backbone.get("model_type", "hf_ssl_vit")
    if model_type not in BACKBONE_CONFIGS:
        raise RecipeError(unknown_name_message("model_type", str(model_type), BACKBONE_CONFIGS))
    return resolve_backbone_config({"model_type": model_type})


def _innermost_message(error: BaseException) -> str:
    """The sentence that says what is wrong; strict dataclasses wrap it in their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
