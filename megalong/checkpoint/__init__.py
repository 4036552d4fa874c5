"""The checkpoint on disk: its format, written and read without a word about engines or layouts.

A run folder holds

    latest                     the name of the newest complete checkpoint
    best                       a link to that of the lowest validation loss, with --keep-best
    iter_0000200/              one checkpoint: tensors by torch.distributed.checkpoint, and
        progress.json          iteration, consumed samples and tokens, loss scale
        config.yaml            the resolved configuration
        tokenizer.model        the tokenizer, or the files of one of Transformers
        manifest.json          size and SHA-256 of every other file
    iter_0000300.tmp/          one that a killed run left unfinished, and
    iter_0000100.removed/      one that it was removing: never read, cleared away by the next save
    iter_0000150.damaged/      one that --load-fallback went past: never read, never removed

The tensors go by canonical parameter names (`megalong.model.parameters`), whole, in float32:
`weights.<name>` (the master weights, of which the model's own are a rounding),
the optimizer's moments (Adam's `exp_avg.<name>` and `exp_avg_sq.<name>`;
`megalong.model.optimizers`),
and `random.<rank>.<generator>`.
So nothing in a checkpoint depends on the layout that wrote it.

content.py: names of tensors, and what stands beside them; folder.py names checkpoints, publishes
and removes them; manifest.py finds damage; writing.py writes those of a run, in the background if
asked to, and the one of an import; reading.py reads tensor by tensor, or a model without an engine.

Nobody outside of this folder knows a file's name or what is in it.
"""
