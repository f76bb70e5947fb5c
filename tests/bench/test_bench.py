"""Do the benchmarks measure what they say, and would they notice a kernel that is fast and wrong?

On tiny shapes: the Triton kernels run interpreted here, so their errors are real and their times are not taken.
"""

import dataclasses
import json
import subprocess
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import kernels, report, step
from bench.cases import SIZES, Draw, Prepared
from bench.measure import input_sets, measuring, relative_error, time_calls
from bench.operations import operations
from errors import UserError
from kernels.rms_norm import add_rms_norm

CPU = torch.device("cpu")
FP32_BOUND = 2e-6  # tests/kernels/accuracy.py
OPERATIONS = operations()
LIMITS = {"copy_gb_s": 10.0, "product_tflop_s": 0.05}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """kernels.json of one whole run on the CPU, without the compiler (its C++ takes a minute)."""
    folder = tmp_path_factory.mktemp("results")
    ways = {provider for operation in OPERATIONS.values() for provider in kernels.providers_of(operation)} - {"compile"}
    assert kernels.main(["--size", "tiny", "--providers", *sorted(ways), "--sweeps", "--out", str(folder)]) == 0
    return folder


def rows_of(folder):
    found = json.loads((folder / "kernels.json").read_text())["operations"]
    return {(name, provider): row for name, sizes in found.items() for provider, row in sizes["tiny"].items()}


def test_every_way_of_every_operation_is_exact_or_says_why_it_did_not_run(results):
    rows = rows_of(results)
    assert {name for name, _ in rows} == set(OPERATIONS)
    for (name, provider), row in rows.items():
        if provider in kernels.peers.LIBRARIES or provider.startswith("sdpa"):
            continue  # they may be missing or need a GPU
        assert "failed" not in row, (name, provider, row)
        if provider not in OPERATIONS[name].floors:
            learned = OPERATIONS[name].learned
            assert {f"d{tensor}" for tensor in learned} <= row["errors"].keys()
            assert all(error <= FP32_BOUND for error in row["errors"].values()), (name, provider, row)
        if provider.startswith("ours"):
            assert "interpreter" in row["skipped"]
        else:
            for direction in ("forward", "backward", "both") if OPERATIONS[name].learned else ("forward",):
                if direction == "backward" and "retain_graph" in row.get("notes", ""):
                    continue  # PyTorch's own chunked loss frees its gradients
                assert row[direction]["ms"] > 0 and row[direction]["how"] == "wall"


def test_a_provider_that_fails_is_recorded_with_its_reason_and_stops_no_other(results):
    rows = rows_of(results)
    assert "RuntimeError" in rows["attention", "sdpa cudnn"]["failed"]  # there is no cuDNN on a CPU
    assert rows["attention", "chosen"]["both"]["ms"] > 0
    assert "unsloth" in rows["rms_norm", "unsloth"].get("skipped", "unsloth")


def test_a_second_call_measures_only_what_is_missing(results, capsys):
    before = rows_of(results)
    assert kernels.main(["--size", "tiny", "--only", "swiglu", "--providers", "eager", "--out", str(results)]) == 0
    assert "swiglu tiny" not in capsys.readouterr().out and rows_of(results) == before
    again = ["--size", "tiny", "--only", "swiglu", "--providers", "eager", "--again", "--out", str(results)]
    assert kernels.main(again) == 0
    assert "swiglu tiny eager" in capsys.readouterr().out and rows_of(results).keys() == before.keys()


def test_the_measuring_process_of_a_gpu_goes_on_after_what_broke_the_last_one(results, tmp_path):
    """A row that a dead process left behind stays as its result; the others are measured."""
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"operations": {"swiglu": {"tiny": {"compile": {"failed": kernels.DIED}}}}}))
    flags = ["--size", "tiny", "--only", "swiglu", "--providers", "eager", "compile", "--out", str(tmp_path)]
    assert kernels.supervise(flags, path, time.time() + 60) == 0
    rows = rows_of(tmp_path)
    assert rows["swiglu", "eager"]["both"]["ms"] > 0 and rows["swiglu", "compile"] == {"failed": kernels.DIED}


def test_the_sweep_of_chunks_holds_the_whole_too(results):
    sweeps = json.loads((results / "kernels.json").read_text())["sweeps"]
    assert sweeps["rows of a chunk of the loss"]["tiny"][str(SIZES["tiny"].tokens)]["both"]["ms"] > 0


@pytest.mark.parametrize("name", ["rms_norm", "rope", "linear_cross_entropy", "lora_linear", "attention"])
def test_a_wrong_result_or_gradient_shows_in_the_errors(name):
    """The reference, with its first output a thousandth too large, then with its last gradient left out."""
    operation = OPERATIONS[name]
    last = operation.learned[-1]

    def too_large(**inputs):
        result = operation.reference(**inputs)
        return result * 1.001 if isinstance(result, torch.Tensor) else (result[0] * 1.001, *result[1:])

    def cut(**inputs):
        return operation.reference(**inputs | {last: inputs[last].detach()})

    draw = Draw(CPU, torch.float32, 0)
    inputs = operation.inputs(operation.sizes["tiny"], draw)
    errors = kernels.errors_of(operation, Prepared(lambda inputs: inputs, too_large), inputs, draw)
    assert errors["out0"] == pytest.approx(1e-3, rel=1e-3)
    assert kernels.errors_of(operation, Prepared(lambda inputs: inputs, cut), inputs, draw)[f"d{last}"] == "none made"


