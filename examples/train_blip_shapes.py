"""Train the small BLIP of `blip_trace/assets/blip-shapes` from scratch, on one CPU core, in under an hour.

    python examples/train_blip_shapes.py --out blip-shapes

Writes the model, its processor and `accuracy.json`. Plain transformers loads the folder:

    BlipForQuestionAnswering.from_pretrained(folder)
    BlipProcessor.from_pretrained(folder, backend="pil")
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
)
from transformers.utils import logging

from blip_trace.scenes import (
    COLORS,
    QUESTION_TYPES,
    SHAPES,
    Question,
    Scene,
    photograph,
    questions,
    random_scene,
    vocabulary,
)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
IMAGE_SIZE = 64  # pixels
PATCH_SIZE = 8  # pixels
# With transformers' usual 0.02 a model this narrow stays at chance for thousands of steps.
INITIALIZER_RANGE = 0.06


def make_processor() -> BlipProcessor:
    pieces = [*SPECIAL_TOKENS, *vocabulary()]
    tokenizer = BertTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
        model_max_length=32,
    )
    return BlipProcessor(BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer)


def make_model(tokenizer: BertTokenizer) -> BlipForQuestionAnswering:
    size = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
        "initializer_range": INITIALIZER_RANGE,
    }
    # transformers' defaults are the ids of BERT's own vocabulary; this model's are those of its tokenizer.
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = BlipConfig(
        text_config={
            **size,
            **ids,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": size["hidden_size"],
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        vision_config={**size, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "attention_dropout": 0.0},
        projection_dim=128,
        image_text_hidden_size=128,
        initializer_range=INITIALIZER_RANGE,
    )
    model = BlipForQuestionAnswering(config)
    # Random position embeddings of this range would start an order of magnitude below the patches' own.
    model.vision_model.embeddings.position_embedding.data[0, 1:] = position_waves(size["hidden_size"])
    return model


def position_waves(width: int) -> Tensor:
    """Sines and cosines of each patch's row and column: [patches, width]."""
    side = IMAGE_SIZE // PATCH_SIZE
    frequencies = 1.2 ** -torch.arange(width // 4)  # radians a patch
    angles = torch.arange(side)[:, None] * frequencies  # [side, width / 4]
    waves = 0.5 * torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, width / 2]
    rows, columns = waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


@dataclass
class Batch:
    """Pictures, and the same number of questions about each."""

    pixels: Tensor  # [scenes, 3, height, width]
    questions: list[list[Question]]
    input_ids: Tensor  # [scenes, questions, tokens], padded on the right
    answer_ids: Tensor  # [scenes, questions, answer tokens], [DEC] answer [SEP], padded on the right


def picture_size(rng: Random) -> int | tuple[int, int]:
    """The model's own size for half of the pictures; the others are larger or squeezed, as users' are."""
    if rng.random() < 0.5:
        return IMAGE_SIZE
    height = IMAGE_SIZE * rng.choice((1, 1, 2, 3))
    return max(IMAGE_SIZE, round(height * rng.uniform(0.6, 1.7))), height


def make_batch(name: str, scenes: range, processor: BlipProcessor, *, count_shapes: bool = False) -> Batch:
    """Draw scenes number `scenes` of the stream that `name` seeds."""
    tokenizer = processor.tokenizer
    images: list[Image.Image] = []
    asked: list[list[Question]] = []
    for number in scenes:
        rng = Random(f"{name}/{number}")
        scene = random_scene(rng)
        asked.append(questions(scene, rng, count_shapes=count_shapes))
        photo = name.startswith("photograph")
        images.append(photograph(scene, (800, 600)) if photo else scene.render(picture_size(rng)))

    def pad(rows: list[list[int]]) -> Tensor:
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt").input_ids
        return padded.view(len(scenes), len(QUESTION_TYPES), -1)

    flat = [question for row in asked for question in row]
    texts = tokenizer([question.text for question in flat]).input_ids
    answers = tokenizer([question.answer for question in flat], add_special_tokens=False).input_ids
    return Batch(
        processor.image_processor(images, return_tensors="pt").pixel_values,
        asked,
        pad(texts),
        pad([[tokenizer.bos_token_id, *ids, tokenizer.sep_token_id] for ids in answers]),
    )


