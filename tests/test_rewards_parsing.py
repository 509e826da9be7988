"""Corrected parsing and values of each reward, against numbers worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.rewards import REWARDS
from fastpo.rewards.text import edit_distance, final_answer

BOX, OTHER = [100, 200, 300, 400], [500, 600, 700, 900]
ONE = "<answer>[{'Position': [100, 200, 300, 400], 'Confidence': 1.0}]</answer>"


def thought(answer: str) -> str:
    return f"<think>look</think>\n<answer>{answer}</answer>"


def objects(*boxes: tuple[list, float]) -> str:
    return str([{"Position": box, "Confidence": confidence} for box, confidence in boxes])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Paris ", "Paris"),
        (thought(" Paris\n"), "Paris"),
        ("<think>x</think><answer>Paris", "Paris"),
        ("<think>is it <answer>Rome</answer>?</think><answer>Paris</answer>", "Paris"),
        ("it may be Rome</think>Paris", "Paris"),
        ("<think>it may be Rome", ""),
        ("<think>it may be Rome <answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer><answer>Rome</answer>", "Paris"),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_completion(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (thought(objects((BOX, 0.9))), (1.0, 0.9)),
        (thought(objects(([100, 200, 300, 300], 0.9))), (0.0, 1 - 0.9)),  # exactly half is no match
        (thought(objects(([100, 200, 300, 320], 0.9))), (0.6, 0.9)),
        (thought(objects((BOX, 0.9), (OTHER, 0.4))), (0.5, (0.9 + 0.6) / 2)),
        (thought(objects((BOX, 0.9), (BOX, 0.1))), (1.0, 0.9)),  # given twice, counts once
        (thought(objects(([100, 200, 300, 320], 0.9), (BOX, 0.5))), (0.3, (0.9 + 0.5) / 2)),  # most confident first
        (thought("\n" + objects((BOX, 0.9)).replace(", ", ",\n") + "\n"), (1.0, 0.9)),
        ("<think>x</think><answer>" + objects((BOX, 0.9), (OTHER, 0.8))[:-12], (0.5, 0.45)),
        ("<think>x</think><answer>" + objects((BOX, 0.9), (OTHER, 0.8))[:-40], (1.0, 0.9)),
        ("<think>x</think><answer>[{'Position': [100, 200, 3", (0.0, 0.0)),
        (objects((BOX, 0.9)), (1.0, 0.9)),  # no tags
        (thought(objects((BOX, 0.9))[1:-1]), (1.0, 0.9)),  # no list
        (thought(objects((BOX, 0.9)).replace("'", '"')), (1.0, 0.9)),
        (thought(objects((BOX, 0.9)).replace("'", "")), (1.0, 0.9)),
        (thought(objects((BOX, 0.9)).lower()), (1.0, 0.9)),
        (thought(objects((BOX, 0.9)).replace("}", ", 'Note': 'cat's'}")), (1.0, 0.9)),
        (thought("[{'Position': [100, 200, 300, 400], 'Confidence': '0.9'}]"), (1.0, 0.9)),
        (thought("[{'Confidence': 0.9, 'Position': [100, 200, 300, 400]}]"), (1.0, 0.9)),
        (thought("[{'Position': [100, 200, 300, 400]}]"), (1.0, 0.0)),
        (thought(objects(([300, 400, 100, 200], 0.9))), (1.0, 0.9)),  # opposite corners
        (thought(objects((BOX, 7.5))), (1.0, 1.0)),
        (thought(objects((OTHER, -0.5))), (0.0, 1.0)),
        (thought(objects(([100, 200, 300, 400, 7], 0.9))), (0.0, 0.0)),
        (thought(objects(([1e9, 0, 1, 1], 0.0), (BOX, 0.9))), (0.5, 0.45)),
        (thought("No Objects"), (0.0, 0.0)),
        (thought("[]"), (0.0, 0.0)),
        (thought("The cat is at the left."), (0.0, 0.0)),
        (thought(""), (0.0, 0.0)),
        ("", (0.0, 0.0)),
    ],
)
def test_detection_parses_what_models_write(answer, expected):
    for truth in (ONE, [BOX], [{"Position": BOX}]):
        found = (REWARDS["detection_iou"](answer, truth), REWARDS["detection_confidence"](answer, truth))
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (thought("No Objects"), (1.0, 1.0)),
        (thought("no objects."), (1.0, 1.0)),
        (thought("[ ]"), (1.0, 1.0)),
        (thought(objects((BOX, 0.3))), (0.0, 0.7)),
        (thought(""), (0.0, 0.0)),
        (thought("No Objects? There is " + objects((BOX, 0.3))), (0.0, 0.7)),
        (thought("There may be none"), (0.0, 0.0)),
    ],
)
def test_detection_where_there_is_nothing_to_find(answer, expected):
    for truth in ("<answer>No Objects</answer>", "[]", []):
        found = (REWARDS["detection_iou"](answer, truth), REWARDS["detection_confidence"](answer, truth))
        assert found == pytest.approx(expected, abs=1e-12)


def test_detection_options():
    answer = thought(objects(([100, 200, 300, 320], 0.9)))
    assert REWARDS["detection_iou"](answer, [BOX], threshold=0.7) == 0.0
    assert REWARDS["detection_iou"](thought("No Objects"), thought("No Objects"), variant="released_2025_02") == 1.0
    assert REWARDS["detection_iou"](thought("No Objects"), thought("No Objects"), variant="released") == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (thought("(100, 200),\n(500, 600)"), 2.0),
        (thought("(300,200),(500,600)"), 1.5),  # half the box inside it: IoU 1/2, hull = truth
        (thought("(500,600),(900,1000)"), 1.0 - 0.5),  # touches a corner: union is half of the hull
        (thought("[100.0, 200, 500, 600.0]"), 2.0),
        (thought("[[100, 200], [500, 600]]"), 2.0),
        (thought("(500,600),(100,200)"), 2.0),
        (thought("(100,200),(500,600) or (0,0),(1,1)"), 2.0),
        ("<think>(0,0),(1,1)</think><answer>(100,200),(500,600)", 2.0),
        (thought("(-300,200),(500,600)"), 1.5),
        (thought("(100,200)"), 0.0),
        (thought("left of the dog"), 0.0),
        (thought("(100,200),(100,200)"), 1.0),  # no area: IoU 0, hull = truth
    ],
)
def test_grounding(answer, expected):
    for truth in ("<answer> (100,200),(500,600) </answer>", [100, 200, 500, 600]):
        assert REWARDS["grounding"](answer, truth) == pytest.approx(expected, abs=1e-12)
        assert REWARDS["box_iou"](answer, truth) <= max(expected - 0.5, 0)


def test_box_iou_of_perpos_sample_row():
    value = REWARDS["box_iou"]("[0.61, 0.17, 0.77, 0.53]", "[0.61, 0.1, 0.77, 0.54]")
    assert value == pytest.approx(0.36 / 0.44, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (thought("boeing_737 - 300"), 1.0),
        (thought("\nBoeing 737/300.\n"), 1.0),
        (thought("Boeing 737-200"), 0.0),
        (thought("Boeing 737"), 0.0),
        (thought("Boeing 737-300, Boeing 737-200"), 0.0),
        (thought(""), 0.0),
        (thought("---"), 0.0),
        ("", 0.0),
        ("<think>Boeing 737-300", 0.0),
        (thought("B733"), 1.0),
    ],
)
def test_classification(answer, expected):
    assert REWARDS["classification"](answer, ["Boeing 737-300", "B733"]) == expected


@pytest.mark.parametrize(
    ("name", "answer", "truth", "expected"),
    [
        ("exact", thought("The Eiffel tower."), "Eiffel Tower", 1.0),
        ("exact", "an Eiffel", ["Paris", "Eiffel"], 1.0),
        ("exact", thought(""), "Paris", 0.0),
        ("exact", "A", "the", 0.0),  # nothing but articles: compared as they are
        ("token_f1", thought("about\n12 km"), "12 km", 0.8),
        ("token_f1", "yes yes yes", "yes", 0.5),
        ("token_f1", "no no", "no no way", 0.8),  # 2 shared of 2 and 3
        ("token_f1", "red car", ["a blue car", "the red car"], 1.0),
        ("token_f1", "", "Paris", 0.0),
        ("numeric", thought("3 + 4 = 7"), 7, 1.0),
        ("numeric", "1,234.50 km", "1234.5", 1.0),
        ("numeric", "it is 3/4", 0.75, 1.0),
        ("numeric", "-.5", "-0.5", 1.0),
        ("numeric", "1/0", 1, 0.0),
        ("numeric", "7 or 8", 7, 0.0),
        ("numeric", "seven", 7, 0.0),
        ("numeric", "9" * 400, 7, 0.0),
        ("multiple_choice", "B", "B", 1.0),
        ("multiple_choice", thought("(b)"), "B. a red car", 1.0),
        ("multiple_choice", "B. a red car", "B", 1.0),
        ("multiple_choice", "The answer is B, since A is blue", "B", 1.0),
        ("multiple_choice", "It must be (B) here", "B", 1.0),
        ("multiple_choice", "\\boxed{B}", "B", 1.0),
        ("multiple_choice", "(A) or (B)", "B", 0.0),
        ("multiple_choice", "A red car", "A", 0.0),
        ("multiple_choice", "", "A", 0.0),
        ("ocr", "kitten", "sitting", 1 - 3 / 7),
        ("ocr", " two\n lines ", "two lines", 1.0),
        ("ocr", "ABC", "abd", 0.0),
        ("ocr", "", "abc", 0.0),
        ("symbolic", thought("$\\frac{1}{2}$"), "0.5", 1.0),
        ("symbolic", thought("$x+1$"), "$1+x$", 1.0),
        ("symbolic", thought("3"), "0.5", 0.0),
        ("symbolic", "", "0.5", 0.0),
    ],
)
def test_text_rewards(name, answer, truth, expected):
    assert REWARDS[name](answer, truth) == pytest.approx(expected, abs=1e-12)


def test_options_of_text_rewards():
    assert REWARDS["ocr"]("ABC", "abd", ignore_case=True) == pytest.approx(2 / 3)
    assert REWARDS["numeric"]("7.1", 7, abs_tol=0.2) == REWARDS["numeric"]("102", 100, rel_tol=0.03) == 1.0


@settings(max_examples=40)
@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_the_recursive_definition(a, b):
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i or j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a[:5], b[:5]) == distance(min(len(a), 5), min(len(b), 5))
    assert edit_distance(a, b) == edit_distance(b, a) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("answer", "kind", "truth", "expected"),
    [
        (thought("x"), "answer", "", 1.0),
        (" " + thought("x") + "\n", "answer", "", 1.0),
        ("<think>a</think><answer></answer>", "answer", "", 0.0),
        ("<think> </think><answer>x</answer>", "answer", "", 0.0),
        (thought("x") + "<answer>y</answer>", "answer", "", 0.0),
        ("<think>a<think>b</think><answer>c</answer>", "answer", "", 0.0),
        ("<think>a</think>b<answer>c</answer>", "answer", "", 0.0),
        ("<think>a</think><search>q</search>", "answer", "", 0.0),
        ("<think>a</think><search>q</search>", "search", "", 1.0),
        ("<think>a</think><code>\n```python\nx = 1\n```\n</code>", "code", "<code>y</code>", 1.0),
        ("<think>a</think><code>x = 1</code>", "code", "<code>y</code>", 0.0),
        ("<think>a</think><problem> {'dark', 'blur'} </problem>", "code", "<problem> {'dark'} </problem>", 1.0),
        ("<think>a</think><problem> dark </problem>", "code", "<problem> {'dark'} </problem>", 0.0),
        (thought("x"), "code", "<problem> {'dark'} </problem>", 0.0),
        ("", "answer", "", 0.0),
    ],
)
def test_format(answer, kind, truth, expected):
    assert REWARDS["format"](answer, truth, kind=kind) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("<think>t</think><problem>{'dark', 'blur'}</problem>", "<problem> {'blur', 'dark'} </problem>", 1.0),
        ("<problem>{'rotation180'}</problem>", "<problem> {'rotation180', 'dark'} </problem>", 0.5),
        ("<problem>{'rotation180'}</problem>", "<problem> {'rotation180', 'rotation90'} </problem>", 0.0),
        ("plain", "<code>x</code>", 0.0),
        ("<code>y</code>", "<code>x</code>", 0.9),
        ("<answer>\nred car\n</answer>", "<answer>the red car</answer>", 1.0),
        ("<answer>red car</answer>", "<code>x</code>", 0.0),
    ],
)
def test_agent_code(answer, truth, expected):
    assert REWARDS["agent_code"](answer, truth) == expected
