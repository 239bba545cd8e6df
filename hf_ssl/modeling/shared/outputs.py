"""What a pre-training forward returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class SSLOutput(ModelOutput):
    """Result of one pre-training forward; everything but `loss` and `embeddings` is detached.

    Attributes:
        loss: scalar to minimise, mean over the images of this process.
        parts: named scalars worth logging beside the loss, e.g. accuracies.
        features: backbone features (B, D) or tokens (B, N, D) that the diagnostics read.
        projections: head outputs (B, D) that the diagnostics read.
        predictions: reconstructed patches (B, N, P) of masked methods.
        is_masked: (B, N) bool, True = hidden from the encoder.
        updates: what `end_step` needs from this micro-batch.
        embeddings: what `loss_from_embeddings` takes, with its graph; alone where `embed_only` asked for it.
    """

    loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    features: Tensor | None = None
    projections: Tensor | None = None
    predictions: Tensor | None = None
    is_masked: Tensor | None = None
    updates: dict[str, Tensor] | None = None
    embeddings: dict[str, Tensor] | None = None
