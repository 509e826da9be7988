"""The typed configuration of a run. Imports no torch, so that a wrong key is refused within a second."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


# families whose vision tower reads pictures, tiles or frames of one size, each for itself
CHUNKED = ("llava_video", "llava", "llava_next", "llava_onevision", "internvl")

# families that vLLM has, in the layout of their folders
VLLM = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"does not take {str(value).lower()}")
        return value


class Plugin(BaseModel):
    """A function by name (a built-in, or "package.module:function"); the other keys are its keyword arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Source(Plugin):
    """A data set file: name is its format, path a json, jsonl or parquet file or a hub name.

    Also several files of one format: "folder/{a,b}.json", or SPO's YAML list of files with their rules and weights.
    """

    path: str
    rule: str = "all"  # which rows: all, first:N, end:N, random:N (N a count or N%) or N%
    weight: NonNegative = 1.0  # how many times they are read, in parts too


def _is_list(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


ONE, SEVERAL = "one data set", "several data sets"  # no user reads these names
Sources = Annotated[
    Annotated[Source, Tag(ONE)] | Annotated[tuple[Source, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(_is_list),
]


class Lora(Section):
    r: Count = 128
    alpha: Count = 256
    dropout: Fraction = 0.0
    target: str = "language"  # every Linear of the language model, or a regular expression over module names


class Model(Section):
    path: str
    family: Literal[
        "llava_video",
        "llava",
        "llava_next",
        "llava_onevision",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "internvl",
        "mllama",
    ] = "llava_video"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: Literal["auto", "reference", "varlen", "triton"] = "auto"
    pooling: Literal["bilinear", "average"] = "bilinear"  # of llava_video
    time_instruction: bool = False  # llava_video: tell the model the times of the frames; RRPO's training did not
    liger: Literal["auto", "on", "off"] = "auto"
    max_pixels: Count | None = None  # Qwen-VL: of an image or a frame; None: the checkpoint's own limit
    question_role: str = "user"  # under which the model itself asks (SPO: vuser)
    gradient_checkpointing: bool = True
    cache_features: bool = False  # keep what frozen tower and projector say of a sample in data.cache, for all runs
    frames_per_chunk: Count | None = None  # pictures in one call of the vision tower; None: all of a row
    mlp_tile: Count | None = None  # tokens in one piece of the language model's MLPs; None: all of a row
    lora: Lora | None = Lora()
    train_vision: bool = False
    train_projector: bool = False
    train_language: bool = True  # with lora: its adapters; without: its weights
    train_head: bool = False


class Data(Section):
    train: Sources  # one data set, or a list of them to mix
    eval: Sources | None = None
    media_root: Path = Path(".")
    frames: Count = 16  # of a video; with fps: at most that many
    fps: Positive | None = None
    video_tokens: Count | None = None  # fewer frames where the media of a sample with videos would take more tokens
    on_bad_sample: Literal["error", "skip"] = "error"
    workers: Annotated[int, Field(ge=0)] = 2
    cache: Path | None = None  # decoded pictures are kept in this folder, for all runs
    cache_gib: Positive = 100.0  # of its files at most; those used longest ago go first
    synthetic: Path | None = None  # write the built-in demo data here first, if it is not there yet


class Batch(Section):
    prompts: Count  # per optimizer step, all ranks together
    tokens: Annotated[int, Field(ge=16)]  # largest packed row on one rank
    patches: Count | None = None  # most patches that the vision tower reads for one row
    patch_cost: NonNegative = 0.06  # work of a patch in the tower / of a token in the language model, to balance ranks


class Optim(Section):
    lr: Positive
    lr_vision: Positive | None = None  # None: lr
    lr_projector: Positive | None = None
    lr_value: Positive | None = None  # of a critic's or a reward model's head
    epochs: Positive = 1.0
    steps: Count | None = None  # wins over epochs
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.03  # share of all steps
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    clip: NonNegative = 1.0  # largest gradient norm; 0 turns clipping off


class Reference(Section):
    mode: Literal["adapter_off", "copy", "cache", "none"] = "adapter_off"


class Generation(Section):
    """How answers are sampled. temperature 0: the most likely token, always."""

    max_tokens: Count = 256
    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all


class Gae(Section):
    """PPO's advantages: the reward at an answer's end, a KL penalty at each token, a critic."""

    beta: NonNegative = 0.1  # of the KL in the reward
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    reward_clip: Positive = 10.0
    standardise: bool = False  # rewards by mean and deviation of the last 1000
    reward_scale: Positive = 1.0  # of standardised rewards
    whiten: bool = True
    critic_steps: Annotated[int, Field(ge=0)] = 0  # first steps, in which only the critic learns
    critic_head: Literal["zero", "reward_model"] = "zero"  # what it starts from


class Rollout(Section):
    """Answers sampled from the policy while it is trained (GRPO, PPO)."""

    engine: Literal["transformers", "vllm"] = "transformers"  # what samples
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3  # of a device, for vLLM's weights and cache
    group: Count = 8  # answers to a prompt
    updates: Count = 1  # optimizer steps on one rollout
    generation: Generation = Generation()
    rewards: tuple[Plugin, ...] = ()  # name, weight (1.0), the reward's options
    reward_model: str | None = None  # a folder that a run with the loss `reward` wrote
    reward_model_weight: float = 1.0
    advantage: Literal["grpo", "dr_grpo", "rloo", "gae"] = "grpo"
    gae: Gae = Gae()

    @model_validator(mode="after")
    def _rewarded(self) -> "Rollout":
        if not self.rewards and self.reward_model is None:
            raise ValueError("needs rewards or a reward_model")
        if self.gae.critic_head == "reward_model" and self.reward_model is None:
            raise ValueError("gae.critic_head: reward_model needs rollout.reward_model")
        if self.generation.temperature == 0:
            raise ValueError("generation.temperature: 0 samples nothing")
        if self.generation.temperature > 2 and self.engine == "vllm":
            raise ValueError(f"generation.temperature: {self.generation.temperature:g}, vllm takes at most 2")
        if self.group == 1 and self.advantage != "gae":
            raise ValueError(f"advantage: {self.advantage} compares the answers to a prompt: group must be 2 or more")
        return self


class Engine(Section):
    zero: Annotated[int, Field(ge=0, le=3)] = 3
    offload: Literal["none", "optimizer", "all"] = "none"


class Log(Section):
    eval_every: Annotated[int, Field(ge=0)] = 0  # 0: before the first and after the last step only
    tensorboard: bool = True
    wandb: str | None = None  # a W&B project


class Warmup(Section):
    """Supervised steps on the better responses, all weights, before the preference run; written to out/warmup/model."""

    steps: Count
    lr: Positive
    prompts: Count


class Run(Section):
    out: Path
    seed: int = 0
    save_every: Count = 100
    model: Model
    data: Data
    batch: Batch
    loss: Plugin
    optim: Optim
    reference: Reference = Reference()
    rollout: Rollout | None = None
    engine: Engine = Engine()
    log: Log = Log()
    warmup: Warmup | None = None
    backend: Literal["auto", "reference", "chunked", "triton"] = "auto"  # of token_stats

    @model_validator(mode="after")
    def _consistent(self) -> "Run":
        model, mode = self.model, self.reference.mode
        if mode == "adapter_off":
            if model.lora is None:
                raise ValueError("reference.mode: adapter_off needs model.lora; use copy or cache for full fine-tuning")
            trained = [k for k in ("train_vision", "train_projector", "train_head") if getattr(model, k)]
            if trained:
                drift = f"would let the reference drift with model.{trained[0]}: true"
                raise ValueError(f"reference.mode: adapter_off {drift}; use copy or cache")
        if self.engine.zero == 0 and model.dtype == "bfloat16":
            raise ValueError("engine.zero: 0 keeps no fp32 master weights for bfloat16; use 1, 2 or 3")
        if self.engine.zero < {"none": 0, "optimizer": 1, "all": 3}[self.engine.offload]:
            raise ValueError(f"engine.offload: {self.engine.offload} needs engine.zero: 1 or more (all: 3)")
        if model.lora is not None and not model.train_language:
            raise ValueError("model.lora adapts the language model, but model.train_language is false")
        if model.time_instruction and model.family != "llava_video":
            raise ValueError(f"model.time_instruction is of family llava_video, not {model.family}")
        if model.frames_per_chunk and model.family not in CHUNKED:
            raise ValueError(f"model.frames_per_chunk is of families {', '.join(CHUNKED)}, not {model.family}")
        if self.rollout is not None and self.rollout.engine == "vllm":
            if self.data.video_tokens is not None:
                raise ValueError("rollout.engine: vllm reads data.frames of every video, not data.video_tokens")
            _vllm_can_sample(model)
        if model.cache_features:
            _features_can_be_kept(self)
        if not any((model.train_vision, model.train_projector, model.train_language, model.train_head)):
            raise ValueError("model: every train_* key is false, nothing would be trained")
        return self


def _features_can_be_kept(run: Run) -> None:
    """Raises ValueError where visual features cannot be kept, or nothing would read them."""
    if run.data.cache is None:
        raise ValueError("model.cache_features needs data.cache, the folder to keep them in")
    trained = [k for k in ("train_vision", "train_projector") if getattr(run.model, k)]
    if trained:
        raise ValueError(f"model.cache_features keeps what would change with model.{trained[0]}: true")
    if run.rollout is not None:
        raise ValueError("model.cache_features is not for a rollout: its answers are sampled from pictures")


def _vllm_can_sample(model: Model) -> None:
    """Raises ValueError where vLLM has no such family, or would see other pictures."""
    if model.family not in VLLM:
        raise ValueError(f"rollout.engine: vllm is of families {', '.join(VLLM)}, not {model.family}")
    if model.max_pixels is not None:
        raise ValueError(
            "rollout.engine: vllm reads pictures within the folder's limits, not model.max_pixels; set them in its "
            "preprocessor_config.json"
        )


def warmup_run(run: Run) -> Run:
    """The supervised stage that comes before `run`: all weights, better responses only, no reference."""
    assert run.warmup is not None
    model = (
        run.model.model_dump()
        | dict.fromkeys(("train_vision", "train_projector", "train_head"), True)
        | {"lora": None, "cache_features": False}
    )
    stage = run.model_dump() | {
        "out": run.out / "warmup",
        "model": model,
        "data": run.data.model_dump() | {"eval": None},
        "batch": run.batch.model_dump() | {"prompts": run.warmup.prompts},
        "loss": {"name": "sft"},
        "optim": {"lr": run.warmup.lr, "steps": run.warmup.steps},
        "reference": {"mode": "none"},
        "warmup": None,
        "rollout": None,
    }
    return Run.model_validate(stage)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Reads a YAML file and applies "a.b.c=value" overrides (values are YAML).

    "{out}" in a text stands for the key `out`. Raises ValueError with every bad key's path.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: the top level must be a mapping of keys")
    for item in overrides:
        _override(tree, item)
    try:
        return Run.model_validate(_fill(tree, str(tree.get("out", ""))))
    except ValidationError as error:
        lines = ["  " + ": ".join(filter(None, (_key(e), _reason(e)))) for e in error.errors()]
        raise ValueError(f"{path}: bad configuration\n" + "\n".join(lines)) from None


def _override(tree: dict, item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ValueError(f"override {item!r}: expected key.path=value")
    *parents, leaf = dotted.split(".")
    node = tree
    for key in parents:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ValueError(f"override {item!r}: {key} is not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {item!r}: not valid YAML: {error}") from None


def _fill(node: Any, out: str) -> Any:
    if isinstance(node, dict):
        return {key: _fill(value, out) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, out) for value in node]
    return node.replace("{out}", out) if isinstance(node, str) else node


def _key(error: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in error["loc"] if part not in (ONE, SEVERAL))


def _reason(error: Mapping[str, Any]) -> str:
    value = "" if error["type"] in ("missing", "extra_forbidden", "value_error") else f" (got {error['input']!r})"
    message = "unknown key" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
    return message + value


def schedule_factor(optim: Optim, step: int, total: int) -> float:
    """Share of the learning rate in optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule.

    The same numbers as transformers' get_cosine/linear/constant schedule with warm-up (warm-up steps rounded up).
    """
    warmup = math.ceil(optim.warmup * total)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": cosine}[optim.schedule]