def mask_padding(model: BlipForQuestionAnswering) -> None:
    """Make the answer decoder's cross-attention skip padded question tokens while training.

    transformers hands that mask to `crossattention.self` under a name that it ignores there. Unpadded
    questions, which are all that users ask, need no mask: the trained model is right without these hooks.
    """

    def rename(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "encoder_attention_mask": kwargs["attention_mask"]}

    for layer in model.text_decoder.bert.encoder.layer:
        layer.crossattention.self.register_forward_pre_hook(rename, with_kwargs=True)


def batch_loss(model: BlipForQuestionAnswering, batch: Batch, pad: int) -> Tensor:
    """Mean cross-entropy of the answers' tokens and the [SEP] after each."""
    # [scenes, image tokens, C]
    image_states = model.vision_model(pixel_values=batch.pixels).last_hidden_state
    scenes, count, tokens = batch.input_ids.shape
    # All questions about a picture stand side by side in one row and see only themselves, so the picture's
    # keys and values are projected once, not once for each question.
    owner = torch.arange(count).repeat_interleave(tokens)  # [questions * tokens]
    seen = (owner[:, None] == owner) & (batch.input_ids.view(scenes, 1, -1) != pad)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    question_states = model.text_encoder(
        input_ids=batch.input_ids.view(scenes, -1),
        position_ids=torch.arange(tokens).repeat(count)[None],
        attention_mask=mask[:, None],  # [scenes, 1, questions * tokens, questions * tokens]
        encoder_hidden_states=image_states,
    ).last_hidden_state  # [scenes, questions * tokens, C]
    answer_ids = batch.answer_ids.flatten(0, 1)
    # Padded answers need no mask: the decoder's self-attention looks backwards only.
    logits = model.text_decoder(
        input_ids=answer_ids[:, :-1],
        encoder_hidden_states=question_states.view(scenes * count, tokens, -1),
        encoder_attention_mask=(batch.input_ids != pad).flatten(0, 1),
    ).logits  # [scenes * questions, answer tokens - 1, vocabulary]
    return cross_entropy(logits.flatten(0, 1), answer_ids[:, 1:].flatten(), ignore_index=pad)


@torch.no_grad()
def accuracy(
    model: BlipForQuestionAnswering, processor: BlipProcessor, scenes: int, name: str
) -> dict[str, float]:
    """Share of questions of each type whose greedily generated answer is the right one, word for word."""
    right = dict.fromkeys(QUESTION_TYPES, 0)
    pad = processor.tokenizer.pad_token_id
    for start in range(0, scenes, 100):
        batch = make_batch(name, range(start, min(start + 100, scenes)), processor)
        lengths = (batch.input_ids != pad).sum(-1)  # [scenes, questions]
        # Questions of one length at a time: generation, like users, sees no padding.
        for length in lengths.unique().tolist():
            scene, number = (lengths == length).nonzero(as_tuple=True)
            ids = model.generate(
                input_ids=batch.input_ids[scene, number, :length],
                pixel_values=batch.pixels[scene],
                max_new_tokens=4,
                do_sample=False,
            )
            answers = processor.batch_decode(ids, skip_special_tokens=True)
            for i, j, answer in zip(scene.tolist(), number.tolist(), answers, strict=True):
                question = batch.questions[i][j]
                right[question.type] += answer == question.answer
    return {kind: count / scenes for kind, count in right.items()}


