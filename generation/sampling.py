"""How does a model write? One token at a time from a cache of keys and values, drawn from a filtered distribution."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataprep.tokenizers import Tokenizer
from errors import UserError
from model import KVCache, Transformer

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 character decodes to
_GREEDY_BELOW = 1e-5  # a temperature this low would overflow fp32 before it could change the choice


def generate(model: Transformer, input_ids: Tensor, **settings) -> Tensor:
    """Continue each row of input_ids (B, T) int64. Returns (B, T + n) with n <= max_new_tokens.

    Takes what `stream_ids` takes. A row ends at an end-of-text id and is then filled with it.
    """
    columns = list(stream_ids(model, input_ids, **settings))
    # not under inference_mode: its tensors cannot be trained on, and rollouts are
    return torch.cat([input_ids.to(model.head_weight.device), *(column[:, None] for column in columns)], dim=1)


def stream_ids(
    model: Transformer,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """`generate`, one new column (B,) int64 at a time as it is drawn; its reader may leave at any time.

    It ends after max_new_tokens, at the model's max_position_embeddings, or when every row has drawn one of
    eos_token_id (which it repeats until the others have). temperature 0 takes the likeliest token; top_k 0, top_p 1 and
    min_p 0 filter nothing. repetition_penalty: what the logits of ids that a row holds already, the prompt's too, are divided
    by where they are positive and multiplied with where they are not (Keskar et al. 2019, §4.1); before the temperature.
    Ids from vocab_size on (the padding of the weights) are never drawn. `generator` lives on the model's device; the same
    seed gives the same ids. The model's training mode is restored.
    """
    batch, length = input_ids.shape
    limit = min(length + max_new_tokens, model.config.max_position_embeddings)
    weight = model.head_weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    stops = torch.tensor([] if eos_token_id is None else eos_token_id, dtype=torch.int64, device=weight.device)
    with torch.inference_mode():
        cache = KVCache(model.config, batch_size=batch, max_length=limit, device=weight.device, dtype=dtype)
        step_ids = input_ids.to(weight.device)
        finished = torch.zeros(batch, dtype=torch.bool, device=weight.device)
        seen = torch.zeros(batch, len(weight), dtype=torch.bool, device=weight.device).scatter_(1, step_ids, True)
    was_training = model.training
    model.eval()
    try:
        for _ in range(limit - length):
            with torch.inference_mode():  # not around the yield: it would hold in the reader's code too
                # forward, not a call: a model compiled in place would compile anew for every length
                hidden = model.forward(step_ids, cache=cache)
                logits = model.logits(hidden[:, -1])[:, :vocab_size]  # (B, V) fp32
                if repetition_penalty != 1:
                    penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                    logits = torch.where(seen[:, : logits.shape[1]], penalised, logits)
                chosen = choose(logits, temperature, top_k, top_p, min_p, generator)
                chosen = torch.where(finished, step_ids[:, -1], chosen)
                finished |= torch.isin(chosen, stops)
                step_ids = chosen[:, None]
                seen.scatter_(1, step_ids, True)
            yield chosen
            if stops.numel() and finished.all():
                return
    finally:
        model.train(was_training)


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Draw one id a row from logits (B, V): int64 (B,). temperature 0 is the maximum."""
    if temperature < _GREEDY_BELOW:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p, min_p), 1, generator=generator)[:, 0]


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """(B, V) fp32: softmax(logits / temperature) over the top_k likeliest ids, of these the fewest that hold top_p, and of
    these such as are at least min_p times as likely as the likeliest (Nguyen et al. 2024).

    temperature and top_p are above 0. Nucleus sampling (Holtzman et al. 2020): the id that crosses top_p is kept, so
    at least one always is.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True)
        beyond = sorted_p.cumsum(-1) - sorted_p >= top_p  # the ids before this one already hold top_p
        p = p.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        p = p / p.sum(-1, keepdim=True)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def up_to(ends: Sequence[str], pieces: Iterable[str]) -> Generator[str, None, str | None]:
    """The pieces of a text up to where the first of `ends` begins, which may lie across pieces; all of it without one.

    Returns the end that was found, or None. What may be the beginning of one is held back until that is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.index(end), -len(end), end) for end in ends if end in held]
        if found:
            place, _, end = min(found)
            if place:
                yield held[:place]
            return end
        known = len(held) - max((_overlap(held, end) for end in ends), default=0)
        if known:
            yield held[:known]
        held = held[known:]
    if held:
        yield held
    return None


