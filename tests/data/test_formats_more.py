"""The authors' own rows of PerPO, MIA-DPO, SPO, LLaVA, Vision-LLM-Alignment and Visual-RFT."""

import json
import math
import re
from pathlib import Path

import pytest

from fastpo.config import Source
from fastpo.data import formats
from fastpo.sample import BadSample, Media, Response, Sample, Turn

PERPO = {
    "image_id": 1,
    "image_path": "c.JPG",
    "question": "Please provide the bounding box: glass",
    "answer": "[0.61, 0.1, 0.77, 0.54]",
    "answers_gen": ["[0.61, 0.17, 0.77, 0.53]</s>", "[0.1, 0.1, 0.2, 0.2]", "[0.6, 0.1, 0.7, 0.5]"],
    "iou_scores": [0.8, 0, 0.652],
}
MIA = {
    "id": 5,
    "image": ["c.JPG", "d.png"],
    "prompt": "Image1:<image>\nImage2:<image-placeholder>\nIn Image2, what is it?",
    "chosen": "A cat.",
    "rejected": "A dog.",
    "gt": "A cat.",
}
SPO = {
    "video": "a.mp4",
    "sampler": ["<image>\nWhat moves?", "A ball."],
    "c_pref": {"q": "<image>\nWhere to?", "a_w": "To the left.", "a_l": "Up."},
    "c_rej": {"q": "Is it?", "a_w": "Yes, it is.", "a_l": "No."},
    "tok_len": 1234,
    "score": [[5, 4], [3, 4], [4.5, 2]],
}
LLAVA = {
    "id": "1",
    "image": "d.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}
RANKED = {
    "id": "1",
    "image": "c.JPG,d.png",
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhich one?"},
        {"from": "gpt", "value": ["The first.", "The second.", "None."]},
    ],
}
RFT = {
    "image": "d.png",
    "problem": "Detect all cats.",
    "solution": "<answer>[{'Position': [1, 2, 3, 4], 'Confidence': 1.0}]</answer>",
}
VIDEOCHAT2 = {
    "video": "a.mp4",
    "sample_id": 0,
    "QA": [{"i": "Look closely.", "q": "What moves?", "a": "A red ball."}],
    "QA_NEG": [{"i": "Look closely.", "q": "What moves?", "a": "A blue cube."}],
}
ROWS = {
    "videochat2": VIDEOCHAT2,
    "perpo": PERPO,
    "mia": MIA,
    "spo": SPO,
    "llava": LLAVA,
    "ranked": RANKED,
    "visual_rft": RFT,
}


