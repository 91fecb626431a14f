"""Random weights to start training from: the same for the same seed, whatever ran before."""

from __future__ import annotations

import math

import torch
from torch import nn

from fewfire.model.noisy import NoisyRouter


@torch.no_grad()
def initialise(model: nn.Module, num_layers: int, seed: int, std: float = 0.02) -> None:
    """Draw every weight from N(0, std^2), what feeds the residual by std / sqrt(2 layers) (GPT-2); norms 1, biases 0.

    Decay rates keep their constructors' values, noisy gates their zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    gates = {id(p) for module in model.modules() if isinstance(module, NoisyRouter) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if parameter.dim() < 2 or leaf == "a_log" or id(parameter) in gates:
            continue  # norms, biases, sinks keep their constructors' values
        into_residual = leaf == "down" or name.endswith((".out.weight", ".down.weight"))
        parameter.normal_(std=std / math.sqrt(2 * num_layers) if into_residual else std, generator=generator)
