import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import TimmWrapperConfig, TimmWrapperModel

from hf_ssl.evaluation.features import default_pools, evaluating, extract_features, pool_tokens
from tests.evaluation.tiny import tiny_vit
from tests.modeling.tiny import BY_NAME


class SmallCNN(nn.Module):
    """A map encoder with BatchNorm, and dropout that shows when it is left in train mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)

    def forward(self, pixel_values):
        feature_map = self.layers(pixel_values)
        return SimpleNamespace(last_hidden_state=feature_map, pooler_output=feature_map.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def vit():
    return tiny_vit()


def tokens(num_prefix_tokens=1):
    """Prefix tokens of -1, then patches 0 to 15 of a 4 x 4 grid; width 2, the second ten times the first."""
    values = torch.cat([torch.full((num_prefix_tokens,), -1.0), torch.arange(16.0)])
    return SimpleNamespace(
        last_hidden_state=torch.stack([values, 10 * values], dim=1)[None], pooler_output=None
    )


def test_class_token_is_the_first():
    assert_close(pool_tokens(tokens(), "class_token", 1), torch.tensor([[-1.0, -10.0]]))


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_mean_leaves_out_the_prefix(num_prefix_tokens):
    assert_close(
        pool_tokens(tokens(num_prefix_tokens), "mean", num_prefix_tokens), torch.tensor([[7.5, 75.0]])
    )


def test_grid2_is_the_mean_of_each_quarter():
    # Quarters of rows 0 1 2 3 / 4 5 6 7 / 8 9 10 11 / 12 13 14 15.
    expected = torch.tensor([[2.5, 25, 4.5, 45, 10.5, 105, 12.5, 125]])
    assert_close(pool_tokens(tokens(), "grid2", 1, (4, 4)), expected)


def test_pools_of_a_map_equal_pools_of_the_same_tokens():
    map_outputs = SimpleNamespace(
        last_hidden_state=tokens(0).last_hidden_state.transpose(1, 2).unflatten(2, (4, 4))
    )
    for pool in ("mean", "grid2"):
        assert_close(pool_tokens(map_outputs, pool), pool_tokens(tokens(0), pool, 0, (4, 4)))


@pytest.mark.parametrize(
    ("pool", "num_prefix_tokens", "grid", "message"),
    [
        ("maximum", 0, None, "unknown; use one of pooler, class_token, mean, grid2, last4"),
        ("pooler", 0, None, "no pooled output"),
        ("class_token", 0, None, "no class token"),
        ("grid2", 0, (3, 5), "do not fill the grid"),
        ("grid2", 0, (1, 16), "no quarters"),
    ],
)
def test_pools_that_an_encoder_does_not_have_are_refused(pool, num_prefix_tokens, grid, message):
    with pytest.raises(ValueError, match=message):
        pool_tokens(tokens(0), pool, num_prefix_tokens, grid)


def test_native_vit_gives_the_pools_of_its_tokens(vit):
    images = torch.randn(5, 3, 16, 16)
    features = extract_features(vit, images.split(2), ("class_token", "mean", "grid2"))
    with torch.no_grad():
        hidden = vit.eval()(pixel_values=images).last_hidden_state
    assert_close(features["class_token"], hidden[:, 0])
    assert_close(features["mean"], hidden[:, 1:].mean(dim=1))
    assert features["grid2"].shape == (5, 64)
    assert_close(features["grid2"].unflatten(1, (4, 16)).mean(dim=1), features["mean"])


def test_the_last_four_layers_are_those_before_the_final_norm():
    row = BY_NAME["mae"]
    encoder = row.build_encoder(backbone_config={"num_hidden_layers": 5})
    images = torch.randn(3, 3, 16, 16)
    features = extract_features(encoder, [images], ("last4", "mean"))
    with torch.no_grad():
        states = encoder(images, output_hidden_states=True).hidden_states
    expected = torch.cat([state[:, 1:].mean(dim=1) for state in states[2:]], dim=1)
    assert_close(features["last4"], expected)
    assert features["last4"].shape == (3, 64) and features["mean"].shape == (3, 16)


def test_an_encoder_of_fewer_layers_has_no_last_four(vit):
    with pytest.raises(ValueError, match='pool "last4": this encoder has 1 layers'):
        extract_features(vit, [torch.randn(2, 3, 16, 16)], ("last4",))


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_models_work(architecture):
    size = 64
    model_args = {"img_size": size} if architecture.startswith("vit") else {}
    encoder = TimmWrapperModel(
        TimmWrapperConfig(architecture=architecture, model_args=model_args, num_labels=0)
    )
    images = torch.randn(2, 3, size, size)
    pools = ("class_token", "mean", "grid2") if model_args else ("mean", "grid2", "pooler")
    features = extract_features(encoder, [images], pools)
    with torch.no_grad():
        hidden = encoder.timm_model.eval().forward_features(images)
    expected = hidden[:, 1:].mean(dim=1) if model_args else hidden.mean(dim=(2, 3))
    assert_close(features["mean"], expected, rtol=1e-4, atol=1e-5)


def test_default_pools_follow_the_kind_of_encoder(vit):
    assert default_pools(vit, torch.randn(1, 3, 16, 16)) == ("class_token", "mean", "grid2")
    assert default_pools(SmallCNN(), torch.randn(1, 3, 16, 16)) == ("mean",)


def test_probing_leaves_weights_statistics_and_modes_as_they_were():
    """Mistake 42: in train mode the statistics drift and the "frozen" backbone changes."""
    encoder = SmallCNN().train()
    encoder.layers[1].eval()  # one normalisation frozen on purpose must stay so
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = extract_features(encoder, [torch.randn(4, 3, 16, 16)] * 2, ("mean",))
    assert_close(features["mean"][:4], features["mean"][4:])  # dropout was off
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training and encoder.head.training and not encoder.layers[1].training
    assert not features["mean"].requires_grad


def test_modes_come_back_after_an_error():
    encoder = SmallCNN().train()
    with pytest.raises(RuntimeError), evaluating(encoder):
        raise RuntimeError
    assert encoder.layers[2].training


def test_batch_size_has_no_effect():
    encoder, images = SmallCNN(), torch.randn(6, 3, 16, 16)
    whole = extract_features(encoder, [images], ("grid2",))["grid2"]
    assert_close(extract_features(encoder, images.split(4), ("grid2",))["grid2"], whole)


def test_reduced_precision_gives_close_float32_features(vit):
    images = torch.randn(4, 3, 16, 16)
    plain = extract_features(vit, [images], ("mean",))["mean"]
    reduced = extract_features(vit, [images], ("mean",), dtype=torch.bfloat16)["mean"]
    assert reduced.dtype == torch.float32
    assert torch.cosine_similarity(plain, reduced).min() > 0.999
    assert not torch.equal(plain, reduced)


def test_encoder_stored_in_half_precision_gives_close_float32_features(vit):
    images = torch.randn(4, 3, 16, 16)
    plain = extract_features(vit, [images], ("mean",))["mean"]
    half = extract_features(copy.deepcopy(vit).bfloat16(), [images], ("mean",))["mean"]
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(plain, half).min() > 0.999


def test_pre_training_model_is_refused_in_favour_of_its_encoder():
    """Mistake 40: the projection z is ten points worse than the encoder's h."""

    class ForPreTraining(SmallCNN):
        def forward(self, pixel_values):
            return SimpleNamespace(
                loss=torch.zeros(()), projection=self.head(super().forward(pixel_values).pooler_output)
            )

    with pytest.raises(
        ValueError, match="ForPreTraining returns no last_hidden_state; evaluate the encoder alone"
    ):
        extract_features(ForPreTraining(), [torch.randn(1, 3, 16, 16)])


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        extract_features(SmallCNN(), [])
