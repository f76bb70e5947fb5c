"""Does train.py keep its promises: exact resume, the same curve on any number of ranks, one sentence for a mistake?"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kernels.jit import why_not_triton
from tests.forked import Forked
from tests.processes import new_process
from tests.tiers import grid
from train import main as train_main
from training.optimizers import OPTIMIZERS

SMALL = [
    "--hidden_size",
    "32",
    "--num_layers",
    "2",
    "--num_heads",
    "2",
    "--batch_size",
    "8",
    "--learning_rate",
    "3e-3",
    "--warmup_steps",
    "4",
]
QUIET = ["--eval_interval", "0", "--sample_prompt", "", "--log_interval", "1", "--device", "cpu"]
EVERY_7_STEPS = ["--save_interval", "7", "--keep_checkpoints", "0"]


@pytest.fixture
def train(root, tiny_data, tmp_path):
    """Runs train.py; returns the finished process. `launcher` goes in front, `check` raises on failure.

    Without a launcher in a fork, which has imported torch: seconds less than a new interpreter; where `own_process`, in one.
    """

    def run(
        save_dir: Path, *flags: object, launcher: list[str] | None = None, check: bool = True, own_process: bool = False
    ):
        words = ["--save_dir", save_dir, *flags, *([] if "--data_dir" in flags else ["--data_dir", tiny_data])]
        if launcher or own_process:
            command = [*(launcher or [sys.executable]), "train.py", *map(str, words)]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=one_thread(), timeout=240)
        else:
            ended = Forked(tmp_path / "streams", words).wait(240)
            done = subprocess.CompletedProcess(words, ended.code, ended.out, ended.err)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def start(root, tiny_data):
    """Starts train.py without waiting for it."""

    def run(save_dir: Path, *flags: object) -> subprocess.Popen:
        command = [sys.executable, "train.py", "--save_dir", save_dir, "--data_dir", tiny_data, *flags]
        words = [str(word) for word in command]
        return subprocess.Popen(
            words, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=one_thread()
        )

    return run


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(save_dir: Path, key: str = "loss") -> dict[int, float]:
    """{step: value} of metrics.jsonl; of two rows of a step the later counts, and a line still being written not yet."""
    text = (save_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def digests(checkpoint: Path) -> dict[str, str]:
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.01)


@pytest.mark.parametrize("optimizer", grid(OPTIMIZERS, quick=["muon"]))
def test_killed_and_resumed_equals_never_killed_bit_for_bit(train, start, tmp_path, optimizer):
    flags = [*SMALL, *QUIET, *EVERY_7_STEPS, "--max_steps", 60, "--optimizer", optimizer, "--micro_batch_size", 3]
    train(tmp_path / "whole", *flags)
    process = start(tmp_path / "killed", *flags)
    moment = random.Random().randint(8, 50)  # on purpose another one each time: no moment may matter
    wait_for(lambda: (tmp_path / "killed/metrics.jsonl").exists() and len(rows(tmp_path / "killed")) >= moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/checkpoint_step_60").exists()
    resumed = train(tmp_path / "killed", *flags, "--checkpoint", "latest")
    assert "resumed from" in resumed.stdout
    for step in (56, 60):
        name = f"checkpoint_step_{step}"
        assert digests(tmp_path / "whole" / name) == digests(tmp_path / "killed" / name)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def test_resume_needs_no_other_flag(train, tmp_path):
    train(tmp_path / "whole", *SMALL, *QUIET, "--max_steps", 20)
    train(tmp_path / "parts", *SMALL, *QUIET, "--max_steps", 20, "--save_interval", 10)
    shutil.rmtree(tmp_path / "parts/checkpoint_step_20")
    train(tmp_path / "parts", "--checkpoint", "latest")
    assert digests(tmp_path / "whole/checkpoint_step_20") == digests(tmp_path / "parts/checkpoint_step_20")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(train, start, tmp_path, number):
    flags = [*SMALL, *QUIET, "--max_steps", 3000, "--save_interval", 100_000]
    process = start(tmp_path / "run", *flags)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(rows(tmp_path / "run")) >= 5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    last = max(rows(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoint_step_{last}/manifest.json").exists()
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "stopped"
    # what was saved is where the run stood: going on from it is the run that was never stopped
    train(
        tmp_path / "run", "--checkpoint", "latest", "--max_steps", last + 3, "--schedule", "wsd", "--decay_fraction", 0
    )
    assert max(rows(tmp_path / "run")) == last + 3


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_terminal_that_goes_stops_a_run_like_another_signal_but_not_under_nohup(under_nohup, tiny_data, tmp_path):
    def run() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
        steps = 60 if under_nohup else 3000
        words = [*SMALL, *QUIET, "--save_dir", tmp_path / "run", "--data_dir", tiny_data, "--max_steps", steps]
        sys.exit(train_main([str(word) for word in words]))

    process = new_process(run)
    process.start()
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(rows(tmp_path / "run")) >= 3)
    os.kill(process.pid, signal.SIGHUP)
    process.join(60)
    assert process.exitcode == (0 if under_nohup else 128 + signal.SIGHUP)
    last = max(rows(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoint_step_{last}/manifest.json").exists() and (last == 60) == under_nohup


def test_ranks_and_micro_batches_give_the_same_losses(train, tmp_path):
    """Losses and gradient norms to 1e-5 over 12 steps: fp32 sums in another order, some 1e-7 a step, grow that much at most."""
    flags = [*SMALL, *QUIET, "--max_steps", 12]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train(tmp_path / "1x8", *flags)
    train(tmp_path / "1x3", *flags, "--micro_batch_size", 3)
    train(tmp_path / "2x2", *flags, "--micro_batch_size", 2, launcher=torchrun)
    for other in ("1x3", "2x2"):
        for key in ("loss", "grad_norm"):
            a, b = rows(tmp_path / "1x8", key), rows(tmp_path / other, key)
            assert len(a) == len(b) == 12
            assert max(abs(a[step] - b[step]) / abs(a[step]) for step in a) < 1e-5, (other, key)
    # one rank goes on from what two ranks wrote
    train(tmp_path / "1x8", "--checkpoint", "latest", "--max_steps", 15)
    train(tmp_path / "2x2", "--checkpoint", "latest", "--max_steps", 15)
    a, b = rows(tmp_path / "1x8"), rows(tmp_path / "2x2")
    assert max(abs(a[step] - b[step]) for step in (13, 14, 15)) < 1e-4


@pytest.mark.exhaustive
def test_three_ranks_resume_bit_for_bit(train, tmp_path):
    """With three ranks the order of a sum matters, and DDP changes it after its first backward pass."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    flags = [*SMALL, *QUIET, *EVERY_7_STEPS, "--max_steps", 21]
    train(tmp_path / "run", *flags, launcher=launcher)
    whole = digests(tmp_path / "run/checkpoint_step_21")
    for step in (14, 21):
        shutil.rmtree(tmp_path / f"run/checkpoint_step_{step}")
    train(tmp_path / "run", *flags, "--checkpoint", "latest", launcher=launcher)
    assert digests(tmp_path / "run/checkpoint_step_21") == whole


