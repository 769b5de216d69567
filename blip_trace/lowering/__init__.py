"""Hugging Face models to Programs: a file per architecture. The only room, with `hooks`, that knows
transformers' classes."""
