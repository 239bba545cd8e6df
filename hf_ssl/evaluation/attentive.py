"""Attentive probe: a learned query pools the patches of a frozen encoder, a linear layer names the class.

Source: Bardes et al. 2024 (arXiv 2404.08471), section 4.1, as the authors' `attentive_pooler.py` has it: keys
and values are normed, the query is not, and the output projection that the file declares is never applied.
Features are computed once, without augmentation.
Shape suffixes: N = images, T = patches, D = width, C = classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.evaluation.baselines import random_encoder
from hf_ssl.evaluation.checks import check_labels
from hf_ssl.evaluation.dense import patch_tokens
from hf_ssl.evaluation.images import ImageBatch, Source, read_batches
from hf_ssl.evaluation.metrics import top_k_accuracy
from hf_ssl.evaluation.protocol import ENCODER, NUM_STATISTICS_IMAGES, RANDOM

MOST_GRADIENT = 1.0  # clipping
MLP_RATIO = 4
WIDTH_OF_HEAD = 64  # where the encoder has none


@dataclass(frozen=True)
class AttentiveScore:
    """Accuracy of one kind of features on the test images, between 0 and 1."""

    features: str
    top1: float


class AttentivePooler(nn.Module):
    """One query that looks at all patches, and an MLP on what it found.

    Args:
        width: D.
        num_heads: divides D.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"{num_heads} heads do not divide features of width {width}; give another number"
            )
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.layernorm_before = nn.LayerNorm(width, eps=1e-6)
        self.q_proj, self.kv_proj = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
        for tensor in (self.query, self.q_proj.weight, self.kv_proj.weight, self.fc1.weight, self.fc2.weight):
            nn.init.trunc_normal_(tensor, std=0.02)
        for layer in (self.q_proj, self.kv_proj, self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, patches_NTD: Tensor) -> Tensor:
        """Pooled features (N, D)."""
        keys, values = self.kv_proj(self.layernorm_before(patches_NTD)).chunk(2, dim=-1)
        query = self.q_proj(self.query).expand(len(patches_NTD), -1, -1)
        heads = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, keys, values))
        found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        pooled = self.query + found
        return (pooled + self.fc2(F.gelu(self.fc1(self.layernorm_after(pooled)))))[:, 0]


def evaluate_attentive(
    encoder: nn.Module,
    processor: Any,
    train_source: Source,
    test_source: Source,
    *,
    epochs: int = 20,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
) -> list[AttentiveScore]:
    """Scores the patches of an encoder, and of the same encoder with random weights.

    Args:
        encoder: the frozen network.
        processor: its image processor.
        train_source: labelled images that the probe learns from; their features stay in memory.
        test_source: labelled images that are scored once, at the end.
        epochs: passes over the training images.
        train_limit: at most so many training images, evenly spread.
        test_limit: at most so many test images.
        seed: of the probe's start and order.

    Returns:
        The floor, then the encoder.

    Raises:
        ValueError: no images, no labels, one class only, or no epoch.
    """
    if epochs < 1:
        raise ValueError(f"an attentive probe needs at least 1 epoch, got {epochs}")
    train = list(read_batches(train_source, processor, limit=train_limit))
    test = list(read_batches(test_source, processor, limit=test_limit))
    train_labels, test_labels = (
        check_labels(
            _labels(part), sum(len(batch.pixel_values) for batch in part), several=several, name=name
        )
        for part, several, name in ((train, True, "train labels"), (test, False, "test labels"))
    )
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    pixels = [batch.pixel_values for batch in train]
    fresh = random_encoder(encoder, pixels[: max(NUM_STATISTICS_IMAGES // len(pixels[0]), 1)])
    scores = []
    for name, network in ((RANDOM, fresh), (ENCODER, encoder)):
        patches = _patches(network, train)
        heads = _heads_of(network, patches.shape[-1])
        probe = fit_attentive_probe(patches, train_labels, num_classes, heads, epochs=epochs, seed=seed)
        with torch.inference_mode():
            found = torch.cat([probe(_patches(network, [batch])) for batch in test])
        scores.append(AttentiveScore(name, top_k_accuracy(found, test_labels, 1)))
    return scores


def fit_attentive_probe(
    patches_NTD: Tensor,
    labels_N: Tensor,
    num_classes: int,
    num_heads: int,
    *,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> nn.Module:
    """Pooler and linear layer, trained on frozen patches; the global random state is left as it was.

    Args:
        patches_NTD: frozen features.
        labels_N: their classes.
        num_classes: C.
        num_heads: of the pooler.
        epochs: passes over the images.
        learning_rate: of AdamW; half a cosine to 0 without warm-up.
        weight_decay: of AdamW.
        batch_size: images a step.
        seed: of the start and the order.

    Raises:
        ValueError: the heads do not divide the width.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = patches_NTD.shape[-1]
        probe = nn.Sequential(AttentivePooler(width, num_heads), nn.Linear(width, num_classes))
    optimizer = torch.optim.AdamW(probe.parameters(), learning_rate, weight_decay=weight_decay)
    num_steps = epochs * -(-len(labels_N) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(epochs):
        for index in torch.randperm(len(labels_N), generator=generator).split(batch_size):
            loss = F.cross_entropy(probe(patches_NTD[index]), labels_N[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), MOST_GRADIENT)
            optimizer.step()
            schedule.step()
    return probe.eval()


def _patches(encoder: nn.Module, batches: list[ImageBatch]) -> Tensor:
    return torch.cat([patch_tokens(encoder, batch.pixel_values).clone() for batch in batches])


def _labels(batches: list[ImageBatch]) -> Tensor | None:
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return torch.cat(labels) if labels else None


def _heads_of(encoder: Any, width: int) -> int:
    config = getattr(encoder.config, "backbone_config", None) or encoder.config
    return int(getattr(config, "num_attention_heads", None) or max(width // WIDTH_OF_HEAD, 1))
