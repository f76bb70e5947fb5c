"""Does a name that is read from a file stay in that file's folder, wherever such names are read?"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpointing.load import load_model
from dataprep.shards import DATASET_FOLDER, open_split, verify_dataset
from errors import UserError
from model import Transformer, load_pretrained
from model_config import ModelConfig
from paths import inside
from training.standing import folder_digests

OUT = [
    "../other.safetensors",
    "/etc/passwd",
    "sub/other.safetensors",
    "..",
    ".",
    "",
    ".hidden",
    "a\\b",
    "a\0b",
    None,
    7,
    ["a"],
]


@pytest.mark.parametrize("name", OUT)
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"list\.json names"):
        inside(tmp_path, name, "list.json")


def test_links_lead_within_the_folder_or_to_the_blobs_of_a_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "abc", tmp_path / "models--a" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "models--b" / "blobs"):
        folder.mkdir(parents=True)
    (blobs / "1f").write_text("weights")
    (tmp_path / "models--b" / "blobs" / "2f").write_text("another's")
    (snapshot / "plain").write_text("here")
    links = {
        "cached": "../../blobs/1f",
        "near": "plain",
        "other": "../../../models--b/blobs/2f",
        "out": "/etc/hostname",
    }
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    for folder in (snapshot, linked):
        for name in ("cached", "near", "plain", "not there"):
            assert inside(folder, name, "list.json") == folder / name
        for name in ("other", "out"):
            with pytest.raises(UserError, match="a link out of its folder"):
                inside(folder, name, "list.json")


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file outside of every folder that the tests make."""
    save_file({"model.embed_tokens.weight": torch.zeros(8, 8)}, tmp_path / "other.safetensors", {"format": "pt"})
    return tmp_path / "other.safetensors"


PLACES = ["a model's index", "an index under a digest", "a checkpoint's index", "a shard", "a shard that is verified"]


@pytest.mark.parametrize("how", ["parent", "absolute", "link"])
@pytest.mark.parametrize("place", PLACES)
def test_no_reader_follows_it(place, how, secret, tmp_path, tiny_data):
    folder = tmp_path / "folder"
    folder.mkdir()
    name = {"parent": "../other.safetensors", "absolute": str(secret), "link": "link.safetensors"}[how]
    if "shard" in place:
        shutil.copytree(tiny_data, folder, dirs_exist_ok=True)
        metadata = json.loads((folder / "metadata.json").read_text())
        [shard] = metadata["splits"]["train"]["shards"]
        if how == "link":
            path = next(path for path in (folder / DATASET_FOLDER).glob("*train*.bin"))
            shutil.move(path, tmp_path / "moved.bin")
            path.symlink_to(tmp_path / "moved.bin")
        else:
            shard["files"] = {key.replace(shard["name"], name): value for key, value in shard["files"].items()}
            shard["name"] = name
            (folder / "metadata.json").write_text(json.dumps(metadata))
        with pytest.raises(UserError):
            problems = verify_dataset(folder) if "verified" in place else open_split(folder, "train")
            if isinstance(problems, list) and problems:
                raise UserError(problems[0])
        return
    if how == "link":
        (folder / name).symlink_to(secret)
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = {
        "a model's index": load_pretrained,
        "an index under a digest": folder_digests,
        "a checkpoint's index": lambda folder: load_model(folder, Transformer(ModelConfig(8, 8, 8, 1, 2))),
    }[place]
    with pytest.raises(UserError, match=r"index\.json names"):
        read(folder)