def test_errors_are_taken_on_a_part_of_the_tokens_without_losing_any(monkeypatch):
    """With the part smaller than the launch, as on a GPU: exact ways stay exact, a fault in the part is seen."""
    monkeypatch.setattr("bench.cases.ERROR_ROWS", 5)
    for operation in OPERATIONS.values():
        draw = Draw(CPU, torch.float32, 0)
        inputs = operation.inputs(operation.sizes["tiny"], draw)
        errors = kernels.errors_of(operation, Prepared(lambda inputs: inputs, operation.reference), inputs, draw)
        assert all(error <= FP32_BOUND for error in errors.values()), (operation.name, errors)

    def faulty(x, weight):
        y = OPERATIONS["rms_norm"].reference(x=x, weight=weight)
        return torch.cat([y[:-1], 2 * y[-1:]])

    inputs = OPERATIONS["rms_norm"].inputs(SIZES["tiny"], draw)
    errors = kernels.errors_of(OPERATIONS["rms_norm"], Prepared(lambda inputs: inputs, faulty), inputs, draw)
    assert errors["out0"] > 0.1


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "add_rms_norm_fp32_stream", "swiglu", "rope"])
def test_bytes_are_those_of_the_tensors_read_and_written(name):
    """Forward: inputs and outputs. Backward: gradients from above and below, and what both need of the inputs."""
    operation, dtype = OPERATIONS[name], torch.bfloat16
    inputs = operation.inputs(SIZES["tiny"], Draw(CPU, dtype, 0))
    large = [value for key, value in inputs.items() if key in operation.learned and value.dim() > 1]
    outputs = operation.reference(**inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)  # noqa: E731
    forward, backward = operation.work(SIZES["tiny"], dtype.itemsize)
    assert forward == size(large) + size(outputs)
    # the sum s alone is needed of x and update; of rope's nothing; of the others the inputs
    kept = {"add_rms_norm": outputs[1:], "add_rms_norm_fp32_stream": outputs[1:], "rope": []}.get(name, large)
    below = large[:1] if name == "add_rms_norm" else large  # dx and dupdate are one tensor where the dtypes are
    assert backward == size(outputs) + size(kept) + size(below)


def plain_lora(x, weight, **named):
    """The adapters' products out of place, where torch counts them."""
    low = [F.linear(F.linear(x, named[a]), named[a.replace("a", "b")]) for a in named if a.startswith("a")]
    return F.linear(x, weight.detach()) + torch.cat(low, 1)


def plain_norm_lora(x, update, weight, projection, **named):
    y, s = add_rms_norm(x, update, weight, 1e-5)
    return plain_lora(y, projection, **named), s


@pytest.mark.parametrize(
    ("name", "way"),
    [("linear_cross_entropy", None), ("token_statistics", None), ("lora_linear", plain_lora),
     ("norm_lora_linear", plain_norm_lora), ("attention", None)],
)  # fmt: skip
def test_operations_are_those_that_torch_counts(name, way):
    operation = OPERATIONS[name]
    inputs = kernels.learnable(operation, operation.inputs(operation.sizes["tiny"], Draw(CPU, torch.float32, 0)))
    with FlopCounterMode(display=False) as forward:
        outputs = kernels.outputs_of((way or operation.reference)(**inputs))
    with FlopCounterMode(display=False) as backward:
        learned = [inputs[key] for key in operation.learned]
        kernels.gradients(outputs, learned, [torch.ones_like(output) for output in outputs])
    counted = forward.get_total_flops(), backward.get_total_flops()
    wanted = operation.work(operation.sizes["tiny"], 4)
    if name == "attention":  # the reference computes the masked half too, and keeps the scores: two products, not 2.5
        wanted = 2 * wanted[0], 2 * wanted[1] * 2 / 2.5
    assert counted == pytest.approx(wanted)


