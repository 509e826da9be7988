"""Answers sampled by vLLM on the ranks that train, beside the policy, whose weights it is given before every rollout.

Each rank runs an engine of its own (tensor parallel 1, vLLM's external launcher), so the model has to fit one device
twice. On CUDA it sleeps while the policy learns. vLLM reads the media files itself, with transformers' own processors
and torchvision: its pixels can differ from ours by rounding, its token ids may not, and are compared. Facts: vLLM
0.32, entrypoints/llm.py, multimodal/processing/processor.py _maybe_apply_prompt_updates, model_executor/models/.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.config import Generation, Run
from fastpo.data import media
from fastpo.models import images
from fastpo.models.generate import media_tokens
from fastpo.sample import Encoded, Media, Sampling

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager]  # Engine.gathered

# What vLLM replaces by one image or video, in classes of tokens: i image, v video, s and e the marks around them, t
# any other. It expands a single media token, and writes Qwen3-VL's times and InternVL's marks itself.
EXPANDED: Mapping[str, str] = MappingProxyType(
    {
        "llava": "i+",
        "llava_next": "i+",
        "llava_onevision": "i+|v+",
        "qwen2_vl": "i+|v+",
        "qwen2_5_vl": "i+|v+",
        "qwen3_vl": "i+|(?<=s)(?:t+sv+e)+(?=e)",
        "internvl": "si+e",
    }
)
NESTED = ("llava", "llava_next", "llava_onevision")  # whose towers lie one module deeper in vLLM


def check(run: Run) -> None:
    """Raises ValueError where vLLM is asked for and not installed."""
    if run.rollout is not None and run.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("rollout.engine: vllm is not installed: pip install 'fastpo[vllm]', or use transformers")


def respond(
    model: Any, processor: Any, run: Run, prompts: Sequence[Encoded], cfg: Generation, *, count: int,
    seeds: Sequence[int], gathered: Gathered,
) -> list[tuple[Tensor, ...]]:  # fmt: skip
    """`count` answers to each prompt from the model as it is, as `generate.respond` gives them. Collective.

    model: the Hugging Face model without wrappers; gathered: makes its parameters whole, under ZeRO-3. Raises
    ValueError with the sample's key where vLLM would read other tokens than the policy learns from.
    """
    assert run.rollout is not None
    llm = started(run.model.path, run.model.dtype, run.batch.tokens, run.rollout.vllm_memory)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what training has freed but kept
        llm.wake_up()
    llm.apply_model(lambda theirs: theirs.load_weights(weights(model, run.model.family, gathered)) and None)
    llm.reset_prefix_cache()  # of the weights before; the encoder's cache too
    llm.llm_engine.reset_encoder_cache()
    marks, sampling = classes(model.config, processor), Sampling(frames=run.data.frames, fps=run.data.fps)
    found = llm.generate(
        [prompt(encoded, marks, run.model.family, sampling) for encoded in prompts],
        [sampled(cfg, count, seed, processor.chat.end_id, media_tokens(model.config)) for seed in seeds],
        use_tqdm=False,
    )
    if torch.cuda.is_available():
        llm.sleep(level=1)  # the weights that are not trained stay in the CPU's memory
    return [answers(encoded, output) for encoded, output in zip(prompts, found, strict=True)]


@cache
def started(path: str, dtype: str, tokens: int, memory: float) -> Any:
    """The engine of this process. tokens: of the longest prompt and its answer; memory: its share of the device."""
    from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]  (takes this file for it)

    return LLM(
        model=path,
        dtype=dtype,
        max_model_len=tokens,
        gpu_memory_utilization=memory,
        enable_sleep_mode=torch.cuda.is_available(),  # vLLM has it for GPUs alone
        tensor_parallel_size=1,
        distributed_executor_backend="external_launcher",  # in this process: weights are handed over, not sent
    )


def sampled(cfg: Generation, count: int, seed: int, end: int, never: Sequence[int]) -> Any:
    """vLLM's SamplingParams: only `end` ends an answer; the tokens `never` do not come."""
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]  (takes this file for it)

    return SamplingParams(
        n=count,
        seed=seed,
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        ignore_eos=True,  # those that the folder names
        stop_token_ids=[end],
        logit_bias=dict.fromkeys(never, -100.0),
        detokenize=False,
    )


def answers(encoded: Encoded, output: Any) -> tuple[Tensor, ...]:
    """The answers of vLLM's RequestOutput [n_s] int64. Raises ValueError where its prompt is not the policy's."""
    theirs, ours = list(output.prompt_token_ids), encoded.prompt.tolist()
    if theirs != ours:
        at = len(os.path.commonprefix([ours, theirs]))
        raise ValueError(
            f"{encoded.key}: vLLM reads {len(theirs)} tokens, the policy {len(ours)}, and they differ from token {at}: "
            f"{theirs[at : at + 5]}, not {ours[at : at + 5]}; use engine: transformers"
        )
    return tuple(torch.tensor(answer.token_ids, dtype=torch.int64) for answer in output.outputs)


