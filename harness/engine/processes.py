"""Several processes share one work, as torchrun starts them: one on each GPU, each with the model.
"""
import itertools

import torch
import torch.distributed as dist


def rank():
    """This process's number, 0 for the one that writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items):
    """Those of a list that fall to this process."""
    return items[rank()::world()]


def collect(mine):
    """What every process has, a list in the order of their numbers; all wait for the last one."""
    everyone = [mine] * world()
    if world() > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def barrier():
    """Wait until all processes have come this far."""
    collect(None)


def collect_shares(mine):
    """A list again, of all processes' shares of it. For example [0, 2] and [1] of two processes
    make [0, 1, 2].
    """
    everyone = collect(mine)
    return [everyone[i % world()][i // world()] for i in range(sum(map(len, everyone)))]


def add_up(figures):
    """The sums of all processes' figures, dicts from names to numbers."""
    everyone = collect(figures)
    names = dict.fromkeys(itertools.chain(*everyone))
    return {name: sum(part.get(name, 0) for part in everyone) for name in names}


def add_up_gradients(weights):
    """Give each weight the sum of all processes' gradients."""
    if world() == 1:
        return
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    dist.all_reduce(flat)
    for weight, gradient in zip(weights, flat.split([weight.numel() for weight in weights])):
        weight.grad = gradient.view_as(weight)
