"""Which experts fire, token by token."""

from __future__ import annotations

import torch

from fewfire.api import Model
from fewfire.routing import Routing

LINES = (
    "    for name, value in sorted(items):",
    "Return the number of bytes that were written to the file.",
)


@torch.inference_mode()
def routes_of(model: Model, line: str) -> list[tuple[str, list[list[int]]]]:
    """(token's text, per MoE layer the chosen expert ids, strongest first) for every token of `line`."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(line)
    layers: dict[int, list[list[int]]] = {}

    def observe(layer: int, routing: Routing) -> None:
        layers[layer] = routing.ids_TK.tolist()

    model.module(torch.tensor([ids]), observe=observe)
    pieces = [model.tokenizer.decode([token]) for token in ids]
    return [(piece, [layers[layer][t] for layer in sorted(layers)]) for t, piece in enumerate(pieces)]
