"""How do several ranks hold one model, and how do they end a step together?

ddp     each has all of it; gradients are averaged
fsdp    each has a part of every weight, of its gradient and of its optimizer state, and a block's weights are gathered for
        the time that it computes (Zhao et al. 2023, https://arxiv.org/abs/2304.11277; in torch as FSDP2)
deepspeed   as its config says, once there is an optimizer (training/deepspeed.py)

Under either, neighbouring ranks may share the matrices of each block and the vocabulary (tensor_parallel.py), and the tokens of
each row (context.py). Those that share either are one to whom samples are divided.

The order in which a model is changed is fixed here: its matrices split, then sharded, where it starts on no device before it
has weights, else when it has them; told with whom it shares rows and which activations to keep; compiled in place; wrapped in
DDP.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from context import Context
from errors import UserError
from kernels.recompute import share_kept, ways
from layers import Block
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks
from sharding import ZERO, gives_up_blocks, has_parts, is_part, is_sharded
from training.config import TrainConfig
from training.deepspeed_json import read_settings, stage_of
from training.splitting import check_splits, split_matrices


def grouped(ranks: Ranks, config: TrainConfig) -> Ranks:
    """The ranks, of which as many work on each micro-batch as the options say. UserError where they or the batch do not do."""
    size = config.ranks_of_a_batch
    if ranks.world_size % size:
        flags = (("--context_parallel", config.context_parallel), ("--tensor_parallel", config.tensor_parallel))
        given = " times ".join(f"{flag} {number}" for flag, number in flags if number > 1)
        raise UserError(f"{given} does not divide the number of ranks, {ranks.world_size}: give what does, or 1")
    ranks = dataclasses.replace(ranks, sharing=size)
    if config.batch_size < ranks.data.world_size:
        those = "ranks" if size == 1 else f"groups of {size} ranks"
        raise UserError(
            f"--batch_size {config.batch_size} is smaller than the number of {those}, {ranks.data.world_size}"
        )
    return ranks


def share_rows(model: nn.Module, ranks: Ranks, size: int) -> None:
    """Let `size` ranks share the rows of the model, and of each part of it that is one; of those of one micro-batch, others
    share its matrices."""
    if size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh

    shape = ranks.world_size // ranks.sharing, size, ranks.sharing // size
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("data", "context", "matrices"))["context"]
    context = Context(mesh.get_group().group_name, size, mesh.get_local_rank())
    for module in model.modules():
        if isinstance(module, Transformer):
            module.context = context


def sharding_of(config: TrainConfig, ranks: Ranks, shape: ModelConfig) -> Callable[[nn.Module], None] | None:
    """What leaves each rank its part of a model of this shape, as the options ask for it, or None where it is whole on each.
    UserError."""
    if config.strategy == "deepspeed":  # which shares it out with its optimizer (training/loading.py, make_optimizers)
        return (lambda model: None) if ranks.world_size > 1 else None
    if config.tensor_parallel > 1:
        check_splits(shape, config.tensor_parallel)
    data = ranks.world_size // config.tensor_parallel
    sharded = config.strategy == "fsdp" and data > 1
    if sharded and data % (config.shard_size or 1):
        raise UserError(
            f"--shard_size {config.shard_size} does not divide the number of ranks, {ranks.world_size}"
            + (f", over --tensor_parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else "")
        )
    return partial(share_out, config=config, ranks=ranks) if sharded or config.tensor_parallel > 1 else None


def share_out(model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
    """Leave each rank its part of the model, in place: of the matrices that neighbours share, then of every parameter. The
    model may be on the meta device, and is then without weights.

    Gradients of ranks that have the same part are averaged by FSDP, or where there is none by `gradient_sync`.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size, kind = config.tensor_parallel, ranks.device.type
    data = ranks.world_size // size
    sharded = config.strategy == "fsdp" and data > 1
    parts = (config.shard_size or data) if sharded else 1
    mesh = init_device_mesh(kind, (data // parts, parts, size), mesh_dim_names=("copies", "parts", "matrices"))
    if size > 1:
        split_matrices(model, mesh["matrices"])
    if sharded:
        shard_model(
            model, mesh["parts"] if data == parts else mesh["copies", "parts"],
            reshard_after_forward=config.reshard_after_forward, offload=config.offload,
        )  # fmt: skip
        return
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(ranks.device)
    if data > 1:
        model.averaged_over = mesh["copies"].get_group()  # type: ignore[assignment]


def shard_model(model: nn.Module, mesh: Any, *, reshard_after_forward: bool, offload: str) -> None:
    """Leave each rank of `mesh`, of (copies, parts) or parts alone, a part of every parameter, in place.

    Ranks of one row of the mesh share one copy of the model; each row has a copy of its own (HSDP). Gradients are reduced in
    fp32. What the blocks have not, embedding, head and last norm, stays gathered from the forward pass to the end of the
    backward pass, as the loss reads the head's weight beside the model's forward. offload: "all" keeps parts, gradients and
    optimizer state in the host's memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    size = mesh.size(-1)
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        "shard_placement_fn": lambda parameter: _placement(parameter, size),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if offload == "all"
        else OffloadPolicy(),
    }
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in (*blocks, model):
        reshards = reshard_after_forward and module is not model
        fully_shard(module, reshard_after_forward=reshards, **settings)
        module.reshards = reshards  # type: ignore[assignment]  # for sharding.gathered to put back
    # what is gathered next in the backward pass is said, not learned from the forward passes before it, which may be more on
    # one rank than on another: rank 0 draws samples
    for module, before in zip((*blocks, model), (blocks[0], *blocks), strict=True):
        module.set_modules_to_backward_prefetch([before])  # type: ignore[operator]


def describe_strategy(config: TrainConfig, ranks: Ranks) -> str:
    """One line for the start of a run."""
    rows, matrices = config.context_parallel, config.tensor_parallel
    shared = f"; each {matrices} share the matrices and the vocabulary" if matrices > 1 else ""
    shared += f"; each {rows} {'ranks ' * (matrices == 1)}share the tokens of a row" if rows > 1 else ""
    return _describe_weights(config, ranks.world_size // matrices) + shared


def _describe_weights(config: TrainConfig, world_size: int) -> str:
    if world_size == 1 and config.tensor_parallel > 1:
        return "all ranks hold one model"
    if world_size == 1:
        return f"{config.strategy}: one rank has all of the model, and nobody to share it with"
    if config.strategy == "ddp":
        return "ddp: each rank has all of the model"
    if config.strategy == "deepspeed" and config.deepspeed:
        stage = stage_of(read_settings(config.deepspeed))
        shared = ["optimizer state", "gradients", "weights"][:stage]
        return f"deepspeed, ZeRO {stage}: each rank has 1/{world_size} of the {', '.join(shared)}"
    size = config.shard_size or world_size
    kept = "given up after its forward pass" if config.reshard_after_forward else "kept until its backward pass"
    copies = f", {world_size // size} copies" if size < world_size else ""
    offloaded = "; weights and optimizer state in the host's memory" if config.offload == "all" else ""
    return f"fsdp: each rank has 1/{size} of the weights{copies}; a block's are {kept}{offloaded}"


def _placement(parameter: Any, size: int) -> Any:
    """Along the rows; of stacked experts along what is inside one, so that each stays a tensor that can be taken alone."""
    from torch.distributed.tensor import Shard

    if (
        is_part(parameter)
        and parameter.placements == (Shard(0),)
        and parameter.ndim == 2
        and parameter.shape[1] % size == 0
    ):
        return Shard(1)  # not the dimension that is split already
    if parameter.ndim < 3:
        return Shard(0)
    if parameter.shape[-1] % size:
        raise UserError(f"--strategy fsdp: experts of {parameter.shape[-1]} columns cannot be split over {size} ranks")
    return Shard(parameter.ndim - 1)


def prepare_model(
    model: nn.Module, ranks: Ranks, *, compile_model: bool, again: str = "none", context: int = 1
) -> nn.Module:
    """The model, whose rows `context` ranks share, compiled in place (so that parameter names stay) and, where ranks have all
    of it each, wrapped in DDP.

    again: --activation_checkpointing, which activations are computed again. A share is the compiler's to divide, in every
    block, where there is one.
    """
    share_rows(model, ranks, context)
    sharded = is_sharded(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    share = share_kept(again)
    by_compiler = compile_model and share is not None
    for block, way in zip(blocks, ways("none" if by_compiler else again, len(blocks)), strict=True):
        block.recompute = way
    if compile_model and (sharded or again != "none"):
        _compile_blocks(blocks, 1.0 if share is None else share)
    elif compile_model:
        model.compile()
    if ranks.world_size == 1 or sharded or has_parts(model):
        return model
    # gradients live in DDP's buckets, which saves a copy of them; buffers (4-bit weights) never change
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def _compile_blocks(blocks: Sequence[nn.Module], share: float) -> None:
    """Compile each in place, to keep no more than this share of its activations for its backward pass.

    Of a whole model the compiler would compute all blocks again before the first of them has its backward pass.
    """
    import torch._dynamo.config
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = share
    torch._dynamo.config.optimize_ddp = False  # DDP's gradients wait for no more than a block, which must not be cut
    # blocks of another kind, and with dropout each of them, are compiled anew
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()


def loss_of(model: nn.Module, loss: Callable) -> Callable:
    """A function (model, batch) -> (loss, metrics), called by the model's engine where it has one, which must see it."""
    return vars(model)[ZERO].loss(loss) if ZERO in vars(model) else loss


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, a backward pass averages gradients over the ranks only if `enabled`: once a step, not once a micro-batch.

    Where blocks are given up after their forward pass, their gradients are, too: each micro-batch's are averaged. Where ranks
    share matrices and DDP, which knows of no parts, cannot be: all are averaged at the end.
    """
    if ZERO in vars(model):
        vars(model)[ZERO].accumulate(last=enabled)
    elif is_sharded(model) and not gives_up_blocks(
        model
    ):  # else what was accumulated would be as large as the whole model
        model.set_requires_gradient_sync(enabled)  # type: ignore[operator]
    if isinstance(model, nn.parallel.DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield
    if enabled and (group := getattr(model, "averaged_over", None)) is not None:
        average_gradients(model, group)


def average_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Every gradient, or this rank's part of it, becomes the mean over the ranks of `group`, which have the same part."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [gradient.to_local() if is_part(gradient) else gradient for gradient in gradients]  # type: ignore[attr-defined]
    for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in local]:
        work.wait()
    torch._foreach_div_(local, float(group.size()))


def settle_gradient_buckets(model: nn.Module, backward: Callable[[], object]) -> None:
    """Let DDP finish arranging its gradient buckets before the first step.

    DDP regroups its buckets after the first backward pass, which changes the order in which three or more ranks are
    summed. Without two throw-away passes at every start, a resumed run's first step would differ in the last bit. What they
    draw is drawn again by the first step.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices)):
            for _ in range(2):
                backward()
        model.zero_grad(set_to_none=True)


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1 (a scheduler's warning) or SIGHUP (the terminal has gone): the loop finishes its step,
    saves and leaves. A second signal leaves at once.

    Under nohup SIGHUP is ignored when the process starts, and stays so.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # os.write, not print: a handler may interrupt a print that holds the stream's lock
        os.write(sys.stderr.fileno(), f"\n{self.signal.name}: finishing this step, then saving\n".encode())

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any rank received, the same one on all of them; None without one. Every rank calls it."""
        received = ranks.sum([float(self.signal or 0) * (rank == ranks.rank) for rank in range(ranks.world_size)])
        return signal.Signals(int(max(received))) if any(received) else None

    def received_by_any(self, ranks: Ranks) -> signal.Signals:
        """`agreed`, after a run that ended early: a signal is all that ends one without an error."""
        received = self.agreed(ranks)
        assert received is not None
        return received
