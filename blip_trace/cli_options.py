"""The options of `blip-trace run` and `sweep`, by the panels of their help, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = r"""Examples

```text
# the model that ships with the package, on your picture
blip-trace run --image scene.png --question "what color is the circle" \
    --out traces

# a BLIP from the hub, several kinds of state, windows of three layers
blip-trace run --model Salesforce/blip-vqa-base --image cat.jpg \
    --question "what animal is this" --kinds hidden,mlp,cross_attn \
    --window 3 --dtype bfloat16 --out traces

# where in the picture: blocks of 2 x 2 patches, noise on the pixels
blip-trace run --image scene.png --question "what color is the circle" \
    --corrupt pixels --stacks vision --patch-group 2 --out traces

# red and not blue: two pictures, and the difference of the logits
blip-trace run --image red.png --question "what color is the circle" \
    --corrupt swap-image --swap blue.png \
    --metrics logit_difference,probability --foil blue --out traces

# noise on two words; what is restored cannot act through the MLPs
blip-trace run --image scene.png --question "what color is the circle" \
    --corrupt words --span "the circle" --std 6 --sever mlp \
    --interval 0.95 --out traces

# many cells: estimate all, do the hundred largest exactly
blip-trace run --model Salesforce/blip-vqa-base --image cat.jpg \
    --question "what animal is this" --corrupt patches \
    --stacks vision --method screen --top 100 --out traces

# does this text fit the picture; how does its caption go on
blip-trace run --model match --image scene.png \
    --question "a red circle" --out traces
blip-trace run --model caption --image scene.png --question "a" \
    --out traces
```
"""

SWEEP_EXAMPLES = r"""Examples

```text
# three thousand questions about six hundred scenes, on the model that ships
blip-trace sweep --data scenes:600 --samples 1 --out runs/scenes
blip-trace report runs/scenes

# what is planned, how long it will take and how large it will be
blip-trace sweep --model Salesforce/blip-vqa-base --data vqa-v2 \
    --images val2014 --split val --out runs/vqa --dry-run

# what the model answers rightly, two processes; interrupted, it goes on
blip-trace sweep --model Salesforce/blip-vqa-base --data color_coco_qa.csv \
    --images train2017 --only-correct --executor processes --workers 2 \
    --out runs/colors
blip-trace sweep --out runs/colors
```
"""

CORRUPTION, RESTORE, MEASURE = "Corruption", "What to restore", "What to measure"
METHOD, ENGINE = "Method", "Engine"
DATA, RUN = "Data", "Run"

CORRUPTION_OPTIONS = ("samples", "mean", "std", "mode", "seed", "span", "distribution", "absolute", "swap",
                      "swap-question", "ablation", "reference", "box", "blur")  # fmt: skip
METHOD_OPTIONS = ("top", "steps", "check")


def names(given: Sequence[str] | None) -> list[str]:
    """The names in options that may be repeated and may hold several, with commas between them."""
    return [name.strip() for part in given or [] for name in part.split(",")]


def tokens_by_stack(given: Sequence[str], stacks: Sequence[str]) -> dict[str, list[int]]:
    """Tokens by stack, of NUMBER for the first text stack among `stacks` and STACK:NUMBER for any."""
    first = next((stack for stack in stacks if stack != "vision"), "vision")
    tokens: dict[str, list[int]] = {}
    for text in given:
        stack, colon, number = text.rpartition(":")
        try:
            tokens.setdefault(stack if colon else first, []).append(int(number))
        except ValueError:
            raise ValueError(f"--tokens takes NUMBER or STACK:NUMBER, not {text!r}") from None
    return tokens


def typed(given: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Of a command's parameters those options that were typed, as plain values."""
    values = {name: given.get(name.replace("-", "_")) for name in wanted}
    return {name: _plain(value) for name, value in values.items() if value not in (None, [], ())}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _option(help: str, panel: str | None = None, shown: str | bool = True, **more: Any) -> Any:
    """An option; shown: its default, where the signature does not tell it."""
    return typer.Option(help=help, rich_help_panel=panel, show_default=shown, **more)


Image = Annotated[Path, _option("Image file: JPEG, PNG, WEBP, BMP or GIF.")]
Question = Annotated[
    str,
    _option(
        'What to ask about it. Of a captioning model: what the caption begins with, "" for nothing. '
        "Of a matching model: the text to match."
    ),
]
Out = Annotated[Path, _option("Folder for heatmaps and numbers; made if need be.")]
Model = Annotated[
    str,
    _option(
        "A BLIP that answers questions, writes captions or matches texts: its folder or its name on the hub, "
        "or one of those that ship: vqa, caption, match."
    ),
]
Answer = Annotated[
    str | None,
    _option(
        "Answer to score, all its tokens jointly; of a matching model: match or no match.",
        shown="first token of the model's own, or match",
    ),
]

