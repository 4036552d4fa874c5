"""The model card: what the model is, where it comes from, how to use it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from megalong.config import Config, RunConfig
from megalong.config.arguments import to_yaml
from megalong.model.parameters import ParameterCount

_CARD = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags: [{tags}]
---

# {name}

{what}, pretrained with
megalong: {parameters} in {dtype}, {layers} layers, {attention}. It was trained on
sequences of {seq_length:,} tokens.

{use}

## Where it comes from

| | |
|---|---|
| checkpoint | `{checkpoint}` |
| iteration | {iteration:,} |
| tokens of training | {tokens:,} |
| precision of training | {training_precision} |
| converted with | {versions} |

The training's configuration, where it differs from megalong's defaults:

```yaml
{config}```
"""


_PAPER = "([arXiv 2307.02486](https://arxiv.org/abs/2307.02486))"

_CAUSAL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The model's code is in this folder; it needs torch and transformers (5.24 or later) only. A text may
name special tokens: `text + tokenizer.eos_token` ends a document; with `split_special_tokens=True`
names are plain text, as they were in the training. The cache
keeps what later tokens can still attend to: KEPT. With `prefill_chunk_size`
`generate` reads a long prompt in chunks, in bounded memory; any size gives the same. With labels
the loss of a long sequence is computed in chunks and comes without logits, unless `logits_to_keep`
asks for some."""

_MASKED = """\
```python
from transformers import pipeline

fill = pipeline("fill-mask", FOLDER, trust_remote_code=True)
print(fill(f"Once upon a {{fill.tokenizer.mask_token}}"))
```

The model's code is in this folder; it needs torch and transformers (5.24 or later) only. Attention
looks both ways."""

_EXACT = """
The attention is the exact one, in PyTorch's operators, whether `attn_implementation`
says `eager` or `sdpa`; `output_attentions=True` gives its weights, of up to 8,192 tokens."""

_PLAIN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```

Its layers are those of Transformers' model type {model_type}, and need no code besides."""

_APART = """

The model was trained on documents that share a sequence without seeing each other: what stands
behind an end-of-document token does not see what is before it."""

_NOT_APART = """

The model was trained on documents that share a sequence without seeing each other
(`--document-attention isolated`), which Transformers' class does not know: there, what stands
behind an end-of-document token sees what is before it. Give each document a sequence of its own."""

_KEPT = {  # by kind of attention
    "dilated": "of dilated attention at most the sum of segment length / dilation rate rows,"
    " however long the sequence",
    "local": "of local attention its window",
    "sparse": "of sparse attention a block, and the columns of all before it",
    "dense": "of dense attention everything",
}


def model_card(
    config: Config,
    provenance: dict[str, Any],
    parameters: ParameterCount,
    dtype: str,
    model_type: str,
) -> str:
    """The text of README.md in an exported folder; model_type: of `configs.MODEL_TYPES`."""
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    causal = config.training.causal
    tags, what = "megalong", "A dense language model"
    apart = config.data.isolates_documents
    use = _PLAIN.format(model_type=model_type) + (_NOT_APART if apart else "")
    if model_type == "longnet":
        tags = "longnet, dilated-attention, megalong"
        what = f"A LongNet {'' if causal else 'masked-'}language model {_PAPER}"
        kept = ", ".join(_KEPT[kind] for kind in config.attention.kinds)
        use = _CAUSAL.replace("KEPT", kept) if causal else _MASKED.format()
        use += (_APART if apart else "") + _EXACT
    return _CARD.format(
        pipeline="text-generation" if causal else "fill-mask",
        tags=tags,
        what=what,
        use=use,
        name=provenance["checkpoint"].split("/")[0],
        dtype=dtype,
        layers=config.model.num_layers,
        attention=config.attention.description,
        seq_length=config.model.seq_length,
        config=to_yaml(_without_paths(config), leave_out="defaults"),
        parameters=parameters,
        **(provenance | {"versions": versions}),
    )


def _without_paths(config: Config) -> Config:
    """The configuration without the folders of the machine that it ran on."""
    names = {
        name: Path(path).name
        for name in ("data_blend", "tokenizer_model")
        if (path := getattr(config.data, name)) is not None
    }
    paths = {
        name: tuple(re.sub(r"[^=]*/", "", word) for word in words)  # NAME=/a/path is NAME=path
        for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path")
        if (words := getattr(config.data, name)) is not None
    }
    data = dataclasses.replace(config.data, data_cache_path=None, **names, **paths)
    return dataclasses.replace(config, data=data, run=RunConfig())
