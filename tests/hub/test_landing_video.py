"""The encoder of clips in `VJEPA2Model`, as a process without this package loads it."""

import json

import pytest
import torch
from torch.testing import assert_close

from hf_ssl.cli.loading import load_encoder
from hf_ssl.evaluation.images import read_batches
from hf_ssl.hub import export_encoder
from hf_ssl.modeling.vjepa import VJEPAImageProcessor
from tests.clean_process import run_python
from tests.modeling.tiny import BY_NAME

ROW = BY_NAME["vjepa"]
LOADS = """
import torch
from transformers import AutoModel, AutoVideoProcessor

frames = torch.load("frames.pt")
model, processor = AutoModel.from_pretrained("encoder"), AutoVideoProcessor.from_pretrained("encoder")
inputs = processor(frames, return_tensors="pt")
torch.save((type(model).__name__, inputs, model(**inputs, skip_predictor=True).last_hidden_state), "out.pt")
"""


def processor():
    views = [{"crop": {"scale": [0.5, 1.0]}, "frames": {"count": 4, "step": 1}}]
    return VJEPAImageProcessor.for_image_size(16, views=views)


def test_clean_process_gets_our_features_of_a_clip(tmp_path):
    model = ROW.build()
    report = export_encoder(model, tmp_path / "encoder", processor())
    assert report.native_class == "VJEPA2Model" and report.max_abs_difference < 1e-5
    assert any("AutoVideoProcessor" in line for line in report.how_to_load)
    with pytest.raises(ValueError, match="an encoder of clips alone; give the run it comes from"):
        load_encoder(str(tmp_path / "encoder"))
    frames = torch.randint(0, 256, (4, 3, 40, 30), dtype=torch.uint8)
    torch.save(frames, tmp_path / "frames.pt")
    run_python(LOADS, with_package=False, cwd=tmp_path)
    name, inputs, tokens = torch.load(tmp_path / "out.pt", weights_only=False)
    assert name == "VJEPA2Model"
    row = {"image": frames.permute(0, 2, 3, 1).numpy(), "label": 0}
    [batch] = read_batches([row], processor())
    # Resizing a tensor and a picture may differ by a grey level.
    assert_close(inputs["pixel_values_videos"], batch.pixel_values, rtol=0, atol=0.02)
    ours = model.published_branch().backbone(inputs["pixel_values_videos"]).last_hidden_state
    assert_close(tokens, ours, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert (config["crop_size"], config["frames_per_clip"]) == (16, 4)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"position_embedding_type": "sincos_row_first"}, "train with position_embedding_type rope"),
        ({"use_swiglu_ffn": True}, "has no gated MLP"),
    ],
)
def test_what_the_native_class_does_not_compute_is_refused(tmp_path, backbone, message):
    with pytest.raises(ValueError, match=message):
        export_encoder(ROW.build(backbone_config=backbone), tmp_path / "encoder", processor())
    assert not (tmp_path / "encoder").exists()
