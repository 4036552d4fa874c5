"""The batches of a dry run have what those of the data have."""

from types import SimpleNamespace

from megalong.config.arguments import parse_arguments
from megalong.dry_run.step import host_batches
from tests.launching import small_run_flags


def test_with_a_loss_mask_predictions_are_counted(tmp_path):
    config = parse_arguments(small_run_flags(tmp_path / "data")).resolve(1)
    mesh = SimpleNamespace(sequence_range=lambda length: (0, length))
    assert "predicted" not in next(host_batches(config, mesh))
    for suffix in (".idx", ".loss"):
        (tmp_path / f"data{suffix}").touch()
    assert "predicted" in next(host_batches(config, mesh))
