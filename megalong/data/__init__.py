"""The data path: tokenizers, indexed documents, the token stream and its batches.

In reading order: tokenizer, tokenizer_training; documents, json_lines, plain_text (reading text),
writer and preprocess (text to .bin/.idx); indexed (.bin/.idx to tokens), stream (the order of the
tokens), batches. formats has the tables of what can be read.
This file imports nothing, so that tokenizing processes start without torch.
"""
