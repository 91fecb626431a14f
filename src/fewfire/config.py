"""What a model is: frozen dataclasses that the planner counts, `model/` builds and `families/` read and write.

Owns the vocabulary of architecture. Knows no file format, no hub spelling, no tensor. Router fields have no
defaults: a guessed `renormalize` is a different model.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

from fewfire.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"]
Score = Literal["softmax", "softmax_selected", "sigmoid", "sigmoid_selected", "sparsemixer", "noisy_softmax"]


def environment(name: str, default: str = "") -> str:
    """The one place where `os.environ` is read. Names in use: FEWFIRE_CACHE, FEWFIRE_ISA, TERM."""
    return os.environ.get(name, default)


def cache_folder() -> Path:
    """Where fewfire keeps what it can make again: FEWFIRE_CACHE, else ~/.cache/fewfire. Not created here."""
    chosen = environment("FEWFIRE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fewfire"


def check(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)


# ---------------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class RopeScaling:
    """How a rope reaches beyond its training length. Fields that a kind does not use stay None.

    Source: notes of each kind in `model/rope.py`.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float
    original_context: int | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of a head's first `dim` dimensions: `half` pairs i, i + dim/2; `interleaved` 2i, 2i + 1."""

    theta: float
    dim: int
    pairing: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class RelativeBiasConfig:
    """T5's learned bias by bucketed distance. Only the first layer of a stack owns the table (`owner`)."""

    num_buckets: int
    max_distance: int
    owner: bool


# ------------------------------------------------------------------------------------------------------- mixers


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention. Order: project, add bias, `qk_norm`, clip, rope, l2 norm, scores * `scale`, cap, mask.

    `window` W: key j is visible to query i iff i-W < j <= i. `chunk` C: iff j <= i and j//C == i//C.
    `qk_norm`: `head` normalises each head, `full` the whole projection, `l2` weightless after the rope (Llama 4).
    `output_gate`: q projects to twice its width, the second half of each head gates the output (Qwen3-Next).
    `temperature`: (scale, floor) of Llama 4's position-dependent query scaling, on layers without rope.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None
    window: int | None = None
    chunk: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "full", "l2"] | None = None
    clip_qkv: float | None = None
    logit_cap: float | None = None
    sinks: bool = False
    output_gate: bool = False
    temperature: tuple[float, float] | None = None
    relative_bias: RelativeBiasConfig | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        check(
            self.num_heads > 0 and self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads}); make it one",
        )
        if self.rope is not None:
            check(
                0 < self.rope.dim <= self.head_dim and self.rope.dim % 2 == 0,
                f"rope dim ({self.rope.dim}) must be even and at most head_dim ({self.head_dim})",
            )


@dataclass(frozen=True)
class IndexerConfig:
    """DeepSeek sparse attention's indexer: picks the `top_k` cached tokens a query may see.

    `shared`: no indexer of its own, the choice of the layer before is reused.
    """

    num_heads: int
    head_dim: int
    top_k: int
    pairing: Literal["half", "interleaved"]
    shared: bool = False


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (MLA). The cache holds `kv_rank + rope_dim` numbers a token, whatever the heads.

    `q_rank` None: queries come from one full projection. `latent_eps` is the eps of the latents' norms.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: RopeConfig
    bias: bool = False
    latent_eps: float = 1e-6
    indexer: IndexerConfig | None = None


@dataclass(frozen=True)
class DeltaNetConfig:
    """Gated delta net (Qwen3-Next): linear attention with a decaying state of key_dim x value_dim per value head.

    `activation` follows the convolution.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    activation: Activation = "silu"


@dataclass(frozen=True)
class LightningConfig:
    """MiniMax-Text-01's linear attention: fixed decay per head, state head_dim squared. `activation`: of q, k, v."""

    num_heads: int
    head_dim: int
    activation: Activation = "silu"


@dataclass(frozen=True)
class MambaConfig:
    """Jamba's Mamba-1 mixer with norms on dt, B and C. `activation` follows the convolution."""

    inner_dim: int
    state_dim: int
    conv_kernel: int
    dt_rank: int
    conv_bias: bool
    proj_bias: bool
    activation: Activation = "silu"


