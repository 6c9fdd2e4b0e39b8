"""The table of families: what their configurations mean and how their tensors are called.

A row for each ``model_type``. A family that differs from a known one only in names, biases,
widths or windows is a few lines here; nothing else has to know of it.
"""

from __future__ import annotations

from dataclasses import replace

from rope_export.pretrained import statements as say
from rope_export.pretrained.family import Family, Tensors

_LLAMA = Family(
    "Llama 1, 2, 3, 3.1, and most models built like them",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_GLM = Family(
    "GLM-4-9B, GLM-Edge",
    layout="interleaved",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    qkv_bias="attention_bias",
)
_QWEN2 = Family(
    "Qwen2, Qwen2.5",
    defaults={"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    window=say.qwen,
    qkv_bias=True,
    idle=("max_window_layers",),
)
_QWEN3 = replace(
    _LLAMA,
    models="Qwen3",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_window_layers": 28,
        "sliding_window": 4096,
    },
    window=say.qwen,
    norm=say.rms(),
    idle=("max_window_layers",),
)
_GEMMA = replace(
    _LLAMA,
    models="Gemma",
    defaults={"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256},
    refuses=say.bidirectional,
)
_GEMMA2_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3 = replace(
    _GEMMA,
    models="Gemma 3",
    defaults=_GEMMA2_DEFAULTS | {"rope_theta": 1000000.0},
    rope=say.gemma3_rope,
    window=say.with_types(say.GEMMA3_SLIDES),
    norm=say.rms(unit_offset=True),
    scale=say.from_scalar,
    # Of the layers of one kind, or spelt out in rope_parameters.
    idle=("rope_theta", "rope_scaling", "rope_local_base_freq"),
)
_CHATGLM = Family(
    "ChatGLM3, GLM-4 (remote code)",
    source="THUDM/chatglm3-6b, modeling_chatglm.py",
    tensors=Tensors(
        home="layers.{layer}.self_attention.",
        qkv="query_key_value",
        o="dense",
        others=("rotary_pos_emb.inv_freq",),
    ),
    layout="interleaved",
    spelled={
        "num_hidden_layers": ("num_layers",),
        "num_key_value_heads": ("multi_query_group_num",),
        "head_dim": ("kv_channels",),
        "max_position_embeddings": ("seq_length",),
    },
    rope=say.chatglm_rope,
    refuses=say.chatglm_refuses,
    qkv_bias=("add_bias_linear", "add_qkv_bias"),
    out_bias="add_bias_linear",
    idle=("original_rope",),
)
_DEEPSEEK = Family(
    "DeepSeek-V2, V2-Lite, V2.5",
    layout="interleaved",
    defaults={"q_lora_rank": 1536},
    rope=say.latent_rope,
    latent=say.latent,
    scale=say.latent_scale,
    head_dim=lambda f: f.integer("qk_nope_head_dim") + f.integer("qk_rope_head_dim"),
    out_bias="attention_bias",
    refuses=say.latent_refuses,
)
_OLMO2 = replace(
    _LLAMA, models="OLMo 2", defaults={"rms_norm_eps": 1e-5}, norm=say.rms(over="projection")
)
_MISTRAL = replace(
    _LLAMA,
    models="Mistral 7B, Nemo, Small",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    window=say.in_every_layer,
    qkv_bias=False,
    out_bias=False,
)
_QWEN2_VL = replace(
    _QWEN2,
    head_dim=say.hidden_over_heads,
    models="Qwen2-VL's language model, M-RoPE",
    defaults={
        **_QWEN2.defaults,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "max_window_layers": 80,
    },
)

FAMILIES: dict[str, Family] = {
    "baichuan": Family(
        "Baichuan 7B, Baichuan2 7B",
        source="baichuan-inc/Baichuan2-7B-Base, modeling_baichuan.py",
        tensors=Tensors(qkv="W_pack"),
        refuses=say.baichuan_refuses,
    ),
    "chatglm": _CHATGLM,
    "chatglm2": replace(
        _CHATGLM,
        models="ChatGLM2, whose 32k variant divides positions",
        source="THUDM/chatglm2-6b-32k, modeling_chatglm.py",
        rope=say.chatglm2_rope,
    ),
    "cohere": Family(
        "Command R",
        layout="interleaved",
        defaults={"rope_theta": 500000.0},
        norm=say.layer_norm("use_qk_norm", over="each_head"),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        layout="interleaved",
        defaults={"sliding_window": 4096},
        rotates=say.cohere2_rotates,
        window=say.COHERE2_WINDOW,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "cwm": replace(
        _MISTRAL,
        models="CWM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": 8192,
            "rope_theta": 1000000.0,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
        window=say.with_types(say.all_but_every_fourth_from_the_first),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": replace(_DEEPSEEK, models="DeepSeek-V3, R1"),
    "ernie4_5": replace(
        _LLAMA,
        models="ERNIE 4.5",
        layout="interleaved",
        defaults={"num_key_value_heads": 2, "head_dim": 128, "rope_theta": 500000.0},
        qkv_bias="use_bias",
        out_bias="use_bias",
    ),
    "exaone4": Family(
        "EXAONE 4",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "rms_norm_eps": 1e-5},
        rotates=say.exaone4_rotates,
        window=say.EXAONE4_WINDOW,
        norm=say.rms(),
    ),
    "falcon": Family(
        "Falcon 7B, 40B, 180B, Falcon2",
        tensors=Tensors(
            home="h.{layer}.self_attention.", qkv="query_key_value", o="dense", order="grouped"
        ),
        spelled={
            "num_attention_heads": ("num_attention_heads", "n_head"),
            "num_hidden_layers": ("num_hidden_layers", "n_layer"),
            "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
        },
        defaults={"max_position_embeddings": 2048},
        kv_heads=say.falcon_kv_heads,
        head_dim=say.hidden_over_heads,
        qkv_bias="bias",
        out_bias="bias",
        refuses=say.falcon_refuses,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        models="Gemma 2",
        defaults={**_GEMMA2_DEFAULTS, "attn_logit_softcapping": 50.0},
        window=say.with_types(say.every_other),
        scale=say.from_scalar,
        softcap="attn_logit_softcapping",
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "glm": _GLM,
    "glm4": replace(_GLM, models="GLM-4-0414, GLM-Z1"),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia",
        tensors=Tensors(
            home="layers.{layer}.attention.",
            qkv="query_key_value",
            o="dense",
            order="grouped",
            others=("bias", "masked_bias", "rotary_emb.inv_freq"),
        ),
        spelled={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
        head_dim=say.hidden_over_heads,
        rope=say.neox_rope,
        defaults={"partial_rotary_factor": 0.25, "attention_bias": True},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "gpt_oss": replace(
        _LLAMA,
        models="gpt-oss",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "rope_theta": 150000.0,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        window=say.with_types(say.every_other),
        sinks=True,
    ),
    "gptj": Family(
        "GPT-J",
        tensors=Tensors(home="h.{layer}.attn.", o="out_proj", others=("bias", "masked_bias")),
        layout="interleaved",
        spelled={
            "hidden_size": ("n_embd",),
            "num_attention_heads": ("n_head",),
            "num_hidden_layers": ("n_layer",),
            "max_position_embeddings": ("n_positions",),
        },
        defaults={"rotary_dim": 64, "max_position_embeddings": 2048},
        head_dim=say.hidden_over_heads,
        rope=say.gptj_rope,
    ),
    "granite": replace(
        _LLAMA, models="Granite 3", scale=lambda f: f.number("attention_multiplier", 1.0)
    ),
    "helium": Family(
        "Helium",
        layout="interleaved",
        defaults={"num_key_value_heads": 20, "head_dim": 128, "rope_theta": 100000.0},
        qkv_bias="attention_bias",
    ),
    "internlm2": Family(
        "InternLM2, InternLM2.5",
        source="internlm/internlm2-7b, modeling_internlm2.py",
        tensors=Tensors(home="layers.{layer}.attention.", qkv="wqkv", o="wo", order="grouped"),
        qkv_bias="bias",
        out_bias="bias",
    ),
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": Family(
        "Mixtral",
        defaults={"num_key_value_heads": 8, "rope_theta": 1000000.0},
        window=say.in_every_layer,
    ),
    "nemotron": replace(
        _LLAMA, models="Nemotron-4, Minitron", defaults={"partial_rotary_factor": 0.5}
    ),
    "olmo": replace(_LLAMA, models="OLMo without clip_qkv"),
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2,
        models="OLMo 3",
        defaults={**_OLMO2.defaults, "sliding_window": 4096, "rope_theta": 500000.0},
        rope=say.olmo3_rope,
        window=say.OLMO3_WINDOW,
        idle=("rope_theta", "rope_scaling"),  # of the layers of one kind
    ),
    "phi": Family(
        "Phi-1.5, Phi-2",
        tensors=Tensors(o="dense", q_norm="q_layernorm", k_norm="k_layernorm"),
        defaults={"partial_rotary_factor": 0.5},
        norm=say.layer_norm("qk_layernorm", bias=True),
        qkv_bias=True,
        out_bias=True,
    ),
    "phi3": Family(
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        tensors=Tensors(qkv="qkv_proj"),
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
        rope=say.phi3_rope,
        window=say.in_every_layer,
        idle=("full_attn_mod",),
    ),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2,
        models="Qwen1.5-MoE, Qwen2-MoE",
        defaults={**_QWEN2.defaults, "num_key_value_heads": 16, "qkv_bias": True},
        window=say.qwen2_moe,
        qkv_bias="qkv_bias",
    ),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3,
        models="Qwen3-MoE",
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        window=say.in_every_layer_if_used,
    ),
    "roformer": Family(
        "RoFormer",
        tensors=Tensors(
            home="layer.{layer}.attention.",
            q="self.query",
            k="self.key",
            v="self.value",
            o="output.dense",
            others=("output.LayerNorm.weight", "output.LayerNorm.bias"),
        ),
        layout="interleaved",
        defaults={"max_position_embeddings": 1536},
        head_dim=say.hidden_over_heads,
        rope=say.roformer_rope,
        qkv_bias=True,
        out_bias=True,
        causal=False,
        refuses=say.roformer_refuses,
    ),
    "smollm3": replace(
        _LLAMA,
        models="SmolLM3",
        defaults={"num_key_value_heads": 4, "rope_theta": 2000000.0},
        rotates=say.rotates,
        window=say.smollm3_window,
        idle=("no_rope_layer_interval",),
    ),
    "stablelm": Family(
        "StableLM 2, StableLM 3B, 12B",
        tensors=Tensors(q_norm="q_layernorm.norms.*", k_norm="k_layernorm.norms.*"),
        defaults={
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "layer_norm_eps": 1e-5,
        },
        spelled={"partial_rotary_factor": ("partial_rotary_factor", "rope_pct")},
        head_dim=say.hidden_over_heads,
        norm=say.layer_norm("qk_layernorm", over="each_head"),
        qkv_bias="use_qkv_bias",
    ),
    "starcoder2": replace(
        _LLAMA,
        models="StarCoder2",
        defaults={"num_key_value_heads": 2, "use_bias": True},
        window=say.in_every_layer,
        qkv_bias="use_bias",
        out_bias="use_bias",
    ),
}
