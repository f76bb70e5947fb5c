"""Is what a model writes drawn from the right distribution, equal to a peer's, and shown in whole characters?"""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from adapters.base_models import load_base
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from generation.sampling import TextDecoder, generate, probabilities, stream_ids, stream_text
from model import Transformer, load_pretrained
from model_config import ModelConfig

CONTEXT = 48
# bytes of these characters are spread over tokens, because the vocabulary of 400 has no such character whole
MULTI_BYTE = "naïve 日本語のテキスト 👩‍👩‍👧 e\u0301 \u200b العربية 🇫🇷 ok"


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return load_tokenizer(tiny_data)


def make_model(vocab_size: int, *, eos_token_id=None, seed: int = 0) -> Transformer:
    """A random model with logits large enough that its greedy text varies."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=eos_token_id,
    )
    model = Transformer(config)
    model.init_weights(seed=seed, zero_residual=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 5
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer.vocab_size)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def collect(pieces) -> tuple[list[str], str]:
    """All pieces of a stream, and its return value."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, getattr(end.value, "reason", end.value)


# ------------------------------------------------------------------------------------------------------- against a peer


def peer_model(family: str, folder) -> transformers.PreTrainedModel:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    if family == "llama":
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        peer = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    peer.eval().save_pretrained(folder)
    return peer


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_text_equals_transformers(family, tmp_path):
    peer = peer_model(family, tmp_path)
    prompts = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    theirs = peer.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=30, do_sample=False)
    ours = generate(load_pretrained(tmp_path), prompts, max_new_tokens=30, temperature=0)
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[:, 7:].flatten().tolist())) > 10  # not a text that any model would write


