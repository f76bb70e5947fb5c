"""How does a loss of the user's own take the place of a stage's? (--loss_file FILE:FUNCTION)

    def loss(model, batch, stage_loss): ...

It is a stage's `loss`, with the stage's own as a third argument: it returns the loss summed over `batch.weight` targets, never
a mean, as a tensor of no dimensions, or that and {metric: (sum, weight)}. The loop divides once. Batches, evaluation and its
val_loss stay the stage's.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from batches.micro_batch import MicroBatch
from errors import UserError, is_out_of_memory
from ranks import unwrap
from stages.pretrain import use_row_keys
from training.config import TrainConfig
from training.examples_data import use_sample_keys
from training.metrics import Metrics
from training.user_code import read_loss

Loss = Callable[[nn.Module, MicroBatch], tuple[Tensor, Metrics]]


def choose_loss(config: TrainConfig, stage_loss: Loss) -> Loss:
    """The stage's loss, or that of --loss_file over it. UserError where its file fails, now or at a batch."""
    if not config.loss_file:
        return stage_loss
    code, name = read_loss(config.loss_file)
    function = code.run()[name]
    use_keys = use_row_keys if config.on_text else use_sample_keys

    def loss(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        use_keys(unwrap(model), batch)  # dropout follows the samples in a forward pass that is not the stage's, too
        try:
            total, metrics = _checked(function(model, batch, stage_loss))
        except Exception as error:
            if is_out_of_memory(error):
                raise  # for which a smaller micro-batch is the advice
            raise UserError(
                f"{code.failure(error, name)}; the checkpoints in {config.save_dir} are as they were: correct the file and go "
                "on with --checkpoint latest"
            ) from error
        return total, {"loss": (total.detach(), batch.weight)} | metrics

    return loss


def _checked(returned: Any) -> tuple[Tensor, Metrics]:
    """(the summed loss, its metrics) of what the function returned; TypeError for anything else."""
    total, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(total, Tensor) or total.dim() or not isinstance(metrics, dict):
        shape = f" of shape {tuple(total.shape)}" if isinstance(total, Tensor) else ""
        raise TypeError(
            f"it must return the summed loss, a tensor of no dimensions, or that and a dict of metrics, and returned "
            f"{type(returned).__name__}{shape}"
        )
    if not total.requires_grad:
        raise TypeError("the loss that it returned does not depend on what is trained")
    return total, metrics
