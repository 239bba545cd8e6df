"""Images in: sources, exactly resumable streams, views, collation, the built-in sample."""

from hf_ssl.data.sources import open_images

__all__ = ["open_images"]
