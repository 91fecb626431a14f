"""Where the values of hub tensors lie in our parameters, as data that works in both directions.

Owns `HubTensor`, `Piece` and the small language (`Rule`) in which a family file writes its table. Knows no family,
imports no tensor library: `part` works on anything with reshape, slicing and swapaxes (torch, numpy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fewfire.config import LayerConfig, ModelConfig
from fewfire.errors import ConfigError
from fewfire.families.parameters import Shapes, parameters


class Piece(NamedTuple):
    """A region of a hub tensor that is one of our parameters, or its row `row` (an expert of a bank).

    The hub values (in `HubTensor.view`, where it has one) are sliced along `axis` by `span` (start, stop, step; None
    takes all), then their last two axes are swapped if `transpose`.
    """

    ours: str
    row: int | None = None
    axis: int = 0
    span: tuple[int, int, int] | None = None
    transpose: bool = False


class HubTensor(NamedTuple):
    """One tensor of a hub checkpoint: its pieces cover every value once. `view`: the shape in which pieces slice."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    view: tuple[int, ...] | None = None


def part(values: Any, tensor: HubTensor, piece: Piece) -> Any:
    """The view of hub `values` (an array of `tensor.shape`) that holds `piece`, shaped like our parameter (or its row).

    Reading copies from it (`ours.copy_(part(...))`), writing copies to it (`part(...).copy_(ours)`): bitwise both ways.
    `values` must be contiguous where `tensor.view` is set.
    """
    if tensor.view is not None:
        values = values.reshape(tensor.view)
    if piece.span is not None:
        values = values[(slice(None),) * piece.axis + (slice(*piece.span),)]
    return values.swapaxes(-1, -2) if piece.transpose else values


class Rule(NamedTuple):
    """How one hub name stands to our names, relative to their layer.

    Several `ours` are fused along the output axis, one after the other or, if `interleaved`, alternating. `{e}` in
    `hub`: one hub tensor per expert. `transpose`: the hub stores (in, out). `flat`: the hub folds the expert axis into
    the next one (DBRX).
    """

    hub: str
    ours: str | tuple[str, ...]
    transpose: bool = False
    interleaved: bool = False
    flat: bool = False


Rules = tuple[Rule, ...]


def linear(hub: str, ours: str) -> Rules:
    """Rules for the weight and, where our side has one, the bias."""
    return (Rule(f"{hub}.weight", f"{ours}.weight"), Rule(f"{hub}.bias", f"{ours}.bias"))


def rules(**pairs: str) -> Rules:
    """Rules for weights and biases: keyword = our name with __ for dots, value = the hub's name."""
    return tuple(rule for ours, hub in pairs.items() for rule in linear(hub, ours.replace("__", ".")))


class Stack(NamedTuple):
    """One stack of layers: prefixes with {l}, and the rules of a layer by what it is."""

    hub: str
    ours: str
    layers: tuple[LayerConfig, ...]
    rules: Callable[[LayerConfig], Rules]


def build(config: ModelConfig, top: Rules, stacks: Iterable[Stack]) -> list[HubTensor]:
    """Every hub tensor of `config`: `top` rules, then each stack's, layer by layer. Rules without parameters drop out.

    Raises: ConfigError if a parameter of ours has no hub tensor: the family cannot express it.
    """
    shapes = parameters(config)
    tensors = _apply(top, "", "", shapes)
    for stack in stacks:
        for index, layer in enumerate(stack.layers):
            hub, ours = stack.hub.format(l=index), stack.ours.format(l=index)
            tensors += _apply(stack.rules(layer), hub, ours, shapes)
    covered = {piece.ours for tensor in tensors for piece in tensor.pieces}
    missing = [name for name in shapes if name not in covered]
    if missing:
        raise ConfigError(
            f"family {config.family} has no hub tensor for {missing[0]}; export as a family that has, or as a pack"
        )
    return tensors


def _apply(table: Rules, hub: str, ours: str, shapes: Shapes) -> list[HubTensor]:
    tensors: list[HubTensor] = []
    for rule in table:
        names = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        found = [ours + name for name in names if ours + name in shapes]
        if len(found) == len(names):
            tensors += _expand(rule, hub + rule.hub, found, shapes)
        else:
            assert not found, f"{hub + rule.hub} fuses {names}, but only {found} exist"
    return tensors


