"""Six ranks, two sequences of three: the subgroups, made one group at a time and as NCCL splits."""

import torch
import torch.distributed as dist

from megalong.attention.exchange import SequenceGroup


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sequences = [[0, 2, 4], [1, 3, 5]]
    groups = [dist.new_group(ranks) for ranks in sequences]
    group = groups[rank % 2]

    made = SequenceGroup.create(group, [1, 2, 3])
    assert (made.rank, made.size) == (rank // 2, 3)
    assert made.subgroups[3] is group and sorted(made.subgroups) == [2, 3]
    expected = {0: [0, 2], 1: [1, 3], 2: [0, 2], 3: [1, 3], 4: [4], 5: [5]}[rank]
    assert dist.get_process_group_ranks(made.subgroups[2]) == expected

    # With NCCL, what PyTorch is asked to split, and that nothing else is made.
    splits = []
    dist.get_backend = lambda group: "nccl"
    dist.group.WORLD.bound_device_id = torch.device("cpu", 0)
    dist.split_group = lambda parent, parts, timeout: splits.append((parent, parts))
    dist.new_group = dist.all_gather_object = None
    SequenceGroup.create(group, [2])
    [(parent, parts)] = splits
    assert parent is group
    [mine] = [part for part in parts if made.rank in part]
    assert [sequences[rank % 2][place] for place in mine] == expected


if __name__ == "__main__":
    main()
