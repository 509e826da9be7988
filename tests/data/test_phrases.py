import functools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastpo.data.phrases import differences, phrase_mask, response_ids, strip_tags, tagger
from fastpo.sample import BadSample

END = "<|im_end|>\n"
GOLDEN = Path(__file__).parents[1] / "golden" / "rrpo"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "a man is playing soccer on a sandy field.",
    "the red ball moves left, then the blue square moves right! 日本語",
]
CORPUS = [*CORPUS, *(line.replace(" ", "\n") for line in CORPUS)] * 4  # real vocabularies have "field" beside " field"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen2's: NFC, its split into words, leading spaces inside words."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")


@functools.cache
def tags():
    return tagger(tokenizer())


def mask(text: str, tagged: str) -> list[int]:
    return phrase_mask(tags(), text, tagged, END)


def authors(text: str, tagged: str) -> list[int] | None:
    """A plain restatement of the authors' rule (train_llavavideo.py:989-1105); None where it drops the response."""

    @functools.cache
    def ids(s):
        return tags().tagged(s, add_special_tokens=False).input_ids

    opening, closing = [ids(" <MASK>"), ids("<MASK> ")], [ids(" </MASK>"), ids("</MASK> ")]
    assert all(len(pair) == 2 for pair in opening + closing)
    source, kept, signs, k, count, within = ids(tagged + END), [], [], 0, 0, False
    while k < len(source) - 1:
        pair = source[k : k + 2]
        if pair in opening or source[k : k + 1] == ids("<MASK>"):
            count, within, k = count + 1, True, k + (2 if pair in opening else 1)
        elif pair in closing or source[k : k + 1] == ids("</MASK>"):
            within, k = False, k + (2 if pair in closing else 1)
        else:
            kept.append(source[k])
            signs.append(count if within else 0)
            k += 1
    kept += source[k : k + 1]
    signs.append(count if within else 0)
    wanted = tokenizer()(text + END, add_special_tokens=False).input_ids
    if len(kept) != len(wanted):
        return None
    run: set[int] = set()
    for a, b, sign in zip(kept, wanted, signs, strict=True):
        run = run | {sign} if a != b else set()
        if len(run) > 1:
            return None
    return signs


