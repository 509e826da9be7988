"""One run from a configuration to its last checkpoint, read top to bottom."""

import json
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

import fastpo
import fastpo_kernels
from fastpo import checkpoint, metrics, reference, reward_model, rollout
from fastpo.config import Run
from fastpo.data import cache, loader, synthetic
from fastpo.data.loader import Feed, Table
from fastpo.engine import Engine, init_distributed, sharded_loading
from fastpo.models import FAMILIES, feature_cache, trainable
from fastpo.models.budget import bounded
from fastpo.models.policy import Policy
from fastpo.models.tiled_mlp import tile_mlp
from fastpo.plugins import resolve
from fastpo.sample import Encoded, Media, MicroBatch, Sampling
from fastpo.step import eval_pass, meter_for, train_step
from fastpo_kernels import losses

Attach = Callable[[MicroBatch], MicroBatch]

disable_progress_bars()  # other bars would tear the live progress line
transformers_logging.disable_progress_bar()


def fit(run: Run, stop: threading.Event | None = None) -> Path:
    """Trains from scratch or from the newest checkpoint in `out`; returns the last one.

    Once `stop` is set it saves after the step and exits with 0. Raises ValueError for bad input, FloatingPointError for
    a loss that is not finite.
    """
    rank, ranks, device = init_distributed()
    objective = resolve(losses.LOSSES, run.loss, key="loss")
    check_rollout(run, losses.needs(objective))
    feed = make_feed(run, rank, ranks)
    table = feed.read(run.data.train, keep=kept_responses(run))
    held_out = feed.read(run.data.eval, keep="none" if run.rollout else "all") if run.data.eval else None
    if run.rollout:
        table, held_out = rollout.readable(run, table), held_out and rollout.readable(run, held_out)
        rollout.check(run, table)
    total = total_steps(run, len(table))
    resume = checkpoint.latest(run)
    if rank == 0:
        _write_run_yaml(run)
        metrics.list_skipped(run.out, [*table.skipped, *(held_out.skipped if held_out else [])])

    rewritten = resume is not None and checkpoint.of_other_ranks(resume)
    engine = Engine(run, make_policy(run, losses.needs(objective), device), total, universal=rewritten)
    if run.model.cache_features:
        feed = replace(feed, look=feature_look(run, engine))
    scorer = reward_model.load(run, device) if run.rollout and run.rollout.reward_model else None
    attach = _reference_cache(run, engine, feed, [table, held_out] if held_out else [table])
    start = checkpoint.load(engine, resume) if resume else 0
    updates = run.rollout.updates if run.rollout else 1
    order = [
        loader.step_samples(len(table), s // updates, prompts=run.batch.prompts, seed=run.seed)
        for s in range(start, total)
    ]
    meter = meter_for(objective, engine.device, rollout.names(run.rollout) if run.rollout else ())
    windows = (
        rollout.windows(engine, feed, table, order, run, meter, start, scorer)
        if run.rollout
        else _ready(run, _windows(run, engine, feed, table, order), attach)
    )
    stop = stop or threading.Event()
    log = metrics.Log(
        run.out, total, tensorboard=run.log.tensorboard, wandb=run.log.wandb, resume_step=start if resume else None,
        run=run.model_dump(mode="json"), enabled=rank == 0,
    )  # fmt: skip

    def evaluate(step: int) -> None:
        if held_out is not None and run.rollout:
            means = rollout.mean_rewards(engine, feed, held_out, run, scorer)
            log.write(step, {f"eval/{name}": value for name, value in means.items()})
        elif held_out is not None:
            steps = loader.in_order(len(held_out), run.batch.prompts)
            rows = _ready(run, _windows(run, engine, feed, held_out, steps), attach)
            means = eval_pass(engine, rows, objective, meter_for(objective, engine.device))
            log.write(step, {f"eval/{name}": value for name, value in means.items()})

    tokens, seconds = 0.0, 0.0
    with log:
        if start == 0:
            evaluate(0)
        engine.train()
        begin = time.monotonic()
        for step, window in enumerate(windows, start=start + 1):
            torch.manual_seed(random.Random(f"{run.seed}/{step}/{rank}").getrandbits(63))  # dropout; the same on resume
            numbers = train_step(engine, window, objective, meter)
            seen, stopped = engine.all_sum([float(sum(len(batch.ids) for batch in window)), float(stop.is_set())])
            whole = step % updates == 0 or step == total  # between the updates of a rollout a run cannot be resumed
            took = time.monotonic() - begin
            log.write(step, meter.reduce() | numbers | {"tokens_per_s": seen / took})
            tokens, seconds = tokens + seen, seconds + took
            if run.log.eval_every and step % run.log.eval_every == 0 and step < total and not stopped:
                evaluate(step)  # before saving: a run killed in between evaluates again
            if whole and (stopped or step == total or step % run.save_every < updates):
                checkpoint.save(engine, run, step)
            if whole and stopped:
                _say(rank, f"stopped by SIGTERM after step {step}, saved in {run.out / 'checkpoints'}")
                sys.exit(0)
            begin = time.monotonic()
        evaluate(total)
    folder = checkpoint.latest(run)
    assert folder is not None
    if rank == 0:
        _summary(run, folder, tokens / seconds if seconds else None, device)
    return folder


def kept_responses(run: Run) -> loader.Keep:
    """Which responses of the training rows are read."""
    return "none" if run.rollout else "best" if run.loss.name == "sft" else "all"


def on_sigterm() -> threading.Event:
    """An event that SIGTERM sets."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


def make_data(run: Run) -> None:
    """Writes the demo's data where data.synthetic asks for it, once. Raises ValueError for that of another seed."""
    rank, _, _ = init_distributed()
    if run.data.synthetic is not None and not synthetic.built(run.data.synthetic, seed=run.seed):
        _say(rank, f"writing the demo's clips, questions and tiny model to {run.data.synthetic}")
        if rank == 0:
            synthetic.write(run.data.synthetic, run.seed)
    dist.barrier()


def make_feed(run: Run, rank: int, ranks: int) -> Feed:
    family = FAMILIES[run.model.family]
    processor = family.processor(run.model)
    sampling = Sampling(frames=run.data.frames, fps=run.data.fps)
    encode, pixels = partial(family.encode, processor), partial(family.pixels, processor)
    if run.data.video_tokens is None:
        encode, pixels = partial(encode, sampling=sampling), partial(pixels, sampling=sampling)
    else:
        encode, pixels = (partial(bounded, call, encode, sampling, run.data.video_tokens) for call in (encode, pixels))
    if run.data.cache is not None:
        cache.ready(run.data.cache)
        pixels = partial(cache.pixels, pixels, run.data.cache, cache_bytes(run), picture_facts(run))
    return Feed(
        data=run.data,
        encode=encode,
        pixels=pixels,
        blank=family.blank(processor),
        batch=run.batch,
        rank=rank,
        ranks=ranks,
        frames_per_chunk=run.model.frames_per_chunk,
        seed=run.seed,
    )


def picture_facts(run: Run) -> str:
    """What the pixels of a sample depend on beside its media: program, family, sampling, the folder's settings.

    Under data.video_tokens also what says how many tokens a frame takes, and so how many frames there are.
    """
    settings = [file.read_text() for file in sorted(Path(run.model.path).glob("*config.json"))]
    tokens = (run.data.video_tokens, run.model.pooling, run.model.time_instruction)
    sampling = (run.data.frames, run.data.fps, run.model.max_pixels, *tokens)
    return repr((fastpo.__version__, run.model.family, sampling, settings))


def feature_look(run: Run, engine: Engine) -> Callable[[Encoded, Sequence[Media]], Encoded]:
    """Finds a sample's cached features: of its pixels, the weights that see them and what runs these.

    Collective. Raises ValueError where an adapter changes the weights.
    """
    policy = engine.policy
    if policy.train_features:
        raise ValueError("model.cache_features keeps what would change with model.lora.target, which adapts the tower")
    assert run.data.cache is not None
    weights = feature_cache.fingerprint(policy.core, policy.family.parts, engine.gathered)
    programs = (version("torch"), version("transformers"), engine.device.type)
    facts = repr((picture_facts(run), run.model.dtype, programs, weights))
    return partial(feature_cache.look, run.data.cache, facts)


def cache_bytes(run: Run) -> int:
    """The most that data.cache may hold."""
    return round(run.data.cache_gib * 2**30)


def make_policy(run: Run, stats: frozenset[str], device: str) -> Policy:
    """Loads the model, freezes and adapts it. Raises ValueError where the reference mode does not fit the loss."""
    if run.reference.mode == "none" and stats & {"kl", "reverse_kl"}:
        raise ValueError(f"reference.mode: none, but the loss {run.loss.name} needs a reference")
    if run.reference.mode == "cache" and "reverse_kl" in stats:
        raise ValueError(
            "reference.mode: cache keeps hidden states of the better responses only; reverse_kl needs all: use copy"
        )
    if run.reference.mode == "cache" and "kl" in stats and run.model.train_head:
        raise ValueError(
            "reference.mode: cache keeps hidden states, not the head; use copy with model.train_head: true"
        )
    family = FAMILIES[run.model.family]
    alive = sharded_loading(run)  # transformers holds only a weak reference
    model = family.load(run.model)
    trainable.apply_liger(model.model.language_model, run.model, device)
    copy = family.load(run.model) if run.reference.mode == "copy" and stats & set(losses.REFERENCE) else None
    if run.model.mlp_tile is not None:
        for made in filter(None, (model, copy)):
            tile_mlp(made.model.language_model, run.model.mlp_tile)
    torch.manual_seed(run.seed)  # adapters start the same on every rank and ZeRO stage, whatever loading drew
    model = trainable.prepare(model, family.parts, run.model)
    del alive
    policy = Policy(
        model,
        family,
        family.processor(run.model),
        mode=run.reference.mode,
        stats=stats,
        reference=copy,
        backend=run.backend,
        temperature=run.rollout.generation.temperature if run.rollout else 1.0,
        frames_per_chunk=run.model.frames_per_chunk,
        feature_bytes=cache_bytes(run),
    )
    if policy.value_head is not None and run.rollout and run.rollout.gae.critic_head == "reward_model":
        policy.value_head.load_state_dict(reward_model.head(run))
    return policy


def check_rollout(run: Run, needed: frozenset[str]) -> None:
    """Raises ValueError where the loss and the rollout section do not go together."""
    sampled = sorted(needed & set(losses.ROLLOUT))
    if sampled and run.rollout is None:
        raise ValueError(f"loss.name: {run.loss.name} learns from sampled answers: add a rollout section")
    if run.rollout and not sampled:
        raise ValueError(f"rollout: the loss {run.loss.name} reads the answers of the data set, not sampled ones")
    if run.rollout and bool(needed & {"old_value", "returns"}) != (run.rollout.advantage == "gae"):
        raise ValueError(f"rollout.advantage: {run.rollout.advantage} does not go with the loss {run.loss.name}")
    if run.rollout and run.reference.mode == "cache":
        raise ValueError("reference.mode: cache holds a data set's answers, not sampled ones; use copy or adapter_off")


def total_steps(run: Run, count: int) -> int:
    """optim.steps, or those of optim.epochs over `count` samples (an epoch's last step may be smaller)."""
    updates = run.rollout.updates if run.rollout else 1
    return run.optim.steps or max(1, round(run.optim.epochs * -(-count // run.batch.prompts)) * updates)


def _reference_cache(run: Run, engine: Engine, feed: Feed, tables: list[Table]) -> Attach:
    """Fills the cache from the untrained model; returns what puts it into a micro-batch."""
    policy = engine.policy
    if policy.mode != "cache":
        return lambda batch: batch
    if feed.rank == 0:
        reference.open_cache(run, with_hidden=policy.wants_kl)
    dist.barrier()
    folder = reference.open_cache(run, with_hidden=policy.wants_kl)
    names = {s.key: reference.sample_name(s, e) for t in tables for s, e in zip(t.samples, t.encoded, strict=True)}
    lack = [{names[s.key]: i for i, s in enumerate(t.samples) if not (folder / names[s.key]).exists()} for t in tables]
    missing = [list(found.values()) for found in lack]  # a row that is read more than once is recorded once
    dist.barrier()  # every rank has looked before the first one writes
    engine.train(False)
    for table, lacking in zip(tables, missing, strict=True):
        steps = [lacking[i : i + run.batch.prompts] for i in range(0, len(lacking), run.batch.prompts)]
        for window in _windows(run, engine, feed, table, steps):
            for batch in window:
                logp, hidden = engine.record(batch.to(engine.device))
                reference.store(folder, names, batch, logp, hidden if policy.wants_kl else None)
    dist.barrier()
    engine.train()
    return partial(reference.attach, folder, names)


def _windows(
    run: Run, engine: Engine, feed: Feed, table: Table, steps: Sequence[Sequence[int]]
) -> Iterator[list[MicroBatch]]:
    """feed.windows, where features are cached with as many calls of the vision tower on every rank. Collective."""
    for window in feed.windows(table, steps):
        yield [feature_cache.agreed(batch, run.model.frames_per_chunk, engine.all_max) for batch in window]


def _ready(run: Run, rows: Iterable[list[MicroBatch]], attach: Attach) -> Iterator[list[MicroBatch]]:
    for window in rows:
        metrics.list_skipped(run.out, [row for batch in window for row in batch.skipped])
        yield [attach(batch) for batch in window]


def _write_run_yaml(run: Run) -> None:
    names = ("torch", "triton", "transformers", "deepspeed", "peft", "datasets", "liger-kernel", "av")
    facts = {
        "run": run.model_dump(mode="json"),
        "versions": {"fastpo": fastpo.__version__} | {name: version(name) for name in names},
        "paths": {"fastpo": fastpo.__path__[0], "fastpo_kernels": fastpo_kernels.__path__[0]},
    }
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "run.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))


def _summary(run: Run, folder: Path, tokens_per_s: float | None, device: str) -> None:
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if len(evals) > 1:
        names = ("reward", "accuracy", "margin", "loss")
        held_out = [
            {
                "held-out": name,
                f"step {evals[0]['step']}": evals[0].get(f"eval/{name}"),
                f"step {evals[-1]['step']}": evals[-1].get(f"eval/{name}"),
            }
            for name in names
            if f"eval/{name}" in evals[0]
        ]
        metrics.table(str(run.loss.name), held_out)
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        peak = torch.cuda.max_memory_allocated() / 2**30
    skipped = run.out / "skipped.jsonl"
    if skipped.exists():
        count = len({json.loads(line)["key"] for line in skipped.read_text().splitlines()})
        _say(0, f"skipped {count} bad samples, listed in {skipped}")
    speed = "nothing left to train" if tokens_per_s is None else f"{tokens_per_s:,.1f} tokens/s"
    _say(0, f"{speed}, peak memory {peak:.2f} GiB ({device}), checkpoint {folder}")


def _say(rank: int, text: str) -> None:
    if rank == 0:
        metrics.say(text)
