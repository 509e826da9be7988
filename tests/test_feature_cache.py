"""Cached visual features: the numbers of a run without them, no call of the tower for what is there, never stale."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from fastpo.config import Lora, Model, load, warmup_run
from fastpo.data.pack import pack
from fastpo.fit import feature_look, make_policy, picture_facts
from fastpo.models import FAMILIES, feature_cache, llava_video, trainable
from fastpo.models.policy import Policy
from tests import parity, tiny
from tests.models import run_families
from tests.test_fit import RECIPE, options, rows
from tests.test_fit import run as fit_rows

# 2 epochs of 12 clips: 4 steps, 6 clips in a row
EPOCHS = [
    "optim.steps=null", "optim.epochs=2", "optim.warmup=0", "optim.lr=1e-3", "batch.prompts=6", "batch.tokens=1200",
]  # fmt: skip
LIMIT = 10**8


def on(folder: Path) -> list[str]:
    return ["model.cache_features=true", f"data.cache={folder}"]


def numbers(found: list[dict]) -> list[list[float]]:
    return [[row[name] for name in ("loss", "margin", "kl", "grad_norm")] for row in found]


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """Numbers of each step and calls of the tower: without a cache, with an empty and a full one; the folder."""
    root = tmp_path_factory.mktemp("features")
    calls, found = [], {}
    hook = register_module_forward_hook(
        lambda module, *_: calls.append(module) if type(module).__name__ == "SiglipVisionModel" else None
    )
    for name, more in {"none": [], "cold": on(root / "cache"), "warm": on(root / "cache")}.items():
        calls.clear()
        found[name] = numbers(fit_rows(demo, root / name, *EPOCHS, *more)), len(calls)
    hook.remove()
    return found, root


def test_the_second_epoch_and_the_next_run_call_no_tower(runs):
    found, _ = runs
    assert {name: calls for name, (_, calls) in found.items()} == {"none": 4, "cold": 12, "warm": 0}


def test_the_numbers_are_those_of_a_run_without_a_cache(runs):
    """Bit for bit with the cache cold or warm; without it the clips of a row are seen in one call, whose sums round
    otherwise."""
    found, _ = runs
    assert found["cold"][0] == found["warm"][0]
    torch.testing.assert_close(found["cold"][0], found["none"][0], rtol=1e-5, atol=1e-6)


def test_ranks_that_miss_different_samples_keep_in_step(runs, demo, tmp_path, two_ranks):
    """ZeRO-3 on two ranks. One of the first step's clips is missing and five of the second's, so that one rank misses
    more than the other; the second epoch calls no tower."""
    found, root = runs
    shutil.copytree(root / "cache", tmp_path / "cache")
    kept = [file for file in (tmp_path / "cache").iterdir() if feature_cache.ALONE in load_file(file)]
    kept.sort(key=lambda file: (root / "cache" / file.name).stat().st_mtime_ns)  # as the warm run read them last
    assert len(kept) == 12
    for i in (0, 6, 7, 8, 9, 10):
        kept[i].unlink()
    more = [*EPOCHS, *on(tmp_path / "cache"), "model.frames_per_chunk=3"]
    two_ranks(str(RECIPE), *options(demo, tmp_path / "two", *more))
    torch.testing.assert_close(numbers(rows(tmp_path / "two")), found["none"][0], rtol=1e-4, atol=1e-5)
    assert all(file.exists() for file in kept)


@pytest.fixture(scope="module")
def folders(demo, tmp_path_factory):
    """Model folders of all families."""
    root = tmp_path_factory.mktemp("models")
    run_families.write(root)
    shutil.copytree(demo / "model", root / "llava_video")
    return root


def some_samples(family: str, folder: Path) -> list:
    moving = family in ("llava_video", "llava_onevision", "internvl", *run_families.tiny_qwen.KINDS)
    items = [parity.video(folder, 48, 32)] if moving else []
    items += [] if family == "llava_video" else [parity.image(folder, w, h) for w, h in ((50, 20), (20, 44))]
    one = parity.video(folder, 32, 40) if family == "llava_video" else items[-1]
    question = " ".join(f"<{item.kind}>" for item in items)
    return [
        parity.sample("a", question, items, "yes"),
        parity.sample("b", "why", [], "so"),
        parity.sample("c", f"<{one.kind}>", [one], "no"),
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_features_of_a_row_are_those_of_its_samples(folders, tmp_path, name):
    """As close to one call for the row as sizes round, and the same bits from the file."""
    cfg, family = Model(path=str(folders / name), family=name, dtype="float32"), FAMILIES[name]
    p, model = family.processor(cfg), family.load(cfg).eval()
    samples = some_samples(name, tmp_path)
    whole = pack(parity.decoded(family, p, samples), family.blank(p))
    want = family.vision(model, p, whole.pixels, whole.grid)

    def row(*, decode: bool):
        found = [feature_cache.look(tmp_path, "", family.encode(p, s, parity.SAMPLING), s.media) for s in samples]
        assert all(e.features is None for e in found if decode)
        if decode:
            found = [
                replace(e, pixels=family.pixels(p, s, parity.SAMPLING)) for e, s in zip(found, samples, strict=True)
            ]
        return pack(found, None)

    first = row(decode=True)
    made = feature_cache.of_row(partial(family.vision, model, p), first, LIMIT)
    again = row(decode=False)
    kept = feature_cache.of_row(lambda *_: pytest.fail("seen again"), again, LIMIT)
    assert len(first.pixels) == len(again.pixels) == 0  # they are in `shown`, once
    assert torch.equal(again.grid, whole.grid) and torch.equal(again.ids, whole.ids)
    torch.testing.assert_close(made, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, made, rtol=0, atol=0)
    hidden = partial(family.hidden, model)
    torch.testing.assert_close(hidden(again, kept), hidden(whole, want), rtol=1e-4, atol=1e-4)


def tiny_rows(folder: Path):
    """A row as usual, and the same row with a file for each sample's features."""
    draw = torch.Generator().manual_seed(0)
    made = [tiny.sample(str(i), draw, before=2, after=2, frames=i + 1, responses=[3, 4]) for i in range(3)]
    kept = [replace(e, file=folder / f"{int(e.key):032x}.safetensors") for e in made]
    return pack(made, None), pack(kept, None)


