import json

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_ssl.evaluation.images import read_batches
from hf_ssl.evaluation.protocol import ScoreRow, Scores, evaluate_encoder
from tests.evaluation.tiny import tiny_vit


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def encoder():
    return tiny_vit().train()


def colored(num_rows, seed=0, labelled=True):
    """Noise, redder for class 1: solved by any pixels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num_rows):
        pixels = torch.randint(100, (16, 16, 3), dtype=torch.uint8, generator=generator)
        pixels[..., 0] += 150 * (i % 2)
        rows.append({"image": Image.fromarray(pixels.numpy()), "label": i % 2 if labelled else None})
    return rows


@pytest.fixture(scope="module")
def scores(encoder, processor):
    return evaluate_encoder(encoder, processor, colored(60), colored(20, seed=1))


def test_every_pool_stands_beside_its_floors(scores):
    assert [(row.features, row.pool) for row in scores.rows] == [
        ("pixels", "16x16"),
        ("pixels", "8x8"),
        *[(name, pool) for name in ("random init", "encoder") for pool in ("class_token", "mean", "grid2")],
    ]
    assert [row.width for row in scores.rows] == [768, 192, 16, 16, 64, 16, 16, 64]


def test_a_solved_task_scores_one(scores):
    pixels = scores.rows[1]
    assert (pixels.knn, pixels.knn_centered, pixels.knn_standardized, pixels.linear) == (1, 1, 1, 1)


def test_scores_survive_json_and_are_a_table(scores):
    assert json.loads(json.dumps(scores.to_dict()))["rows"][0]["features"] == "pixels"
    lines = scores.table().splitlines()
    assert len(lines) == 2 + len(scores.rows) and len({len(line) for line in lines}) == 1
    assert "| pixels " in lines[2] and "100.0" in lines[3]


def test_encoder_is_left_as_it_was(encoder, processor):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    evaluate_encoder(encoder, processor, colored(20), colored(10), ["mean"], probe="none")
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_batches_kept_in_memory_score_the_same(encoder, processor, scores):
    train, test = (list(read_batches(rows, processor)) for rows in (colored(60), colored(20, seed=1)))
    again = evaluate_encoder(encoder, processor, train, test, floors=False)
    assert again.rows == [row for row in scores.rows if row.features == "encoder"]


def test_own_first_step_can_be_the_floor(encoder, processor):
    scores = evaluate_encoder(
        encoder, processor, colored(20), colored(10), ["mean"], initial_encoder=encoder, probe="none"
    )
    assert scores.rows[-1].knn == scores.rows[-2].knn and scores.margins("mean")["knn"] <= 0


def row(features, pool, knn, linear):
    return ScoreRow(features, pool, 4, knn, knn + 0.1, knn, linear)


def test_margin_is_over_the_highest_floor_of_the_same_pool():
    scores = Scores(
        [row("pixels", "8x8", 0.2, 0.4), row("random init", "mean", 0.3, 0.1),
         row("random init", "grid2", 0.9, 0.9), row("encoder", "mean", 0.5, 0.6)]
    )  # fmt: skip
    assert scores.margins("mean") == pytest.approx({"knn": 0.2, "linear": 0.2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_source": colored(4, labelled=False)}, "train labels are missing"),
        ({"test_source": colored(4, labelled=False)}, "test labels are missing"),
        ({"train_source": []}, "no readable image"),
        ({"train_source": [{"image": Image.new("RGB", (9, 9)), "label": 2}] * 5}, "class 2 only"),
        ({"probe": "forest"}, "use one of lbfgs, sgd, none"),
        ({"pools": ["max"]}, "use one of pooler, class_token, mean, grid2"),
    ],
)
def test_unusable_input_is_refused_in_one_line(encoder, processor, change, message):
    arguments = {"train_source": colored(8), "test_source": colored(4), "floors": False, "pools": ["mean"]}
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_encoder(encoder, processor, **{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_classes_without_a_training_image_are_warned_of(encoder, processor, caplog):
    train = [{**row, "label": row["label"] + 1} for row in colored(8)]
    evaluate_encoder(encoder, processor, train, colored(4), ["mean"], floors=False, probe="none")
    assert "1 classes of the test images have no training image (first: 0)" in caplog.text
