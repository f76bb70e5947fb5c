"""How does a model tell classes, tags and answers apart? A transformer with the head of its family's class in transformers.

`TaskModel` is the body of a language model, of a masked one, or a bare one with such a head. Its folder opens with
AutoModelForSequenceClassification, …TokenClassification or …QuestionAnswering and computes the same there; names are in
families/task_names.py. Which tokens are read is the stage's: encoders the first or all, decoders the last.

What an adapter's folder does not hold of that is in its task_config.json, the config.json that the whole model would have:
AutoModelFor….from_pretrained(base, config=AutoConfig.from_pretrained("ADAPTER/task_config.json")), then PEFT.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.peft_files import read_adapter_config
from adapters.scalar_head import padding_token
from checkpointing.save_folder import ADAPTER_CONFIG
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from families.common import INIT_STD
from families.task_names import HEADS, TASKS, HeadNames, class_name, head_names, with_body
from families.weights import stored_views
from finetune_data.task_layout import find_layout
from kernels.attention_masks import document_ids
from kernels.choice import KernelChoice
from layers import PredictionHead
from model import Transformer, open_safetensors, read_json, stored_names
from model_config import ModelConfig

TASK_CONFIG = "task_config.json"  # beside an adapter: the config.json of base and head
PROBLEMS = {  # kinds of labels as in finetune_data/labelled.py: transformers' names
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True)
class Task:
    """stage: one of families.task_names.TASKS. labels: names in the order of their ids; an answer's are ().

    kind: of the labels of texts, "single", "multi" or "regression", whose labels are LABEL_0, …
    """

    stage: str
    labels: tuple[str, ...] = ()
    kind: str = "single"

    @property
    def num_outputs(self) -> int:
        """Logits a token: of an answer those of its start and of its end."""
        return 2 if self.stage == "answer" else len(self.labels)


def figure_names(count: int) -> tuple[str, ...]:
    """What transformers calls the figures of a regression."""
    return tuple(f"LABEL_{number}" for number in range(count))


@dataclass
class TaskConfig(ModelConfig):
    """As ModelConfig, saved as the family's class for a task. Made by `of`.

    pooling: of texts in a ModernBERT, "cls" or "mean"; "cls" in other families.
    """

    task: Task = Task("classify")
    pooling: str = "cls"

    def _check_family(self) -> None:
        """The fields come of a ModelConfig, which was checked; the heads are those of another class."""

    @property
    def names(self) -> HeadNames:
        return head_names(self.family, self.task.stage)

    def to_hf(self, dtype: torch.dtype = torch.float32) -> dict:
        """The contents of config.json."""
        stage, labels = self.task.stage, self.task.labels
        config = super().to_hf(dtype) | {
            "architectures": [class_name(self.family, stage)],
            "classifier_dropout": 0.0,
        }
        if labels:
            config["id2label"] = {str(number): label for number, label in enumerate(labels)}
            config["label2id"] = {label: number for number, label in enumerate(labels)}
        if stage == "classify":
            config["problem_type"] = PROBLEMS[self.task.kind]
        return config | ({"classifier_pooling": self.pooling} if self.family == "modernbert" else {})

    @classmethod
    def of(cls, shape: ModelConfig, task: Task, pooling: str = "cls") -> "TaskConfig":
        """UserError where the family has no class for the task."""
        has_pooler = head_names(shape.family, task.stage).before == "pooler"
        heads = {"head": "none", "head_bias": False, "pooler": has_pooler, "next_sentence": False}
        parts = {one.name: getattr(shape, one.name) for one in fields(ModelConfig)}
        return cls(**parts | heads, task=task, pooling=pooling)


class DenseHead(nn.Module):
    """RoBERTa's: a dense layer, tanh, and the layer that gives the logits."""

    def __init__(self, size: int, output: nn.Linear):
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.out_proj = output

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(x)))


