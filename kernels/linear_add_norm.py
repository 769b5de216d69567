"""linear_add_norm: the end of a sublayer. The product is torch's; one kernel does what comes after it, and
gathers the rows that go on, which is how runs fork and how states are restored."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_like, check_matrix, check_rows
from .library import register


@triton.jit
def _add_norm_kernel(
    update,
    bias,
    residual,
    residual_rows,
    update_rows,
    norm_weight,
    norm_bias,
    normed,
    total,
    cols,
    eps,
    BLOCK: tl.constexpr,
):
    """sum[i] = residual[residual_rows[i]] + update[update_rows[i]] + bias and its LayerNorm, a row each."""
    row = tl.program_id(0).to(tl.int64)
    residual_row = row
    if residual_rows is not None:
        residual_row = tl.load(residual_rows + row).to(tl.int64)
    update_row = row
    if update_rows is not None:
        update_row = tl.load(update_rows + row).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < cols
    x = tl.load(update + update_row * cols + c, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual + residual_row * cols + c, mask=inside, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + row * cols + c, x.to(total.dtype.element_ty), mask=inside)
    # All of the row is in registers, so the variance need not be a difference of two large sums.
    centered = tl.where(inside, x - tl.sum(x, 0) / cols, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / cols + eps)
    w = tl.load(norm_weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + c, mask=inside, other=0.0).to(tl.float32)
    y = centered * scale * w + b
    tl.store(normed + row * cols + c, y.to(normed.dtype.element_ty), mask=inside)


def _linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_rows: Tensor | None,
    update_rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    op = "linear_add_norm"
    check_matrix(op, "x", x)
    check_matrix(op, "residual", residual)
    cols = weight.shape[0]
    check_like(op, "weight", weight, x, (cols, x.shape[1]))
    if bias is not None:
        check_like(op, "bias", bias, x, (cols,))
        bias = bias.contiguous()
    check_like(op, "residual", residual, x, (residual.shape[0], cols))
    check_like(op, "norm_weight", norm_weight, x, (cols,))
    check_like(op, "norm_bias", norm_bias, x, (cols,))
    rows, updates = residual.shape[0], x.shape[0]
    if residual_rows is not None:
        check_rows(op, "residual_rows", residual_rows, x)
        rows = residual_rows.shape[0]
    if update_rows is not None:
        check_rows(op, "update_rows", update_rows, x)
        updates = update_rows.shape[0]
    if rows != updates:
        raise ValueError(
            f"blip_trace_triton::{op}: {rows} rows of the residual stream meet {updates} updates; "
            "there must be as many of each."
        )

    update = F.linear(x, weight)
    normed = x.new_empty(rows, cols)
    total = x.new_empty(rows, cols) if return_sum else None
    if normed.numel():
        block = triton.next_power_of_2(cols)
        _add_norm_kernel[(rows,)](
            update,
            bias,
            residual.contiguous(),
            residual_rows,
            update_rows,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            normed,
            total,
            cols,
            eps,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return normed, x.new_empty(0) if total is None else total


linear_add_norm = register(
    "linear_add_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? residual_rows, "
    "Tensor? update_rows, Tensor norm_weight, Tensor norm_bias, float eps, bool return_sum) "
    "-> (Tensor, Tensor)",
    _linear_add_norm,
)
