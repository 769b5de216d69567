"""Every token has one role, whatever the question looks like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_trace.sweep.roles import ROLES, roles_of, token_roles

SPECIAL = {"[CLS]", "[SEP]", "[DEC]", "[PAD]"}
SHORT = {"1": "first", "q": "question word", "c": "content", "o": "other", "f": "function", "l": "last",
         "s": "special", "a": "answer"}  # fmt: skip


def words(text: str) -> list[str]:
    return text.split()


def roles(letters: str) -> tuple[str, ...]:
    return tuple(SHORT[letter] for letter in letters)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("what color is the shape ?", "1qcffcls"),
        ("what is the color of the cat ?", "1qqfcffcls"),
        ("how many dogs are there ?", "1qqcffls"),
        ("is there a dog ?", "1qffcls"),
        ("are the dogs the same size ?", "1qfcfccls"),
        ("in which room is he ?", "1fqcffls"),  # grammar in front of a question word
        ("there is a dog", "1fffls"),  # asks nothing
        ("where was this ?", "1qqfls"),
        ("red dog", "1cls"),
        ("what", "1ls"),
        ("?", "1ls"),
        ("what ' s the man ' s name ?", "1qfffcffcls"),
        ("vitamin d , s", "1ccfls"),  # without an apostrophe a letter is a word
        ("what gi ##raf ##fe is it ?", "1qcccffls"),
        ("a gi ##raf ##fe", "1fccls"),  # the last piece is the last token, the others keep their word's role
        ("the ##m dog ?", "1ffcls"),  # "them" is grammar, as a whole
        ("WHAT COLOR ?", "1qcls"),
        ("", "1s"),
    ],
)
def test_questions(text: str, letters: str) -> None:
    tokens = ["[CLS]", *text.split(), "[SEP]"]
    assert token_roles(tokens, SPECIAL) == roles(letters)


def test_a_known_subject_is_the_content_with_all_its_words() -> None:
    tokens = words("[CLS] what color is the man in the red hat ? [SEP]")
    assert token_roles(tokens, SPECIAL, range(5, 10)) == roles("1qoffcccccls")
    assert token_roles(tokens, SPECIAL) == roles("1qcffcffccls")
    # a subject never takes the start, the end or the last token
    assert token_roles(tokens, SPECIAL, range(0, 12)) == roles("1" + "c" * 9 + "ls")


def test_padding_is_special() -> None:
    tokens = words("[CLS] a dog [SEP] [PAD] [PAD]")
    assert token_roles(tokens, SPECIAL) == roles("1flsss")


def test_stacks() -> None:
    question = words("[CLS] what color ? [SEP]")
    assert roles_of("text_encoder", question, SPECIAL) == roles("1qcls")
    assert roles_of("text_encoder", question, SPECIAL, range(2, 3)) == roles("1qcls")
    assert roles_of("text_decoder", ["[DEC]"], SPECIAL) == roles("1")
    assert roles_of("text_decoder", ["[DEC]", "light", "blue", "[SEP]"], SPECIAL) == roles("1aas")
    # a captioning model has been given the start token and a prompt
    caption = words("[DEC] a picture of a dog")
    assert roles_of("text_decoder", caption, SPECIAL, text=4) == roles("1fclaa")
    assert roles_of("text_decoder", caption, SPECIAL, text=1) == roles("1aaaaa")
    assert roles_of("vision", ["class", "0,0", "0,1"], ()) == ("class", "patch", "patch")
    assert roles_of("vision", ["0,0"], ()) == ("patch",)  # where not all tokens are traced


@given(
    st.lists(st.sampled_from(words("what is how many the dog ##s ? [SEP] [CLS] ' s there in which"))),
    st.none() | st.builds(range, st.integers(0, 5), st.integers(0, 9)),
    st.none() | st.integers(0, 12),
    st.sampled_from(["text_encoder", "text_decoder"]),
)
def test_every_token_has_one_role(
    tokens: list[str], subject: range | None, text: int | None, stack: str
) -> None:
    found = roles_of(stack, tokens, SPECIAL, subject, text)
    assert len(found) == len(tokens)
    assert set(found) <= set(ROLES)
    assert found.count("last") <= 1
    assert all(role in ("special", "first") for token, role in zip(tokens, found, strict=True)
               if token in SPECIAL)  # fmt: skip
    started = bool(tokens) and text != 0
    assert [place for place, role in enumerate(found) if role == "first"] == [0] * started