def characters(text: str, tagged: str) -> list[set[int]]:
    """The phrases that the visible characters of each token belong to, by walking both texts side by side."""
    owner, number, inside, rest = [], 0, False, tagged
    for c in text + END:
        if c.isspace():
            owner.append(None)
            continue
        while rest and (rest[0].isspace() or rest.startswith(("<MASK>", "</MASK>"))):
            if rest.startswith("<MASK>"):
                number, inside, rest = number + 1, True, rest[6:]
            elif rest.startswith("</MASK>"):
                inside, rest = False, rest[7:]
            else:
                rest = rest[1:]
        owner.append(number if inside and rest else 0)
        rest = rest[1:]
    spans = tokenizer()(text + END, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return [{n for n in owner[a:b] if n is not None} for a, b in spans]


WORDS = (
    "soccer man playing sandy ball xyz (red) left, U.S. it's 42 é 😀 日本|語 mo|ves soc|cer squ|are pl|ay|ing".split()
)


@st.composite
def responses(draw):
    """(text, tagged): tags stand between words, with a space or none there, and inside words at "|"."""
    words = []
    for gap, word in draw(
        st.lists(st.tuples(st.sampled_from(["", " "]), st.sampled_from(WORDS)), min_size=2, max_size=6)
    ):
        words += zip([gap, "", ""], word.split("|"), strict=False)
    border = sorted(draw(st.sets(st.integers(0, len(words)), min_size=2, max_size=6)))
    border = border[: len(border) // 2 * 2]
    text = tagged = ""
    for n, (gap, word) in enumerate([*words, ("", "")]):
        gap = gap if n else ""
        tag = ("<MASK>", "</MASK>")[border.index(n) % 2] if n in border else ""
        if tag:
            left, right = draw(st.sampled_from([(gap, ""), ("", gap), (gap, gap), (" ", ""), (" ", " ")]))
            gap_tagged = f"{left}{tag}{right}"
        else:
            gap_tagged = gap
        text, tagged = text + gap + word, tagged + gap_tagged + word
    return text, tagged


def test_masks_are_the_authors_and_where_theirs_drop_the_characters():
    seen = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(responses())
    def check(pair):
        theirs, owners = authors(*pair), characters(*pair)
        if theirs is not None:
            seen["theirs"] += 1
            assert mask(*pair) == theirs
        elif max(map(len, owners)) > 1:
            seen["cut"] += 1
            with pytest.raises(BadSample, match="inside the token"):
                mask(*pair)
        else:
            seen["characters"] += 1
            for sign, owner in zip(mask(*pair), owners, strict=True):
                assert {sign} == owner or not owner

    check()
    assert min(seen[way] for way in ("theirs", "cut", "characters")) >= 5, seen


@pytest.mark.parametrize(
    ("text", "tagged", "inside", "kept_by_authors"),
    [
        (
            "soccer on a sandy field.",
            "<MASK> soccer </MASK> on a sandy <MASK> field </MASK>.",
            ["soccer", "field"],
            True,
        ),
        ("a red ball", "a <MASK>red ball</MASK>", ["red ball"], True),
        ("a red ball moves", "a <MASK>red</MASK> <MASK>ball</MASK> moves", ["red", "ball"], False),
        ("(red) ball", "(<MASK>red</MASK>) ball", ["red"], True),
        ("日本語 left", "<MASK>日本語</MASK> left", ["日本語"], True),
        ("x 😀 y", "x <MASK>😀</MASK> y", ["😀"], False),
    ],
)
def test_known_sentences(text, tagged, inside, kept_by_authors):
    signs, ids = mask(text, tagged), response_ids(tokenizer(), text, END)
    for number, words in enumerate(inside, start=1):
        chosen = [token for token, sign in zip(ids, signs, strict=True) if sign == number]
        assert tokenizer().decode(chosen).strip() == words
    assert set(signs) == set(range(len(inside) + 1)) and signs[-2:] == [0, 0]  # the end of the turn belongs to none
    assert authors(text, tagged) == (signs if kept_by_authors else None)


def test_a_phrase_that_cuts_a_token_is_refused():
    assert len(response_ids(tokenizer(), "moves", "")) == 1 and authors("moves", "mo<MASK>ves</MASK>") is None
    with pytest.raises(BadSample, match="inside the token 'moves', at character 0"):
        mask("moves", "mo<MASK>ves</MASK>")


def test_a_lone_space_belongs_to_the_phrase_around_it():
    assert mask("a 42 b", "a<MASK> 42</MASK> b") == [0, 0, 1, 1, 0, 0, 0, 0]  # a _ 4 2 _ b
    assert mask("a 😀 4 b", "a <MASK>😀 4</MASK> b") == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # a _ 4 bytes _ 4 _ b


def test_blank_phrases_count_as_the_authors_do():
    text, tagged = "a red ball", "a <MASK> </MASK><MASK>red ball</MASK>"
    assert mask(text, tagged) == authors(text, tagged) == [0, 2, 2, 0, 0]


def test_responses_without_phrases_and_other_texts():
    assert set(mask("a man", "a man")) == {0}
    assert set(mask("a man", "a <MASK> </MASK>man")) == {0}
    with pytest.raises(BadSample, match="not the text with tags"):
        mask("a man", "a <MASK>ball</MASK>")


def test_tokenizer_is_left_alone_and_both_sides_see_the_same_ids():
    size, before = len(tokenizer()), tokenizer()("a <MASK>b</MASK>").input_ids
    made = tagger(tokenizer())
    assert made.plain is tokenizer() and len(tokenizer()) == size and len(made.tagged) == size + 2
    assert tokenizer()("a <MASK>b</MASK>").input_ids == before
    ids = response_ids(tokenizer(), "a man", END)
    assert ids == tokenizer()("a man").input_ids + tokenizer().convert_tokens_to_ids(["<|im_end|>", "Ċ"])


def test_strip_tags():
    assert strip_tags("a <MASK> b </MASK>c") == ("a  b c", [(2, 5)])
    assert strip_tags("<MASK>a</MASK><MASK>b</MASK>") == ("ab", [(0, 1), (1, 2)])
    assert strip_tags("<MASK></MASK>a<MASK> </MASK>") == ("a ", [])
    for text, reason in [
        ("a <MASK>b", "never closed, at character 2"),
        ("a</MASK> b", "without <MASK>, at character 1"),
        ("<MASK>a<MASK>b</MASK>", "inside a phrase, at character 1"),
        ("</MASK>a<MASK>", "without <MASK>"),
    ]:
        with pytest.raises(BadSample, match=reason):
            strip_tags(text)


def test_differences_are_the_authors_of_videochat2():
    """Their signs of two recorded pairs: two replacements, and an insertion alone (tests/golden/rrpo)."""
    case = "videochat2_difflib"
    with safe_open(GOLDEN / "rrpo.safetensors", "pt") as file:
        targets, signs = (file.get_tensor(f"{case}/{name}") for name in ("targets", "signs"))
    for better, worse in ((0, 2), (1, 3)):
        kept = [(targets[i] != -100) for i in (better, worse)]
        ours = differences(*(targets[i][k].tolist() for i, k in zip((better, worse), kept, strict=True)))
        assert list(ours) == [signs[i][k].tolist() for i, k in zip((better, worse), kept, strict=True)]
    assert signs[0].max() == 2 and signs[1].max() == 0


def test_differences_of_long_responses_do_not_take_frequent_tokens_for_junk():
    better, worse = [1, 2] * 150 + [7, 1, 2], [1, 2] * 150 + [8, 9, 1, 2]
    assert differences(better, worse) == ([0] * 300 + [1, 0, 0], [0] * 300 + [1, 1, 0, 0])
