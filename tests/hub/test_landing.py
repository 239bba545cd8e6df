"""Encoders land in native classes that need none of this package; a wrong landing never appears."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from hf_ssl.hub import export_encoder, landing_timm, landing_vit
from hf_ssl.hub.parity import TOLERANCE, enlarge, random_images
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from tests.clean_process import run_python

VIT = {
    "model_type": "hf_ssl_vit", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}
SMALL_STEM = {
    "model_type": "hf_ssl_timm",
    "architecture": "resnet18",
    "image_size": 32,
    "model_args": TINY_RESNET,
}
CASES = {  # name: method, backbone, fields of the method's config
    "mae": ("mae", VIT, {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}),
    "mocov3": ("mocov3", {**VIT, "layer_scale_value": 0.3}, {"projection_hidden_size": 16}),
    "dino": ("dino", VIT, {"num_prototypes": 16, "head_hidden_size": 16, "head_bottleneck_size": 8}),
    "dinov2": (
        "dinov2",
        {**VIT, "layer_scale_value": 0.3, "num_register_tokens": 2, "interpolate_antialias": True},
        {"num_prototypes": 16, "head_hidden_size": 16, "head_bottleneck_size": 8},
    ),
    "simclr": ("simclr", SMALL_STEM, {}),
    "moco": ("moco", {**SMALL_STEM, "small_stem_stride": 2}, {"queue_length": 8}),
    "imagenet_stem": ("moco", {**SMALL_STEM, "image_size": 64}, {"queue_length": 8}),
}
CNN_CASES = [name for name, (_, backbone, _) in CASES.items() if backbone["model_type"] == "hf_ssl_timm"]

USER_CODE = """
import json, sys
try:
    import hf_ssl
    raise SystemExit("hf_ssl was importable")
except ImportError:
    pass
import timm, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

def fine_tune(folder):
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    colors = [(200, 80, 40), (60, 160, 40)]
    images = [Image.new("RGB", (32, 32), colors[i % 2][:2] + (i,)) for i in range(64)]
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=2)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    losses = []
    for batch in torch.arange(64).split(8):
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[batch]).logits, labels[batch])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)

