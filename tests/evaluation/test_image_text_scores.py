"""Retrieval and zero-shot classification: published values, ties, prompts, and data that do not fit."""

import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_ssl.data.sources import DataError, open_images
from hf_ssl.evaluation.image_text import ImageTextEncoder
from hf_ssl.evaluation.retrieval import DEPTHS, evaluate_retrieval, score_retrieval
from hf_ssl.evaluation.zero_shot import (
    TEMPLATES,
    check_templates,
    class_weights,
    evaluate_zero_shot,
    plain_class_names,
)
from hf_ssl.modeling.shared.losses import normalize
from tests.closeness import near


def test_retrieval_is_that_of_the_published_evaluation(golden):
    values = golden("zeroshot")
    scores = score_retrieval(values["ret.image"], values["ret.text"], values["ret.text_to_image"])
    for ranking, short, name in (
        (scores.text_to_image, "t2i", "text_to_image"),
        (scores.image_to_text, "i2t", "image_to_text"),
    ):
        for k in DEPTHS:
            assert ranking.recall[k] == pytest.approx(values[f"ret.{short}_R@{k}"].item(), abs=1e-12)
        assert ranking.mean_rank == pytest.approx(values[f"ret.{name}_mean_rank"].item())
        assert ranking.median_rank == pytest.approx(values[f"ret.{name}_median_rank"].item())


def test_class_weights_and_scores_are_the_published_ones(golden):
    values = golden("zeroshot")
    weights_CE = class_weights(values["prompt_embeds"])
    near(weights_CE, values["class_weights"], 1e-9)
    near(100 * normalize(values["image_embeds"]) @ weights_CE.T, values["logits"], 1e-9)


def test_embeddings_that_cannot_be_told_apart_score_chance():
    """Ties decided for the right answer would give 100 %."""
    scores = score_retrieval(torch.ones(20, 4), torch.ones(60, 4), torch.arange(20).repeat_interleave(3))
    assert scores.text_to_image.recall[1] == pytest.approx(1 / 20)
    assert scores.image_to_text.recall[1] == pytest.approx(1 / 20)
    assert scores.text_to_image.chance == {k: pytest.approx(k / 20) for k in DEPTHS}
    assert scores.image_to_text.chance[5] == pytest.approx(1 - math.comb(57, 5) / math.comb(60, 5))


def test_an_image_has_found_its_text_by_any_of_its_captions():
    image = torch.eye(3)
    text = torch.stack([-image[0], image[0], image[1], -image[1], image[2], -image[2]])
    scores = score_retrieval(image, text, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert scores.image_to_text.recall[1] == 1 and scores.text_to_image.recall[1] == 0.5


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="every image at least one text"):
        score_retrieval(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 1]))


def test_eighty_templates_are_distinct_and_each_has_one_place_for_the_class():
    assert [len(TEMPLATES[name]) for name in ("simple", "best7", "imagenet80")] == [1, 7, 80]
    assert len(set(TEMPLATES["imagenet80"])) == 80 and set(TEMPLATES["best7"]) <= set(TEMPLATES["imagenet80"])
    check_templates(TEMPLATES["imagenet80"])
    for wrong in (["a photo"], ["a {} {}"], []):
        with pytest.raises(ValueError, match="one {} for the class"):
            check_templates(wrong)
    assert plain_class_names(["fire_truck", "dog"]) == ["fire truck", "dog"]


class Colours(ImageTextEncoder):
    """Stands for a model: an image is its mean colour, a text the colour it names."""

    NAMES = ("red", "green", "blue")

    def __init__(self) -> None:
        pass

    def embed_images(self, pictures: list[Image.Image]) -> Tensor:
        return torch.tensor([picture.resize((1, 1)).getpixel((0, 0)) for picture in pictures]).float()

    def embed_texts(self, texts: list[str], batch_size: int = 128) -> Tensor:
        self.texts = texts
        return torch.tensor([[float(name in text) for name in self.NAMES] for text in texts])


def colour_source(captions: list | None = None):
    import datasets

    pictures = [Image.new("RGB", (8, 8), name) for name in ("blue", "red", "lime")]
    columns = {"image": pictures, "label": [2, 0, 1]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green_1", "blue"])}
    if captions is not None:
        columns["caption"] = captions
        features["caption"] = datasets.List(datasets.Value("string"))
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return open_images(data, text_column="" if captions is not None else None)


def test_zero_shot_reads_names_in_the_order_of_labels():
    model = Colours()
    scores = evaluate_zero_shot(model, colour_source(), TEMPLATES["best7"])
    assert scores.top1 == scores.top5 == 1 and scores.chance == pytest.approx(1 / 3)
    assert model.texts[7] == "itap of a green 1." and scores.class_names == ["red", "green 1", "blue"]
    assert "3 classes, 7 prompts each" in scores.table()


def test_retrieval_reads_all_captions_and_leaves_out_images_without_any():
    captions = [["a blue thing", "blue", "", "blue"], ["red"], []]
    scores = evaluate_retrieval(Colours(), colour_source(captions), batch_size=1)
    assert (scores.num_images, scores.num_texts) == (2, 4)
    assert scores.text_to_image.recall[1] == scores.image_to_text.recall[1] == 1
    assert "text to image" in scores.table() and scores.to_dict()["num_texts"] == 4


def test_data_without_captions_names_or_labels_are_refused():
    with pytest.raises(DataError, match="fewer than two images with captions"):
        evaluate_retrieval(Colours(), colour_source([["blue"], [], []]))
    row = {"image": Image.new("RGB", (8, 8)), "label": 0}
    with pytest.raises(DataError, match="no names of classes"):
        evaluate_zero_shot(Colours(), [row])
    with pytest.raises(DataError, match="label 3 has no name"):
        evaluate_zero_shot(Colours(), [{**row, "label": 3}], class_names=["a", "b"])
    with pytest.raises(DataError, match="row 0 .* has no label"):
        evaluate_zero_shot(Colours(), [{"image": row["image"]}], class_names=["a", "b"])
