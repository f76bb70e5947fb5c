"""Is a tokenizer that is asked for by name found where it lies, and else refused with the ways to get it?"""

import shutil

import pytest
from huggingface_hub import constants

from dataprep.known_tokenizers import KNOWN, find_tokenizer
from errors import UserError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and no network; returns what puts a tokenizer into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def put(repository: str, tokenizer) -> None:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        if tokenizer:
            shutil.copy(tokenizer / "tokenizer.json", folder / "snapshots" / ("0" * 40))

    return put


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_is_found_in_the_cache(name, hub, tiny_data):
    for repository in reversed(KNOWN[name]):  # the later names are of older caches
        hub(repository, tiny_data)
        found = find_tokenizer(name)
        assert found and found.parent.parent.name == f"models--{repository.replace('/', '--')}"
        assert (found / "tokenizer.json").read_bytes() == (tiny_data / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_without_it_and_without_a_network_the_sentence_says_how_to_get_it(name, hub):
    for cached in (False, True):  # a cache that has the model's weights alone has no tokenizer
        if cached:
            hub(KNOWN[name][0], None)
        with pytest.raises(UserError) as caught:
            find_tokenizer(name)
        words = str(caught.value)
        assert f"--tokenizer {name}: {KNOWN[name][0]}" in words and "\n" not in words
        assert f"hf download {KNOWN[name][0]} tokenizer.json tokenizer_config.json" in words
        assert ("licence" in words) == (name == "llama")


def test_gpt2_is_tiktoken_s_where_the_cache_has_none(hub):
    assert find_tokenizer("gpt2") is None


def test_a_folder_is_itself_and_another_word_is_refused(hub, tiny_data, tmp_path):
    assert find_tokenizer(str(tiny_data)) == tiny_data
    (tmp_path / "bert").mkdir()
    shutil.copy(tiny_data / "tokenizer.json", tmp_path / "bert")
    assert str(find_tokenizer("bert")) == "bert"  # a folder of that name
    with pytest.raises(
        UserError, match="--tokenizer berd is no folder, and none of gpt2, llama, bert; did you mean bert"
    ):
        find_tokenizer("berd")
    with pytest.raises(UserError, match="has no tokenizer"):
        find_tokenizer(str(tmp_path))
