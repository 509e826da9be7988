"""Records what Hugging Face's processors make of the files in media/, with torchvision as their users have it.

Writes, beside this file: media/ (what is read), <family>/ (the small files of a model folder), index.json (versions,
cases, how frames are sampled, Pillow against torchvision on a photograph's size) and recorded.npz (see README.md).

To run it again: a second environment that sees the project's torch and transformers, and in it torchvision alone (PyPI
builds it for CUDA; nothing but its Python transforms is used here) and a Pillow that resizes as checkpoints were made
with (see fastpo/models/images.py, resized):

    python -m venv ../recorder
    python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(../recorder/bin/python -c \
        "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
    ../recorder/bin/pip install --no-deps torchvision==0.28.0 "pillow<13"
    PYTHONPATH=.:kernels ../recorder/bin/python -m tests.golden.processors.record

Never install torchvision beside a CPU torch in the project's own environment: `import transformers` fails there.
"""

import hashlib
import importlib.util
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch


def declare_operators() -> None:
    """torchvision's library is linked against CUDA and does not load; its Python part only wants the names."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise SystemExit("install torchvision first, see this file's first lines")
    source = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    names = {"nms", *re.findall(r'register_meta\("(\w+)"', source), *re.findall(r"torchvision::(\w+)", source)}
    for name in sorted(names):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


declare_operators()

import torchvision  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor, SiglipImageProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

from tests.golden.processors import folders  # noqa: E402

HERE = Path(__file__).parent
FPS = 5

STILLS = {
    "wide": ["wide.png", "What is this?"],
    "tall": ["tall.png", "What?"],
    "square": ["square.png", "Why?"],
    "tiny": ["tiny.png", "Is it?"],
    "large": ["large.png", "How many?"],
    "grey": ["grey.png", "Which?"],
    "rgba": ["rgba.png", "Where?"],
    "two": ["tall.png", "wide.png", "Left or right?"],
    "text": ["How are you?"],
}
MOVING = {
    "film 3": ["film.gif", "When?"],
    "film 4": ["film.gif", "Who?"],
    "film 9": ["film.gif", "And then?"],  # it has seven frames: two are repeated
    "film 2 and image": ["film.gif", "wide.png", "Which?"],
}


def frames_of(case: str) -> int:
    return int(case.split()[1])


def write_media(folder: Path) -> None:
    """Gradients under noise, of odd sizes, and a film whose frames move."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(7)

    def pixels(height: int, width: int, channels: int, at: int = 0) -> np.ndarray:
        slope = np.indices((height, width)).sum(0)[..., None] * np.arange(3, 3 + 2 * channels, 2) + 20 * at
        return ((slope + generator.integers(0, 40, (height, width, channels))) % 256).astype(np.uint8)

    for name, (height, width) in {
        "wide": (23, 61), "tall": (97, 34), "square": (33, 33), "tiny": (7, 9), "large": (131, 150),
    }.items():  # fmt: skip
        Image.fromarray(pixels(height, width, 3)).save(folder / f"{name}.png")
    Image.fromarray(pixels(38, 45, 1)[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels(52, 40, 4)).save(folder / "rgba.png")
    film = [Image.fromarray(pixels(44, 31, 3, k)).quantize(64) for k in range(7)]
    film[0].save(folder / "film.gif", save_all=True, append_images=film[1:], duration=1000 // FPS, loop=0)


def called(folder: Path, case: str, items: list[str], backend: str) -> dict[str, Any]:
    """What the processor that AutoProcessor finds in the folder returns for a conversation.

    backend: of its image processor, torchvision (which users get where it is installed) or pil.
    """
    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    content, known = [], []
    for item in items:
        if item.endswith(".png"):
            content.append({"type": "image", "image": Image.open(HERE / "media" / item)})
        elif item.endswith(".gif"):
            film, indices = sampled(item, frames_of(case))
            content.append({"type": "video", "video": film})
            known.append(VideoMetadata(total_num_frames=7, fps=FPS, frames_indices=indices))
        else:
            content.append({"type": "text", "text": item})
    extra = dict(videos_kwargs=dict(video_metadata=[known], do_sample_frames=False)) if known else {}
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs=extra,
    )  # fmt: skip
    return dict(found)


def sampled(name: str, frames: int) -> tuple[np.ndarray, list[int]]:
    """Frames floor(k * 7 / frames) of the film, [frames, h, w, 3]."""
    indices = [k * 7 // frames for k in range(frames)]
    film: Any = Image.open(HERE / "media" / name)
    found = []
    for i in indices:
        film.seek(i)
        found.append(np.asarray(film.convert("RGB")))
    return np.stack(found), indices


def llava_video(folder: Path, case: str, items: list[str]) -> dict[str, Any]:
    """There is no such processor: SigLIP's for the frames, as LLaVA-NeXT's own SigLipImageProcessor, and per frame the
    tokens that pritamqu/RRPO a905573 makes (llava_arch.py: pooled to half, rounded up, a newline after every row)."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    siglip = SiglipImageProcessor(size=dict(height=folders.SIDE, width=folders.SIDE), resample=3, **folders.SIGLIP)
    rows = -(-(folders.SIDE // 7) // 2)
    text, found = "".join("<video>\n" if item.endswith(".gif") else item for item in items), {}
    turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    if any(item.endswith(".gif") for item in items):
        frames, _ = sampled("film.gif", frames_of(case))
        found = dict(siglip(list(frames), return_tensors="pt"))
        text = text.replace("<video>", "<video>" * (len(frames) * rows * (rows + 1)))
    return {"input_ids": processor.tokenizer(text, return_tensors="pt").input_ids} | found


def recorded(family: str, found: dict[str, Any], settings: Any) -> dict[str, np.ndarray]:
    """ids; levels: the pixels as the grey levels that they stand for, in the order of the media, without the tiles that
    only fill a batch up; floats: the first 64 as they are; grids."""
    out = {"ids": found["input_ids"][0].numpy().astype(np.int32)}
    pixels = []
    for key in ("pixel_values_videos", "pixel_values"):  # in the cases a film comes first
        if key not in found:
            continue
        x = found[key]
        if x.ndim == 2:  # rows of patches, channels first
            pixels.append(x.view(len(x), 3, -1, 1))
            continue
        x = x.reshape(-1, *x.shape[-3:])
        pixels.append(x[x.flatten(1).any(1)])
    if pixels:
        x = torch.cat(pixels)
        mu, sigma = (torch.tensor(v).view(1, 3, 1, 1) for v in (settings.image_mean, settings.image_std))
        levels = ((x * sigma + mu) * 255).round()
        error = float(((levels / 255 - mu) / sigma - x).abs().max())
        assert error < 1e-5, f"{family}: not whole grey levels, {error}"
        out |= {"levels": levels.to(torch.uint8).squeeze(-1).numpy(), "floats": x.flatten()[:64].numpy()}
    for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "aspect_ratio_ids", "aspect_ratio_mask"):
        if key in found:
            out[key] = np.asarray(found[key])
    return out


def sampling(folder: Path) -> list[dict[str, Any]]:
    """Which frames the folder's video processor takes of a clip when it is asked for a number or a rate."""
    video, found = AutoVideoProcessor.from_pretrained(folder), []
    for total, ask in [
        (50, dict(num_frames=8)),
        (50, dict(num_frames=5)),
        (101, dict(num_frames=16)),
        (101, dict(fps=1)),
    ]:
        indices = [int(i) for i in video.sample_frames(VideoMetadata(total_num_frames=total, fps=FPS), **ask)]
        found.append(dict(total=total, fps=FPS, ask=ask, indices=indices))
    return found


def capped(folder: Path) -> list[dict[str, Any]]:
    """Grids of videos under cap_pixels_per_frame, the rule of qwen-vl-utils."""
    video: Any = AutoVideoProcessor.from_pretrained(folder)
    found = []
    for tokens, frames, height, width in [(20, 2, 90, 160), (20, 9, 90, 160), (40, 16, 131, 47), (3, 8, 64, 64)]:
        video.cap_pixels_per_frame, video.max_video_tokens = True, tokens
        film = np.zeros((frames, height, width, 3), np.uint8)
        grid = video(film, do_sample_frames=False, return_tensors="pt")["video_grid_thw"][0].tolist()
        found.append(dict(max_video_tokens=tokens, frames=frames, height=height, width=width, grid=grid))
    return found


def backends() -> list[dict[str, Any]]:
    """How far Pillow's pixels are from torchvision's, in grey levels, on a 640 x 427 picture with edges and noise."""
    y, x = np.mgrid[:427, :640] / 40.0
    scene = np.stack([np.sin(x * y), np.cos(3 * x), np.sign(np.sin(5 * x + 2 * y))], 2) * 90 + 128
    scene = Image.fromarray((scene + np.random.default_rng(0).normal(0, 8, scene.shape)).clip(0, 255).astype(np.uint8))
    found = []
    for resample, name in ((3, "bicubic"), (2, "bilinear")):
        for side in (224, 384, 896):
            ask = dict(size=dict(height=side, width=side), resample=resample, do_rescale=False, do_normalize=False)
            pair = [SiglipImageProcessor(**ask), transformers.SiglipImageProcessorPil(**ask)]
            a, b = (np.asarray(p(scene, return_tensors="pt")["pixel_values"]).astype(int) for p in pair)
            apart = np.abs(a - b)
            found.append(dict(resample=name, side=side, most=int(apart.max()), share=float((apart > 0).mean())))
    return found


def main() -> None:
    torch.set_num_threads(1)
    write_media(HERE / "media")
    arrays, cases, rules = {}, {}, {}
    for family in folders.FOLDERS:
        folder = HERE / family
        folders.write_folder(folder, family)
        settings = AutoImageProcessor.from_pretrained(folder)
        chosen = MOVING if family == "llava_video" else {**STILLS, **MOVING}
        if family in folders.STILL:
            chosen = STILLS
        for case, items in chosen.items():
            if family == "llava_video" and "wide.png" in items:
                continue
            given = [item for item in items if item[-4:] in (".png", ".gif")]
            facts = dict(media=given, question=folders.question(family, items), frames=None)
            if "film.gif" in given:
                facts["frames"] = frames_of(case)
            call = (
                llava_video(folder, case, items)
                if family == "llava_video"
                else called(folder, case, items, "torchvision")
            )
            for key, array in recorded(family, call, settings).items():
                arrays[f"{family}/{case}/{key}"] = array
            if given and "film.gif" not in given:
                exact = recorded(family, called(folder, case, items, "pil"), settings)["levels"]
                facts["pil_sha256"] = hashlib.sha256(exact.tobytes()).hexdigest()
            cases.setdefault(family, {})[case] = facts
        if family in ("llava_onevision", "internvl") or family.startswith("qwen"):
            rules[family] = dict(sampling=sampling(folder))
        if family.startswith("qwen"):
            rules[family]["capped"] = capped(folder)
    np.savez_compressed(HERE / "recorded.npz", **arrays)
    versions = dict(
        python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
        transformers=transformers.__version__, pillow=PIL.__version__, numpy=np.__version__,
        avx2="AVX2" in torch.backends.cpu.get_cpu_capability() or "AVX512" in torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
    index = dict(versions=versions, cases=cases, videos=rules, pillow_from_torchvision=backends())
    (HERE / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
