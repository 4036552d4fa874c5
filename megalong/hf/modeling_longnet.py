"""LongNet for Transformers: a Llama-like decoder with dilated attention, or an encoder like it.

Travels in the exported folder (trust_remote_code); needs torch and transformers only. Modules are
named as in Llama.

Positions, segments and offsets count from each sequence's first real token, wherever its padding is
(`padding_longnet`).

Documents that share a row do not see each other where `position_ids` restart at 0, nor, in a model
that was trained so, behind the end of a document (`documents_longnet`).

Shape letters: b batch, s sequence, h heads, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)

from .attention_longnet import attention, probabilities
from .bidirectional_longnet import bidirectional_attention, bidirectional_probabilities
from .cache_longnet import LongNetCache, LongNetCacheLayer
from .configuration_longnet import LongNetConfig
from .documents_longnet import Documents
from .loss_longnet import is_divided, most_rows, next_token_loss
from .padding_longnet import Padding
from .parts_longnet import parts_of
from .positions_longnet import check_length, rotary_angles, rotate, xpos_scales

TILE = 8192  # positions that go through a layer at once where nobody asks for a gradient
MANY_LOGITS = 2**28  # more than so many are not made for a loss, nor unasked


class LongNetRMSNorm(nn.Module):
    """RMSNorm, computed in float32 whatever the model's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(exact, x.shape[-1:], eps=self.eps).to(x.dtype)


