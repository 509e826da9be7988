"""Resizing and normalising against transformers' own image processor."""

import numpy as np
import pytest
import torch
from transformers import SiglipImageProcessorPil

from fastpo.models import images


@pytest.mark.parametrize("size", [(64, 48), (37, 91), (28, 28), (1, 1), (500, 3)])
def test_resize_is_siglips_processor(size, columns_first):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, size[1], size[0], 3), dtype=np.uint8)
    found = images.frames(frames, 28)
    assert found.dtype == torch.uint8 and found.shape == (3, 3, 28, 28) and found.is_contiguous()
    options = {"size": {"height": 28, "width": 28}, "return_tensors": "pt", "input_data_format": "channels_last"}
    plain = SiglipImageProcessorPil(do_rescale=False, do_normalize=False)(list(frames), **options).pixel_values
    assert torch.equal(found.float(), plain.float())
    assert images.frames(frames, (28, 35)).shape == (3, 3, 28, 35)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    whole = SiglipImageProcessorPil(image_mean=mean, image_std=std)(list(frames), **options).pixel_values
    ours = (found.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(ours, whole, rtol=0, atol=4e-7)  # a few roundings of numbers up to 2
