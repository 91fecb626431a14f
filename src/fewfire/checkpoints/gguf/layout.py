"""Which GGUF tensor holds which of our parameters, and in what order of values; data that works in both directions.

llama.cpp's names are uniform, so one table serves all architectures. H heads, d head width.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from fewfire.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from fewfire.families.parameters import parameters

# Families whose queries and keys llama.cpp stores so that rotated pairs lie side by side.
_PAIRED = ("llama", "mixtral", "granitemoe")
_FUSED_QKV = ("dbrx", "gpt2")
_TOP = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
_LAYER = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.sinks": "attn_sinks.weight",
    "attention.q_down": "attn_q_a",
    "attention.q_down_norm": "attn_q_a_norm",
    "attention.q_up": "attn_q_b",
    "attention.kv_down": "attn_kv_a_mqa",
    "attention.kv_down_norm": "attn_kv_a_norm",
    "attention.kv_up": "attn_kv_b",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
    "ffn.router": "ffn_gate_inp",
    "ffn.router.select_bias": "exp_probs_b.bias",
    "ffn.shared_gate": "ffn_gate_inp_shexp",
    **{f"ffn.shared.{name}": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    **{f"ffn.experts.{name}": f"ffn_{name}_exps.weight" for name in ("gate", "up", "down")},
    **{f"ffn.experts.{name}_bias": f"ffn_{name}_exps.bias" for name in ("gate", "up", "down")},
}
_NORMS = {  # norms that an architecture calls otherwise
    "glm4_moe": {"ffn_norm": "post_attention_norm"},
    "gpt_oss": {"ffn_norm": "post_attention_norm"},
    "dbrx": {"ffn_norm": "attn_output_norm"},
    "grok-1": {"attention_post_norm": "attn_output_norm", "ffn_post_norm": "layer_output_norm"},
}
# Other names for the same tensor, newest first.
SPELLINGS = (("layer_output_norm", "post_ffw_norm"), ("exp_probs_b.bias", "exp_probs_b"))


class Part(NamedTuple):
    """One of our parameters inside a GGUF tensor, in rows. `paired`: number of heads whose rotated pairs lie side by
    side; `latent`: (heads, nope_dim) of MLA's up-projection, of which the file holds `keys` (transposed) or values."""

    ours: str
    paired: int | None = None
    latent: tuple[int, int] | None = None
    keys: bool = False


class Slot(NamedTuple):
    """A GGUF tensor: `shape` outermost first; its `parts` lie behind one another along the first axis."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def plain(self) -> bool:
        """Whether values lie in the file as in the one parameter."""
        return len(self.parts) == 1 and self.parts[0][1:] == (None, None, False)


def as_stored(values: Tensor, part: Part) -> Tensor:
    """A view of our parameter whose values are in the file's order (any strides); writing to it reads the file."""
    if part.paired is not None:
        return values.unflatten(0, (part.paired, 2, -1)).transpose(1, 2)
    if part.latent is not None:
        heads, nope = part.latent
        by_head = values.unflatten(0, (heads, -1))
        return by_head[:, :nope].transpose(1, 2) if part.keys else by_head[:, nope:]
    return values


def slots(config: ModelConfig, names: frozenset[str] | None = None) -> list[Slot]:
    """The GGUF tensors of `config`. `names`: those of a file, which decide between spellings that llama.cpp changed."""
    shapes = parameters(config)
    found: list[Slot] = []
    for ours, shape in shapes.items():
        layer, inner = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)", ours).groups()  # type: ignore[union-attr]
        if layer is None:
            stem, _, kind = inner.rpartition(".")
            found.append(Slot(f"{_TOP[stem]}.{kind}", shape, (Part(ours),)))
        else:
            found += _layer_slots(config, int(layer), inner, ours, shapes, names or frozenset())
    return [_spelled(slot, names) for slot in found]


def _layer_slots(
    config: ModelConfig, layer: int, inner: str, ours: str, shapes: dict[str, tuple[int, ...]], names: frozenset[str]
) -> list[Slot]:
    shape, prefix, mixer = shapes[ours], f"blk.{layer}.", config.layers[layer].mixer
    if inner.startswith(("attention.q.", "attention.k.", "attention.v.")) and config.family in _FUSED_QKV:
        return _fused(prefix, inner, ours, shapes)
    if inner == "attention.kv_up.weight" and isinstance(mixer, LatentAttentionConfig):
        if not names or f"{prefix}attn_k_b.weight" in names:
            return _split_latent(mixer, prefix, ours)
    table = _LAYER | _NORMS.get(config.family, {})
    if inner in table:
        return [Slot(prefix + table[inner], shape, (Part(ours),))]
    stem, _, kind = inner.rpartition(".")
    part = Part(ours)
    if stem in ("attention.q", "attention.k") and config.family in _PAIRED:
        assert isinstance(mixer, AttentionConfig)
        part = Part(ours, paired=mixer.num_heads if stem == "attention.q" else mixer.num_kv_heads)
    if stem == "ffn.shared_gate":
        shape = shape[1:]
    return [Slot(f"{prefix}{table[stem]}.{kind}", shape, (part,))]


def _fused(prefix: str, inner: str, ours: str, shapes: dict[str, tuple[int, ...]]) -> list[Slot]:
    """attn_qkv, once: where its queries are."""
    if not inner.startswith("attention.q."):
        return []
    names = [ours, ours.replace("attention.q.", "attention.k."), ours.replace("attention.q.", "attention.v.")]
    rows = sum(shapes[name][0] for name in names)
    kind = inner.rpartition(".")[2]
    return [Slot(f"{prefix}attn_qkv.{kind}", (rows, *shapes[ours][1:]), tuple(Part(name) for name in names))]


def _split_latent(mixer: LatentAttentionConfig, prefix: str, ours: str) -> list[Slot]:
    """MLA's up-projection as files for absorbed attention have it: keys transposed, values apart."""
    heads, rank, latent = mixer.num_heads, mixer.kv_rank, (mixer.num_heads, mixer.nope_dim)
    keys, values = (heads, rank, mixer.nope_dim), (heads, mixer.value_dim, rank)
    return [
        Slot(f"{prefix}attn_k_b.weight", keys, (Part(ours, latent=latent, keys=True),)),
        Slot(f"{prefix}attn_v_b.weight", values, (Part(ours, latent=latent),)),
    ]


def _spelled(slot: Slot, names: frozenset[str] | None) -> Slot:
    if names is None or slot.name in names:
        return slot
    for spelling in SPELLINGS:
        for current, other in (spelling, spelling[::-1]):
            if current in slot.name and slot.name.replace(current, other) in names:
                return slot._replace(name=slot.name.replace(current, other))
    return slot