def save_llama_2_tokenizer(folder) -> None:
    """A tokenizer in the style of Llama 2: <s> before every text, spaces as ▁, unknown characters as single bytes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", *"日本語のテキストですから"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    numbers = {token: index for index, token in enumerate(vocabulary)}
    built = HFTokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    built.save(str(folder / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def test_a_llama_folder_from_elsewhere_gets_its_beginning_token_as_in_transformers(tmp_path):
    peer = peer_model("llama", tmp_path)
    with torch.no_grad():  # bytes would make text that is no UTF-8, of which no decoder shows the same
        peer.lm_head.weight[3:259] = 0
    peer.save_pretrained(tmp_path)
    save_llama_2_tokenizer(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = their_tokenizer("an ö", return_tensors="pt").input_ids
    assert prompt[0, 0] == 1
    mask = torch.ones_like(prompt)
    theirs = peer.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=2)
    model, tokenizer = load_pretrained(tmp_path), load_tokenizer(tmp_path)
    pieces, _ = collect(stream_text(model, tokenizer, "an ö", max_new_tokens=20, temperature=0))
    assert "an ö" + "".join(pieces) == their_tokenizer.decode(theirs[0], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------------- distribution


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The definition in float64, one row, id by id: temperature, then the top_k, then the nucleus of what is left."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = {i: math.exp((logits[i] - logits.max()) / temperature) for i in order}
    total = sum(weights.values())
    kept, held = [], 0.0
    for i in order:
        assert top_p == 1 or abs(held - top_p) > 1e-5, "too close to the edge for fp32: choose another seed"
        if top_p < 1 and held >= top_p:
            break
        kept.append(i)
        held += weights[i] / total
    out = np.zeros(len(logits))
    for i in kept:
        out[i] = weights[i]
    return out / out.sum()


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.5, 20, 0.9), (0.3, 3, 0.6), (2.0, 1, 1.0)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [*SETTINGS, (1.0, 0, 1e-4), (1e-3, 0, 0.9), (1.0, 999, 1.0)]
)
def test_probabilities_are_those_of_the_definition(temperature, top_k, top_p):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)) * 3
    found = probabilities(logits, temperature, top_k, top_p).double().numpy()
    for row, expected in zip(
        found, (filtered(r, temperature, top_k, top_p) for r in logits.double().numpy()), strict=True
    ):
        assert ((row > 0) == (expected > 0)).all() or temperature < 0.01  # there fp32 rounds the unlikeliest to zero
        # fp32: an exponent of up to |logit| / temperature is rounded to 6e-8 of itself; 50 terms are summed
        np.testing.assert_allclose(row, expected, rtol=1e-6 * max(10, 20 / temperature), atol=1e-30)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_drawn_tokens_follow_the_filtered_distribution(model, temperature, top_k, top_p):
    draws = 4000
    prompt = ids([5, 17, 300])
    with torch.no_grad():
        logits = model.logits(model(prompt)[:, -1])[0].double().numpy()
    expected = filtered(logits, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(11)
    out = generate(
        model,
        prompt.expand(draws, -1),
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )
    counts = np.bincount(out[:, 3].numpy(), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    # Pearson's chi-square, ids expected fewer than 5 times pooled into one
    often = expected * draws >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    # the 1 - 1e-5 quantile, by Wilson and Hilferty's approximation (z = 4.27); the draws are seeded, so it never flakes
    quantile = freedom * (1 - 2 / (9 * max(freedom, 1)) + 4.27 * math.sqrt(2 / (9 * max(freedom, 1)))) ** 3
    assert chi_square <= quantile


def test_the_cache_changes_nothing(model):
    prompt = ids([5, 17, 300, 2], [9, 9, 8, 7])
    found = generate(model, prompt, max_new_tokens=30, temperature=0)
    text = prompt
    with torch.no_grad():
        for _ in range(30):
            text = torch.cat([text, model.logits(model(text)[:, -1]).argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == text.tolist()


def test_a_seed_repeats_the_text_and_another_gives_another(model, tokenizer):
    texts = ["".join(stream_text(model, tokenizer, "the", max_new_tokens=20, seed=seed)) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_padding_of_the_vocabulary_is_never_drawn(tokenizer):
    real = tokenizer.vocab_size
    model = make_model(real + 64)
    with torch.no_grad():  # of each pair w, -w one has a large positive logit: unfiltered, padding would always win
        model.head_weight[real : real + 32] *= 100
        model.head_weight[real + 32 :] = -model.head_weight[real : real + 32]
    unfiltered = generate(model, ids([1, 2, 3]), max_new_tokens=40, temperature=0)
    assert unfiltered[:, 3:].min() >= real
    for temperature in (0, 5.0):
        found = generate(model, ids([1, 2, 3]), max_new_tokens=40, temperature=temperature, vocab_size=real)
        assert found.shape == (1, 43)
        assert found.max() < real
    pieces, reason = collect(
        stream_text(model, tokenizer, "the", max_new_tokens=20, temperature=5.0, top_k=0, top_p=1.0)
    )
    assert "".join(pieces) and reason == "max_new_tokens"


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("as_list", [False, True])
def test_a_row_ends_at_the_end_of_text_and_the_others_go_on(model, as_list):
    prompts = ids([5, 17, 300], [9, 9, 8], [40, 41, 42])
    free = generate(model, prompts, max_new_tokens=25, temperature=0)
    stop = next(token for token in free[0, 6:].tolist() if token not in free[1:, 3:])
    first = free[0, 3:].tolist().index(stop) + 3
    found = generate(model, prompts, max_new_tokens=25, temperature=0, eos_token_id=[stop, 399] if as_list else stop)
    assert found[1:].tolist() == free[1:].tolist()
    assert found[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(found[0, first:].tolist()) == {stop}
    alone = generate(model, prompts[:1], max_new_tokens=25, temperature=0, eos_token_id=stop)
    assert alone.tolist() == free[:1, : first + 1].tolist()


def test_a_stream_says_why_it_ended(tokenizer):
    model = make_model(tokenizer.vocab_size)
    prompt, length = "the loss", len(tokenizer.encode("the loss"))
    greedy = generate(model, ids(tokenizer.encode(prompt)), max_new_tokens=CONTEXT, temperature=0)[0, length:].tolist()
    assert len(greedy) == CONTEXT - length  # stopped by the context

    def run(model, max_new_tokens):
        return collect(stream_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=0))

    assert run(model, CONTEXT)[1] == "context"
    assert run(model, CONTEXT - length)[1] == "max_new_tokens"
    unfinished = 0
    for count in range(1, 20):
        pieces, reason = run(model, count)
        assert (reason, "".join(pieces)) == ("max_new_tokens", tokenizer.decode(greedy[:count]))
        unfinished += pieces[-1:] == ["\ufffd"]
    assert unfinished  # some of them ended within a character
    model.config.eos_token_id = [tokenizer.eos_token_id, greedy[5]]  # as in Llama 3's config.json, two of them
    pieces, reason = run(model, CONTEXT)
    assert (reason, "".join(pieces)) == ("end of text", tokenizer.decode(greedy[: greedy.index(greedy[5])]))
    with torch.no_grad():  # now the tokenizer's own end-of-text token is the likeliest from the start
        model.config.eos_token_id = None
        model.head_weight[tokenizer.eos_token_id] = 3 * model.head_weight[greedy[0]]
    assert run(model, CONTEXT) == ([], "end of text")


def test_a_prompt_longer_than_the_context_is_an_error_with_both_numbers(model, tokenizer):
    prompt = "日本" * CONTEXT
    tokens = len(tokenizer.encode(prompt))
    with pytest.raises(UserError, match=rf"\b{tokens} tokens.*\b{CONTEXT}\b"):
        next(stream_text(model, tokenizer, prompt, max_new_tokens=5))


def test_generated_ids_can_be_trained_on(model):
    rows = generate(model, ids([5, 17, 300]), max_new_tokens=5)
    model.logits(model(rows)).sum().backward()
    assert model.head_weight.grad is not None
    model.zero_grad()


def test_training_mode_comes_back_also_when_the_reader_leaves_early(model):
    model.train()
    generate(model, ids([5]), max_new_tokens=2)
    assert model.training
    columns = stream_ids(model, ids([5]), max_new_tokens=20)
    next(columns)
    columns.close()
    assert model.training
    assert not torch.is_inference_mode_enabled()


# ------------------------------------------------------------------------------------------------------------ streaming


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    prompt, new = tokenizer.encode("a prompt 日"), tokenizer.encode(MULTI_BYTE)
    assert any("\ufffd" in tokenizer.decode([token]) for token in new)  # some tokens are parts of characters
    decoder = TextDecoder(tokenizer, prompt)
    pieces = [decoder.add(token) for token in new]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == MULTI_BYTE
    assert decoder.finish() == ""


def test_a_real_replacement_character_is_not_lost(tokenizer):
    decoder = TextDecoder(tokenizer, tokenizer.encode("x"))
    text = "a\ufffdb\ufffd"
    assert "".join(map(decoder.add, tokenizer.encode(text))) + decoder.finish() == text


@pytest.mark.parametrize("seed", range(20))
def test_any_ids_join_to_the_full_decode(tokenizer, seed):
    """Also bytes that are no UTF-8, which an untrained model writes."""
    random = np.random.default_rng(seed)
    prompt = tokenizer.encode("start ")
    # ids of single bytes come first in a byte-level vocabulary; as many of them as of the rest
    new = [int(random.integers(0, 257 if random.random() < 0.5 else tokenizer.vocab_size)) for _ in range(100)]
    decoder = TextDecoder(tokenizer, prompt)
    text = "".join(map(decoder.add, new)) + decoder.finish()
    assert text == tokenizer.decode(prompt + new)[len("start ") :]


def test_characters_that_a_tokenizer_spells_in_byte_tokens_come_whole(tmp_path):
    save_llama_2_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "so wird 日本語 ein 👩‍👧 Text über alles"
    decoder = TextDecoder(tokenizer, tokenizer.encode("kurz"))
    pieces = list(map(decoder.add, tokenizer.encode(text)))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == " " + text  # the space that this kind of tokenizer puts before every text


@pytest.mark.parametrize("first", ["play", "##ing", "[UNK]"])
def test_wordpiece_pieces_join_to_the_full_decode(tmp_path, first):
    """WordPiece puts the spaces between tokens, so what a token adds depends on the one before it."""
    vocabulary = ["[UNK]", "[SEP]", "play", "##ing", "##ed", "the", ".", ",", "日"]
    built = HFTokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    built.add_special_tokens(["[UNK]", "[SEP]"])
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    random = np.random.default_rng(0)
    prompt = [5, 2]
    new = [
        vocabulary.index(first),
        *random.integers(2, 9, 60).tolist(),
        *[0] * 20,
        2,
        *random.integers(2, 9, 20).tolist(),
    ]
    decoder = TextDecoder(tokenizer, prompt)
    text = "".join(map(decoder.add, new)) + decoder.finish()
    assert text == tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize("settings", [
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8, "temperature": 0.7}, {"min_p": 0.2},
    {"min_p": 1.0, "temperature": 2.0},
    {"repetition_penalty": 1.2, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
])  # fmt: skip
def test_probabilities_are_those_of_transformers_processors(model, settings):
    """In the order in which its generate() puts them together, on a prompt that repeats itself."""
    from transformers import GenerationConfig
    from transformers.generation import logits_process as peer

    config = GenerationConfig(**settings)
    warpers = {
        "repetition_penalty": peer.RepetitionPenaltyLogitsProcessor, "temperature": peer.TemperatureLogitsWarper,
        "top_k": peer.TopKLogitsWarper, "top_p": peer.TopPLogitsWarper, "min_p": peer.MinPLogitsWarper,
    }  # fmt: skip
    prompt = ids([5, 9, 5, 5, 7, 9])
    with torch.inference_mode():
        logits = model.logits(model(prompt)[:, -1])
    scores = peer.LogitsProcessorList(
        [make(getattr(config, name)) for name, make in warpers.items() if name in settings]
    )(prompt, logits.clone())
    wanted = scores.softmax(-1)[0].numpy()
    drawn = {"temperature": 1.0, **settings}
    columns = [
        next(stream_ids(model, prompt, max_new_tokens=1, generator=torch.Generator().manual_seed(seed), **drawn)).item()
        for seed in range(400)
    ]
    counts = np.bincount(columns, minlength=len(wanted))
    assert not counts[wanted == 0].any()
    frequent = 400 * wanted >= 5  # the others together are one more bin
    found, expected = ([*x[frequent], x[~frequent].sum()] for x in (counts, 400 * wanted))
    chi_squared = sum((a - b) ** 2 / b for a, b in zip(found, expected, strict=True) if b > 0)
    freedom = frequent.sum()
    assert chi_squared < freedom + 6 * max(1, 2 * freedom) ** 0.5


def test_a_greedy_text_with_a_repetition_penalty_is_transformers(tmp_path):
    peer = peer_model("llama", tmp_path)
    ours = load_base(tmp_path, dtype=torch.float32)
    prompt = ids([1, 2, 3, 1])
    wanted = peer.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, repetition_penalty=1.5,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert generate(ours, prompt, max_new_tokens=24, temperature=0, repetition_penalty=1.5).tolist() == wanted.tolist()
    assert generate(ours, prompt, max_new_tokens=24, temperature=0).tolist() != wanted.tolist()


def test_a_stop_string_ends_the_text_before_it(model, tokenizer):
    settings = {"max_new_tokens": 40, "temperature": 0}
    whole = "".join(stream_text(model, tokenizer, "the", **settings))
    assert len(whole) > 12
    for stops in ([whole[6:9]], [whole[8:12], whole[5:7]], ["never there", whole[3]]):
        pieces, reason = collect(stream_text(model, tokenizer, "the", stop_strings=stops, **settings))
        first = min(whole.index(stop) for stop in stops if stop in whole)
        assert ("".join(pieces), reason) == (whole[:first], "stop string")
    pieces, reason = collect(stream_text(model, tokenizer, "the", stop_strings=[whole + "!"], **settings))
    assert ("".join(pieces), reason) == (whole, "max_new_tokens")  # what was held back comes
