"""Images in: sources, exactly resumable streams, views, collation, the built-in sample."""

from hf_ssl.data.sample import load_sample
from hf_ssl.data.sources import open_images

__all__ = ["load_sample", "open_images"]
