"""Classify handwritten digits on several ranks: ``torchrun --nproc-per-node 2 examples/ddp_digits.py``."""

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thor_fx
from thor_fx.distributed import checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("backend", nargs="?", default="inductor")
parser.add_argument(
    "--checkpoints", metavar="FOLDER", help="save here after every epoch, and resume from here"
)
parser.add_argument("--epochs", type=int, default=20)
args = parser.parse_args()

dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # a rank that waits longer raises
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

net = thor_fx.compile(net, backend=args.backend)  # instead of torch.compile
model = DistributedDataParallel(net)
opt = thor_fx.Thor(model, lr=0.01, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)

done = 0
if args.checkpoints and (folder := checkpoint.newest(args.checkpoints)):
    saved = checkpoint.load(folder)
    net.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    done = saved["epochs"]
    if rank == 0:
        print(f"resumed from {folder}")

for epoch in range(done + 1, args.epochs + 1):
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch))  # the same on all ranks
    for batch in order.split(128)[:-1]:
        mine = batch[rank::ranks]
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        opt.step()
        opt.zero_grad()
    if args.checkpoints:
        state = {"model": net.state_dict(), "optimizer": opt.state_dict(), "epochs": epoch}
        checkpoint.save(f"{args.checkpoints}/{epoch}", state)
    if rank == 0:
        with torch.no_grad():
            accuracy = (net(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"epoch {epoch}: loss {loss.item():.4f}, held-out accuracy {accuracy:.3f}")
dist.destroy_process_group()
