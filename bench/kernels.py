"""How fast is each kernel beside PyTorch, its compiler and other libraries, and how near to what the device can do?

    python bench/kernels.py                               all operations at the sizes of 124M, 1B and 8B models
    python bench/kernels.py --only swiglu rope --size 8b
    python bench/kernels.py --sweeps                      what the kernels' own settings cost: programs, chunks
    python bench/kernels.py --targets                     what is measured against what is aimed at
    python bench/kernels.py --docs                        the table and plots of docs/kernels.md, from bench/results

operations.py says what is measured and what work is counted; measure.py, how it is timed. Each operation runs forward,
backward and both at once, by these providers: "eager", its plain PyTorch reference; "compile", torch.compile of that;
PyTorch's own fused function where there is one; Liger-Kernel, Unsloth, bitsandbytes and peft where they can be imported;
and ours. A provider that fails is recorded with its reason.

Rows go to bench/results/DEVICE/kernels.json as they are measured, and a later call takes up where this one ended: rows
that are there already are not measured again, unless --again. On CUDA the measuring process is replaced when a provider
breaks it. Without a GPU the tiny size runs, to try the script: Triton's kernels cannot be timed there.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import ArgumentParser  # noqa: E402
from bench import peers, report  # noqa: E402
from bench.cases import Draw, Inputs, Operation, Prepared, Way, without_other_targets  # noqa: E402
from bench.measure import (  # noqa: E402
    ceilings,
    device_slug,
    environment,
    first_line,
    input_sets,
    measuring,
    peak_bytes,
    read_results,
    relative_error,
    time_calls,
    write_results,
)
from bench.operations import chunked_loss, operations  # noqa: E402
from errors import UserError, run_script  # noqa: E402
from kernels import rms_norm as rms_norm_file  # noqa: E402
from kernels.attention_backends import sdpa_kernel_taken  # noqa: E402
from kernels.jit import why_not_triton  # noqa: E402

RESTART = 75  # exit code of a measuring process that is broken, though its results are safe
DIED = "the process died while it was measured"
PROGRAMS = (1, 2, 4, 8)  # of rms_norm.PROGRAMS_PER_MULTIPROCESSOR
CHUNK_ROWS = (512, 1024, 2048, 4096, 8192)
DIRECTIONS = ("forward", "backward", "both")


# ----------------------------------------------------------------------------------------------------------- one row


def learnable(operation: Operation, inputs: Inputs) -> Inputs:
    return {
        name: value.detach().requires_grad_() if name in operation.learned else value for name, value in inputs.items()
    }


def outputs_of(result: Any) -> list[Tensor]:
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    return [output for output in results if output.is_floating_point()]


def errors_of(operation: Operation, prepared: Prepared, inputs: Inputs, draw: Draw) -> dict[str, float | str]:
    """‖found − truth‖ / ‖truth‖ of each output and gradient, on part of the tokens of a launch of full size.

    Gradients from above are zero outside of that part, so a weight's gradient is a sum over it alone.
    """
    inputs = without_other_targets(inputs) if operation.summed else inputs
    alone = learnable(operation, operation.part_of_inputs(inputs))
    truth = outputs_of(operation.reference(**alone))
    upstream = [draw.normal(*output.shape) for output in truth]
    truth_gradients = gradients(truth, [alone[name] for name in operation.learned], upstream)
    ready = prepared.prepare(learnable(operation, inputs))
    found = outputs_of(prepared.call(**ready))
    wide = []
    for output, part in zip(found, upstream, strict=True):
        wide.append(part.to(output.dtype) if output.shape == part.shape else torch.zeros_like(output))
        if output.shape != part.shape:
            operation.part(wide[-1]).copy_(part)
    found_gradients = gradients(found, [ready[name] for name in operation.learned], wide)

    errors: dict[str, float | str] = {}
    names = [f"out{number}" for number in range(len(truth))] + [f"d{name}" for name in operation.learned]
    pairs = zip(found + found_gradients, truth + truth_gradients, strict=True)
    for name, (value, true) in zip(names, pairs, strict=True):
        if value is None:
            errors[name] = "none made"
            continue
        error = relative_error(value if value.shape == true.shape else operation.part(value), true)
        errors[name] = error if error < float("inf") else "not finite"
    return errors


def gradients(outputs: list[Tensor], wanted: list[Tensor], upstream: list[Tensor], keep: bool = False) -> list:
    if not wanted:
        return []
    learned = [(output, above) for output, above in zip(outputs, upstream, strict=True) if output.requires_grad]
    return list(
        torch.autograd.grad(
            [output for output, _ in learned], wanted, [above.to(output.dtype) for output, above in learned],
            retain_graph=keep, allow_unused=True,
        )
    )  # fmt: skip


def times_of(
    operation: Operation, size: Any, prepared: Prepared, device: torch.device, dtype: torch.dtype,
    limits: dict, directions: tuple[str, ...] = DIRECTIONS,
) -> dict:  # fmt: skip
    """{direction: {ms, wall_ms, how, rate, share}} and peak_mib of one provider; `notes` on a direction it cannot do."""
    make = lambda seed: prepared.prepare(learnable(operation, operation.inputs(size, Draw(device, dtype, seed))))  # noqa: E731
    first = make(1)
    size_of_one = sum(value.nbytes for value in first.values() if hasattr(value, "nbytes"))
    sets = [first, *(make(seed) for seed in range(2, 1 + input_sets(size_of_one, device)))]
    wanted = [[inputs[name] for name in operation.learned] for inputs in sets]
    upstream = [
        torch.randn_like(output) if output.dim() else torch.ones_like(output)
        for output in outputs_of(prepared.call(**first))
    ]

    def forward(number: int) -> list[Tensor]:
        return outputs_of(prepared.call(**sets[number]))

    def both(number: int) -> list[Tensor]:
        return gradients(forward(number), wanted[number], upstream)

    def kept(number: int) -> Callable[[], Any]:
        outputs = forward(number)
        return lambda: gradients(outputs, wanted[number], upstream, keep=True)

    row: dict[str, Any] = {}
    work = dict(zip(DIRECTIONS, operation.work(size, dtype.itemsize), strict=False))
    work["both"] = sum(work.values())
    calls = {
        "forward": lambda number: lambda: forward(number),
        "both": lambda number: lambda: both(number),
        "backward": kept,
    }
    for direction in directions if operation.learned else ("forward",):
        try:
            timing = time_calls([calls[direction](number) for number in range(len(sets))], device)
        except RuntimeError as error:  # a backward pass that runs once only, say
            if direction != "backward":
                raise
            row["notes"] = f"backward alone: {first_line(error)}"
            continue
        row[direction] = asdict(timing)
        if not operation.summed or direction == "both":
            row[direction] |= achieved(operation.bound, work[direction], timing.ms, limits)
    peak = peak_bytes(lambda: both(0) if operation.learned else forward(0), device)
    return row | {"peak_mib": None if peak is None else peak / 2**20}


def achieved(bound: str, work: float, milliseconds: float, limits: dict) -> dict[str, float | str]:
    """The rate in GB/s or TFLOP/s, and its share of the device's ceiling."""
    memory = bound == "memory"
    rate = work / milliseconds / (1e6 if memory else 1e9)
    ceiling = limits["copy_gb_s" if memory else "product_tflop_s"]
    return {"rate": rate, "unit": "GB/s" if memory else "TFLOP/s", "share": rate / ceiling}


