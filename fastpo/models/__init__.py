"""Model families: everything model-specific, one file each."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fastpo.config import Model
from fastpo.models import internvl, llava, llava_next, llava_onevision, llava_video, mllama, qwen_vl
from fastpo.sample import Encoded, MicroBatch, Sample, Sampling


class Family(Protocol):
    """What a family's module offers.

    parts maps "vision" | "projector" | "language" | "head" to module or parameter paths. external: parameters that
    `vision` reads although it runs outside the forward of the module that holds them.
    """

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def external(self) -> tuple[str, ...]: ...

    @staticmethod
    def processor(cfg: Model) -> Any:
        """Tokenizer and image facts of a model folder, cheap and picklable."""
        ...

    @staticmethod
    def load(cfg: Model) -> Any:
        """The plain Hugging Face model with tree attention."""
        ...

    @staticmethod
    def encode(processor: Any, /, sample: Sample, sampling: Sampling) -> Encoded:
        """Token ids, positions and grid from the text and the files' metadata; nothing is decoded."""
        ...

    @staticmethod
    def pixels(processor: Any, /, sample: Sample, sampling: Sampling) -> Tensor | None:
        """Decoded media as uint8: [F, 3, h, w], or rows of patches."""
        ...

    @staticmethod
    def blank(processor: Any, /) -> Encoded:
        """One black image without responses, for rows without media."""
        ...

    @staticmethod
    def vision(model: Any, processor: Any, /, pixels: Tensor, grid: Tensor) -> Any:
        """Pixels and grid of a row -> its visual features, one tower call: a tensor [visual tokens, H] or a tuple.

        Those of config.CHUNKED take `apply` too, see models.vision: how the tower is run over the pictures.
        """
        ...

    @staticmethod
    def hidden(model: Any, batch: MicroBatch, features: Any, cache: Any = None) -> Tensor:
        """A row and its visual features -> last hidden states [T, H], head not applied.

        features None: the row has no visual token. cache: a transformers Cache for the keys and values of a row that
        is one prompt.
        """
        ...


FAMILIES: Mapping[str, Family] = {
    "llava_video": llava_video,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen_vl,
    "qwen2_5_vl": qwen_vl,
    "qwen3_vl": qwen_vl,
    "internvl": internvl,
    "mllama": mllama,
}
