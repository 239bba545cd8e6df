"""Trained models that stand still while another one learns from them: a teacher, a tokenizer.

They are named as a starting point is, and become part of the new model's checkpoints.
"""

import logging
from dataclasses import replace
from typing import Any

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.published_vits import backbone_config_of
from hf_ssl.training.recipes import (
    Recipe,
    RecipeError,
    with_distilled_encoder,
    with_distiller_of,
    with_tokenizer_of,
)
from hf_ssl.training.starting_points import (
    ANY_ERROR,
    StartingPoint,
    find_starting_point,
    start_backbone,
    started_model,
)

logger = logging.getLogger(__name__)

TOKENIZER = "beit_tokenizer"


def with_distiller(recipe: Recipe, distill_from: str | None) -> Recipe:
    """The recipe of a model that learns from a frozen teacher, written down to the commit.

    Args:
        recipe: left as it is.
        distill_from: for DINOv2 a pre-training checkpoint of it with its heads, for a tokenizer any encoder;
            None: no such teacher.

    Raises:
        RecipeError: there is none, it does not fit, or the method knows no frozen teacher.
    """
    if distill_from is None:
        return recipe
    _require_field(recipe, "distiller_config", "distill_from", "has no frozen teacher")
    start = find_starting_point(distill_from)
    logger.info("distilled from %s, which stands still", start.location)
    if recipe.method == TOKENIZER:
        taught = with_distilled_encoder(recipe, _backbone_of(start), start.statistics())
    elif start.is_of(recipe.method):
        taught = with_distiller_of(recipe, start.config)
    else:
        raise RecipeError(
            f"cannot distill from '{start.location}': it is a {start.config.model_type} without the heads of "
            f"{recipe.method}; give a run of {recipe.method}, or a repository with its pretraining/ folder"
        )
    return replace(taught, distill_from=str(start.location))


def _require_field(recipe: Recipe, field: str, key: str, otherwise: str) -> None:
    able = [name for name, method in METHODS.items() if hasattr(method.config_class, field)]
    if recipe.method not in able:
        raise RecipeError(f"{key} is for {', '.join(able)}; {recipe.method} {otherwise}")


def _backbone_of(start: StartingPoint) -> dict[str, Any]:
    try:
        backbone = backbone_config_of(start.config, None)
    except ANY_ERROR as error:
        raise _cannot("distill", str(start.location), error) from error
    if backbone is None:
        raise RecipeError(
            f"cannot distill from '{start.location}': a {start.config.model_type} is no encoder"
        )
    return backbone


def with_tokenizer(recipe: Recipe, tokenizer: str | None) -> Recipe:
    """The recipe of a model that predicts the tokens of a trained tokenizer, written down to the commit.

    Args:
        recipe: left as it is.
        tokenizer: a run of `beit_tokenizer`, or its repository; None: none.

    Raises:
        RecipeError: there is none, or the method predicts no tokens.
    """
    if tokenizer is None:
        return recipe
    _require_field(recipe, "tokenizer_config", "tokenizer", "predicts no tokens")
    start = find_starting_point(tokenizer)
    if not start.is_of(TOKENIZER):
        raise RecipeError(
            f"'{start.location}' is a {start.config.model_type} and no tokenizer; train one with: "
            f"hf-ssl train {TOKENIZER} --dataset NAME_OR_FOLDER"
        )
    logger.info("tokens    of %s, which stands still", start.location)
    adopted = with_tokenizer_of(recipe, start.config, start.statistics())
    return replace(adopted, tokenizer=str(start.location))


def build_model(recipe: Recipe, config: Any) -> SSLForPreTraining:
    """The recipe's model, fresh or started from `init_from`, with its frozen parts.

    Raises:
        RecipeError: there is nothing to start from, a part is missing, or it does not fit.
    """
    model: Any = started_model(recipe, config)
    if recipe.distill_from is not None:
        start = find_starting_point(recipe.distill_from)
        try:
            if recipe.method == TOKENIZER:
                _check_statistics(recipe, start)
                start_backbone(model.distiller, start)
            else:
                model.take_distiller(start.location.load(type(model), start.subfolder))
        except ANY_ERROR as error:
            raise _cannot("distill", recipe.distill_from, error) from error
    if recipe.tokenizer is not None:
        start = find_starting_point(recipe.tokenizer)
        try:
            _check_statistics(recipe, start)
            source = start.location.load(METHODS[TOKENIZER].pretraining_class, start.subfolder)
            model.take_tokenizer(source.student)
        except ANY_ERROR as error:
            raise _cannot("take tokens", recipe.tokenizer, error) from error
    elif hasattr(model, "tokenizer") and not _continues_its_method(recipe):
        raise RecipeError(
            f"{recipe.method} needs a trained tokenizer: train one with `hf-ssl train {TOKENIZER}` and give "
            "its run with --tokenizer"
        )
    return model


def _check_statistics(recipe: Recipe, start: StartingPoint) -> None:
    """Refuse images that are normalised in another way than a frozen part has learned on."""
    for name, wanted in start.statistics().items():
        given = recipe.processor.get(name)
        if given is not None and list(given) != wanted:
            raise ValueError(
                f"it was trained with {name} {wanted} and this run has {list(given)}; leave it out"
            )


def _continues_its_method(recipe: Recipe) -> bool:
    return recipe.init_from is not None and find_starting_point(recipe.init_from).is_of(recipe.method)


def _cannot(what: str, name: str, error: BaseException) -> RecipeError:
    return RecipeError(f"cannot {what} from '{name}': {' '.join(str(error).split())}")
