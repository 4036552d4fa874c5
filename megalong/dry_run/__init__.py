"""What a launch will need, found out by running one of its ranks on tensors that hold no data.

    from megalong.dry_run import fake_device
    fake_device.load()  # before torch is imported
    import torch
    fake_device.pretend()
    from megalong.dry_run.step import planned_step
    from megalong.dry_run.layouts import ranks_to_plan
    for place in ranks_to_plan(config, ranks):
        step = planned_step(config, vocab_size, rank=place.rank, ranks=ranks)

`fake_device`: a GPU that is not there. `host_syncs`: who waits for it. `dry_run`: a training step
of any rank of any launch on it, in one process: its work (`work`), its memory by kind, its traffic.
`extension`: the same for a step of many micro batches, from one of few.
`ranks`: which ranks stand for all. `estimate`: roughly how long a step takes, from one layer.
"""
