"""`python -m fastpo.mine CONFIG made/mia.json --out FILE.json`: the rejected answers of MIA-DPO's rows.

The rows are those of `python -m fastpo.data.mia`, the model that of CONFIG (with --adapter, as trained). It answers
each row, its image corrupted, greedily; answers that look at the wrong image and pass the other bounds of
fastpo.data.mia.refusal stay.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastpo import answers
from fastpo.config import Generation, Run
from fastpo.data import formats, mia
from fastpo.data.formats import fields
from fastpo.data.pack import pack
from fastpo.models import images
from fastpo.models.attention import watched
from fastpo.models.generate import extended, media_tokens, respond
from fastpo.models.trained import Opened, open_model
from fastpo.sample import BadSample, Encoded, Media, Sample, Sampling

LAYER = 16  # of LLaVA-1.5's 32, from 0: Liuziyu77/MIA-DPO a85c51a, gen_data/


def attention_and_logits(opened: Opened, prompt: Encoded, answer: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What one decoder layer looks at while the answer is said, and the logits of its tokens.

    prompt: decoded. answer: [n] int64. Returns [n - 1, heads, L] float32, the rows that lead to tokens 2..n (as
    mia.image_means wants them), and [n, V]. One forward; the weights of this layer's rows are the only ones computed.
    """
    model, family = opened.core, opened.family
    first = len(prompt.prompt)
    told = extended(replace(prompt, responses=(), weights=None, scores=(), parents=None, trained=None), answer)
    row = pack([told], None).to(next(model.parameters()).device)
    layers = model.model.language_model.layers
    if not 0 <= layer < len(layers):
        raise ValueError(f"--layer: {layer}, the language model has layers 0 to {len(layers) - 1}")
    with torch.no_grad(), watched(layers[layer].self_attn, slice(first, first + len(answer) - 1)) as kept:
        features = None if prompt.pixels is None else family.vision(model, opened.processor, row.pixels, row.grid)
        hidden = family.hidden(model, row, features)
        logits = model.get_output_embeddings()(hidden[first - 1 : first - 1 + len(answer)])
    return kept[0].transpose(0, 1), logits


def runs(ids: Tensor, tokens: list[int]) -> list[range]:
    """Places of the visual tokens in a prompt, one range per image: text stands between two images."""
    found: list[range] = []
    for place in torch.isin(ids, torch.tensor(tokens)).nonzero()[:, 0].tolist():
        if found and found[-1].stop == place:
            found[-1] = range(found[-1].start, place + 1)
        else:
            found.append(range(place, place + 1))
    return found


def _first_view(processor: Any, prompt: Encoded, run: range) -> tuple[range, int]:
    return run[: processor.tokens], math.isqrt(processor.tokens)


def _last_view(processor: Any, prompt: Encoded, run: range) -> tuple[range, int]:
    return run[-processor.tokens_per_tile :], math.isqrt(processor.tokens_per_tile)


def _merged(processor: Any, prompt: Encoded, run: range) -> tuple[range, int]:
    assert prompt.grid is not None
    return run, int(prompt.grid[0, 1]) // processor.config.vision_config.spatial_merge_size


# Family -> (processor, prompt, an image's tokens) -> tokens of one view of the whole image, its rows.
VIEWS: MappingProxyType[str, Callable[[Any, Encoded, range], tuple[range, int]]] = MappingProxyType(
    {
        "llava": _first_view,
        "llava_next": _first_view,
        "llava_onevision": _first_view,
        "internvl": _last_view,
        "qwen2_vl": _merged,
        "qwen2_5_vl": _merged,
        "qwen3_vl": _merged,
    }
)


def ratio(row: mia.Row, family: str, processor: Any, prompt: Encoded, tokens: list[int], attention: Tensor) -> float:
    """The share of the attention [n, heads, L] that the row's target gets; NaN of an answer of one token.

    A sequence: of the mean attention on each image. A collage: of the blocks of one view of the whole picture. tokens:
    ids of visual tokens. Raises BadSample where the prompt does not show as many images as the row has.
    """
    found = runs(prompt.prompt, tokens)
    shown = row["count"] if row["kind"] == "sequence" else 1
    if len(found) != shown:
        raise BadSample(f"{prompt.key}: {len(found)} images in the prompt, the row has {shown}")
    if not len(attention):
        return math.nan
    if row["kind"] == "sequence":
        means = [mia.image_means(attention, [run.start], len(run)) for run in found]
        return mia.sequence_ratio(torch.cat(means), row["target"])
    view, high = VIEWS[family](processor, prompt, found[0])
    seen = attention[..., view.start : view.stop].double().mean((0, 1)).view(high, -1)
    if row["kind"] == "grid":
        return mia.grid_ratio(seen, row["count"], row["target"])
    return mia.centre_ratio(seen)