@pytest.fixture
def root(tmp_path) -> Path:
    """A media root; nothing is opened, so the bytes do not matter."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a.mp4", "c.JPG", "d.png"):
        (folder / name).write_bytes(b"x")
    return folder


def convert(name: str, root: Path, options: dict | None = None, **changes) -> Sample:
    return formats.DATASETS[name](ROWS[name] | changes, "train.json:7", root, **(options or {}))


def picture(root: Path, name: str = "d.png") -> Media:
    return Media(kind="image", path=root / name)


@pytest.mark.parametrize("name", ROWS)
def test_every_format_reads_its_rows_from_a_file(name, tmp_path, root):
    path = tmp_path / "train.json"
    other = {"unused": 1}
    path.write_text(json.dumps([ROWS[name], other]))
    good, wrong = formats.samples(Source(name=name, path=str(path)), root)
    assert isinstance(good, Sample) and good == formats.DATASETS[name](ROWS[name], f"{path}:0", root)
    assert isinstance(wrong, BadSample) and f"{path}, row 1, key " in str(wrong)


def test_a_perpo_row(root):
    assert convert("perpo", root) == Sample(
        key="train.json:7",
        question="<image>\nPlease provide the bounding box: glass",
        media=(picture(root, "c.JPG"),),
        responses=(
            Response(text="[0.61, 0.17, 0.77, 0.53]", score=0.8),
            Response(text="[0.1, 0.1, 0.2, 0.2]", score=0.0),
            Response(text="[0.6, 0.1, 0.7, 0.5]", score=0.652),
        ),
    )
    assert [r.score for r in convert("perpo", root, {"first": 2}).responses] == [0.8, 0.0]
    renamed = {k: v for k, v in PERPO.items() if k != "iou_scores"} | {"similarity": [1, 0.5, 1]}
    sample = formats.perpo(renamed, "f:0", root, scores="similarity")
    assert [r.score for r in sample.responses] == [1.0, 0.5, 1.0]  # ties stay, in the row's order


def test_a_videochat2_row(root):
    sample = convert("videochat2", root)
    assert sample == Sample(
        key="train.json:7",
        question="<video>\nLook closely. What moves?",
        media=(Media(kind="video", path=root / "a.mp4"),),
        responses=(Response(text="A red ball.", score=1.0), Response(text="A blue cube.", score=0.0)),
        phrases="different",
    )
    alone = [{"q": "What moves?", "a": answer} for answer in ("A ball.", "A cube.")]
    assert convert("videochat2", root, QA=alone[:1], QA_NEG=alone[1:]).question == "<video>\nWhat moves?"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"QA": VIDEOCHAT2["QA"] * 2}, "key QA: expected a list of one turn"),
        ({"QA_NEG": None}, "key QA_NEG: expected a list of one turn, got None"),
        ({"QA_NEG": [{"q": "Who moves?", "a": "A cube."}]}, "key QA_NEG: asks 'Who moves?', QA 'Look closely"),
        ({"QA_NEG": [{**VIDEOCHAT2["QA_NEG"][0], "a": " "}]}, "key QA_NEG.a: empty"),
        ({"QA_NEG": VIDEOCHAT2["QA"]}, "key QA_NEG.a: both responses are the same"),
    ],
)
def test_bad_videochat2_rows_name_row_and_key(root, changes, reason):
    with pytest.raises(BadSample, match=re.escape(f"train.json, row 7, {reason}")):
        convert("videochat2", root, **changes)


def test_a_mia_row(root):
    assert convert("mia", root) == Sample(
        key="train.json:7",
        question="Image1:<image>\nImage2:<image>\nIn Image2, what is it?",
        media=(picture(root, "c.JPG"), picture(root)),
        responses=(Response(text="A cat.", score=1.0), Response(text="A dog.", score=0.0)),
    )
    lone = convert("mia", root, image="d.png", prompt="Look <image> here")
    assert lone.question == "<image>\nLook  here" and lone.media == (picture(root),)
    assert convert("mia", root, image=["d.png"], prompt="Look <image> here").question == "Look <image> here"


def test_an_spo_row(root):
    assert convert("spo", root) == Sample(
        key="train.json:7",
        question="<video>\nWhat moves?",
        media=(Media(kind="video", path=root / "a.mp4"),),
        turns=(Turn(role="assistant", text="A ball."),),
        responses=(
            Response(text="Where to?", score=1.0, role="user"),
            Response(text="To the left.", score=1.0, parent=0),
            Response(text="Up.", score=0.0, parent=0),
            Response(text="Is it?", score=0.0, role="user"),
            Response(text="Yes, it is.", score=1.0, parent=3),
            Response(text="No.", score=0.0, parent=3),
        ),
    )
    assert len(convert("spo", root, score=None).responses) == 6


def test_a_conversation_is_one_response(root):
    sample = convert("llava", root)
    answer = Response(
        text="A cat.",
        score=1.0,
        turns=(Turn(role="user", text="Which colour?"), Turn(role="assistant", text="Red.", trained=True)),
    )
    assert sample == Sample(
        key="train.json:7", question="<image>\nWhat is it?", media=(picture(root),), responses=(answer,)
    )
    short = convert("llava", root, image="c.JPG, d.png", **turns("What?", "A cat."))
    assert short.responses == (Response(text="A cat.", score=1.0),) and len(short.media) == 2


def test_self_questioning_draws_user_turns_by_row(root):
    long = [{"from": ("human", "gpt")[n % 2], "value": f"Turn {n}"} for n in range(2002)]
    row = LLAVA | {"conversations": long}

    def asked(where: str, ratio: float) -> list[bool]:
        (answer,) = formats.llava(row, where, root, sq_ratio=ratio).responses
        assert all(turn.trained for turn in answer.turns if turn.role == "assistant")
        return [turn.trained for turn in answer.turns if turn.role == "user"]

    assert not any(asked("f:1", 0.0)) and all(asked("f:1", 1.0))
    assert 250 < sum(asked("f:1", 0.3)) < 350  # 1000 draws, standard deviation 14.5
    assert asked("f:1", 0.3) == asked("g:1", 0.3) != asked("f:2", 0.3)


def test_a_ranked_row(root):
    sample = convert("ranked", root)
    assert [(r.text, r.score) for r in sample.responses] == [("The first.", 2.0), ("The second.", 1.0), ("None.", 0.0)]
    assert sample.media == (picture(root, "c.JPG"), picture(root)) and sample.turns == ()
    said = [*LLAVA["conversations"][:3], {"from": "gpt", "value": ["Red.", "Blue."]}]
    longer = convert("ranked", root, image="d.png", conversations=said)
    assert longer.turns == (Turn(role="assistant", text="A cat."), Turn(role="user", text="Which colour?"))
    assert [r.text for r in longer.responses] == ["Red.", "Blue."]
    assert convert("ranked", root, image=None, conversations=[{"from": "human", "value": "Q?"}, said[-1]]).media == ()


def test_a_visual_rft_row(root):
    assert convert("visual_rft", root) == Sample(
        key="train.json:7",
        question="<image>\nDetect all cats.",
        media=(picture(root),),
        responses=(),
        truth=RFT["solution"],
    )
    lisa = {
        "conversations": [
            {"from": "user", "value": "<img>d.png</img>\nWhere is it?"},
            {"from": "assistant", "value": "(1,2),(3,4)"},
        ]
    }
    sample = formats.visual_rft(lisa, "f:0", root)
    assert sample.question == "<image>\nWhere is it?" and sample.truth == "<answer> (1,2),(3,4) </answer>"
    assert sample.media == (picture(root),)


def test_a_rollout_row(root):
    row = {"prompt": [{"role": "user", "content": "How many?"}], "videos": ["a.mp4"], "truth": {"count": 3}}
    sample = formats.rollout(row, "f:0", root)
    assert sample.question == "<video>\nHow many?" and sample.truth == {"count": 3} and sample.responses == ()
    assert formats.rollout({"q": "How?", "a": 0}, "f:0", root, prompt="q", truth="a").truth == 0
    assert formats.rollout({"prompt": "How?"}, "f:0", root, truth="").truth is None
    perpo = {"image_path": "d.png", "question": "Where?", "answer": "[0, 0, 1, 1]"}  # before candidates are sampled
    sample = formats.rollout(perpo, "f:0", root, prompt="question", truth="answer")
    assert sample.media == (picture(root),) and sample.question == "<image>\nWhere?"


def nested(name: str, key: str, **changes) -> dict:
    return {key: ROWS[name][key] | changes}


def turns(*values, roles=("human", "gpt")) -> dict:
    return {"conversations": [{"from": roles[n % 2], "value": value} for n, value in enumerate(values)]}


@pytest.mark.parametrize(
    ("name", "changes", "key", "reason"),
    [
        ("perpo", {"iou_scores": [0.8, 0.1]}, "iou_scores", "2 scores for 3 answers_gen"),
        ("perpo", {"iou_scores": [0.8, math.nan, 0.1]}, "iou_scores", "a finite number at place 1, got nan"),
        ("perpo", {"iou_scores": [0.8, 0.1, math.inf]}, "iou_scores", "a finite number at place 2, got inf"),
        ("perpo", {"iou_scores": [0.8, 0.1, None]}, "iou_scores", "a finite number at place 2, got None"),
        ("perpo", {"iou_scores": [0.8, 0.1, True]}, "iou_scores", "a finite number at place 2, got True"),
        ("perpo", {"iou_scores": [0.8, 0.1, "0.2"]}, "iou_scores", "a finite number at place 2, got '0.2'"),
        ("perpo", {"iou_scores": None}, "iou_scores", "missing"),
        ("perpo", {"iou_scores": 0.8}, "iou_scores", "expected a list of numbers"),
        ("perpo", {"answers_gen": None}, "answers_gen", "missing"),
        ("perpo", {"answers_gen": ["a", None, "b"]}, "answers_gen", "expected a list of texts"),
        ("perpo", {"answers_gen": ["a", "</s>", "b"]}, "answers_gen", "empty"),
        ("perpo", {"answers_gen": ["a"], "iou_scores": [1.0]}, "answers_gen", "1 candidates, a preference needs two"),
        ("perpo", {"image_path": "gone.png"}, "image_path", "no such file"),
        ("perpo", {"image": "d.png"}, "image_path", "image is given too"),
        ("mia", {"prompt": None}, "prompt", "missing"),
        ("mia", {"rejected": "A cat."}, "rejected", "no preference"),
        ("mia", {"image": ["d.png"]}, "prompt", "2 placeholders for 1 media items"),
        ("spo", {"sampler": ["What?"]}, "sampler", "expected a question and its answer"),
        ("spo", {"sampler": ["What?", " "]}, "sampler", "empty"),
        ("spo", {"c_pref": None}, "c_pref", "missing"),
        ("spo", {"c_rej": "q"}, "c_rej", "expected keys and values, got str"),
        ("spo", nested("spo", "c_pref", q="<image>"), "c_pref.q", "empty"),
        ("spo", nested("spo", "c_pref", a_l=None), "c_pref.a_l", "missing"),
        ("spo", nested("spo", "c_rej", a_l="Yes, it is."), "c_rej.a_l", "no preference"),
        ("spo", nested("spo", "c_rej", q="Where to?"), "c_rej.q", "no preference"),
        ("spo", {"score": [[5, 4], [4, 4], [1, 2]]}, "score", "answers to the first: [4, 4] is no preference"),
        ("spo", {"score": [[-1, -1], [4, 3], [1, 2]]}, "score", "questions: [-1, -1] is no preference"),
        ("spo", {"score": [[3, -1], [4, 3], [1, 2]]}, "score", "questions: [3, -1] is no preference"),
        ("spo", {"score": [[5, 4], [4, math.nan], [1, 2]]}, "score", "finite number"),
        ("spo", {"score": [[5, 4]]}, "score", "three pairs"),
        ("llava", turns("Q", "A", "Q"), "conversations", "the last turn has no answer"),
        ("llava", turns("A", "Q", roles=("gpt", "human")), "conversations", "turn 0 is from 'gpt', expected user"),
        ("llava", turns("S", "Q", roles=("system", "human")), "conversations", "turn 0 is from 'system'"),
        ("llava", turns("Q"), "conversations", "two turns or more"),
        ("llava", {"conversations": None}, "conversations", "missing"),
        ("llava", turns("Q", ["A"]), "conversations", "expected text, got list"),
        ("llava", turns("Q", "A", "<image> Q", "A"), "conversations", "holds <image>"),
        ("llava", turns("Q", " "), "conversations", "empty"),
        ("llava", {"image": "d.png,gone.png"}, "image", "no such file"),
        ("ranked", turns("Q", "A"), "conversations", "expected a list of texts"),
        ("ranked", turns("<image><image>Q", ["A"]), "conversations", "1 answers"),
        ("ranked", turns("<image><image>Q", ["A", "B", "A "]), "conversations", "two answers are the same"),
        ("ranked", turns("Q", "A", "Q"), "conversations", "a question and then the list of its answers"),
        ("visual_rft", {"solution": None}, "solution", "missing"),
        ("visual_rft", {"solution": ""}, "solution", "missing"),
        ("visual_rft", {"problem": " "}, "problem", "empty"),
        ("visual_rft", {"image": b"PNG"}, "image", "expected a path"),
        ("visual_rft", {"conversations": [{"value": "Q"}]}, "conversations", "a question and its answer"),
    ],
)
def test_bad_rows_name_file_row_and_key(root, name, changes, key, reason):
    with pytest.raises(BadSample) as error:
        convert(name, root, **changes)
    assert str(error.value).startswith(f"train.json, row 7, key {key}: ") and reason in str(error.value)


def test_perpo_rows_with_too_few_candidates_for_first(root):
    with pytest.raises(BadSample, match="row 7, key answers_gen: 3 candidates, fewer than first: 4"):
        convert("perpo", root, {"first": 4})
