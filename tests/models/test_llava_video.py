"""The packed forest against separate padded forwards of the plain Hugging Face model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastpo.data import synthetic
from fastpo.data.pack import pack
from fastpo.models import chat, llava, llava_video, trainable
from fastpo.models.policy import Policy
from fastpo.sample import Media, Response, Sample, Sampling
from fastpo_kernels import losses
from tests import tiny, tiny_families

STATS = frozenset({"logp"})


def frame_tokens(model, pixels, pooling):
    """LLaVA-Video's visual tokens restated plainly: pooled grid row by row, a newline after each, frame by frame."""
    p = tiny.processor(pooling)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (p.mean, p.std))
    tower = model.model.vision_tower
    hidden = tower.encoder(inputs_embeds=tower.embeddings((pixels / 255.0 - mean) / std)).last_hidden_state
    rows = []
    for frame in model.model.multi_modal_projector(hidden):
        g = math.isqrt(len(frame))
        grid = frame.T.reshape(1, -1, g, g)
        half = (g + 1) // 2
        grid = F.interpolate(grid, (half, half), mode="bilinear") if pooling == "bilinear" else F.avg_pool2d(grid, 2, 2)
        for y in range(grid.shape[2]):
            rows += [grid[0, :, y, x] for x in range(grid.shape[3])] + [model.model.image_newline]
    return torch.stack(rows)


def separate(model, sample):
    """Per response [n, H] hidden states and [n, V] log-probs of the plain model on right-padded rows."""
    full = [torch.cat([sample.prompt, r]) for r in sample.responses]
    longest = max(map(len, full))
    ids = torch.stack([F.pad(x, (0, longest - len(x))) for x in full])
    mask = torch.stack([F.pad(torch.ones_like(x), (0, longest - len(x))) for x in full])
    embeddings = model.get_input_embeddings()(ids)
    if sample.pixels is not None:
        tokens = frame_tokens(model, sample.pixels, "bilinear").expand(len(full), -1, -1)
        embeddings = embeddings.masked_scatter((ids == tiny.VIDEO)[..., None], tokens)
    hidden = model.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
    first = len(sample.prompt) - 1
    cut = [hidden[i, first : first + len(r)] for i, r in enumerate(sample.responses)]
    return cut, [model.lm_head(x).log_softmax(-1) for x in cut]


def separate_logps(model, samples):
    """[N] log-probs of all responses of all samples."""
    tables = [(table, r) for s in samples for table, r in zip(separate(model, s)[1], s.responses, strict=True)]
    return torch.cat([table.gather(1, r[:, None])[:, 0] for table, r in tables])


