"""On-policy windows: answers sampled from the policy, their rewards and advantages, packed into rows to learn from."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo import rewards
from fastpo.config import Generation, Rollout, Run
from fastpo.data.loader import Feed, Table, in_order
from fastpo.data.pack import bins, pack
from fastpo.engine import Engine
from fastpo.metrics import Meter, cut, list_skipped, say
from fastpo.models import vllm
from fastpo.models.chat import Chat
from fastpo.models.generate import respond
from fastpo.rewards import Term
from fastpo.sample import BadSample, Encoded, MicroBatch, Sample
from fastpo_kernels import losses

Scorer = Callable[[MicroBatch], Tensor]  # a row of answers -> [S] learned rewards


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt with the answers to it. encoded: responses are the answers, scores their rewards."""

    encoded: Encoded
    question: str
    answers: tuple[str, ...]
    parts: tuple[dict[str, float], ...]  # each reward of each answer, before its weight


def names(cfg: Rollout) -> tuple[str, ...]:
    """Metrics of a rollout besides those of the loss."""
    each = [f"reward/{plugin.name}" for plugin in cfg.rewards]
    return ("reward", *dict.fromkeys(each), *(["reward/model"] if cfg.reward_model else []), "answer_tokens", "signal")


def check(run: Run, table: Table) -> None:
    """Raises ValueError before any weight is loaded for groups that cannot fit in a row."""
    cfg = run.rollout
    assert cfg is not None
    vllm.check(run)
    longest = max(len(e.prompt) for e in table.encoded)
    most = longest + cfg.group * cfg.generation.max_tokens
    if most > run.batch.tokens:
        raise ValueError(
            f"batch.tokens: {run.batch.tokens} holds no group: the longest prompt has {longest} tokens, and "
            f"{cfg.group} answers of {cfg.generation.max_tokens} tokens make it {most}"
        )


def readable(run: Run, table: Table, terms: Sequence[Term] | None = None) -> Table:
    """The table without the rows whose ground truth a reward cannot read, if data.on_bad_sample says skip. Tries our
    rewards alone, since one of a user's own may be slow. terms: by default those of rollout.rewards.

    Raises BadSample at the first such row under on_bad_sample: error, ValueError for a reward that does not exist and
    where no row is left.
    """
    if terms is None:
        assert run.rollout is not None
        terms = rewards.terms(run.rollout.rewards, key="rollout.rewards")
    rules = [rule for rule in terms if rule.name in rewards.REWARDS]
    kept, skipped = [], []
    for n, sample in enumerate(table.samples):
        try:
            rewards.total(rules, "", sample.truth, where=sample.key)
            kept.append(n)
        except BadSample as error:
            if run.data.on_bad_sample == "error":
                raise
            skipped.append((sample.key, str(error)))
    if not kept:
        raise ValueError(f"no usable row; the first of {len(skipped)} bad ones: {skipped[0][1]}")
    return Table(
        samples=[table.samples[n] for n in kept],
        encoded=[table.encoded[n] for n in kept],
        skipped=[*table.skipped, *skipped],
    )


def windows(
    engine: Engine, feed: Feed, table: Table, order: Sequence[Sequence[int]], run: Run, meter: Meter, start: int,
    scorer: Scorer | None = None,
) -> Iterator[list[MicroBatch]]:  # fmt: skip
    """For each optimizer step this rank's micro-batches; `rollout.updates` steps share one rollout.

    order: the samples of every step from `start` on, a multiple of rollout.updates. Rewards and lengths go to `meter`,
    answers to out/rollouts.jsonl. What is sampled follows from (seed, step, sample), not from the number of ranks.
    """
    cfg = run.rollout
    assert cfg is not None and start % cfg.updates == 0
    rules = rewards.terms(cfg.rewards, key="rollout.rewards")
    samples = {sample.key: sample for sample in table.samples}
    log = run.out / "rollouts.jsonl"
    if dist.get_rank() == 0:
        cut(log, start - 1)
    dist.barrier()
    recent = _recent(log)
    for number, (prompts, skipped) in enumerate(feed.prompts(table, order[:: cfg.updates])):
        list_skipped(run.out, skipped)
        step = start + number * cfg.updates
        answers = generate(engine, prompts, cfg.generation, cfg.group, f"{run.seed}/{step}")
        groups = [judge(engine, p, a, samples[p.key], rules) for p, a in zip(prompts, answers, strict=True)]
        if scorer is not None:
            groups = [_learned(engine, group, scorer, feed, cfg) for group in groups]
        write(log, step, groups)
        rewards_of = [torch.tensor(g.encoded.scores) for g in groups]
        if cfg.advantage == "gae" and cfg.gae.standardise:
            rewards_of, recent = standardised(recent, groups, cfg.gae.reward_scale)
        window = learnable(engine, feed, groups, rewards_of, cfg, step)
        for _ in range(min(cfg.updates, len(order) - number * cfg.updates)):
            note(meter, groups, cfg)
            yield window


