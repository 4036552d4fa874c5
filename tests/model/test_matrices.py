"""The matrices in a parameter are the tensors of Transformers, as they are when it is exported."""

import pytest
import torch

from megalong.config import ModelConfig
from megalong.hf.names import entries
from megalong.model.parameters import is_layer_matrix
from megalong.model.tensor_slices import holds_queries, join_matrices, split_matrices


@pytest.mark.parametrize("swiglu", [True, False])
def test_they_are_those_of_transformers(swiglu):
    model = ModelConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        swiglu=swiglu,
        add_bias_linear=True,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
    ).resolve()
    counts, queries = [], 0
    for entry in entries(model, 64):
        if not is_layer_matrix(entry.name):
            assert len(entry.shape) == 1 or ".layers." not in entry.name
            continue
        whole = torch.randn(entry.shape, generator=torch.Generator().manual_seed(0))
        matrices = split_matrices(entry.name, whole, model)
        for matrix, there in zip(matrices, entry.to_huggingface(whole).values(), strict=True):
            assert torch.equal(matrix, there)
        assert torch.equal(join_matrices(entry.name, matrices, model), whole)
        counts.append(len(matrices))
        queries += holds_queries(entry.name)
    assert sorted(counts) == sorted([3, 1, 2 if swiglu else 1, 1] * 2)
    assert queries == 2
