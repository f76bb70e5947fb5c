"""Does a run's log say what happened, in files that survive a crash?"""

import io
import json
import math

import pytest
import torch

from training.metrics import ProgressLine, RunLog, TrainRow, peak_of, peak_tflops, write_json
from training.run_files import read_history


def a_row(step: int, loss: float = 2.0) -> TrainRow:
    return TrainRow(
        step=step, loss=loss, lr=1e-3, grad_norm=1.0, tok_s=100.0, tok_s_gpu=100.0, mfu=None, dt=0.1, data_wait=0.0,
        tokens=step * 10, epoch=0.1, scaler=None, mem_gb=1.0, mem_reserved_gb=None,
    )  # fmt: skip


def test_rows_are_read_back_and_nan_is_null(tmp_path):
    log = RunLog(tmp_path, is_main=True, max_steps=10)
    log.train(a_row(1))
    log.train(a_row(2, math.nan))
    log.evaluation(2, 0.5, {"val_loss": 2.1, "val_bpb": 1.0})
    log.sample(2, "a", "b\nc")
    history = read_history(tmp_path)
    assert [row["loss"] for row in history.train] == [2.0, None]
    assert history.evals[0]["val_bpb"] == 1.0 and history.samples[0]["sample"] == "b\nc"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_line_cut_by_a_crash_costs_only_itself(tmp_path):
    log = RunLog(tmp_path, is_main=True, max_steps=10)
    log.train(a_row(1))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    RunLog(tmp_path, is_main=True, max_steps=10, start_step=1).train(a_row(2, 1.5))
    assert [(row["step"], row["loss"]) for row in read_history(tmp_path).train] == [(1, 2.0), (2, 1.5)]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, is_main=False, max_steps=10)
    log.start({})
    log.train(a_row(1))
    log.status("training", 1)
    log.say("hello")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path, capsys):
    log = RunLog(tmp_path / "gone", is_main=True, max_steps=10)
    log.train(a_row(1))
    log.status("training", 1)
    said = capsys.readouterr()
    assert "metrics.jsonl could not be written" in said.out and "status.json could not be written" in said.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_is_for_terminals_only():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        line = ProgressLine(stream, enabled=True)
        line.update(5, 10, 125.0)
        line.print("a log line")
        line.update(6, 10, 100.0)
        line.clear()
    assert "5/10" in terminal.getvalue() and "2 min 5 s left" in terminal.getvalue()
    assert terminal.getvalue().count("a log line") == 1
    assert pipe.getvalue() == "a log line\n"


def test_status_is_replaced_whole_and_at_state_changes(tmp_path):
    log = RunLog(tmp_path, is_main=True, max_steps=10)
    for step in range(5):
        log.status("training", step)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 0  # at most one every 5 seconds
    log.status("saving", 5)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"]) == ("saving", 5, 10)
    write_json(tmp_path / "other.json", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "status.json"]


def test_an_unknown_device_has_no_peak():
    assert peak_tflops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("A100-PCIE-40GB", 312), ("NVIDIA A100-SXM-64GB", 312), ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A800 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989), ("NVIDIA B200", 2250), ("NVIDIA H20", 148), ("NVIDIA L4", 121),
        ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA A30", 165),
        ("NVIDIA A40", 150), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A6000", 155),
        *((name, None) for name in (
            "NVIDIA RTX A1000", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA RTX A4000", "NVIDIA RTX A400",
            "NVIDIA RTX A3000", "NVIDIA T400", "NVIDIA T400 4GB", "NVIDIA T1000",
            "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
            "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100X", "NVIDIA A10-24Q", "NVIDIA A40-48Q", "NVIDIA A2",
            "NVIDIA RTX 6000 Ada Generation", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla V100S-PCIE-32GB",
            "NVIDIA GB200", "NVIDIA B300", "NVIDIA L20", "NVIDIA A16", "NVIDIA H800", "AMD Instinct MI300X",
            "Quadro RTX 4000", "Tesla T40", "", "NVIDIA GeForce GTX 1080 Ti", "NVIDIA H20-3e",
        )),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_whole_name(name, peak):
    assert peak_of(name) == peak


@pytest.mark.gpu
def test_no_gpu_is_faster_than_its_data_sheet():
    peak = peak_tflops(torch.device("cuda", 0), torch.bfloat16)
    assert peak is None or 10 < peak < 5000
