"""What a run can start from: fresh weights, a pre-training checkpoint of its method, or any encoder.

A starting point is a folder (a run, a checkpoint, a copy of a published repository, an encoder) or a name on
the Hub, `owner/name` or `owner/name@revision`; a name without an owner is one of timm's models.
"""

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_ssl.hub.locations import Location, locate
from hf_ssl.hub.small_stem import restore_small_stem
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.positions import resize_positions
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.published_vits import (
    TIMM_WRAPPER,
    backbone_config_of,
    check_tensors,
    refuse_foreign,
    start_vit,
)
from hf_ssl.training.recipes import Recipe, RecipeError, with_backbone_of, with_model_of

logger = logging.getLogger(__name__)

PREFIXES = (  # of the network's tensors in our encoders and in transformers' wrapper
    "backbone.",
    "timm_model.",
    "network.",
)
ANY_ERROR = (OSError, RuntimeError, TypeError, ValueError)  # of loading what may not be there


@dataclass(frozen=True)
class StartingPoint:
    """Where weights come from.

    Attributes:
        location: folder or repository, at the commit found.
        subfolder: of the checkpoint in it.
        config: of the model there.
    """

    location: Location
    subfolder: str
    config: Any

    def is_of(self, method: str) -> bool:
        """Whether a model of this method is there."""
        return bool(self.config.model_type == METHODS[method].config_class.model_type)

    def processor(self) -> Any:
        """The image processor there; None where there is none."""
        if self.location.file("preprocessor_config.json", self.subfolder) is None:
            return None
        return self.location.load(AutoImageProcessor, self.subfolder)

    def statistics(self) -> dict[str, list[float]]:
        """`image_mean` and `image_std` that images are normalised with there, where known."""
        is_timm = self.config.model_type == TIMM_WRAPPER
        processor = None if is_timm else self.processor()
        statistics = {}
        for name in ("mean", "std"):
            there = (
                self.config.pretrained_cfg.get(name) if is_timm else getattr(processor, f"image_{name}", None)
            )
            if there is not None:
                statistics[f"image_{name}"] = list(there)
        return statistics


def find_starting_point(name: str) -> StartingPoint:
    """Look what is there.

    Raises:
        RecipeError: nothing that could be started from.
    """
    try:
        location = locate(_with_owner(name)).pinned()
        subfolder = location.subfolder()
        return StartingPoint(location, subfolder, location.load(AutoConfig, subfolder))
    except ANY_ERROR as error:
        raise _cannot_start(name, error) from error


def _with_owner(name: str) -> str:
    """timm's models are named without their owner."""
    import timm

    if "/" in name or Path(name).exists() or not timm.is_model(name.partition("@")[0]):
        return name
    pretrained = timm.get_pretrained_cfg(name)
    return name if pretrained is None else f"timm/{pretrained.architecture}.{pretrained.tag}"


def with_start(recipe: Recipe, init_from: str | None, adopt_model: bool) -> Recipe:
    """The recipe with its starting point written down to the commit.

    Args:
        recipe: left as it is.
        init_from: the starting point; None: fresh weights.
        adopt_model: take model and views from a starting point of the same method.

    Raises:
        RecipeError: there is nothing to start from.
    """
    if init_from is None:
        return recipe
    start = find_starting_point(init_from)
    if adopt_model and start.is_of(recipe.method):
        logger.info("model     as %s has it", start.location)
        recipe = with_model_of(recipe, start.config, start.processor())
    elif not start.is_of(recipe.method):
        try:
            recipe = _with_encoder(recipe, start, adopt_model)
        except ANY_ERROR as error:
            raise _cannot_start(str(start.location), error) from error
    return replace(recipe, init_from=str(start.location))


def _with_encoder(recipe: Recipe, start: StartingPoint, adopt_model: bool) -> Recipe:
    """The recipe with the normalisation of an encoder, unless it has its own; and maybe with its backbone."""
    statistics = start.statistics()
    side = None if start.config.model_type == TIMM_WRAPPER else _image_size(start.processor())
    backbone = backbone_config_of(start.config, side) if adopt_model else None
    if backbone is not None:
        logger.info("backbone  as %s has it, at %d px", start.location, backbone["image_size"])
        return with_backbone_of(recipe, backbone, statistics)
    if statistics:
        logger.info("images    normalised as %s has it, unless the recipe says how", start.location)
    return replace(recipe, processor={**statistics, **recipe.processor})


def _image_size(processor: Any) -> int | None:
    """Side of the images that a processor makes; None: it makes no squares, or there is none."""
    for name in ("crop_size", "size"):
        size = getattr(processor, name, None)
        if size and size.get("height") == size.get("width") and size.get("height"):
            return int(size["height"])
    return None


def started_model(recipe: Recipe, config: Any) -> SSLForPreTraining:
    """The recipe's model, fresh or started from `init_from`; frozen parts are not yet in it.

    Raises:
        RecipeError: there is nothing to start from, or it does not fit.
    """
    model_class = METHODS[recipe.method].pretraining_class
    if recipe.init_from is None:
        if recipe.training.get("lora_rank"):
            raise RecipeError("lora_rank needs trained weights to learn beside; give init_from")
        return model_class(config)
    start = find_starting_point(recipe.init_from)
    try:
        if start.is_of(recipe.method):
            return _continue_method(model_class, start, config, recipe.allow_new_heads)
        return _start_from_encoder(model_class(config), start)
    except ANY_ERROR as error:
        raise _cannot_start(recipe.init_from, error) from error


