"""Small random models on both sides, with the same weights."""

import torch
from safetensors.torch import load_file

from megalong.checkpoint.writing import write_first_checkpoint
from megalong.config.arguments import parse_arguments
from megalong.data.tokenizers.tokenizer import ByteTokenizer
from megalong.hf.configs import longnet_config
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.modeling_longnet import LongNetForCausalLM
from megalong.hf.names import entries
from megalong.model.build import build_model
from megalong.model.stage import named_parameters
from tests.launching import small_run_flags

VOCAB_SIZE = 257


def resolved(**changes):
    """The configuration of a small run of 128 tokens."""
    return parse_arguments(small_run_flags("unused", **changes)).resolve(1)


def megatron_model(config, mesh):
    """A GPTModel with weights that are all random, norms and biases too."""
    model = build_model(config, VOCAB_SIZE, mesh)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.3)
    return model


def huggingface_model(config, weights):
    """LongNetForCausalLM with these weights of ours, by canonical name; float32."""
    model = LongNetForCausalLM(LongNetConfig(**longnet_config(config, ByteTokenizer())))
    state = {}
    for entry in entries(config.model, VOCAB_SIZE):
        state |= entry.to_huggingface(weights[entry.name])
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = model.config.tie_word_embeddings
    assert not unexpected and missing == (["lm_head.weight"] if tied else [])
    return model.eval()


def pair(mesh, **changes):
    """A GPTModel and the same model for Transformers."""
    config = resolved(**changes)
    model = megatron_model(config, mesh)
    weights = {name: parameter.detach() for name, parameter in named_parameters(model)}
    return model, huggingface_model(config, weights)


def megatron_logits(model, tokens):
    with torch.no_grad():
        logits = model(
            input_ids=tokens, position_ids=torch.arange(tokens.shape[1]), attention_mask=None
        )
    return logits[..., :VOCAB_SIZE]


def random_tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (batch, length), generator=generator)


def random_checkpoint(folder, **changes):
    """A run folder with a checkpoint of random weights, and those weights."""
    config = resolved(**changes)
    generator = torch.Generator().manual_seed(3)
    shapes = {entry.name: entry.shape for entry in entries(config.model, VOCAB_SIZE)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights = {name: x * 0.2 if x.ndim > 1 else x * 0.3 + 1 for name, x in weights.items()}
    folder.mkdir(parents=True)
    write_first_checkpoint(folder, config, shapes, weights.__getitem__)
    return config, weights


def stored_tensors(folder):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
