"""SimCLR against the authors' heads and loss, and the mistakes that copies of it make."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_ssl.modeling.shared.distributed import SynchronizedBatchNorm
from hf_ssl.modeling.simclr import SimCLRConfig, SimCLRImageProcessor
from tests.closeness import near
from tests.modeling.tiny import BY_NAME

ROW = BY_NAME["simclr-vit"]


@pytest.mark.parametrize(("version", "num_layers"), [("v1", 2), ("v2", 3)])
def test_head_of_the_model_matches_the_authors_code(golden, version, num_layers):
    case = golden("simclr")
    model = ROW.build(
        backbone_config={"hidden_size": 8, "num_attention_heads": 1},
        projection_size=4,
        projection_hidden_size=7,
        num_projection_layers=num_layers,
    )
    head = model.student.head.double()
    assert head.layers[0].bias is None
    head.layers[0] = nn.Linear(7, 7, bias=False).double()  # the golden features are 7 wide
    for index in range(num_layers):
        linear, norm = head.layers[3 * index], head.layers[3 * index + 1]
        linear.weight.data.copy_(case[f"head_{version}_l{index}_weight"])
        norm.weight.data.copy_(case[f"head_{version}_l{index}_gamma"])
        if f"head_{version}_l{index}_beta" in case:
            norm.bias.data.copy_(case[f"head_{version}_l{index}_beta"])
        else:
            assert norm.bias is None and index == num_layers - 1
    near(head(case["head_in"]), case[f"head_{version}_out"])
    for index in range(num_layers):
        near(head.layers[3 * index + 1].running_var, case[f"head_{version}_l{index}_running_var"])


def test_loss_is_that_of_the_two_views_of_one_forward():
    """Mistakes 12 to 17 at once: the formula written out, with self-similarity out and the positive in."""
    model = ROW.build().double()
    pixels = ROW.images(6, dtype=torch.float64)
    blocked = torch.cat([pixels[:, 0], pixels[:, 1]])  # one forward: BatchNorm over both views
    unit = F.normalize(model.student(blocked)[1], dim=1)
    similarity = (unit @ unit.T / 0.5).fill_diagonal_(float("-inf"))
    own_view = torch.cat([torch.arange(6, 12), torch.arange(6)])
    near(model(pixels).loss, F.cross_entropy(similarity, own_view))


def test_fresh_model_starts_near_the_log_of_candidates():
    """Mistake 15: twice this value is the sum of both directions."""
    model = ROW.build()
    torch.manual_seed(0)
    loss = model(torch.randn(64, 2, 3, 16, 16)).loss.item()
    start = model.expectations(num_images=64)["loss_at_start"]
    assert start == pytest.approx(math.log(127)) and abs(loss - start) < 0.7


def test_expected_floor_is_that_of_aligned_positives_among_uniform_negatives():
    model = ROW.build()
    near(model.expectations(num_images=256)["loss_when_learned"], math.log(1 + 510 * math.exp(-2)), 1e-9)


def test_every_norm_of_the_model_is_synchronised():
    for name in ("simclr-vit", "simclr-cnn"):
        norms = [m for m in BY_NAME[name].build().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(norm, SynchronizedBatchNorm) for norm in norms)


def test_head_weights_start_with_the_authors_deviation():
    model = ROW.build(projection_size=128, projection_hidden_size=256)
    for layer in (model.student.head.layers[0], model.student.head.layers[3]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_residual_scales_start_at_zero():
    network = BY_NAME["simclr-cnn"].build().student.backbone.network
    assert not network.layer1[0].bn2.weight.any() and network.layer1[0].bn1.weight.eq(1).all()


def test_head_is_as_wide_as_the_features_unless_told_otherwise():
    layers = ROW.build().student.head.layers
    assert layers[0].weight.shape == (16, 16) and layers[3].weight.shape == (8, 16)


def test_one_image_has_no_negatives():
    with pytest.raises(ValueError, match="at least 2 images per step"):
        ROW.build().check_global_batch(1)


def test_defaults_are_the_papers():
    config = SimCLRConfig()
    assert (config.temperature, config.projection_size, config.num_projection_layers) == (0.1, 128, 2)
    assert config.backbone_config.architecture == "resnet50"


def test_temperature_of_zero_is_refused():
    with pytest.raises(Exception, match="temperature must be > 0, got 0"):
        SimCLRConfig(temperature=0)


def test_small_views_have_half_the_colour_strength_and_no_blur():
    large, small = SimCLRImageProcessor.default_views(224)[0], SimCLRImageProcessor.default_views(32)[0]
    assert [step["type"] for step in large["transforms"]][-1] == "gaussian_blur"
    assert "gaussian_blur" not in [step["type"] for step in small["transforms"]]
    assert (large["transforms"][1]["brightness"], small["transforms"][1]["brightness"]) == (0.8, 0.4)
    assert large["count"] == 2
