"""CLIP: the scale's steps, the text tower, a locked image tower; mistakes of the method, each a test."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor

from hf_ssl.modeling.clip import SSLCLIPConfig
from hf_ssl.modeling.shared.image_text_losses import symmetric_cross_entropy
from hf_ssl.modeling.siglip import SigLIPConfig
from tests.closeness import near
from tests.modeling.tiny import BY_NAME, TINY_TEXTS, TINY_VIT, gradients, run_step

ROW = BY_NAME["clip"]


def test_scale_follows_the_authors_steps_and_is_bounded_after_the_optimizer(golden):
    """A clamp before the step, of s in place of its logarithm, or none would each leave other values."""
    values = golden("clip")
    model = ROW.build(logit_scale_start=4.3).double()
    scale = model.similarity.logit_scale
    optimizer = torch.optim.AdamW([scale], lr=0.2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0)
    scales, losses = [scale.detach().clone()], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = symmetric_cross_entropy(values["steps.image"], values["steps.text"], scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.end_step([])
        losses.append(loss.detach())
        scales.append(scale.detach().clone())
    near(torch.cat(scales), values["steps.logit_scale"], 1e-6)  # 4.3 was float32
    near(torch.stack(losses), values["steps.loss"], 1e-6)
    assert scales[-1].item() == pytest.approx(math.log(100))


def test_scale_starts_as_a_logarithm():
    model = ROW.build()
    assert model.similarity.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    with pytest.raises(StrictDataclassClassValidationError, match="logarithms"):
        SSLCLIPConfig(logit_scale_start=14.3)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_scale_bias_and_norms_have_no_weight_decay(name):
    model = BY_NAME[name].build()
    decayed = {
        id(p) for group in model.parameter_groups(0.1) if group["weight_decay"] for p in group["params"]
    }
    kept = [p for key, p in model.named_parameters() if "similarity" in key or "norm" in key]
    assert len(kept) > 2 and not any(id(parameter) in decayed for parameter in kept)


def test_loss_of_random_directions_is_the_expected_one():
    """ln N, and half the variance of the scores; much more, and embeddings were not normalised."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(256, 512, generator=generator) for _ in range(2))
    model = ROW.build()
    extra = (1 / 0.07) ** 2 / (2 * 512)
    assert model.contrast(image, text).item() == pytest.approx(math.log(256) + extra, abs=0.12)
    assert model.expectations(256)["loss_at_start"] == pytest.approx(math.log(256))
    other = BY_NAME["siglip"].build()
    expected = other.expectations(256)["loss_at_start"]
    assert other.contrast(image, text).item() == pytest.approx(expected, abs=0.1)


def text_embedding(model: torch.nn.Module, tokens: list[int], mask: list[int] | None = None) -> Tensor:
    with torch.no_grad():
        mask_1L = None if mask is None else torch.tensor([mask])
        return model.get_text_features(torch.tensor([tokens]), mask_1L).pooler_output


def test_text_is_read_up_to_its_first_end_token():
    """Padding is the end token again: pooled at the last, or by a mask alone, it would count."""
    model = ROW.build().eval()
    near(
        text_embedding(model, [38, 5, 39]), text_embedding(model, [38, 5, 39, 39, 39], [1, 1, 1, 0, 0]), 1e-6
    )
    near(text_embedding(model, [38, 5, 39]), text_embedding(model, [38, 5, 39, 7, 7]), 1e-6)
    assert (text_embedding(model, [38, 5, 39]) - text_embedding(model, [38, 6, 39])).abs().max() > 1e-3


def test_the_end_token_need_not_have_the_largest_id_but_must_not_be_two():
    model = ROW.build(eos_token_id=5, bos_token_id=4, pad_token_id=5).eval()
    near(text_embedding(model, [4, 30, 5]), text_embedding(model, [4, 30, 5, 39, 39]), 1e-6)
    with pytest.raises(StrictDataclassClassValidationError, match="eos_token_id must not be 2"):
        ROW.config(eos_token_id=2)


def test_text_tower_is_causal_and_starts_as_the_authors_do():
    model = ROW.build(text_hidden_size=64, vocab_size=400).eval()
    tower = model.text_tower
    states = [tower(input_ids=torch.tensor([[398, 5, last]])).last_hidden_state[0, :2] for last in (7, 399)]
    near(states[0], states[1], 1e-6)
    layer = tower.encoder.layers[0]
    found = {
        "token": tower.embeddings.token_embedding,
        "position": tower.embeddings.position_embedding,
        "query": layer.self_attn.q_proj,
        "output": layer.self_attn.out_proj,
        "expand": layer.mlp.fc1,
        "narrow": layer.mlp.fc2,
        "projection": model.text_projection,
    }
    width, depth = 64, 2
    wanted = {"token": 0.02, "position": 0.01, "query": width**-0.5, "expand": (2 * width) ** -0.5}
    wanted |= dict.fromkeys(("output", "narrow"), (2 * depth * width) ** -0.5) | {"projection": width**-0.5}
    for name, layer in found.items():
        assert layer.weight.std().item() == pytest.approx(wanted[name], rel=0.1), name


