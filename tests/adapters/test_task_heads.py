"""Is a task's model the family's class in transformers: the same folder, logits, loss and gradients in both?"""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.task_heads import Task, TaskModel, saved_task
from checkpointing.save import save_checkpoint
from errors import UserError
from families.task_names import TASKS, with_body
from families.weights import stored_views
from model_config import ModelConfig
from tests.family_models import ENCODERS, MODELS, peer, peer_config
from tests.tiers import grid

transformers = pytest.importorskip("transformers")

LABELS = {0: "O", 1: "B-PER", 2: "I-PER"}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "phi3", "gemma2", "gemma3", "olmo2", "olmo3", "smollm3")
LENGTHS = (20, 9, 14)
OLMO2 = {"family": "olmo2", "qk_norm": True, "qk_norm_per_head": False, "norm_position": "after"}
PAD = 0


def classes() -> list[tuple[str, str]]:
    """(model of family_models, stage) of every class that transformers has."""
    named = [(name, class_prefix(name)) for name in (*DECODERS, *ENCODERS)]
    return [
        (name, stage)
        for name, prefix in named
        for stage, ending in TASKS.items()
        if hasattr(transformers, f"{prefix}For{ending}")
    ]


def class_prefix(name: str) -> str:
    return (MODELS | ENCODERS)[name][0].removesuffix("Config")


