"""From a data set file to windows of micro-batches: cheap checks first, decoding in worker processes, exact resume.

Which samples a step holds follows from (seed, epoch, step) alone, so that a resumed run needs no saved loader state.
"""

import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastpo.config import Batch, Data, Source
from fastpo.data import mix
from fastpo.data.pack import pack, plan, spread
from fastpo.sample import BadSample, Encoded, Media, MicroBatch, Sample, Size

Keep = Literal["all", "best", "none"]
Skipped = list[tuple[str, str]]  # (key, reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Checked samples with their tokens (nothing decoded yet), and (key, reason) of the rows left out."""

    samples: list[Sample]
    encoded: list[Encoded]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.samples)


def _as_it_is(encoded: Encoded, media: Sequence[Media]) -> Encoded:
    return encoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """How this rank turns rows into micro-batches. encode(sample) -> Encoded without pixels; pixels(sample) decodes.

    look: finds a sample's cached features by its media, so that it is not decoded.
    """

    data: Data
    encode: Callable[[Sample], Encoded]
    pixels: Callable[[Sample], Tensor | None]
    blank: Encoded
    batch: Batch
    rank: int
    ranks: int
    frames_per_chunk: int | None = None
    seed: int = 0  # of the rows that a rule draws
    look: Callable[[Encoded, Sequence[Media]], Encoded] = _as_it_is

    @property
    def budget(self) -> Size:
        """Of one packed row."""
        return Size(self.batch.tokens, self.batch.patches or sys.maxsize)

    def read(self, source: Source | Sequence[Source], *, keep: Keep = "all") -> Table:
        """Reads, checks and tokenises every row. keep: which of a prompt's responses, "best" for supervised training,
        "none" for rollouts.

        Raises BadSample at the first bad row under on_bad_sample: error, ValueError where no row is left.
        """
        samples, encoded, skipped = [], [], []
        paths = ", ".join(s.path for s in ([source] if isinstance(source, Source) else source))
        for row in mix.samples(source, self.data.media_root, self.seed):
            try:
                if isinstance(row, BadSample):
                    raise row
                sample = _kept(row, keep)
                tokens = self.encode(sample)
                if tokens.tokens > self.batch.tokens:
                    raise BadSample(f"{row.key}: {tokens.tokens} tokens, more than batch.tokens: {self.batch.tokens}")
                if tokens.patches > self.budget.patches:
                    raise BadSample(
                        f"{row.key}: {tokens.patches} patches, more than batch.patches: {self.batch.patches}"
                    )
            except BadSample as error:
                key = row.row if isinstance(row, BadSample) else row.key
                named = isinstance(row, BadSample) or str(error).startswith(key)
                reason = str(error) if named else f"{key}: {error}"  # a broken file tells its own name alone
                if self.data.on_bad_sample == "error":
                    raise BadSample(reason) from error
                skipped.append((key, reason))
                continue
            samples.append(sample)
            encoded.append(tokens)
        if not samples:
            reason = f"; the first of {len(skipped)} bad rows: {skipped[0][1]}" if skipped else ""
            raise ValueError(f"{paths}: no usable row{reason}")
        return Table(samples=samples, encoded=encoded, skipped=skipped)

    def windows(self, table: Table, steps: Sequence[Sequence[int]]) -> Iterator[list[MicroBatch]]:
        """For each step (sample indices of all ranks together) this rank's micro-batches, as many on every rank."""
        plans = [self.plan(table, chosen) for chosen in steps]
        mine = [row for shares in plans for row in shares[self.rank]]
        decoded = self._decoded(table, mine, partial(_packed, self))
        for shares in plans:
            patches = [[sum(table.encoded[n].patches for n in row) for row in rows] for rows in shares]
            yield [replace(next(decoded), calls=self.calls(max(same))) for same in zip(*patches, strict=True)]

    def calls(self, patches: int) -> int:
        """Of the vision tower for a row of this size, or for the blank image where that takes more."""
        if self.frames_per_chunk is None:
            return 1
        assert self.blank.pixels is not None
        pictures = len(self.blank.pixels)
        return math.ceil(max(patches * pictures // self.blank.patches, pictures) / self.frames_per_chunk)

    def prompts(self, table: Table, steps: Sequence[Sequence[int]]) -> Iterator[tuple[list[Encoded], Skipped]]:
        """For each step this rank's share of its samples, decoded, for rollouts."""
        work = [e.tokens + self.batch.patch_cost * e.patches for e in table.encoded]
        shares = [spread([work[n] for n in chosen], self.ranks)[self.rank] for chosen in steps]
        rows = [[chosen[i] for i in share] for chosen, share in zip(steps, shares, strict=True)]
        yield from self._decoded(table, rows, _unpacked)

    def _decoded(
        self, table: Table, rows: list[list[int]], make: Callable[[list[Encoded], Skipped], Any]
    ) -> Iterator[Any]:
        """What `make` makes of each row of sample indices, in worker processes. Raises BadSample."""
        source = _Rows(table=table, rows=rows, feed=self, make=make)
        workers = self.data.workers
        loader = DataLoader(
            source,
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,  # pyright: ignore[reportArgumentType]
            worker_init_fn=_own_session,
        )
        for row in loader:
            if isinstance(row, BadSample):
                raise row
            yield row

    def plan(self, table: Table, chosen: Sequence[int]) -> list[list[list[int]]]:
        """Rank -> micro-batch -> sample indices."""
        sizes = [table.encoded[n].size for n in chosen]
        shares = plan(sizes, budget=self.budget, ranks=self.ranks, patch_cost=self.batch.patch_cost)
        return [[[chosen[i] for i in row] for row in rows] for rows in shares]


def step_samples(count: int, step: int, *, prompts: int, seed: int) -> list[int]:
    """Sample indices of optimizer step `step`. Each epoch is a new shuffle; its last step may be smaller."""
    epoch, place = divmod(step, -(-count // prompts))
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * prompts : (place + 1) * prompts]


def in_order(count: int, prompts: int) -> list[list[int]]:
    """All samples once, in windows of `prompts`."""
    return [list(range(first, min(first + prompts, count))) for first in range(0, count, prompts)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows(Dataset):
    """Row i of this rank, made in a worker. A BadSample is returned: raised, it would come wrapped."""

    table: Table
    rows: list[list[int]]
    feed: Feed
    make: Callable[[list[Encoded], Skipped], Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        decoded, skipped = [], []
        for n in self.rows[i]:
            sample = self.table.samples[n]
            try:
                seen = self.feed.look(self.table.encoded[n], sample.media)
                decoded.append(seen if seen.features is not None else replace(seen, pixels=self.feed.pixels(sample)))
            except BadSample as error:
                if self.feed.data.on_bad_sample == "error":
                    return BadSample(f"{sample.key}: {error}")
                skipped.append((sample.key, str(error)))
        return self.make(decoded, skipped)


def _packed(feed: Feed, decoded: list[Encoded], skipped: Skipped) -> MicroBatch:
    show = any(e.pixels is not None or e.features is not None for e in decoded)
    return pack(decoded, None if show else feed.look(feed.blank, ()), skipped)


def _unpacked(decoded: list[Encoded], skipped: Skipped) -> tuple[list[Encoded], Skipped]:
    return decoded, skipped


def _own_session(_: int) -> None:
    """A signal to the whole job (Ctrl-C, a scheduler's SIGTERM) must not end the workers before the run has saved."""
    os.setsid()


def _same(row: Any) -> Any:
    return row


def _kept(sample: Sample, keep: Keep) -> Sample:
    if keep == "none":
        return replace(sample, responses=())
    if not sample.responses:
        raise BadSample(f"{sample.key}: no responses to learn from (a rollout section would sample them)")
    if keep == "all":
        return sample
    top = max(response.score for response in sample.responses)
    return replace(sample, responses=tuple(r for r in sample.responses if r.score == top))
