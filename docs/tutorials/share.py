"""share: each process collects its share of the files; all of them then have the statistics of all."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from actsteer import collect
from reference.mnist.model import SITES, mlp

folder, model = Path(sys.argv[1]), mlp()
model.load_state_dict(torch.load(folder / "network.pt"))
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


def batches(paths):
    for path in paths:
        part = load_file(path)
        yield part["images"].float(), part["digits"]


paths = sorted(folder.glob("part-*.safetensors"))[rank::world]
share = collect(model, batches(paths), sites=SITES, by=1, covariance=True, progress=rank == 0)
whole = share.all_reduce()
if rank == 0:
    print(f"{share.total()['2'].count:,} images here, {whole.total()['2'].count:,} on {world} processes")
    whole.save(folder / "whole.safetensors")
dist.destroy_process_group()