Corrupt = Annotated[
    list[str] | None,
    _option(
        """What is corrupted; by commas or repeated, where image and question are.

- embeddings, pixels, patches: noise on the encoded image, the pixels, or the embedded patches
- words: noise on the embeddings of the question's words
- swap-image, swap-question: another one in its place
- ablate: the encoded image replaced by zeros, or by that of other images
- hide: a part of the picture
""",
        CORRUPTION,
        "embeddings",
        metavar="NAMES",
    ),
]
Samples = Annotated[
    int | None,
    _option(
        "Noise: how many draws, of which a map is the mean; 1 beside what is no noise.",
        CORRUPTION,
        "10",
        metavar="NUMBER",
    ),
]
Mean = Annotated[
    float | None,
    _option("Noise on the image: its mean.", CORRUPTION, "embeddings 1, pixels and patches 0"),
]
Std = Annotated[
    float | None,
    _option(
        "Noise: its standard deviation; of words, in multiples of that of the model's word embeddings.",
        CORRUPTION,
        "embeddings 5, pixels and patches 1, words 3",
    ),
]
Mode = Annotated[
    str | None,
    _option(
        "Noise on the image: multiply by it, or add it.",
        CORRUPTION,
        "embeddings multiply, pixels and patches add",
    ),
]
Seed = Annotated[int | None, _option("Noise: its seed.", CORRUPTION, "0")]
Span = Annotated[
    str | None,
    _option(
        'words: which, as a phrase ("the circle") or as tokens from 0 (2:4 is 2 and 3).', CORRUPTION, "all"
    ),
]
Distribution = Annotated[
    str | None, _option("words: gaussian, or uniform, between minus and plus --std.", CORRUPTION, "gaussian")
]
Absolute = Annotated[
    bool | None,
    typer.Option("--absolute", help="words: --std as it stands, no multiple.", rich_help_panel=CORRUPTION),
]
Swap = Annotated[Path | None, _option("swap-image: the other image.", CORRUPTION, metavar="FILE")]
SwapQuestion = Annotated[
    str | None, _option("swap-question: the other question, of as many tokens.", CORRUPTION)
]
Ablation = Annotated[
    str | None,
    _option("ablate: zero, mean (over --reference), or resample (one sample for each).", CORRUPTION, "zero"),
]
Reference = Annotated[
    list[Path] | None, _option("ablate: another image; repeated.", CORRUPTION, metavar="FILE")
]
Box = Annotated[
    str | None,
    _option("hide: where, in shares of the picture from its upper left.", CORRUPTION, metavar="L,T,R,B"),
]
Blur = Annotated[
    float | None,
    _option("hide: blur by so many pixels instead.", CORRUPTION, "fill with the mean colour"),
]

Stacks = Annotated[
    list[str] | None,
    _option(
        "Stacks to map, by commas or repeated: vision (for a corruption before it: not embeddings, ablate by "
        "zero or mean), text_encoder, text_decoder.",
        RESTORE,
        "the model's text stacks",
        metavar="NAMES",
    ),
]
Kinds = Annotated[
    list[str] | None,
    _option(
        "Kinds of state, likewise: hidden, hidden_after_self_attn, hidden_after_cross_attn, self_attn, "
        "cross_attn, mlp, self_attn_head, cross_attn_head.",
        RESTORE,
        "hidden",
        metavar="NAMES",
    ),
]
Tokens = Annotated[
    list[str] | None,
    _option(
        "Tokens to map, likewise, from 0 or from -1 backwards: of the first text stack, or STACK:NUMBER.",
        RESTORE,
        "all",
        metavar="NUMBERS",
    ),
]
PatchGroup = Annotated[
    int | None,
    _option("vision: a cell is a block of so many patches by as many.", RESTORE, "1", metavar="NUMBER"),
]
Window = Annotated[int, _option("Consecutive layers that one cell restores.", RESTORE, metavar="NUMBER")]
Direction = Annotated[
    str,
    _option(
        "denoise: clean states into the corrupted run; noise: corrupted ones into the clean run.", RESTORE
    ),
]
Sever = Annotated[
    list[str] | None,
    _option(
        "Sublayers through which restored states cannot act, likewise: self_attn, cross_attn, mlp.",
        RESTORE,
        metavar="NAMES",
    ),
]

