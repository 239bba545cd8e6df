"""Runs on images with captions, from data to both native models; the tokenizer belongs to the run."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_ssl.cli.loading import load_image_text
from hf_ssl.data.sources import DataError, open_images
from hf_ssl.evaluation.retrieval import evaluate_retrieval
from hf_ssl.evaluation.zero_shot import evaluate_zero_shot
from hf_ssl.training.figures import draw_run
from hf_ssl.training.recipes import RecipeError
from hf_ssl.training.run import train
from tests.clean_process import run_python
from tests.modeling.tiny import TINY_VIT
from tests.training.conftest import random_image

TEXTS = {
    "text_hidden_size": 16,
    "text_num_hidden_layers": 1,
    "text_num_attention_heads": 2,
    "text_max_length": 64,
    "vocab_size": 540,
    "bf16": False,
    "probe_linear": False,
    "probe_num_neighbors": 3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "global_batch_size": 8,
}
OPTIONS = {
    "clip": {**TEXTS, **TINY_VIT, "projection_size": 12},
    "siglip": {**TEXTS, **TINY_VIT, "use_class_token": False, "hidden_act": "gelu_pytorch_tanh"},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder of parquet: 16 images with two captions, and a class that is named."""
    folder = tmp_path_factory.mktemp("pairs")
    names = ["dog", "cat"]
    rows = {
        "image": [{"bytes": random_image(number), "path": None} for number in range(16)],
        "caption": [[f"a {names[n % 2]} number {n}", f"picture {n} of a {names[n % 2]}"] for n in range(16)],
        "animal": [number % 2 for number in range(16)],
    }
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.List(datasets.Value("string")),
        animal=datasets.ClassLabel(names=names),
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    for split in ("train", "test"):
        data.to_parquet(folder / f"{split}-00000.parquet")
    return folder


def run(method: str, pairs: Path, folder: Path, **options):
    defaults = {"dataset": str(pairs), "max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    recipe = f"{method}_small"
    return train(method, recipe=recipe, output_dir=str(folder), **{**OPTIONS[method], **defaults, **options})


@pytest.fixture(scope="module")
def runs(pairs, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each method."""
    base = tmp_path_factory.mktemp("runs")
    return {method: run(method, pairs, base / method).folder for method in OPTIONS}


@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_leaves_tokenizer_encoder_and_both_towers(method, runs):
    folder = runs[method]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) <= 540
    assert config["eos_token_id"] == tokenizer.eos_token_id == len(tokenizer) - 1
    for place in (folder, folder / "checkpoint-4", folder / "dual"):
        assert (place / "tokenizer.json").is_file()
        assert "is_local" not in (place / "tokenizer_config.json").read_text()
    native = {"clip": ("ViTModel", "VisionTextDualEncoderModel"), "siglip": ("IJepaModel", "SiglipModel")}
    for place, wanted in zip(("encoder", "dual"), native[method], strict=True):
        report = json.loads((folder / place / "export.json").read_text())
        assert report["native_class"] == wanted and report["max_abs_difference"] < 1e-4


@pytest.mark.parametrize("method", OPTIONS)
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(method, pairs, runs, tmp_path):
    """Captions are drawn again as they were, and tokens are those of the run's own tokenizer."""
    folder = run(method, pairs, tmp_path / "run", save_total_limit=None).folder
    (folder / "model.safetensors").unlink()
    for path in sorted((folder / "checkpoint-4").rglob("*")):
        path.unlink()
    (folder / "checkpoint-4").rmdir()
    train(resume=str(folder))
    expected, found = (load_file(place / "model.safetensors") for place in (runs[method], folder))
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())


def test_a_run_that_starts_from_another_has_its_tokenizer(pairs, runs, tmp_path):
    folder = run("clip", pairs, tmp_path / "next", init_from=str(runs["clip"]), vocab_size=600).folder
    assert (folder / "tokenizer.json").read_bytes() == (runs["clip"] / "tokenizer.json").read_bytes()


def test_a_tokenizer_can_be_named(pairs, runs, tmp_path):
    folder = run("clip", pairs, tmp_path / "next", text_tokenizer=str(runs["siglip"])).folder
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(runs["siglip"]).get_vocab()
    )


