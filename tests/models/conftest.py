"""transformers' *Pil image processors as a reference, whatever Pillow is installed."""

import pytest
from PIL import Image


@pytest.fixture
def columns_first(monkeypatch):
    """Image.resize in two passes, columns first, as Pillow did before 13: see fastpo.models.images.resized."""
    resize = Image.Image.resize

    def two_passes(self, size, resample=None, *args, **more):
        return resize(resize(self, (size[0], self.height), resample), size, resample, *args, **more)

    monkeypatch.setattr(Image.Image, "resize", two_passes)
