import json
import os
import sys
from pathlib import Path

import datasets
import pytest

from fastpo.config import Source
from fastpo.data import formats
from fastpo.sample import BadSample, Media, Response, Sample

RRPO = {
    "sample_id": 0,
    "src": "synthetic",
    "media_path": "a.mp4",
    "question": "<image>\nWhat moves?",
    "answer": "A red ball moves.",
    "pred": "A blue cube moves.",
    "answer_masked": "A <MASK> red ball </MASK> moves.",
    "pred_masked": "A <MASK>blue cube</MASK> moves.",
}
DPO = {"prompt": "What moves?", "chosen": "A ball.", "rejected": "A cube.", "video": "a.mp4"}


@pytest.fixture
def root(tmp_path) -> Path:
    """A media root; nothing is opened, so the bytes do not matter."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.webm", "c.JPG", "d.png", "sub/e.gif"):
        (folder / name).write_bytes(b"x")
    (folder / "zero.mp4").touch()
    (tmp_path / "outside.mp4").write_bytes(b"x")
    return folder


def rrpo(root: Path, **changes) -> Sample:
    return formats.rrpo(RRPO | changes, "train.json:7", root)


def dpo(root: Path, **changes) -> Sample:
    return formats.dpo(DPO | changes, "train.json:7", root)


def read(path: Path, root: Path, name: str = "rrpo", **options) -> list[Sample | BadSample]:
    return formats.samples(Source(name=name, path=str(path), **options), root)


def test_an_rrpo_row(root):
    assert rrpo(root) == Sample(
        key="train.json:7",
        question="<video>\nWhat moves?",
        media=(Media(kind="video", path=root / "a.mp4"),),
        responses=(
            Response(text=RRPO["answer"], score=1.0, tagged=RRPO["answer_masked"]),
            Response(text=RRPO["pred"], score=0.0, tagged=RRPO["pred_masked"]),
        ),
    )


@pytest.mark.parametrize(
    ("question", "path", "expected"),
    [
        ("What?", "a.mp4", "<video>\nWhat?"),
        ("<video>\nWhat?", "b.webm", "<video>\nWhat?"),
        ("<image> What?", "a.mp4", "<video> What?"),
        (
            "What moves <image> here?\n",
            "a.mp4",
            "<video>\nWhat moves  here?",
        ),  # moved to the front by the authors' code
        ("<video>\nWhat?", "c.JPG", "<image>\nWhat?"),
        ("What?", "d.png", "<image>\nWhat?"),
        ("What?", "sub/e.gif", "<video>\nWhat?"),
    ],
)
def test_the_placeholder_is_named_after_the_file(root, question, path, expected):
    sample = rrpo(root, question=question, media_path=path)
    assert sample.question == expected and sample.media[0].path == root / path
    assert sample.media[0].kind == expected[1:6]


def test_media_paths(root, tmp_path):
    named = {k: v for k, v in RRPO.items() if k != "media_path"} | {"video": "b.webm"}
    assert formats.rrpo(named, "f:0", root).media[0].path == root / "b.webm"
    assert formats.rrpo(named | {"media_path": None}, "f:0", root).media[0].path == root / "b.webm"  # as datasets fills
    absolute = str(tmp_path / "outside.mp4")
    assert rrpo(root, media_path=absolute).media[0].path == Path(absolute)
    assert rrpo(root, media_path="sub/../a.mp4").media[0].path.resolve() == root / "a.mp4"
    (root / "link.mp4").symlink_to(absolute)
    assert rrpo(root, media_path="link.mp4").media[0].path == root / "link.mp4"


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"question": None}, "question", "missing"),
        ({"question": 3}, "question", "expected text, got int"),
        ({"question": " <image>\n "}, "question", "empty"),
        ({"question": "<image>\n<image>\nWhat?"}, "question", "2 placeholders for 1 media items"),
        ({"question": "What <MASK>moves</MASK>?"}, "question", "holds <MASK>"),
        ({"answer": None}, "answer", "missing"),
        ({"answer": ""}, "answer", "empty"),
        ({"pred": " \n"}, "pred", "empty"),
        ({"pred": ["A blue cube moves."]}, "pred", "expected text, got list"),
        ({"answer": "A <MASK>red</MASK> ball"}, "answer", "holds <MASK>"),
        ({"answer": "A red ball</MASK>"}, "answer", "holds </MASK>"),
        ({"pred": "<video> of a cube"}, "pred", "holds <video>"),
        ({"pred": RRPO["answer"], "pred_masked": RRPO["answer_masked"]}, "pred", "no preference"),
        ({"answer_masked": None}, "answer_masked", "missing"),
        ({"answer_masked": "A <MASK> red ball moves."}, "answer_masked", "never closed"),
        ({"pred_masked": "A <MASK>blue <MASK>cube</MASK></MASK> moves."}, "pred_masked", "inside a phrase"),
        ({"pred_masked": "A </MASK>blue cube<MASK> moves."}, "pred_masked", "without <MASK>"),
        ({"answer_masked": "A <MASK> green ball </MASK> moves."}, "answer_masked", "differs from answer"),
        ({"answer_masked": RRPO["answer"]}, "answer_masked", "no <MASK> phrase"),
        ({"pred_masked": "A <MASK> </MASK>blue cube moves."}, "pred_masked", "no <MASK> phrase"),
        ({"media_path": None}, "media_path", "missing"),
        ({"media_path": 5}, "media_path", "expected text, got int"),
        ({"media_path": " "}, "media_path", "expected a path"),
        ({"media_path": "gone.mp4"}, "media_path", "gone.mp4: no such file"),
        ({"media_path": "zero.mp4"}, "media_path", "zero.mp4: empty file"),
        ({"media_path": "a.txt"}, "media_path", "a.txt: neither a video"),
        ({"media_path": "a"}, "media_path", "a: neither a video"),
        ({"media_path": "../outside.mp4"}, "media_path", "leads out of data.media_root"),
        ({"media_path": "sub/../../outside.mp4"}, "media_path", "leads out of data.media_root"),
        ({"media_path": "a\0.mp4"}, "media_path", "no such file"),
        ({"media_path": "a" * 5000 + ".mp4"}, "media_path", "no such file"),
    ],
)
def test_bad_rrpo_rows_name_file_row_and_key(root, changes, key, reason):
    with pytest.raises(BadSample) as error:
        rrpo(root, **changes)
    assert str(error.value).startswith(f"train.json, row 7, key {key}: ") and reason in str(error.value)


def test_a_missing_key_is_like_none(root):
    for key in ("question", "answer", "pred", "answer_masked", "pred_masked", "media_path"):
        with pytest.raises(BadSample, match=f"row 7, key {key}: missing"):
            formats.rrpo({k: v for k, v in RRPO.items() if k != key}, "train.json:7", root)


def test_rows_without_phrases_where_they_are_not_required(root):
    plain = {key: value for key, value in RRPO.items() if not key.endswith("_masked")}
    assert [r.tagged for r in formats.rrpo(plain, "f:0", root, require_phrases=False).responses] == [None, None]
    some = RRPO | {"answer_masked": RRPO["answer"]}
    assert formats.rrpo(some, "f:0", root, require_phrases=False).responses[0].tagged == RRPO["answer"]
    with pytest.raises(BadSample, match="never closed"):  # a tag that is there is still checked
        formats.rrpo(RRPO | {"pred_masked": "A <MASK>blue cube moves."}, "f:0", root, require_phrases=False)


def test_a_dpo_row(root):
    assert dpo(root) == Sample(
        key="train.json:7",
        question="<video>\nWhat moves?",
        media=(Media(kind="video", path=root / "a.mp4"),),
        responses=(Response(text="A ball.", score=1.0), Response(text="A cube.", score=0.0)),
    )


def test_dpo_media_keys(root):
    bare = {k: v for k, v in DPO.items() if k != "video"}
    for key in ("video", "videos", "image", "images", "media_path"):
        for value in ("d.png", ["d.png"]):
            assert formats.dpo(bare | {key: value}, "f:0", root).media == (Media(kind="image", path=root / "d.png"),)
    assert formats.dpo(bare | {"images": [], "videos": None}, "f:0", root).media == ()
    assert formats.dpo(bare, "f:0", root).question == "What moves?"
    several = bare | {"images": ["d.png", "a.mp4"]}
    assert formats.dpo(several, "f:0", root).question == "<image>\n<video>\nWhat moves?"
    assert formats.dpo(several | {"prompt": "Is <image> in <image>?"}, "f:0", root).question == "Is <image> in <video>?"
    assert dpo(root, prompt=None, question="Why?").question == "<video>\nWhy?"


def test_dpo_conversations(root):
    prompt = [{"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "What moves?"}]}]
    sample = dpo(
        root,
        prompt=prompt,
        chosen=[{"role": "assistant", "content": [{"type": "text", "text": "A ball."}]}],
        rejected=[{"role": "assistant", "content": "A cube."}],
    )
    assert sample == dpo(root)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"chosen": 1}, "chosen", "expected text, got int"),
        ({"rejected": ""}, "rejected", "empty"),
        ({"rejected": "A ball. "}, "rejected", "no preference"),
        ({"chosen": "<MASK>A ball</MASK>"}, "chosen", "holds <MASK>"),
        ({"video": ["a.mp4", 3]}, "video", "expected a path, got 3"),
        ({"images": ["d.png"]}, "images", "video is given too"),
        ({"video": None, "prompt": "<image>\nWhat?"}, "prompt", "1 placeholders for 0 media items"),
        ({"prompt": [{"role": "system", "content": "Be brief."}]}, "prompt", "expected one user message"),
        ({"prompt": []}, "prompt", "expected one user message"),
        ({"prompt": ["What?"]}, "prompt", "expected one user message"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "prompt", "text, image or video part"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "chosen", "text, image or video part"),
        ({"chosen": [{"role": "user", "content": "A ball."}]}, "chosen", "expected one assistant message"),
    ],
)
def test_bad_dpo_rows_name_file_row_and_key(root, changes, key, reason):
    with pytest.raises(BadSample) as error:
        dpo(root, **changes)
    assert str(error.value).startswith(f"train.json, row 7, key {key}: ") and reason in str(error.value)


MIXED = [
    RRPO,
    RRPO | {"sample_id": "one", "extra": {"a": [1]}},  # a type of its own, a key of its own
    {"question": "What?"},
    RRPO | {"question": 3},
    RRPO | {"media_path": ["a.mp4"]},
    RRPO | {"question": "Où? 日本 😀 \u2028 <image>"},
]


@pytest.mark.parametrize("kind", ["json", "indented", "jsonl"])
def test_rows_come_in_order_with_their_own_types(tmp_path, root, kind):
    path = tmp_path / ("train[1]*.jsonl" if kind == "jsonl" else "train[1]*.json")  # no pattern
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in MIXED), encoding="utf-8")
    else:
        path.write_text(json.dumps(MIXED, indent=2 if kind == "indented" else None), encoding="utf-8")
    found = read(path, root)
    assert [isinstance(row, Sample) for row in found] == [True, True, False, False, False, True]
    assert found[0].key == f"{path}:0" and found[1].key == f"{path}:1" and found[0].responses == found[1].responses
    assert found[5].question == "<video>\nOù? 日本 😀"
    for n, reason in [(2, "media_path: missing"), (3, "question: expected text, got int"), (4, "text, got list")]:
        assert f"{path}, row {n}, key " in str(found[n]) and reason in str(found[n])


@pytest.mark.parametrize("kind", ["json", "jsonl", "address"])
def test_a_text_that_looks_like_json_stays_a_text(tmp_path, kind):
    """datasets would read "5" as a number where another row has a list or a number for the same key."""
    texts = ["5", "[1, 2]", "null", "true", '{"a": 1}', "1e3", "5.0"]
    mixed = [{"truth": text, "said": [{"value": text}]} for text in texts]
    mixed += [{"truth": 5, "said": [{"value": texts}]}, {"truth": texts}]
    path = tmp_path / ("train.jsonl" if kind == "jsonl" else "train.json")
    path.write_text("\n".join(map(json.dumps, mixed)) if kind == "jsonl" else json.dumps(mixed), encoding="utf-8-sig")
    assert formats.rows(f"file://{path}" if kind == "address" else str(path)) == mixed


def test_a_late_row_keeps_its_types(tmp_path, root):
    """datasets reads jsonl in chunks of 10 MB and would force the types of the first on the last row."""
    path = tmp_path / "long.jsonl"
    filler = json.dumps(RRPO | {"src": "x" * 2_000_000})
    last = json.dumps(RRPO | {"media_path": ["a.mp4"], "new": 1})
    path.write_text("\n".join([filler] * 6 + [last]))
    found = read(path, root)
    assert len(found) == 7 and isinstance(found[0], Sample)
    assert "row 6, key media_path: expected text, got list" in str(found[6])


def test_parquet_and_a_folder_as_on_the_hub(tmp_path, root, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "some_set"
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_list([RRPO, RRPO | {"answer": None}])
    rows.to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list([RRPO | {"pred": "No.", "pred_masked": "<MASK>No</MASK>."}]).to_parquet(
        folder / "test.parquet"
    )
    expected = read(folder / "train.parquet", root)
    assert isinstance(expected[0], Sample) and "train.parquet, row 1, key answer: missing" in str(expected[1])
    assert [row.responses for row in read(folder, root) if isinstance(row, Sample)] == [expected[0].responses]
    (row,) = read(Path(f"{folder}:test"), root)
    assert isinstance(row, Sample) and row.key == f"{folder}:test:0" and row.responses[1].text == "No."


def test_a_new_file_with_an_old_name_and_time(tmp_path, root):
    path = tmp_path / "train.json"
    for word in ("What", "When"):
        path.write_text(json.dumps([RRPO | {"question": f"{word}?"}]))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        (row,) = read(path, root)
        assert isinstance(row, Sample) and row.question == f"<video>\n{word}?"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.json", b'[{"question": "a"},\n {"question": "b"', "line 2: not valid JSON"),
        ("train.json", b'[{"question": "a"}, 3]', "train.json: row 1: expected keys and values, got 3"),
        ("train.jsonl", b'{"question": "a"}\n\n{"question": "b"\n{"question": "c"}', "line 3: not valid JSON"),
        ("train.json", b"", "train.json: no rows"),
        ("train.json", '[{"question": "é"}]'.encode("latin1"), "train.json: "),
        ("train.parquet", b"PAR1 no", "train.parquet: "),
    ],
)
def test_unreadable_files_are_named(tmp_path, root, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read(tmp_path / name, root)
    assert str(tmp_path / name) in str(error.value) and not isinstance(error.value, BadSample)


def test_missing_files_and_unknown_formats(tmp_path, root):
    with pytest.raises(ValueError, match="gone.json: no such file"):
        read(tmp_path / "gone.json", root)
    with pytest.raises(ValueError, match="unknown 'coco', expected one of dpo, llava, mia"):
        read(tmp_path / "gone.json", root, "coco")
    with pytest.raises(ValueError, match="data.require_phrase: unknown option"):
        read(tmp_path / "gone.json", root, require_phrase=False)


def test_options_and_formats_of_ones_own(tmp_path, root, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({k: v for k, v in RRPO.items() if not k.endswith("_masked")}))
    assert isinstance(read(path, root)[0], BadSample)
    assert isinstance(read(path, root, require_phrases=False)[0], Sample)
    (tmp_path / "own_format.py").write_text(
        "from fastpo.data.formats import bad, rrpo\n"
        "def mine(row, where, media_root, *, shout: bool):\n"
        "    if shout: raise bad(where, 'pred', 'too quiet')\n"
        "    return rrpo(row, where, media_root, require_phrases=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(read(path, root, "own_format:mine", shout=False)[0], Sample)
    (row,) = read(path, root, "own_format:mine", shout=True)
    assert str(row) == f"{path}, row 0, key pred: too quiet"
    del sys.modules["own_format"]