def measure_row(
    operation: Operation, size: Any, provider: str, device: torch.device, dtype: torch.dtype, limits: dict
) -> dict:
    """Errors, times and peak of one provider, or the reason why there are none."""
    reason = why_not_triton(device)
    if reason and provider.startswith("ours"):
        return {"skipped": reason}
    untimed = None
    if device.type == "cpu" and not reason and provider.startswith(("ours", "liger", "unsloth")):
        untimed = "Triton's interpreter is for tests and says nothing about time"
    try:
        way = way_of(operation, provider)
        prepared = way if isinstance(way, Prepared) else Prepared(lambda inputs: inputs, way)
        row: dict = {}
        if provider not in operation.floors:  # they compute less
            draw = Draw(device, dtype, seed=0)
            row["errors"] = errors_of(operation, prepared, operation.inputs(size, draw), draw)
        if untimed:
            return row | {"skipped": untimed}
        return row | times_of(operation, size, prepared, device, dtype, limits)
    except peers.Missing as missing:
        return {"skipped": str(missing)}
    except Exception as error:  # whatever a provider raises is its result
        return {"failed": first_line(error)}


def way_of(operation: Operation, provider: str) -> Way | Prepared:
    if provider == "eager":
        return operation.reference
    if provider == "compile":
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # a kept graph's backward runs more than once
        torch._dynamo.reset()  # or a second size would be compiled for any size
        return torch.compile(operation.reference, dynamic=False)
    if provider in peers.LIBRARIES:
        return peers.way(provider, operation.name)
    return {**operation.ways, **operation.floors}[provider]