def test_targets_are_met_at_the_bound_and_missed_beyond():
    def found(ms, share, peak, time):
        timing = {"ms": ms, "share": share}
        norm = {"ours": {"forward": timing, "backward": timing}}
        loss = {"eager": {"both": {"ms": 100.0}, "peak_mib": 600.0}, "ours": {"both": {"ms": time}, "peak_mib": peak}}
        return {"operations": {"add_rms_norm": {"4096x4096": norm}, "linear_cross_entropy": {"8b": loss}}}

    def verdicts(results, steps):
        return {target.name: target.verdict for target in report.targets(results, steps)}

    peer, ours = {"step_ms": 100.0, "peak_gib": 10.0}, {"step_ms": 50.0, "peak_gib": 6.0}
    steps = {"qlora": {"8b": {"ours": ours, "peft + bitsandbytes": peer}}}
    met = verdicts(found(0.060, 0.85, 100.0, 108.0), steps)
    missed = verdicts(found(0.061, 0.84, 101.0, 109.0), {})
    loss = "linear_cross_entropy, 8b, beside the fastest with whole logits"
    step_name = "QLoRA step of an 8B shape beside peft + bitsandbytes"
    shares = "add_rms_norm backward, 4096x4096: share of copy bandwidth"
    for name in ("add_rms_norm backward, 4096 rows of 4096", shares, f"{loss}: time", f"{loss}: peak memory"):
        assert (met[name], missed[name]) == ("met", "MISSED")
    for name in (f"{step_name}: speed", f"{step_name}: peak memory"):
        assert (met[name], missed[name]) == ("met", "not measured")


def test_the_docs_hold_the_table_between_their_markers(results, tmp_path):
    page = tmp_path / "docs" / "kernels.md"
    page.parent.mkdir()
    page.write_text(f"# Kernels\n\nbefore\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_docs(page, results.parent)
    text = page.read_text()
    assert text.startswith("# Kernels\n\nbefore\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| tiny | eager |" in text and "**attention**" in text
    image = tmp_path / "docs" / "images" / f"kernels_{results.name}.png"
    assert image.name in text and image.stat().st_size > 10_000
    report.write_docs(page, results.parent)
    assert page.read_text() == text
    page.write_text("# Kernels\n")
    with pytest.raises(UserError, match="measured: begin"):
        report.write_docs(page, results.parent)


def test_a_step_of_ours_and_of_transformers_is_the_same_step():
    ours, theirs = (step.measure("pretrain", "tiny", way, None) for way in ("eager", "transformers"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # after two optimizer steps
    assert ours["step_ms"] > 0 and ours["tokens_s"] == pytest.approx(64 / ours["step_ms"] * 1000)


def test_a_step_of_adapters_learns_and_qlora_is_near_lora():
    lora, qlora = (step.measure(task, "tiny", "eager", None) for task in ("lora", "qlora"))
    assert qlora["loss"] == pytest.approx(lora["loss"], rel=0.01)
    assert step.measure("lora", "tiny", "ours augmented", None)["loss"] == pytest.approx(lora["loss"], rel=1e-4)


def test_steps_run_in_processes_of_their_own_and_leave_rows(root, tmp_path):
    flags = ["--task", "pretrain", "--size", "tiny", "--ways", "eager", "--out", str(tmp_path)]
    assert step.main(flags) == 0
    row = json.loads((tmp_path / "step.json").read_text())["pretrain"]["tiny"]["eager"]
    assert row["step_ms"] > 0 and row["loss"] > 0


def test_missing_layers_are_extended_on_a_line_and_said_so():
    # 5 + 2 a layer, measured at 8 and 4
    more, fewer = {"step_ms": 21.0, "peak_gib": 8.5, "loss": 1.0}, {"step_ms": 13.0, "peak_gib": 4.5, "loss": 1.0}
    row = step.extended(more, fewer, 8, 32)
    assert row["step_ms"] == 69.0 and row["peak_gib"] == 32.5 and "8 and 4 of 32 layers" in row["remark"]


def test_the_suite_for_a_gpu_is_sound_shell_and_says_how_it_is_called(root):
    script = root / "bench" / "gpu_suite.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    called = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert called.returncode == 2 and "gpu_suite.sh 1" in called.stdout


@pytest.mark.gpu
def test_a_gpu_is_timed_by_graph_and_what_waits_for_it_by_events():
    device = torch.device("cuda:0")
    with measuring(device):
        x = [torch.randn(2**24, device=device) for _ in range(input_sets(2**26, device))]
        timing = time_calls([lambda y=y: y * 2 for y in x], device)
        assert timing.how == "graph" and timing.ms <= 1.1 * timing.wall_ms
        assert time_calls([lambda: x[0].sum().item()], device).how.startswith("events")


@pytest.mark.gpu
def test_ours_is_timed_on_a_gpu(tmp_path):
    flags = ["--size", "tiny", "--only", "swiglu", "linear_cross_entropy", "--providers", "eager", "ours"]
    assert kernels.main([*flags, "--out", str(tmp_path)]) == 0
    for (name, provider), row in rows_of(tmp_path).items():
        assert row["both"]["how"] == "graph" and row["peak_mib"] > 0, (name, provider, row)


def test_a_call_on_the_cpu_is_timed_by_the_wall_clock():
    x = torch.randn(200, 200)
    timing = time_calls([lambda: [x @ x for _ in range(5)]], CPU)
    once = time_calls([lambda: x @ x], CPU)
    assert timing.how == "wall" and timing.ms > 1.5 * once.ms
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert dataclasses.asdict(timing).keys() == {"ms", "wall_ms", "how"}
