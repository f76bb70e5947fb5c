"""Does `utils.py plan` say what train.py would do?"""

import subprocess
import sys


def plan(root, *flags: object) -> subprocess.CompletedProcess:
    words = [str(flag) for flag in flags]
    return subprocess.run([sys.executable, "utils.py", "plan", *words], cwd=root, capture_output=True, text=True)


def test_the_plan_is_the_table_of_train(root, tiny_data, tmp_path):
    flags = ["--data_dir", tiny_data, "--hidden_size", 32, "--num_layers", 2, "--num_heads", 2, "--batch_size", 8]
    flags += ["--max_steps", 3, "--sample_prompt", "", "--device", "cpu"]
    planned = plan(root, *flags).stdout.splitlines()
    command = [sys.executable, "train.py", *map(str, flags), "--save_dir", str(tmp_path / "run")]
    trained = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in ("model", "parameters", "batch", "run", "compute", "memory estimate", "optimizer", "precision"):
        line = next(line for line in planned if line.startswith(name))
        assert [word for word in line.split()] in [other.split() for other in trained], line
    assert any(line.startswith("time estimate") for line in planned)


def test_without_data_and_for_several_devices(root):
    one = plan(root, "--preset", "small", "--device", "cpu").stdout
    assert "rows of 2,048 tokens are assumed" in one
    assert "1 rank(s) x 1 micro-batch(es) of 32" in one
    assert (
        "8 rank(s) x 2 micro-batch(es) of 2"
        in plan(root, "--world_size", 8, "--micro_batch_size", 2, "--device", "cpu").stdout
    )


def test_wrong_flags_are_one_sentence(root):
    for flags, words in (
        (["--world_size", 64], ["--world_size", "--batch_size 32"]),
        (["--num_heads", 7], ["--num_heads 7"]),
        (["--hiden_size", 64], ["--hiden_size", "did you mean --hidden_size"]),
    ):
        done = plan(root, *flags)
        assert done.returncode == 2 and all(word in done.stderr for word in words) and "Traceback" not in done.stderr