@pytest.mark.parametrize("mode, chunk", [("adapter_off", None), ("copy", 2), ("none", None)])
def test_a_policys_statistics(tmp_path, mode, chunk):
    """A frozen copy sees what the policy sees; in chunks of frames too."""
    lora = Lora(r=4, alpha=8) if mode == "adapter_off" else None
    model = trainable.prepare(tiny.model(packed=True), llava_video.parts, Model(path="", lora=lora))
    policy = Policy(
        model, llava_video, tiny.processor(), mode=mode, stats=frozenset({"logp", "ref_logp"}),
        reference=tiny.model(packed=True, seed=1) if mode == "copy" else None, frames_per_chunk=chunk,
        feature_bytes=LIMIT,
    )  # fmt: skip
    plain, kept = tiny_rows(tmp_path)
    want, calls = policy(plain), []
    model.get_submodule("base_model.model" if lora else "").model.vision_tower.register_forward_hook(
        lambda *_: calls.append(1)
    )
    agreed = feature_cache.agreed(kept, chunk, lambda own: own + 2)  # as beside a rank that misses more
    assert agreed.calls == (6 if chunk else 5)
    got = policy(agreed)
    assert len(calls) == agreed.calls and len(list(tmp_path.iterdir())) == 3
    torch.testing.assert_close(got.logp, want.logp, rtol=1e-5, atol=1e-5)
    if mode != "none":
        torch.testing.assert_close(got.ref_logp, want.ref_logp, rtol=1e-5, atol=1e-5)


def ones(pixels: Tensor, grid: Tensor) -> Tensor:
    return torch.ones(20 * len(pixels), 50)  # 4,000 bytes a frame


def test_a_clip_that_samples_of_a_row_share_is_seen_once(tmp_path):
    _, row = tiny_rows(tmp_path)
    shared = replace(row, shown=(*row.shown, row.shown[0]))
    seen: list[int] = []
    found = feature_cache.of_row(lambda x, grid: seen.append(len(x)) or ones(x, grid), shared, LIMIT)
    assert seen == [1, 2, 3] and len(found) == 20 * 7 and feature_cache.calls(shared, None) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b"", lambda b: b[:-9] + bytes(9)])