@dataclass(frozen=True)
class LstmConfig:
    """One LSTM layer (the 2017 language model)."""

    hidden_dim: int


Mixer = AttentionConfig | LatentAttentionConfig | DeltaNetConfig | LightningConfig | MambaConfig | LstmConfig

# ------------------------------------------------------------------------------------------------- feed-forward


@dataclass(frozen=True)
class FeedForwardConfig:
    """Two matrices (`gated` False: down(act(up x))) or three (down(act(gate x) * up x)).

    `swiglu_clamped` (gpt-oss): gate <= limit, |up| <= limit, (up + 1) * gate * sigmoid(alpha * gate).
    """

    hidden_dim: int
    activation: Activation
    gated: bool
    bias: bool = False
    clamp: tuple[float, float] | None = None  # (alpha, limit)

    def __post_init__(self) -> None:
        check(self.hidden_dim > 0, f"a feed-forward width must be positive, not {self.hidden_dim}")
        check(
            (self.activation == "swiglu_clamped") == (self.clamp is not None),
            "activation swiglu_clamped and clamp=(alpha, limit) go together",
        )


@dataclass(frozen=True)
class GroupConfig:
    """Group-limited routing: experts lie in `num_groups`; only the `top_groups` best-scored groups take part.

    `score`: a group's score is its `max` (DeepSeek-V2, masked experts score 0) or the sum of its best two
    (`top2_sum`, DeepSeek-V3, masked experts score -inf).
    """

    num_groups: int
    top_groups: int
    score: Literal["max", "top2_sum"]


