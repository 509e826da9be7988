"""`python -m fastpo.generate`: its rows against the library's answers and the formats that read them."""

import json
from dataclasses import replace

import pytest
import torch

from fastpo import generate
from fastpo.config import Generation, Source, load
from fastpo.data import formats
from fastpo.fit import make_feed
from fastpo.models.generate import extended, prefilled, respond
from fastpo.models.trained import open_model
from fastpo.sample import Encoded, Sample, Turn
from tests.test_fit import RECIPE, options


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(demo, out, *more):
    generate.main([str(RECIPE), *options(demo, out.parent), f"data.eval={{name: rrpo, path: {demo / 'test.json'}}}",
                   "--eval", "--out", str(out), "generation.max_tokens=6", "data.frames=2", *more])  # fmt: skip


@pytest.fixture(scope="module")
def greedy(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("greedy") / "rows.jsonl"
    call(demo, out, "--count", "2", "generation.temperature=0")
    return out


def test_greedy_rows_are_the_librarys_answers_and_both_formats_read_them(greedy, demo):
    run = load(RECIPE, options(demo, greedy.parent, "data.frames=2"))
    opened = open_model(run.model)
    feed = make_feed(run, 0, 1)
    table = feed.read(Source(name="rrpo", path=str(demo / "test.json")))
    cfg = Generation(max_tokens=6, temperature=0)
    found = rows(greedy)
    assert len(found) == 6
    for row, (prompt,), source in zip(
        found, (p for p, _ in feed.prompts(table, [[n] for n in range(6)])), table.samples, strict=True
    ):
        (answer,) = respond(opened.model, opened.family, opened.processor, prompt, cfg, count=1, seed=9)
        text = opened.processor.chat.tokenizer.decode(answer, skip_special_tokens=True)
        assert row["answers_gen"] == [text, text] * bool(text.strip()) and row["key"] == source.key
        assert row["media_path"] == [str(source.media[0].path.relative_to(demo))]
    named = [row | {"answers_gen": ["a", "b"], "iou_scores": [0.5, 1.0], "truth": row["answer"]} for row in found]
    file = greedy.with_name("scored.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in named))
    for name in ("perpo", "rollout"):
        samples = formats.samples(Source(name=name, path=str(file)), demo)
        for sample, source in zip(samples, table.samples, strict=True):
            assert isinstance(sample, Sample)
            assert (sample.question, sample.media) == (source.question, source.media)


def test_a_stopped_command_goes_on_with_the_same_answers(demo, tmp_path, capsys):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    call(demo, whole, "--count", "3")
    text = whole.read_bytes()
    lines = text.splitlines(keepends=True)
    assert len({answer for row in rows(whole) for answer in row["answers_gen"]}) > 6
    broken.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    call(demo, broken, "--count", "3")
    assert broken.read_bytes() == text and "4 new rows" in capsys.readouterr().out
    call(demo, broken, "--count", "3")
    assert broken.read_bytes() == text and "0 new rows" in capsys.readouterr().out


def test_another_count_does_not_go_on_with_the_same_file(greedy, demo, capsys):
    text = greedy.read_bytes()
    assert all(row["answers_count"] == 2 for row in rows(greedy))
    with pytest.raises(SystemExit):
        call(demo, greedy, "--count", "3")
    assert f"--count: 3, but {greedy}, row 0, has 2 answers: take another --out" in capsys.readouterr().err
    assert greedy.read_bytes() == text


def test_data_sets_that_are_mixed_keep_their_own_rows(demo, tmp_path):
    names = ("train", "test")
    sources = [{"name": "rrpo", "path": str(demo / f"{name}.json"), "rule": "first:2"} for name in names]
    out = tmp_path / "mixed.jsonl"
    call(demo, out, f"data.eval={json.dumps([sources[0], sources[1] | {'weight': 2}])}", "generation.max_tokens=1")
    found = rows(out)
    numbers = [[row["sample_id"] for row in json.loads((demo / f"{name}.json").read_text())[:2]] for name in names]
    assert [row["sample_id"] for row in found] == numbers[0] + numbers[1] * 2
    assert len({row["key"] for row in found}) == 6


def test_rows_of_another_program_are_not_continued(demo, tmp_path, capsys):
    out = tmp_path / "other.jsonl"
    out.write_text('{"question": "?"}\n')
    with pytest.raises(SystemExit):
        call(demo, out)
    assert f"{out}, row 0, key key: missing" in capsys.readouterr().err


def test_bad_options_are_refused(demo, tmp_path, capsys):
    for more, message in (
        (["generation.temperature=-1"], "generation.temperature: "),
        (["generation.heat=1"], "generation.heat: "),
        (["--count", "0"], "--count: 0"),
        (["--adapter", str(tmp_path)], "neither a checkpoint"),
    ):
        with pytest.raises(SystemExit):
            call(demo, tmp_path / "x.jsonl", *more)
        assert message in capsys.readouterr().err


def test_questions_and_answers_come_after_the_rows_own_answer(demo, tmp_path):
    out = tmp_path / "asked.jsonl"
    call(demo, out, "--questions", "model.question_role=vuser")
    table = json.loads((demo / "test.json").read_text())
    for row, source in zip(rows(out), table, strict=True):
        assert row["sampler"] == [source["question"].replace("<image>", "<video>"), source["answer"]]
        assert row["media_path"] == [source["media_path"]]
        assert row["c1"]["q"] != row["c2"]["q"] and {"q", "a1", "a2"} == row["c1"].keys() == row["c2"].keys()


def test_a_question_goes_on_from_the_prompts_cache_as_from_the_whole_text(demo, tmp_path):
    """The text after the cached prompt is what the chat template makes of these turns."""
    run = load(RECIPE, options(demo, tmp_path))
    model, family, processor, _ = open_model(run.model)
    feed = make_feed(run, 0, 1)
    sample = feed.read(run.data.train, keep="none").samples[0]
    told = replace(sample, turns=(Turn(role="assistant", text="The plank."),))
    asked = replace(told, turns=(*told.turns, Turn(role="user", text="Which shape?")))
    prompt, whole = (replace(feed.encode(s), pixels=feed.pixels(s)) for s in (told, asked))
    ids = [processor.chat.tokenizer(text, add_special_tokens=False).input_ids for text in (
        processor.chat.asks, "Which shape?" + processor.chat.asked + processor.chat.answers)]  # fmt: skip
    joined = extended(prompt, torch.tensor([*ids[0], *ids[1]]))
    assert joined.prompt.tolist() == whole.prompt.tolist()
    cfg = Generation(max_tokens=8)
    cache = prefilled(model, family, processor, prompt)
    for seed in range(2):  # the cache stays as it is
        mine = respond(model, family, processor, joined, cfg, count=3, seed=seed, cache=cache)
        plain = respond(model, family, processor, whole, cfg, count=3, seed=seed)
        assert [x.tolist() for x in mine] == [x.tolist() for x in plain]


def test_positions_of_added_text_follow_the_largest():
    prompt = Encoded(
        key="x", prompt=torch.arange(4), responses=(), weights=None, scores=(),
        positions=torch.tensor([[0, 1, 1, 3], [0, 1, 2, 3], [0, 2, 1, 3]]),
    )  # fmt: skip
    assert extended(prompt, torch.tensor([7, 8])).positions[:, -2:].tolist() == [[4, 5]] * 3