def _expand(rule: Rule, name: str, ours: list[str], shapes: Shapes) -> list[HubTensor]:
    """The hub tensors of one rule: one, or one per expert."""
    if "{e}" not in name:
        return [_fuse(rule, name, ours, [shapes[each] for each in ours], None)]
    rows = [shapes[each][1:] for each in ours]
    experts = range(shapes[ours[0]][0])
    if len(ours) == 1 and not rule.transpose:  # the common case, kept cheap: 120,000 of them in Switch-C
        head, tail = name.split("{e}")
        return [HubTensor(f"{head}{e}{tail}", rows[0], (Piece(ours[0], e),)) for e in experts]
    return [_fuse(rule, name.replace("{e}", str(e)), ours, rows, e) for e in experts]


def _fuse(rule: Rule, name: str, ours: list[str], parts: list[tuple[int, ...]], row: int | None) -> HubTensor:
    """One hub tensor from `ours` (their row `row`), whose shapes are `parts`."""
    if rule.transpose:
        parts = [(*part[:-2], part[-1], part[-2]) for part in parts]
    shape = parts[0]
    pieces = [Piece(each, row, transpose=rule.transpose) for each in ours]
    if len(ours) > 1:
        # The output axis: the last of a bias and of a transposed weight, the last but one of a weight.
        axis = len(shape) - (1 if rule.transpose or name.endswith("bias") else 2)
        width = sum(part[axis] for part in parts)
        start = 0
        for position, part in enumerate(parts):
            span = (position, width, len(ours)) if rule.interleaved else (start, start + part[axis], 1)
            pieces[position] = pieces[position]._replace(axis=axis, span=span)
            start += part[axis]
        shape = (*shape[:axis], width, *shape[axis + 1 :])
    if rule.flat:
        return HubTensor(name, (shape[0] * shape[1], *shape[2:]), tuple(pieces), shape)
    return HubTensor(name, shape, tuple(pieces))


# -------------------------------------------------------------------------------- names that many families share

LLAMA_TOP: Rules = (
    Rule("model.embed_tokens.weight", "embed.weight"),
    *linear("model.norm", "norm"),
    *linear("lm_head", "head"),
)
LLAMA_ATTENTION: Rules = (
    *rules(attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
    *rules(attention__q="self_attn.q_proj", attention__k="self_attn.k_proj", attention__v="self_attn.v_proj"),
    *rules(attention__out="self_attn.o_proj", attention__q_norm="self_attn.q_norm"),
    *rules(attention__k_norm="self_attn.k_norm"),
)
LLAMA_FFN: Rules = rules(ffn__gate="mlp.gate_proj", ffn__up="mlp.up_proj", ffn__down="mlp.down_proj")


def experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Rules:
    """One hub tensor per expert and matrix, under `prefix`.{e}."""
    return (
        Rule(f"{prefix}.{{e}}.{gate}.weight", "ffn.experts.gate"),
        Rule(f"{prefix}.{{e}}.{up}.weight", "ffn.experts.up"),
        Rule(f"{prefix}.{{e}}.{down}.weight", "ffn.experts.down"),
    )


# Qwen's and DeepSeek's block: mlp.gate, mlp.experts.{e}, shared experts under one of two names.
QWEN_MOE: Rules = (
    Rule("mlp.gate.weight", "ffn.router.weight"),
    Rule("mlp.gate.e_score_correction_bias", "ffn.router.select_bias"),
    *experts("mlp.experts"),
)
MIXTRAL_MOE: Rules = (
    Rule("block_sparse_moe.gate.weight", "ffn.router.weight"),
    Rule("block_sparse_moe.e_score_correction_bias", "ffn.router.select_bias"),
    *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
)


def shared(name: str) -> Rules:
    """The shared expert's three matrices under mlp.`name` (shared_expert, shared_experts)."""
    return rules(ffn__shared__gate=f"mlp.{name}.gate_proj", ffn__shared__up=f"mlp.{name}.up_proj") + rules(
        ffn__shared__down=f"mlp.{name}.down_proj"
    )


def prefixed(prefix: str, table: Rules) -> Rules:
    """`table` with every hub name under `prefix`."""
    return tuple(rule._replace(hub=prefix + rule.hub) for rule in table)


def decoder(
    config: ModelConfig,
    *tables: Rules | Callable[[LayerConfig], Rules],
    top: Rules = LLAMA_TOP,
    prefix: str = "model.layers.{l}.",
) -> list[HubTensor]:
    """The tensors of a decoder-only model. Each of `tables` holds for all layers, or says what holds for one."""

    def table(layer: LayerConfig) -> Rules:
        return tuple(rule for each in tables for rule in (each(layer) if callable(each) else each))

    return build(config, top, [Stack(prefix, "layers.{l}.", config.layers, table)])
