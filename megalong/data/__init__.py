"""The data path: tokenizers, indexed documents, the token stream and its batches.

In reading order: tokenizer, a file for each kind, tokenizer_training; files, documents, a file for
each format of text (formats has the table), backend (which library makes the tokens); writer and
preprocess (text to .bin/.idx); indexed and shards (.bin/.idx to tokens), document_order, stream
(the order of the tokens), document_samples; sources, apportionment and blend (several as one);
batches. context and inspection say what data is like.
This file imports nothing, so that tokenizing processes start without torch.
"""