def providers_of(operation: Operation) -> list[str]:
    libraries = [library for library in peers.LIBRARIES if peers.offers(library, operation.name)]
    compiled = ["compile"] if operation.compiled else []
    return ["eager", *operation.ways, *operation.floors, *compiled, *libraries]


# ---------------------------------------------------------------------------------------------------------- all rows


def jobs(args, device: torch.device) -> Iterator[tuple[Operation, str, str]]:
    """(operation, size, provider) of all rows asked for."""
    for name, operation in operations().items():
        if args.only and name not in args.only:
            continue
        for size in operation.sizes:
            if size not in args.size if args.size else (size == "tiny") == (device.type == "cuda"):
                continue
            for provider in providers_of(operation):
                if not args.providers or provider in args.providers:
                    yield operation, size, provider


def measure_all(args, device: torch.device, path: Path) -> int:
    """Measure every row that the file does not have yet, writing after each; an exit code."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = read_results(path)
    with measuring(device):
        limits = asdict(ceilings(device, dtype))
        now = environment(device) | ({"git_commit": args.commit} if args.commit else {})
        now["sdpa"] = {str(width): sdpa_kernel_taken(device, dtype, width) for width in (64, 128)}
        results |= {"environment": now, "ceilings": limits}
        print(f"{now['device']}: copy {limits['copy_gb_s']:.0f} GB/s, product {limits['product_tflop_s']:.1f} TFLOP/s")
        write_results(path, results)
        for operation, size, provider in jobs(args, device):
            rows = results.setdefault("operations", {}).setdefault(operation.name, {}).setdefault(size, {})
            if provider in rows:
                continue
            if time.time() > args.until:
                print("out of time; the same command goes on from here")
                return 0
            rows[provider] = {"failed": DIED}  # what the next process finds if this one does not come back
            write_results(path, results)
            rows[provider] = measure_row(operation, operation.sizes[size], provider, device, dtype, limits)
            write_results(path, results)
            print(f"{operation.name} {size} {provider}: {report.row_text(rows[provider])}", flush=True)
            if is_broken(rows[provider], device):
                return RESTART
        if args.sweeps:
            sweep(results, path, args, device, dtype, limits)
    return 0


def is_broken(row: dict, device: torch.device) -> bool:
    """Whether this process can go on: not after a CUDA error, nor after a capture that was given up."""
    if device.type != "cuda":
        return False
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return any(str(row.get(direction, {}).get("how", "")).startswith("events") for direction in DIRECTIONS)


def sweep(results: dict, path: Path, args, device: torch.device, dtype: torch.dtype, limits: dict) -> None:
    """How the two settings that a device might want otherwise do there. Programs have no meaning on a CPU."""
    table = operations()
    found = results.setdefault("sweeps", {})

    def run(name: str, operation: Operation, size: str, value: int, way: Any, direction: str) -> None:
        at_size = found.setdefault(name, {}).setdefault(size, {})
        if str(value) in at_size or time.time() > args.until:
            return
        at_size[str(value)] = {"failed": DIED}
        write_results(path, results)
        try:
            prepared = Prepared(lambda inputs: inputs, way)
            at_size[str(value)] = times_of(
                operation, operation.sizes[size], prepared, device, dtype, limits, (direction,)
            )
        except Exception as error:
            at_size[str(value)] = {"failed": first_line(error)}
        write_results(path, results)
        print(f"{name} {size} {value}: {report.row_text(at_size[str(value)])}", flush=True)

    norm, loss = table["add_rms_norm"], table["linear_cross_entropy"]
    usual = rms_norm_file.PROGRAMS_PER_MULTIPROCESSOR
    for size in ("4096x4096", "124m", "8b") if device.type == "cuda" else ():
        for programs in PROGRAMS:
            rms_norm_file.PROGRAMS_PER_MULTIPROCESSOR = programs
            run(
                "programs per multiprocessor of the norm's backward",
                norm,
                size,
                programs,
                norm.ways["ours"],
                "backward",
            )
    rms_norm_file.PROGRAMS_PER_MULTIPROCESSOR = usual
    implementation = "triton" if device.type == "cuda" else "torch"
    for size in ("1b", "8b") if device.type == "cuda" else ("tiny",):
        whole = loss.sizes[size].tokens
        for rows in (*(rows for rows in CHUNK_ROWS if rows < whole), whole):
            run("rows of a chunk of the loss", loss, size, rows, chunked_loss(implementation, rows), "both")


def forget(path: Path, args, device: torch.device) -> None:
    """Take the rows asked for out of the file, to measure them again."""
    results = read_results(path)
    for operation, size, provider in jobs(args, device):
        results.get("operations", {}).get(operation.name, {}).get(size, {}).pop(provider, None)
    if args.sweeps:
        results.pop("sweeps", None)
    if results:
        write_results(path, results)


def supervise(argv: list[str], path: Path, until: float) -> int:
    """Measure in a process of its own; another takes over from one that was broken by what it measured."""
    while True:
        before = path.read_bytes() if path.exists() else b""
        command = [sys.executable, __file__, *(word for word in argv if word != "--again"), "--until", str(until)]
        code = subprocess.run(command, check=False).returncode
        if code == 0:
            return 0
        if path.exists() and path.read_bytes() == before:
            raise UserError(f"the measuring process ended with exit code {code} before it measured anything; see above")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    table = operations()
    sizes = list(dict.fromkeys(size for operation in table.values() for size in operation.sizes))
    parser = ArgumentParser(prog="bench/kernels.py", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=table, metavar="OPERATION", help=", ".join(table))
    parser.add_argument("--size", nargs="+", choices=sizes, metavar="SIZE", help=", ".join(sizes))
    parser.add_argument("--providers", nargs="+", help="eager, compile, ours, liger, …: these alone")
    parser.add_argument("--sweeps", action="store_true", help="vary the kernels' settings after the operations")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the results have already")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start no row later than this; the next call goes on"
    )
    parser.add_argument("--commit", help="the commit that is measured, where there is no git checkout to ask")
    parser.add_argument("--out", type=Path, help="folder of kernels.json (default: bench/results/DEVICE)")
    parser.add_argument("--targets", action="store_true", help="measure nothing; print the targets")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write docs/kernels.md's table and plots")
    parser.add_argument("--until", type=float, help="for the script's own measuring process: the time to end at")
    args = parser.parse_args(argv)
    if args.docs:
        report.write_docs(ROOT / "docs" / "kernels.md", ROOT / "bench" / "results")
        return 0
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    folder = args.out or ROOT / "bench" / "results" / device_slug(device)
    if not args.targets:
        child = args.until is not None
        if args.again and not child:
            forget(folder / "kernels.json", args, device)
        args.until = args.until or time.time() + 60 * args.minutes
        if device.type == "cuda" and not child:
            supervise(argv, folder / "kernels.json", args.until)
        elif code := measure_all(args, device, folder / "kernels.json"):
            return code
        if child:
            return 0
    print(report.targets_text(folder))
    return 0


if __name__ == "__main__":
    run_script(main)
