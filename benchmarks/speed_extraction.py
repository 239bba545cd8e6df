"""Features, kNN and linear probe beside transformers, scikit-learn and faiss, on one thread.

    python benchmarks/speed_extraction.py [--data ../shared/data] [--rounds 5]

Features are those of a ViT-Ti/16 of transformers with random weights, from PIL images of photographs; ours
are what `hf-ssl embed` computes. kNN runs on drawn clusters, the probe on pixels of CIFAR-10.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch
from interleaved import (
    Gate,
    Part,
    in_fresh_process,
    interleave,
    option_parser,
    peak_memory,
    speedup_gate,
    timing_rows,
)
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessor, ViTModel, pipeline

from hf_ssl.data.sources import open_images
from hf_ssl.evaluation.embeddings import embed
from hf_ssl.evaluation.images import read_batches
from hf_ssl.evaluation.knn import nearest_neighbors
from hf_ssl.evaluation.linear_probe import fit_linear_probe
from hf_ssl.modeling.shared.precision import has_fast_bf16

NUM_NEIGHBORS = 20
# Where an aim is missed.
FEATURES_NOTE = "the forward alone gains 1.6 from bf16 here; tried: batches of 1 to 24, bf16 weights (1.7)"
KNN_NOTE = (
    "tried: selection by blocks, candidates in bf16, chunks of 64 to 512; two thirds are the product itself"
)
STRENGTHS = [10.0**-power for power in range(1, 9)]

Run = Callable[[], Any]


def photographs(folder: Path, count: int = 24) -> list[Image.Image]:
    """Photographs of 500 x 375."""
    paths = sorted(folder.glob("photos/*.jpg"))
    pictures = [Image.open(path).convert("RGB").resize((500, 375)) for path in paths]
    return [pictures[number % len(pictures)] for number in range(count)]


def clusters(num_vectors: int, width: int, num_classes: int, spread: float) -> tuple[Tensor, Tensor]:
    """Vectors around as many centres as there are classes, and their classes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_classes, width, generator=generator)
    labels = torch.randint(0, num_classes, (num_vectors,), generator=generator)
    return centers[labels] + spread * torch.randn(num_vectors, width, generator=generator), labels


def extraction(pictures: list[Image.Image]) -> dict[str, Run]:
    """One call gives class tokens of all pictures."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    model = ViTModel(config, add_pooling_layer=False).eval()
    processor = ViTImageProcessor(size={"height": 224, "width": 224})
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor)
    rows = [{"image": picture} for picture in pictures]

    def ours(dtype: torch.dtype | None) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            path = embed(
                model, processor, rows, Path(folder) / "f.parquet", "class_token", batch_size=8, dtype=dtype
            )
            return torch.tensor(pq.read_table(path)["features"].to_pylist())

    def transformers_pipeline(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            tokens = [extract(picture, return_tensors=True) for picture in pictures]
        return torch.stack([token[0, 0].float() for token in tokens])

    def loop(dtype: torch.dtype | None) -> Tensor:
        features = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            for picture in pictures:
                inputs = processor(images=picture, return_tensors="pt")
                features.append(model(**inputs).last_hidden_state[0, 0].float())
        return torch.stack(features)

    batches = [batch.pixel_values for batch in read_batches(rows, processor, 8)]

    def forward_alone() -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(batch).last_hidden_state[:, 0] for batch in batches])

    runs: dict[str, Run] = {"bare forward fp32": forward_alone}
    for name, run in (("pipeline", transformers_pipeline), ("loop", loop), ("ours", ours)):
        runs[f"{name} fp32"] = lambda run=run: run(None)  # type: ignore[misc]
        if has_fast_bf16("cpu"):  # it is emulated elsewhere
            runs[f"{name} bf16"] = lambda run=run: run(torch.bfloat16)  # type: ignore[misc]
    expected = runs["pipeline fp32"]()
    for name, run_ in runs.items():
        cosine = F.cosine_similarity(run_(), expected).min()
        assert cosine > (0.999 if "bf16" in name else 0.99999), f"{name} gives other features: {cosine}"
    return runs


def neighbors(num_vectors: int = 50_000, width: int = 384, num_queries: int = 1000) -> dict[str, Run]:
    """One call finds the nearest vectors of all queries."""
    vectors = F.normalize(clusters(num_vectors + num_queries, width, 100, 1.5)[0], dim=1)
    query, bank = vectors[:num_queries], vectors[num_queries:]
    index = faiss.IndexFlatIP(width)
    index.add(bank.numpy())
    sklearn_index = NearestNeighbors(
        n_neighbors=NUM_NEIGHBORS, metric="cosine", algorithm="brute", n_jobs=1
    ).fit(bank.numpy())
    runs: dict[str, Run] = {
        "scikit-learn": lambda: sklearn_index.kneighbors(query.numpy(), return_distance=False),
        "faiss": lambda: index.search(query.numpy(), NUM_NEIGHBORS)[1],
        "torch topk": lambda: (query @ bank.T).topk(NUM_NEIGHBORS).indices.numpy(),
        "ours": lambda: nearest_neighbors(query, bank, NUM_NEIGHBORS)[1].numpy(),
    }
    expected = np.sort(runs["torch topk"](), axis=1)
    for name, run in runs.items():
        assert (np.sort(run(), axis=1) == expected).all(axis=1).mean() > 0.995, f"{name}: other neighbours"
    return runs


def pixels(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 averaged to 12 x 12 pixels, standardised: correlated features, as real ones are."""
    rows = list(open_images(str(folder / "cifar10"), split=split).rows())
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    small = np.stack([np.asarray(picture.resize((12, 12), Image.Resampling.BOX)) for picture in pictures])
    features = torch.from_numpy(small.reshape(len(rows), -1)).float()
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    return features, torch.tensor([row["label"] for row in rows])


