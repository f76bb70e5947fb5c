"""Which heads do transformers' classes give a family for classification, tagging and answers, and what are they called?

Read off transformers 5.24. A head's modules have the same names in our model, so that its folder opens there.
"""

from dataclasses import dataclass

from errors import UserError
from families.names import FAMILIES

# the stage that trains a class, and how the class's name goes on after that of the family
TASKS = {"classify": "SequenceClassification", "tag": "TokenClassification", "answer": "QuestionAnswering"}
# how the names of all heads' tensors begin, those of language models among them
HEADS = ("lm_head.", "cls.", "decoder.", "head.", "score.", "classifier.", "qa_outputs.")


@dataclass(frozen=True)
class HeadNames:
    """output: the path of the linear layer that gives the logits; bias: whether it has one.

    before: what the hidden states go through first: "" (nothing), "pooler" (the body's: dense, tanh), "dense" (a dense layer
    beside the output's, tanh), "prediction" (a masked language model's dense, activation, norm). body: the name of what is
    below the head.
    """

    output: str
    bias: bool = True
    before: str = ""
    body: str = "model"

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of what belongs to the head, in our model."""
        first = {"pooler": ("model.pooler",), "prediction": ("head",)}.get(self.before, ())
        return (*first, self.output.partition(".")[0])


_SCORE, _TAGS, _SPANS = HeadNames("score", bias=False), HeadNames("score"), HeadNames("qa_outputs")
_CLASSIFIER = HeadNames("classifier")
_LLAMA = {"classify": _SCORE, "tag": _TAGS, "answer": HeadNames("qa_outputs", body="transformer")}
_MISTRAL = _LLAMA | {"answer": _SPANS}
_PREDICTION = HeadNames("classifier", before="prediction")
_OF_FAMILY: dict[str, dict[str, HeadNames]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3_moe", "smollm3"), _LLAMA),
    **dict.fromkeys(("mistral", "mixtral"), _MISTRAL),
    "phi3": {"classify": _SCORE, "tag": _TAGS},
    "gemma2": {"classify": _SCORE, "tag": _TAGS},
    "gemma3_text": {"classify": _SCORE},
    "olmo2": {"classify": _SCORE},
    "olmo3": {"classify": _SCORE},
    "gpt2": {"classify": _SCORE, "tag": _CLASSIFIER, "answer": _SPANS},
    "bert": {"classify": HeadNames("classifier", before="pooler"), "tag": _CLASSIFIER, "answer": _SPANS},
    "roberta": {"classify": HeadNames("classifier.out_proj", before="dense"), "tag": _CLASSIFIER, "answer": _SPANS},
    "modernbert": dict.fromkeys(TASKS, _PREDICTION),
}


def head_names(family: str, task: str) -> HeadNames:
    """The head of a family's class for a task of TASKS. UserError where transformers has no such class."""
    known = _OF_FAMILY.get(family, {})
    if task not in known:
        have = f"it has those of --stage {', '.join(known)}" if known else "take a model of another family"
        raise UserError(f"--stage {task}: transformers has no {class_name(family, task)} to save the model as; {have}")
    return known[task]


def class_name(family: str, task: str) -> str:
    """transformers' class, such as "BertForTokenClassification"."""
    return f"{FAMILIES[family].CLASS}For{TASKS[task]}"


def with_body(family: str, stored: str, body: str) -> str:
    """A tensor's name in a class whose body is called `body`, from its name in any class of the family."""
    own, _, rest = stored.partition(".")
    several = any(names.body != "model" for names in _OF_FAMILY.get(family, {}).values())
    return f"{body}.{rest}" if several and own in ("model", "transformer") else stored
