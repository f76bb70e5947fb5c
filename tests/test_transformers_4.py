"""Does transformers 4 open what we save, compute the same, and do we open what it saves?

It cannot be installed beside version 5, so the test needs an environment of its own:

    python -m venv v4 && v4/bin/pip install torch==2.13.0 transformers==4.57.6
    GROUNDUP_TRANSFORMERS_4=v4/bin/python python -m pytest tests/test_transformers_4.py
"""

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpointing.tensors import model_tensors
from model import load_pretrained
from tests.family_models import ENCODERS, MODELS, peer
from tests.test_family_parity import IDS, close, save, saved

PYTHON = os.environ.get("GROUNDUP_TRANSFORMERS_4")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="GROUNDUP_TRANSFORMERS_4 names no Python that has transformers 4"
)
# for each folder below the one given: its logits beside it, and the model saved again
THERE = """
import sys, pathlib, torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4."), transformers.__version__
place = pathlib.Path(sys.argv[1])
ids = load_file(place / "ids.safetensors")["ids"]
def open_and_save(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    name = config.architectures[0]
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        save_file({"logits": model(ids).logits.contiguous()}, folder.parent / "logits.safetensors")
    model.save_pretrained(folder.parent / "theirs")
for folder in sorted(place.glob("*/ours")):
    try:
        open_and_save(folder)
    except Exception as error:
        (folder.parent / "error.txt").write_text(repr(error))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of each model, opened and saved again over there."""
    place = tmp_path_factory.mktemp("four")
    save_file({"ids": IDS}, place / "ids.safetensors")
    for name in (*MODELS, *ENCODERS):
        folder = place / name.replace(" ", "_")
        save(load_pretrained(saved(peer(name), folder / "five")), folder / "ours")
    done = subprocess.run([PYTHON, "-c", THERE, place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.parametrize("name", [*MODELS, *ENCODERS])
def test_transformers_4_opens_computes_and_saves(place, name):
    folder = place / name.replace(" ", "_")
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    ours = load_pretrained(folder / "ours")
    with torch.no_grad():
        close(ours.logits(ours(IDS)), load_file(folder / "logits.safetensors")["logits"])
    again, before = load_pretrained(folder / "theirs"), model_tensors(ours)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model_tensors(again).items())
    assert again.config == ours.config
