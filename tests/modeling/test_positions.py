"""Position tables: both published orders, and resizing as the native class does it."""

import pytest
import torch

from hf_ssl.modeling.shared.positions import resize_positions, sincos_positions
from tests.closeness import near


@pytest.mark.parametrize(("name", "width"), [("pos_embed_enc", 16), ("pos_embed_dec", 8)])
def test_column_first_table_matches_the_authors_code(golden, name, width):
    table = sincos_positions(width, 4, 4, first="column", class_token=True, dtype=torch.float64)
    near(table[0], golden("mae")[name])
    table = sincos_positions(width, 4, 4, first="column", class_token=True)
    near(table[0], golden("mae")[name], 1e-5)


@pytest.mark.parametrize(("grid", "width"), [(4, 16), (7, 48)])
def test_row_first_table_matches_the_authors_code(golden, grid, width):
    table = sincos_positions(width, grid, grid, first="row", class_token=True)
    near(table, golden("mocov3")[f"pos_embed_g{grid}_d{width}"], 2e-5)  # their table is computed in float32


def test_the_two_orders_agree_only_on_the_diagonal():
    row = sincos_positions(16, 4, 4, first="row", class_token=False).view(4, 4, 16)
    column = sincos_positions(16, 4, 4, first="column", class_token=False).view(4, 4, 16)
    near(row, column.transpose(0, 1))
    agree = (row == column).all(dim=2)
    assert torch.equal(agree, torch.eye(4, dtype=torch.bool))


def test_halves_are_all_sines_then_all_cosines_and_not_interleaved():
    table = sincos_positions(8, 2, 3, first="row", class_token=False, dtype=torch.float64)[0]
    angle = torch.tensor([2.0, 0.02], dtype=torch.float64)  # column 2, frequencies 1 and 1/100
    near(table[2], torch.cat([torch.zeros(2), torch.ones(2), angle.sin(), angle.cos()]).double())


def test_moving_down_a_row_changes_only_the_row_half():
    table = sincos_positions(8, 3, 5, first="row", class_token=False)[0].view(3, 5, 8)
    assert torch.equal(table[0, :, 4:], table[2, :, 4:]) and not torch.equal(table[0, 0, :4], table[2, 0, :4])


def test_class_token_row_is_zero_and_patches_are_not():
    table = sincos_positions(16, 4, 4, first="column", class_token=True)
    assert table.shape == (1, 17, 16) and table[0, 0].eq(0).all() and table[0, 1:].abs().max() > 0.9


def test_table_is_real_even_while_a_model_is_built_on_the_meta_device():
    with torch.device("meta"):
        table = sincos_positions(8, 2, 2, first="row", class_token=True)
    assert table.device.type == "cpu"


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        sincos_positions(18, 2, 2, first="row", class_token=False)


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="unknown first coordinate 'col'; did you mean 'column'"):
        sincos_positions(8, 2, 2, first="col", class_token=False)


def test_resized_table_equals_the_native_class():
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    config = ViTConfig(
        hidden_size=16, image_size=32, patch_size=8, num_attention_heads=2, intermediate_size=16
    )
    native = ViTEmbeddings(config)
    table = torch.randn(1, 17, 16)
    native.position_embeddings = torch.nn.Parameter(table)
    expected = native.interpolate_pos_encoding(torch.zeros(1, 1 + 6 * 5, 16), 48, 40).detach()
    assert torch.equal(resize_positions(table, (4, 4), (6, 5), has_class_token=True), expected)


def test_resizing_keeps_the_class_row_and_works_without_one():
    table = torch.randn(1, 10, 8)
    resized = resize_positions(table, (3, 3), (5, 4), has_class_token=True)
    assert resized.shape == (1, 21, 8) and torch.equal(resized[:, 0], table[:, 0])
    assert torch.equal(resize_positions(table[:, 1:], (3, 3), (5, 4), has_class_token=False), resized[:, 1:])


def test_a_constant_table_stays_constant_and_an_equal_grid_is_returned_as_it_is():
    table = torch.full((1, 9, 4), 0.25)
    near(resize_positions(table, (3, 3), (7, 2), has_class_token=False), torch.full((1, 14, 4), 0.25), 1e-6)
    assert resize_positions(table, (3, 3), (3, 3), has_class_token=False) is table


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="has 10 rows, a grid of 3 x 3 without class token needs 9"):
        resize_positions(torch.zeros(1, 10, 4), (3, 3), (4, 4), has_class_token=False)


@pytest.mark.parametrize("grid", [(3, 3), (3, 5), (10, 10)])
@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("offset0.1", {"offset": 0.1}, 1e-9),
        ("size", {}, 1e-9),
        ("size_antialias", {"antialias": True}, 1e-6),  # the published code resizes in float32
    ],
)
def test_resizing_matches_the_authors_code(golden, grid, name, options, tolerance):
    """The published offset moves all values; DINOv2 with registers averages where the grid gets coarser."""
    case = golden("dino")
    resized = resize_positions(case["pos_embed"], (7, 7), grid, has_class_token=True, **options)
    near(resized, case[f"pos_{name}_{grid[0]}x{grid[1]}"], tolerance)
