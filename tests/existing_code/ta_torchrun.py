"""torchrun --standalone --nproc-per-node 2 ta_torchrun.py, which it does itself when started without."""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torchattacks

import victim

if "RANK" not in os.environ:
    ranks = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    environ = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}
    sys.exit(subprocess.call([sys.executable, "-m", "torch.distributed.run", *ranks, __file__], env=environ))

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
model, images, labels = victim.load()
images, labels = images[rank::size], labels[rank::size]
adversarial = torchattacks.SmoothAdvPGD(model)(images, labels)
victim.check(adversarial, images, 1.0)
count = torch.tensor(len(adversarial))
dist.all_reduce(count)
assert count == 6 and size == 2, (count, size)
dist.destroy_process_group()
