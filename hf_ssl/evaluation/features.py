"""Features of a frozen encoder: which tokens are averaged, and how a whole data set is read.

An encoder is any module whose `forward(pixel_values=...)` returns `last_hidden_state` (tokens or a map)
and perhaps `pooler_output`: our `<M>Model`, `ViTModel` and its relatives, `TimmWrapperModel`.
Shape suffixes in this file: B = images in a batch, T = tokens with prefix, D = width, H, W = grid or image.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.evaluation.images import ImageBatch

Pool = Literal["pooler", "class_token", "mean", "grid2", "last4"]
POOLS: tuple[str, ...] = get_args(Pool)
NUM_LAST = 4  # layers of "last4"


@dataclass
class FeatureSet:
    """Features of one data set: `features[name]` is (images, width) float32; `labels` may be None."""

    features: dict[str, Tensor]
    labels: Tensor | None

    @property
    def num_images(self) -> int:
        """Rows of every feature matrix."""
        return len(next(iter(self.features.values())))

    def to(self, device: torch.device | str) -> "FeatureSet":
        """The same features on another device."""
        moved = {name: feature.to(device) for name, feature in self.features.items()}
        return FeatureSet(moved, None if self.labels is None else self.labels.to(device))


def pool_tokens(
    outputs: Any, pool: str, num_prefix_tokens: int = 0, grid: tuple[int, int] | None = None
) -> Tensor:
    """One vector an image from the outputs of an encoder.

    Args:
        outputs: has `last_hidden_state`, (B, T, D) tokens or a (B, D, H, W) map, and perhaps `pooler_output`.
        pool: "pooler" the model's own; "class_token" the first token; "mean" the mean of all patches;
            "grid2" the mean in each quarter of the grid, concatenated (top left, top right, bottom left,
            bottom right; where a side is odd the middle row or column counts in both halves); "last4" the
            mean of all patches after each of the last four layers, concatenated, before any final norm
            (arXiv 2301.08243, appendix A.1).
        num_prefix_tokens: tokens before the patches; not used for maps.
        grid: rows and columns of the patches, needed by "grid2" of tokens only.

    Returns:
        (B, D), for "grid2" and "last4" (B, 4 D).

    Raises:
        ValueError: `pool` is unknown or this encoder has no such thing.
    """
    _check_pool(pool)
    if pool == "pooler":
        if getattr(outputs, "pooler_output", None) is None:
            raise ValueError('pool "pooler": this encoder has no pooled output; use "mean"')
        return outputs.pooler_output.flatten(1)  # some native CNNs return (B, D, 1, 1)
    if pool == "last4":
        return _pool_last(outputs.hidden_states, num_prefix_tokens)
    hidden = outputs.last_hidden_state
    if pool == "class_token":
        if hidden.ndim != 3 or num_prefix_tokens == 0:
            raise ValueError('pool "class_token": this encoder has no class token; use "mean"')
        return hidden[:, 0]
    if pool == "mean":
        return _mean_of_patches(hidden, num_prefix_tokens)
    return _pool_quarters(as_map(hidden, num_prefix_tokens, grid))


def _mean_of_patches(hidden: Tensor, num_prefix_tokens: int) -> Tensor:
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, num_prefix_tokens:].mean(dim=1)


def _pool_last(states: Any, num_prefix_tokens: int) -> Tensor:
    num_layers = len(states or ()) - 1  # the first is their input
    if num_layers < NUM_LAST:
        raise ValueError(f'pool "last4": this encoder has {max(num_layers, 0)} layers; use "mean"')
    return torch.cat([_mean_of_patches(state, num_prefix_tokens) for state in states[-NUM_LAST:]], dim=1)


def _check_pool(pool: str) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} is unknown; use one of {', '.join(POOLS)}")


def as_map(hidden: Tensor, num_prefix_tokens: int, grid: tuple[int, int] | None) -> Tensor:
    """Patch tokens (B, T, D) as a map (B, D, H, W); a map is returned as it is."""
    if hidden.ndim == 4:
        return hidden
    patches_BND = hidden[:, num_prefix_tokens:]
    if grid is None or grid[0] * grid[1] != patches_BND.shape[1]:
        raise ValueError(
            f'pool "grid2": {patches_BND.shape[1]} patches do not fill the grid {grid}; use "mean"'
        )
    return patches_BND.transpose(1, 2).unflatten(2, grid)


def _pool_quarters(map_BDHW: Tensor) -> Tensor:
    if min(map_BDHW.shape[2:]) < 2:
        raise ValueError(f'pool "grid2": a map of {tuple(map_BDHW.shape[2:])} has no quarters; use "mean"')
    return F.adaptive_avg_pool2d(map_BDHW, 2).permute(0, 2, 3, 1).flatten(1)


def default_pools(encoder: nn.Module, pixel_values: Tensor) -> tuple[str, ...]:
    """Pools worth reporting: "mean" and "grid2", before them "class_token" where the encoder has one.

    A CNN has its global mean alone, as is usual. `pixel_values` is one image or more in the size used.
    """
    with torch.inference_mode(), evaluating(encoder):
        outputs = _forward(encoder, place_inputs(pixel_values[:1], encoder))
    if outputs.last_hidden_state.ndim == 4:
        return ("mean",)
    num_prefix_tokens, grid = token_layout(encoder, outputs, pixel_values)
    pools = ("mean",) if grid is None or min(grid) < 2 else ("mean", "grid2")
    return ("class_token", *pools) if num_prefix_tokens else pools


def token_layout(
    encoder: nn.Module, outputs: Any, pixel_values: Tensor
) -> tuple[int, tuple[int, int] | None]:
    """Number of tokens before the patches, and rows and columns of the patches (None for maps and clips)."""
    hidden = outputs.last_hidden_state
    if hidden.ndim == 4 or pixel_values.ndim == 5:  # a map, or patches of clips, which are not of one grid
        return 0, None
    patch_size = find_patch_size(encoder)
    if patch_size is None:
        raise ValueError(
            f'{type(encoder).__name__} tells no patch_size, so its tokens have no grid; use the pool "pooler"'
        )
    grid = (pixel_values.shape[-2] // patch_size[0], pixel_values.shape[-1] // patch_size[1])
    num_prefix_tokens = hidden.shape[1] - grid[0] * grid[1]
    if num_prefix_tokens < 0:
        raise ValueError(
            f"{hidden.shape[1]} tokens are fewer than the {grid[0]} x {grid[1]} patches of the image"
        )
    return num_prefix_tokens, grid


def find_patch_size(encoder: nn.Module) -> tuple[int, int] | None:
    """From the config, or from the patch embedding where the config has none (timm); None for CNNs."""
    config = getattr(encoder, "config", None)
    for owner in (config, getattr(config, "backbone_config", None), *encoder.modules()):
        size = getattr(owner, "patch_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (size[0], size[1])
    return None


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every sub-module is back in the mode it had.

    `encoder.train()` would not do: a backbone with some normalisations frozen in evaluation mode loses them.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def fast_attention(encoder: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """On a CPU in half precision two matrix products instead of the fused kernel, which emulates it."""
    config = getattr(encoder, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if dtype is None or device.type != "cpu" or before != "sdpa":
        yield
        return
    encoder.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)  # type: ignore[operator]


class FeatureExtractor:
    """Pixels to pooled features of one frozen encoder; changes nothing in it.

    Args:
        encoder: the network, anywhere; it is moved to `device` if that is given.
        pools: which features, see `pool_tokens`.
        device: where the forward runs; by default where the encoder is.
        dtype: reduced precision of the forward (autocast), for instance bfloat16; by default none.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pools: Iterable[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.encoder = encoder if device is None else encoder.to(device)
        self.pools = tuple(pools)
        self.dtype = dtype
        for pool in self.pools:
            _check_pool(pool)
        if not self.pools:
            raise ValueError(f"pools is empty; name at least one of {', '.join(POOLS)}")

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Features of one batch, `{pool: (B, width)}`, float32 on the CPU."""
        inputs = place_inputs(pixel_values, self.encoder)
        autocast = torch.autocast(inputs.device.type, dtype=self.dtype, enabled=self.dtype is not None)
        with evaluating(self.encoder), autocast, fast_attention(self.encoder, inputs.device, self.dtype):
            outputs = _forward(self.encoder, inputs, output_hidden_states="last4" in self.pools)
        layout = (
            token_layout(self.encoder, outputs, pixel_values) if set(self.pools) != {"pooler"} else (0, None)
        )
        # Means of tokens are taken outside autocast and in float32: h is read in full precision.
        pooled = {pool: pool_tokens(_Float32(outputs), pool, *layout) for pool in self.pools}
        return {pool: feature.cpu() for pool, feature in pooled.items()}


class _Float32:
    """The outputs that are pooled, in float32."""

    def __init__(self, outputs: Any) -> None:
        pooled = getattr(outputs, "pooler_output", None)
        self.pooler_output = None if pooled is None else pooled.float()
        self.last_hidden_state = outputs.last_hidden_state.float()
        states = getattr(outputs, "hidden_states", None)
        self.hidden_states = None if states is None else [state.float() for state in states]


def _forward(encoder: nn.Module, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
    options = {"output_hidden_states": True} if output_hidden_states else {}
    outputs = forward_inputs(encoder, pixel_values, **options)
    if getattr(outputs, "last_hidden_state", None) is None:
        raise ValueError(
            f"{type(encoder).__name__} returns no last_hidden_state; evaluate the encoder alone, "
            "for instance AutoModel.from_pretrained(folder), not the pre-training model"
        )
    return outputs


def forward_inputs(encoder: nn.Module, pixel_values: Tensor, **options: Any) -> Any:
    """What the encoder makes of images or clips, whichever it takes."""
    name: Any = getattr(encoder, "main_input_name", "pixel_values")
    return encoder(**{name: pixel_values}, **options)


def place_inputs(pixel_values: Tensor, encoder: nn.Module) -> Tensor:
    """Pixel values on the device and in the precision of the encoder's weights."""
    parameter = next(encoder.parameters(), None)
    return pixel_values if parameter is None else pixel_values.to(parameter.device, parameter.dtype)


def extract_features(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    pools: Iterable[str] = ("mean",),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Features of all images, `{pool: (images, width)}`, float32 on the CPU; the encoder is left as it was.

    Args:
        encoder: the frozen network.
        batches: float pixel values (B, C, H, W) as the image processor makes them.
        pools: which features, see `pool_tokens`.
        device: where the forward runs; by default where the encoder is.
        dtype: autocast type of the forward, by default none.

    Raises:
        ValueError: `batches` is empty or a pool does not exist for this encoder.
    """
    extractor = FeatureExtractor(encoder, pools, device, dtype)
    return collect_features({"": extractor}, (ImageBatch(batch, None, []) for batch in batches)).features


def collect_features(extractors: Mapping[str, Any], batches: Iterable[ImageBatch]) -> FeatureSet:
    """Runs several extractors over one pass through the data.

    Args:
        extractors: name -> function of pixel values (B, C, H, W) that returns `{pool: (B, width)}`.
        batches: images with labels; a list of them may be kept and used again.

    Returns:
        Features named "name pool", or "pool" where the name is empty, and the labels.
    """
    parts: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for batch in batches:
        for name, extractor in extractors.items():
            for pool, feature in extractor(batch.pixel_values).items():
                parts.setdefault(f"{name} {pool}".strip(), []).append(feature.float())
        if batch.labels is not None:
            labels.append(batch.labels)
    if not parts:
        raise ValueError("there are no images to extract features from; check the source and its limit")
    features = {name: torch.cat(part) for name, part in parts.items()}
    return FeatureSet(features, torch.cat(labels) if labels else None)
