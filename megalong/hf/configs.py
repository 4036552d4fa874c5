"""Configurations: megalong's to Transformers', and back, from LongNet and from Llama."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megalong.config import Config
from megalong.config.attention import PATTERN_FIELDS
from megalong.config.flags import flag_name, shown
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.hf.rotary_configs import rotary_values
from megalong.utils.errors import UserError

# Transformers' and torch's names of number formats, and what training's --precision is of them.
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_OF_PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_MODEL = {"causal": "LongNetForCausalLM", "mlm": "LongNetForMaskedLM"}  # by the objective

# The settings of a model besides its sizes: our names, and LongNetConfig's.
_SETTINGS = {
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "swiglu": "swiglu",
    "add_bias_linear": "linear_bias",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
    "sub_layer_norm": "sub_layer_norm",
    "position_embedding_type": "position_embedding_type",
    "xpos_scale_base": "xpos_scale_base",
}
# Those that the folders of earlier versions have not.
_ADDED = {
    "qkv_bias": False,
    "qk_norm": False,
    "sub_layer_norm": False,
    "xpos_scale_base": 512,
}


def model_classes(objective: str) -> dict[str, Any]:
    """What config.json says of the classes of a model, which come with it."""
    model = _MODEL[objective]
    return {
        "architectures": [model],
        "auto_map": {
            "AutoConfig": "configuration_longnet.LongNetConfig",
            "AutoModel": "modeling_longnet.LongNetModel",
            model.replace("LongNet", "AutoModel"): f"modeling_longnet.{model}",
        },
    }


def longnet_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of LongNetConfig for a model of ours, trained with this tokenizer; config:
    resolved."""
    model = config.model
    return {
        **_common(config, tokenizer),
        **({"rope_parameters": model.rope_parameters} if model.has_rotary_positions else {}),
        **{theirs: getattr(model, ours) for ours, theirs in _SETTINGS.items()},
        **{name: _as_json(getattr(config.attention, name)) for name in PATTERN_FIELDS},
        "attention": _kinds(config.attention.attention),
        "document_attention": config.data.document_attention,
        "causal": config.training.causal,
    }


