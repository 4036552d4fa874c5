"""Configurations: megalong's to Transformers', and back, from LongNet and from Llama."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from megalong.config import Config
from megalong.config.attention import PATTERN_FIELDS
from megalong.config.flags import flag_name, shown
from megalong.data.tokenizers.tokenizer import Tokenizer
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
    model, kinds = config.model, config.attention.attention
    return {
        **_common(config, tokenizer),
        **({"rope_parameters": model.rope_parameters} if model.has_rotary_positions else {}),
        **{theirs: getattr(model, ours) for ours, theirs in _SETTINGS.items()},
        **{name: _as_json(getattr(config.attention, name)) for name in PATTERN_FIELDS},
        "attention": kinds[0] if len(kinds) == 1 else list(kinds),
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
            return _from_longnet(config, where, scalings)
        if model_type in LLAMA_FAMILY:
            return _from_llama(config, where, scalings)
    except KeyError as missing:
        raise UserError(f"{where} has no {missing.args[0]}: it is not complete") from missing
    raise UserError(
        f"{where}: model type {model_type!r}; megalong reads longnet (its own exports) and"
        f" {', '.join(LLAMA_FAMILY)}"
    )


def _from_longnet(config: dict[str, Any], where: str, scalings: Collection[str]) -> dict[str, Any]:
    return {
        **_sizes(config),
        **{ours: config[theirs] for ours, theirs in _SETTINGS.items()},
        **(rotary_values(config, where, scalings) if "rope_parameters" in config else {}),
        **{name: config[name] for name in PATTERN_FIELDS if name in config},
        "document_attention": config["document_attention"],
        "objective": "causal" if config["causal"] else "mlm",
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
    bias, refused = bool(config.get("attention_bias")), None
    if config.get("hidden_act", "silu") != "silu":
        refused = f"hidden_act is {config['hidden_act']} and not silu"
    elif bias != bool(config.get("mlp_bias")):
        refused = "only one of attention_bias and mlp_bias is set: biases in some linear layers"
    if refused:
        raise UserError(f"{where}: {refused}, which megalong's model has not")
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


# What a scaling has in Transformers' file, besides what all have.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    },
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
        "mscale", "mscale_all_dim", "truncate",
    },
}  # fmt: skip
# Those whose frequencies change with what is read, so that no training has just them.
_CHANGING = {
    "dynamic": "the base grows with the length that is read. Up to its max_position_embeddings it"
    " is the same model without that: take it out of the file, or set --rotary-ntk-factor for"
    " training beyond them",
    "longrope": "there are other frequencies for inputs up to the original length than beyond it."
    " Without the scaling (take it out of the file, or set another) it is another model",
}
# The flag of each kind.
_FACTORS = {
    "linear": "rotary_seq_len_interpolation_factor",
    "llama3": "rope_scaling_factor",
    "yarn": "yarn_rotary_scaling_factor",
}
# What published files have besides, and changes no frequency.
_NOTES = {"finetuned"}


def rotary_values(
    config: dict[str, Any], where: str, instead: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of megalong's configuration, by name, for the rotary positions of a config.json.

    Transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling; either is
    read as Transformers 5 does. where: the file, for errors. instead: factors of scalings, of
    `megalong.config.rope.FACTORS`, that take the place of the file's: of one of another kind the
    base alone is read. Raises UserError for positions that megalong has not, and where the factor
    is missing.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check_channels(rope, config, where)
    if _FACTORS.get(kind) in instead:  # which is taken, whatever the file has
        rope.setdefault("factor", 1.0)
    replaced = instead and kind != "default" and _FACTORS.get(kind) not in instead
    if replaced:
        kind = "default"
    else:
        _check_kind(kind, rope, where)
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    values = {"rotary_base": _number(base, "rope_theta", where)}
    if kind == "linear":
        factor = _number(rope["factor"], "factor", where, least=1.0)
        values["rotary_seq_len_interpolation_factor"] = factor
    if kind == "llama3":
        values["rope_scaling_factor"] = _number(rope["factor"], "factor", where, least=1.0)
        values["rope_original_length"] = _original_length(rope, config, where)
        low, high = _turns("low_freq_factor", 1, "high_freq_factor", 4, rope, where)
        values |= {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    if kind == "yarn":
        values |= _yarn(rope, config, where)
    return values


def _number(value: Any, name: str, where: str, least: float = 0.0) -> float:
    """A number of the file. Raises UserError where it is none, not positive or below the least."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf and value >= least):
        raise UserError(
            f"{where}: {name} is {value!r}, and has to be a number"
            f" {f'of at least {least:g}' if least else 'above 0'}"
        )
    return float(value)


def _check_channels(rope: dict[str, Any], config: dict[str, Any], where: str) -> None:
    layers = [name for name, value in rope.items() if isinstance(value, dict)]
    if layers:
        raise UserError(
            f"{where}: rotary positions are others in layers of the kinds {', '.join(layers)}, and"
            " megalong has the same in all layers"
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor is {partial}; megalong's positions turn all channels"
        )


def _check_kind(kind: Any, rope: dict[str, Any], where: str) -> None:
    if kind not in _KEYS:
        why = _CHANGING.get(
            kind,
            "megalong has those of plain RoPE, linear, llama3 and yarn. Without the scaling (take"
            " it out of the file) it is another model, good up to its original length",
        )
        raise UserError(f"{where}: rotary positions are scaled in the way {kind!r}: {why}")
    if "factor" in _KEYS[kind] and "factor" not in rope:
        raise UserError(
            f"{where}: rotary positions of the kind {kind} have no factor: write it there, or set"
            f" {flag_name(_FACTORS[kind])}"
        )
    given = {name for name, value in rope.items() if value is not None}
    unknown = given - _COMMON - _NOTES - _KEYS[kind]
    if unknown:
        raise UserError(
            f"{where}: rotary positions of the kind {kind} have {', '.join(sorted(unknown))}, which"
            " megalong does not know: take out of the file what is not about frequencies"
        )


def _original_length(rope: dict[str, Any], config: dict[str, Any], where: str) -> int:
    """The length before the scaling, where Transformers looks for it."""
    name = "original_max_position_embeddings"
    length = config.get(name) or rope.get(name) or config["max_position_embeddings"]
    return int(_number(length, name, where, least=1.0))


def _turns(
    slow: str, slow_default: int, fast: str, fast_default: int, rope: dict[str, Any], where: str
) -> tuple[float, float]:
    """Return the turns in the original length below and above which pairs of channels are slow and
    fast, by their names in the file."""
    low = _number(slow_default if rope.get(slow) is None else rope[slow], slow, where)
    high = _number(fast_default if rope.get(fast) is None else rope[fast], fast, where)
    if high <= low:
        raise UserError(f"{where}: {fast} is {high:g}, and has to be more than {slow}, {low:g}")
    return low, high


def _yarn(rope: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, Any]:
    original, factor = _original_length(rope, config, where), rope["factor"]
    if factor is None:  # as Transformers
        factor = config["max_position_embeddings"] / original
    slow, fast = _turns("beta_slow", 1, "beta_fast", 32, rope, where)
    values = {
        "yarn_rotary_scaling_factor": _number(factor, "factor", where, least=1.0),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": fast,
        "yarn_beta_slow": slow,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }
    mscales = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
    if rope.get("attention_factor") is not None:
        own = _number(rope["attention_factor"], "attention_factor", where)
        values["yarn_attention_factor"] = own
    elif all(mscales.values()):  # one alone has no effect
        values |= {f"yarn_{name}": _number(x, name, where) for name, x in mscales.items()}
    return values