def learnable(
    engine: Engine, feed: Feed, groups: Sequence[Group], reward: Sequence[Tensor], cfg: Rollout, step: int
) -> list[MicroBatch]:
    """Packed rows of the groups that have something to learn from, as many on every rank. reward: [answers] of each."""
    kept = [i for i, g in enumerate(groups) if cfg.advantage == "gae" or has_signal(g.encoded.scores)]
    plan = [[kept[i] for i in row] for row in bins([groups[i].encoded.size for i in kept], feed.budget)]
    plan += [[] for _ in range(max(1, engine.all_max(len(plan))) - len(plan))]
    window = []
    for row in plan:
        calls = engine.all_max(feed.calls(sum(groups[i].encoded.patches for i in row)))
        batch = replace(pack([groups[i].encoded for i in row], feed.blank), calls=calls)
        scores = torch.cat([torch.zeros(0), *(reward[i].float() for i in row)])
        window.append(replace(batch, given=prepare(engine, batch, cfg, scores, step)))
    return whitened(window) if cfg.advantage == "gae" and cfg.gae.whiten and step >= cfg.gae.critic_steps else window


def mean_rewards(engine: Engine, feed: Feed, table: Table, run: Run, scorer: Scorer | None = None) -> dict[str, float]:
    """Mean reward of the likeliest answer to each held-out prompt."""
    cfg = run.rollout
    assert cfg is not None
    greedy = cfg.generation.model_copy(update={"temperature": 0.0})
    rules = rewards.terms(cfg.rewards, key="rollout.rewards")
    samples = {sample.key: sample for sample in table.samples}
    meter = Meter(names(cfg), engine.device)
    for prompts, skipped in feed.prompts(table, in_order(len(table), run.batch.prompts)):
        list_skipped(run.out, skipped)
        answers = generate(engine, prompts, greedy, 1, "eval")
        groups = [judge(engine, p, a, samples[p.key], rules) for p, a in zip(prompts, answers, strict=True)]
        if scorer is not None:
            groups = [_learned(engine, group, scorer, feed, cfg) for group in groups]
        note(meter, groups, cfg)
    return {name: value for name, value in meter.reduce().items() if name != "signal"}


def generate(
    engine: Engine, prompts: Sequence[Encoded], cfg: Generation, count: int, seed: str
) -> list[tuple[Tensor, ...]]:
    """`count` answers to each prompt from the policy as it is. Collective, though ranks may hold different numbers."""
    policy, training, run = engine.policy, engine.policy.training, engine.run
    seeds = [random.Random(f"{seed}/{Path(prompt.key).name}").getrandbits(63) for prompt in prompts]
    if run.rollout is not None and run.rollout.engine == "vllm":
        core, gathered = policy.core, engine.gathered
        return vllm.respond(core, policy.processor, run, prompts, cfg, count=count, seeds=seeds, gathered=gathered)
    engine.train(False)
    with engine.whole():
        found = [
            respond(
                policy.core, policy.family, policy.processor, prompt, cfg, count=count, seed=drawn,
                chunk=policy.frames_per_chunk,
            )
            for prompt, drawn in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
    engine.train(training)
    return found


def judge(engine: Engine, prompt: Encoded, answers: Sequence[Tensor], source: Sample, rules: Sequence[Term]) -> Group:
    """A prompt with the rule rewards of its answers. Raises BadSample where a reward cannot be computed."""
    decode = engine.policy.processor.chat.tokenizer.decode
    texts = tuple(decode(answer, skip_special_tokens=True) for answer in answers)
    scored = [rewards.total(rules, text, source.truth, where=prompt.key) for text in texts]
    encoded = replace(
        prompt, responses=tuple(answers), scores=tuple(score for score, _ in scored), weights=None, parents=None,
        trained=None,
    )  # fmt: skip
    return Group(encoded=encoded, question=source.question, answers=texts, parts=tuple(parts for _, parts in scored))


def has_signal(scores: Sequence[float]) -> bool:
    """Whether the scores differ: a group of equal ones has no advantage to learn from."""
    return max(scores) > min(scores)


@torch.no_grad()
def prepare(engine: Engine, row: MicroBatch, cfg: Rollout, reward: Tensor, step: int) -> dict[str, Tensor]:
    """What the loss reads of the rollout. reward: [S]. Runs the policy where its log-probs or values are needed."""
    seg = row.segments
    if cfg.advantage != "gae" and cfg.updates == 1:
        return {"advantage": losses.advantages(reward, seg, kind=cfg.advantage)[0]}
    engine.train(False)
    stats = {k: v.cpu() for k, v in engine.stats(row.to(engine.device)).items() if v is not None}
    engine.train()
    if cfg.advantage != "gae":
        return {"advantage": losses.advantages(reward, seg, kind=cfg.advantage)[0], "old_logp": stats["logp"]}
    g = cfg.gae
    shaped = losses.shaped_reward(stats["logp"], stats["ref_logp"], reward, seg, beta=g.beta, clip=g.reward_clip)
    advantage, returns = losses.gae(shaped, stats["value"], seg, gamma=g.gamma, lam=g.lam)
    if step < g.critic_steps:
        advantage = torch.zeros_like(advantage)
    return {"advantage": advantage, "returns": returns, "old_logp": stats["logp"], "old_value": stats["value"]}


def standardised(recent: Tensor, groups: Sequence[Group], scale: float) -> tuple[list[Tensor], Tensor]:
    """The rewards of each group by mean and deviation of all ranks' last rewards, and those rewards. Collective."""
    mine = [torch.tensor(g.encoded.scores, dtype=torch.float64) for g in groups]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {g.encoded.key: scores for g, scores in zip(groups, mine, strict=True)})
    everyone = {key: scores for rank in found for key, scores in rank.items()}
    keys = sorted(everyone)
    scaled, recent = losses.standardise(torch.cat([everyone[k] for k in keys]), recent, scale=scale)
    by_key = dict(zip(keys, scaled.split([len(everyone[k]) for k in keys]), strict=True))
    return [by_key[g.encoded.key] for g in groups], recent