def test_a_damaged_file_is_not_found(tmp_path, caplog, damage):
    item = parity.image(tmp_path, 3, 5)
    look = partial(feature_cache.look, tmp_path / "cache", "facts", replace(tiny.blank(), pixels=None))
    file = look([item]).file
    assert file is not None and look([item]).features is None and look([]).file is None
    feature_cache.keep(file, (torch.ones(2, 3), torch.zeros(0, 3)), LIMIT)
    features = look([item]).features
    assert isinstance(features, tuple) and [x.shape for x in features] == [(2, 3), (0, 3)]
    file.write_bytes(damage(file.read_bytes()))
    assert look([item]).features is None and f"{file}: damaged" in caplog.messages[0]
    feature_cache.keep(file, features, LIMIT)
    assert look([item]).features is not None and len(caplog.messages) == 1


def test_the_folder_stays_below_its_limit(tmp_path):
    _, row = tiny_rows(tmp_path)  # 4,000, 8,000 and 12,000 bytes
    found = feature_cache.of_row(ones, row, 10_000)
    assert len(found) == 20 * 6
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000
    assert [file.name for file in tmp_path.iterdir()] == [f"{1:032x}.safetensors"]


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    feature_cache.keep(tmp_path / "a", torch.tensor([1.0, float("nan")]), LIMIT)
    feature_cache.keep(tmp_path / "b", (torch.ones(2), torch.tensor([float("inf")])), LIMIT)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_is_of_tower_and_projector(tmp_path):
    def of(model: Any) -> str:
        return feature_cache.fingerprint(model, llava_video.parts, lambda _: nullcontext())

    model = tiny.model(packed=True)
    first = of(model)
    assert of(trainable.prepare(tiny.model(packed=True), llava_video.parts, Model(path="")).get_base_model()) == first
    assert of(tiny.model(packed=True, dtype=torch.bfloat16)) != first
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
        model.model.language_model.embed_tokens.weight[3, 2] += 1
        assert of(model) == first
        for weight in (model.model.multi_modal_projector.linear_2.bias, model.model.image_newline):
            before = weight[-1].clone()
            weight[-1] += 1e-3
            assert of(model) != first
            weight[-1] = before
    assert of(model) == first


def test_what_features_depend_on(demo, tmp_path):
    def settings(*more: str):
        return load(RECIPE, options(demo, tmp_path, *on(tmp_path / "cache"), *more))

    def look(*more: str, learned: float = 0.0):
        run = settings(*more)
        policy = make_policy(run, frozenset({"logp"}), "cpu")
        policy.core.model.multi_modal_projector.linear_1.bias.data[0] += learned
        engine: Any = SimpleNamespace(policy=policy, gathered=lambda _: nullcontext(), device=torch.device("cpu"))
        file = feature_look(run, engine)(tiny.blank(), ()).file
        assert file is not None and file.parent == tmp_path / "cache"
        return file.name

    changed = ["data.frames=5", "model.pooling=average", "model.dtype=bfloat16"]
    names = [look("engine.zero=0", *more) for more in ([], *([x] for x in changed if "bfloat16" not in x))]
    names.append(look("engine.zero=1", changed[-1]))
    assert len(set(names)) == 1 + len(changed)
    assert look("engine.zero=0", learned=1e-3) not in names
    assert look("engine.zero=0", "model.lora.r=8", "batch.tokens=900", "optim.lr=1e-3") == names[0]
    with pytest.raises(ValueError, match=r"would change with model.lora.target"):
        look("engine.zero=0", "model.lora.target=.*vision_tower.*fc1", "reference.mode=none")
    pictures = [[], ["model.max_pixels=9000"], ["model.time_instruction=true"], ["model.pooling=average"]]
    assert len({picture_facts(settings(*more)) for more in pictures}) == len(pictures)


def test_refused_where_nothing_can_be_kept(demo, tmp_path):
    def refusal(*more: str) -> str:
        with pytest.raises(ValueError) as error:
            load(RECIPE, options(demo, tmp_path, *more))
        return str(error.value)

    assert "model.cache_features needs data.cache" in refusal("model.cache_features=true")
    for part in ("train_vision", "train_projector"):
        trained = refusal(*on(tmp_path), f"model.{part}=true", "reference.mode=copy")
        assert f"model.cache_features keeps what would change with model.{part}: true" in trained
    assert "model.cache_features is not for a rollout" in refusal(*on(tmp_path), "rollout.rewards=[{name: exact}]")
    warm = load(RECIPE, options(demo, tmp_path, *on(tmp_path), "warmup={steps: 1, lr: 1e-3, prompts: 2}"))
    assert not warmup_run(warm).model.cache_features
