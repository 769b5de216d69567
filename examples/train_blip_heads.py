"""Fine-tune the shipped question answerer of shapes to write captions, or to match texts with pictures.

    python examples/train_blip_heads.py --task caption --out blip-shapes-caption
    python examples/train_blip_heads.py --task match --out blip-shapes-match --steps 1800 --scenes 24

Writes the model, its processor and `accuracy.json`. Plain transformers loads the folder, as
`BlipForConditionalGeneration` or as `BlipForImageTextRetrieval`, and `BlipProcessor`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_blip_shapes import make_processor, optimize, picture_size
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)
from transformers.utils import logging

from blip_trace.captions import CAPTION_WORDS, caption, mismatch, statement
from blip_trace.lowering.load import shipped_model
from blip_trace.scenes import photograph, random_scene

PAIRS = 2  # true texts about each picture, each with a false one
EVALUATED = 100  # pictures at once


def extend(processor: BlipProcessor) -> BlipProcessor:
    """Append the words of captions to the vocabulary; all others keep their ids."""
    old = processor.tokenizer
    pieces = {**old.get_vocab(), **{word: len(old) + i for i, word in enumerate(CAPTION_WORDS)}}
    processor.tokenizer = BertTokenizer(
        vocab=dict(sorted(pieces.items(), key=lambda piece: piece[1])),
        bos_token=old.bos_token,
        additional_special_tokens=["[ENC]"],
        model_max_length=old.model_max_length,
    )
    return processor


def take_over(vqa: BlipForQuestionAnswering, kind: type[Any], vocab_size: int) -> Any:
    """A model of `kind` with the weights it shares with `vqa`; the rest, and new words' rows, are fresh."""
    config = BlipConfig.from_dict(vqa.config.to_dict())
    config.text_config.vocab_size = vocab_size
    model = kind(config)
    known = vqa.state_dict()
    for name, weight in model.state_dict().items():
        # The answer decoder's cross-attention reads questions; the question encoder's reads pictures.
        if ".crossattention." in name:
            name = name.replace("text_decoder.bert.", "text_encoder.")
        if name in known:
            weight[: len(known[name])] = known[name]
    return model


@dataclass
class Batch:
    """Pictures, and the same number of texts about each."""

    pixels: Tensor  # [scenes, 3, height, width]
    texts: list[str]  # those about the first picture, then those about the second, ...
    kinds: list[str]  # of each text: "true", or which kind of word was changed


def make_batch(name: str, scenes: range, task: str, processor: BlipProcessor) -> Batch:
    """Draw scenes number `scenes` of the stream that `name` seeds."""
    images, texts, kinds = [], [], []
    for number in scenes:
        rng = Random(f"{name}/{number}")
        scene = random_scene(rng)
        images.append(
            photograph(scene, (800, 600)) if name.startswith("photo") else scene.render(picture_size(rng))
        )
        if task == "caption":
            texts.append(caption(scene.objects))
            kinds.append("true")
            continue
        for _ in range(PAIRS):
            true = statement(scene, rng)
            false, kind = mismatch(true, scene, rng)
            texts += [true, false]
            kinds += ["true", kind]
    return Batch(processor.image_processor(images, return_tensors="pt").pixel_values, texts, kinds)


def caption_loss(model: BlipForConditionalGeneration, batch: Batch, tokenizer: BertTokenizer) -> Tensor:
    """Mean cross-entropy of the captions' tokens and the [SEP] after each."""
    ids = tokenizer(batch.texts, padding=True, return_tensors="pt").input_ids
    ids[:, 0] = tokenizer.bos_token_id  # in the place of [CLS], as `generate` puts it
    # Padding on the right needs no mask: the decoder looks backwards only.
    logits = model(
        pixel_values=batch.pixels, input_ids=ids[:, :-1]
    ).logits  # [scenes, tokens - 1, vocabulary]
    return cross_entropy(logits.mT, ids[:, 1:], ignore_index=tokenizer.pad_token_id)


