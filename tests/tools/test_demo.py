"""Does the whole path run on a user's own folder, and go on where it was stopped?"""

import json
import os
import subprocess
import sys


def test_from_a_folder_of_text_to_samples_and_again(root, tmp_path):
    corpus = tmp_path / "my corpus"
    corpus.mkdir()
    for name in ("README.md", "docs/data.md", "docs/checkpoints.md", "docs/training.md"):
        (corpus / name.replace("/", "_")).write_text((root / name).read_text())
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


def test_a_missing_corpus_is_one_sentence(root, tmp_path):
    command = [sys.executable, "utils.py", "demo", "--corpus", tmp_path / "nowhere", "--output_dir", tmp_path / "demo"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr
