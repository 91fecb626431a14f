"""Hub configs and tensor tables against transformers' own: what its classes save is read, what we write it accepts.

A tiny random model of each family is saved by transformers; the tensor table must name every tensor of the file, with
its shape, and carry every value to our parameters and back, bit for bit.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewfire import families
from fewfire.families.parameters import parameters

SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
KV = dict(SIZES, num_key_value_heads=2)
MLA = dict(
    SIZES,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    intermediate_size=48,
    first_k_dense_replace=1,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=40.0,
    mscale=0.7,
    mscale_all_dim=0.5,
    beta_fast=32.0,
    beta_slow=1.0,
    original_max_position_embeddings=32,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LONG = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 2.1, 2.2, 2.3],
    short_mscale=1.2, long_mscale=1.3, original_max_position_embeddings=32,
)  # fmt: skip
QWEN = dict(KV, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=64)
VISION = dict(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=32, patch_size=4,
    num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
)  # fmt: skip

# name -> (transformers' config class, its model class, keyword arguments)
CASES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(KV, intermediate_size=48, rope_parameters=LLAMA3)),
    "llama-biased": (
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(KV, intermediate_size=48, attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True),
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "gpt2-by-layer": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=4, n_inner=40,
            scale_attn_by_inverse_layer_idx=True,
        ),
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(KV, intermediate_size=48, num_local_experts=4)),
    "mixtral-window": (
        "MixtralConfig",
        "MixtralForCausalLM",
        dict(KV, intermediate_size=48, num_local_experts=4, sliding_window=8, router_jitter_noise=0.1),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        dict(KV, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40, intermediate_size=64),
    ),
    "qwen2_moe-mixed": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        dict(
            KV, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40, intermediate_size=64,
            use_sliding_window=True, sliding_window=8, mlp_only_layers=[1], norm_topk_prob=True,
        ),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(QWEN, norm_topk_prob=True)),
    "qwen3_moe-mixed": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        dict(QWEN, decoder_sparse_step=2, attention_bias=True),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        dict(
            QWEN, num_hidden_layers=4, shared_expert_intermediate_size=24, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_num_value_heads=4, linear_value_head_dim=8, mlp_only_layers=[2],
        ),
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        dict(KV, intermediate_size=24, num_experts=6, num_experts_per_tok=2, clip_qkv=1.5),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        dict(
            MLA, n_group=4, topk_group=2, topk_method="group_limited_greedy", rope_parameters=YARN,
            attention_bias=True,
        ),
    ),
    "deepseek_v2-lite": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        dict(MLA, q_lora_rank=None, topk_method="greedy"),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        dict(MLA, n_group=2, topk_group=1, rope_parameters=YARN),
    ),
    "deepseek_v3-half": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        dict(MLA, n_group=1, topk_group=1, rope_interleave=False),
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        dict(MLA, n_group=2, topk_group=1, index_n_heads=4, index_head_dim=16, index_topk=4),
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", dict(
        KV, head_dim=16, n_routed_experts=8, moe_intermediate_size=16, intermediate_size=48, attention_bias=True,
        use_qk_norm=True,
    )),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        dict(
            MLA, index_n_heads=4, index_head_dim=16, index_topk=4, indexer_types=["full", "shared", "full"],
            mlp_layer_types=["dense", "sparse", "dense"],
        ),
    ),
    "dbrx": ("DbrxConfig", "DbrxForCausalLM", dict(
        vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=0.5, rope_theta=5e5),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
        rope_parameters=dict(rope_type="default", rope_theta=5e5),
    )),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(
        KV, head_dim=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    )),
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        dict(
            KV, intermediate_size=24, num_local_experts=6, attention_bias=True, lm_head_bias=True,
            rope_parameters=LONG,
        ),
    ),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", dict(
        KV, intermediate_size=24, num_local_experts=6, embedding_multiplier=12.0, logits_scaling=7.0,
        residual_multiplier=0.22, attention_multiplier=0.1, tie_word_embeddings=True,
    )),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", dict(
        KV, head_dim=16, intermediate_size=24, num_local_experts=4, block_size=5, mlp_beta_factor=0.5,
        full_attn_alpha_factor=1.5,
    )),
    "minimax_m2": (
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        dict(KV, head_dim=16, rotary_dim=8, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3),
    ),
    "llama4_text": ("Llama4TextConfig", "Llama4ForCausalLM", dict(
        KV, num_hidden_layers=4, head_dim=16, intermediate_size=24, intermediate_size_mlp=48, num_local_experts=4,
        interleave_moe_layer_step=2, attention_chunk_size=8,
    )),
    "jamba": ("JambaConfig", "JambaForCausalLM", dict(
        KV, num_hidden_layers=4, intermediate_size=24, num_experts=4, attn_layer_period=4, attn_layer_offset=2,
        mamba_d_state=8, mamba_dt_rank=4,
    )),
    "switch_transformers": ("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", dict(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=4, num_heads=4, num_experts=4, expert_capacity=5, router_bias=True,
        decoder_start_token_id=0,
    )),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", dict(
        text_config=dict(QWEN, rope_parameters=dict(
            rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True,
        )),
        vision_config=VISION,
    )),
}  # fmt: skip


class Saved:
    """What transformers wrote: config.json as a dict, and the header and values of its tensors."""

    def __init__(self, folder: Path):
        self.hub = json.loads((folder / "config.json").read_text())
        raw = (folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.values = {
            name: np.frombuffer(raw[8 + size :][slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
            for name, entry in header.items()
            if entry["dtype"] == "F32"
        }


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory) -> Saved:
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(7)
    config_class, model_class, kwargs = CASES[request.param]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**kwargs))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return Saved(folder)


def test_what_transformers_saves_is_read_and_what_we_write_it_accepts(saved):
    from transformers import AutoConfig

    config = families.read_config(saved.hub)
    hub = families.write_config(config)
    assert families.read_config(hub) == config
    theirs = families.read_config(AutoConfig.for_model(**hub).to_dict())
    assert replace(theirs, vision=None) == replace(config, vision=None)
    for key, value in json.loads(config.vision or "{}").items():
        assert json.loads(theirs.vision)[key] == value or key == "vision_config"  # to_dict fills in a dtype


def test_the_table_names_every_tensor_of_the_checkpoint(saved):
    config = families.read_config(saved.hub)
    table = families.match(config, saved.shapes)
    ignored = families.ignored_tensors(config)
    needed = {name: shape for name, shape in saved.shapes.items() if not any(p.fullmatch(name) for p in ignored)}
    assert {tensor.name: tensor.shape for tensor in table} == needed


def test_values_go_to_our_parameters_and_back(saved):
    config = families.read_config(saved.hub)
    table = families.match(config, saved.shapes)
    ours = fill(config, table, saved.values)
    for tensor in table:
        rebuilt = np.full(tensor.shape, np.nan, np.float32)
        for piece in tensor.pieces:
            source = ours[piece.ours] if piece.row is None else ours[piece.ours][piece.row]
            families.part(rebuilt, tensor, piece)[...] = source
        assert np.array_equal(rebuilt, saved.values[tensor.name]), tensor.name


def fill(config, table, values) -> dict[str, np.ndarray]:
    """Our parameters from hub values: every number of ours written exactly once."""
    ours = {name: np.full(shape, np.nan, np.float32) for name, shape in parameters(config).items()}
    for tensor in table:
        for piece in tensor.pieces:
            target = ours[piece.ours] if piece.row is None else ours[piece.ours][piece.row]
            region = families.part(values[tensor.name], tensor, piece)
            assert region.shape == target.shape, (tensor.name, piece)
            assert np.isnan(target).all(), f"{piece.ours} is written twice"
            target[...] = region
    for name, array in ours.items():
        assert not np.isnan(array).any(), f"{name} is not filled"
    return ours
