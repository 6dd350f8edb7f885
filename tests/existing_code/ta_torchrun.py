"""torchrun --standalone --nproc-per-node 2 ta_torchrun.py"""

import torch
import torch.distributed as dist
import torchattacks

import victim

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
