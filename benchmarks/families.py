"""Which families of models are sampled and trained the fast way, and which the plain one?

    python benchmarks/families.py            # the table of docs/models.md

Each family is tried with a tiny random model of its own class. tests/test_families.py holds the
answers, log-probabilities and gradients of each to transformers' own.
"""
import contextlib
import io
import sys
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from dpo import probe_packing
from sampling import probe_sharing

VOCABULARY = 97
COMMON = {  # of all families; sizes that differ, so that no mistaken reshape can go unnoticed
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
IN_TURN = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_KEYS = {  # later layers use the keys of earlier ones
    **WINDOW, "layer_types": IN_TURN["layer_types"] * 2, "num_hidden_layers": 4,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
LINEAR = {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
OLD = ("head_dim", "num_key_value_heads", "intermediate_size")  # settings that these do not have

FAMILIES = {  # model type: what people know it by, its settings
    "llama": ("Llama 2, 3; SmolLM2; Yi; DeepSeek-R1-Distill", {}),
    "qwen2": ("Qwen2, Qwen2.5", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3-30B-A3B", EXPERTS),
    "mistral": ("Mistral 7B, also v0.1 with its window", WINDOW),
    "mixtral": ("Mixtral", LOCAL_EXPERTS),
    "ministral": ("Ministral", IN_TURN),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma 2", {**IN_TURN, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma 3", {**IN_TURN, "query_pre_attn_scalar": 8}),
    "gemma3n_text": ("Gemma 3n", {**SHARED_KEYS, "intermediate_size": [48] * 4,
                                  "activation_sparsity_pattern": [0.0] * 4}),
    "gemma4_text": ("Gemma 4", {**SHARED_KEYS, "global_head_dim": 16}),
    "phi": ("Phi-1, 2", {}),
    "phi3": ("Phi-3, Phi-4", {}),
    "phimoe": ("Phi-3.5-MoE", {"num_local_experts": 4}),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", IN_TURN),
    "olmoe": ("OLMoE", EXPERTS),
    "cohere": ("Command R", {"logit_scale": 0.1}),
    "cohere2": ("Command R7B, Command A", {**IN_TURN, "logit_scale": 0.1}),
    "granite": ("Granite 3", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "granitemoe": ("Granite 3 MoE", {**LOCAL_EXPERTS, "logits_scaling": 2.0}),
    "granitemoehybrid": ("Granite 4", {**MAMBA, **LOCAL_EXPERTS, "logits_scaling": 2.0,
                                       "shared_intermediate_size": 16,
                                       "layer_types": ["mamba", "attention"]}),
    "exaone4": ("EXAONE 4", IN_TURN),
    "glm4": ("GLM-4", {}),
    "smollm3": ("SmolLM3", {}),
    "seed_oss": ("Seed-OSS", {}),
    "apertus": ("Apertus", {}),
    "stablelm": ("StableLM", {}),
    "nemotron": ("Nemotron, Minitron", {}),
    "nemotron_h": ("Nemotron-H", {}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_h1": ("Falcon-H1", {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32}),
    "falcon_mamba": ("Falcon Mamba", {}),
    "lfm2": ("LFM2", {"layer_types": ["conv", "full_attention"]}),
    "gpt_oss": ("gpt-oss", {**IN_TURN, **LOCAL_EXPERTS}),
    "llama4_text": ("Llama 4", {"num_local_experts": 2, "intermediate_size_mlp": 48,
                                "attention_chunk_size": 8}),
    "qwen3_next": ("Qwen3-Next", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_5_text": ("Qwen3.5", LINEAR),
    "gpt2": ("GPT-2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bloom": ("BLOOM", {"n_head": 4, "n_layer": 2}),
}
WITHOUT = {"falcon": ("head_dim", "intermediate_size"), "falcon_mamba": OLD, "gpt2": OLD,
           "bloom": OLD}


def random_family(name, dtype=torch.float32, **more):
    """A tiny random model of a family, frozen."""
    settings = FAMILIES[name][1] | more
    common = {key: value for key, value in COMMON.items() if key not in WITHOUT.get(name, ())}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**common, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def row(name):
    """The table's row of a family, and what the modules say of it."""
    model = random_family(name)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        ways = [probe_sharing(model) is not None, probe_packing(model)]
    sampling, training = ("fast" if way else "plain" for way in ways)
    return f"| {FAMILIES[name][0]} | `{name}` | {sampling} | {training} |", said.getvalue()


if __name__ == "__main__":
    print("| models | type | sampling | training |\n|---|---|---|---|")
    for name in FAMILIES:
        print(row(name)[0])
