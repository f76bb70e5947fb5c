"""Do all ranks still hold the same weights? Under ddp nothing but arithmetic keeps them equal.

A fault of a device or its memory, or code of a user's that differs between ranks, makes a replica another model, and nothing
shows it: gradients are averaged on. So their bits are compared before each checkpoint and each evaluation.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UserError
from ranks import Ranks
from sharding import is_part, is_sharded


def check_replicas(model: nn.Module, ranks: Ranks, step: int) -> None:
    """UserError, on every rank, naming the first parameter that is not everywhere the same, and whose. Every rank calls it.

    A sharded model has no replicas to compare.
    """
    if ranks.world_size == 1 or is_sharded(model):
        return
    replicated = {name.removeprefix("module."): p for name, p in model.named_parameters() if not is_part(p)}
    names = list(replicated)
    own = torch.stack([_digest(parameter) for parameter in replicated.values()]).cpu()  # (parameters,)
    gathered = [torch.empty_like(own) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, own)
    digests = torch.stack(gathered)  # (ranks, parameters)
    usual = digests.mode(0).values
    if not (different := digests != usual).any():
        return
    first = int(different.any(0).nonzero()[0])
    others = different[:, first].nonzero().flatten().tolist()
    whose = f"rank {', '.join(map(str, others))}" if len(others) * 2 < ranks.world_size else "one of the ranks"
    raise UserError(
        f"step {step}: {names[first]} is not the same on all ranks, {whose} has other bits ({int(different.any(0).sum())} of "
        f"{len(names)} parameters differ), and this step is not saved: a device or its memory has failed, or code of yours "
        "differs between ranks; go on with --checkpoint latest, on another machine if it happens again"
    )


def _digest(parameter: Tensor) -> Tensor:
    """0-dim int64: the exclusive or of all its bits' words."""
    return torch.hash_tensor(parameter.detach()).view(torch.int64)
