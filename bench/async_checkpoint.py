"""How long does the training loop wait for a checkpoint, with --async_checkpoint and without, and what do steps cost meanwhile?

    python bench/async_checkpoint.py [--hidden_size 640] [--num_layers 10] [--saves 5] [--device cpu] [--folder .]

One model with AdamW, saved in turn by the loop and by a thread, both to --folder, which should be on the disk that is
meant. The medians are compared; the first save of the thread stands apart, as it asks for the memory that the others have.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import ArgumentParser
from checkpointing.background import HostRoom
from checkpointing.save import Checkpoint, collect
from errors import run_script
from model import Transformer
from model_config import ModelConfig
from training.optimizers import build_optimizers

STEPS = 3  # whose time is compared


def main() -> None:
    parser = ArgumentParser(prog="bench/async_checkpoint.py", description=__doc__)
    parser.add_argument("--hidden_size", type=int, default=640)
    parser.add_argument("--num_layers", type=int, default=10)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--folder", default=".", help="checkpoints are written in a folder of their own below it")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = ModelConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_layers, num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0, zero_residual=True)
    model.to(args.device)
    optimizers = build_optimizers(model, name="adamw", learning_rate=1e-4, weight_decay=0.1)
    ids = torch.randint(args.vocab_size, (1, 64), device=args.device)

    def step_seconds() -> float:
        start = time.perf_counter()
        model.logits(model(ids)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step_seconds()  # the optimizer's state is there from here
    plain = statistics.median(step_seconds() for _ in range(STEPS))
    room, waits, others, steps = HostRoom(), [], [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def checkpoint(step: int) -> Checkpoint:
            return collect(
                folder, step, model=model, optimizers=optimizers, state={}, files={}, keep_checkpoints=1
            )  # fmt: skip

        for number in range(args.saves):
            start = time.perf_counter()
            assert checkpoint(2 * number).write().ok
            others.append(time.perf_counter() - start)
            start = time.perf_counter()
            writing = checkpoint(2 * number + 1).start_writing(room)
            waits.append(time.perf_counter() - start)
            while not writing.is_done:
                steps.append(step_seconds())
            assert writing.result().ok

    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = 4 * parameters * 3  # with AdamW's two averages
    wait, other = statistics.median(waits[1:] or waits), statistics.median(others)
    print(f"{parameters / 1e6:.0f}M parameters and AdamW: {size / 1e9:.2f} GB, {args.device}, {args.threads} thread(s)")
    print(f"the loop waits for a synchronous save    {other:7.3f} s   {size / 1e9 / other:.1f} GB/s")
    print(f"                   an asynchronous one   {wait:7.3f} s   {wait / other:.1%} of it")
    print(f"                   the first of these    {waits[0]:7.3f} s   {waits[0] / other:.1%}, with memory new")
    print(f"a step alone {plain:.3f} s, while a thread writes {statistics.median(steps):.3f} s")


if __name__ == "__main__":
    run_script(main)
