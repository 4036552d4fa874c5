"""Two ranks, the second of which never comes to their third all-reduce. They have more files open
than `select` can tell apart, as the connections of a thousand ranks would be."""

import os
import resource
import time

import torch
import torch.distributed as dist

from megalong.config import Config, DataConfig
from megalong.config.run import RunConfig
from megalong.parallel import launch, watch_ranks


def wait_for_a_disk():
    time.sleep(1000)


data = DataConfig(data_path=("none",), tokenizer_type="ByteTokenizer")
run = RunConfig(hang_timeout_seconds=5, distributed_timeout_minutes=1)
config = Config(run=run, data=data).resolve(2)
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = [os.dup(0) for _ in range(1024)]
with launch(config) as mesh, watch_ranks(mesh, config.run):
    for number in range(3):
        if number == 2 and mesh.rank == 1:
            wait_for_a_disk()
        dist.all_reduce(torch.ones(1), group=mesh.data_group)