def probes(folder: Path) -> dict[str, Run]:
    """One call fits classifiers of eight strengths of L2, chooses one on a part and fits it to all."""
    (features, labels), test = pixels(folder, "train"), pixels(folder, "test")
    num_held_out = len(features) // 5

    def sklearn_sweep() -> float:
        def fit(strength: float, first: int) -> LogisticRegression:
            inverse = 1 / (strength * (len(features) - first))
            return LogisticRegression(C=inverse, max_iter=100).fit(features[first:], labels[first:])

        held_out = features[:num_held_out], labels[:num_held_out]
        scores = {strength: fit(strength, num_held_out).score(*held_out) for strength in STRENGTHS}
        best = max(STRENGTHS, key=lambda strength: scores[strength])
        return float(fit(best, 0).score(*test))

    def ours() -> float:
        return fit_linear_probe(features, labels, STRENGTHS).accuracy(*test)

    runs: dict[str, Run] = {"scikit-learn, one by one": sklearn_sweep, "ours": ours}
    theirs, own = (run() for run in runs.values())
    # Two points: they hold out other images, and 100 iterations of scikit-learn do not converge.
    assert abs(theirs - own) <= 0.02, f"accuracies differ: {theirs}, {own}"
    return runs


def knn_memory(side: str) -> float:
    """MiB of one search above what stands before it; for a process of its own."""
    run = neighbors()[side]
    return peak_memory(run)


def main() -> None:
    """Time everything and write the report, or print the memory of one side."""
    parser = option_parser(__doc__, rounds=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if options.memory:
        print(json.dumps(knn_memory(options.memory)))
        return
    pictures = photographs(options.data)
    features = interleave(extraction(pictures), reference="pipeline fp32", rounds=options.rounds)
    knn = interleave(neighbors(), reference="scikit-learn", rounds=options.rounds)
    probe = interleave(
        probes(options.data),
        reference="scikit-learn, one by one",
        rounds=min(options.rounds, 2),
        warm_up=0,
    )
    memory = {side: in_fresh_process("speed_extraction.py", "--memory", side) for side in knn}
    what = "features, ViT-Ti/16"
    gates = []
    if "ours bf16" in features:
        own = "ours bf16"
        gates += [
            speedup_gate(f"{what}, bf16", features, "pipeline fp32", 1.9, own=own, note=FEATURES_NOTE),
            speedup_gate(f"{what}, bf16", features, "pipeline bf16", own=own),
        ]
    gates += [
        speedup_gate(f"{what}, fp32", features, "pipeline fp32", own="ours fp32"),
        speedup_gate(f"{what}, fp32", features, "loop fp32", own="ours fp32"),
        speedup_gate(f"{what}, fp32", features, "bare forward fp32", own="ours fp32"),
        speedup_gate("kNN, 50,000 x 384", knn, "scikit-learn", 6, note=KNN_NOTE),
        speedup_gate("kNN, 50,000 x 384", knn, "faiss", 1.1, note=KNN_NOTE),
        Gate("kNN, peak memory", "scikit-learn", memory["ours"] / memory["scikit-learn"], 0.5, at_most=True),
        speedup_gate("linear probe, eight strengths", probe, "scikit-learn, one by one", 5),
    ]
    body = [
        "One thread. Features: class tokens of 24 photographs by a ViT-Ti/16 of transformers with random "
        "weights, from PIL images; ours are written to a parquet file. kNN: 1,000 queries. Probe: CIFAR-10 "
        "as 12 x 12 pixels, 10,000 images, the strength chosen on a part of them and fitted to all.",
        "",
        *timing_rows(features, len(pictures), "images"),
        "",
        *timing_rows(knn, 1000, "queries"),
        "",
        "Peak MiB of kNN: " + ", ".join(f"{side} {value:.0f}" for side, value in memory.items()) + ".",
        "",
        *timing_rows(probe, 1, "sweeps"),
    ]
    data = {
        "seconds": {n: t.seconds for part in (features, knn, probe) for n, t in part.items()},
        "memory": memory,
    }
    Part("speed_extraction", "Features, kNN, probe", "speed_extraction.py", body, gates, data).write()


if __name__ == "__main__":
    main()