def a_peer(name: str, stage: str, **more) -> torch.nn.Module:
    """transformers' model for a task, every parameter moved, dropout off."""
    settings = {"num_labels": 3, "pad_token_id": PAD, "classifier_dropout": 0.0} | more
    if stage != "answer":
        settings |= {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
        settings.pop("num_labels")
    else:
        settings["num_labels"] = 2
    config = peer_config(name, **settings)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = getattr(transformers, f"{class_prefix(name)}For{TASKS[stage]}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def texts() -> tuple[list[Tensor], list[Tensor]]:
    """Rows of different lengths without the pad token, and a token type for each token."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 131, (length,), generator=generator) for length in LENGTHS]
    return rows, [(torch.arange(length) > length // 2).long() for length in LENGTHS]


def padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.stack([F.pad(row, (0, max(LENGTHS) - len(row)), value=value) for row in rows])


def their_outputs(model: torch.nn.Module, stage: str, rows: list[Tensor], types: list[Tensor] | None) -> Tensor:
    """(texts, outputs), or (tokens of all texts, outputs), of a padded batch."""
    pad = model.config.pad_token_id
    mask = padded([torch.ones_like(row) for row in rows], 0)
    given = {} if types is None else {"token_type_ids": padded(types, 0)}
    out = model(padded(rows, pad), attention_mask=mask, **given)
    if stage == "classify":
        return out.logits
    logits = torch.stack([out.start_logits, out.end_logits], -1) if stage == "answer" else out.logits
    return torch.cat([line[: len(row)] for line, row in zip(logits, rows, strict=True)])


def our_outputs(model: TaskModel, stage: str, rows: list[Tensor], types: list[Tensor] | None) -> Tensor:
    """The same of the texts packed into one row."""
    ends = torch.tensor(LENGTHS).cumsum(0)
    boundaries = F.pad(ends, (1, 0)).int()
    logits = model(
        torch.cat(rows)[None], cu_seqlens=boundaries, token_types=None if types is None else torch.cat(types)[None]
    )[0]
    assert logits.dtype == torch.float32
    return logits if stage != "classify" else logits[ends - 1 if model.config.causal else boundaries[:-1].long()]


def loss_of(outputs: Tensor, stage: str) -> Tensor:
    targets = torch.arange(len(outputs)) % outputs.shape[-1]
    return F.cross_entropy(outputs, targets)


def save(model: TaskModel, folder):
    folder.mkdir(exist_ok=True)
    result = save_checkpoint(folder, 1, model=model, optimizers=[], state={}, files={}, keep_checkpoints=0)
    assert result.ok, result.message
    return result.path


def check_same(theirs: torch.nn.Module, ours: TaskModel, stage: str) -> None:
    """Logits, the loss and every gradient to 1e-5 of its size."""
    rows, types = texts()
    given = types if ours.config.type_vocab_size > 1 else None
    wanted, found = their_outputs(theirs, stage, rows, given), our_outputs(ours, stage, rows, given)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    losses = loss_of(wanted, stage), loss_of(found, stage)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-5)
    for loss in losses:
        loss.backward()
    family, gradients = ours.config.family, {}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        gradients |= stored_views(family, name, parameter.grad)
    theirs_by_name = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) >= len(theirs_by_name) > 0
    for name, gradient in theirs_by_name.items():
        if name.endswith(("wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight")):
            gradient[PAD] = 0
        # a key's bias moves all scores of a query alike, so that its gradient is rounding alone
        close = {"atol": max(1e-5 * float(gradient.abs().max()), 1e-8), "rtol": 1e-4}
        torch.testing.assert_close(gradients[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "stage"),
    grid(classes(), [("llama", "answer"), ("gpt2", "tag"), ("bert", "classify"), ("roberta", "classify"),
                     ("modernbert", "tag"), ("qwen2", "classify")]),
)  # fmt: skip
def test_folders_of_both_hold_the_same_model(name, stage, tmp_path):
    theirs = a_peer(name, stage)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TaskModel.from_pretrained(tmp_path / "theirs")
    assert ours.config.task == Task(stage, () if stage == "answer" else tuple(LABELS.values()))
    check_same(theirs, ours, stage)
    path = save(ours, tmp_path / "ours")
    opened, report = getattr(transformers, f"AutoModelFor{TASKS[stage]}").from_pretrained(
        path, output_loading_info=True
    )
    assert type(opened) is type(theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    if stage != "answer":
        assert opened.config.id2label == LABELS and opened.config.label2id == {v: k for k, v in LABELS.items()}
    state = theirs.state_dict()
    for parameter_name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, state[parameter_name]), parameter_name
    again = TaskModel.from_pretrained(path)
    assert again.config.task == ours.config.task
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("name", ["modernbert", "modernbert plain"])
def test_a_mean_over_the_text_is_its_own_and_is_kept(name, tmp_path):
    theirs = a_peer(name, "classify", classifier_pooling="mean")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TaskModel.from_pretrained(tmp_path / "theirs")
    check_same(theirs, ours, "classify")
    assert json.loads((save(ours, tmp_path / "ours") / "config.json").read_text())["classifier_pooling"] == "mean"
    row = texts()[0][0][None]
    torch.testing.assert_close(ours(row)[0, 3], theirs(row).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "stage"), grid(classes(), [("llama", "answer"), ("bert", "classify")])
)  # fmt: skip
def test_a_language_model_gives_its_body_and_the_seed_the_head(name, stage, tmp_path):
    """What transformers' class reads of the same folder is the same, and missing there is what is drawn here."""
    plain = peer(name, pad_token_id=PAD)
    plain.save_pretrained(tmp_path)
    auto = getattr(transformers, f"AutoModelFor{TASKS[stage]}")
    theirs, report = auto.from_pretrained(tmp_path, num_labels=2, output_loading_info=True)
    task = Task(stage, () if stage == "answer" else ("no", "yes"))
    first, again, other = (TaskModel.from_pretrained(tmp_path, task, seed=seed) for seed in (1, 1, 2))
    state, drawn = theirs.state_dict(), 0
    for (own_name, tensor), same, differs in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(tensor, same)
        views = stored_views(first.config.family, own_name, tensor)
        new = not torch.equal(tensor, differs) or (own_name.endswith(".bias") and not tensor.any())
        # their classes of Llama for answers look for the body under another name, and so find nothing in such a folder
        absent = stage == "answer" and first.config.names.body != "model"
        for stored, view in views.items():
            if stored in report["missing_keys"]:
                assert new or absent, stored
                drawn += 1
            else:
                assert not new and torch.equal(view, state[stored]), stored
        if new and tensor.dim() == 2:
            assert abs(float(tensor.std()) / 0.02 - 1) < 0.25
    assert drawn
    head = first.get_submodule(first.config.names.output)
    assert head.weight.dtype == torch.float32 and tuple(head.weight.shape) == (2, 64)


def test_heads_stay_fp32_over_a_body_in_bf16(tmp_path):
    a_peer("bert", "classify").save_pretrained(tmp_path)
    model = TaskModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {f"{path}.{leaf}" for path in ("model.pooler", "classifier") for leaf in ("weight", "bias")}
    assert model(torch.arange(3, 9)[None]).dtype == torch.float32


def test_a_bare_model_gives_its_pooler(tmp_path):
    theirs = a_peer("bert", "classify").bert
    theirs.save_pretrained(tmp_path)
    ours = TaskModel.from_pretrained(tmp_path, Task("classify", ("a", "b")))
    assert torch.equal(ours.model.pooler.weight, theirs.pooler.dense.weight)


def test_a_head_for_other_labels_is_not_taken(tmp_path):
    theirs = a_peer("roberta", "classify")
    theirs.save_pretrained(tmp_path)
    same, other = (TaskModel.from_pretrained(tmp_path, Task("classify", labels)) for labels in
                   (tuple(LABELS.values()), ("x", "y", "z")))  # fmt: skip
    for model, taken in ((same, True), (other, False)):
        assert torch.equal(model.classifier.dense.weight, theirs.classifier.dense.weight) == taken
        assert torch.equal(model.classifier.out_proj.weight, theirs.classifier.out_proj.weight) == taken
    assert torch.equal(other.model.embed_tokens.weight, theirs.roberta.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("config", "stage", "sentence"),
    [({"family": "granite", "attention_scale": 0.25}, "classify", "no GraniteForSequenceClassification .* another family"),
     (OLMO2, "tag",
      "no Olmo2ForTokenClassification .* those of --stage classify")],
)  # fmt: skip
def test_a_family_without_the_class_is_refused(config, stage, sentence, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig(97, **sizes, **config).to_hf()))
    with pytest.raises(UserError, match=sentence):
        TaskModel.from_pretrained(tmp_path, Task(stage, ("a", "b")))


def test_a_folder_without_a_task_must_be_given_one(tmp_path):
    peer("llama").save_pretrained(tmp_path)
    assert saved_task(tmp_path) is None
    with pytest.raises(UserError, match="holds no classifier"):
        TaskModel.from_pretrained(tmp_path)


def test_the_body_has_the_class_s_own_name():
    assert with_body("llama", "model.norm.weight", "transformer") == "transformer.norm.weight"
    assert with_body("llama", "transformer.norm.weight", "model") == "model.norm.weight"
    assert with_body("gpt2", "transformer.wte.weight", "model") == "transformer.wte.weight"
