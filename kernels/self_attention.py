"""self_attention: multi-head attention inside each run of a packed batch."""

from __future__ import annotations

from torch import Tensor

from .attention import attend
from .checks import check_matrix, check_prefixes, check_starts
from .library import register


def _self_attention(qkv: Tensor, starts: Tensor, prefixes: Tensor | None, heads: int, causal: bool) -> Tensor:
    op = "self_attention"
    check_matrix(op, "qkv", qkv)
    if heads <= 0 or qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"blip_trace_triton::{op}: qkv of width {qkv.shape[1]} does not hold queries, keys and values of "
            f"{heads} heads."
        )
    runs = check_starts(op, "starts", starts, qkv)
    if prefixes is not None:
        check_prefixes(op, prefixes, qkv, runs)
    query, key, value = qkv.contiguous().chunk(3, 1)
    return attend(query, key, value, starts, starts, prefixes, heads, causal)


self_attention = register(
    "self_attention(Tensor qkv, Tensor starts, Tensor? prefixes, int heads, bool causal) -> Tensor",
    _self_attention,
)
