"""What a launch will need, found out by running one of its ranks on tensors that hold no data.

    from megalong.dry_run import fake_device
    fake_device.load()  # before torch is imported
    import torch
    fake_device.pretend()
    from megalong.dry_run.layouts import ranks_to_plan
    from megalong.dry_run.step import planned_step
    for place in ranks_to_plan(config, ranks):
        step = planned_step(config, vocab_size, rank=place.rank, ranks=ranks)

`fake_device`, `fake_tensors`: a GPU that is not there, and who waits for it. `step`: a training
step of any rank of any launch on it, in one process; `recorder`, `work`, `memory`: what it does and
holds. `cluster`, `calibration`, `cost`: what a launch runs on, and how long a step takes there.
`layouts`, `search`, `plan_text`: the best layouts, and what is printed. `share`: one rank with real
tensors.
"""
