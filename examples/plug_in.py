"""How a tool that has "patch these states, give me the logits" runs on the engine.

`interchange` is such a tool's inner loop: it knows nothing of BLIP, nor of blip_trace. `by_hooks` is how any
model would serve it, a forward pass for each patch; `by_engine` is all that it takes to serve it here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from blip_trace import Cell, ImageSwap, Tracer, shipped_model
from blip_trace.scenes import Scene, SceneObject, random_scene

BACKGROUND = random_scene(Random(3)).background

Patch = tuple[int, int]
"""Layer and token of a state that is taken from the source run."""
Logits = Callable[[list[Patch]], Tensor]
"""Logits [patches, V] of the base run with each patch alone."""


def interchange(logits: Logits, layers: int, tokens: int, answer: int) -> Tensor:
    """The tool: how probable the source's answer is with each state, [layers, tokens]."""
    patches = [(layer, token) for layer in range(layers) for token in range(tokens)]
    return logits(patches).softmax(-1)[:, answer].view(layers, tokens)


def by_engine(tracer: Tracer, source: object, base: object, question: str) -> Logits:
    """All patches in one pass: a patch becomes a `Cell`, what differs between the runs a corruption."""

    def logits(patches: list[Patch]) -> Tensor:
        cells = Cell.each("text_encoder", "hidden", patches)
        return tracer.logits(source, question, cells, corruption=ImageSwap(base)).cells[0, :, 0]

    return logits


def by_hooks(tracer: Tracer, source: object, base: object, question: str) -> Logits:
    """The same with forward hooks on the unmodified model."""
    model, inputs = tracer.model, tracer.inputs
    ids = inputs.question_ids(question)[None]
    start = torch.tensor([[model.decoder_start_token_id]])

    @torch.no_grad()
    def forward(image: object) -> Tensor:
        seen = model.vision_model(inputs.pixels(image)).last_hidden_state
        read = model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        return model.text_decoder(input_ids=start, encoder_hidden_states=read).logits[0, -1]

    def logits(patches: list[Patch]) -> Tensor:
        blocks, kept = model.text_encoder.encoder.layer, {}
        hooks = [
            block.register_forward_hook(lambda _, __, out, n=n: kept.update({n: out.clone()}))
            for n, block in enumerate(blocks)
        ]
        forward(source)
        for hook in hooks:
            hook.remove()
        found = []
        for layer, token in patches:

            def put(_: object, __: object, out: Tensor, layer: int = layer, token: int = token) -> None:
                out[:, token] = kept[layer][:, token]

            hook = blocks[layer].register_forward_hook(put)
            found.append(forward(base))
            hook.remove()
        return torch.stack(found)

    return logits


def main() -> None:
    """Both ways on two drawn scenes that differ in one colour."""
    tracer = Tracer.from_pretrained(shipped_model())
    base, source = (
        Scene((SceneObject("circle", colour, row=1, column=1),), BACKGROUND).render()
        for colour in ("red", "blue")
    )
    question = "what color is the circle"
    shape = len(tracer.program.stacks["text_encoder"].layers), len(tracer.inputs.question_ids(question))
    (answer,) = tracer.inputs.answer_ids("blue").tolist()
    maps, seconds = [], []
    for serve in (by_engine, by_hooks):
        logits = serve(tracer, source, base, question)
        interchange(logits, *shape, answer)
        begin = time.perf_counter()
        maps.append(interchange(logits, *shape, answer))
        seconds.append(time.perf_counter() - begin)
    ours, theirs = maps
    print(f"P(blue), {shape[0]} layers x {shape[1]} tokens: {theirs.min():.4f} to {theirs.max():.4f}")
    print(f"largest difference of the two: {(ours - theirs).abs().max():.1e}")
    print(
        f"hooks {seconds[1] * 1e3:.1f} ms, engine {seconds[0] * 1e3:.1f} ms: {seconds[1] / seconds[0]:.0f} x"
    )


if __name__ == "__main__":
    main()
