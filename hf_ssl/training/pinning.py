"""A run reads one commit of each dataset on the Hub, however long it takes and how often it is resumed."""

from dataclasses import replace

from hf_ssl.data.sources import pin_revision
from hf_ssl.training.recipes import DataArguments, RecipeError


def pin_datasets(data: DataArguments) -> DataArguments:
    """The data of a recipe with every dataset on the Hub as owner/name@commit.

    Raises:
        DataError: the Hub has no such dataset, or cannot be reached.
        RecipeError: no data are named.
    """
    names = data.dataset
    if not all([names] if isinstance(names, str) else names):
        raise RecipeError("the recipe names no data; give yours with --dataset NAME_OR_FOLDER")
    return replace(
        data,
        dataset=[pin_revision(name) for name in names] if isinstance(names, list) else pin_revision(names),
        probe_dataset=None if data.probe_dataset is None else pin_revision(data.probe_dataset),
    )
