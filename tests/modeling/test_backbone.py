"""timm networks as backbones: which, with which stem, and how they start."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ssl.modeling.shared.backbone import SSLTimmBackbone, build_backbone
from hf_ssl.modeling.shared.configuration import SSLTimmConfig, SSLViTConfig
from hf_ssl.modeling.simclr import SimCLRConfig, SimCLRModel
from tests.closeness import near
from tests.modeling.tiny import TINY_RESNET


def config(**changes) -> SSLTimmConfig:
    fields = {key: value for key, value in TINY_RESNET.items() if key != "model_type"}
    return SSLTimmConfig(**{**fields, **changes})


def test_features_are_those_of_the_stock_network():
    ours = SSLTimmBackbone(config(image_size=64)).eval()
    stock = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]).eval()
    stock.load_state_dict(ours.network.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 64, 64)
    near(ours(pixels).pooler_output, stock(pixels), 1e-6)
    near(ours(pixels).last_hidden_state, stock.forward_features(pixels), 1e-6)


@pytest.mark.parametrize(("image_size", "stride"), [(32, 1), (63, 1), (64, 0), (224, 0)])
def test_images_under_64_pixels_get_the_small_stem(image_size, stride):
    assert config(image_size=image_size).small_stem_stride == stride


@pytest.mark.parametrize(("stride", "side"), [(1, 4), (2, 2)])
def test_the_small_stem_is_a_3x3_convolution_without_pooling(stride, side):
    backbone = SSLTimmBackbone(config(image_size=32, small_stem_stride=stride))
    stem = backbone.network.conv1
    assert stem.kernel_size == (3, 3) and stem.stride == (stride, stride) and stem.padding == (1, 1)
    assert isinstance(backbone.network.maxpool, nn.Identity)
    assert backbone(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 16, side, side)
    # Kaiming with fan_out, as timm starts its other convolutions: 2 / (9 * 64).
    assert stem.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


@pytest.mark.parametrize("architecture", ["mobilenetv3_small_050", "resnet26d", "vit_tiny_patch16_224"])
def test_the_small_stem_is_refused_for_networks_without_a_7x7_stem(architecture):
    with pytest.raises(ValueError, match=f"got '{architecture}': use resnet18 .*small_stem_stride=0"):
        SSLTimmBackbone(SSLTimmConfig(architecture=architecture, image_size=32))


def test_an_unknown_architecture_is_refused_with_similar_names():
    with pytest.raises(ValueError, match="timm knows no architecture 'resnet18x' .*resnet18"):
        SSLTimmBackbone(SSLTimmConfig(architecture="resnet18x"))


def test_a_stem_stride_that_cannot_be_exported_is_refused():
    with pytest.raises(Exception, match="small_stem_stride must be 0, 1 or 2, got 3"):
        config(small_stem_stride=3)


def test_any_other_network_of_timm_works_on_larger_images():
    backbone = SSLTimmBackbone(SSLTimmConfig(architecture="mobilenetv3_small_050", image_size=64)).eval()
    outputs = backbone(torch.randn(1, 3, 64, 64))
    assert outputs.last_hidden_state.ndim == 4 and outputs.pooler_output.shape == (1, backbone.hidden_size)


def test_a_transformer_of_timm_returns_tokens():
    arguments = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = SSLTimmBackbone(
        SSLTimmConfig(
            architecture="vit_tiny_patch16_224", model_args=arguments, image_size=32, small_stem_stride=0
        )
    ).eval()
    outputs = backbone(torch.randn(2, 3, 32, 32))
    assert outputs.last_hidden_state.shape == (2, 5, 32) and outputs.pooler_output.shape == (2, 32)


def test_attention_weights_of_timm_are_refused():
    with pytest.raises(ValueError, match="use an hf_ssl_vit backbone"):
        SSLTimmBackbone(config())(torch.zeros(1, 3, 16, 16), output_attentions=True)


def test_construction_keeps_the_start_that_timm_gives():
    """transformers would start every convolution and norm anew."""
    torch.manual_seed(0)
    expected = SSLTimmBackbone(config()).network.state_dict()
    torch.manual_seed(0)
    model = SimCLRModel(SimCLRConfig(backbone_config=TINY_RESNET))
    for name, value in model.backbone.network.state_dict().items():
        assert value.equal(expected[name]), name


def test_tensors_that_a_checkpoint_lacks_start_as_timm_starts_them(tmp_path):
    model = SimCLRModel(SimCLRConfig(backbone_config=TINY_RESNET))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = ["backbone.network.conv1.weight", "backbone.network.layer1.0.bn2.weight"]
    kept = {name: value for name, value in state.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = SimCLRModel.from_pretrained(tmp_path)
    assert loaded.backbone.network.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)
    assert not loaded.backbone.network.layer1[0].bn2.weight.any()  # the zero residual scale
    for name, value in kept.items():
        assert loaded.state_dict()[name].equal(value), name


def test_gradient_checkpointing_of_timm_is_refused_and_not_ignored():
    model = SimCLRModel(SimCLRConfig(backbone_config=TINY_RESNET))
    with pytest.raises(ValueError, match="not compatible with gradient checkpointing"):
        model.activation_checkpointing_enable()


def test_a_config_builds_its_own_kind():
    tiny = SSLViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4)
    assert type(build_backbone(tiny)).__name__ == "SSLViTBackbone"
    assert type(build_backbone(config())).__name__ == "SSLTimmBackbone"
