"""What a learned encoder has to beat: pixels as features, and the same encoder with random weights.

Shape suffixes in this file: B = images in a batch, C = channels, H, W = image.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_ssl.evaluation.features import evaluating, forward_inputs, place_inputs
from hf_ssl.modeling.shared.distributed import as_one_process

PIXEL_SIDE = 32  # raw pixels of larger images are averaged down to this side
AVERAGED_SIDE = 8


class PixelExtractor:
    """Pixels as features: "32x32" (the image itself if it is that small) and "8x8", averaged.

    Of clips the mean over time, and beside it the mean change between frames, "motion 8x8".

    The processor's normalisation is undone, so that the floor is the same for every encoder.

    Args:
        mean: per channel, as the processor subtracts it.
        std: per channel, as the processor divides by it.
    """

    def __init__(self, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        self.mean_C11 = torch.tensor(mean)[:, None, None]
        self.std_C11 = torch.tensor(std)[:, None, None]

    @classmethod
    def of(cls, processor: Any) -> "PixelExtractor":
        """The extractor that undoes what `processor` does."""
        if not getattr(processor, "do_normalize", False):
            return cls()
        return cls(processor.image_mean, processor.image_std)

    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Features of one batch, `{"32x32": (B, C * 32 * 32), "8x8": (B, C * 8 * 8)}`."""
        pixels_BCHW = pixel_values.float().cpu() * self.std_C11 + self.mean_C11
        motion = {}
        if pixels_BCHW.dim() == 5:
            change_BCHW = pixels_BCHW.diff(dim=1).abs().mean(dim=1)
            side = f"motion {AVERAGED_SIDE}x{AVERAGED_SIDE}"
            motion = {side: F.adaptive_avg_pool2d(change_BCHW, AVERAGED_SIDE).flatten(1)}
            pixels_BCHW = pixels_BCHW.mean(dim=1)
        sides = (min(PIXEL_SIDE, *pixels_BCHW.shape[2:]), AVERAGED_SIDE)
        pixels = {f"{side}x{side}": F.adaptive_avg_pool2d(pixels_BCHW, side).flatten(1) for side in sides}
        return pixels | motion


def random_encoder(encoder: nn.Module, batches: Iterable[Tensor], seed: int = 0) -> nn.Module:
    """The same architecture with fresh weights; BatchNorm statistics are estimated on data.

    Args:
        encoder: a model of transformers' kind (its class is built again from its config).
        batches: pixel values for the statistics, 2,000 to 5,000 images; not read without BatchNorm.
        seed: of the fresh weights. The global random state is left as it was.

    Raises:
        TypeError: `encoder` is no model of transformers.
    """
    if not isinstance(encoder, PreTrainedModel):
        raise TypeError(
            f"{type(encoder).__name__} is no transformers model that can be built afresh from its config; "
            "pass initial_encoder instead"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = type(encoder)(copy.deepcopy(encoder.config))
    parameter = next(encoder.parameters())
    fresh = fresh.to(parameter.device, parameter.dtype)
    estimate_batchnorm_statistics(fresh, batches)
    return fresh.eval()


def estimate_batchnorm_statistics(encoder: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the running statistics of every BatchNorm to their mean over `batches`; nothing else changes.

    Without it a random network is judged with statistics (0, 1) that fit no data, and a short run with those
    of its augmented views.
    """
    norms: list[Any] = [m for m in encoder.modules() if getattr(m, "running_mean", None) is not None]
    if not norms:
        return
    # Alone: of several processes only the first measures floors.
    with torch.no_grad(), as_one_process(), evaluating(encoder), _collecting(norms):
        for pixel_values in batches:
            forward_inputs(encoder, place_inputs(pixel_values, encoder))
    if any(int(norm.num_batches_tracked) == 0 for norm in norms):
        raise ValueError(
            "there are no images to estimate BatchNorm statistics from; check the source and its limit"
        )


@contextmanager
def _collecting(norms: list[Any]) -> Iterator[None]:
    """Train mode and a plain average for the normalisations alone."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for the mean of all batches
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
