"""What memory and time does each setting of --activation_checkpointing take?

    python bench/activations.py                a Llama of 8 blocks on this machine's device
    python bench/activations.py --compile_model

A step is forward, loss and backward on one micro-batch; gradients are there before it. The memory is the most that tensors
take in it beyond what is there before. Settings take turns, a step each, so that whatever else the machine does befalls all
of them; the time is the median of the rounds, of the processor on a CPU. Both stand beside what "none" takes.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import ArgumentParser  # noqa: E402
from bench.measure import environment, synchronize, tensor_peak_bytes  # noqa: E402
from errors import run_script  # noqa: E402
from kernels.choice import choose_kernels  # noqa: E402
from kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from model import Transformer  # noqa: E402
from model_config import ModelConfig  # noqa: E402
from ranks import Ranks, choose_device  # noqa: E402
from training.parallel import prepare_model  # noqa: E402

SETTINGS = ("none", "selective", "0.75", "0.5", "0.25", "full")


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile_model", action="store_true")
    args = parser.parse_args()
    device = choose_device("auto")
    heads = args.hidden_size // 64
    mlp = -(-8 * args.hidden_size // 3 // 64) * 64
    shape = ModelConfig(8192, args.hidden_size, mlp, args.num_layers, heads, max_position_embeddings=args.length)
    ids = torch.randint(0, 8192, (args.rows, args.length), device=device)
    steps = {}
    for setting in SETTINGS:
        model = Transformer(shape, choose_kernels(["auto"], device, args.compile_model)).to(device)
        model.init_weights(0, zero_residual=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ready = prepare_model(model, Ranks(0, 1, device), compile_model=args.compile_model, again=setting)

        def step(model: Transformer = model, ready: torch.nn.Module = ready) -> None:
            hidden = ready(ids).flatten(0, 1)
            linear_cross_entropy(hidden, model.head_weight, ids.flatten()).total.backward()

        step()
        steps[setting] = step
    taken: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(args.rounds):
        for setting, step in steps.items():
            synchronize(device)
            start = clock()
            step()
            synchronize(device)
            taken[setting].append(clock() - start)
    seconds = {setting: statistics.median(times) for setting, times in taken.items()}
    peaks = {setting: tensor_peak_bytes(step, device) for setting, step in steps.items()}
    print(environment(device)["device"])
    for setting in SETTINGS:
        memory, slower = peaks[setting] / peaks["none"], seconds[setting] / seconds["none"]
        print(
            f"{setting:<10} {peaks[setting] / 2**20:7.0f} MiB  {memory:4.2f} of the memory  {slower:4.2f} of the time"
        )
    return 0


if __name__ == "__main__":
    run_script(main)
