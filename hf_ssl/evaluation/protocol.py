"""The one protocol by which encoders are scored, always beside what they have to beat.

Rows: raw pixels, pixels averaged to 8 x 8, the same encoder with random weights (or its weights at step 0),
the encoder. Columns: kNN plain, centred and standardised, and a linear probe. All rows see the same images,
processed alike, in one pass through the data. The test set chooses nothing.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.evaluation.baselines import PixelExtractor, random_encoder
from hf_ssl.evaluation.checks import check_labels
from hf_ssl.evaluation.features import FeatureExtractor, FeatureSet, collect_features, default_pools
from hf_ssl.evaluation.images import ImageBatch, Source, read_batches, source_name
from hf_ssl.evaluation.knn import knn_accuracy
from hf_ssl.evaluation.linear_probe import LinearProbe, fit_linear_probe, fit_linear_probe_sgd

logger = logging.getLogger(__name__)

ENCODER, RANDOM, PIXELS = "encoder", "random init", "pixels"
START = "start"  # the encoder at step 0 of a run that began from a trained one
NUM_STATISTICS_IMAGES = 2048  # for BatchNorm statistics of the random network
KNN_COLUMNS = ("knn", "knn_centered", "knn_standardized")


@dataclass(frozen=True)
class ScoreRow:
    """Accuracies of one kind of features, between 0 and 1."""

    features: str
    pool: str
    width: int
    knn: float
    knn_centered: float
    knn_standardized: float
    linear: float | None
    l2_strength: float | None = None

    @property
    def best_knn(self) -> float:
        """The best of the three."""
        return max(self.knn, self.knn_centered, self.knn_standardized)


@dataclass(frozen=True)
class Scores:
    """All rows of one evaluation and the settings they share."""

    rows: list[ScoreRow]
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"protocol": self.protocol, "rows": [asdict(row) for row in self.rows]}

    def margins(self, pool: str) -> dict[str, float]:
        """How far the encoder is above its highest floor; more than 0.03 at 2,000 test images counts.

        Floors are all pixel rows and the encoder of step 0 with the same pool.
        """
        own = [row for row in self.rows if row.features == ENCODER and row.pool == pool]
        if not own:
            raise ValueError(
                f"pool {pool!r} was not scored; scored are {sorted({row.pool for row in self.rows})}"
            )
        floors = [
            r for r in self.rows if r.features == PIXELS or (r.features in (RANDOM, START) and r.pool == pool)
        ]
        if not floors:
            raise ValueError("there are no floors in these scores; evaluate with floors=True")
        margins = {"knn": own[0].best_knn - max(row.best_knn for row in floors)}
        if own[0].linear is not None:
            margins["linear"] = own[0].linear - max(row.linear or 0.0 for row in floors)
        return margins

    def table(self) -> str:
        """The rows as a table of percentages, readable as text and as Markdown."""
        head = ["features", "pool", "width", "kNN", "kNN centred", "kNN standardised", "linear"]
        body = [
            [
                r.features,
                r.pool,
                str(r.width),
                *(_percent(getattr(r, name)) for name in (*KNN_COLUMNS, "linear")),
            ]
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [head, ["-" * width for width in widths], *body]
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        )


def evaluate_encoder(
    encoder: nn.Module,
    processor: Any,
    train_source: Source,
    test_source: Source,
    pools: Sequence[str] | None = None,
    *,
    floors: bool = True,
    initial_encoder: nn.Module | None = None,
    num_neighbors: int = 20,
    temperature: float = 0.07,
    probe: str = "lbfgs",
    batch_size: int = 256,
    train_limit: int | None = None,
    test_limit: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Scores:
    """Scores an encoder and its floors by kNN and linear probe; the encoder is left as it was.

    Args:
        encoder: the frozen network.
        processor: its image processor.
        train_source: labelled images: bank of the kNN, training set of the probe. An `ImageSource`, a list of
            rows, or a list of `ImageBatch` that `read_batches` made (to use them again and again).
        test_source: labelled images that are scored, likewise.
        pools: which features, see `pool_tokens`; by default those worth reporting for this kind of encoder.
        floors: whether pixels and random weights are scored too.
        initial_encoder: the network at step 0 of its own training; by default fresh weights are drawn.
        num_neighbors: of the kNN.
        temperature: of the kNN.
        probe: "lbfgs", "sgd" (large training sets) or "none".
        batch_size: images a forward.
        train_limit: at most so many training images, evenly spread over the source.
        test_limit: at most so many test images.
        device: where encoder, kNN and probe run.
        dtype: autocast type of the forwards.

    Raises:
        ValueError: no images, no labels, one class only, an unknown pool or probe.
    """
    _probe_named(probe)
    # The first batches are looked at before the long work: a missing label must not show at its end.
    train_batches, first = _look_ahead(_batches(train_source, processor, batch_size, train_limit), "train")
    test_batches, _ = _look_ahead(_batches(test_source, processor, batch_size, test_limit), "test")
    pools = tuple(pools) if pools is not None else default_pools(encoder, first.pixel_values)
    extractors: dict[str, Any] = {}
    if floors:
        if initial_encoder is None:
            again = _batches(train_source, processor, batch_size, train_limit)
            initial_encoder = random_encoder(encoder, _pixels(again, NUM_STATISTICS_IMAGES))
        extractors = {
            PIXELS: PixelExtractor.of(processor),
            RANDOM: FeatureExtractor(initial_encoder, pools, device, dtype),
        }
    extractors[ENCODER] = FeatureExtractor(encoder, pools, device, dtype)
    train = collect_features(extractors, train_batches)
    test = collect_features(extractors, test_batches)
    _warn_of_unseen_classes(train, test)
    rows = score_features(
        train, test, num_neighbors=num_neighbors, temperature=temperature, probe=probe, device=device
    )
    protocol = {
        "train": _name(train_source),
        "test": _name(test_source),
        "train_images": train.num_images,
        "test_images": test.num_images,
        "num_neighbors": num_neighbors,
        "temperature": temperature,
        "probe": probe,
    }
    return Scores(rows, protocol)


def score_features(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_neighbors: int = 20,
    temperature: float = 0.07,
    probe: str = "lbfgs",
    device: torch.device | str | None = None,
) -> list[ScoreRow]:
    """One row for each kind of features in `train`, named "features pool" with the pool as last word."""
    fit = _probe_named(probe)
    train, test = (features if device is None else features.to(device) for features in (train, test))
    rows = []
    for name, bank in train.features.items():
        query = test.features[name]
        knn = partial(
            knn_accuracy,
            bank,
            train.labels,
            query,
            test.labels,
            num_neighbors=num_neighbors,
            temperature=temperature,
        )
        fitted = fit(bank, train.labels) if fit else None
        features, _, pool = name.rpartition(" ")
        row = ScoreRow(
            features=features or ENCODER,
            pool=pool,
            width=bank.shape[1],
            knn=knn().top1,
            knn_centered=knn(center=True).top1,
            knn_standardized=knn(standardize=True).top1,
            linear=fitted.accuracy(query, test.labels) if fitted else None,
            l2_strength=fitted.chosen if fitted and probe == "lbfgs" else None,
        )
        rows.append(row)
    return rows


def _warn_of_unseen_classes(train: FeatureSet, test: FeatureSet) -> None:
    assert train.labels is not None and test.labels is not None
    unseen = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        logger.warning(
            "%d classes of the test images have no training image (first: %d); raise train_limit, or shuffle "
            "a stream that is sorted by class",
            len(unseen),
            unseen[0],
        )


def _probe_named(name: str) -> Callable[[Tensor, Tensor | None], LinearProbe] | None:
    probes = {"lbfgs": fit_linear_probe, "sgd": fit_linear_probe_sgd, "none": None}
    if name not in probes:
        raise ValueError(f"probe {name!r} is unknown; use one of {', '.join(probes)}")
    return probes[name]


def _batches(source: Source, processor: Any, batch_size: int, limit: int | None) -> Iterator[ImageBatch]:
    if isinstance(source, list) and source and isinstance(source[0], ImageBatch):
        return iter(source)
    return read_batches(source, processor, batch_size, limit)


def _name(source: Source) -> str:
    if isinstance(source, list) and source and isinstance(source[0], ImageBatch):
        return f"{sum(len(batch.row_ids) for batch in source)} images in memory"
    return source_name(source)


def _pixels(batches: Iterable[ImageBatch], num_images: int) -> Iterator[Tensor]:
    seen = 0
    for batch in batches:
        if seen >= num_images:
            return
        seen += len(batch.row_ids)
        yield batch.pixel_values


def _look_ahead(batches: Iterator[ImageBatch], name: str) -> tuple[Iterator[ImageBatch], ImageBatch]:
    """The same batches, and the first of them, which must have labels."""
    first = next(batches, None)
    if first is None:
        raise ValueError(f"the {name} source has no readable image; check its path, split and limit")
    check_labels(first.labels, len(first.pixel_values), name=f"{name} labels")
    return chain([first], batches), first


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
