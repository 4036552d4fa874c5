"""The Transformer around the attention, over rows of the sequence at a time.

Tensors in, tensors out. What a step holds in memory does not grow with the vocabulary, the width of
the MLP or the number of heads; gradients are those of the plain computation. Inputs have the dtype
to compute in: autocast is not for these functions, nor are gradients of gradients.
"""
