"""What part a token plays in its stack: averages over questions of any length are averages over roles."""

from __future__ import annotations

from collections.abc import Collection, Sequence

ROLES = (
    "first",
    "question word",
    "content",
    "other",
    "function",
    "last",
    "special",
    "answer",
    "class",
    "patch",
)
"""All roles, in the order in which averages show them.

Of text, each token has the first of these that fits:
- first: the stack's first token, its start token;
- special: another token that is no text, such as [SEP];
- last: the last token of the text, one piece if its word has several: usually a question mark;
- content, where the subject is known: a token of the phrase that names what the question is about;
- question word: a word of the phrase that opens a question: see `token_roles`;
- function: a word of grammar (the, of, in, …) or a punctuation mark;
- content, where the subject is unknown: any further word;
- other, where it is known: any further word.
Of the answer decoder's tokens behind the text, `answer`. Of the image encoder's, `class` and `patch`.
"""

_WH = "what which where how who whom whose when why"
_AUXILIARIES = (
    "is are was were am be been being do does did can could has have had will would should shall may might "
    "must"
)
_GRAMMAR = (
    "a about above after against all an and any around as at before behind below beneath beside between "
    "but by down during each either for from he her hers him his i if in inside into it its many me more "
    "most much my near no nor not of off on onto or our out outside over she so some such than that the "
    "their them then there these they this those through to too toward towards under until up us very we "
    "with within without you your"
)
_CLITICS = "s t d m ll re ve"

WH_WORDS = frozenset(_WH.split())
QUESTION_WORDS = frozenset([*WH_WORDS, *_AUXILIARIES.split(), "many", "much"])
FUNCTION_WORDS = QUESTION_WORDS.union(_GRAMMAR.split())
CLITICS = frozenset(_CLITICS.split())
"""What an apostrophe leaves of a word of grammar: [man] ['] [s], [don] ['] [t]."""


def roles_of(
    stack: str,
    tokens: Sequence[str],
    special: Collection[str],
    subject: range | None = None,
    text: int | None = None,
) -> tuple[str, ...]:
    """The role of every token of a stack, one of `ROLES` each.

    tokens: labels of all the stack's tokens, not only of those traced: of the vision stack "class" and
    anything else for groups of patches, else word pieces as a BERT tokenizer writes them. special: the
    tokenizer's special tokens. subject: the places in `tokens` of what the question is about. text: how many
    leading tokens, the start token among them, are text that was given; what follows was answered. None: all
    of them, but in the answer decoder the start token alone. A captioning model has its text there: the start
    token and the prompt.
    """
    if stack == "vision":
        return tuple("class" if token == "class" else "patch" for token in tokens)
    if text is None:
        text = 1 if stack == "text_decoder" else len(tokens)
    answer = ("special" if token in special else "answer" for token in tokens[text:])
    return (*token_roles(tokens[:text], special, subject), *answer)


def token_roles(
    tokens: Sequence[str], special: Collection[str], subject: range | None = None
) -> tuple[str, ...]:
    """The role of every token of a text with its start token in front: see `ROLES`.

    Words in several pieces (##s) have one role. The opening phrase is the run of question words with which
    the text begins ([what is] the color, [how many] people are, [is] there); words of grammar may stand in
    front of what, which, … (in [which] room).
    """
    spoken = [place for place in range(1, len(tokens)) if tokens[place] not in special]
    words = _words(tokens, spoken)
    texts = ["".join(tokens[place].removeprefix("##") for place in word).lower() for word in words]
    opening = _opening(texts)
    roles = ["first", *["special"] * (len(tokens) - 1)][: len(tokens)]
    for number, (word, text) in enumerate(zip(words, texts, strict=True)):
        if number in opening:
            role = "question word"
        elif _is_grammar(text, texts[number - 1] if number else ""):
            role = "function"
        else:
            role = "content" if subject is None else "other"
        for place in word:
            roles[place] = "content" if subject is not None and place in subject else role
    if spoken:
        roles[spoken[-1]] = "last"
    return tuple(roles)


def _words(tokens: Sequence[str], spoken: Sequence[int]) -> list[list[int]]:
    """The places of each word's pieces."""
    words: list[list[int]] = []
    for place in spoken:
        if words and tokens[place].startswith("##") and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def _opening(texts: Sequence[str]) -> range:
    """Which words open the question."""
    start = 0
    while start < len(texts) and texts[start] in FUNCTION_WORDS - QUESTION_WORDS:
        start += 1
    if start and (start == len(texts) or texts[start] not in WH_WORDS):
        return range(0)  # "there is a dog" asks nothing
    stop = start
    while stop < len(texts) and texts[stop] in QUESTION_WORDS:
        stop += 1
    return range(start, stop)


def _is_grammar(text: str, before: str) -> bool:
    if before == "'" and text in CLITICS:
        return True
    return text in FUNCTION_WORDS or not any(character.isalnum() for character in text)
