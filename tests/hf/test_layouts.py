"""A model trained by tensor- and pipeline-parallel ranks is exported like any other."""

import torch
from transformers import AutoModelForCausalLM

from megalong.checkpoint.reading import StoredModel
from megalong.config.arguments import parse_arguments
from megalong.hf.exporting import export
from megalong.model.build import build_model
from megalong.model.stage import named_parameters
from megalong.parallel import launch
from tests.forked import run_ranks
from tests.launching import PRETRAIN, small_run_flags


def test_the_export_of_a_tp2_pp2_checkpoint_computes_what_megatron_does(corpus, tmp_path):
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "train_iters": 2}
    flags = small_run_flags(corpus, **layout, head_offsets="layer", save=tmp_path / "run")
    announced = run_ranks(4, PRETRAIN, *flags).stdout
    assert export(tmp_path / "run", tmp_path / "hf")["parameters"] in announced
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)

    stored = StoredModel(tmp_path / "run")
    one = small_run_flags(corpus, head_offsets="layer")
    tokens = torch.randint(257, (2, 200), generator=torch.Generator().manual_seed(0))
    config = parse_arguments(one).resolve(1)
    with launch(config) as mesh, torch.no_grad():
        ours = build_model(config, 257, mesh)
        for name, parameter in named_parameters(ours):
            parameter.copy_(stored.read(name))
        expected = ours(
            input_ids=tokens, position_ids=torch.arange(200), attention_mask=None
        )[..., :257]  # fmt: skip
        logits = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
