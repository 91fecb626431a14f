"""RMSNorm and LayerNorm. Statistics are float32 whatever the input is; the output has the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewfire.config import NormConfig


class Norm(nn.Module):
    """Normalise the last dimension (`dim` wide) as `config` says. (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, config: NormConfig):
        super().__init__()
        self.config, self.dim = config, dim
        self.weight = nn.Parameter(torch.zeros(dim) if config.offset else torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1.0 if self.config.offset else self.weight
        if self.config.kind == "layer":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, (self.dim,), weight.to(x.dtype), bias, self.config.eps)
        if self.config.offset:
            return (F.rms_norm(x.float(), (self.dim,), None, self.config.eps) * weight.float()).to(x.dtype)
        return F.rms_norm(x.float(), (self.dim,), None, self.config.eps).to(x.dtype) * weight.to(x.dtype)


def normalise(x: Tensor, eps: float) -> Tensor:
    """Weightless RMS norm over the last dimension, float32 inside (Llama 4's q and k)."""
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)
