"""The `triton` backend: the engine's ops in Triton kernels, an op per file, kernel and launcher together.

`blip_trace/reference.py` has the meaning of every op. Importing this package imports triton, which
`blip_trace` by itself never does. Where TRITON_INTERPRET=1 was set before, the kernels run on a CPU, slowly.
"""

# In this repository's own folder transformers, which looks for a package `kernels`, imports this one by that
# name. It gets an empty package: an op can be registered only once.
if __name__ == "blip_trace.kernels":
    from .cross_attention import cross_attention
    from .linear import linear
    from .linear_add_norm import linear_add_norm
    from .linear_gelu import linear_gelu
    from .self_attention import self_attention
    from .token_logits import token_logits

    __all__ = [
        "cross_attention",
        "linear",
        "linear_add_norm",
        "linear_gelu",
        "self_attention",
        "token_logits",
    ]
