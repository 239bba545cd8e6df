"""Segmentation by frozen patches: scores against known values, and images whose colour is the class."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_ssl.evaluation.dense import ConfusionMatrix, evaluate_segmentation, patch_map
from hf_ssl.modeling.mae import MAEConfig, MAEModel
from tests.evaluation.tiny import tiny_vit

COLORS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)
IGNORED = 3
VIT = {
    "model_type": "hf_ssl_vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def colored_rows(count: int, cell: int = 4, side: int = 16) -> list[dict]:
    """Cells of one colour each, whose class it is; a corner is of the ignored class whatever its colour."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        classes = generator.integers(0, len(COLORS), (side // cell, side // cell))
        annotation = classes.repeat(cell, 0).repeat(cell, 1).astype(np.uint8)
        picture = COLORS[annotation]
        annotation[:cell, :cell] = IGNORED
        rows.append({"image": Image.fromarray(picture), "annotation": Image.fromarray(annotation)})
    return rows


def evaluate(rows, **options):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    options = {"num_classes": 3, "ignore_index": IGNORED, "num_neighbors": 3} | options
    return evaluate_segmentation(tiny_vit(), processor, rows[:-4], rows[-4:], **options)


def test_mean_iou_matches_the_known_value(golden):
    tensors = golden("zeroshot")
    num_classes = len(tensors["dense.iou_per_class"])
    counts = ConfusionMatrix(num_classes, ignore_index=255)
    counts.add(tensors["dense.pred"], tensors["dense.target"])
    torch.testing.assert_close(counts.iou(), tensors["dense.iou_per_class"].double(), rtol=1e-6, atol=1e-6)
    assert counts.mean_iou() == pytest.approx(float(tensors["dense.miou"]), abs=1e-6)


def test_a_class_that_never_occurs_does_not_count():
    counts = ConfusionMatrix(4)
    counts.add(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    assert counts.iou()[:2].tolist() == [0.5, 0.5] and counts.iou()[2:].isnan().all()
    assert counts.mean_iou() == 0.5


def test_colors_are_told_apart_and_rows_are_in_order():
    scores = evaluate(colored_rows(24))
    assert [score.features for score in scores] == ["pixels", "random init", "encoder"]
    pixels = scores[0]
    # Bilinear scores blur the borders of cells; within them every pixel is right.
    assert pixels.linear_miou > 0.7 and pixels.knn_miou > 0.7
    assert evaluate(colored_rows(24)) == scores


def test_annotations_that_say_nothing_about_the_image_score_low():
    rows = colored_rows(24)
    for row, other in zip(rows, colored_rows(48)[24:], strict=True):
        row["annotation"] = other["annotation"]
    assert all(max(score.linear_miou, score.knn_miou) < 0.4 for score in evaluate(rows))


def test_ignored_pixels_change_nothing():
    rows = colored_rows(24)
    before = evaluate(rows, floors=False)
    for row in rows:
        picture = np.array(row["image"])
        annotation = np.array(row["annotation"])
        assert (annotation == IGNORED).any()
        annotation[annotation == IGNORED] = 255
        row["image"], row["annotation"] = Image.fromarray(picture), Image.fromarray(annotation)
    assert evaluate(rows, floors=False, ignore_index=255) == before


def test_map_keeps_the_place_of_patches():
    encoder = tiny_vit()
    pixels = torch.randn(1, 3, 16, 16)
    features = patch_map(encoder, pixels)
    tokens = encoder(pixel_values=pixels).last_hidden_state[:, 1:]
    assert features.shape == (1, 16, 4, 4)
    torch.testing.assert_close(features[0, :, 1, 2], tokens[0, 6].detach())


def test_images_of_another_size_than_in_training_are_cut_to_whole_patches():
    encoder = MAEModel(MAEConfig(backbone_config=VIT))  # for 16 pixels
    shapes = set()
    encoder.register_forward_pre_hook(
        lambda _, __, inputs: shapes.add(tuple(inputs["pixel_values"].shape[1:])), with_kwargs=True
    )
    rows, processor = colored_rows(12, side=24), ViTImageProcessor()
    options = {"ignore_index": IGNORED, "floors": False, "num_neighbors": 3}
    evaluate_segmentation(encoder, processor, rows[:8], rows[8:], 3, size=(24, 30), **options)
    assert shapes == {(3, 24, 28)}


def test_broken_images_are_left_out(caplog):
    rows = colored_rows(24)
    whole = evaluate(rows, floors=False)
    broken = {"image": b"no image", "annotation": rows[0]["annotation"]}
    assert evaluate([rows[0], broken, *rows[1:]], floors=False) == whole
    assert "row 1 left out" in caplog.text


def test_an_annotation_in_color_is_named():
    rows = colored_rows(12)
    rows[0]["annotation"] = rows[0]["image"]
    with pytest.raises(ValueError, match="an annotation has the shape .16, 16, 3.; give pictures of one"):
        evaluate(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 2}, "annotations have the class 2, but num_classes is 2"),
        ({"ignore_index": None}, "annotations have the class 3"),
        ({"size": (3, 16)}, "images of 3 x 16 hold no patch of 4 x 4"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(colored_rows(12), **change)


def test_a_row_without_annotation_is_named():
    rows = colored_rows(12)
    rows[1]["annotation"] = None
    with pytest.raises(ValueError, match="row 1 has no annotation"):
        evaluate(rows)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="got 0 training and 4 test rows"):
        evaluate(colored_rows(4))
