"""From the few dials of `[model]` to a whole `ModelConfig` that its hub family can express."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LstmConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
    Score,
)
from fewfire.errors import ConfigError
from fewfire.train.settings import BalanceSettings, ModelSettings


class _Rule(NamedTuple):
    """How a family routes."""

    score: Score
    renormalize: bool
    select_bias: bool


class _Family(NamedTuple):
    """What a family fixes. `rope_share`: of a head's dimensions. `rule` None: it has no experts."""

    qk_norm: Literal["head", "full"] | None
    rope_share: float
    rule: _Rule | None


_FAMILIES = {
    "llama": _Family(None, 1.0, None),
    "mixtral": _Family(None, 1.0, _Rule("softmax", True, False)),
    "qwen3_moe": _Family("head", 1.0, _Rule("softmax", True, False)),
    "olmoe": _Family("full", 1.0, _Rule("softmax", False, False)),
    "glm4_moe": _Family("head", 0.5, _Rule("sigmoid", True, True)),
}


def build_config(
    settings: ModelSettings, balance: BalanceSettings, *, vocab_size: int, seq_len: int, eos_token_id: int | None
) -> ModelConfig:
    """The model to train. Raises ConfigError where the family has no such part (an expert in llama, a shared
    expert in mixtral, a selection bias in qwen3_moe)."""
    _check_family(settings, balance)
    if settings.family == "lstm_moe":
        return _lstm_moe(settings, vocab_size=vocab_size, seq_len=seq_len, eos_token_id=eos_token_id)
    family = _FAMILIES[settings.family]
    rope = RopeConfig(settings.rope_theta, int(settings.head_dim * family.rope_share))
    heads, kv_heads, width = settings.num_heads, settings.num_kv_heads, settings.head_dim
    attention = AttentionConfig(heads, kv_heads, width, width**-0.5, rope, qk_norm=family.qk_norm)
    dense = LayerConfig(attention, FeedForwardConfig(settings.dense_dim, "silu", True))
    if settings.num_experts == 0:
        layers = (dense,) * settings.num_layers
    else:
        assert family.rule is not None
        router = RouterConfig(
            settings.num_experts,
            settings.top_k,
            family.rule.score,
            renormalize=family.rule.renormalize,
            scale=settings.router_scale,
            select_bias=family.rule.select_bias,
            renormalize_eps=1e-20 if family.rule.score == "sigmoid" else 0.0,
        )
        expert = FeedForwardConfig(settings.expert_dim, "silu", True)
        shared = FeedForwardConfig(settings.shared_dim, "silu", True) if settings.shared_dim else None
        moe = LayerConfig(attention, MoEConfig(router, expert, shared))
        layers = (dense,) * settings.num_dense_layers + (moe,) * (settings.num_layers - settings.num_dense_layers)
    return ModelConfig(
        family=settings.family,
        vocab_size=vocab_size,
        model_dim=settings.model_dim,
        layers=layers,
        norm=NormConfig("rms", settings.norm_eps),
        tied_head=settings.tied_head,
        max_context=settings.max_context or seq_len,
        eos_token_ids=() if eos_token_id is None else (eos_token_id,),
    )


def _lstm_moe(settings: ModelSettings, *, vocab_size: int, seq_len: int, eos_token_id: int | None) -> ModelConfig:
    """Stacked LSTMs, a noisy top-k MoE of two-matrix ReLU experts after each but the last (1701.06538, app. C.1)."""
    router = RouterConfig(
        settings.num_experts,
        settings.top_k,
        "noisy_softmax",
        renormalize=False,
        scale=1.0,
        select_bias=False,
        branches=settings.branches or None,
    )
    lstm, expert = LstmConfig(settings.model_dim), FeedForwardConfig(settings.expert_dim, "relu", False)
    sparse = LayerConfig(lstm, MoEConfig(router, expert))
    return ModelConfig(
        family="fewfire",
        vocab_size=vocab_size,
        model_dim=settings.model_dim,
        layers=(sparse,) * (settings.num_layers - 1) + (LayerConfig(lstm, None),),
        norm=NormConfig("none", 0.0),
        tied_head=settings.tied_head,
        max_context=settings.max_context or seq_len,
        eos_token_ids=() if eos_token_id is None else (eos_token_id,),
        native_format="f32",
    )


def _check_family(settings: ModelSettings, balance: BalanceSettings) -> None:
    family, is_moe = settings.family, settings.num_experts > 0
    problems = [
        (is_moe and family == "llama", "model.num_experts: llama has no experts; set it to 0 or choose qwen3_moe"),
        (
            not is_moe and family != "llama",
            f'model.num_experts is 0, but {family} has experts; set family = "llama" for a dense model',
        ),
        (
            settings.shared_dim > 0 and family != "glm4_moe",
            f"model.shared_dim ({settings.shared_dim}): {family} has no shared expert; set it to 0 or use glm4_moe",
        ),
        (
            settings.num_dense_layers > 0 and family not in ("glm4_moe", "qwen3_moe"),
            f"model.num_dense_layers: every layer of {family} is of one kind; set it to 0 or use qwen3_moe",
        ),
        (
            settings.num_dense_layers >= settings.num_layers and is_moe,
            f"model.num_dense_layers ({settings.num_dense_layers}) leaves no MoE layer of {settings.num_layers}",
        ),
        (
            is_moe and balance.method == "bias" and family != "glm4_moe",
            f'balance.method = "bias" needs a selection bias, which {family} has not; use glm4_moe, or method = "loss"',
        ),
        (
            family == "lstm_moe" and settings.num_layers < 2,
            f"model.num_layers ({settings.num_layers}): lstm_moe has its experts between LSTMs; set it to 2 or more",
        ),
        (
            (settings.branches > 0 or settings.dropout > 0) and family != "lstm_moe",
            f"model.branches and model.dropout are for lstm_moe, not {family}; leave them out",
        ),
        (
            settings.router_scale != 1.0 and family != "glm4_moe",
            f"model.router_scale ({settings.router_scale}): {family} has none; set it to 1.0 or use glm4_moe",
        ),
    ]
    for wrong, message in problems:
        if wrong:
            raise ConfigError(message)