class TaskModel(Transformer):
    """A transformer whose forward gives a task's logits. Its heads are fp32, whatever the body is in."""

    config: TaskConfig

    def __init__(self, config: TaskConfig, kernels: KernelChoice | None = None):
        super().__init__(config, kernels or KernelChoice())
        names, size = config.names, config.hidden_size
        self.heads = names.modules  # what is trained whole beside adapters
        if names.body != "model":
            body = self._modules.pop("model")
            self.add_module(names.body, body)
            vars(self)["model"] = body  # found under both names, held under the class's
        if names.before == "prediction":
            self.head = PredictionHead(config)
        output = nn.Linear(size, config.task.num_outputs, bias=names.bias)
        self.add_module(names.output.partition(".")[0], DenseHead(size, output) if names.before == "dense" else output)

    def forward(  # type: ignore[override]  # logits are of whole texts: there is no cache to go on from
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """(B, T, outputs) fp32: the logits of each token. Arguments as in Transformer.forward.

        A text's are at its first token, or its last in a causal model; with pooling "mean" they are the same at all tokens
        of a text. token_types are left out by models that do not tell segments apart.
        """
        types = token_types if self.config.type_vocab_size > 1 else None
        hidden = super().forward(input_ids, positions, cu_seqlens, max_seqlen, token_types=types)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._logits(hidden.float(), cu_seqlens)

    def _logits(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        before = self.config.names.before
        if self.config.pooling == "mean" and self.config.task.stage == "classify":
            x = document_means(x, cu_seqlens)
        if before == "pooler":
            x = self.pooled(x)
        elif before == "prediction":
            x = self.head(x, self.kernels.rms_norm)
        return self.get_submodule(self.config.names.output.partition(".")[0])(x)  # (B, T, H) -> (B, T, outputs)

    @torch.no_grad()
    def init_heads(self, seed: int, drawn: set[str]) -> None:
        """Draw the parameters named in `drawn` anew: normal of std 0.02, biases zero, norms one (as transformers does)."""
        for name, parameter in self.named_parameters():
            if name not in drawn:
                continue
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            parameter.copy_(INIT_STD * torch.randn(parameter.shape, generator=generator, device="cpu"))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        task: Task | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kernels: KernelChoice | None = None,
    ) -> "TaskModel":
        """From any folder of the family; task: by default the folder's own.

        Heads are taken where the folder has them for the same labels, as is what lies below the last layer of a head
        (BERT's pooler, ModernBERT's dense layer) in any; others are drawn from the seed. dtype: of the body. UserError for
        weights that are missing, left over or of another shape, a family without the class, and a folder without a task.
        """
        folder = Path(folder)
        if task is None and (task := saved_task(folder)) is None:
            raise UserError(f"{folder} holds no classifier, tagger or answer finder; train one with --stage classify")
        with torch.device("meta"):
            model = cls(task_config(folder, task), kernels)
        model.to(dtype).to_empty(device=device)
        for path in model.heads:
            model.get_submodule(path).float()
        theirs = saved_task(folder)
        same = theirs is not None and (theirs.stage, theirs.labels) == (task.stage, task.labels)
        model.init_heads(seed, _load(folder, model, same_task=same))
        return model


def document_means(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, T, H): at each token the mean over all tokens of its document; without cu_seqlens a row is one."""
    if cu_seqlens is None:
        return x.mean(dim=1, keepdim=True).expand_as(x)
    batch, length, _ = x.shape
    # not index_add, whose sums on a GPU differ from run to run
    sums = torch.segment_reduce(x.flatten(0, 1), "sum", offsets=cu_seqlens.long(), initial=0.0)  # (documents, H)
    means = sums / cu_seqlens.diff().clamp(min=1)[:, None]
    return means[document_ids(cu_seqlens, batch, length)]


# ---- folders ---------------------------------------------------------------------------------------------------------


def saved_task(folder: str | Path) -> Task | None:
    """What the model of a folder, or the adapter in it, was trained for; None of other models."""
    folder = Path(folder)
    path = folder / TASK_CONFIG
    if not path.exists() and (folder / ADAPTER_CONFIG).exists():
        scores = "score" in (read_adapter_config(folder).get("modules_to_save") or ())  # a reward model's
        return Task("classify", figure_names(1), "regression") if scores else None
    config = read_json(path if path.exists() else folder / "config.json")
    named = (config.get("architectures") or [""])[0]
    stage = next((stage for stage, ending in TASKS.items() if named.endswith(f"For{ending}")), None)
    if stage is None or stage == "answer":
        return None if stage is None else Task("answer")
    id2label = config.get("id2label") or dict(enumerate(figure_names(2)))  # what transformers takes for none
    labels = tuple(str(id2label[key]) for key in sorted(id2label, key=int))
    kinds = {problem: kind for kind, problem in PROBLEMS.items()}
    kind = kinds.get(config.get("problem_type") or "", "regression" if len(labels) == 1 else "single")
    return Task(stage, labels, kind)


def task_config(folder: str | Path, task: Task) -> TaskConfig:
    """The config of a folder's model with the head of a task. UserError where the family has no class for it.

    A decoder is padded with what `task_padding` says, since transformers reads the last token that is none of these.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    shape = ModelConfig.from_hf(config)
    if shape.causal and (padding := task_padding(folder, shape)) is not None:
        shape.pad_token_id = padding[0]
    pooling = config.get("classifier_pooling", "cls") if shape.family == "modernbert" else "cls"
    if pooling not in ("cls", "mean"):
        raise UserError(f"{folder / 'config.json'}: classifier_pooling is {pooling!r}; only cls and mean are computed")
    return TaskConfig.of(shape, task, pooling)


def task_padding(folder: Path, shape: ModelConfig) -> tuple[int, str] | None:
    """(id, text) of the token that rows are padded with: `padding_token`, or the end of text where no sequence ends in it."""
    if (found := padding_token(folder, shape)) is not None or not (folder / "tokenizer.json").exists():
        return found
    tokenizer = load_tokenizer(folder)
    eos = tokenizer.eos_token_id
    text = {token["id"]: token["content"] for token in tokenizer.definition["added_tokens"]}.get(eos)
    return None if text is None or find_layout(tokenizer, causal=True).after else (eos, text)


def _load(folder: Path, model: TaskModel, *, same_task: bool) -> set[str]:
    """Copy a folder's weights into the model's; returns the names of its parameters that the folder does not give."""
    family, names = model.config.family, model.config.names
    holders = {with_body(family, name, names.body): held for name, held in stored_names(folder, model.config).items()}
    taken: dict[str, tuple[str, Tensor]] = {}  # stored name -> (the model's name, where it goes)
    left_open: set[str] = set()
    for name, parameter in model.named_parameters():
        views = stored_views(family, name, parameter)
        # the output's layer, and what RoBERTa has beside it, know the labels
        of_labels = name.startswith(f"{names.output.partition('.')[0]}.")
        if any(name.startswith(f"{path}.") for path in model.heads) and (
            not views.keys() <= holders.keys() or (of_labels and not same_task)
        ):
            left_open.add(name)
            continue
        taken |= {stored: (name, view) for stored, view in views.items()}
    if missing := taken.keys() - holders.keys():
        raise UserError(f"{folder}: {len(missing)} weights of the model are missing, {min(missing)} first")
    if unexpected := [name for name in holders.keys() - taken.keys() if not name.startswith(HEADS)]:
        raise UserError(f"{folder}: {len(unexpected)} weights do not belong to the model, {min(unexpected)} first")
    _copy(holders, taken)
    return left_open


@torch.no_grad()
def _copy(holders: dict[str, tuple[Path, str]], taken: dict[str, tuple[str, Tensor]]) -> None:
    for path in dict.fromkeys(holders[name][0] for name in taken):
        with open_safetensors(path) as tensors:
            for name, (own_name, target) in taken.items():
                holder, found_as = holders[name]
                if holder != path:
                    continue
                weight: Any = tensors.get_tensor(found_as)
                if weight.shape != target.shape:
                    shapes = f"{tuple(weight.shape)}, but {tuple(target.shape)} fits {own_name}"
                    raise UserError(f"{path}: {found_as} has the shape {shapes}")
                target.copy_(weight)
