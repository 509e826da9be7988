"""Model families: everything model-specific, one file each."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fastpo.config import Model
from fastpo.models import llava_video
from fastpo.sample import Encoded, Sample
from fastpo_kernels import Tree


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
    def encode(processor: Any, /, sample: Sample, frames: int) -> Encoded:
        """Token ids from the text and the frame count alone; nothing is decoded."""
        ...

    @staticmethod
    def pixels(processor: Any, /, sample: Sample, frames: int) -> Tensor | None:
        """Decoded media as [F, 3, h, w] uint8."""
        ...

    @staticmethod
    def blank(processor: Any, /) -> Encoded:
        """One black frame without responses, for rows without media."""
        ...

    @staticmethod
    def vision(model: Any, processor: Any, /, pixels: Tensor) -> Tensor:
        """[F, 3, h, w] uint8 -> [visual tokens, H], one tower call."""
        ...

    @staticmethod
    def hidden(model: Any, ids: Tensor, positions: Tensor, features: Tensor, tree: Tree) -> Tensor:
        """ids, positions [T] and visual tokens in row order -> last hidden states [T, H], head not applied."""
        ...


FAMILIES: Mapping[str, Family] = {"llava_video": llava_video}
