"""A tile of a matrix product, the inner loop of the kernels that work on one as it is computed."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# So many programs keep most of a large GPU busy; with fewer, smaller tiles are better.
_BUSY = 96


@triton.jit
def tile_of_product(
    x,
    weight,
    rows,
    cols,
    depth,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """x [.., depth] times weight [.., depth] transposed, for some rows of each: float32 [rows, cols].

    `rows` and `cols` must be inside the matrices: to repeat one costs nothing, a mask on every load does.
    """
    k = tl.arange(0, BLOCK_DEPTH)
    x_at = x + rows.to(tl.int64)[:, None] * depth + k[None, :]  # [rows, k]
    weight_at = weight + cols.to(tl.int64)[None, :] * depth + k[:, None]  # [k, cols]
    total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for done in range(0, depth, BLOCK_DEPTH):
        if WHOLE_BLOCKS:
            left, right = tl.load(x_at), tl.load(weight_at)
        else:
            left = tl.load(x_at, mask=k[None, :] < depth - done, other=0.0)
            right = tl.load(weight_at, mask=k[:, None] < depth - done, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_at += BLOCK_DEPTH
        weight_at += BLOCK_DEPTH
    return total


def product_options(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """How a kernel with a `tile_of_product` cuts up x [rows, depth] times weight [cols, depth] transposed."""
    (rows, depth), cols = x.shape, weight.shape[0]
    if x.element_size() == 4:  # on the ordinary units, whose operands are in registers
        block_rows, block_cols, block_depth, warps, stages = (16 if rows <= 16 else 64), 64, 32, 4, 3
    elif rows <= 16:
        block_rows, block_cols, block_depth, warps, stages = 16, 64, 128, 4, 4
    elif triton.cdiv(rows, 128) * triton.cdiv(cols, 128) < _BUSY:
        block_rows, block_cols, block_depth, warps, stages = 64, 64, 64, 4, 4
    else:
        block_rows, block_cols, block_depth, warps, stages = 128, 128, 64, 8, 3
    return {
        "PRECISION": precision_of(x),
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLS": block_cols,
        "BLOCK_DEPTH": block_depth,
        "WHOLE_BLOCKS": depth % block_depth == 0,
        "num_warps": warps,
        "num_stages": stages,
    }


def precision_of(x: Tensor) -> str:
    """Triton's name for the precision of products of x's type: float32 is not cut down to TF32."""
    return "ieee" if x.element_size() == 4 else "tf32"