results = {}
for name in json.loads(sys.argv[1]):
    image = Image.open(f"{name}.png")
    model = AutoModel.from_pretrained(name).eval()
    inputs = AutoImageProcessor.from_pretrained(name)(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    results[f"{name}.last_hidden_state"] = outputs.last_hidden_state
    results[f"{name}.pooler_output"] = outputs.pooler_output
    extractor = pipeline("image-feature-extraction", model=name)
    results[f"{name}.pipeline"] = torch.tensor(extractor(f"{name}.png", pool=True))
    if "timm" in type(model).__name__.lower():
        network = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
        with torch.no_grad():
            results[f"{name}.timm"] = network(transform(image)[None])
for name in ("mae", "simclr"):
    results[f"{name}.losses"] = fine_tune(name)
save_file({key: value.clone() for key, value in results.items()}, "results.safetensors")
"""


def build(case: str, kind: str = "model_class", **changes: object) -> transformers.PreTrainedModel:
    """A tiny model of a case, with norms that a training could have left."""
    method, backbone, fields = CASES[case]
    torch.manual_seed(0)
    config = METHODS[method].config_class(backbone_config={**backbone, **changes}, **fields)
    model = getattr(METHODS[method], kind)(config).eval()
    for norm in model.modules():
        if getattr(norm, "running_mean", None) is not None and norm.bias is not None:
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model


@pytest.fixture(scope="module")
def landed(tmp_path_factory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """Exports of all cases from run folders; our outputs, and those of a process without this package."""
    home, expected = tmp_path_factory.mktemp("landed"), {}
    for name, (method, backbone, _) in CASES.items():
        run = tmp_path_factory.mktemp(name)
        model = build(name, "pretraining_class")
        processor = METHODS[method].processor_class.for_image_size(backbone["image_size"])
        model.save_pretrained(run)
        processor.save_pretrained(run)
        report = export_encoder(run, home / name)
        image = random_images(3, backbone["image_size"], backbone["image_size"], seed=5)[0]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(home / f"{name}.png")
        with torch.no_grad():
            outputs = model.published_branch().backbone(processor(image, return_tensors="pt")["pixel_values"])
        expected[f"{name}.last_hidden_state"] = outputs.last_hidden_state
        expected[f"{name}.pooler_output"] = outputs.pooler_output
        expected[f"{name}.difference"] = torch.tensor(report.max_abs_difference)
    run_python(USER_CODE, json.dumps(list(CASES)), with_package=False, cwd=home)
    return home, expected, load_file(home / "results.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_process_without_this_package_gets_our_features(landed, name):
    _, expected, results = landed
    for output in ("last_hidden_state", "pooler_output"):
        assert_close(results[f"{name}.{output}"], expected[f"{name}.{output}"], rtol=0, atol=TOLERANCE)
    assert_close(results[f"{name}.pipeline"], expected[f"{name}.pooler_output"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CNN_CASES)
def test_timm_alone_gets_our_features(landed, name):
    _, expected, results = landed
    assert_close(results[f"{name}.timm"], expected[f"{name}.pooler_output"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_fine_tuning_without_this_package_lowers_the_loss(landed, name):
    losses = landed[2][f"{name}.losses"]  # of one epoch of 8 batches
    assert losses[-2:].mean() < 0.8 * losses[:2].mean()


def test_a_plain_vit_lands_without_any_rounding_and_small_stems_with_hardly_any(landed):
    assert [
        float(landed[1][f"{name}.difference"]) for name in ("mae", "simclr", "moco", "imagenet_stem")
    ] == [0] * 4


def test_an_export_holds_the_report_and_nothing_of_this_package(landed):
    home = landed[0]
    report = json.loads((home / "simclr" / "export.json").read_text())
    assert report["native_class"] == "TimmWrapperModel" and "32x32" in report["notes"][0]
    assert report["folder"] == "." and str(home) not in str(report)
    assert json.loads((home / "mae" / "config.json").read_text())["model_type"] == "vit"
    assert (
        "hf_ssl"
        not in (home / "mae" / "config.json").read_text() + (home / "simclr" / "config.json").read_text()
    )
    assert not [path for path in home.iterdir() if path.name.startswith(".")]


def test_model_args_survive_and_hold_no_class_count(landed):
    config = json.loads((landed[0] / "simclr" / "config.json").read_text())
    assert config["model_args"] == {**TINY_RESNET, "replace_stem_pool": True} and config["num_classes"] == 0


def test_mae_encoder_in_vit_model_matches_the_authors_code(golden, tmp_path):
    case = golden("mae")
    backbone = {**VIT, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = METHODS["mae"].config_class(
        backbone_config={**backbone, "image_size": 16, "patch_size": 4}, decoder_hidden_size=16
    )
    model = METHODS["mae"].model_class(config)
    weights = {name.removeprefix("model.sd."): value for name, value in case.items() if "model.sd." in name}
    model.backbone.load_state_dict(authors_vit(weights))
    report = export_encoder(model, tmp_path / "mae")
    native = transformers.AutoModel.from_pretrained(tmp_path / "mae").eval()
    assert (type(native).__name__, report.max_abs_difference) == ("ViTModel", 0.0)
    assert all(
        torch.equal(native.state_dict()[name], value) for name, value in model.backbone.state_dict().items()
    )
    tokens = native(case["model.img"].float()).last_hidden_state
    assert_close(tokens, case["model.full_tokens"].float(), rtol=0, atol=TOLERANCE)


def test_ijepa_encoder_in_its_native_model_matches_the_authors_target_encoder(golden, tmp_path):
    """And is the teacher's, at other sizes too; there is no pooled output that could be random."""
    case = golden("ijepa")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24}
    backbone = {**METHODS["ijepa"].config_class.default_backbone, **size, "patch_size": 4}
    config = METHODS["ijepa"].config_class(backbone_config=backbone, predictor_hidden_size=8)
    model = METHODS["ijepa"].pretraining_class(config)
    weights = {name.removeprefix("tgt.sd."): value for name, value in case.items() if "tgt.sd." in name}
    weights["pos_embed"] = case["enc.sd.pos_embed"]
    model.teacher.backbone.load_state_dict(authors_vit(weights))
    model.save_pretrained(tmp_path / "run")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "run")
    report = export_encoder(encoder, tmp_path / "ijepa")
    native = transformers.AutoModel.from_pretrained(tmp_path / "ijepa").eval()
    assert type(native).__name__ == "IJepaModel" and report.max_abs_difference < 1e-6
    outputs = native(case["fwd.img"].float())
    assert_close(outputs.last_hidden_state, case["fwd.target_full"].float(), rtol=0, atol=TOLERANCE)
    assert outputs.pooler_output is None
    pixels = torch.rand(2, 3, 32, 16)
    resized = native(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_close(resized, encoder(pixels).last_hidden_state, rtol=0, atol=TOLERANCE)
    pipe = transformers.pipeline("image-feature-extraction", model=str(tmp_path / "ijepa"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ijepa")(image, return_tensors="pt")
    tokens = encoder(**inputs).last_hidden_state
    assert_close(torch.tensor(pipe(image)), tokens, rtol=0, atol=TOLERANCE)


def authors_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a one-block ViT under our names."""
    names = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
        "blocks.0.norm1": "layers.0.layernorm_before", "blocks.0.norm2": "layers.0.layernorm_after",
        "blocks.0.attn.proj": "layers.0.attention.o_proj", "blocks.0.mlp.fc1": "layers.0.mlp.fc1",
        "blocks.0.mlp.fc2": "layers.0.mlp.fc2",
    }  # fmt: skip
    state = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if name in names:
            state[names[name]] = value
        elif module in names:
            state[f"{names[module]}.{kind}"] = value
        elif module == "blocks.0.attn.qkv":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[f"layers.0.attention.{letter}_proj.{kind}"] = part
    return state


@pytest.mark.parametrize(
    ("changes", "native_class"),
    [
        ({"use_class_token": False}, "IJepaModel"),
        ({"num_register_tokens": 2}, "Dinov2WithRegistersModel"),
        ({"num_register_tokens": 2, "layer_scale_value": None}, "Dinov2WithRegistersModel"),
        ({"use_swiglu_ffn": True}, "Dinov2Model"),
        ({"qkv_bias": False, "layer_scale_value": None, "use_mask_token": True}, "ViTModel"),
        ({"use_mask_token": True}, "Dinov2Model"),
        ({"use_mask_token": True, "intermediate_size": 48}, "ViTModel"),
    ],
)
def test_vits_land_in_the_class_that_has_their_parts(tmp_path, changes, native_class):
    report = export_encoder(build("mocov3", **changes), tmp_path / "vit")
    assert report.native_class == native_class and report.max_abs_difference < 1e-6


@pytest.mark.parametrize("name", ["mae", "mocov3"])
def test_other_image_sizes_agree_with_the_native_interpolation(tmp_path, name):
    model = build(name)
    export_encoder(model, tmp_path / "vit")
    native = transformers.AutoModel.from_pretrained(tmp_path / "vit").eval()
    pixels = torch.rand(2, 3, 48, 24)
    expected = model(pixels).last_hidden_state
    assert_close(
        native(pixels, interpolate_pos_encoding=True).last_hidden_state, expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("num_register_tokens", [0, 2])
def test_dinov2_lands_exactly_at_other_sizes_and_with_hidden_patches(tmp_path, num_register_tokens):
    """Mistake 36: registers have no position; the mask token travels, LayerScale is not folded."""
    changes = {"num_register_tokens": num_register_tokens, "interpolate_antialias": num_register_tokens > 0}
    model = build("dinov2", use_mask_token=True, **changes)
    with torch.no_grad():
        model.backbone.embeddings.mask_token.normal_()
    report = export_encoder(model, tmp_path / "vit")
    native = transformers.AutoModel.from_pretrained(tmp_path / "vit").eval()
    assert not report.notes[1:] and report.native_class.startswith("Dinov2")
    for size in ((32, 32), (48, 24), (16, 24)):
        pixels = torch.rand(2, 3, *size)
        hidden = torch.rand(2, size[0] * size[1] // 64) < 0.4
        expected = model.backbone(pixels, bool_masked_pos=hidden)
        outputs = native(pixels, bool_masked_pos=hidden)
        for name in ("last_hidden_state", "pooler_output"):
            assert_close(outputs[name], expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("stride", "side"), [(1, 33), (2, 33), (2, 32)])
def test_small_stem_equals_ours_up_to_the_border_for_odd_sides(tmp_path, stride, side):
    model = build("simclr", small_stem_stride=stride, image_size=side)
    export_encoder(model, tmp_path / "cnn")
    native = transformers.AutoModel.from_pretrained(tmp_path / "cnn").eval()
    maps = []
    network = native.timm_model
    network.maxpool.register_forward_hook(lambda *call: maps.append(call[2]))
    pixels = torch.rand(2, 3, side, side)
    native(enlarge(pixels, {1: 4, 2: 2}[stride]))
    own = model.backbone.network
    assert_close(maps[0], own.act1(own.bn1(own.conv1(pixels))), rtol=0, atol=3e-6)


def test_the_norm_added_to_the_small_stem_hardly_moves_features_while_training(tmp_path):
    model = build("simclr")
    own = model.backbone.network
    own.train()
    pixels = torch.cat([random_images(3, 32, 32, seed) for seed in range(8)]).float() / 255
    export_encoder(model, tmp_path / "cnn")
    native = transformers.AutoModel.from_pretrained(tmp_path / "cnn").train().timm_model
    expected = own.act1(own.bn1(own.conv1(pixels)))
    actual = native.maxpool(native.act1(native.bn1(native.conv1(enlarge(pixels, 4)))))
    assert (actual - expected).norm() < 0.15 * expected.norm()  # 0.5 with statistics 0 and 1


@pytest.mark.parametrize("name", ["mae", "simclr", "imagenet_stem"])
def test_encoders_of_grey_images_land(tmp_path, name):
    model = build(name, num_channels=1)
    with pytest.raises(ValueError, match="takes 1 channels, the processor normalises 3"):
        export_encoder(model, tmp_path / "grey")
    processor = SSLImageProcessor.for_image_size(model.config.image_size, image_mean=[0.5], image_std=[0.2])
    assert export_encoder(model, tmp_path / "grey", processor).max_abs_difference < TOLERANCE
    native = transformers.AutoModel.from_pretrained(tmp_path / "grey")
    if name in CNN_CASES:
        native = timm.create_model(f"local-dir:{tmp_path}/grey", pretrained=True)
    assert next(value for value in native.parameters() if value.ndim == 4).shape[1] == 1


def test_processor_of_a_vit_export_gives_our_pixels(tmp_path):
    processor = METHODS["mae"].processor_class.for_image_size(96)
    export_encoder(build("mae", image_size=96), tmp_path / "vit", processor)
    native = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (130, 111), dtype=np.uint8))  # grey
    own, theirs = (each(image, return_tensors="pt")["pixel_values"] for each in (processor, native))
    assert torch.equal(own, theirs) and own.shape == (1, 3, 96, 96)


def test_processor_of_a_cnn_export_gives_our_pixels_but_for_pillows_rounding(tmp_path):
    processor = METHODS["simclr"].processor_class.for_image_size(96)
    export_encoder(build("simclr", image_size=96), tmp_path / "cnn", processor)
    native = transformers.AutoImageProcessor.from_pretrained(tmp_path / "cnn")
    image = Image.fromarray(random_images(3, 130, 111)[0].permute(1, 2, 0).numpy())
    own, theirs = (each(image, return_tensors="pt")["pixel_values"] for each in (processor, native))
    assert_close(theirs, own, rtol=0, atol=1.01 / 255)


def test_an_encoder_of_nan_is_refused(tmp_path):
    model = build("mae")
    nn.init.constant_(model.backbone.layernorm.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity; export an earlier checkpoint"):
        export_encoder(model, tmp_path / "vit")


def test_a_tampered_weight_is_refused_by_its_layer_and_leaves_nothing(tmp_path, monkeypatch):
    honest = landing_vit._vit_state

    def tampered(*args):
        state = honest(*args)
        state["layers.1.mlp.fc1.weight"] = state["layers.1.mlp.fc1.weight"] * 1.1
        return state

    monkeypatch.setattr(landing_vit, "_vit_state", tampered)
    with pytest.raises(ValueError, match="ViTModel differs from our encoder by .* first in 'layers.1'"):
        export_encoder(build("mae"), tmp_path / "vit")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_the_earlier_one_as_it_was(tmp_path, monkeypatch):
    export_encoder(build("simclr"), tmp_path / "cnn")
    before = {path.name: path.read_bytes() for path in (tmp_path / "cnn").iterdir()}

    def tampered(state, *args, **kwargs):
        save_file({**state, "layer2.0.conv1.weight": state["layer2.0.conv1.weight"] * 1.1}, *args, **kwargs)

    monkeypatch.setattr(landing_timm, "save_file", tampered)
    with pytest.raises(ValueError, match="first in 'layer2'"):
        export_encoder(build("simclr"), tmp_path / "cnn")
    assert {path.name: path.read_bytes() for path in (tmp_path / "cnn").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_only_an_earlier_export_is_replaced_unasked(tmp_path):
    model, folder = build("mae"), tmp_path / "vit"
    export_encoder(model, folder)
    export_encoder(model, folder)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis.txt.*overwrite=True"):
        export_encoder(model, folder)
    export_encoder(model, folder, overwrite=True)
    assert not (folder / "thesis.txt").exists()


def test_a_run_is_never_replaced_by_its_own_export(tmp_path):
    build("mae", "pretraining_class").save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="would replace the run"):
        export_encoder(tmp_path / "run", tmp_path / "run", overwrite=True)
    with pytest.raises(ValueError, match="there is no folder '.*elsewhere'"):
        export_encoder(tmp_path / "elsewhere", tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        export_encoder(tmp_path / "empty", tmp_path / "vit")
    export_encoder(tmp_path / "run", tmp_path / "run" / "encoder")
    with pytest.raises(ValueError, match="ViTModel is no model of this package"):
        export_encoder(tmp_path / "run" / "encoder", tmp_path / "vit")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mocov3", {"use_class_token": False, "num_register_tokens": 2}, "use_class_token=True"),
        ("simclr", {"model_args": {**TINY_RESNET, "act_layer": "silu"}}, "leave norm_layer, act_layer"),
    ],
)
def test_what_no_native_class_expresses_is_refused_in_one_line(tmp_path, case, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        export_encoder(build(case, **changes), tmp_path / "folder")
    assert "\n" not in str(error.value) and not (tmp_path / "folder").exists()


def test_a_processor_without_fixed_output_size_is_refused(tmp_path):
    processor = SSLImageProcessor(size={"shortest_edge": 32})
    with pytest.raises(ValueError, match="'shortest_edge': 32.*use for_image_size"):
        export_encoder(build("mae"), tmp_path / "vit", processor)
