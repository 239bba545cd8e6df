"""Real sources through the protocol; figures known from elsewhere."""

import pytest

from hf_ssl.data.sources import open_images
from hf_ssl.evaluation.baselines import PixelExtractor
from hf_ssl.evaluation.features import collect_features
from hf_ssl.evaluation.images import read_batches
from hf_ssl.evaluation.knn import knn_accuracy


def test_sample_has_labels_and_its_limit_holds_every_class():
    from transformers import ViTImageProcessor

    source = open_images("sample")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    batches = list(read_batches(source, processor, limit=100))
    assert sum(len(batch.row_ids) for batch in batches) == 100
    assert len({label for batch in batches for label in batch.labels.tolist()}) > 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_pixels_of_cifar10_score_their_published_floor(shared_dir):
    """10,000 bank and 2,000 test images: 31.4 % plain, 40.0 % centred, 39.8 % standardised."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    sets = []
    for split in ("train", "test"):
        source = open_images(str(shared_dir / "data" / "cifar10"), split=split)
        sets.append(collect_features({"": PixelExtractor.of(processor)}, read_batches(source, processor)))
    (train, test) = sets
    data = train.features["32x32"], train.labels, test.features["32x32"], test.labels
    assert knn_accuracy(*data).top1 == pytest.approx(0.314, abs=0.002)
    assert knn_accuracy(*data, center=True).top1 == pytest.approx(0.400, abs=0.002)
    assert knn_accuracy(*data, standardize=True).top1 == pytest.approx(0.398, abs=0.002)