def _overlap(text: str, end: str) -> int:
    """How many characters at the text's end may begin `end`."""
    return next((size for size in range(len(end) - 1, 0, -1) if text.endswith(end[:size])), 0)


@dataclass
class Ending:
    """How a text came to its end: "end of text", "stop string", "max_new_tokens" or "context" (the model's
    max_position_embeddings are used up); the tokens that were drawn, and the seconds that took."""

    reason: str = ""
    tokens: int = 0
    seconds: float = 0.0


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_strings: Sequence[str] = (),
    seed: int = 0,
) -> Generator[str, None, Ending]:
    """Continue `prompt`, yielding the new text in pieces of whole characters; an end-of-text token or one of stop_strings
    ends it unseen.

    The generator's return value says how it ended. An empty prompt starts a new document. Raises UserError when the prompt
    leaves no room in the model's context.
    """
    ids = _opening_ids(tokenizer) + tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    context = model.config.max_position_embeddings
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and the model's context (max_position_embeddings) is {context}, "
            "the new token included; shorten the prompt"
        )
    device = model.head_weight.device
    eos = model.config.eos_token_id
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    columns = stream_ids(
        model,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=sorted(stops),
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
    )
    ending = Ending("max_new_tokens" if len(ids) + max_new_tokens <= context else "context")
    start = time.perf_counter()
    if (yield from up_to(stop_strings, decoded(columns, stops, TextDecoder(tokenizer, ids), ending))):
        ending.reason = "stop string"
    ending.seconds = time.perf_counter() - start
    return ending


def decoded(columns: Iterable[Tensor], stops: set[int], decoder: "TextDecoder", ending: Ending) -> Iterator[str]:
    """The text of one row's ids as they are drawn, without those in `stops`; `ending` counts them and learns of these."""
    for token in map(int, columns):
        ending.tokens += 1
        if token in stops:
            ending.reason = "end of text"
        elif piece := decoder.add(token):
            yield piece
    if piece := decoder.finish():
        yield piece


def _opening_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that tokenizer.json's template puts before every text, such as Llama's <s>; groundup's own has none."""
    processor = tokenizer.definition.get("post_processor") or {}
    ids = []
    for step in processor.get("processors", [processor]):
        for part in step.get("single", []):
            if "SpecialToken" not in part:
                break
            ids += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return ids


class TextDecoder:
    """Turns ids into text as they come. A character whose bytes are spread over tokens appears when it is whole.

    Each piece is the difference of two decodes that begin at the same earlier token, because what a token looks like
    can depend on the one before it (WordPiece's spaces).
    """

    CONTEXT = 8  # ids; enough for a character, which has at most four

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-self.CONTEXT :])
        self._given = len(tokenizer.decode(self._ids))  # characters of their text that have been given out

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # some decoders write one replacement for an unfinished character, some one for each of its bytes
        whole = text.rstrip(_REPLACEMENT)
        piece = text[self._given : len(whole)]
        self._given = max(self._given, len(whole))
        if whole == text and len(self._ids) > 2 * self.CONTEXT:
            self._forget()
        return piece

    def finish(self) -> str:
        """What is left at the end, an unfinished character as U+FFFD."""
        return self._tokenizer.decode(self._ids)[self._given :]

    def _forget(self) -> None:
        """Drop old ids, so that a token costs the same however long the text is."""
        recent = self._ids[-self.CONTEXT :]
        if text := self._tokenizer.decode(recent):  # special tokens alone would not show that text precedes
            self._ids, self._given = recent, len(text)