def prompt(encoded: Encoded, marks: Mapping[int, str], family: str, sampling: Sampling) -> dict[str, Any]:
    """vLLM's TokensPrompt: ids with one token for each image and video, and the decoded media."""
    ids, items = collapsed(encoded.prompt.tolist(), marks, EXPANDED[family])
    if items != len(encoded.media):
        raise ValueError(
            f"{encoded.key}: vLLM would find {items} images and videos in the prompt, the sample has "
            f"{len(encoded.media)}; put text between those that stand side by side, or use engine: transformers"
        )
    check_positions(encoded, marks, family)
    data: dict[str, list[Any]] = {}
    for item in encoded.media:
        data.setdefault(item.kind, []).append(images.read(item) if item.kind == "image" else video(item, sampling))
    return {"prompt_token_ids": ids, **({"multi_modal_data": data} if data else {})}


def check_positions(encoded: Encoded, marks: Mapping[int, str], family: str) -> None:
    """Raises ValueError where vLLM would count other M-RoPE positions than the installed transformers.

    vLLM goes on behind the largest position so far, transformers 5 behind the larger side of a video's frames; and it
    does not round the seconds between two patches of a Qwen2.5-VL video before it multiplies them.
    """
    if encoded.positions is None or encoded.positions.ndim == 1:
        return
    at, text = encoded.positions.amax(0), torch.tensor([marks.get(int(t)) not in ("i", "v") for t in encoded.prompt])
    moved = text[1:] & (at[1:] != at.cummax(0).values[:-1] + 1)
    if moved.any() or (family == "qwen2_5_vl" and any(item.kind == "video" for item in encoded.media)):
        raise ValueError(f"{encoded.key}: vLLM counts the positions of this video otherwise; use engine: transformers")


def collapsed(ids: Sequence[int], marks: Mapping[int, str], pattern: str) -> tuple[list[int], int]:
    """The ids with one media token for each match of `pattern` in their classes, and the number of matches."""
    found, at, count = [], 0, 0
    for match in re.finditer(pattern, "".join(marks.get(token, "t") for token in ids)):
        token = next(x for x in ids[match.start() : match.end()] if marks.get(x) in ("i", "v"))
        found += [*ids[at : match.start()], token]
        at, count = match.end(), count + 1
    return [*found, *ids[at:]], count


def classes(config: Any, processor: Any) -> dict[int, str]:
    """Token id -> its class in EXPANDED, of a model's configuration and this family's processor."""
    names = {"image_token_id": "i", "image_token_index": "i", "video_token_id": "v", "video_token_index": "v"}
    names |= {"vision_start_token_id": "s", "vision_end_token_id": "e"}
    found = {getattr(config, name): kind for name, kind in names.items() if getattr(config, name, None) is not None}
    if config.model_type == "internvl":
        marks = processor.chat.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        found |= dict(zip(marks, "se", strict=True))
    return found


def video(item: Media, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
    """Frames [F, h, w, 3] uint8 and what vLLM asks of them, in seconds instead of frames: Qwen-VL counts times."""
    count = media.frame_count(item, sampling)
    seconds, times = media.frame_times(item.path, count, sampling.fps)
    facts = {"fps": 1.0, "duration": seconds, "total_num_frames": seconds, "frames_indices": times}
    return media.decode(item, count), {**facts, "video_backend": "opencv", "do_sample_frames": False}


def weights(model: Any, family: str, gathered: Gathered) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by its name in vLLM, adapters added to the weights under them; one whole at a time.

    All ranks have to go through it together.
    """
    for path, module in model.named_modules():
        if ".lora_" in path:
            continue
        if hasattr(module, "get_delta_weight"):  # peft's Linear
            base = module.get_base_layer().weight
            with gathered([base, *module.lora_A.parameters(), *module.lora_B.parameters()]):
                delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
                yield named(f"{path}.weight", family), (base.data.float() + delta).to(base.dtype)
        for name, parameter in module.named_parameters(recurse=False):
            adapted = path.endswith(".base_layer") and name == "weight"
            if parameter.requires_grad and not adapted:
                with gathered([parameter]):
                    yield named(f"{path}.{name}" if path else name, family), parameter.data


def named(name: str, family: str) -> str:
    """A parameter's name in the checkpoints that vLLM loads, by that in transformers 5."""
    name = name.replace(".base_layer.", ".")
    if family in NESTED:
        name = re.sub(r"^model\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_model.", name)
    return name
