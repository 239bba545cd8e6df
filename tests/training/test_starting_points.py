"""What a run starts from: exactly that and all of it; what is missing or too much is named and refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_ssl.hub import export_encoder, prepare_repository, publish
from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.positions import resize_positions
from hf_ssl.training.frozen_parts import build_model
from hf_ssl.training.recipes import Recipe, RecipeError, load_recipe
from hf_ssl.training.run import train
from hf_ssl.training.starting_points import find_starting_point
from tests.hub_server import HubServer
from tests.modeling.tiny import BY_NAME

FOREIGN_CONFIG = {
    "model_type": "foreign",
    "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
}


def started(name: str, start: Any, allow_new_heads: bool = False, **changes: Any) -> Any:
    """A tiny model of a row, built as a run builds it from `start`."""
    config = BY_NAME[name].config(**changes)
    method = BY_NAME[name].method
    recipe = Recipe("tiny", method, init_from=str(start), allow_new_heads=allow_new_heads)
    return build_model(recipe, config)


def save(folder: Path, name: str, seed: int = 7, **changes: Any) -> Any:
    """A pre-training checkpoint of a row, other than a fresh model in every tensor."""
    row = BY_NAME[name]
    model = row.build(seed=seed, **changes)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1) if not value.is_floating_point() else value.add_(torch.rand_like(value), alpha=0.1)
    model.save_pretrained(folder)
    METHODS[row.method].processor_class.for_image_size(row.image_size).save_pretrained(folder)
    return model


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["moco-v2", "moco-v2-splits", "mocov3-vit", "simclr-cnn", "mae"])
def test_a_checkpoint_and_a_copy_of_its_repository_give_every_tensor(tmp_path: Path, name: str, caplog: Any):
    caplog.set_level(logging.INFO, "hf_ssl")
    saved = save(tmp_path / "run", name)
    prepare_repository(tmp_path / "run", tmp_path / "copy")
    for start in ("run", "copy"):
        assert_same(started(name, tmp_path / start).state_dict(), saved.state_dict())
    assert f"with all of its {len(saved.state_dict())} tensors" in caplog.text


@pytest.mark.parametrize("stride", [1, 2])
def test_the_native_encoder_of_a_small_stem_gives_its_network_back_to_the_bit(
    tmp_path: Path, stride: int, caplog: Any
):
    caplog.set_level(logging.INFO, "hf_ssl")
    changes = {"backbone_config": {"small_stem_stride": stride}}
    saved = save(tmp_path / "run", "moco-v2-splits", **changes)
    export_encoder(tmp_path / "run", tmp_path / "encoder")
    model = started("moco-v2-splits", tmp_path / "encoder", **changes)
    for branch in (model.student, model.teacher):
        assert_same(branch.backbone.state_dict(), saved.student.backbone.state_dict())
    assert "(TimmWrapperModel); heads and what else training keeps start afresh" in caplog.text
    assert not torch.equal(model.queue.keys, saved.queue.keys)


def test_a_small_stem_that_was_trained_after_its_export_is_refused(tmp_path: Path):
    save(tmp_path / "run", "simclr-cnn")
    export_encoder(tmp_path / "run", tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    weights = load_file(file)
    weights["conv1.weight"][0, 0, 1, 1] += 0.1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        RecipeError, match="was not exported from a small stem of stride 1, or was trained since"
    ):
        started("simclr-cnn", tmp_path / "encoder")
    with pytest.raises(RecipeError, match="was not exported from a small stem of stride 2"):
        started("simclr-cnn", tmp_path / "encoder", backbone_config={"small_stem_stride": 2})


def native_vit(folder: Path, layers: int = 2) -> ViTModel:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64, image_size=16,
        patch_size=4, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = ViTModel(config)
    model.save_pretrained(folder)
    return model


def test_a_foreign_native_vit_starts_both_branches(tmp_path: Path):
    native = native_vit(tmp_path / "vit").state_dict()
    model = started("mocov3-vit", tmp_path / "vit")
    for branch in (model.student, model.teacher):
        for key, value in branch.backbone.state_dict().items():
            assert torch.equal(native[key], value), key


@pytest.mark.parametrize(
    ("options", "native_class"),
    [
        ({"num_register_tokens": 2, "layer_scale_value": 0.3}, "Dinov2WithRegistersModel"),
        ({"use_swiglu_ffn": True, "intermediate_size": 64}, "Dinov2Model"),
        ({"use_class_token": False}, "IJepaModel"),
        ({}, "ViTModel"),
    ],
)
def test_every_native_vit_gives_the_encoder_back_that_landed_in_it(
    tmp_path: Path, options: dict[str, Any], native_class: str
):
    saved = save(tmp_path / "run", "mocov3-vit", backbone_config=options)
    assert export_encoder(tmp_path / "run", tmp_path / "encoder").native_class == native_class
    model = started("mocov3-vit", tmp_path / "encoder", backbone_config=options)
    for branch in (model.student, model.teacher):
        assert_same(branch.backbone.state_dict(), saved.student.backbone.state_dict())


@pytest.mark.parametrize("gated", [False, True])
def test_a_foreign_layer_scale_is_folded_where_the_backbone_has_none(tmp_path: Path, gated: bool):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    config = Dinov2Config(**sizes, patch_size=4, layerscale_value=0.3, use_swiglu_ffn=gated)
    native = Dinov2Model(config).eval()
    native.save_pretrained(tmp_path / "dinov2")
    model = started("mocov3-vit", tmp_path / "dinov2", backbone_config={"use_swiglu_ffn": gated}).eval()
    pixels = torch.rand(2, 3, 16, 16)
    found = model.student.backbone(pixels).last_hidden_state
    torch.testing.assert_close(found, native(pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_an_encoder_that_does_not_fit_is_refused_with_the_tensors_counted(tmp_path: Path):
    native_vit(tmp_path / "deep", layers=3)
    with pytest.raises(RecipeError, match=r"has 16 tensors more than this backbone, e.g. 'layers\.2\."):
        started("mocov3-vit", tmp_path / "deep")
    native_vit(tmp_path / "shallow", layers=1)
    with pytest.raises(RecipeError, match=r"lacks 16 of \d+ tensors, e.g. 'layers\.1\."):
        started("mocov3-vit", tmp_path / "shallow")


def test_heads_that_are_missing_need_consent_and_are_counted(tmp_path: Path, caplog: Any):
    saved = save(tmp_path / "run", "moco-v2")
    file = tmp_path / "run" / "model.safetensors"
    weights = load_file(file)
    del weights["queue.keys"], weights["queue.position"]
    save_file({**weights, "predictor.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    message = (
        r"2 tensors missing or of another shape \(e.g. queue.keys\), 1 tensors of no use here \(e.g. pre"
    )
    with pytest.raises(RecipeError, match=message + ".*allow_new_heads=true"):
        started("moco-v2", tmp_path / "run")
    model = started("moco-v2", tmp_path / "run", allow_new_heads=True)
    assert torch.equal(
        model.teacher.head.state_dict()["layers.0.weight"], weights["teacher.head.layers.0.weight"]
    )
    assert (
        torch.allclose(model.queue.keys.norm(dim=1), torch.ones(64))
        and "as allowed: 2 tensors" in caplog.text
    )
    assert torch.equal(model.student.backbone.layernorm.weight, saved.student.backbone.layernorm.weight)


def test_a_head_of_another_width_needs_consent_and_a_backbone_of_another_width_is_refused(tmp_path: Path):
    save(tmp_path / "run", "moco-v2")
    with pytest.raises(RecipeError, match="tensors missing or of another shape .*allow_new_heads=true"):
        started("moco-v2", tmp_path / "run", projection_size=4)
    assert started("moco-v2", tmp_path / "run", True, projection_size=4).queue.keys.shape == (64, 4)
    with pytest.raises(RecipeError, match="give the same backbone_config"):
        started("moco-v2", tmp_path / "run", True, backbone_config={"patch_size": 8})


def test_an_encoder_of_the_same_method_lacks_its_heads(tmp_path: Path):
    BY_NAME["moco-v2"].build_encoder().save_pretrained(tmp_path / "encoder")
    with pytest.raises(RecipeError, match="allow_new_heads=true"):
        started("moco-v2", tmp_path / "encoder")
    encoder = load_file(tmp_path / "encoder" / "model.safetensors")
    model = started("moco-v2", tmp_path / "encoder", allow_new_heads=True)
    for branch in (model.student, model.teacher):
        assert_same(
            {f"backbone.{key}": value for key, value in branch.backbone.state_dict().items()}, encoder
        )


# From the Hub


def test_a_run_writes_down_the_commit_it_started_from_and_takes_its_model(
    hub: HubServer, image_folder: Path, tmp_path: Path
):
    first = publish(BY_NAME["mae"].build(seed=1), "tester/mae")
    HfApi().create_tag("tester/mae", tag="v1")
    second = publish(BY_NAME["mae"].build(seed=2), "tester/mae")
    assert str(find_starting_point("tester/mae").location) == f"tester/mae@{second.oid}"
    for name in (f"tester/mae@{first.oid}", "tester/mae@v1"):
        assert str(find_starting_point(name).location) == f"tester/mae@{first.oid}"
    run = train(
        "mae", output_dir=str(tmp_path / "run"), init_from="tester/mae@v1", dataset=str(image_folder),
        max_steps=1, warmup_steps=0,
        global_batch_size=4, learning_rate=0.0, weight_decay=0.0, bf16=False, probe_dataset=None,
        probe_splits=None, probe_config_names=None, probe_label_column=None, split=None, save_steps=1,
    )  # fmt: skip
    recipe = load_recipe(str(run.folder / "recipe.yaml"))
    assert recipe.init_from == f"tester/mae@{first.oid}"
    # The tiny recipe's own model is 192 wide: what was started from decides.
    assert recipe.config().backbone_config.hidden_size == 16
    assert run.trainer.processing_class.views == METHODS["mae"].processor_class.for_image_size(16).views
    assert_same(run.trainer.model.state_dict(), BY_NAME["mae"].build(seed=1).state_dict())


def test_a_named_recipe_keeps_its_own_model(hub: HubServer, image_folder: Path, tmp_path: Path):
    publish(BY_NAME["mae"].build(), "tester/mae")
    with pytest.raises(RecipeError, match="give the same backbone_config"):
        train(
            "mae",
            recipe="mae_tiny",
            output_dir=str(tmp_path / "run"),
            init_from="tester/mae",
            dataset=str(image_folder),
        )
    assert not (tmp_path / "run").exists()


def test_a_model_of_timm_starts_a_cnn_by_its_bare_name(hub: HubServer, tmp_path: Path):
    network = timm.create_model("test_resnet", num_classes=0)
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    described = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {"tag": "r160_in1k"}}
    weights = (tmp_path / "model.safetensors").read_bytes()
    name = "timm/test_resnet.r160_in1k"
    hub.commit("models", name, {"config.json": json.dumps(described), "model.safetensors": weights})
    config = METHODS["simclr"].config_class(
        backbone_config={"model_type": "hf_ssl_timm", "architecture": "test_resnet", "image_size": 96}
    )
    for name in ("test_resnet", "test_resnet.r160_in1k", "timm/test_resnet.r160_in1k"):
        model = build_model(Recipe("tiny", "simclr", init_from=name), config)
        assert_same(model.student.backbone.network.state_dict(), network.state_dict())


def test_a_repository_with_code_of_its_own_is_refused_and_not_run(hub: HubServer, tmp_path: Path):
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'w')\n"
    files = {"config.json": json.dumps(FOREIGN_CONFIG), "code.py": code, "model.safetensors": b"x"}
    hub.commit("models", "someone/foreign", files)
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for start in ("someone/foreign", str(folder)):
        with pytest.raises(RecipeError, match="brings Python code of its own, which hf-ssl never runs"):
            find_starting_point(start)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("someone/absent", "cannot start from 'someone/absent'"),
        ("./absent", "there is no folder './absent'"),
        ("absent", "a repository on the Hub is written owner/name or owner/name@revision"),
        ("tester/mae@absent", "cannot start from 'tester/mae@absent'"),
    ],
)
def test_what_is_not_there_reads_one_line(hub: HubServer, start: str, message: str):
    hub.commit("models", "tester/mae", {"notes.txt": "x"})
    with pytest.raises(RecipeError) as error:
        find_starting_point(start)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_phase_at_higher_resolution_keeps_everything_and_resizes_learned_positions(tmp_path: Path):
    first = save(tmp_path, "dinov2").state_dict()
    second = started("dinov2", tmp_path, backbone_config={"image_size": 24}).state_dict()
    for name, value in first.items():
        if name.endswith("position_embeddings"):
            value = resize_positions(value, (4, 4), (6, 6), has_class_token=True)
        assert second[name].equal(value), name
