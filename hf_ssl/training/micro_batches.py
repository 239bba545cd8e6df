"""The micro-batches of one optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]


TOKENS = ("input_ids", "attention_mask")  # of batches whose texts are tokens already


def model_inputs(
    batches: list[Batch],
    rank: int,
    world_size: int,
    tokenize: Callable[[list[str]], Batch] | None = None,
) -> list[Batch]:
    """What forwards take of the batches; row i of micro-batch j is number (j * W + r) * B + i of the step.

    Args:
        batches: of the loader.
        rank: r, the number of this process.
        world_size: W, of all.
        tokenize: makes tokens of texts, for methods that learn from them.
    """
    numbered = []
    for index, batch in enumerate(batches):
        inputs = {name: value for name, value in batch.items() if "pixel_values" in name or name in TOKENS}
        if tokenize is not None and "text" in batch:
            inputs |= tokenize(batch["text"])
        size = len(next(iter(inputs.values())))
        first = (index * world_size + rank) * size
        numbered.append(inputs | {"row_index": torch.arange(first, first + size)})
    return numbered


def normalize_bytes(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (..., C, H, W) as floats with the processor's mean and deviation, on the device they are on."""
    mean_C11, std_C11 = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (mean, std))
    return pixels.float().div_(255 * std_C11).sub_(mean_C11 / std_C11)


class PreparedOnAccess(Sequence[Batch]):
    """Batches that are prepared when read, so that a step never holds all of them as floats.

    Args:
        batches: as they come from the loader.
        prepare: moves and normalises one.
    """

    def __init__(self, batches: list[Batch], prepare: Callable[[Batch], Batch]) -> None:
        self._batches = batches
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._prepare(self._batches[index])
