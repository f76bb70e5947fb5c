"""Does the whole path run on a user's own folder, and go on where it was stopped?"""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.exhaustive
def test_from_a_folder_of_text_to_samples_and_again(root, tmp_path):
    corpus = tmp_path / "my corpus"
    corpus.mkdir()
    for number in range(40):  # more than the rule needs to hold a document out
        words = [f"word{(number * step) % 97}" for step in range(1, 60)]
        (corpus / f"{number}.txt").write_text(f"Document {number}. " + " ".join(words))
    command = [
        sys.executable,
        "utils.py",
        "demo",
        "--corpus",
        corpus,
        "--output_dir",
        tmp_path / "demo",
        "--train_seconds",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "demo" / "my_corpus" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val_bpb" in row][-1]
    assert f"{last.get('val_bpb_all', last['val_bpb']):.3f} bits per byte after {last['step']:,} steps" in first.stdout
    assert "xz -9 needs" in first.stdout and (run / "curves.png").exists()
    assert (run / (run / "latest").read_text().strip() / "model.safetensors").exists()

    second = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "is up to date" in second.stdout and "nothing to do" in second.stdout


def test_a_single_document_is_enough(root, tmp_path):
    """Its end is held out; two large ones leave nothing to hold out, and that is said."""
    from tools.demo import summary

    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(" ".join(f"{name}{n % 50}" for n in range(3000)))
    data, run = tmp_path / "data", tmp_path / "run"
    prep = ["data_prep_tool.py", "--input_dir", tmp_path / "in", "--output_dir", data, "--max_length", "32"]
    sizes = [
        "--hidden_size",
        "32",
        "--num_layers",
        "1",
        "--num_heads",
        "2",
        "--batch_size",
        "4",
        "--max_steps",
        "3",
        "--device",
        "cpu",
    ]
    for command in (prep, ["train.py", "--data_dir", data, "--save_dir", run, *sizes]):
        subprocess.run([sys.executable, *command], cwd=root, check=True, capture_output=True)
    assert "no validation figure" in summary(tmp_path, data, run)


def test_a_missing_corpus_is_one_sentence(root, tmp_path):
    command = [sys.executable, "utils.py", "demo", "--corpus", tmp_path / "nowhere", "--output_dir", tmp_path / "demo"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr
