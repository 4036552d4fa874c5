"""Ranks and groups: the mesh, DeepSpeed's view of it, and Megatron-core without a GPU."""

from megalong.parallel.mesh import Mesh, check_precision, launch
from megalong.parallel.peers import watch_peers

__all__ = ["Mesh", "check_precision", "launch", "watch_peers"]
