"""cross_attention: many query rows on few sets of states, which are projected to keys and values once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .attention import attend
from .checks import check_like, check_matrix, check_starts
from .library import register


def _cross_attention(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_starts: Tensor,
    state_starts: Tensor,
    heads: int,
) -> Tensor:
    op = "cross_attention"
    check_matrix(op, "query", query)
    check_matrix(op, "states", states)
    channels, width = query.shape[1], states.shape[1]
    check_like(op, "states", states, query, tuple(states.shape))
    check_like(op, "key_weight", key_weight, query, (channels, width))
    check_like(op, "value_weight", value_weight, query, (channels, width))
    if heads <= 0 or channels % heads:
        raise ValueError(
            f"blip_trace_triton::{op}: a query of width {channels} does not divide into {heads} heads."
        )
    groups = check_starts(op, "query_starts", query_starts, query)
    sets = check_starts(op, "state_starts", state_starts, query)
    if groups != sets:
        raise ValueError(
            f"blip_trace_triton::{op}: query_starts marks {groups} groups and state_starts {sets}; "
            "there must be as many of each."
        )
    key, value = F.linear(states, key_weight), F.linear(states, value_weight)
    return attend(query.contiguous(), key, value, query_starts, state_starts, None, heads, False)


cross_attention = register(
    "cross_attention(Tensor query, Tensor states, Tensor key_weight, Tensor value_weight, "
    "Tensor query_starts, Tensor state_starts, int heads) -> Tensor",
    _cross_attention,
)