def whitened(window: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The advantages of all ranks with mean 0 and variance 1. Collective."""
    mine = torch.cat([row.given["advantage"] for row in window])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    first = sum(len(x) for x in found[: dist.get_rank()])
    scaled = losses.whiten(torch.cat(found))[first : first + len(mine)]
    parts = scaled.split([len(row.target) for row in window])
    return [replace(row, given={**row.given, "advantage": x}) for row, x in zip(window, parts, strict=True)]


def note(meter: Meter, groups: Sequence[Group], cfg: Rollout) -> None:
    """Means over answers; "signal" is the share of groups whose rewards differ."""
    meter.add("reward", torch.tensor([s for g in groups for s in g.encoded.scores]))
    for name in {name for g in groups for parts in g.parts for name in parts}:
        meter.add(f"reward/{name}", torch.tensor([parts[name] for g in groups for parts in g.parts]))
    meter.add("answer_tokens", torch.tensor([float(len(r)) for g in groups for r in g.encoded.responses]))
    meter.add("signal", torch.tensor([float(has_signal(g.encoded.scores)) for g in groups]))


def write(path: Path, step: int, groups: Sequence[Group]) -> None:
    """Appends every answer of all ranks to `path` and shows one of them. Collective."""
    mine = [
        {"step": step, "key": g.encoded.key, "question": g.question, "answer": answer, "reward": score, "parts": parts}
        for g in groups
        for answer, score, parts in zip(g.answers, g.encoded.scores, g.parts, strict=True)
    ]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        answers = sorted((row for rank in found for row in rank), key=lambda row: row["key"])  # whatever the ranks
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
        if answers:
            best = max(answers, key=lambda row: row["reward"])
            text = " ".join(best["answer"].split())[:120]
            say(f"  {best['key']}: {text!r} reward {best['reward']:.3g}")


def _recent(path: Path) -> Tensor:
    """[<= 1000] float64, the last rewards of the run so far."""
    lines = path.read_text(encoding="utf-8").splitlines()[-1000:] if path.exists() else []
    return torch.tensor([json.loads(line)["reward"] for line in lines], dtype=torch.float64)


def as_written(chat: Chat, answer: Tensor) -> Tensor:
    """A sampled answer with all that ends a data set's: ChatML's line break, too, which is where a reward is read."""
    end = torch.tensor(chat.tokenizer(chat.end, add_special_tokens=False).input_ids)
    return torch.cat([answer, end[1:]]) if answer[-1:].tolist() == end[:1].tolist() else answer


@torch.no_grad()
def _learned(engine: Engine, group: Group, scorer: Scorer, feed: Feed, cfg: Rollout) -> Group:
    """Adds the reward model's number, times its weight."""
    answers = tuple(as_written(engine.policy.processor.chat, answer) for answer in group.encoded.responses)
    learned = scorer(pack([replace(group.encoded, responses=answers)], feed.blank).to(engine.device)).tolist()
    scores = tuple(s + cfg.reward_model_weight * r for s, r in zip(group.encoded.scores, learned, strict=True))
    parts = tuple(p | {"model": r} for p, r in zip(group.parts, learned, strict=True))
    return replace(group, encoded=replace(group.encoded, scores=scores), parts=parts)
