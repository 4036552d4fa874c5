"""LongNet for Transformers: a Llama-like decoder with dilated attention, or an encoder like it.

Travels in the exported folder (trust_remote_code); needs torch and transformers only. Modules are
named as in Llama. Positions, segments and offsets count from each sequence's first real token,
wherever its padding is (`Padding`). Documents that share a row do not see each other (`Documents`).

Shape letters: b batch, s sequence, n rows (positions of all sequences), h heads or hidden size, d
head_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)

from .attention_longnet import LongNetCache, LongNetCacheLayer
from .configuration_longnet import LongNetConfig
from .layers_longnet import LongNetDecoderLayer, make_norm
from .positions_longnet import Documents, Padding, check_length, rotary_angles, xpos_scales

TILE = 8192  # positions that go through a layer at once where nobody asks for a gradient
MANY_LOGITS = 2**28  # more than so many are not made for a loss, nor unasked
CHUNK_LOGITS = 2**25  # logits of a loss that are held at once


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

        attention_mask: (b, s) or, with a cache, (b, all columns so far): 0 where there is padding,
            on either side, or between.
        position_ids: (b or 1, s), 0 where a document begins that sees nothing before it, and else
            one more than before. If the configuration's document_attention is "isolated", its
            end-of-sequence (and beginning-of-sequence) tokens divide documents in any case.
        output_attentions: of each layer the weights, (b, h, s, s), of at most `TILE` positions.
        Raises ValueError for other masks and position_ids, for caches of other models, and where
            there are no attentions to give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        keep, config = output_hidden_states, self.config
        keep = config.output_hidden_states if keep is None else keep
        if output_attentions is None:
            output_attentions = config.output_attentions
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
        kind, asked = self.config.position_embedding_type, (self.config, starts, length, device)
        if kind == "none":
            return None
        return *rotary_angles(*asked), xpos_scales(*asked) if kind == "xpos" else None


def is_divided(module: nn.Module) -> bool:
    """Whether DeepSpeed has divided the module's parameters among the ranks (ZeRO 3). These meet
    whenever a module runs: all have to run it equally often, whatever the length of their input."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def most_rows(head: nn.Module, hidden_bsh: torch.Tensor) -> int:
    """How many rows the head gets at most on a rank that has to run it as often as this one."""
    rows = hidden_bsh.shape[:2].numel()
    if not is_divided(head):
        return rows
    most = torch.tensor(rows, device=hidden_bsh.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def next_token_loss(
    head: nn.Module,
    hidden_bsh: torch.Tensor,
    labels_bs: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """What Transformers' ForCausalLMLoss makes of the head's logits, at least in float32: the mean
    cross entropy of each position's next label, or the sum over num_items_in_batch.

    Logits exist for a chunk of rows, in the backward pass too, where the head runs again. The
    gradients of the head's weights are summed over the chunks in at least float32, but under
    DeepSpeed's ZeRO 3 in their own dtype.
    """
    labels_bs = F.pad(labels_bs, (0, 1), value=ignore_index)[:, 1:].to(hidden_bsh.device)
    labels_n = labels_bs.flatten()
    weights, graph = {}, torch.is_grad_enabled()
    if graph and not is_divided(head):  # such weights are whole only while the head runs
        # Views: of a leaf autocast keeps one low-precision copy, and sums its gradients in that.
        weights = {
            name: weight.view_as(weight).to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in head.named_parameters()
            if weight.requires_grad
        }

    def of_chunk(rows_nh, wanted_n):
        narrow = {name: w.to(head.get_parameter(name).dtype) for name, w in weights.items()}
        logits = functional_call(head, narrow, (rows_nh,))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, wanted_n, ignore_index=ignore_index, reduction="sum")

    count = -(-most_rows(head, hidden_bsh) // max(CHUNK_LOGITS // vocab_size, 1))
    ends = [len(labels_n) * number // count for number in range(count + 1)]
    sizes = [end - start for start, end in pairwise(ends)]
    total = 0.0
    for chunk in zip(hidden_bsh.flatten(0, 1).split(sizes), labels_n.split(sizes), strict=True):
        part = checkpoint(of_chunk, *chunk, use_reentrant=False) if graph else of_chunk(*chunk)
        total = total + part
    if num_items_in_batch is None:
        return total / (labels_n != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class LongNetWithHead(LongNetPreTrainedModel):
    """LongNetModel and the output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _loss_options(self, given: dict) -> dict:
        unknown = given.keys() - {"num_items_in_batch", "ignore_index"}
        if unknown:
            raise TypeError(f"LongNet takes no {', '.join(sorted(unknown))}")
        return given | {"vocab_size": self.config.vocab_size}


class LongNetForCausalLM(LongNetWithHead, GenerationMixin):
    """The language model."""

    def __init__(self, config: LongNetConfig):
        if not config.causal:
            raise ValueError(
                "this LongNet is a masked-language model: load it with AutoModelForMaskedLM, as"
                ' pipeline("fill-mask") does'
            )
        super().__init__(config)

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
        loss_options = self._loss_options(loss_options)
        given = input_ids, attention_mask, cache, inputs_embeds, use_cache
        outputs = self.model(*given, output_hidden_states, output_attentions, position_ids)
        hidden, keep = outputs.last_hidden_state, logits_to_keep
        ours = labels is not None and self.loss_function is ForCausalLMLoss  # and nobody's own
        if keep is None:
            many = ours and most_rows(self.lm_head, hidden) * self.config.vocab_size > MANY_LOGITS
            keep = hidden.new_empty(0, dtype=torch.long) if many else 0
        logits = self.lm_head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])
        loss = None
        if labels is not None:
            whole = isinstance(keep, int) and logits.shape[1] == hidden.shape[1]
            if ours and not whole:
                loss = next_token_loss(self.lm_head, hidden, labels, **loss_options)
            else:
                loss = self.loss_function(logits=logits, labels=labels, **loss_options)
        seen = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, cache=outputs.cache, **seen)
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


class LongNetForMaskedLM(LongNetWithHead):
    """The masked-language model."""

    def __init__(self, config: LongNetConfig):
        if config.causal:
            raise ValueError("this LongNet is a causal model: load it with AutoModelForCausalLM")
        super().__init__(config)

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
        loss_options = self._loss_options(loss_options)
        given = input_ids, attention_mask, None, inputs_embeds, None
        outputs = self.model(*given, output_hidden_states, output_attentions, position_ids)
        logits, loss = self.lm_head(outputs.last_hidden_state), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, **loss_options)
        seen = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        result = MaskedLMOutput(loss=loss, logits=logits, **seen)
        return result if return_dict in (None, True) else result.to_tuple()