@pytest.mark.parametrize("name", ["clip", "clip-cnn", "siglip"])
def test_a_locked_image_tower_does_not_change_by_a_bit(name):
    """Neither by gradients and weight decay, nor by BatchNorm's statistics or a call of train()."""
    model = BY_NAME[name].build(lock_image_tower=True)
    before = {key: value.clone() for key, value in model.student.backbone.state_dict().items()}
    texts = model.text_tower.final_layer_norm.weight.clone()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.5), lr=1e-2)
    for step in range(10):
        model.train()
        optimizer.zero_grad()
        run_step(model, [BY_NAME[name].images(8, seed=step)], step, optimize=optimizer.step)
    assert not any(key.startswith("student.backbone") for key in gradients(model))
    assert not any(module.training for module in model.student.backbone.modules())
    for key, value in model.student.backbone.state_dict().items():
        assert value.equal(before[key]), key
    assert not model.text_tower.final_layer_norm.weight.equal(texts)


def test_a_locked_tower_is_locked_again_after_loading(tmp_path):
    model = ROW.build(lock_image_tower=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert not any(parameter.requires_grad for parameter in loaded.student.backbone.parameters())
    assert not loaded.student.backbone.training and loaded.text_tower.training


def test_texts_can_be_projected_into_the_image_towers_own_space():
    model = BY_NAME["clip-cnn"].build()
    assert isinstance(model.student.head, torch.nn.Identity) and model.text_projection.out_features == 16


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_images_without_texts_and_single_pairs_are_refused(name):
    model = BY_NAME[name].build()
    with pytest.raises(ValueError, match="needs input_ids"):
        model(BY_NAME[name].images(4))
    with pytest.raises(ValueError, match="at least 2 pairs"):
        model.check_global_batch(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"text_hidden_size": 10, "text_num_attention_heads": 4},
            "not a multiple of text_num_attention_heads",
        ),
        ({"eos_token_id": 40}, "outside a vocabulary of 40"),
        ({"text_max_length": 2}, "at least 3: start, one token, end"),
        ({"projection_size": 0}, "projection_size must be at least 1"),
    ],
)
def test_what_makes_no_model_is_refused(options, words):
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        SSLCLIPConfig(backbone_config=TINY_VIT, **{**TINY_TEXTS, **options})


def test_siglip_starts_with_scale_ten_and_bias_minus_ten():
    """transformers' own model starts with s = 1 and b = 0."""
    similarity = BY_NAME["siglip"].build().similarity
    assert similarity.logit_scale.exp().item() == pytest.approx(10, abs=1e-4)
    assert similarity.logit_bias.item() == -10


def test_siglip_texts_are_read_whole_without_a_mask_at_one_length():
    """The last token is pooled and padding is seen: another length, or a mask, would mean another text."""
    model = BY_NAME["siglip"].build().eval()
    with pytest.raises(ValueError, match="padded to text_max_length 8"):
        text_embedding(model, [38, 5, 39])
    tokens = [38, 5, 39, 39, 39, 39, 39, 39]
    with pytest.raises(ValueError, match="have no attention_mask"):
        text_embedding(model, tokens, [1] * 3 + [0] * 5)
    tower = model.text_tower
    states = [
        tower(input_ids=torch.tensor([[38, 5, 6, 39, last, 39, 39, 39]])).last_hidden_state[0, 0]
        for last in (7, 39)
    ]
    assert (states[0] - states[1]).abs().max() > 1e-4  # no causal mask: the first token sees what follows


def test_siglip_loss_at_start_of_the_published_batch():
    expected = SigLIPConfig(backbone_config=TINY_VIT, **TINY_TEXTS)
    model = BY_NAME["siglip"].build()
    assert model.expectations(256)["loss_at_start"] == pytest.approx(10.0 + 4.54e-5 * 256, abs=1e-3)
    assert model.expectations(32768)["loss_at_start"] == pytest.approx(11.49, abs=5e-3)
    assert expected.logit_bias_start == -10


def test_siglip_pools_patches_by_attention_only_where_the_tower_has_no_pooled_output():
    assert BY_NAME["siglip"].config().pools_by_attention
    assert not BY_NAME["siglip-cnn"].config().pools_by_attention
    assert not BY_NAME["siglip"].config(backbone_config={"use_class_token": True}).pools_by_attention


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_each_has_its_own_normalisation(name):
    """CLIP's constants, and [-1, 1] for SigLIP: not ImageNet's."""
    from hf_ssl.modeling import METHODS

    processor = METHODS[name].processor_class.for_image_size(96)
    if name == "clip":
        assert processor.image_mean[0] == pytest.approx(0.48145466)
        assert processor.image_std[2] == pytest.approx(0.27577711)
        assert processor.do_center_crop
    else:
        assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]
        assert not processor.do_center_crop  # the whole image is squashed
    views = METHODS[name].processor_class.default_views(224)
    assert [view["transforms"] for view in views] == [[]]  # captions know left and right, and colours