def _cannot_start(name: str, error: BaseException) -> RecipeError:
    return RecipeError(f"cannot start from '{name}': {' '.join(str(error).split())}")


def _continue_method(
    model_class: Any, start: StartingPoint, config: Any, allow_new_heads: bool
) -> SSLForPreTraining:
    """Everything the checkpoint has: the encoder must fit, heads may start fresh with consent.

    Learned positions of another grid are resized, so that a run can go on at another resolution.
    """
    old, new = _learned_grid(start.config), _learned_grid(config)
    has_same_patches = _patch_size(start.config) == _patch_size(config)
    if old is not None and new is not None and old != new and has_same_patches:
        as_there = copy.deepcopy(config)
        as_there.backbone_config.image_size = start.config.backbone_config.image_size
        source = _continue_method(model_class, start, as_there, allow_new_heads)
        logger.info("start     positions resized from %d x %d to %d x %d", old, old, new, new)
        return _with_another_grid(source, model_class(config), old, new)
    model, info = start.location.load(
        model_class,
        start.subfolder,
        config=config,
        allow_new_heads=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    shapes = {name: (tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]}
    fresh = set(model.fresh_tensors([*info["missing_keys"], *shapes]))
    network = f"{model.base_model_prefix}.backbone."
    for name in sorted(name for name in fresh if name.startswith(network)):
        there, here = shapes.get(name, ("absent", "needed"))
        raise ValueError(f"'{name}' is {there} there and {here} here; give the same backbone_config")
    unknown = set(info["unexpected_keys"])
    if not fresh and not unknown:
        logger.info("start     %s, with all of its %d tensors", start.location, len(model.state_dict()))
        return model
    what = ", ".join(
        f"{len(names)} tensors {kind} (e.g. {sorted(names)[0]})"
        for names, kind in ((fresh, "missing or of another shape"), (unknown, "of no use here"))
        if names
    )
    if not allow_new_heads:
        raise ValueError(
            f"{what}; give the recipe it was trained with, or allow_new_heads=true to start them afresh"
        )
    logger.warning("start     %s; afresh or left out, as allowed: %s", start.location, what)
    return model


def _patch_size(config: Any) -> int | None:
    """Pixels along a side of a patch; None of a CNN."""
    return getattr(config.backbone_config, "patch_size", None)


def _learned_grid(config: Any) -> int | None:
    """Patches along a side of the table of learned positions; None: there is no such table."""
    backbone = config.backbone_config
    if getattr(backbone, "position_embedding_type", None) != "learned":
        return None
    return int(backbone.grid_size)


def _with_another_grid(
    source: SSLForPreTraining, model: SSLForPreTraining, old: int, new: int
) -> SSLForPreTraining:
    """`model` with everything of `source`, its learned positions resized."""
    state = source.state_dict()
    has_class_token = source.config.backbone_config.use_class_token  # type: ignore[union-attr]
    for name in [name for name in state if name.endswith(".embeddings.position_embeddings")]:
        state[name] = resize_positions(state[name], (old, old), (new, new), has_class_token)
    model.load_state_dict(state)
    return model


def _start_from_encoder(model: SSLForPreTraining, start: StartingPoint) -> SSLForPreTraining:
    """Fresh heads on the encoder of another method, a native model or a timm model."""
    branch: Any = model.published_branch()
    told = start_backbone(branch.backbone, start)
    model.sync_branches(model.base_model_prefix)
    model.starts_with_fresh_heads = True
    logger.info(
        "start     the encoder of %s (%s); heads%s start afresh",
        start.location,
        told,
        " and what else training keeps" if model.has_teacher else "",
    )
    return model


def start_backbone(backbone: Any, start: StartingPoint) -> str:
    """Give a backbone the weights of an encoder; returns what was loaded and how well it fits.

    Raises:
        ValueError: the encoder computes something else.
    """
    refuse_foreign(start.config)
    encoder = start.location.load(AutoModel, start.subfolder)
    if not isinstance(backbone.config, SSLViTConfig):
        _start_cnn(backbone, encoder)
        return type(encoder).__name__
    resized, difference = start_vit(backbone, encoder, start.config)
    return f"{type(encoder).__name__}{resized}, features equal to {difference:.0e}"


def _start_cnn(backbone: Any, encoder: Any) -> None:
    """Weights of a network of timm, whose small stem an export may have hidden in the large one."""
    state = {_plain_name(key): value for key, value in encoder.state_dict().items()}
    if backbone.config.small_stem_stride and type(encoder).__name__ == "TimmWrapperModel":
        state = restore_small_stem(state, backbone.config.small_stem_stride)
    check_tensors(backbone.network.state_dict(), state, type(encoder).__name__)
    backbone.network.load_state_dict(state, strict=False)


def _plain_name(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
