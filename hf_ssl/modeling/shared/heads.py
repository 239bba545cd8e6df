"""Projection and prediction heads: stacks of Linear, BatchNorm and ReLU.

The order of `layers` is that of the published code (Linear, norm, ReLU, ..., Linear, norm), so that their
checkpoints map by index.
"""

from torch import Tensor, nn

from hf_ssl.modeling.shared.names import unknown_name_message

LAST_NORMS = ("none", "affine", "scale", "plain")


class MLPHead(nn.Module):
    """Multi-layer perceptron between a feature and the space of a loss.

    Args:
        input_size: width of the feature.
        hidden_size: width of the layers between; unused with one layer.
        output_size: width of the result.
        num_layers: number of Linear layers, >= 1. All but the last are followed by ReLU.
        hidden_norm: BatchNorm with scale and shift before every ReLU.
        last_norm: BatchNorm after the last layer: "none", "affine" (scale and shift), "scale" (no shift),
            "plain" (neither).
        bias: every Linear layer has a bias.

    Raises:
        ValueError: unknown `last_norm`, or `num_layers` below 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int,
        *,
        hidden_norm: bool,
        last_norm: str,
        bias: bool,
    ) -> None:
        super().__init__()
        if last_norm not in LAST_NORMS:
            raise ValueError(unknown_name_message("last_norm", last_norm, LAST_NORMS))
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        layers: list[nn.Module] = []
        width = input_size
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(width, hidden_size, bias=bias))
            if hidden_norm:
                layers.append(nn.BatchNorm1d(hidden_size))
            layers.append(nn.ReLU())
            width = hidden_size
        layers.append(nn.Linear(width, output_size, bias=bias))
        if last_norm != "none":
            layers.append(_last_norm(output_size, last_norm))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, input_size) to (B, output_size)."""
        projections: Tensor = self.layers(features)
        return projections


def _last_norm(width: int, kind: str) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(width, affine=kind != "plain")
    if kind == "scale":
        norm.register_parameter("bias", None)
    return norm
