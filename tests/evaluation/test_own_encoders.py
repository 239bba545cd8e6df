"""The published encoders of our methods in the protocol, on both kinds of backbone."""

import pytest
import torch
from torch.testing import assert_close

from hf_ssl.evaluation.baselines import random_encoder
from hf_ssl.evaluation.features import default_pools, extract_features
from hf_ssl.modeling import METHODS

VIT = {
    "model_type": "hf_ssl_vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
CNN = {"model_type": "hf_ssl_timm", "architecture": "resnet18", "image_size": 32, "small_stem_stride": 2}


@pytest.mark.parametrize("name", ["mae", "mocov3"])
def test_tokens_of_our_vit_are_found_behind_its_prefix(name):
    encoder = METHODS[name].model_class(METHODS[name].config_class(backbone_config=VIT))
    images = torch.randn(2, 3, 16, 16)
    assert default_pools(encoder, images) == ("class_token", "mean", "grid2")
    features = extract_features(encoder, [images], ("class_token", "mean", "grid2", "pooler"))
    with torch.no_grad():
        hidden = encoder.eval()(images).last_hidden_state
    assert hidden.shape == (2, 17, 16)
    assert_close(features["mean"], hidden[:, 1:].mean(dim=1))
    assert_close(features["class_token"], features["pooler"])


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_random_cnn_has_the_statistics_of_the_data_and_its_own_pooling_is_the_mean(name):
    encoder = METHODS[name].model_class(METHODS[name].config_class(backbone_config=CNN))
    images = torch.randn(8, 3, 32, 32)
    assert default_pools(encoder, images) == ("mean",)
    fresh = random_encoder(encoder, [images])
    stem = fresh.backbone.network.conv1(images)
    assert_close(fresh.backbone.network.bn1.running_mean, stem.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    features = extract_features(fresh, [images], ("mean", "pooler"))
    assert_close(features["mean"], features["pooler"])


def test_pre_training_model_is_refused_in_favour_of_its_encoder():
    """Mistake 40: scores belong to h of the published branch, not to z."""
    method = METHODS["simclr"]
    model = method.pretraining_class(method.config_class(backbone_config=CNN))
    with pytest.raises(ValueError, match="evaluate the encoder alone"):
        extract_features(model, [torch.randn(2, 2, 3, 32, 32)])


def test_encoder_read_from_a_run_is_the_branch_that_was_trained(tmp_path):
    """Mistake 40: MoCo publishes its student, not the momentum encoder of the keys."""
    method = METHODS["moco"]
    torch.manual_seed(0)
    model = method.pretraining_class(method.config_class(backbone_config=CNN, queue_length=8))
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    found = extract_features(method.model_class.from_pretrained(tmp_path), [images])["mean"]
    assert_close(found, extract_features(model.student.backbone, [images])["mean"])
    assert not torch.allclose(found, extract_features(model.teacher.backbone, [images])["mean"])
