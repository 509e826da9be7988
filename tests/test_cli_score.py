"""`python -m fastpo.score`: rewards of candidates, and a critic's ratings from an endpoint or a model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fastpo import endpoint, score
from fastpo.config import Source
from fastpo.data import formats
from fastpo.sample import Media, Sample, Sampling


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fails(arguments, capsys):
    with pytest.raises(SystemExit):
        score.main(list(map(str, arguments)))
    return capsys.readouterr().err


BOXES = [
    {"question": "Where?", "box": [0, 0, 10, 10], "answers_gen": ["[0, 0, 10, 5]", "[5, 0, 15, 10]", "nowhere"]},
    {"question": "Where?", "box": [0, 0, 4, 4], "answers_gen": ["[0, 0, 4, 4]", "[2, 2, 6, 6]", "[0, 0, 2, 2]"]},
]


def test_boxes_are_scored_by_their_iou_and_perpo_reads_them(tmp_path):
    source, out = write(tmp_path / "boxes.jsonl", BOXES), tmp_path / "out.jsonl"
    score.main([str(source), str(out), "--reward", "box_iou", "--truth", "box"])
    first, second = formats.samples(Source(name="perpo", path=str(out)), tmp_path)
    assert [r.score for r in first.responses] == pytest.approx([1 / 2, 1 / 3, 0])
    assert [r.score for r in second.responses] == pytest.approx([1, 4 / 28, 1 / 4])


def test_rewards_take_options_and_add_up(tmp_path):
    source = write(tmp_path / "text.jsonl", [{"question": "?", "truth": "abcd", "answers_gen": ["abcd", "ABcd"]}])
    out = tmp_path / "out.jsonl"
    score.main([str(source), str(out), "--reward", "{name: ocr, weight: 3}", "exact"])
    assert rows(out)[0]["iou_scores"] == pytest.approx([4.0, 3 * 0.5 + 1])
    score.main([str(source), str(out), "--reward", "{name: ocr, ignore_case: true}"])
    assert rows(out)[0]["iou_scores"] == [1.0, 1.0]


def test_an_answer_with_a_placeholder_or_a_tag_is_scored_as_the_text_it_is(tmp_path):
    said = ["a <image>", "<MASK>a</MASK>", "a"]
    source = write(tmp_path / "text.jsonl", [{"question": "?", "truth": "a <image>", "answers_gen": said}])
    score.main([str(source), str(tmp_path / "out.jsonl"), "--reward", "exact"])
    assert [(row["answers_gen"], row["iou_scores"]) for row in rows(tmp_path / "out.jsonl")] == [(said, [1, 0, 0])]


def test_a_critic_sees_neither_placeholders_nor_tags(tmp_path):
    asked = {"sampler": ["What?", "That."], "c1": {"q": "one <image>", "a1": "<MASK>a", "a2": "b</MASK>"},
             "c2": {"q": "two", "a1": "c", "a2": "<video>d"}}  # fmt: skip
    found = score.ranked(asked, "x:0", tmp_path, lambda sample: "2 1")
    assert (found["c_pref"], found["c_rej"]) == (
        {"q": "one", "a_w": "a", "a_l": "b"}, {"q": "two", "a_w": "c", "a_l": "d"},
    )  # fmt: skip


def test_errors_name_file_row_and_key(tmp_path, capsys):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    good = {"question": "?", "box": "[0, 0, 1, 1]", "answers_gen": ["a", "b"]}
    for row, key in (
        (good | {"box": None}, "box: missing"),
        (good | {"box": "none"}, "box: reward box_iou: "),
        (good | {"answers_gen": None}, "answers_gen: missing"),
    ):
        write(source, [good, row])
        assert f"{source}, row 1, key {key}" in fails([source, out, "--reward", "box_iou", "--truth", "box"], capsys)
        assert not out.exists()
    assert "--reward.0" in fails([source, out, "--reward", "boxes"], capsys)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("7 3", (7, 3)), ("\n[6.5, 8]\nbecause 1 2 3", (6.5, 8)), ("8/10 7/10", None), ("a 6 b 8", None), ("7", None),
     ("11 3", None), ("-1 3", None), ("none", None), ("", None)],
)  # fmt: skip
def test_two_ratings_or_nothing_are_read(reply, expected):
    assert score.ratings(reply) == expected


@pytest.fixture
def server():
    """A chat endpoint; `replies` are its next (status, text), `seen` what it was sent."""

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            status, text = self.server.replies.pop(0)
            answer = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    found = HTTPServer(("127.0.0.1", 0), Chat)
    found.replies, found.seen = [], []
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def asked(key, **more):
    return {
        "key": key, "media_path": ["videos/0000.mp4"], "sampler": ["<video>\nWhat moves?", "A plank."],
        "c1": {"q": "q one", "a1": "a", "a2": "b"}, "c2": {"q": "q two", "a1": "c", "a2": "d"},
    } | more  # fmt: skip


def test_an_endpoints_ratings_become_preferences_and_ties_decide_nothing(server, demo, tmp_path, capsys):
    source, out, key = tmp_path / "asked.jsonl", tmp_path / "ranked.jsonl", tmp_path / "key"
    same = {"q": "q two", "a1": "c", "a2": "c"}
    write(source, [asked("x:0"), asked("x:1"), asked("x:2"), asked("x:3"), asked("x:4", c2=same)])
    key.write_text("secret\n")
    arguments = [
        source, out, "--critic", f"http://127.0.0.1:{server.server_port}/v1/", "--model", "judge",
        "--api-key-file", key, "--media-root", demo, "--frames", "3",
    ]  # fmt: skip
    # row 0: the second question is better; row 1: a tie; row 2: unreadable; row 3: refused by the server
    said = ["3 9", "2 1", "4 6", "5 5", "8 2", "I cannot say"]
    server.replies = [(200, text) for text in said] + [(400, "too long")]
    assert "400" in fails(arguments, capsys) and len(rows(out)) == 1
    server.replies = [(200, "8 7"), (200, "1 2"), (200, "1 2.5"), (200, "9 1"), (200, "3 1")]
    score.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    assert "2 kept" in printed and "1 questions: tie" in printed and "equal or empty" in printed
    kept = rows(out)
    assert [row["key"] for row in kept] == ["x:0", "x:3"]
    assert kept[0]["c_pref"] == {"q": "q two", "a_w": "c", "a_l": "d"}
    assert kept[0]["c_rej"] == {"q": "q one", "a_w": "b", "a_l": "a"}
    assert kept[0]["score"] == [[9, 3], [2, 1], [6, 4]]
    assert [row["reason"].partition(":")[0] for row in rows(out.with_suffix(".dropped.jsonl"))] == [
        "questions", "answers to the better question", "answers to the worse question",
    ]  # fmt: skip
    samples = formats.samples(Source(name="spo", path=str(out)), demo)
    assert [r.text for r in samples[0].responses] == ["q two", "c", "d", "q one", "b", "a"]
    path, authorization, body = server.seen[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", "Bearer secret", "judge")
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url"] * 3 + ["text"]
    text = body["messages"][0]["content"][-1]["text"]
    assert "q one" in text and "q two" in text and "What moves?" in text and "<video>" not in text


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(server, demo):
    sample = Sample(
        key="x", question="<video>\nRate.", responses=(), media=(Media(kind="video", path=demo / "videos/0000.mp4"),)
    )
    ask = endpoint.critic(f"http://127.0.0.1:{server.server_port}", "m", None, Sampling(frames=1), pause=0.01)
    server.replies = [(503, "busy"), (429, "slower"), (200, "1 2")]
    assert ask(sample) == "1 2" and server.seen[0][1] is None
    server.replies = [(401, "who are you")]
    with pytest.raises(ValueError, match="chat/completions: 401 .*who are you"):
        ask(sample)
    server.replies = [(500, "broken")] * endpoint.TRIES
    with pytest.raises(ValueError, match="500"):
        ask(sample)
    assert not server.replies


def test_a_local_critic_rates_and_what_it_cannot_say_is_dropped(demo, tmp_path, capsys):
    """The untrained model says no numbers."""
    source, out = write(tmp_path / "asked.jsonl", [asked("x:0"), asked("x:1")]), tmp_path / "ranked.jsonl"
    arguments = [source, out, "--critic", demo / "model", "--family", "llava_video", "--dtype", "float32",
                 "--media-root", demo, "--frames", "2"]  # fmt: skip
    for _ in range(2):  # the second run has nothing left to ask
        score.main(list(map(str, arguments)))
        assert "2 questions: unreadable" in capsys.readouterr().out
    assert [row["key"] for row in rows(out.with_suffix(".dropped.jsonl"))] == ["x:0", "x:1"] and not out.exists()
    assert "asked.jsonl, row 0, key c2: missing" in fails(
        [write(source, [asked("x:5", c2=None)]), *arguments[1:]], capsys
    )
