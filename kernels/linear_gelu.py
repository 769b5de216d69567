"""linear_gelu: GELU (the exact one) of a linear layer, taken while a tile of the product is in registers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_like, check_matrix
from .library import register
from .product import product_options, tile_of_product


@triton.jit
def _gelu(x):
    """x Phi(x), Phi the normal distribution function: max(x, 0) - |x| Phi(-|x|), to 2.5e-7.

    Phi(-a) is exp(-a^2 / 2) p(t) with t = 1 / (1 + 0.225 a); p is that of the CPU kernels. There is no branch
    in it, as there is in the library's erf, so that many elements are under way at a time. The product
    vanishes before a = 14, where a is held so that infinity gives 0 too.
    """
    a = tl.minimum(tl.abs(x), 14.0, propagate_nan=tl.PropagateNan.ALL)
    t = 1.0 / (a * 0.225 + 1.0)
    p = t * 0.7873265 - 1.4971533
    p = p * t + 1.6907262
    p = p * t - 0.7970857
    p = p * t + 0.34705529
    p = p * t - 0.030868985
    return tl.maximum(x, 0.0) - a * p * tl.exp2(a * a * -0.72134752)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile [rows, cols]."""
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _finish(product, bias, out, rows, cols, row_count, col_count):
    """Store GELU(product + bias) at some rows and columns of `out`."""
    x = product + tl.load(bias + cols, mask=cols < col_count, other=0.0).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * col_count + cols[None, :]
    inside = (rows < row_count)[:, None] & (cols < col_count)[None, :]
    tl.store(at, _gelu(x).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_count"])
def _linear_gelu_kernel(
    x,
    weight,
    bias,
    out,
    row_count,
    col_count,
    depth,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    # Programs side by side share rows of x, and all of them together read the weight from the cache.
    blocks = tl.cdiv(col_count, BLOCK_COLS)
    rows = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_col = tl.program_id(0) % blocks * BLOCK_COLS
    cols = first_col + tl.arange(0, BLOCK_COLS)
    product = tile_of_product(
        x,
        weight,
        tl.minimum(rows, row_count - 1),
        tl.minimum(cols, col_count - 1),
        depth,
        PRECISION,
        BLOCK_DEPTH,
        WHOLE_BLOCKS,
    )
    # A quarter at a time: GELU's intermediate values of a whole tile would take so many registers that one
    # program alone filled a multiprocessor, with none to multiply while it is at its GELU.
    QUARTER: tl.constexpr = BLOCK_COLS // 4
    cols = first_col + tl.arange(0, QUARTER)
    left, right = _halves(product)
    for half in tl.static_range(2):
        first, second = _halves(left if half == 0 else right)
        _finish(first, bias, out, rows, cols + half * 2 * QUARTER, row_count, col_count)
        _finish(second, bias, out, rows, cols + (half * 2 + 1) * QUARTER, row_count, col_count)


def _fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x weight^T + bias) by the kernel: x [rows, K], weight [M, K], bias [M], result [rows, M]."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    (rows, depth), cols = x.shape, weight.shape[0]
    out = x.new_empty(rows, cols)
    options = product_options(x, weight)
    grid = (triton.cdiv(rows, options["BLOCK_ROWS"]) * triton.cdiv(cols, options["BLOCK_COLS"]),)
    if out.numel():
        _linear_gelu_kernel[grid](x, weight, bias, out, rows, cols, depth, **options)
    return out


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    check_matrix("linear_gelu", "x", x)
    check_like("linear_gelu", "weight", weight, x, (weight.shape[0], x.shape[1]))
    check_like("linear_gelu", "bias", bias, x, (weight.shape[0],))
    if x.dtype == torch.float32:
        # Without tensor cores nearly all of the time goes into the product: torch's library is made for these
        # units too, Triton's compiler is not, and one more pass over the result is little next to that.
        return F.gelu(F.linear(x, weight, bias))
    return _fused(x, weight, bias)


linear_gelu = register("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", _linear_gelu)