def _common(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields that LongNetConfig and those of the Llama family call the same."""
    model = config.model
    return {
        "vocab_size": model.padded_vocab_size or tokenizer.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": tokenizer.bos if config.data.prepend_bos else None,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod,
    }


# What the layers of the Llama family are in our settings, and what is other in each model type that
# dense models are exported as; the class is Transformers'.
_LLAMA_LAYERS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "sub_layer_norm": False,
    "position_embedding_type": "rope",
}
_BIASES = ("add_bias_linear", "add_qkv_bias", "qk_layernorm")
_PLAIN = {
    "llama": ("LlamaForCausalLM", (False, False, False)),
    "qwen2": ("Qwen2ForCausalLM", (False, True, False)),
    "qwen3": ("Qwen3ForCausalLM", (False, False, True)),
}
MODEL_TYPES = ("longnet", *_PLAIN)


def plain_config(config: Config, tokenizer: Tokenizer, model_type: str) -> dict[str, Any]:
    """The fields of config.json of a dense model of ours as one of Transformers' own model types,
    for which no code of ours is needed; config: resolved.

    model_type: of MODEL_TYPES, not longnet. Raises UserError where the model is none of that type,
    saying which setting is other there.
    """
    name, of_type = _PLAIN[model_type]
    model = config.model
    if {*config.attention.attention} != {"dense"} or not config.training.causal:
        raise UserError(
            f"--model-type {model_type} has dense causal attention, and this model"
            f" {config.attention.description}: leave the flag out"
        )
    for field, there in [*_LLAMA_LAYERS.items(), *zip(_BIASES, of_type, strict=True)]:
        if (here := getattr(model, field)) != there:
            fits = [kind for kind, (_, biases) in _PLAIN.items() if _is_plain(config, biases)]
            way_out = f"set --model-type {fits[0]}" if fits else "leave the flag out"
            raise UserError(
                f"{flag_name(field)} of this model is {shown(here)}, and of --model-type"
                f" {model_type} it is {shown(there)}: {way_out}"
            )
    return {
        **_common(config, tokenizer),
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": model.rope_parameters,
    }


def _is_plain(config: Config, biases: tuple[bool, ...]) -> bool:
    fields = {**_LLAMA_LAYERS, **dict(zip(_BIASES, biases, strict=True))}
    return all(getattr(config.model, name) == value for name, value in fields.items())


def _kinds(attention: tuple[str, ...]) -> str | list[str]:
    return attention[0] if len(attention) == 1 else list(attention)


def _as_json(value: Any) -> Any:
    """Lists for tuples."""
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def megalong_values(
    config: dict[str, Any], where: str, scalings: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of megalong's configuration that a config.json of Transformers decides.

    where: the file, for errors. scalings: factors of those that take the place of the model's own
    (`rotary_values`). Raises UserError for a model that megalong does not have, saying
    what it has and megalong has not, and for a file that is not complete.
    """
    model_type = config.get("model_type")
    try:
        if model_type == "longnet":
            return _from_longnet(_ADDED | config, where, scalings)
        if model_type in LLAMA_FAMILY:
            return _from_llama(config, where, scalings)
    except KeyError as missing:
        raise UserError(f"{where} has no {missing.args[0]}: it is not complete") from missing
    raise UserError(
        f"{where}: model type {model_type!r}; megalong reads longnet (its own exports) and"
        f" {', '.join(LLAMA_FAMILY)}"
    )


def _from_longnet(config: dict[str, Any], where: str, scalings: Collection[str]) -> dict[str, Any]:
    pattern = {name: config[name] for name in PATTERN_FIELDS if name in config}
    return {
        **_sizes(config),
        **{ours: config[theirs] for ours, theirs in _SETTINGS.items()},
        **_longnet_positions(config, where, scalings),
        **pattern,
        "document_attention": config.get("document_attention", "mixed"),
        "objective": "causal" if config.get("causal", True) else "mlm",
        "init_method_std": config["initializer_range"],
    }


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "seq_length": config["max_position_embeddings"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


# Model types whose layers are Llama's; Qwen2's have biases besides, and Qwen3's norms.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")


def _from_llama(config: dict[str, Any], where: str, scalings: Collection[str]) -> dict[str, Any]:
    def refuse(what: str) -> None:
        raise UserError(f"{where}: {what}, which megalong's model has not")

    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {config['hidden_act']} and not silu")
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if bias != mlp_bias:
        refuse("only one of attention_bias and mlp_bias is set: biases in some linear layers")
    return {
        **_windows(config),
        **_sizes(config),
        "normalization": "RMSNorm",
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "swiglu": True,
        "add_bias_linear": bias,
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] == "qwen3",
        "position_embedding_type": "rope",
        **rotary_values(config, where, scalings),
        "init_method_std": float(config.get("initializer_range", 0.02)),
    }


def _windows(config: dict[str, Any]) -> dict[str, Any]:
    """Which layers are dense and which have a sliding window."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    slides = config.get("use_sliding_window", config["model_type"] == "mistral")
    if not (slides and window):
        return {"attention": "dense"}
    kinds = config.get("layer_types")
    if kinds is None:
        # Qwen2 and Qwen3: from this layer on.
        first = config.get("max_window_layers", 28) if config["model_type"] != "mistral" else 0
        local = [layer >= first for layer in range(layers)]
    else:
        local = [kind == "sliding_attention" for kind in kinds]
    names = ["local" if slides else "dense" for slides in local]
    period = next(n for n in range(1, layers + 1) if names == (names[:n] * layers)[:layers])
    return {"attention": names[:period], "window_size": window}


def _longnet_positions(
    config: dict[str, Any], where: str, scalings: Collection[str]
) -> dict[str, Any]:
    """Those of one of our exports. Earlier versions had our own names for them."""
    if "rope_parameters" in config:
        return rotary_values(config, where, scalings)
    names = ("rotary_base", "rope_scaling_factor", "rope_original_length")
    return {name: config[name] for name in names if name in config}
