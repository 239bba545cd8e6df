"""`hf-ssl train clip` and `hf-ssl evaluate` with texts, and what does not fit together."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import TINY_OPTIONS, call


def without_decoder(options: list[str]) -> list[str]:
    """Pairs of a name and a value, but for those of MAE's decoder."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for pair in pairs if "decoder" not in pair[0] for part in pair]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four steps of CLIP on the built-in sample: a method's name is all it needs."""
    folder = tmp_path_factory.mktemp("texts") / "run"
    texts = (
        "--model_type hf_ssl_vit --text_hidden_size 16 --text_num_hidden_layers 1 --vocab_size 540".split()
    )
    outcome = call("train", "clip", "--output_dir", str(folder), *without_decoder(TINY_OPTIONS), *texts)
    assert outcome.code == 0, outcome.err
    assert "tokens learned from 2814 captions" in outcome.err
    assert "exported  VisionTextDualEncoderModel" in outcome.err
    return folder


def test_retrieval_and_zero_shot_are_scored_beside_chance(run, tmp_path):
    file = tmp_path / "scores.json"
    outcome = call(
        *("evaluate", str(run), "--retrieval", "sample", "--zero_shot", "sample", "--templates", "best7"),
        *("--label_column", "category", "--limit", "40", "--output", str(file)),
    )
    assert outcome.code == 0, outcome.err
    assert "text to image" in outcome.out and "by chance" in outcome.out and "7 prompts each" in outcome.out
    scores = json.loads(file.read_text())
    assert scores["retrieval"]["num_images"] == scores["zero_shot"]["num_images"] == 40
    assert scores["zero_shot"]["chance"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retrieval", "sample", "--dataset", "sample"], "fit no probe; leave --dataset and probes out"),
        (["--text_column", "text"], "text_column belongs to --retrieval"),
        (["--retrieval", "sample", "--splits", "a", "--splits", "b"], "score one split, got a, b"),
        (["--retrieval", "sample", "--text_column", "emoji"], 'column "emoji" of .* holds no texts'),
        (["--zero_shot", "sample", "--templates", "photo"], "a prompt needs one {} for the class"),
        (["--retrieval", "sample", "--splits", "tests"], "no split 'tests'"),
    ],
)
def test_what_does_not_fit_is_one_line(run, arguments, words):
    outcome = call("evaluate", str(run), *arguments)
    assert outcome.code == 2 and re.search(words, outcome.err), outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_that_knows_no_texts_is_refused(tiny_run):
    outcome = call("evaluate", str(tiny_run.folder), "--retrieval", "sample")
    assert outcome.code == 2 and "knows no texts; give a run of clip or siglip" in outcome.err