Metrics = Annotated[
    list[str] | None,
    _option(
        "By commas or repeated: probability, log_probability, logit, logit_difference, kl_divergence, rank. "
        "The first is printed, the others have plots of their own.",
        MEASURE,
        "probability",
        metavar="NAMES",
    ),
]
Foil = Annotated[str | None, _option("logit_difference: the answer to compare with.", MEASURE)]
Interval = Annotated[
    float | None,
    _option(
        "Cross out, in heatmaps, cells whose bootstrap interval of this level, such as 0.95, holds no "
        "effect.",
        MEASURE,
        metavar="LEVEL",
    ),
]

MethodName = Annotated[
    str,
    _option(
        """How cells are done.

- exact: one by one, in a shared pass
- attribution: all estimated, from a gradient
- integrated_gradients: likewise, from sixteen
- screen: estimated, then the largest done exactly
""",
        METHOD,
        metavar="NAME",
    ),
]
Top = Annotated[int | None, _option("screen: how many are done exactly.", METHOD, "50", metavar="NUMBER")]
Steps = Annotated[
    int | None, _option("attribution, screen: from how many gradients.", METHOD, "1", metavar="NUMBER")
]
Check = Annotated[
    bool | None,
    typer.Option(
        "--check",
        help="screen: do all cells exactly, to tell how well the estimates rank them.",
        rich_help_panel=METHOD,
    ),
]

Backend = Annotated[
    str, _option("auto, native, triton (GPU), reference, or hooks (slow; defines what is right).", ENGINE)
]
Device = Annotated[str, _option("cpu, cuda, or one of several GPUs, as cuda:1.", ENGINE)]
Dtype = Annotated[str, _option("float32 or bfloat16.", ENGINE)]
Threads = Annotated[int | None, _option("CPU threads.", ENGINE, "as torch chooses", min=1)]
Memory = Annotated[
    int | None,
    _option(
        "MiB that the states of one pass may take.", ENGINE, "128, or 512 with vision; GPU: a quarter", min=1
    ),
]

Limit = Annotated[
    int | None, _option("Only so many samples, drawn at random by the seed.", DATA, "all", min=1)
]
OnError = Annotated[
    str, _option("Rows of the data that cannot be traced: skip, they become failed results; or stop.", DATA)
]
OnlyCorrect = Annotated[
    bool,
    typer.Option(
        "--only-correct", help="Leave out samples that the model answers wrongly.", rich_help_panel=DATA
    ),
]
SweepAnswer = Annotated[
    str,
    _option(
        "own: the first token of what the model answers; expected: the data's answer, all tokens jointly.",
        DATA,
    ),
]
SweepCorrupt = Annotated[
    list[str] | None,
    _option(
        "As of blip-trace run: embeddings, pixels, patches, words, swap-image, swap-question, ablate, hide, "
        "or pair: the other half of each sample's minimal pair.",
        CORRUPTION,
        "embeddings",
        metavar="NAMES",
    ),
]
SweepSpan = Annotated[
    str | None,
    _option(
        "words: which, as a phrase, as tokens from 0, or @subject: each sample's own.", CORRUPTION, "all"
    ),
]
SweepSeed = Annotated[int, _option("Of everything that is drawn; each sample has noise of its own.", RUN)]
SweepMetrics = Annotated[
    list[str] | None,
    _option(
        "By commas or repeated: probability, log_probability, logit, logit_difference (the data's foil), "
        "kl_divergence, rank.",
        MEASURE,
        "probability",
        metavar="NAMES",
    ),
]
StoreType = Annotated[str, _option("Type in which maps are kept: float32 or float16.", RUN)]
Batch = Annotated[int, _option("Questions of equal shape in one pass.", RUN, min=1)]
ShardSize = Annotated[
    int | None, _option("Samples in a shard, which is done as a whole.", RUN, "about a minute's work", min=1)
]
ExecutorName = Annotated[str, _option("local (this process), processes, or ray.", RUN)]
Workers = Annotated[int | None, _option("processes, ray: how many.", RUN, "one a core", min=1)]
Address = Annotated[
    str | None, _option("ray: of a cluster.", RUN, "RAY_ADDRESS, or one is started here", metavar="ADDRESS")
]
Gpus = Annotated[float, _option("ray: GPUs of each process.", RUN)]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend", help="Add samples that the data set has got since it was planned.", rich_help_panel=RUN
    ),
]
Retry = Annotated[
    bool,
    typer.Option("--retry", help="Do shards again in which samples failed.", rich_help_panel=RUN),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Tell what would be done, how long and how large.",
        rich_help_panel=RUN,
    ),
]
