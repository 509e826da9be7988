"""The one module that DeepSpeed wraps: vision once, reference, policy and head in a single forward."""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo.models import Family, feature_cache
from fastpo.models.head import StatsHead, ValueHead
from fastpo.models.trainable import part_of
from fastpo.models.vision import chunk_frames
from fastpo.sample import MicroBatch
from fastpo_kernels import TokenStats, losses


class Valued(NamedTuple):
    """Statistics beside what a value head says of the same states. A NamedTuple, as TokenStats."""

    tokens: TokenStats
    value: Tensor  # [N] of the state that predicts each token
    reward: Tensor  # [S] of each response's last token


class Policy(nn.Module):
    """MicroBatch -> TokenStats, or Valued where the loss reads a value or a reward.

    mode "adapter_off": the reference is the same model without its adapters and shares the visual features;
    "copy": `reference` is a frozen second model; "cache": the micro-batch carries its numbers; "none": there is none.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        processor: Any,
        *,
        mode: str,
        stats: frozenset[str],
        reference: Any = None,
        backend: str = "auto",
        temperature: float = 1.0,
        frames_per_chunk: int | None = None,
        feature_bytes: int = 0,
    ):
        super().__init__()
        self.model: Any
        self.reference: Any
        assert (mode == "copy") == (reference is not None)
        self.model = model
        self.reference = None if reference is None else reference.requires_grad_(False).eval()
        self.family, self.processor = family, processor
        self.mode = mode if stats & set(losses.REFERENCE) else "none"
        self.stats = stats
        self.frames_per_chunk = frames_per_chunk
        self.feature_bytes = feature_bytes  # limit of the folder of cached features
        self.wants_kl = "kl" in stats
        self.value_head = _value_head(model) if stats & {"value", "reward"} else None
        own = None if reference is None else reference.get_output_embeddings().weight
        self.head = StatsHead(self.core.get_output_embeddings(), own, backend, temperature)
        self.train_features = any(
            p.requires_grad and part_of(name, family.parts) in ("vision", "projector")
            for name, p in self.core.named_parameters()
        )

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters read outside the forward of the module that holds them: ZeRO-3 has to be told."""
        models = [self.core] if self.reference is None else [self.core, self.reference]
        return [model.get_parameter(path) for model in models for path in self.family.external]

    @property
    def core(self) -> Any:
        """The Hugging Face model without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def train(self, mode: bool = True) -> "Policy":
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(self, batch: MicroBatch, *, record: bool = False) -> TokenStats | Valued | tuple[Tensor, Tensor]:
        """Statistics of the supervised tokens; with record, (logp [N], hidden [N, H]) for the reference cache."""
        with nullcontext() if self.train_features else torch.no_grad():
            features = self._features(self.core, batch)
        ref_hidden = None if record else self._reference_hidden(batch, features)
        rows = self.family.hidden(self.core, batch, features)
        hidden = rows[batch.at]
        if record:
            return self.head(hidden, batch.target).logp, hidden
        if self.mode == "cache" and self.wants_kl and not batch.keys:
            ref_hidden = hidden.detach()  # no rows: a micro-batch that only keeps this rank in step
        if self.stats & set(TokenStats._fields):
            kl_rows = batch.better if self.wants_kl else None
            stats = self.head(hidden, batch.target, ref_hidden, kl_rows, "reverse_kl" in self.stats)
        else:  # a reward model has no use for the vocabulary
            stats = TokenStats(hidden.new_zeros(len(hidden), dtype=torch.float32))
        if batch.ref_logp is not None:
            stats = stats._replace(ref_logp=batch.ref_logp)
        return stats if self.value_head is None else self._valued(stats, rows, batch)

    def _valued(self, stats: TokenStats, rows: Tensor, batch: MicroBatch) -> "Valued":
        assert self.value_head is not None
        places = torch.cat([batch.at, batch.last])  # one call of the head, whatever is asked for: ZeRO-3 gathers once
        value, reward = self.value_head(rows[places]).split([len(batch.at), len(batch.last)])
        return Valued(stats, value, reward)

    def _features(self, model: Any, batch: MicroBatch) -> Any:
        vision, chunked = partial(self.family.vision, model, self.processor), {}
        if self.frames_per_chunk is not None:
            calls = 1 if batch.shown else batch.calls  # cached samples are seen one by one
            recompute = torch.is_grad_enabled()
            chunked["apply"] = partial(chunk_frames, chunk=self.frames_per_chunk, recompute=recompute, calls=calls)
        if not batch.shown:
            return vision(batch.pixels, batch.grid, **chunked)
        blank = self.family.blank(self.processor)
        for _ in range(batch.calls - feature_cache.calls(batch, self.frames_per_chunk)):  # another rank misses more
            feature_cache.seen(vision, blank, batch.ids.device)
        return feature_cache.of_row(partial(vision, **chunked), batch, self.feature_bytes)

    def _hidden(self, model: Any, batch: MicroBatch, features: Any) -> Tensor:
        return self.family.hidden(model, batch, features)[batch.at]

    @torch.no_grad()
    def _reference_hidden(self, batch: MicroBatch, features: Any) -> Tensor | None:
        if self.mode == "none":
            return None
        if self.mode == "cache":
            return batch.ref_hidden
        if self.reference is not None:
            if self.train_features:
                features = self._features(self.reference, batch)
            return self._hidden(self.reference, batch, features)
        with self.model.disable_adapter():
            return self._hidden(self.core, batch, features)


def _value_head(model: Any) -> ValueHead:
    words = model.get_output_embeddings()
    return ValueHead(words.in_features, words.weight.dtype)