def answerer(
    run: Run, cfg: Generation, opened: Opened, file: str, layer: int, seed: int, folder: Path
) -> Callable[..., mia.Answer]:
    """What fastpo.data.mia.mine calls. file: that of the rows. folder: where corrupted images are written.

    Raises ValueError, BadSample.
    """
    if run.model.family not in VIEWS:
        raise ValueError(f"model.family: {run.model.family} has no images among the tokens of its text: no ratio")
    tokens = media_tokens(opened.core.config)
    greedy = cfg.model_copy(update={"temperature": 0.0})
    sampling = Sampling(frames=1)
    chat = opened.processor.chat

    def answer(row: mia.Row) -> mia.Answer:
        where = f"{file}:{row['id']}"
        media = fields.media_list(row, where, run.data.media_root)
        question = fields.question(row["prompt"], media, where, "prompt")
        if row["kind"] in mia.NOISE:
            path = folder / "corrupted.png"
            mia.corrupted(images.read(media[0]), row, seed=seed).save(path)
            media = (Media(kind="image", path=path),)
        sample = Sample(key=where, question=question, media=media, responses=())
        prompt = opened.family.encode(opened.processor, sample, sampling)
        prompt = replace(prompt, pixels=opened.family.pixels(opened.processor, sample, sampling))
        (ids,) = respond(
            opened.core, opened.family, opened.processor, prompt, greedy, count=1, seed=0, chunk=opened.chunk
        )
        attention, logits = attention_and_logits(opened, prompt, ids, layer)
        return mia.Answer(
            text=chat.tokenizer.decode(ids, skip_special_tokens=True),
            ratio=ratio(row, run.model.family, opened.processor, prompt, tokens, attention.cpu()),
            ppl=mia.perplexity(logits),
        )

    return answer


def check(row: mia.Row, where: str) -> None:
    """Raises BadSample for a row that fastpo.data.mia would not make."""
    for key in ("id", "image", "prompt", "chosen", "kind", "count", "target"):
        if row.get(key) is None:
            raise fields.bad(where, key, "missing; fastpo.data.mia makes such rows")
    _expect(row, where, "kind", [*mia.THRESHOLDS])
    _expect(row, where, "count", [*mia.THRESHOLDS[row["kind"]]])
    _expect(row, where, "target", range(1, int(row["count"]) + 1))


def _expect(row: mia.Row, where: str, key: str, values: Sequence[str | int]) -> None:
    if row[key] not in values:
        raise fields.bad(where, key, f"expected one of {', '.join(map(str, values))}, got {row[key]!r:.80}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpo.mine", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("rows", help="mia.json of fastpo.data.mia")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="also generation.max_tokens=... and so on"
    )
    parser.add_argument("--out", type=Path, required=True, help="a .json file of rows of the format mia")
    parser.add_argument("--adapter", type=Path, help="a checkpoint, or an adapter's or a whole model's folder")
    parser.add_argument("--layer", type=int, default=LAYER, help="whose attention is read, from 0")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--min-ppl", type=float, default=1.1, help="an answer of lower perplexity is refused")
    args = parser.parse_intermixed_args(argv)
    try:
        run, cfg = answers.configured(args.config, args.overrides)
        rows = formats.rows(args.rows)
        for number, row in enumerate(rows):
            check(row, f"{args.rows}:{number}")
        opened = open_model(run.model, args.adapter, answers.device())
        with TemporaryDirectory() as folder:
            answer = answerer(run, cfg, opened, args.rows, args.layer, args.seed, Path(folder))
            kept, refused = mia.mine(answers.paced(rows, len(rows), "rows"), answer, min_ppl=args.min_ppl)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    reasons = "".join(f", {n} {reason}" for reason, n in refused.most_common())
    print(f"{args.out}: {len(kept)} of {len(rows)} rows{reasons}")


if __name__ == "__main__":
    main()