CASES = {
    "one pair": [(5, 7, 2, [3, 6])],
    "one response": [(4, 9, 1, [5])],
    "text beside video": [(3, 2, 0, [4, 1]), (7, 3, 1, [2, 9])],
    "text only": [(6, 5, 0, [3, 7, 2])],
    "four samples, lists": [(3, 4, 1, [1, 2, 3, 4, 5]), (9, 1, 2, [7, 3]), (1, 8, 0, [6]), (2, 2, 3, [4, 4, 9])],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_packed_row_equals_separate_forwards(case, checkpointing):
    generator = torch.Generator().manual_seed(1)
    samples = [
        tiny.sample(str(i), generator, before=b, after=a, frames=f, responses=r)
        for i, (b, a, f, r) in enumerate(CASES[case])
    ]
    plain, packed = tiny.model(packed=False), tiny.model(packed=True)
    if checkpointing:
        trainable.enable_checkpointing(packed)
    policy = Policy(packed, llava_video, tiny.processor(), mode="none", stats=STATS).train()
    batch = pack(samples, tiny.blank())

    logp, hidden = policy(batch, record=True)
    want = separate_logps(plain, samples)
    assert relative(hidden, torch.cat([x for s in samples for x in separate(plain, s)[0]])) < 1e-5
    assert relative(logp, want) < 1e-5

    seg = batch.segments
    ref = torch.linspace(-7, -5, len(want))
    for objective in (losses.dpo, losses.sft) if seg.pairs.shape[1] else (losses.sft,):
        plain.zero_grad()
        packed.zero_grad()
        pair = policy(batch).logp, separate_logps(plain, samples)
        ours, theirs = (run(objective, logp, ref, seg) for logp in pair)
        assert relative(ours.detach(), theirs.detach()) < 1e-5
        ours.sum().backward()
        theirs.sum().backward()
        compare_gradients(packed, plain)


def run(objective, logp, ref, seg):
    needs = losses.needs(objective)
    return objective(**{k: v for k, v in {"logp": logp, "ref_logp": ref}.items() if k in needs}, seg=seg).losses


def compare_gradients(packed, plain):
    checked = 0
    theirs = dict(plain.named_parameters())
    for name, parameter in packed.named_parameters():
        wanted = theirs[name].grad
        if (
            wanted is None
        ):  # text only: the plain model never ran its tower; ours ran on the blank image, without effect
            assert parameter.grad is None or float(parameter.grad.abs().max()) == 0, name
            continue
        scale = max(1e-3, float(wanted.abs().max()))
        assert float((parameter.grad - wanted).abs().max()) / scale < 1e-5, name
        checked += 1
    assert checked > 20


def relative(got, want):
    return float(((got - want).abs().max() / want.abs().max()).detach())


@pytest.mark.parametrize("pooling", ["bilinear", "average"])
def test_frame_tokens_equal_a_plain_restatement(pooling):
    model = tiny.model(packed=True)
    pixels = torch.randint(0, 256, (3, 3, tiny.SIZE, tiny.SIZE), dtype=torch.uint8)
    got = llava_video.vision(model, tiny.processor(pooling), pixels, torch.zeros(0, dtype=torch.int64))
    want = frame_tokens(model, pixels, pooling)
    side = 4 if pooling == "bilinear" else 3
    assert got.shape == (3 * side * (side + 1), 48)
    assert relative(got, want) < 1e-6


@pytest.mark.parametrize(("pooling", "tokens"), [("bilinear", 210), ("average", 182)])
def test_published_token_counts(pooling, tokens):
    features = torch.zeros(2, 27 * 27, 8)
    assert llava_video.grid_tokens(features, torch.ones(8), pooling=pooling).shape == (2 * tokens, 8)


def test_last_hidden_state_is_before_the_towers_norm():
    model = tiny.model(packed=True)
    tower = model.model.vision_tower
    x = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    capture = -1 if llava.CAPTURES_ONE else True
    got = tower(x, output_hidden_states=capture, return_dict=True).hidden_states[-1]
    assert torch.equal(got, tower.encoder(inputs_embeds=tower.embeddings(x)).last_hidden_state)
    assert not torch.allclose(got, tower(x).last_hidden_state)


def test_the_time_instruction(tmp_path):
    for name, count in (("long", 20), ("short", 7)):
        synthetic.encode(tmp_path / f"{name}.mp4", np.zeros((count, 32, 32, 3), dtype=np.uint8))
    tiny_families.tokenizer(starts=False, template=tiny_families.CHATML).save_pretrained(tmp_path)
    talk = chat.read(tmp_path)
    p = llava_video.Processor(
        chat=talk, video_token="<video>", video_token_id=talk.tokenizer.get_vocab()["<video>"],
        size=28, mean=(0.5,) * 3, std=(0.5,) * 3, patches=1, pooling="bilinear", time_instruction=True,
    )  # fmt: skip
    clips = tuple(Media(kind="video", path=tmp_path / f"{name}.mp4") for name in ("long", "short"))
    answers = (Response(text="", score=0.0),)
    asked = Sample(key="", question="<video>\nand <video>\nWhy?", media=clips, responses=answers)

    def told(count):
        at = ",".join(f"{k * count // 3 / synthetic.FPS:.2f}s" for k in range(3))
        return (
            f"\nThe video lasts for {count / synthetic.FPS:.2f} seconds, and 3 frames are uniformly sampled from it. "
            f"These frames are located at {at}.Please answer the following questions related to this video.\n"
        )

    video = "<video>" * 3 * 2  # three frames of one patch and a newline
    wanted = f"<|im_start|>user {video}{told(20)}and {video}{told(7)}Why?<|im_end|>\n<|im_start|>assistant\n"
    assert talk.tokenizer.decode(llava_video.encode(p, asked, Sampling(frames=3)).prompt) == wanted
