"""Trace the model that ships with blip_trace on two pictures, and time it against the loop over hooks.

    python examples/demo.py [--model FOLDER] [--out demo-out]

Writes the pictures and their heatmaps into the folder, and prints the maps, where the answer is carried, and
how much faster than one hooked forward pass a cell the same maps were made: both are timed here and now.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from blip_trace import GaussianNoise, Tracer, TraceResult
from blip_trace.images import open_image
from blip_trace.lowering.load import shipped_model
from blip_trace.scenes import Scene, SceneObject, photograph, random_scene
from blip_trace.terminal import print_trace

SCENE = Scene(
    (
        SceneObject("circle", "red", row=0, column=0),
        SceneObject("star", "blue", row=1, column=2),
        SceneObject("square", "green", row=2, column=1),
    ),
    random_scene(Random(3)).background,
)


def pictures(out: Path) -> dict[Path, str]:
    """Write the two pictures; returns a question about each."""
    scene, photo = out / "scene.png", out / "photograph.png"
    SCENE.render(256).save(scene)
    photograph(SCENE).save(photo)
    return {scene: "what color is the circle", photo: "what shape is at the middle right"}


def timed(
    tracer: Tracer, image: Path, question: str, noise: GaussianNoise, repeats: int
) -> tuple[TraceResult, float]:
    """The trace and its mean seconds; the image is read and encoded before, for either way alike."""
    pixels = tracer.processor.image_processor(open_image(image), return_tensors="pt").pixel_values
    tracer.trace(pixels, question, corruption=noise, stacks=["text_decoder"])
    started = time.perf_counter()
    for _ in range(repeats):
        result = tracer.trace(pixels, question, corruption=noise)
    return result, (time.perf_counter() - started) / repeats


def print_carriers(console: Console, result: TraceResult) -> None:
    """For every layer the token whose state brings most of the answer back."""
    table = Table(title="Where the answer is carried", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    for stack, _ in result.restored:
        table.add_column(stack)
    columns = []
    for stack, kind in result.restored:
        shares, tokens = result.normalized(stack, kind).max(0)
        labels = [result.tokens(stack)[token] for token in tokens.tolist()]
        columns.append(
            [f"{label!r} {share:.0%}" for label, share in zip(labels, shares.tolist(), strict=True)]
        )
    for layer, row in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *row)
    console.print(table, markup=False)


def print_comparison(
    console: Console, fast: TraceResult, slow: TraceResult, times: tuple[float, float]
) -> None:
    """The two ways' times, and the largest difference between their maps."""
    cells = sum(maps[0].numel() for maps in fast.restored.values())
    maps = max(float((fast.grid(*name) - slow.grid(*name)).abs().max()) for name in fast.restored)
    samples = max(float((fast.restored[name] - slow.restored[name]).abs().max()) for name in fast.restored)
    console.print(
        f"[bold]{times[1] / times[0]:.0f} × faster[/bold] than the loop over hooks: "
        f"{1e3 * times[0]:.0f} ms ({fast.settings['backend']}) against {1e3 * times[1]:.0f} ms (hooks) "
        f"for the same {cells} cells × {len(fast.low_scores)} samples "
        f"(threads: {fast.settings['threads']})\n"
        f"largest difference |Δp|: {maps:.1e} between the two maps, {samples:.1e} between single samples"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trace the shipped model on two pictures, both ways.")
    parser.add_argument("--model", type=Path, help="another model folder")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where pictures and heatmaps go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)

    with console.status("loading the model"):
        tracer = Tracer.from_pretrained(args.model or shipped_model())
        loop = Tracer(tracer.model, tracer.processor, backend="hooks")
    noise = GaussianNoise(samples=10, seed=0)
    for image, question in pictures(args.out).items():
        console.rule(str(image))
        with console.status("tracing, with the engine and with hooks"):
            fast, fast_seconds = timed(tracer, image, question, noise, repeats=5)
            slow, slow_seconds = timed(loop, image, question, noise, repeats=1)
        print_trace(console, fast, fast_seconds)
        console.print()
        print_carriers(console, fast)
        console.print()
        print_comparison(console, fast, slow, (fast_seconds, slow_seconds))
        for stack, kind in fast.restored:
            fast.plot(stack, kind, args.out / f"{image.stem}-{stack}-{kind}.png")
    console.print(f"\nheatmaps are in {args.out}", markup=False)


if __name__ == "__main__":
    main()
