"""Every kind of intervention on one small scene, with the models that ship: a tour, and code to start from.

    python examples/gallery.py [--out gallery-out]

Takes about half a minute; writes a picture for each stop and prints what it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from demo import SCENE
from matplotlib.figure import Figure
from rich.console import Console

from blip_trace import (
    Cell,
    GaussianNoise,
    ImageRegion,
    ImageSwap,
    PixelNoise,
    Screen,
    Site,
    TokenNoise,
    TokenSwap,
    Tracer,
    shipped_model,
)
from blip_trace.captions import caption
from blip_trace.scenes import Scene, SceneObject

QUESTION = "what color is the circle"
NOISE = GaussianNoise(samples=10)
IMAGE = SCENE.render(256)
# the same scene, but for the circle's colour: a minimal pair
PAIR = Scene((SceneObject("circle", "yellow", row=0, column=0), *SCENE.objects[1:]), SCENE.background)


def image_stack(tracer: Tracer, out: Path) -> str:
    result = tracer.trace(
        IMAGE,
        QUESTION,
        corruption=PixelNoise(std=3.0, samples=10),
        stacks=("vision",),
        patch_group=2,
    )
    result.plot_image("hidden", out / "image-stack.png")
    best = result.indirect_effect("vision", "hidden").max(0)
    places = [result.tokens("vision")[place] for place in best.indices.tolist()]
    return f"blocks of patches that bring back most of {result.answer!r}, layer by layer: {', '.join(places)}"


def heads(tracer: Tracer, out: Path) -> str:
    result = tracer.trace(
        IMAGE,
        QUESTION,
        corruption=NOISE,
        stacks=("text_encoder",),
        kinds=("cross_attn_head", "self_attn_head"),
        tokens={"text_encoder": [-2, -1]},
    )
    result.plot("text_encoder", "cross_attn_head", out / "heads.png")
    comparison = result.compare("text_encoder", "cross_attn_head", other_kind="self_attn_head")
    sure = int((comparison.family_p_value < 0.05).sum())
    return f"{sure} cells where cross-attention heads carry more or less than self-attention heads (p < 0.05)"


def minimal_pair(tracer: Tracer, out: Path) -> str:
    result = tracer.trace(
        IMAGE,
        QUESTION,
        corruption=ImageSwap(PAIR.render(256)),
        metrics=("logit_difference", "probability", "kl_divergence", "rank"),
        foil="yellow",
    )
    result.plot("text_encoder", "hidden", out / "minimal-pair.png")
    rank = result.by("rank").low_score
    return (
        f"logit({result.answer}) - logit(yellow) is {result.high_score:.1f} clean and {result.low_score:.1f} "
        f"on the other picture, where {result.answer!r} has rank {rank:.0f}"
    )


def words(tracer: Tracer, out: Path) -> str:
    spoilt = tracer.trace(IMAGE, QUESTION, corruption=TokenNoise(span="the circle", std=8.0, samples=10))
    spoilt.plot("text_encoder", "hidden", out / "words.png", level=0.95)
    swapped = tracer.trace(
        IMAGE, QUESTION, corruption=TokenSwap("what shape is the circle"), direction="noise"
    )
    return f"{spoilt.settings['corrupted']}; swapped: {swapped.settings['corrupted']}"


def hidden_region(tracer: Tracer, out: Path) -> str:
    corner = ImageRegion(box=(0.0, 0.0, 0.4, 0.4))
    result = tracer.trace(IMAGE, QUESTION, corruption=corner, kinds=("hidden", "mlp"), window=3)
    result.plot("text_encoder", "mlp", out / "hidden-region.png")
    return f"P({result.answer}) is {result.low_score:.2g} with the corner hidden"


def severed_paths(tracer: Tracer, out: Path) -> str:
    curves = {}
    for name, sever in (("whole", ()), ("mlp severed", ("mlp",)), ("self_attn severed", ("self_attn",))):
        result = tracer.trace(IMAGE, QUESTION, corruption=NOISE, stacks=("text_encoder",), sever=sever)
        curves[name] = result.indirect_effect("text_encoder", "hidden").amax(0).tolist()
    _curves(curves, "largest indirect effect of a token", out / "severed-paths.png")
    return f"at layer 0 {curves['whole'][0]:.2f}, without the MLPs above {curves['mlp severed'][0]:.2f}"


def knockout(tracer: Tracer, out: Path) -> str:
    side, tokens, layers = 8, 7, 4
    corner = [1 + side * y + x for y in range(3) for x in range(3)]
    elsewhere = [patch for patch in range(1, 1 + side * side) if patch not in corner]
    windows = [range(layer, min(layers, layer + 2)) for layer in range(layers)]
    curves = {}
    for name, patches in (("the circle's corner", corner), ("everything else", elsewhere)):
        cells = [
            Cell.knockout("text_encoder", "cross_attn", range(tokens), patches, window) for window in windows
        ]
        curves[name] = tracer.restore(IMAGE, QUESTION, cells, corruption="none").scores[0].tolist()
    _curves(curves, "P(answer), edges cut in two layers", out / "knockout.png")
    return ", ".join(f"{name}: down to {min(curve):.2g}" for name, curve in curves.items())


def screen(tracer: Tracer, out: Path) -> str:
    result = tracer.trace(
        IMAGE, QUESTION, corruption=NOISE, kinds=("hidden", "mlp", "self_attn"), method=Screen(20, check=True)
    )
    result.plot("text_encoder", "hidden", out / "screen.png")
    told = result.settings["screen"]
    return (
        f"estimates rank cells as the exact map does by {told['rank_correlation']:.2f} (Spearman) and miss "
        f"{told['missed']:.0%} of its 20 largest effects"
    )


def any_cells(tracer: Tracer, out: Path) -> str:
    both = Cell.of(Site("text_encoder", 2, "cross_attn", token) for token in (4, 5))
    alone = Cell.each("text_encoder", "cross_attn", [[2, 4], [2, 5]])
    scores = tracer.restore(IMAGE, QUESTION, [both, *alone], corruption=NOISE).scores.mean(0)
    together, one, other = scores.tolist()
    return f"cross-attention of layer 2 at 'the' {one:.2f}, at 'circle' {other:.2f}, at both {together:.2f}"


def captioning(_: Tracer, out: Path) -> str:
    tracer = Tracer.from_pretrained(shipped_model("caption"))
    written = caption(SCENE.objects)
    result = tracer.trace(
        IMAGE, "", written, corruption=PixelNoise(std=3.0, samples=5), stacks=("vision", "text_decoder")
    )
    color = written.split().index("red")
    result.by("probability", color).plot_image("hidden", out / "caption.png")
    return f"{written!r}; P(red) {result.by('probability', color).high_score:.2f}"


def matching(_: Tracer, out: Path) -> str:
    tracer = Tracer.from_pretrained(shipped_model("match"))
    text = caption(SCENE.objects[:2])
    result = tracer.trace(IMAGE, text, corruption=ImageSwap(PAIR.render(256)))
    result.plot("text_encoder", "hidden", out / "match.png")
    return f"{text!r}: P(match) {result.high_score:.2f}, on the other picture {result.low_score:.2f}"


STOPS: tuple[Callable[[Tracer, Path], str], ...] = (
    image_stack,
    heads,
    minimal_pair,
    words,
    hidden_region,
    severed_paths,
    knockout,
    screen,
    any_cells,
    captioning,
    matching,
)


def _curves(curves: Mapping[str, list[float]], label: str, path: Path) -> None:
    """Lines over layers."""
    figure = Figure(figsize=(3.4, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(values, marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_xticks(range(len(values)))
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel(label, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every kind of intervention on one small scene.")
    parser.add_argument("--out", type=Path, default=Path("gallery-out"), help="where the pictures go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    with console.status("loading the model"):
        tracer = Tracer.from_pretrained(shipped_model())
    IMAGE.save(args.out / "scene.png")
    for stop in STOPS:
        with console.status(stop.__name__):
            told = stop(tracer, args.out)
        console.print(f"[bold]{stop.__name__.replace('_', ' ')}[/bold]  {told}")
    console.print(f"\npictures are in {args.out}", markup=False)


if __name__ == "__main__":
    main()
