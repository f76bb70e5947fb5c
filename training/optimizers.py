"""Which optimizer updates which parameter, and how does Muon make its update?

AdamW updates everything, or Muon updates the matrices inside the blocks and AdamW the embedding, the head and the
norms. One learning rate serves both, because Muon's update is scaled to the size that AdamW's usually has.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharding import is_part, like, whole

OPTIMIZERS = ("adamw", "muon")

# Coefficients of the quintic Newton-Schulz iteration: steepest at zero, so that five steps bring small singular values
# near 1, at the price of never settling exactly on 1 (K. Jordan, https://kellerjordan.github.io/posts/muon/).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

# Matrices orthogonalised by one batched product. Fixed, not derived from the number of ranks: a matrix product may
# round differently in a batch of another size, and the bits must not depend on how many ranks share the work.
MATRICES_PER_BATCH = 4


def build_optimizers(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    muon_momentum: float = 0.95,
    muon_dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every trainable parameter of `model` exactly once.

    "adamw" gives [AdamW]; "muon" gives [Muon, AdamW], or only one of them where the other would be empty.
    Weight decay is decoupled (arXiv 1711.05101) and reaches matrices only: norms, biases and embeddings (a head tied
    to the embedding is one) have none. Each parameter group carries `base_lr`; the loop sets
    `group["lr"] = group["base_lr"] * factor`.

    Set `optimizer.found_inf` to a one-element float tensor on the parameters' device before `step()` to skip the step
    on the device, without asking the host: at 1.0 parameters and state keep their bits, at 0.0 it is an ordinary step.

    muon_dtype is that of Muon's matrix products; bf16 where the device is fast in it.

    `model` may be wrapped in DDP. Raises ValueError for an unknown name or a model with nothing to train.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimizer must be one of {OPTIMIZERS}, not {name!r}")
    hidden, other_matrices, undecayed = _split_by_role(model)
    if not (hidden or other_matrices or undecayed):
        raise ValueError("the model has no trainable parameters")

    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon" and hidden:
        optimizers.append(
            Muon(
                hidden, lr=learning_rate, weight_decay=weight_decay, momentum=muon_momentum, iteration_dtype=muon_dtype
            )
        )
    decayed = other_matrices if name == "muon" else hidden + other_matrices
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if groups:
        # Fused is the only implementation that honours found_inf; CPU, CUDA, MPS and XPU all have it.
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = learning_rate
    return optimizers


def _split_by_role(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters: matrices inside the blocks, experts' too; other ones, such as the head; what is never decayed.

    Routers are among the others: their rows are scores of single experts, and none of them a direction of many.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    hidden, other_matrices, undecayed = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            undecayed.append(parameter)
        elif "layers" in name.split(".") and not name.endswith(".mlp.gate.weight"):
            hidden.append(parameter)
        else:
            other_matrices.append(parameter)
    return hidden, other_matrices, undecayed


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is replaced by (nearly) the closest orthogonal matrix.

    K. Jordan, https://kellerjordan.github.io/posts/muon/. Decoupled weight decay and the factor
    0.2·sqrt(max(rows, cols)), which gives the update the root mean square that AdamW's has: arXiv 2502.16982 §2.2.

    When torch.distributed runs with several ranks, every rank keeps every momentum (gradients are already averaged, so
    they agree, and a checkpoint needs no gather), or of a sharded matrix its part. Each orthogonalises its share of the
    matrices and receives the others: the same bits as one rank, because the matrices are batched in the same way
    (`MATRICES_PER_BATCH`).
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        iteration_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.iteration_dtype = iteration_dtype
        for group in self.param_groups:
            if any(parameter.ndim not in (2, 3) for parameter in group["params"]):
                raise ValueError("Muon updates matrices, or stacks of them, only")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `self.found_inf` is 1.0. Every rank calls it."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf.reshape(()) != 0
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                _assign(buffer, torch.lerp(buffer, parameter.grad, 1.0 - group["momentum"]), skip)
            for batch, updates in self._orthogonal_updates(parameters, group["momentum"]):
                for parameter, update in zip(batch, updates.unbind(), strict=True):
                    update = update.mT if _is_tall(parameter) else update
                    scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                    decayed = parameter * (1.0 - group["lr"] * group["weight_decay"])
                    _assign(parameter, decayed.add_(like(update, parameter), alpha=-group["lr"] * scale), skip)

    def _orthogonal_updates(self, parameters: list[Tensor], momentum: float):
        """Yield (parameters, their updates (batch, short side, long side)); of W batches each rank computes one."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if ranks > 1 else 0
        batches = _batches_of_equal_shape(parameters)
        for first in range(0, len(batches), ranks):
            shared = batches[first : first + ranks]
            directions = self._directions(shared, rank, momentum)
            updates = None if directions is None else orthogonalize(directions, self.iteration_dtype)
            if ranks == 1:
                yield shared[rank], updates
                continue
            shapes = [(len(batch), *_lying_shape(batch[0])) for batch in shared]
            for batch, shape, flat in zip(
                shared, shapes, self._gather(updates, shapes, ranks, shared[0][0].device), strict=False
            ):
                yield batch, flat[: math.prod(shape)].view(shape)

    def _gather(self, updates: Tensor | None, shapes: list[tuple], ranks: int, device: torch.device) -> Tensor:
        """Every rank's updates, flat, padded to the largest: (ranks, elements). `updates` is None on an idle rank."""
        longest = max(math.prod(shape) for shape in shapes)
        mine = torch.zeros(longest, dtype=self.iteration_dtype, device=device)
        if updates is not None:
            mine[: updates.numel()] = updates.flatten()
        gathered = mine.new_empty(ranks, mine.numel())
        dist.all_gather(list(gathered.unbind()), mine)
        return gathered

    def _directions(self, shared: list[list[Tensor]], rank: int, momentum: float) -> Tensor | None:
        """Those of this rank's batch. Of sharded matrices all ranks put all directions together, one batch after another."""
        mine = None
        for place, batch in enumerate(shared):
            if place == rank or is_part(batch[0]):
                directions = torch.stack([self._direction(parameter, momentum) for parameter in batch])
                mine = directions if place == rank else mine
        return mine

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """The Nesterov direction, laid on its side (rows <= columns), where the Gram matrix is smallest."""
        assert parameter.grad is not None, "only parameters with a gradient have a direction"
        direction = whole(torch.lerp(parameter.grad, self.state[parameter]["momentum_buffer"], momentum))
        return direction.mT if _is_tall(parameter) else direction


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(…, rows <= columns) matrices U·S·Vᵀ -> about U·Vᵀ: singular values of roughly 0.7 … 1.2 instead of S.

    Five Newton-Schulz steps in `dtype`, which is the result's; they forgive the rounding of bf16. Zero matrices stay zero.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    # The iteration needs every singular value <= 1; the Frobenius norm bounds them. In fp32, before any rounding.
    shape, matrices = matrices.shape, matrices.float().flatten(0, -3)
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    x = x.to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.view(shape)


def _batches_of_equal_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Matrices of one shape, either way up, at most `MATRICES_PER_BATCH` a batch; costly first, so ranks are even."""
    by_shape = defaultdict(list)
    for parameter in parameters:
        by_shape[_lying_shape(parameter)].append(parameter)
    return [
        same_shape[first : first + MATRICES_PER_BATCH]
        for _, same_shape in sorted(by_shape.items(), key=lambda item: -math.prod(item[0]))
        for first in range(0, len(same_shape), MATRICES_PER_BATCH)
    ]


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _lying_shape(matrix: Tensor) -> tuple[int, ...]:
    """The shape of a matrix, or of a stack of them, with its short side first."""
    return *matrix.shape[:-2], *sorted(matrix.shape[-2:])


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """target <- value, unless the device-side flag `skip` says to keep it."""
    target.copy_(value if skip is None else torch.where(skip, target, value))