@dataclass(frozen=True)
class RouterConfig:
    """Who picks experts and how their outputs are weighted. No field that changes the mathematics has a default.

    `score`: softmax | sigmoid over all experts, then top-k of the scores; `*_selected`: top-k of the logits, then
    softmax | sigmoid over the chosen ones; `sparsemixer`: Phi-3.5's two masked softmaxes (`jitter` is its
    threshold); `noisy_softmax`: 2017, noise in training, softmax over the chosen ones.
    `renormalize`: chosen weights are divided by their sum (+ `renormalize_eps`), then multiplied by `scale`.
    `select_bias`: a per-expert float32 buffer added for choosing, never in the weights (DeepSeek-V3).
    `bias`: the projection has one (gpt-oss). `weight_on`: `output` or `input` of the expert (Llama 4).
    `capacity`: most tokens per sequence an expert takes, by position (Switch); None is dropless.
    `branches`: first level of a hierarchical router (2017), sqrt(top_k) chosen at each level; None is flat.
    """

    num_experts: int
    top_k: int
    score: Score
    renormalize: bool
    scale: float
    select_bias: bool
    bias: bool = False
    groups: GroupConfig | None = None
    weight_on: Literal["output", "input"] = "output"
    renormalize_eps: float = 0.0
    jitter: float = 0.0
    capacity: int | None = None
    branches: int | None = None

    def __post_init__(self) -> None:
        check(self.num_experts > 0, f"num_experts ({self.num_experts}) must be at least 1")
        check(self.top_k > 0, f"top_k ({self.top_k}) must be at least 1")
        check(
            self.top_k <= self.num_experts,
            f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts}); set top_k to {self.num_experts} or less",
        )
        if self.groups is not None:
            groups = self.groups
            check(
                self.num_experts % groups.num_groups == 0 and 0 < groups.top_groups <= groups.num_groups,
                f"groups ({groups.num_groups}, top {groups.top_groups}) must divide num_experts ({self.num_experts})",
            )
            check(
                self.top_k <= self.num_experts // groups.num_groups * groups.top_groups,
                f"top_k ({self.top_k}) exceeds the experts of {groups.top_groups} groups; allow more groups",
            )
        if self.branches is not None:
            level = math.isqrt(self.top_k)
            check(
                self.branches > 0 and self.num_experts % self.branches == 0,
                f"branches ({self.branches}) must divide num_experts ({self.num_experts})",
            )
            check(
                level * level == self.top_k and level <= min(self.branches, self.num_experts // self.branches),
                f"top_k ({self.top_k}) must be a square, its root at most {self.branches} branches and their size",
            )


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts, all of one shape, and what every token passes besides them.

    `shared`: one always-on feed-forward (several shared experts are one of the summed width); `shared_gate`:
    its output is multiplied by sigmoid(a learned projection of x to 1).
    """

    router: RouterConfig
    expert: FeedForwardConfig
    shared: FeedForwardConfig | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        check(self.shared is not None or not self.shared_gate, "shared_gate needs a shared expert")


# -------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class NormConfig:
    """`rms` or `layer` norm. `offset`: the weight w is applied as 1 + w (Qwen3-Next). `bias`: LayerNorm's.

    `none`: the model has no norms at all (the 2017 LSTM stack).
    """

    kind: Literal["rms", "layer", "none"]
    eps: float
    bias: bool = False
    offset: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """One block: mixer, then feed-forward (None: the 2017 model's last LSTM). `cross` attends to the encoder."""

    mixer: Mixer | None
    ffn: FeedForwardConfig | MoEConfig | None
    cross: AttentionConfig | None = None


@dataclass(frozen=True)
class MtpConfig:
    """Multi-token-prediction layers that a checkpoint stores and plain decoding does not use: counted apart."""

    num_layers: int
    parameters: int


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `family` is the hub `model_type`; `fewfire` where none fits.

    `embed_scale` and `logit_scale` multiply; `residual_scale` multiplies what a block adds. `sandwich`: norms
    after the sub-blocks too (Grok-1). `learned_positions`: rows of a position table. `encoder`: layers of an
    encoder, then `layers` are the decoder's. `native_format`: the format of the published checkpoint's experts.
    `normed_residual`: MiniMax-Text-01 adds to the normed input: (alpha, beta) of full attention, of linear attention
    and of the feed-forward. `vision`: the hub's description of a vision tower, as JSON text: recorded so that it is
    written back and that images get a clear error; nothing runs it. `ignored`: keys that the user told us to ignore.
    """

    family: str
    vocab_size: int
    model_dim: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    tied_head: bool
    max_context: int
    encoder: tuple[LayerConfig, ...] = ()
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    residual_scale: float = 1.0
    sandwich: bool = False
    normed_residual: tuple[float, ...] | None = None
    learned_positions: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    mtp: MtpConfig | None = None
    native_format: str = "bf16"
    vision: str | None = None
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self.vocab_size > 0, f"vocab_size ({self.vocab_size}) must be positive")
        check(self.model_dim > 0, f"model_dim ({self.model_dim}) must be positive")
        check(len(self.layers) > 0, "a model needs at least one layer; set num_layers to 1 or more")
        check(self.max_context > 0, f"max_context ({self.max_context}) must be positive")

    @cached_property
    def moe_layers(self) -> tuple[tuple[str, int, MoEConfig], ...]:
        """(stack, layer index, MoE) of every MoE layer; stack is `encoder` or `decoder`."""
        stacks = (("encoder", self.encoder), ("decoder", self.layers))
        return tuple(
            (stack, index, layer.ffn)
            for stack, layers in stacks
            for index, layer in enumerate(layers)
            if isinstance(layer.ffn, MoEConfig)
        )

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)


@dataclass(frozen=True)
class RoutingProfile:
    """What routing was measured to do on somebody's text: what `plan` receives instead of assuming uniform routing.

    `counts` maps a layer index to how often each expert was among the top-k, over `num_tokens` tokens. `cache_curve`:
    (share of experts in memory, hit rate of decode), both rising; empty where no order of tokens was recorded.
    """

    num_experts: int
    top_k: int
    num_tokens: int
    counts: dict[int, tuple[int, ...]]
    cache_curve: tuple[tuple[float, float], ...] = ()

    def hit_rate(self, share: float) -> float | None:
        """Hit rate with `share` of all experts in memory, between the curve's points; None without a curve.

        Below its first point the rate is in proportion: nothing in memory hits nothing.
        """
        if not self.cache_curve:
            return None
        points = [(0.0, 0.0), *self.cache_curve]
        for (low, low_rate), (high, high_rate) in pairwise(points):
            if share <= high:
                return low_rate + (high_rate - low_rate) * max(0.0, share - low) / (high - low)
        return points[-1][1]
