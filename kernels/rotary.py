"""By which angle does a token's place turn its queries and keys?

RoFormer (Su et al. 2021), and the ways of stretching it to a longer context that Hugging Face's config.json can name:
"linear" (Chen et al. 2023), "llama3" (Llama 3.1), "yarn" (Peng et al. 2023), and two that depend on the text's length:
"dynamic" (NTK scaling) and "longrope" (Ding et al. 2024). transformers takes the longest text of a batch for that length;
here each document is turned by its own, so that packing and micro-batches change nothing.
"""

import math

import torch
from torch import Tensor

from errors import UserError

_REQUIRED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "longrope": {"factor", "short_factor", "long_factor", "original_max_position_embeddings"},
}
STRETCHED_FROM = ("llama3", "yarn", "dynamic", "longrope")  # those that know the context before it was stretched
BY_LENGTH = ("dynamic", "longrope")  # those that turn a long text otherwise than a short one
_OPTIONAL = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"attention_factor"},
}


def rotary_tables(
    positions: Tensor, width: int, theta: float, scaling: dict | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, D/2) fp32, for positions (B, T). Shared by all layers of a forward; `rope` applies them.

    width: D, the channels of a head that turn. lengths, which those of BY_LENGTH need: how many tokens the text of each
    token has, broadcast to the positions. Computed from the positions each time: there is no table to grow, to cast with
    the model or to initialise. Angles stay fp32 under any autocast or model dtype: in bf16 positions beyond 256 would
    collide.
    """
    inv_freq, factor = rotary_frequencies(width, theta, scaling, positions.device, lengths)
    angles = positions[..., None].float() * inv_freq
    return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(
    width: int,
    theta: float,
    scaling: dict | None = None,
    device: torch.device | str = "cpu",
    lengths: Tensor | None = None,
) -> tuple[Tensor, float]:
    """fp32 radians per position of each pair of channels, and the factor on cos and sin (1 but for YaRN and LongRoPE).

    (D/2,), or (…, D/2) where they follow from the text's lengths (…). In transformers' order of operations, so that both
    agree to the last bits. `scaling` is one `checked_scaling` gave.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    if scaling is not None and scaling["rope_type"] in BY_LENGTH:
        assert lengths is not None, "the frequencies follow from the texts' lengths"
        return _by_length(exponents, theta, scaling, lengths[..., None], width)
    inv_freq = 1.0 / theta**exponents
    if scaling is None:
        return inv_freq, 1.0
    match scaling["rope_type"]:
        case "linear":
            return inv_freq / scaling["factor"], 1.0
        case "llama3":
            return _llama3(inv_freq, scaling), 1.0
        case "yarn":
            return _yarn(inv_freq, scaling, width, theta), _yarn_attention_factor(scaling)
    return inv_freq, 1.0


def checked_scaling(scaling: dict, max_position_embeddings: int) -> dict:
    """A complete copy of a rope_scaling; UserError for a type or key that `rotary_frequencies` would not honour."""
    kind = scaling.get("rope_type")
    if kind not in _REQUIRED:
        raise UserError(f'rope_scaling: rope_type "{kind}" is not known; choose from {", ".join(_REQUIRED)}')
    scaling = dict(scaling)
    if kind in STRETCHED_FROM:  # transformers' own default
        scaling.setdefault("original_max_position_embeddings", max_position_embeddings)
    if kind == "dynamic" and scaling["original_max_position_embeddings"] != max_position_embeddings:
        raise UserError(
            f'rope_scaling: rope_type "dynamic" stretches from max_position_embeddings, which is {max_position_embeddings}, and '
            f"original_max_position_embeddings {scaling['original_max_position_embeddings']} is not heeded by transformers: "
            "leave it out, or make them equal"
        )
    if kind in ("yarn", "longrope") and scaling.get("factor", 0 if kind == "yarn" else None) is None:
        # transformers takes what was stretched
        scaling["factor"] = max_position_embeddings / scaling["original_max_position_embeddings"]
    keys = scaling.keys() - {"rope_type"}
    missing = _REQUIRED[kind] - keys
    unknown = keys - _REQUIRED[kind] - _OPTIONAL.get(kind, set())
    if missing or unknown:
        problem = f"{min(missing)} is missing" if missing else f"{min(unknown)} is not a key of it"
        raise UserError(f'rope_scaling: for rope_type "{kind}" {problem}')
    if not isinstance(scaling["factor"], (int, float)) or scaling["factor"] < 1:
        raise UserError(f"rope_scaling: factor is {scaling['factor']!r}; it must be a number of at least 1")
    return scaling


def check_rotary_width(scaling: dict | None, width: int) -> None:
    """UserError where LongRoPE's lists do not have one factor for each pair of the channels that turn."""
    for name in ("short_factor", "long_factor"):
        factors = (scaling or {}).get(name)
        if factors is not None and (not isinstance(factors, list) or len(factors) != width // 2):
            has = f"{len(factors)} numbers" if isinstance(factors, list) else repr(factors)
            raise UserError(f"rope_scaling: {name} is {has}; it must be a list of {width // 2}, one a pair of channels")


def _by_length(
    exponents: Tensor, theta: float, scaling: dict, lengths: Tensor, width: int
) -> tuple[Tensor, float]:  # fmt: skip
    """Frequencies (…, D/2) of texts of these lengths (…, 1): LongRoPE's two sets, or a base that grows with the length."""
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    if scaling["rope_type"] == "dynamic":
        length = lengths.clamp(min=context).float()
        base = theta * (factor * length / context - (factor - 1)) ** (width / (width - 2))
        return 1.0 / base**exponents, 1.0
    short, long = (
        1.0 / (torch.tensor(scaling[name], dtype=torch.float32, device=exponents.device) * theta**exponents)
        for name in ("short_factor", "long_factor")
    )
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return torch.where(lengths > context, long, short), attention_factor


def _llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    context, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi / inv_freq
    divided = inv_freq / scaling["factor"]
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * divided + smooth * inv_freq
    scaled = torch.where(wavelength > context / low, divided, blended)
    return torch.where(wavelength < context / high, inv_freq, scaled)


def _yarn(inv_freq: Tensor, scaling: dict, dim: int, theta: float) -> Tensor:
    """Channels that turn often within the original context are kept, slow ones interpolated, a linear ramp between."""

    def channel_turning(rotations: float) -> float:
        context = scaling["original_max_position_embeddings"]
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = channel_turning(scaling.get("beta_fast") or 32)
    high = channel_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    channel = torch.arange(dim // 2, device=inv_freq.device, dtype=torch.float32)
    ramp = ((channel - low) / (high - low)).clamp(0, 1)
    return inv_freq / scaling["factor"] * ramp + inv_freq * (1 - ramp)


def _yarn_attention_factor(scaling: dict) -> float:
    """YaRN's temperature, applied to cos and sin (so its square multiplies the scores)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