def make_norm(config: LongNetConfig, size: int) -> nn.Module:
    """The norm that the configuration names, of so many channels."""
    norm = {"RMSNorm": LongNetRMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
    return norm(size, eps=config.norm_epsilon)


def sub_layer_norm(config: LongNetConfig, size: int) -> nn.Module:
    """What stands before a matrix that writes to the residual stream."""
    return make_norm(config, size) if config.sub_layer_norm else nn.Identity()


class LongNetAttention(nn.Module):
    """Self-attention of the kind of one layer."""

    def __init__(self, config: LongNetConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        hidden, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        bias = config.linear_bias or config.qkv_bias
        self.parts, self.causal = parts_of(config, layer), config.causal
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.linear_bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.attn_sub_norm = sub_layer_norm(config, heads * self.head_dim)

    def forward(self, x, rotary, counts, documents, cache):
        q, k = self._queries_and_keys(x, rotary)
        v = self._heads(self.v_proj, x)
        if not self.causal:
            out = bidirectional_attention(q, k, v, self.parts, counts, documents)
        elif cache is None:
            first = None if documents is None else documents.first_bs
            out, _ = attention(q, k, v, self.parts, first_bs=first)
        else:
            out = cache.attend(q, k, v, counts, documents)
        return self.o_proj(self.attn_sub_norm(out.flatten(2)))

    def probabilities(self, x, rotary, counts, documents):
        """What each position attends to, (b, h, s, s), as `forward` without a cache does."""
        q, k = self._queries_and_keys(x, rotary)
        if not self.causal:
            return bidirectional_probabilities(q, k, self.parts, counts, documents)
        seen = None if documents is None else documents.seen(x.shape[1])
        return probabilities(q, k, self.parts, seen)

    def _queries_and_keys(self, x, rotary):
        q, k = self._heads(self.q_proj, x), self._heads(self.k_proj, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cos, sin, scales = rotary
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if scales is not None:  # in float32
                q, k = (q * scales).to(q.dtype), (k / scales).to(k.dtype)
        return q, k

    def _heads(self, projection, x):
        return projection(x).unflatten(-1, (-1, self.head_dim))


class LongNetMLP(nn.Module):
    """SwiGLU, or GELU."""

    def __init__(self, config: LongNetConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.linear_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.swiglu else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.ffn_sub_norm = sub_layer_norm(config, inner)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            x = F.gelu(self.up_proj(x))
        else:
            x = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.ffn_sub_norm(x))


class LongNetDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, norm, MLP, with residuals."""

    def __init__(self, config: LongNetConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = LongNetAttention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = LongNetMLP(config)

    def forward(self, x, rotary, counts, documents=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, counts, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LongNetPreTrainedModel(PreTrainedModel):
    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Our own attention computes whatever is asked for, "eager" or "sdpa", in PyTorch's operators.
    _supports_sdpa = True
    _no_split_modules = ["LongNetDecoderLayer"]  # noqa: RUF012  Transformers' own convention


class LongNetModel(LongNetPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LongNetDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> LongNetCache:
        return LongNetCache([layer.self_attn.parts for layer in self.layers])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: LongNetCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> BaseModelOutputWithPast:
        """The hidden states of the input, which follows what is in the cache.

        Without gradients a layer takes `TILE` positions at a time, so that beyond the hidden states
        themselves memory does not grow with the length.

        attention_mask: (b, s) or, with a cache, (b, all columns so far): 0 where there is padding.
            Padding may be on either side, or between.
        position_ids: (b or 1, s). Where they are 0, a document begins that sees nothing before it;
            what they are elsewhere means nothing, as positions count on over the row. None: a row
            is one document but, if the configuration's document_attention is "isolated", for what
            its end-of-sequence (and beginning-of-sequence) tokens divide, which counts in any case.
        output_attentions: of each layer what each position attends to, (b, h, s, s): zero where its
            pattern, the future, padding or another document is. Of at most `TILE` positions, and
            without a cache, which has not all of the past.
        Raises ValueError for other masks and position_ids, for caches of other models, and where
            there are no attentions to give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        keep = output_hidden_states or (
            output_hidden_states is None and self.config.output_hidden_states
        )
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and (cache is not None or use_cache or length > TILE):
            raise ValueError(
                f"output_attentions makes length x length numbers a head: give at most {TILE}"
                " tokens, and use_cache=False, since a cache has not all of the past"
            )
        if not self.config.causal:
            if cache is not None or use_cache:
                raise ValueError(
                    "a bidirectional LongNet has no cache: every token sees later ones"
                )
            use_cache = False
        if use_cache is None:
            use_cache = not output_attentions and self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None  # the layers run twice
        if cache is None:
            cache = self.new_cache() if use_cache else None
        elif not isinstance(cache, LongNetCache):
            raise ValueError(
                f"LongNet needs its own cache (model.new_cache()), got {type(cache).__name__}"
            )

        padding = Padding.of(attention_mask, batch, length)
        x = padding.to_end(x)
        starts = cache.lengths if cache is not None and cache.lengths else [0] * batch
        check_length(self.config, max(starts) + length, x.dtype)
        documents = self._documents(input_ids, position_ids, padding, starts, cache)
        tiled = length > TILE and self.config.causal
        tiled = tiled and not torch.is_grad_enabled() and not is_divided(self)
        rotary = None if tiled else self._rotary(starts, length, x.device)
        states, attentions = [], []
        for number, layer in enumerate(self.layers):
            if keep:
                states.append(padding.back(x))
            if output_attentions:
                normed = layer.input_layernorm(x)
                weights = layer.self_attn.probabilities(normed, rotary, padding.counts, documents)
                attentions.append(padding.square_back(weights))
            kept = None if cache is None else cache.layers[number]
            if tiled:
                x = self._in_tiles(layer, x, starts, padding.counts, documents, kept)
            else:
                x = layer(x, rotary, padding.counts, documents, cache=kept)
        if tiled:
            for tile in x.split(TILE, 1):
                tile.copy_(self.norm(tile))
        else:
            x = self.norm(x)
        x = padding.back(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            cache=cache,
            hidden_states=(*states, x) if keep else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _documents(self, input_ids, position_ids, padding, starts, cache):
        """Where the documents of the input are, its real tokens moved to the front."""
        if position_ids is not None:
            shapes = [(rows, padding.length) for rows in (1, len(starts))]
            if tuple(position_ids.shape) not in shapes:
                raise ValueError(
                    f"position_ids must be {shapes[1]}, as the input is, or {shapes[0]}, got shape"
                    f" {tuple(position_ids.shape)}"
                )
            position_ids = padding.to_end(position_ids.expand(len(starts), -1)[..., None])[..., 0]
        if input_ids is not None:
            input_ids = padding.to_end(input_ids[..., None])[..., 0]
        under_way = cache.under_way if cache is not None and cache.under_way else [0] * len(starts)
        return Documents.of(self.config, input_ids, position_ids, padding.counts, starts, under_way)

    def _in_tiles(self, layer, x, starts, counts, documents, kept):
        """One layer, `TILE` positions at a time: to each, those before it are in the cache."""
        if kept is None:
            kept = LongNetCacheLayer(layer.self_attn.parts)
        out = torch.empty_like(x)
        for first, tile in zip(range(0, x.shape[1], TILE), x.split(TILE, 1), strict=True):
            size = tile.shape[1]
            rotary = self._rotary([start + first for start in starts], size, x.device)
            here = [min(max(count - first, 0), size) for count in counts]
            there = None if documents is None else documents.part(first, size)
            out[:, first : first + size] = layer(tile, rotary, here, there, cache=kept)
        return out

    def _rotary(self, starts, length, device):
        if self.config.position_embedding_type == "none":
            return None
        scales = None
        if self.config.position_embedding_type == "xpos":
            scales = xpos_scales(self.config, starts, length, device)
        return *rotary_angles(self.config, starts, length, device), scales


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """The language model: LongNetModel and the output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig):
        if not config.causal:
            raise ValueError(
                "this LongNet is a masked-language model: load it with AutoModelForMaskedLM, as"
                ' pipeline("fill-mask") does'
            )
        super().__init__(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: LongNetCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        return_dict: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        **loss_options,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and with labels (-100 where there is none) the mean loss of the next tokens.

        logits_to_keep: logits of how many positions at the end (0: of all), or of which. None: of
            all, but of none where there are labels and it would be more than `MANY_LOGITS` values.
        The loss is that of all positions in any case, and holds a chunk of logits at a time where
        there are not those of all.
        position_ids: restart at 0 where another document begins (`LongNetModel.forward`).
        """
        unknown = loss_options.keys() - {"num_items_in_batch", "ignore_index"}
        if unknown:
            raise TypeError(f"LongNet takes no {', '.join(sorted(unknown))}")
        outputs = self.model(
            input_ids,
            attention_mask,
            cache,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            position_ids,
        )
        hidden, keep = outputs.last_hidden_state, logits_to_keep
        ours = labels is not None and self.loss_function is ForCausalLMLoss  # and nobody's own
        if keep is None:
            many = ours and most_rows(self.lm_head, hidden) * self.config.vocab_size > MANY_LOGITS
            keep = hidden.new_empty(0, dtype=torch.long) if many else 0
        logits = self.lm_head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])
        loss = None
        if labels is not None:
            loss_options["vocab_size"] = self.config.vocab_size
            whole = isinstance(keep, int) and logits.shape[1] == hidden.shape[1]
            if ours and not whole:
                loss = next_token_loss(self.lm_head, hidden, labels, **loss_options)
            else:
                loss = self.loss_function(logits=logits, labels=labels, **loss_options)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict in (None, True) else result.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # a cache that keeps everything would be of no use here

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return None  # positions count on by themselves

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = self.model.new_cache()


class LongNetForMaskedLM(LongNetPreTrainedModel):
    """The masked-language model: a bidirectional LongNetModel and the output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig):
        if config.causal:
            raise ValueError("this LongNet is a causal model: load it with AutoModelForCausalLM")
        super().__init__(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        **loss_options,
    ) -> MaskedLMOutput | tuple:
        """Logits of the token at each position, and with labels (-100 where there is none) the mean
        loss of the tokens there.

        position_ids: restart at 0 where another document begins (`LongNetModel.forward`).
        """
        unknown = loss_options.keys() - {"num_items_in_batch", "ignore_index"}
        if unknown:
            raise TypeError(f"LongNet takes no {', '.join(sorted(unknown))}")
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            position_ids=position_ids,
        )
        logits, loss = self.lm_head(outputs.last_hidden_state), None
        if labels is not None:
            loss_options["vocab_size"] = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, **loss_options)
        result = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict in (None, True) else result.to_tuple()
