"""Retrieval between images and their captions: recall at k and ranks, both ways, beside chance.

Protocol of the published evaluations: up to five captions an image; a text has found its image, an image any
of its captions, within the k best by cosine.
Shape suffixes: N = images, M = texts, E = embedding width, Q = queries, C = candidates.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ssl.data.captions import captions_of
from hf_ssl.data.sources import DataError
from hf_ssl.evaluation.image_text import ImageTextEncoder
from hf_ssl.evaluation.images import decode_picture, source_name
from hf_ssl.modeling.shared.losses import normalize

DEPTHS = (1, 5, 10)
CAPTIONS_PER_IMAGE = 5
CHUNK = 512  # queries ranked at once


@dataclass(frozen=True)
class Ranking:
    """One direction.

    Attributes:
        recall: share of queries with a right answer among the k best, by k.
        chance: the same of a random order.
        median_rank: of the best right answer; 1 is first.
        mean_rank: of the same.
    """

    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class RetrievalScores:
    """Both directions, and on what.

    Attributes:
        text_to_image: texts look for their image.
        image_to_text: images look for any of their captions.
        num_images: of the gallery.
        num_texts: of all captions.
        dataset: where they are from.
    """

    text_to_image: Ranking
    image_to_text: Ranking
    num_images: int
    num_texts: int
    dataset: str

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def table(self) -> str:
        """For people."""
        head = f"{'retrieval':15}" + "".join(f"{f'R@{k}':>8}" for k in DEPTHS) + f"{'median rank':>13}"
        lines = [f"{self.dataset}: {self.num_images} images, {self.num_texts} captions", head]
        for name, ranking, gallery in (
            ("text to image", self.text_to_image, self.num_images),
            ("image to text", self.image_to_text, self.num_texts),
        ):
            shown = "".join(f"{100 * ranking.recall[k]:8.1f}" for k in DEPTHS)
            chance = "".join(f"{100 * ranking.chance[k]:8.1f}" for k in DEPTHS)
            lines.append(f"{name:15}{shown}{ranking.median_rank:13.0f}")
            lines.append(f"{'  by chance':15}{chance}{f'of {gallery}':>13}")
        return "\n".join(lines)


def score_retrieval(
    image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor, dataset: str = ""
) -> RetrievalScores:
    """Rank all images for every text and all texts for every image.

    Args:
        image_NE: image embeddings, any norm.
        text_ME: text embeddings, any norm.
        image_of_text_M: row of the image that each text describes.
        dataset: name for the report.

    Raises:
        ValueError: numbers do not fit, or an image has no text.
    """
    num_images, num_texts = len(image_NE), len(text_ME)
    if len(image_of_text_M) != num_texts or set(image_of_text_M.tolist()) != set(range(num_images)):
        raise ValueError(
            f"{num_texts} texts and {len(image_of_text_M)} image numbers for {num_images} images; every text "
            "needs its image, and every image at least one text"
        )
    image_NE, text_ME = normalize(image_NE), normalize(text_ME)
    of_texts = _ranks(text_ME, image_NE, image_of_text_M)
    of_captions = _ranks(image_NE[image_of_text_M], text_ME, torch.arange(num_texts))
    best = torch.full((num_images,), num_texts, dtype=torch.long)
    best = best.scatter_reduce(0, image_of_text_M, of_captions, "amin")
    counts = image_of_text_M.bincount(minlength=num_images).tolist()
    return RetrievalScores(
        text_to_image=_ranking(of_texts, num_images, [1]),
        image_to_text=_ranking(best, num_texts, counts),
        num_images=num_images,
        num_texts=num_texts,
        dataset=dataset,
    )


def _ranks(query_QE: Tensor, candidate_CE: Tensor, right_Q: Tensor) -> Tensor:
    """Rank, from 1, of the right candidate of each query; of equal scores the lower number is first."""
    numbers_C = torch.arange(len(candidate_CE))
    ranks = []
    for queries, right in zip(query_QE.split(CHUNK), right_Q.split(CHUNK), strict=True):
        scores_QC = queries @ candidate_CE.T
        own_Q1 = scores_QC.gather(1, right[:, None])
        is_before = (scores_QC > own_Q1) | ((scores_QC == own_Q1) & (numbers_C < right[:, None]))
        ranks.append(is_before.sum(dim=1) + 1)
    return torch.cat(ranks)


def _ranking(rank_Q: Tensor, num_candidates: int, num_right: list[int]) -> Ranking:
    return Ranking(
        recall={k: (rank_Q <= k).double().mean().item() for k in DEPTHS},
        chance={k: _chance(k, num_candidates, num_right) for k in DEPTHS},
        median_rank=rank_Q.double().quantile(0.5).item(),
        mean_rank=rank_Q.double().mean().item(),
    )


def _chance(k: int, num_candidates: int, num_right: list[int]) -> float:
    """Probability that k of the candidates, drawn without order, hold a right one; mean over queries."""
    k = min(k, num_candidates)
    missed = [math.comb(num_candidates - right, k) / math.comb(num_candidates, k) for right in num_right]
    return 1 - sum(missed) / len(missed)


def evaluate_retrieval(
    encoder: ImageTextEncoder, source: Any, limit: int | None = None, batch_size: int = 128
) -> RetrievalScores:
    """Retrieval on a data set of images with captions.

    Args:
        encoder: of images and texts.
        source: an `ImageSource` with a text column.
        limit: at most so many images.
        batch_size: images, or texts, at a time.

    Raises:
        DataError: no captions, or fewer than two images.
    """
    captions: list[str] = []
    image_of_text: list[int] = []

    def pictures() -> Iterator[Any]:
        number = 0
        for row_id, row in enumerate(source.rows(limit)):
            texts = captions_of(row.get("text"))[:CAPTIONS_PER_IMAGE]
            picture = decode_picture(row["image"], row_id) if texts else None
            if picture is not None:
                captions.extend(texts)
                image_of_text.extend([number] * len(texts))
                number += 1
                yield picture

    image_NE = encoder.embed_in_turn(pictures(), batch_size)
    if len(image_NE) < 2:
        raise DataError(
            f"{source_name(source)} has fewer than two images with captions; retrieval needs several"
        )
    texts_ME = encoder.embed_texts(captions, batch_size)
    return score_retrieval(image_NE, texts_ME, torch.tensor(image_of_text), source_name(source))
