"""Positions and patches of clips against the authors' tables and attention."""

import pytest
import torch

from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.patches import clip_patches
from hf_ssl.modeling.shared.positions import make_rotations, sincos_positions_of_clips
from hf_ssl.modeling.shared.vit import SSLViTAttention, SSLViTBackbone
from tests.closeness import near


def video_vit(**options) -> SSLViTConfig:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    clips = {"patch_size": 4, "num_frames": 4, "tubelet_size": 2, "use_class_token": False}
    return SSLViTConfig(**{**shape, **clips, "position_embedding_type": "rope", **options})


@pytest.mark.parametrize("width", [8, 16])
def test_table_of_clips_is_the_authors(golden, width):
    table = sincos_positions_of_clips(width, (3, 4, 4))
    near(table[0].double(), golden("vjepa")[f"pos3d.uniform1.dim{width}"], tolerance=1e-7)


def test_moving_a_patch_in_time_changes_only_the_first_third_of_its_position():
    table = sincos_positions_of_clips(24, (3, 4, 4))[0]
    change = table[5 + 16] - table[5]
    assert change[:8].abs().sum() > 0
    assert torch.equal(change[8:], torch.zeros(16))


def test_turned_attention_is_the_authors(golden):
    case = golden("vjepa")
    attention = SSLViTAttention(video_vit()).double()
    parts = {kind: case[f"rope.sd.qkv.{kind}"].chunk(3) for kind in ("weight", "bias")}
    state = {f"{n}_proj.{kind}": part for kind in parts for n, part in zip("qkv", parts[kind], strict=True)}
    state |= {f"o_proj.{kind}": case[f"rope.sd.proj.{kind}"] for kind in parts}
    attention.load_state_dict(state)
    torch.set_default_dtype(torch.float64)
    try:
        rotations = make_rotations(case["rope.ids"], (3, 4, 4), 12)
    finally:
        torch.set_default_dtype(torch.float32)
    near(attention(case["rope.x"], rotations=rotations)[0], case["rope.out"], tolerance=1e-9)


def test_patches_of_clips_are_those_of_a_convolution():
    backbone = SSLViTBackbone(video_vit())
    clips = torch.randn(2, 4, 3, 16, 16)
    projection = backbone.embeddings.patch_embeddings.projection
    expected = projection(clips.transpose(1, 2)).flatten(2).transpose(1, 2)
    near(backbone.embeddings.patch_embeddings(clips), expected, tolerance=1e-5)
    index = torch.tensor([[3, 17, 30], [0, 16, 31]])
    chosen = backbone.embeddings.patch_embeddings(clips, index)
    near(chosen, torch.stack([expected[b, index[b]] for b in range(2)]), tolerance=1e-5)


def test_an_image_is_a_clip_that_stands_still():
    backbone = SSLViTBackbone(video_vit()).eval()
    image = torch.randn(2, 3, 16, 16)
    still = image[:, None].repeat(1, 2, 1, 1, 1)
    near(backbone(image).last_hidden_state, backbone(still).last_hidden_state, tolerance=0)


def test_hidden_patches_do_not_reach_the_visible_ones():
    backbone = SSLViTBackbone(video_vit()).eval()
    clips, index = torch.randn(1, 4, 3, 16, 16), torch.tensor([[0, 5, 21]])
    before = backbone(clips, kept_index=index).last_hidden_state
    clips[:, :, :, 12:, 12:] += 1.0
    near(backbone(clips, kept_index=index).last_hidden_state, before, tolerance=0)


def test_fixed_positions_refuse_another_length():
    backbone = SSLViTBackbone(video_vit(position_embedding_type="sincos_row_first"))
    with pytest.raises(ValueError, match="train with rope for other lengths"):
        backbone(torch.randn(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match="train with rope for other lengths and sizes"):
        backbone(torch.randn(1, 4, 3, 8, 32))  # as many patches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 3}, "must be a multiple of tubelet_size 2"),
        ({"position_embedding_type": "learned"}, "clips have no positions of type 'learned'"),
        ({"use_class_token": True}, "a backbone of patches alone"),
        ({"num_attention_heads": 6}, "heads of an even width of at least 6, got 4"),
        ({"drop_path_rate": 0.2}, "drop_path_rate of at most 0.1"),
    ],
)
def test_clips_that_fit_no_patch_or_position_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        video_vit(**options)


def test_clips_that_are_not_whole_patches_are_refused():
    with pytest.raises(ValueError, match="clip of 3 frames of 16 x 16 pixels is not a multiple"):
        clip_patches(torch.zeros(1, 3, 3, 16, 16), 2, 4)
