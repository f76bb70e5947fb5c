"""Which tokenizer is meant by a well-known name (gpt2, llama, bert) or a folder, and where is it on this machine?

First comes what is here already: the folder, the cache of the Hugging Face Hub, for gpt2 that of tiktoken. Only then, and
only for a tokenizer that was asked for by name, its few files are downloaded.
"""

from pathlib import Path

from arguments import did_you_mean
from dataprep.tokenizers import TOKENIZER_FILES
from errors import UserError

# repositories on the Hub with the tokenizer, the first of which is downloaded; the others are names that a cache may have
KNOWN = {
    "gpt2": ("openai-community/gpt2", "gpt2"),
    "llama": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3-8B"),
    "bert": ("google-bert/bert-base-uncased", "bert-base-uncased"),
}


def find_tokenizer(wanted: str) -> Path | None:
    """The folder that holds the tokenizer.json of `wanted`, a key of KNOWN or a folder; None for tiktoken's encoding gpt2.

    UserError, in the words of `--tokenizer`, where there is none and none can be got.
    """
    if (Path(wanted) / "tokenizer.json").is_file():
        return Path(wanted)
    if wanted not in KNOWN:
        what = "has no tokenizer.json" if Path(wanted).is_dir() else "is no folder"
        raise UserError(f"--tokenizer {wanted} {what}, and none of {', '.join(KNOWN)}{did_you_mean(wanted, KNOWN)}")
    for repository in KNOWN[wanted]:
        if folder := _in_cache(repository):
            return folder
    return None if wanted == "gpt2" else _downloaded(wanted, KNOWN[wanted][0])


def _in_cache(repository: str) -> Path | None:
    """The repository's folder in the Hub's cache; None where it is not, or has no tokenizer.json."""
    from huggingface_hub import snapshot_download  # comes with `tokenizers`; here: it takes long to import
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None


def _downloaded(wanted: str, repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(TOKENIZER_FILES)))
        if (folder / "tokenizer.json").is_file():
            return folder
        reason = "it has no tokenizer.json"
    except Exception as error:  # whatever the network, the disk or a licence that was not accepted raises
        reason = type(error.__cause__ or error).__name__
    licence = ", once its licence is accepted there," if wanted == "llama" else ""
    raise UserError(
        f"--tokenizer {wanted}: {repository} is not in the Hugging Face cache and could not be downloaded ({reason}); get it "
        f"with `hf download {repository} {' '.join(TOKENIZER_FILES[:2])}`{licence} or give a folder that holds its "
        "tokenizer.json in place of the name"
    )
