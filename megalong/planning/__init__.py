"""What a launch will need, found out by running one of its ranks on tensors that hold no data.

`fake_device`: a GPU that is not there. `host_syncs`: who waits for it. `dry_run`: a training step
of any rank of any launch on it, in one process, with its peak memory and its traffic.
"""
