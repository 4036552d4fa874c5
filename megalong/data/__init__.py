"""The data path: tokenizers, indexed documents, the token stream and its batches.

In reading order: tokenizer, tokenizer_training, documents (reading text), writer and preprocess
(text to .bin/.idx), indexed (.bin/.idx to tokens), stream (the order of the tokens), batches.
This file imports nothing, so that tokenizing processes start without torch.
"""