def test_a_run_leaves_what_others_read(train, tmp_path):
    run = tmp_path / "run"
    flags = [
        *SMALL,
        "--max_steps",
        12,
        "--eval_interval",
        6,
        "--log_interval",
        4,
        "--sample_prompt",
        "the ",
        "--sample_tokens",
        8,
    ]
    out = train(run, *flags).stdout
    described = json.loads((run / "run.json").read_text())
    assert described["config"]["hidden_size"] == 32 and described["origins"]["hidden_size"] == "command line"
    assert described["tokens_per_step"] == 8 * 32 and described["world_size"] == 1 and described["max_steps"] == 12
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "loss" in row] == [4, 8, 12]
    assert (
        [row["step"] for row in lines if "val_loss" in row]
        == [6, 12]
        == [row["step"] for row in lines if "sample" in row]
    )
    assert {"start", "save", "finish"} <= {row.get("event") for row in lines}
    trained = next(row for row in lines if "loss" in row)
    keys = "step empty_steps time loss lr grad_norm tok_s tok_s_gpu mfu dt data_wait mem_gb mem_reserved_gb tokens epoch scaler"
    assert set(trained) == set(keys.split()) and trained["mfu"] is None and trained["tokens"] == 4 * 8 * 32
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "latest").read_text().strip() == "checkpoint_step_12"
    assert "mfu n/a" in out and "val_bpb" in out and "\r" not in out


def test_the_checkpoint_is_a_hugging_face_model(train, tmp_path, tiny_data):
    """Same logits to 1e-5 and the same greedy continuation in transformers, from the folder as it lies there."""
    transformers = pytest.importorskip("transformers")
    from dataprep.tokenizers import load_tokenizer
    from generation.sampling import generate
    from model import load_pretrained

    train(tmp_path / "run", *SMALL, *QUIET, "--max_steps", 30, "--num_kv_heads", 1)
    folder = tmp_path / "run/checkpoint_step_30"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = load_pretrained(folder).eval(), load_tokenizer(folder)
    text = "the model reads (x) = y; naïve 日本"
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    ids = torch.tensor([tokenizer.encode("the model reads")])
    with torch.no_grad():
        assert (ours.logits(ours(ids)) - theirs(ids).logits).abs().max() < 1e-5
    greedy = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    mine = generate(
        ours, ids, max_new_tokens=12, temperature=0.0, top_k=0, top_p=1.0,
        eos_token_id=tokenizer.eos_token_id, vocab_size=tokenizer.vocab_size, generator=None,
    )  # fmt: skip
    assert greedy[0].tolist() == mine[0, : greedy.shape[1]].tolist()


