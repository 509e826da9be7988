"""Sampled answers against whole forwards without a cache."""

from dataclasses import replace

import pytest
import torch

from fastpo.config import Generation, load
from fastpo.data.pack import pack
from fastpo.fit import make_feed
from fastpo.models import FAMILIES
from fastpo.models.generate import respond


@pytest.fixture(scope="module")
def case(demo, tmp_path_factory):
    """(model, family, processor, two decoded samples with a video, one of text only)."""
    from tests.test_fit import RECIPE, options

    run = load(RECIPE, options(demo, tmp_path_factory.mktemp("generate")))
    family = FAMILIES[run.model.family]
    feed = make_feed(run, 0, 1)
    table = feed.read(run.data.train)
    video = next(iter(feed.prompts(table, [[0, 1]])))[0]
    processor = family.processor(run.model)
    words = replace(video[0], prompt=video[0].prompt[video[0].prompt != processor.video_token_id], pixels=None)
    torch.manual_seed(0)
    model = family.load(run.model).eval()
    for parameter in model.parameters():  # far from uniform, so that the likeliest token is clear
        parameter.data *= 1.5
    return model, family, processor, [*video, words]


def next_logits(model, family, processor, prompt, answer):
    """[V] after prompt and answer, by one forward over the whole text."""
    text = replace(prompt, prompt=torch.cat([prompt.prompt, answer]), responses=(), weights=None, scores=())
    row = pack([text], None)
    features = None if text.pixels is None else family.vision(model, processor, row.pixels, row.grid)
    return model.lm_head(family.hidden(model, row, features)[-1])


@pytest.mark.parametrize("which", [0, 1, 2])
@torch.no_grad()
def test_greedy_answers_are_the_likeliest_tokens_of_whole_forwards(case, which):
    model, family, processor, prompts = case
    cfg = Generation(max_tokens=6, temperature=0)
    answers = respond(model, family, processor, prompts[which], cfg, count=3, seed=1)
    assert len(answers) == 3 and all(torch.equal(a, answers[0]) for a in answers)
    wanted = torch.zeros(0, dtype=torch.int64)
    for _ in answers[0]:
        wanted = torch.cat([wanted, next_logits(model, family, processor, prompts[which], wanted).argmax()[None]])
    assert answers[0].tolist() == wanted.tolist()


def test_the_tower_reads_a_video_in_chunks(case):
    model, family, processor, prompts = case
    frames, cfg = len(prompts[0].pixels), Generation(max_tokens=6, temperature=0)
    calls: list[int] = []
    watch = model.model.vision_tower.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    (whole,) = respond(model, family, processor, prompts[0], cfg, count=1, seed=0)
    (parts,) = respond(model, family, processor, prompts[0], cfg, count=1, seed=0, chunk=1)
    watch.remove()
    assert frames > 1 and calls == [frames] + [1] * frames
    assert parts.tolist() == whole.tolist()


def test_samples_follow_the_distribution_and_the_seed_alone(case):
    model, family, processor, prompts = case
    cfg = Generation(max_tokens=1, temperature=0.8)
    state = torch.get_rng_state()
    answers = respond(model, family, processor, prompts[0], cfg, count=4000, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    again = respond(model, family, processor, prompts[0], cfg, count=4000, seed=3)
    assert [a.tolist() for a in answers] == [a.tolist() for a in again]
    with torch.no_grad():
        none = torch.zeros(0, dtype=torch.int64)
        logits = next_logits(model, family, processor, prompts[0], none)
        logits[[model.config.image_token_id, model.config.video_token_id]] = -torch.inf  # never in an answer
        expected = (logits / 0.8).softmax(-1)
    counts = torch.bincount(torch.cat(answers), minlength=len(expected)) / 4000
    top = expected.topk(5).indices
    error = (expected[top] * (1 - expected[top]) / 4000).sqrt()
    assert ((counts - expected)[top].abs() < 4.5 * error + 1e-9).all()


def test_an_answer_ends_with_the_templates_end_token(case):
    model, family, processor, prompts = case
    end = processor.chat.end_id
    cfg = Generation(max_tokens=40, temperature=3.0)
    answers = respond(model, family, processor, prompts[0], cfg, count=64, seed=5)
    for answer in answers:
        assert end not in answer[:-1].tolist() and (len(answer) == 40 or int(answer[-1]) == end)
    assert len({len(answer) for answer in answers}) > 1
