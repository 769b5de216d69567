"""What ships with the package: a small trained BLIP, with its processor and its model card."""

from pathlib import Path


def blip_shapes_folder() -> Path:
    """The folder of the trained model: `Tracer.from_pretrained` and transformers load it as it is."""
    return Path(__file__).with_name("blip-shapes")