def patch_labels(scene: Scene) -> list[list[int]]:
    """For each patch the colour, the shape (0: none) and the number of the grid cell around its centre."""
    side = IMAGE_SIZE // PATCH_SIZE
    looks = {
        (item.row, item.column): [1 + list(COLORS).index(item.color), 1 + list(SHAPES).index(item.shape)]
        for item in scene.objects
    }
    cells = [(2 * patch + 1) * 3 // (2 * side) for patch in range(side)]
    return [[*looks.get((row, column), [0, 0]), 3 * row + column] for row in cells for column in cells]


def optimize(
    parameters: list[torch.nn.Parameter],
    lr: float,
    steps: int,
    loss_at: Callable[[int], Tensor],
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Take AdamW steps on `loss_at(step)` under a one-cycle schedule; `after` hears how many are done."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    began, running = time.perf_counter(), 0.0
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"  {step + 1}: loss {running:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
        after(step + 1)


def train_vision(model: BlipForQuestionAnswering, processor: BlipProcessor, args: argparse.Namespace) -> None:
    """Teach the image encoder what stands at each patch, by a linear head that is thrown away afterwards.

    From answers alone it learns colours at once, but shapes and places are still at chance after a thousand
    steps. Labels for patches need a few hundred, and these steps run no text stack.
    """
    sizes = (1 + len(COLORS), 1 + len(SHAPES), 9)
    head = torch.nn.Linear(model.config.vision_config.hidden_size, sum(sizes))

    def loss_at(step: int) -> Tensor:
        images, labels = [], []
        for number in range(step * args.scenes, (step + 1) * args.scenes):
            rng = Random(f"vision-{args.seed}/{number}")
            scene = random_scene(rng)
            labels.append(patch_labels(scene))
            images.append(scene.render(picture_size(rng)))
        pixels = processor.image_processor(images, return_tensors="pt").pixel_values
        targets = torch.tensor(labels)  # [scenes, patches, 3]
        states = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]  # [scenes, patches, C]
        logits = head(states).split(sizes, dim=-1)
        # cross_entropy wants the classes second: [scenes, classes, patches].
        losses = [cross_entropy(part.mT, targets[..., i]) for i, part in enumerate(logits)]
        return torch.stack(losses).sum()

    optimize([*model.vision_model.parameters(), *head.parameters()], args.lr, args.vision_steps, loss_at)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    processor = make_processor()
    if args.start:
        model = BlipForQuestionAnswering.from_pretrained(args.start)
        model.train()
    else:
        model = make_model(processor.tokenizer)
        train_vision(model, processor, args)
    mask_padding(model)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} word pieces")
    processor.save_pretrained(args.out)

    def loss_at(step: int) -> Tensor:
        # Every scene is new: the stream never repeats, and its name keeps it apart from the held-out ones.
        scenes = range(step * args.scenes, (step + 1) * args.scenes)
        batch = make_batch(f"train-{args.seed}", scenes, processor, count_shapes=True)
        return batch_loss(model, batch, processor.tokenizer.pad_token_id)

    def check(done: int) -> None:
        if done % args.save_every == 0:
            model.save_pretrained(args.out)
            shares = accuracy(model, processor, 200, "validation")
            print("  " + ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items()), flush=True)

    optimize(list(model.parameters()), args.lr, args.steps, loss_at, check)
    model.save_pretrained(args.out)
    seconds = round(time.perf_counter() - began)
    # The numbers are those of the folder, as users load it. Each seed has its own held-out scenes: those of
    # an earlier run may have decided that this one was needed.
    model = BlipForQuestionAnswering.from_pretrained(args.out)
    report = {
        "scenes": args.held_out,
        "training_seconds": seconds,
        "held_out": accuracy(model, processor, args.held_out, f"held-out-{args.seed}"),
        "photograph": accuracy(model, processor, args.held_out // 4, f"photograph-{args.seed}"),
    }
    (args.out / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small BLIP of shapes from scratch on a CPU.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model, its processor and accuracy.json")
    add("--start", type=Path, help="folder of an earlier run to go on from; give another --seed, too")
    add("--vision-steps", type=int, default=1000, help="optimizer steps on the image encoder alone")
    add("--steps", type=int, default=2000, help="optimizer steps on the whole model")
    add("--scenes", type=int, default=20, help="pictures a step, with five questions each")
    add("--lr", type=float, default=8e-4, help="highest learning rate of the one-cycle schedule")
    add("--seed", type=int, default=0, help="of the weights and the training scenes")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--held-out", type=int, default=4000, help="held-out scenes, each with a question of each type")
    logging.disable_progress_bar()
    train(parser.parse_args())


if __name__ == "__main__":
    main()
