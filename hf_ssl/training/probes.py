"""Online probes: does the encoder learn, beside its own first step and raw pixels?"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_ssl.evaluation.baselines import estimate_batchnorm_statistics
from hf_ssl.evaluation.features import default_pools
from hf_ssl.evaluation.images import ImageBatch, read_batches
from hf_ssl.evaluation.protocol import (
    ENCODER,
    NUM_STATISTICS_IMAGES,
    PIXELS,
    RANDOM,
    ScoreRow,
    Scores,
    evaluate_encoder,
)
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining

logger = logging.getLogger(__name__)


class OnlineProbe:
    """Weighted kNN and a linear probe on labelled images, with floors measured once at the start.

    Args:
        bank: labelled images that neighbours are taken from and the linear probe is fitted on.
        query: labelled images that are scored.
        processor: the image processor.
        pools: features to probe, see `hf_ssl.evaluation.features.pool_tokens`; None: what suits the encoder.
        num_neighbors: of the kNN.
        linear: also fit a linear probe.
        limit: at most so many images of each.
        dtype: autocast type of the forwards.
        started_as: what the encoder is before step one: random, or trained before (`START`).
    """

    def __init__(
        self,
        bank: Any,
        query: Any,
        processor: Any,
        pools: Sequence[str] | None = None,
        num_neighbors: int = 20,
        linear: bool = True,
        limit: int = 2000,
        dtype: torch.dtype | None = None,
        started_as: str = RANDOM,
    ) -> None:
        self.started_as = started_as
        # Decoded once: a probe must cost a small share of training.
        self.bank: list[ImageBatch] = list(read_batches(bank, processor, limit=limit))
        self.query: list[ImageBatch] = list(read_batches(query, processor, limit=limit))
        self.processor = processor
        self.pools = pools
        self.settings: dict[str, Any] = {
            "num_neighbors": num_neighbors,
            "probe": "lbfgs" if linear else "none",
            "dtype": dtype,
        }
        self.floors: Scores | None = None
        self.scores: Scores | None = None

    def measure_floors(self, model: SSLForPreTraining) -> Scores:
        """Score raw pixels and the encoder as it stands before training; keep both for all later tables."""
        encoder = self._choose_pools(model)
        scores = self._score(encoder, initial_encoder=self._with_statistics(encoder))
        rows = [
            replace(row, features=self.started_as) if row.features == RANDOM else row
            for row in scores.rows
            if row.features != ENCODER
        ]
        self.floors = Scores(rows, scores.protocol)
        return self.floors

    def restore_floors(self, model: SSLForPreTraining, stored: dict[str, Any]) -> None:
        """Take the floors that the run measured when it started."""
        self._choose_pools(model)
        self.floors = Scores([ScoreRow(**row) for row in stored["rows"]], stored["protocol"])

    def named_floors(self) -> dict[str, float]:
        """`pixels_knn`, and `random_init_knn` or `start_knn`, and so on, the best of each kind."""
        rows = self.floors.rows if self.floors else []
        return {
            f"{features.replace(' ', '_')}_{score}": value
            for features in (PIXELS, self.started_as)
            for score, value in self._best(rows, features).items()
        }

    def _choose_pools(self, model: SSLForPreTraining) -> nn.Module:
        encoder = _encoder(model)
        if not self.bank:
            raise ValueError(
                "the probe has no readable image; the log says why, name others with probe_dataset"
            )
        self.pools = self.pools or default_pools(encoder, self.bank[0].pixel_values)
        return encoder

    def __call__(self, model: SSLForPreTraining) -> dict[str, float]:
        """Named scores of the published branch, between 0 and 1."""
        floors = self.floors.rows if self.floors else []
        scores = self._score(_encoder(model), floors=False)
        self.scores = Scores([*floors, *scores.rows], scores.protocol)
        return self._best(scores.rows, ENCODER)

    def _score(self, encoder: nn.Module, **kwargs: Any) -> Scores:
        return evaluate_encoder(
            encoder, self.processor, self.bank, self.query, self.pools, **self.settings, **kwargs
        )

    def _best(self, rows: Sequence[Any], features: str) -> dict[str, float]:
        """Scores of the first pool; pixels have none, so their best row counts."""
        own = [row for row in rows if row.features == features]
        if features != PIXELS:
            own = own[:1]
        if not own:
            return {}
        best = {"knn": round(max(row.best_knn for row in own), 4)}
        linear = [row.linear for row in own if row.linear is not None]
        if linear:
            best["linear"] = round(max(linear), 4)
        return best

    def _with_statistics(self, encoder: nn.Module) -> nn.Module:
        """A copy whose BatchNorm statistics fit the data, as a trained network's do."""
        initial = copy.deepcopy(encoder)
        seen, batches = 0, []
        for batch in self.bank:
            if seen < NUM_STATISTICS_IMAGES:
                batches.append(batch.pixel_values)
                seen += len(batch.pixel_values)
        estimate_batchnorm_statistics(initial, batches)
        return initial.eval()


def _encoder(model: SSLForPreTraining) -> nn.Module:
    branch: Any = model.published_branch()
    encoder: nn.Module = branch.backbone
    return encoder