def test_going_on_with_longer_rows_says_so_in_what_is_saved(train, tmp_path):
    """The base takes rows of 64 tokens; trained on rows of 128 it takes those, in config.json, tokenizer and transformers."""
    quiet = ["--batch_size", 4, "--eval_interval", 0, "--sample_prompt", ""]
    small = ["--hidden_size", 32, "--num_layers", 2, "--num_heads", 2, *quiet]
    train(tmp_path / "base", *small, "--max_length", 64, "--max_steps", 2)
    longer = ["--init_from", tmp_path / "base", "--max_length", 128, *quiet]
    done = train(tmp_path / "longer", *longer, "--max_steps", 2)
    assert "takes 64 tokens" in done.stdout and "128" in done.stdout
    train(tmp_path / "longer", "--checkpoint", "latest", "--max_steps", 3)
    for step in (2, 3):
        checkpoint = tmp_path / "longer" / f"checkpoint_step_{step}"
        assert json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"] == 128
        assert json.loads((checkpoint / "tokenizer_config.json").read_text())["model_max_length"] == 128
    refused = train(tmp_path / "lora", *longer, "--lora", check=False)
    assert refused.returncode == 2 and "--max_length 128" in refused.stderr


def test_training_learns(train, tmp_path):
    """From the loss of guessing, ln(vocabulary), to more than one nat below it, with either optimizer."""
    for optimizer in ("muon", "adamw"):
        train(tmp_path / optimizer, *SMALL, *QUIET, "--max_steps", 100, "--optimizer", optimizer)
    first, muon, adamw = rows(tmp_path / "muon")[1], rows(tmp_path / "muon")[100], rows(tmp_path / "adamw")[100]
    config = json.loads((tmp_path / "muon/checkpoint_step_100/config.json").read_text())
    assert abs(first - math.log(config["vocab_size"])) < 0.1
    assert max(muon, adamw) < first - 1


def test_bf16_and_fp16_follow_fp32(train, tmp_path):
    """Within 1 % of the fp32 loss after 20 steps: 8 and 11 significant bits a product, averaged over 256 targets."""
    for precision in ("none", "bf16", "fp16"):
        train(tmp_path / precision, *SMALL, *QUIET, "--max_steps", 20, "--mixed_precision", precision)
    exact = rows(tmp_path / "none")[20]
    assert abs(rows(tmp_path / "bf16")[20] / exact - 1) < 0.01
    assert abs(rows(tmp_path / "fp16")[20] / exact - 1) < 0.01
    assert rows(tmp_path / "fp16", "scaler")[20] > 0 and rows(tmp_path / "bf16", "scaler")[20] is None


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_compiled_training_follows_eager_training(train, tmp_path, encoder_data, model):
    """Losses, held-out ones too, to 1e-4 over 6 steps (fused fp32 sums in another order), and parameter names without a
    wrapper's prefix."""
    evaluated = [*SMALL, *QUIET, "--max_steps", 6, "--eval_interval", 3, "--model", model]
    evaluated += ["--stage", "mlm", "--data_dir", encoder_data] if model == "bert" else ["--sample_prompt", "the"]
    for flags in ([], ["--compile_model"]):
        train(tmp_path / f"run{len(flags)}", *evaluated, *flags, own_process=bool(flags))
    for key in ("loss", "val_loss"):
        eager, compiled = rows(tmp_path / "run0", key), rows(tmp_path / "run1", key)
        assert len(eager) == (6 if key == "loss" else 2)
        assert max(abs(eager[step] - compiled[step]) for step in eager) < 1e-4
    from safetensors import safe_open

    names = [
        set(safe_open(tmp_path / run / "checkpoint_step_6/model.safetensors", "pt").keys()) for run in ("run0", "run1")
    ]
    assert names[0] == names[1]


