"""Two ranks, the second of which never comes to their third all-reduce."""

import time

import torch
import torch.distributed as dist

from megalong.config import Config, DataConfig
from megalong.config.run import RunConfig
from megalong.parallel import launch, watch_ranks


def wait_for_a_disk():
    time.sleep(1000)


data = DataConfig(data_path="none", tokenizer_type="ByteTokenizer")
config = Config(run=RunConfig(hang_timeout_seconds=1), data=data).resolve(2)
with launch(config) as mesh, watch_ranks(mesh, config.run):
    for number in range(3):
        if number == 2 and mesh.rank == 1:
            wait_for_a_disk()
        dist.all_reduce(torch.ones(1), group=mesh.data_group)
