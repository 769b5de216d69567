"""ROME's causal tracing (Meng et al. 2022, `experiments/causal_trace.py`) for questions about a picture, with
its names, arguments and results, on this engine: a whole map is one pass.

What ROME restores in GPT is restored in BLIP's question encoder: whole states (kind None), and what the MLP
("mlp"), the self-attention ("attn") and, beyond ROME, the cross-attention ("cross_attn") of a layer write
before residual and LayerNorm. Noise comes on the words of the question's subject; the picture stays clean.

    mt = ModelAndTokenizer("Salesforce/blip-vqa-base")
    result = calculate_hidden_flow(mt, "what color is the circle", "circle", noise=0.1, image="scene.png")
    plot_trace_heatmap(result, "circle.pdf")
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import TornError, case_path, read_case, write_case
from .inputs import (
    Image,
    ModelAndTokenizer,
    decode_tokens,
    find_token_range,
    guess_subject,
    make_inputs,
)
from .noise import (
    Noise,
    collect_embedding_gaussian,
    collect_embedding_std,
    collect_embedding_tdist,
    noise_of,
)
from .plots import plot_trace_heatmap
from .trace import (
    calculate_hidden_flow,
    layername,
    predict_from_input,
    predict_token,
    trace_important_states,
    trace_important_window,
    trace_with_patch,
    trace_with_repatch,
)

__all__ = [
    "ModelAndTokenizer",
    "TornError",
    "calculate_hidden_flow",
    "case_path",
    "collect_embedding_gaussian",
    "collect_embedding_std",
    "collect_embedding_tdist",
    "decode_tokens",
    "find_token_range",
    "guess_subject",
    "layername",
    "make_inputs",
    "noise_of",
    "plot_all_flow",
    "plot_hidden_flow",
    "plot_trace_heatmap",
    "predict_from_input",
    "predict_token",
    "read_case",
    "trace_cases",
    "trace_important_states",
    "trace_important_window",
    "trace_with_patch",
    "trace_with_repatch",
    "write_case",
]

DRAWN = 200
"""Of how many questions `trace_cases` draws the maps, unless told otherwise."""


def plot_hidden_flow(
    mt: ModelAndTokenizer,
    prompt: str,
    subject: str | None = None,
    samples: int = 10,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    window: int = 10,
    kind: str | None = None,
    savepdf: str | Path | None = None,
    *,
    image: Image,
) -> None:
    """Trace a question and draw the map; subject: guessed unless given (`guess_subject`)."""
    subject = guess_subject(prompt) if subject is None else subject
    result = calculate_hidden_flow(
        mt,
        prompt,
        subject,
        samples=samples,
        noise=noise,
        uniform_noise=uniform_noise,
        window=window,
        kind=kind,
        image=image,
    )
    plot_trace_heatmap(result, savepdf)


def plot_all_flow(mt: ModelAndTokenizer, prompt: str, subject: str | None = None, *, image: Image) -> None:
    """Trace a question and show the maps of "mlp", "attn" and whole states."""
    for kind in ("mlp", "attn", None):
        plot_hidden_flow(mt, prompt, subject, kind=kind, image=image)


def trace_cases(
    mt: ModelAndTokenizer,
    knowns: Sequence[Mapping[str, Any]],
    output_dir: str | Path = "results/{model_name}/causal_trace",
    noise_level: str | float = "s3",
    replace: bool = False,
    *,
    kinds: Sequence[str | None] = (None, "mlp", "attn"),
    samples: int = 10,
    window: int = 10,
    drawn: int = DRAWN,
) -> list[Path]:
    """What ROME's script does with a file of facts: trace each in each kind, keep it as
    `cases/knowledge_{id}{_kind}.npz`, and draw those of the first questions into `pdfs/`.

    knowns: each with known_id, prompt, subject, image and perhaps attribute, the answer that is right
    (others are kept as wrong predictions, without scores). output_dir: `{model_name}` in it becomes the noise
    level, `replace` and the model's name, as ROME has it. noise_level: see `noise_of`; fitted on the subjects
    and the prompts given. drawn: of how many questions the maps are drawn.

    Cases that are there are skipped, whatever they were made with; half of a file is done again. Returns the
    cases' paths. Raises KeyError for what a fact lacks, ValueError for ids that are no part of a file's name
    and for cases that hold pickled objects.
    """
    folder = Path(str(output_dir).replace("{model_name}", _run_name(mt, noise_level, replace)))
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    paths = [[case_path(folder / "cases", known["known_id"], kind) for kind in kinds] for known in knowns]
    texts = [[str(known[name]) for known in knowns] for name in ("subject", "prompt")]
    noise, uniform = noise_of(mt, noise_level, *texts)
    for number, known in enumerate(knowns):
        for kind, path in zip(kinds, paths[number], strict=True):
            if not _is_done(path):
                result = calculate_hidden_flow(
                    mt,
                    known["prompt"],
                    known["subject"],
                    samples,
                    noise,
                    uniform_noise=uniform,
                    replace=replace,
                    window=window,
                    kind=kind,
                    expect=known.get("attribute"),
                    image=known["image"],
                )
                write_case(path, result)
            if number < drawn:
                _draw(path, folder / "pdfs")
    return [path for own in paths for path in own]


def _is_done(path: Path) -> bool:
    try:
        read_case(path)
    except (FileNotFoundError, TornError):
        return False
    return True


def _draw(case: Path, folder: Path) -> None:
    result = read_case(case)
    if not result["correct_prediction"]:
        return
    pdf = folder / f"{_named(str(result['answer']).strip())}_{case.stem.removeprefix('knowledge_')}.pdf"
    if not pdf.exists():
        plot_trace_heatmap(result, pdf)


def _run_name(mt: ModelAndTokenizer, noise_level: str | float, replace: bool) -> str:
    name = mt.model.config.name_or_path or type(mt.model).__name__
    own = Path(name).name if Path(name).is_absolute() else _named(name)
    return f"n{noise_level}_r{int(replace)}_{own}"


def _named(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)