@pytest.mark.skipif(why_not_triton(torch.device("cpu")) is not None, reason="triton is not installed")
@pytest.mark.exhaustive
def test_training_on_triton_kernels_follows_training_on_plain_pytorch(train, tmp_path):
    """Losses to 1e-5 (fp32 sums in another order), and what ran on what is printed and saved. Under the interpreter the
    loss would take minutes: it is overridden, as a user would."""
    asked = ["--kernels", "triton", "linear_cross_entropy=torch"]
    interpreter = [sys.executable, "-m", "tests.interpreter_bf16"]
    plain, fused = (
        train(tmp_path / name, *SMALL, *QUIET, "--max_steps", 3, *flags, launcher=interpreter)
        for name, flags in (("plain", []), ("fused", asked))
    )
    wanted, found = rows(tmp_path / "plain"), rows(tmp_path / "fused")
    assert max(abs(wanted[step] - found[step]) for step in wanted) < 1e-5
    table = json.loads((tmp_path / "fused" / "run.json").read_text())["kernels"]
    assert (
        table["rms_norm"] == table["rope"] == table["swiglu"] == "triton" and table["linear_cross_entropy"] == "torch"
    )
    assert "Triton: rms_norm, rope, swiglu" in fused.stdout and "Triton:" not in plain.stdout


# ----------------------------------------------------------------------------------------------------- what goes wrong


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """One sentence on stderr with these words, exit code 2, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message


def test_wrong_options_are_one_sentence(train, tmp_path):
    fails(train(tmp_path, *SMALL, "--num_heads", "5", check=False), "--num_heads 5", "--hidden_size 32")
    fails(train(tmp_path, *SMALL, "--vocab_size", "999", check=False), "--vocab_size 999", "tokenizer")
    fails(train(tmp_path, *SMALL, "--kernels", "auto", "gelu=torch", check=False), "--kernels gelu=torch", "swiglu")
    fails(train(tmp_path, *SMALL, "--attention", "varlen", "--device", "cpu", check=False), "varlen", "CUDA", "sdpa")
    fails(train(tmp_path, "--learning_rat", "1", check=False), "--learning_rat", "did you mean --learning_rate")
    fails(train(tmp_path, "--data_dir", tmp_path / "nowhere", check=False), "nowhere", "data_prep_tool.py")
    fails(train(tmp_path, *SMALL, "--max_length", "1000000", check=False), "--max_length")
    fails(train(tmp_path, *SMALL, "--checkpoint", tmp_path / "none", check=False), str(tmp_path / "none"))


def test_shards_of_another_tokenizer_are_refused(train, tmp_path, tiny_data):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    file = data / "tokenizer.json"
    file.write_text(file.read_text().replace('"version": "1.0"', '"version":  "1.0"'))
    fails(train(tmp_path / "run", *SMALL, "--data_dir", data, check=False), str(data), "tokenizer")


def test_a_second_run_does_not_overwrite_the_first(train, tmp_path):
    train(tmp_path, *SMALL, *QUIET, "--max_steps", 5)
    fails(train(tmp_path, *SMALL, *QUIET, "--max_steps", 5, check=False), "--checkpoint latest", str(tmp_path))


def test_a_truncated_checkpoint_falls_back_to_the_one_before(train, tmp_path):
    flags = [*SMALL, *QUIET, *EVERY_7_STEPS, "--max_steps", 21]
    train(tmp_path, *flags)
    before = digests(tmp_path / "checkpoint_step_21")
    broken = tmp_path / "checkpoint_step_21/model.safetensors"
    os.truncate(broken, broken.stat().st_size - 10)
    done = train(tmp_path, *flags, "--checkpoint", "latest")
    assert "checkpoint_step_21" in done.stderr and "model.safetensors" in done.stderr
    assert "resumed from" in done.stdout and "checkpoint_step_14" in done.stdout
    assert digests(tmp_path / "checkpoint_step_21") == before


def test_changed_data_is_refused_on_resume(train, tmp_path, tiny_data):
    train(tmp_path / "run", *SMALL, *QUIET, "--max_steps", 5)
    for flags, words in ((["--seed", 1], ["--seed"]), (["--max_length", 16], ["--max_length"])):
        fails(train(tmp_path / "run", "--checkpoint", "latest", "--max_steps", 9, *flags, check=False), *words)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(train, tmp_path):
    train(tmp_path, *SMALL, *QUIET, "--max_steps", 6)
    before = digests(tmp_path / "checkpoint_step_6")
    # a learning rate of 1e30 makes the weights, and from then on every loss, infinite
    done = train(
        tmp_path, "--checkpoint", "latest", "--max_steps", 200, "--learning_rate", 1e30, "--grad_clip", 0, check=False
    )
    fails(done, "not been finite", "--learning_rate", str(tmp_path))
    assert digests(tmp_path / "checkpoint_step_6") == before
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
