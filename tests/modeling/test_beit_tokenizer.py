"""BEiT's tokenizer: the authors' codebook, k-means start, losses, and the mistakes they invite."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open

from hf_ssl.hub.parity import random_images
from hf_ssl.modeling.beit_tokenizer import BEiTTokenizerForPreTraining
from hf_ssl.modeling.beit_tokenizer.modeling_beit_tokenizer import cosine_distance
from hf_ssl.modeling.shared.codebook import Codebook, cosine_kmeans, share_in_use, usage_of
from tests.closeness import near
from tests.conftest import ROOT
from tests.modeling.tiny import BY_NAME, TINY_RESNET, run_step

PIXELS, DISTILLED = BY_NAME["beit_tokenizer"], BY_NAME["beit_tokenizer-distilled"]


@pytest.fixture
def case(golden):
    return golden("beit")


def rows_of(maps):
    """Vectors (M, d) of maps (B, d, H, W) in the authors' order."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def test_three_steps_match_the_authors_codebook(case):
    """Codes, indices, loss and gradient, then the moved codes; mistakes 24, 25."""
    with safe_open(ROOT / "tests" / "golden" / "beit.safetensors", "pt") as file:
        decay = float(file.metadata()["decay"])
    codebook = Codebook(10, 4).double()
    codebook.vectors.copy_(case["vq.codebook0"])
    weight = torch.arange(1, 5, dtype=torch.float64) / 10
    for step in (1, 2, 3):
        maps = case[f"vq.z{step}"].clone().requires_grad_()
        codes, index, commitment = codebook(rows_of(maps))
        assert torch.equal(index, case[f"vq.idx{step}"])
        near(codes, rows_of(case[f"vq.out{step}"]), 1e-9)
        near(commitment, case[f"vq.loss{step}"], 1e-9)
        (commitment + (codes * weight).sum()).backward()
        near(maps.grad, case[f"vq.grad_z{step}"], 1e-9)
        codebook.update(**codebook.assigned(rows_of(maps.detach()), index), momentum=decay)
        near(codebook.vectors, case[f"vq.codebook{step}"], 1e-9)
        near(codebook.cluster_size, case[f"vq.cluster_size{step}"], 1e-9)


def test_kmeans_matches_the_authors(case):
    means, sizes = cosine_kmeans(case["kmeans.samples"], case["kmeans.init"])
    near(means, case["kmeans.means"], 1e-9)
    assert torch.equal(sizes.long(), case["kmeans.bins"])


def test_cosine_distance_matches_the_authors(case):
    predictions = case["kd.rec"].clone().requires_grad_()
    loss = cosine_distance(predictions, case["kd.target"])
    near(loss, case["kd.loss"], 1e-9)
    loss.backward()
    near(predictions.grad, case["kd.grad_rec"], 1e-9)


def test_codes_start_at_the_centres_of_the_first_step_once(tmp_path):
    """Mistake 26: after loading they do not start again."""
    model = PIXELS.build(kmeans_start=True)
    batches = [{"pixel_values": PIXELS.images(4, seed=index)} for index in range(2)]
    model.begin_step(0, 10, seed=3)
    model.prepare_step(batches)
    codebook = model.student.head.codebook
    assert bool(codebook.has_started) and codebook.cluster_size.sum() == 8 * 16
    started = codebook.vectors.clone()
    model.prepare_step(batches)
    assert torch.equal(codebook.vectors, started)
    model.save_pretrained(tmp_path)
    loaded = BEiTTokenizerForPreTraining.from_pretrained(tmp_path)
    loaded.begin_step(1, 10, seed=3)
    loaded.prepare_step([{"pixel_values": PIXELS.images(8, seed=7)}])
    assert torch.equal(loaded.student.head.codebook.vectors, started)


def test_start_and_restart_do_not_depend_on_micro_batches():
    images = PIXELS.images(8)
    found = []
    for parts in (1, 2, 4):
        model = PIXELS.build(kmeans_start=True, restart_every=1, codebook_momentum=0.5)
        model.double()
        with torch.no_grad():
            model.student.head.codebook.cluster_size.zero_()
        run_step(model, list(images.double().chunk(parts)))
        found.append(model.student.head.codebook.vectors.clone())
    near(found[1], found[0], 1e-9)
    near(found[2], found[0], 1e-9)


