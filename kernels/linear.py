"""linear: x [rows, K] times weight [M, K] transposed, plus bias [M]; the product is torch's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import check_like, check_matrix
from .library import register


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_matrix("linear", "x", x)
    check_like("linear", "weight", weight, x, (weight.shape[0], x.shape[1]))
    if bias is not None:
        check_like("linear", "bias", bias, x, (weight.shape[0],))
    return F.linear(x, weight, bias)


linear = register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear)
