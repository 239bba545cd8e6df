"""The attentive probe: the authors' pooling, and what it needs to be a fair one."""

import pytest
import torch
from torch.testing import assert_close

from hf_ssl.evaluation.attentive import AttentivePooler, evaluate_attentive, fit_attentive_probe
from hf_ssl.evaluation.dense import patch_tokens
from hf_ssl.modeling import METHODS
from tests.closeness import near
from tests.modeling.tiny import BY_NAME
from tests.training.conftest import random_image

NAMES = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "xattn.q": "q_proj", "xattn.kv": "kv_proj",
    "mlp.fc1": "fc1", "mlp.fc2": "fc2",
}  # fmt: skip


def labelled(count: int, first: int = 0):
    return [{"image": random_image(first + index), "label": index % 2} for index in range(count)]


def test_pooling_matches_the_authors(golden):
    """Their output projection is in the file and never applied."""
    case = golden("vjepa")
    prefix = "pooler.sd.cross_attention_block"
    state = {"query": case["pooler.sd.query_tokens"]}
    for theirs, ours in NAMES.items():
        state |= {f"{ours}.{kind}": case[f"{prefix}.{theirs}.{kind}"] for kind in ("weight", "bias")}
    pooler = AttentivePooler(16, 2).double()
    pooler.load_state_dict(state)
    near(pooler(case["pooler.x"]), case["pooler.out"][:, 0], 1e-9)


def test_it_finds_what_the_mean_of_patches_does_not_have():
    """One patch of many says the class; its mean is lost among the others."""
    torch.manual_seed(0)
    num = 1500
    patches, labels = torch.randn(num, 8, 8), torch.arange(num) % 2
    image, place = torch.arange(num), torch.randint(8, (num,))
    sign = torch.where(labels == 0, 4.0, -4.0)
    patches[image, place, 0], patches[image, place, 1] = sign, 8.0
    patches[image, (place + 1) % 8, 0] = -sign  # so that the mean of all says nothing
    probe = fit_attentive_probe(patches[:1200], labels[:1200], 2, 2, epochs=30, learning_rate=3e-3)
    accuracy = (probe(patches[1200:]).argmax(dim=1) == labels[1200:]).float().mean()
    assert accuracy > 0.9


def test_it_is_the_same_twice_and_leaves_the_random_state():
    patches, labels = torch.randn(40, 4, 8), torch.arange(40) % 2
    state = torch.get_rng_state()
    first, second = (fit_attentive_probe(patches, labels, 2, 2, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(dict(first.named_parameters()), dict(second.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mae", "beit", "simclr-cnn"])
def test_encoders_are_scored_beside_random_weights_and_left_as_they_were(name: str):
    row = BY_NAME[name]
    encoder, processor = row.build_encoder(), METHODS[row.method].processor_class.for_image_size(16)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    scores = evaluate_attentive(encoder, processor, labelled(12), labelled(6, first=50), epochs=1)
    assert [score.features for score in scores] == ["random init", "encoder"]
    assert all(0 <= score.top1 <= 1 for score in scores)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 heads do not divide features of width 16"):
        AttentivePooler(16, 3)


def test_no_epoch_is_refused():
    encoder, processor = BY_NAME["mae"].build_encoder(), METHODS["mae"].processor_class.for_image_size(16)
    with pytest.raises(ValueError, match="needs at least 1 epoch, got 0"):
        evaluate_attentive(encoder, processor, labelled(4), labelled(2), epochs=0)


def test_images_without_labels_are_refused():
    encoder, processor = BY_NAME["mae"].build_encoder(), METHODS["mae"].processor_class.for_image_size(16)
    rows = [{"image": random_image(0)}]
    with pytest.raises(ValueError, match="train labels"):
        evaluate_attentive(encoder, processor, rows, rows)


def test_clips_are_probed_by_all_their_patches():
    row = BY_NAME["vjepa"]
    views = [{"crop": {"scale": [0.5, 1.0]}, "frames": {"count": 4, "step": 1}}]
    processor = METHODS["vjepa"].processor_class.for_image_size(16, views=views)
    tokens = patch_tokens(row.build_encoder(), torch.randn(3, 4, 3, 16, 16))
    assert tokens.shape == (3, 2 * 16, 16)
    scores = evaluate_attentive(row.build_encoder(), processor, labelled(8), labelled(4, 8), epochs=1)
    assert scores