def test_unused_codes_start_again_at_vectors_of_the_step():
    codebook = Codebook(4, 3)
    codebook.cluster_size.copy_(torch.tensor([10.0, 0.0, 12.0, 0.01]))
    before = codebook.vectors.clone()
    candidates = torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    assert share_in_use(codebook) == 0.5
    codebook.restart(candidates, torch.Generator().manual_seed(0))
    assert torch.equal(codebook.vectors[[0, 2]], before[[0, 2]])
    for code in (1, 3):
        assert (candidates == codebook.vectors[code]).all(dim=1).any()
    assert share_in_use(codebook) == 1


def test_more_codes_than_vectors_start_without_an_error():
    codebook = Codebook(8, 3)
    codebook.start(torch.nn.functional.normalize(torch.randn(5, 3), dim=1), torch.Generator().manual_seed(0))
    assert codebook.vectors.isfinite().all()


def test_usage_counts_codes_as_if_evenly_used():
    figures = usage_of(torch.tensor([[0, 1], [2, 3]]), num_codes=16)
    near(figures["perplexity"], 4.0, 1e-6)
    near(usage_of(torch.zeros(5, dtype=torch.long), 16)["perplexity"], 1.0, 1e-6)


def test_codes_have_no_gradient_and_the_encoder_has_one_through_them():
    model = PIXELS.build()
    model(PIXELS.images(4)).loss.backward()
    assert not model.student.head.codebook.vectors.requires_grad
    assert model.student.backbone.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_the_encoder_distilled_stands_still_in_eval_mode():
    model = DISTILLED.build()
    assert not model.distiller.training and model.training
    assert not any(parameter.requires_grad for parameter in model.distiller.parameters())
    assert model.eval()(DISTILLED.images(4)).predictions is None


def test_a_cnn_is_distilled_where_its_map_has_as_many_places_and_refused_where_not():
    fitting = PIXELS.build(distiller_config={"backbone_config": {**TINY_RESNET, "image_size": 32}})
    assert fitting(PIXELS.images(2)).loss.isfinite()
    other = PIXELS.build(distiller_config={"backbone_config": TINY_RESNET})
    with pytest.raises(ValueError, match="distilled has 4 places and the tokenizer 16 patches"):
        other(PIXELS.images(2))


def test_predictions_are_pixels_of_all_patches():
    outputs = PIXELS.build().eval()(PIXELS.images(4))
    assert outputs.predictions.shape == (4, 16, 48) and bool(outputs.is_masked.all())


def test_tokens_are_those_of_the_loss():
    model = PIXELS.build().eval()
    pixels = PIXELS.images(3)
    tokens = model.tokens(pixels)
    assert tokens.shape == (3, 16) and tokens.dtype == torch.int64
    index = model.student.head.codebook(model.student.vectors(pixels).flatten(0, 1))[1]
    assert torch.equal(tokens.flatten(), index)


def test_codebook_stays_in_float32(tmp_path):
    """Mistake 23: in half precision distances tie."""
    PIXELS.build().save_pretrained(tmp_path)
    model = BEiTTokenizerForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    head = model.student.head
    assert head.codebook.vectors.dtype == head.project[0].weight.dtype == torch.float32
    assert head.codebook.has_started.dtype == torch.bool
    assert model.student.backbone.layernorm.weight.dtype == torch.bfloat16
    assert model(PIXELS.images(2)).loss.isfinite()


def test_it_learns_to_give_pixels_back():
    model = PIXELS.build(kmeans_start=True, codebook_momentum=0.9)
    optimizer = torch.optim.AdamW([value for _, value in model.trainable_parameters()], lr=3e-3)
    losses = []
    pixels = random_images(3, 16, 16) / 127.5 - 1
    for step in range(60):
        optimizer.zero_grad()
        losses.append(run_step(model, [pixels], step, optimize=optimizer.step))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 1}, "num_codes must be at least 2"),
        ({"codebook_momentum": 1.0}, r"codebook_momentum must be in \[0, 1\)"),
        ({"restart_every": -1}, "restart_every must be >= 0"),
        ({"commitment_weight": -1.0}, "commitment_weight must be >= 0"),
        (
            {"distiller_config": {"backbone_config": {"image_size": 32, "patch_size": 4}}},
            "the encoder distilled has 8 x 8 patches, the encoder trained 4 x 4",
        ),
    ],
)
def test_values_that_make_no_tokenizer_are_refused(options, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        PIXELS.config(**options)
