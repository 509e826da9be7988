"""Chat templates of the kinds that model folders have."""

import json
from dataclasses import replace

import pytest

from fastpo.models import chat
from fastpo.sample import BadSample, Response, Sample, Turn
from tests import tiny_families

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
HEADED = "<s>" + PLAIN


def made(folder, template, *, starts):
    tiny_families.tokenizer(starts=starts, template=template).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "starts", "text", "end"),
    [
        (PLAIN, False, "[user] Why?</s>\n>", "</s>\n"),
        (PLAIN, True, "<s>[user] Why?</s>\n>", "</s>\n"),
        (HEADED, True, "<s>[user] Why?</s>\n>", "</s>\n"),  # one start, whoever puts it there
        (tiny_families.CHATML, False, "<|im_start|>user Why?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
        (tiny_families.VICUNA, True, "<s>USER: Why? ASSISTANT:", "</s>"),  # this template ends an answer with a space
    ],
)
def test_prompt_and_end_of_an_answer(tmp_path, template, starts, text, end):
    found = chat.read(made(tmp_path, template, starts=starts))
    assert found.tokenizer.decode(chat.prompt_ids(found, "Why?")) == text
    assert found.end == end


def test_a_tokenizer_file_that_was_cut_is_named(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made(tmp_path, PLAIN, starts=False)
        file = tmp_path / name
        file.write_text(file.read_text()[:-20])
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as JSON"):
            chat.read(tmp_path)


def test_a_processors_template_of_older_folders_comes_before_the_tokenizers(tmp_path):
    made(tmp_path, PLAIN, starts=False)
    inside = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": inside}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat.read(tmp_path).end == "</s>\n"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": tiny_families.CHATML}))
    assert chat.read(tmp_path).end == "<|im_end|>\n"


def test_a_template_without_the_question_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leaves out the question"):
        chat.read(made(tmp_path, "{{ messages[-1]['content'] }}", starts=False))


def conversation(tmp_path, template, starts, sample):
    found = chat.read(made(tmp_path, template, starts=starts))
    prompt, rest = chat.prompt_ids(found, sample.question, sample), chat.responses(found, sample)
    decode = found.tokenizer.decode
    kept = [decode(ids if rest.trained is None else ids[rest.trained[n]]) for n, ids in enumerate(rest.responses)]
    return decode(prompt), [decode(ids) for ids in rest.responses], kept, rest.parents


def test_every_turn_of_the_assistant_is_trained_and_the_text_is_the_templates(tmp_path):
    turns = (Turn(role="user", text="And?"), Turn(role="assistant", text="So.", trained=True))
    sample = Sample(key="a:0", question="Why?", media=(), responses=(Response(text="Hm.", score=1, turns=turns),))
    prompt, (whole,), (kept,), parents = conversation(tmp_path, tiny_families.CHATML, False, sample)
    start, end = "<|im_start|>", "<|im_end|>\n"
    assert prompt == f"{start}user Why?{end}{start}assistant\n"
    assert whole == f"Hm.{end}{start}user And?{end}{start}assistant So.{end}"
    assert kept == f"Hm.{end}So.{end}" and parents is None


def test_questions_of_the_model_hang_on_the_context_and_answers_on_them(tmp_path):
    responses = (
        Response(text="More?", score=1, role="user"),
        Response(text="Yes.", score=1, parent=0),
        Response(text="No.", score=0, parent=0),
    )
    sample = Sample(
        key="a:0", question="Why?", media=(), responses=responses, turns=(Turn(role="assistant", text="Hm."),)
    )
    prompt, whole, kept, parents = conversation(tmp_path, tiny_families.CHATML, False, sample)
    start, end = "<|im_start|>", "<|im_end|>\n"
    assert prompt == f"{start}user Why?{end}{start}assistant\nHm.{end}"
    assert whole == [f"{start}user More?{end}{start}assistant ", f"Yes.{end}", f"No.{end}"]
    assert kept == [f"More?{end}", f"Yes.{end}", f"No.{end}"] and parents == (-1, 0, 0)


def test_a_template_with_an_invisible_end_trains_the_end_of_text_after_each_answer(tmp_path):
    turns = (Turn(role="user", text="And?"), Turn(role="assistant", text="So.", trained=True))
    sample = Sample(key="a:0", question="Why?", media=(), responses=(Response(text="Hm.", score=1, turns=turns),))
    prompt, (whole,), (kept,), _ = conversation(tmp_path, tiny_families.VICUNA, True, sample)
    assert prompt == "<s>USER: Why? ASSISTANT:" and kept == "Hm.</s>So.</s>"
    assert whole.replace(" ", "") == "Hm.</s>USER:And?ASSISTANT:So.</s>"


def test_two_turns_of_one_speaker_are_refused(tmp_path):
    found = chat.read(made(tmp_path, tiny_families.CHATML, starts=False))
    sample = Sample(key="a:0", question="Why?", media=(), responses=(Response(text="More?", score=1, role="user"),))
    with pytest.raises(BadSample, match="a:0: response 0 is a user turn"):
        chat.responses(found, sample)


def test_the_role_that_asks_can_be_named_and_is_the_models_alone(tmp_path):
    found = chat.read(made(tmp_path, tiny_families.CHATML, starts=False), "vuser")
    turns = (
        Turn(role="user", text="Own?", trained=True),
        Turn(role="assistant", text="So.", trained=True),
        Turn(role="user", text="Theirs?"),
        Turn(role="assistant", text="Yes.", trained=True),
    )
    context = (Turn(role="assistant", text="Hm."), Turn(role="user", text="And?"))
    responses = (Response(text="A.", score=1, turns=turns),)
    sample = Sample(key="a:0", question="Why?", media=(), responses=responses, turns=context)
    decode = found.tokenizer.decode
    assert "vuser" not in decode(chat.prompt_ids(found, "Why?", sample))
    (whole,) = chat.responses(found, sample).responses
    assert "vuser Own?" in decode(whole) and "<|im_start|>user Theirs?" in decode(whole)


def test_phrases_of_responses_that_differ_and_their_end_in_none(tmp_path):
    found = chat.read(made(tmp_path, tiny_families.CHATML, starts=False))
    texts = ("It is 12.", "It is 345.")
    pair = tuple(Response(text=text, score=1.0 - n) for n, text in enumerate(texts))
    sample = Sample(key="a:0", question="Why?", media=(), responses=pair, phrases="different")
    weights = chat.phrase_weights(found, sample)
    rows = chat.responses(found, sample).responses
    assert weights is not None and [len(w) for w in weights] == [len(r) for r in rows]
    said = [found.tokenizer.decode(r[w == 0]) for r, w in zip(rows, weights, strict=True)]
    assert said == ["It is .<|im_end|>\n"] * 2
    with pytest.raises(BadSample, match="a:0: two responses differ in phrases, there are 1"):
        chat.phrase_weights(found, replace(sample, responses=pair[:1]))
