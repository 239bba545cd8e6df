"""The text side of a run: captions in the data, and the tokenizer that a text tower is built for."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_ssl.data.captions import read_captions
from hf_ssl.data.sources import DataError, ImageSource
from hf_ssl.hub.cards import RECIPE_FILE
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.text_processing import SSLImageTextProcessor, train_tokenizer
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.processes import on_first_process
from hf_ssl.training.pulling import pulled
from hf_ssl.training.recipes import Recipe, RecipeError
from hf_ssl.training.starting_points import ANY_ERROR, find_starting_point

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
ROWS_FOR_TOKENIZER = 100_000  # of each source: merges of a few thousand tokens hardly change beyond


def takes_texts(recipe: Recipe) -> bool:
    """Whether the method learns from captions.

    Raises:
        RecipeError: it does not, and the recipe names some.
    """
    takes = METHODS[recipe.method].text_processor_class is not None
    for key in ("text_column", "text_tokenizer"):
        if not takes and getattr(recipe.data, key) is not None:
            able = ", ".join(name for name, method in METHODS.items() if method.text_processor_class)
            raise RecipeError(f"{key} is for {able}; {recipe.method} learns from images alone")
    return takes


def build_text_processor(
    recipe: Recipe,
    image_processor: SSLImageProcessor,
    sources: list[ImageSource],
    folder: Path,
    args: SSLTrainingArguments,
) -> SSLImageTextProcessor | None:
    """The processor of a method that learns from texts; None for the others.

    The tokenizer is that of the run if it has begun, the one the recipe names, that of the model it starts
    from, or one trained on the captions. Its vocabulary is written into the recipe's model.

    Raises:
        DataError: there are no captions.
        RecipeError: the tokenizer cannot be loaded, or does not suit a text tower.
    """
    if not takes_texts(recipe):
        return None
    method = METHODS[recipe.method]
    max_length = recipe.config().text_max_length
    options = method.text_processor_class.tokenizer_options(max_length)
    tokenizer = on_first_process(args, lambda: _find_tokenizer(recipe, sources, folder, options))
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise RecipeError("the tokenizer has no end token or none for padding; give one of CLIP's kind")
    recipe.model |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.model.get("lock_image_tower") and recipe.init_from is None:
        logger.warning("texts     learn to match an image tower that is locked at random; give init_from")
    return method.text_processor_class(image_processor, tokenizer)


def _find_tokenizer(recipe: Recipe, sources: list[ImageSource], folder: Path, options: dict[str, Any]) -> Any:
    if (folder / RECIPE_FILE).is_file() and (folder / TOKENIZER_FILE).is_file():
        return _load(str(folder), options)
    if (name := recipe.data.text_tokenizer) is not None:
        return pulled(name, lambda: _load(name, options))
    if recipe.init_from is not None:
        start = find_starting_point(recipe.init_from)
        if start.is_of(recipe.method):
            if start.location.file(TOKENIZER_FILE, start.subfolder) is None:
                raise RecipeError(
                    f"'{recipe.init_from}' has texts in its weights and no tokenizer; give text_tokenizer"
                )
            logger.info("texts     tokenizer of %s", start.location)
            return start.location.load(AutoTokenizer, start.subfolder, **options)
    return _train(recipe, sources, options)


def _load(name: str, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except ANY_ERROR as error:
        raise RecipeError(f"cannot load a tokenizer from '{name}': {' '.join(str(error).split())}") from error


def _train(recipe: Recipe, sources: list[ImageSource], options: dict[str, Any]) -> Any:
    captions = list(read_captions(sources, ROWS_FOR_TOKENIZER))
    if not captions:
        raise DataError(f'column "{sources[0].text_column}" of {sources[0].name} holds no captions')
    try:
        tokenizer = train_tokenizer(captions, recipe.config().vocab_size, **options)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    logger.info("texts     %d tokens learned from %d captions", len(tokenizer), len(captions))
    return tokenizer