def test_texts_learn_to_match_a_locked_tower_that_was_trained_before(pairs, runs, tmp_path):
    folder = run("clip", pairs, tmp_path / "lit", init_from=str(runs["clip"]), lock_image_tower=True).folder
    before, after = (load_file(place / "model.safetensors") for place in (runs["clip"], folder))
    towers = [name for name in before if name.startswith("student.backbone.")]
    assert towers and all(after[name].equal(before[name]) for name in towers)
    assert not after["text_projection.weight"].equal(before["text_projection.weight"])


def test_a_tower_locked_at_random_is_said(pairs, tmp_path, caplog):
    run("clip", pairs, tmp_path / "lit", lock_image_tower=True, max_steps=1)
    assert "locked at random; give init_from" in caplog.text


def test_a_model_that_no_native_class_computes_is_said(pairs, tmp_path, caplog):
    folder = run("clip", pairs, tmp_path / "run", use_class_token=False, max_steps=1).folder
    assert not (folder / "dual").exists() and (folder / "encoder").is_dir()
    assert "no native model of both towers: IJepaModel has no pooled output" in caplog.text


def test_what_does_not_fit_is_refused_before_anything_is_written(pairs, image_folder, tmp_path):
    with pytest.raises(DataError, match="folder of images without texts"):
        run("clip", image_folder, tmp_path / "a")
    with pytest.raises(DataError, match="no column"):
        run("clip", pairs, tmp_path / "a", text_column="captionz")
    with pytest.raises(RecipeError, match="cannot load a tokenizer from"):
        run("clip", pairs, tmp_path / "a", text_tokenizer=str(tmp_path))
    with pytest.raises(RecipeError, match="vocab_size 300 is less than the 514"):
        run("clip", pairs, tmp_path / "a", vocab_size=300)
    with pytest.raises(RecipeError, match="text_column is for clip, siglip; simclr learns from images alone"):
        train("simclr", dataset=str(pairs), text_column="caption", output_dir=str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_is_scored_with_texts(method, runs, pairs):
    encoder = load_image_text(str(runs[method]))
    scores = evaluate_retrieval(encoder, open_images(pairs, split="test", text_column=""))
    assert (scores.num_images, scores.num_texts) == (16, 32)
    named = evaluate_zero_shot(encoder, open_images(pairs, split="test", label_column="animal"))
    assert named.class_names == ["dog", "cat"] and named.chance == 0.5


def test_a_run_without_texts_or_without_its_tokenizer_is_refused(runs, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hf_ssl_simclr"}))
    with pytest.raises(ValueError, match="knows no texts; give a run of clip or siglip"):
        load_image_text(str(tmp_path))
    (tmp_path / "config.json").write_bytes((runs["clip"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_image_text(str(tmp_path))


PIPELINE = """
import json, sys
from PIL import Image
from transformers import pipeline
found = {}
for folder in sys.argv[1:]:
    pipe = pipeline("zero-shot-image-classification", folder)
    answers = pipe(Image.new("RGB", (16, 16), "red"), candidate_labels=["dog", "cat", "two birds"])
    found[folder] = {answer["label"]: answer["score"] for answer in answers}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_zero_shot_pipeline_gives_our_scores_without_this_package(runs):
    from PIL import Image

    folders = {method: str(runs[method] / "dual") for method in OPTIONS}
    found = json.loads(run_python(PIPELINE, *folders.values(), with_package=False).stdout)
    labels = ["dog", "cat", "two birds"]
    for method, folder in folders.items():
        encoder = load_image_text(str(runs[method]))
        image = torch.nn.functional.normalize(
            encoder.embed_images([Image.new("RGB", (16, 16), "red")]), dim=1
        )
        texts = encoder.embed_texts([f"This is a photo of {label}." for label in labels])
        similarity = encoder.model.similarity
        logits = similarity.logit_scale.exp() * image @ torch.nn.functional.normalize(texts, dim=1).T
        expected = logits.softmax(dim=1)
        if method == "siglip":
            expected = (logits + similarity.logit_bias).sigmoid()
        scores = torch.tensor([[found[folder][label] for label in labels]])
        assert (scores - expected).abs().max() < 1e-4, method


def test_pictures_of_a_run_on_captions_are_those_of_its_images(runs, tmp_path):
    names = {path.stem for path in draw_run(str(runs["clip"]), output_dir=str(tmp_path))}
    assert {"views", "neighbors"} <= names and "reconstructions" not in names
