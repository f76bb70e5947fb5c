"""How does Muon make its update, and how do several ranks share the work?"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.linear import product, runs_on_onednn
from sharding import is_part, like, whole
from training.update_rules import assign, skip_flag

# Coefficients of the quintic Newton-Schulz iteration: steepest at zero, so that five steps bring small singular values
# near 1, at the price of never settling exactly on 1 (K. Jordan, https://kellerjordan.github.io/posts/muon/).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

# Matrices orthogonalised by one batched product. Fixed, not derived from the number of ranks: a matrix product may
# round differently in a batch of another size, and the bits must not depend on how many ranks share the work.
MATRICES_PER_BATCH = 4


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is replaced by (nearly) the closest orthogonal matrix.

    K. Jordan, https://kellerjordan.github.io/posts/muon/. Decoupled weight decay and the factor
    0.2·sqrt(max(rows, cols)), which gives the update the root mean square that AdamW's has: arXiv 2502.16982 §2.2.

    When torch.distributed runs with several ranks, every rank keeps every momentum (gradients are already averaged, so
    they agree, and a checkpoint needs no gather), or of a sharded matrix its part. Each orthogonalises its share of the
    matrices and receives the others: the same bits as one rank, because the matrices are batched in the same way
    (`MATRICES_PER_BATCH`).
    """

    _step_supports_amp_scaling = True  # torch's word for: looks at found_inf

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
        skip = skip_flag(self)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                assign(buffer, torch.lerp(buffer, parameter.grad, 1.0 - group["momentum"]), skip)
            for batch, updates in self._orthogonal_updates(parameters, group["momentum"]):
                for parameter, update in zip(batch, updates.unbind(), strict=True):
                    update = update.mT if _is_tall(parameter) else update
                    scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                    decayed = parameter * (1.0 - group["lr"] * group["weight_decay"])
                    assign(parameter, decayed.add_(like(update, parameter), alpha=-group["lr"] * scale), skip)

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
            if place == rank or any(map(is_part, batch)):
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
    # The iteration needs every singular value <= 1; the Frobenius norm bounds them. In fp32, before any rounding.
    shape, matrices = matrices.shape, matrices.float().flatten(0, -3)
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    x = x.to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = _newton_schulz_step(x)
    return x.view(shape)


def _newton_schulz_step(x: Tensor) -> Tensor:
    """a·X + (b·G + c·G²)·X with G = X·Xᵀ, for x (matrices, rows, columns); G is its own transpose."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    if runs_on_onednn(x, x):
        grams = [product(one, one) for one in x]
        polynomials = [product(gram, gram).mul_(c).add_(gram, alpha=b) for gram in grams]
        return torch.stack([product(p, one.mT).add_(one, alpha=a) for p, one in zip(polynomials, x, strict=True)])
    gram = x @ x.mT
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(x, polynomial, x, beta=a)


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
