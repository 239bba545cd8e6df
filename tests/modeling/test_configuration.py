"""Configs: what they refuse, what they keep through a file."""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.mae import MAEConfig
from hf_ssl.modeling.moco import MoCoConfig
from hf_ssl.modeling.shared.configuration import SSLTimmConfig, SSLViTConfig, resolve_backbone_config
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.simclr import SimCLRConfig, SimCLRImageProcessor
from tests.modeling.tiny import ONE_OF_EACH, TINY_METHODS, TINY_RESNET, TINY_VIT

every_row = pytest.mark.parametrize("row", TINY_METHODS, ids=lambda row: row.name)
every_method = pytest.mark.parametrize("row", ONE_OF_EACH, ids=lambda row: row.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SimCLRConfig(temprature=0.1),
            "SimCLRConfig has no field 'temprature'; the nearest is 'temperature'",
        ),
        (
            lambda: MoCoConfig(queue_lenght=8),
            "MoCoConfig has no field 'queue_lenght'; the nearest is 'queue_length'",
        ),
        (
            lambda: SSLViTConfig(hiden_size=8),
            "SSLViTConfig has no field 'hiden_size'; the nearest is 'hidden_size'",
        ),
        (
            lambda: MAEConfig(backbone_config={"model_type": "hf_ssl_vit", "patchsize": 4}),
            "SSLViTConfig has no field 'patchsize'; the nearest is 'patch_size'",
        ),
        (lambda: SSLTimmConfig(arch="resnet18"), "SSLTimmConfig has no field 'arch'"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_whole_number_is_a_number():
    assert SimCLRConfig(temperature=1).temperature == 1 and SSLViTConfig(layer_norm_eps=1).layer_norm_eps == 1


@pytest.mark.parametrize(
    "make", [lambda: SimCLRConfig(temperature="0.1"), lambda: SSLViTConfig(hidden_size="8")]
)
def test_text_is_no_number(make):
    with pytest.raises(Exception, match="expected|Validation"):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 225}, "image_size 225 is not a multiple of patch_size 16; use 224 or 240"),
        ({"image_size": 10}, "image_size 10 is not a multiple of patch_size 16; use 16 or 32"),
        (
            {"hidden_size": 100, "num_attention_heads": 3},
            "hidden_size 100 is not a multiple of num_attention_heads 3",
        ),
        (
            {"position_embedding_type": "sincos"},
            "position_embedding_type must be one of learned, .*got 'sincos'",
        ),
        ({"weight_initialization": "xavier"}, "weight_initialization must be one of .*got 'xavier'"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_ones_that_do(fields, message):
    with pytest.raises(Exception, match=message):
        SSLViTConfig(**fields)


def test_a_foreign_backbone_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="must be one of hf_ssl_vit, hf_ssl_timm, got 'vit'"):
        SimCLRConfig(backbone_config={"model_type": "vit"})


def test_a_backbone_config_may_be_an_object_or_a_dictionary_or_absent():
    built = SSLViTConfig(**{key: value for key, value in TINY_VIT.items() if key != "model_type"})
    assert SimCLRConfig(backbone_config=built).backbone_config is built
    assert resolve_backbone_config(TINY_RESNET).architecture == "resnet18"
    assert SimCLRConfig().backbone_config.architecture == "resnet50"


def test_two_configs_share_no_backbone_config():
    assert SimCLRConfig().backbone_config is not SimCLRConfig().backbone_config
    assert MAEConfig().backbone_config.to_dict() == MAEConfig().backbone_config.to_dict()


def comparable(config) -> dict:
    bookkeeping = ("transformers_version", "_name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in bookkeeping}


@every_row
def test_a_config_comes_back_equal_from_its_file(row, tmp_path):
    config = row.config()
    config.save_pretrained(tmp_path)
    for loaded in (type(config).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is type(config) and comparable(loaded) == comparable(config)
        assert type(loaded.backbone_config) is type(config.backbone_config)


@every_method
def test_what_others_write_into_a_config_survives_a_reload(row, tmp_path):
    """Trainer sets `use_cache`, the Hub export `auto_map`; both come back as keyword arguments."""
    config = row.config()
    config.use_cache = False
    config.auto_map = {"AutoConfig": "configuration_x.XConfig"}
    config.architectures = ["X"]
    config.save_pretrained(tmp_path)
    assert (
        comparable(type(config).from_pretrained(tmp_path))["backbone_config"]
        == comparable(config)["backbone_config"]
    )


def test_a_field_can_be_changed_while_loading_and_a_misspelt_one_not(tmp_path):
    row = ONE_OF_EACH[0]
    row.config().save_pretrained(tmp_path)
    assert SimCLRConfig.from_pretrained(tmp_path, temperature=0.25).temperature == 0.25


@every_method
def test_model_type_has_our_prefix(row):
    assert METHODS[row.method].config_class.model_type == f"hf_ssl_{row.method}"


def test_image_size_of_a_method_is_that_of_its_backbone():
    assert SimCLRConfig(backbone_config=TINY_RESNET).image_size == 16


# Image processors


@every_method
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB", "LA", "1"])
def test_processors_take_images_of_any_mode(row, mode):
    processor = METHODS[row.method].processor_class.for_image_size(32)
    image = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)).convert(mode)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and pixels.isfinite().all()


def test_small_images_are_resized_whole_and_large_ones_cropped():
    small, large = SSLImageProcessor.for_image_size(64), SSLImageProcessor.for_image_size(224)
    assert dict(small.size) == {"height": 64, "width": 64} or small.size.height == 64
    assert large.size.shortest_edge == 256 and large.crop_size.height == 224
    pixels = large(Image.new("RGB", (300, 500)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)


def test_simclr_leaves_values_between_0_and_1():
    pixels = SimCLRImageProcessor.for_image_size(32)(Image.new("RGB", (32, 32), "white"), return_tensors="pt")
    assert pixels["pixel_values"].max() == pytest.approx(1.0) == pixels["pixel_values"].min()


def test_views_of_a_processor_can_be_replaced_and_are_kept(tmp_path):
    views = [{"count": 1, "kind": "global", "size": 16, "crop": {"scale": [0.5, 1.0]}, "transforms": []}]
    SimCLRImageProcessor.for_image_size(16, views=views, image_mean=[0.5] * 3).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert (
        type(loaded) is SimCLRImageProcessor
        and loaded.views == views
        and list(loaded.image_mean) == [0.5] * 3
    )
