from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from transformers import TimmWrapperConfig, TimmWrapperModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_ssl.evaluation.baselines import PixelExtractor, estimate_batchnorm_statistics, random_encoder
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from tests.distributed import run_processes


def test_pixels_are_what_the_processor_was_given():
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    pixel_values = processor(images=list(image), return_tensors="pt")["pixel_values"]
    features = PixelExtractor.of(processor)(pixel_values)
    assert_close(features["32x32"], image.flatten(1) / 255, rtol=0, atol=1e-5)


def test_averaged_pixels_are_means_of_squares():
    image = torch.arange(16 * 16.0).reshape(1, 1, 16, 16)
    features = PixelExtractor()(image)
    assert features["8x8"].shape == (1, 64)
    assert features["8x8"][0, 0] == (0 + 1 + 16 + 17) / 4
    assert set(features) == {"16x16", "8x8"}


def test_large_images_are_averaged_to_32_a_side():
    assert PixelExtractor()(torch.zeros(2, 3, 96, 64))["32x32"].shape == (2, 3072)


class NormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.1)
        self.drop = nn.Dropout(0.5)

    def forward(self, pixel_values):
        return SimpleNamespace(last_hidden_state=self.drop(self.norm(pixel_values)))


def test_statistics_are_the_mean_over_the_batches_and_modes_come_back():
    torch.manual_seed(0)
    net = NormNet().train()
    batches = [5 + 2 * torch.randn(64, 3, 8, 8), 7 + 2 * torch.randn(64, 3, 8, 8)]
    estimate_batchnorm_statistics(net, batches)
    assert_close(net.norm.running_mean, torch.stack([b.mean(dim=(0, 2, 3)) for b in batches]).mean(dim=0))
    assert_close(net.norm.running_var, torch.stack([b.var(dim=(0, 2, 3)) for b in batches]).mean(dim=0))
    assert net.norm.momentum == 0.1 and net.training and net.norm.training and net.drop.training


def test_statistics_without_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        estimate_batchnorm_statistics(NormNet(), [])


def vit():
    return ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                  image_size=16, patch_size=4)
    )  # fmt: skip


def test_random_encoder_has_other_weights_and_touches_neither_encoder_nor_random_state():
    encoder = vit().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fresh = random_encoder(encoder, [])
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    weight = "layers.0.mlp.fc1.weight"
    assert not torch.equal(fresh.state_dict()[weight], before[weight])
    assert fresh.state_dict()[weight].std().item() == pytest.approx(
        encoder.config.initializer_range, rel=0.15
    )
    again = random_encoder(encoder, [])
    assert torch.equal(again.state_dict()[weight], fresh.state_dict()[weight])


def test_random_timm_cnn_gets_the_statistics_of_the_data():
    encoder = TimmWrapperModel(TimmWrapperConfig(architecture="resnet18", model_args={}, num_labels=0))
    images = torch.randn(16, 3, 32, 32)
    fresh = random_encoder(encoder, [images])
    stem = fresh.timm_model.conv1(images)
    assert_close(fresh.timm_model.bn1.running_mean, stem.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(fresh.timm_model.conv1.weight, encoder.timm_model.conv1.weight)


def test_module_that_cannot_be_built_afresh_is_refused():
    with pytest.raises(TypeError, match="pass initial_encoder"):
        random_encoder(NormNet(), [])


def statistics_of_the_first_process() -> float | None:
    """The mean that process 0 finds by itself with a network whose BatchNorm is over all processes."""
    norm = convert_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(1)))
    if dist.get_rank() > 0:
        return None
    network = Wrapper(norm)
    estimate_batchnorm_statistics(network, [torch.full((2, 1, 4, 4), 3.0)])
    return float(norm[0].running_mean)


class Wrapper(torch.nn.Module):
    """An encoder of one module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values)


def test_one_process_estimates_statistics_without_waiting_for_the_others():
    """Floors are measured by the first alone; synchronised norms would wait for ever."""
    assert run_processes(statistics_of_the_first_process) == [3.0, None]