def match_scores(model: BlipForImageTextRetrieval, batch: Batch, tokenizer: BertTokenizer) -> Tensor:
    """`itm_score` of every text with its picture: [texts, 2], a match being class 1.

    What `model(..., use_itm_head=True)` gives, but with each picture encoded once for all of its texts. The
    padding mask holds in self-attention, and the pictures that cross-attention reads have no padding.
    """
    image_states = model.vision_model(pixel_values=batch.pixels).last_hidden_state
    text = tokenizer(batch.texts, padding=True, return_tensors="pt")
    states = model.text_encoder(
        input_ids=text.input_ids,
        attention_mask=text.attention_mask,
        encoder_hidden_states=image_states.repeat_interleave(len(batch.texts) // len(batch.pixels), 0),
    ).last_hidden_state
    return model.itm_head(states[:, 0])


def match_loss(model: BlipForImageTextRetrieval, batch: Batch, tokenizer: BertTokenizer) -> Tensor:
    targets = torch.tensor([kind == "true" for kind in batch.kinds]).long()
    return cross_entropy(match_scores(model, batch, tokenizer), targets)


@torch.no_grad()
def caption_accuracy(
    model: BlipForConditionalGeneration, processor: BlipProcessor, batch: Batch
) -> list[tuple[str, bool]]:
    """Whether each greedily generated caption is right, and each word of the right one in its place."""
    written = processor.batch_decode(
        model.generate(pixel_values=batch.pixels, max_new_tokens=20, do_sample=False),
        skip_special_tokens=True,
    )
    found = []
    for text, right in zip(written, batch.texts, strict=True):
        found.append(("caption", text == right))
        words, wanted = text.split(), right.split()
        found += [("word", words[i : i + 1] == [word]) for i, word in enumerate(wanted)]
    return found


@torch.no_grad()
def match_accuracy(
    model: BlipForImageTextRetrieval, processor: BlipProcessor, batch: Batch
) -> list[tuple[str, bool]]:
    """Whether each text is told to be true or false, under "all" and under what it is."""
    matched = match_scores(model, batch, processor.tokenizer).argmax(-1).tolist()
    found = []
    for told, kind in zip(matched, batch.kinds, strict=True):
        right = told == (kind == "true")
        found += [("all", right), (kind, right)]
    return found


@dataclass(frozen=True)
class Task:
    kind: type[Any]
    loss: Callable[[Any, Batch, BertTokenizer], Tensor]
    accuracy: Callable[[Any, BlipProcessor, Batch], list[tuple[str, bool]]]


TASKS = {
    "caption": Task(BlipForConditionalGeneration, caption_loss, caption_accuracy),
    "match": Task(BlipForImageTextRetrieval, match_loss, match_accuracy),
}


def accuracy(model: Any, processor: BlipProcessor, task: str, scenes: int, name: str) -> dict[str, float]:
    """Shares of right captions and words, or of right matches, in the first scenes of a stream."""
    found: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, scenes, EVALUATED):
        batch = make_batch(name, range(start, min(start + EVALUATED, scenes)), task, processor)
        for kind, right in TASKS[task].accuracy(model, processor, batch):
            found[kind].append(right)
    return {kind: sum(rights) / len(rights) for kind, rights in sorted(found.items())}


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    task = TASKS[args.task]
    processor = extend(make_processor())
    if args.start:
        model = task.kind.from_pretrained(args.start)
    else:
        vqa = BlipForQuestionAnswering.from_pretrained(shipped_model())
        model = take_over(vqa, task.kind, len(processor.tokenizer))
    model.train()
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} word pieces")
    processor.save_pretrained(args.out)

    def loss_at(step: int) -> Tensor:
        # Every scene is new: the stream never repeats, and its name keeps it apart from the held-out ones.
        scenes = range(step * args.scenes, (step + 1) * args.scenes)
        batch = make_batch(f"train-{args.task}-{args.seed}", scenes, args.task, processor)
        return task.loss(model, batch, processor.tokenizer)

    def check(done: int) -> None:
        if done % args.save_every == 0:
            model.save_pretrained(args.out)
            shares = accuracy(model, processor, args.task, 500, f"validation-{args.task}")
            print("  " + ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items()), flush=True)

    optimize(list(model.parameters()), args.lr, args.steps, loss_at, check)
    model.save_pretrained(args.out)
    seconds = round(time.perf_counter() - began)
    # The numbers are those of the folder, as users load it; each seed has its own held-out scenes.
    model = task.kind.from_pretrained(args.out)
    held_out, photographs = f"held-out-{args.task}-{args.seed}", f"photograph-{args.task}-{args.seed}"
    report = {
        "scenes": args.held_out,
        "training_seconds": seconds,
        "held_out": accuracy(model, processor, args.task, args.held_out, held_out),
        "photograph": accuracy(model, processor, args.task, args.held_out // 4, photographs),
    }
    (args.out / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the shipped BLIP of shapes on a CPU.")
    add = parser.add_argument
    add("--task", choices=TASKS, required=True, help="write captions, or match texts with pictures")
    add("--out", type=Path, required=True, help="folder for the model, its processor and accuracy.json")
    add("--start", type=Path, help="folder of an earlier run to go on from; give another --seed, too")
    add("--steps", type=int, default=2500, help="optimizer steps")
    add("--scenes", type=int, default=32, help="pictures a step, with one caption or four texts each")
    add("--lr", type=float, default=8e-4, help="highest learning rate of the one-cycle schedule")
    add("--seed", type=int, default=0, help="of the fresh weights and the training scenes")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--held-out", type=int, default=4000, help="held-out scenes")
    logging.disable_progress_bar()
    train(parser.parse_args())


if __name__ == "__main__":
    main()
