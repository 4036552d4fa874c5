"""The data path: tokenizers, indexed documents, the token stream and its batches.

In reading order: tokenizers; text (formats has the table of what can be read); preprocessing (text
to .bin/.idx); indexed (.bin/.idx to tokens), stream (the order of the tokens), document_samples;
sources and blend (several as one); batches.

This file imports nothing, so that tokenizing processes start without torch.
"""
