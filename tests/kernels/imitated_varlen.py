"""What do the varlen kernels compute, and what do they refuse? Imitated on the CPU, as each version of torch documents them."""

import sys
from types import SimpleNamespace

import torch

import kernels.attention


def imitation(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, causal, scale, softcap=0.0):
    """What the varlen kernels document: (left, right) keys around the query, on each document alone."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    outputs = []
    for start, end in zip(starts_q.tolist(), starts_q.tolist()[1:], strict=False):
        assert end - start <= longest_q == longest_k and torch.equal(starts_q, starts_k)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = (end if size == -1 else size for size in window_size)
        seen = (distance <= left) & (-distance <= (0 if causal else right))
        one_q, one_k, one_v = (x[start:end].transpose(0, 1) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        scores = one_q @ one_k.repeat_interleave(groups, 0).mT * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((weights @ one_v.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(outputs)


def install_imitation(kernel, monkeypatch, version="2.13", module=kernels.attention):
    def torch_2_11(*args, return_aux=None, scale=None, window_size=(-1, -1)):
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # a torch that chooses would not choose cuDNN
        return imitation(*args, window_size=window_size, causal=False, scale=scale)

    def torch_2_12(*args, enable_gqa=False, num_splits=None, **settings):
        if num_splits is not None:
            raise RuntimeError("num_splits requires FA3. Register FA3 to set num_splits.")  # as it says
        return torch_2_13(*args, enable_gqa=enable_gqa, num_splits=1, **settings)

    def torch_2_13(*args, enable_gqa=False, num_splits=None, **settings):
        assert enable_gqa == (args[0].shape[1] != args[1].shape[1]) and num_splits == 1
        return torch_2_11(*args, **settings)

    def package(*args, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        return imitation(*args, window_size=window_size, causal=causal, scale=softmax_scale, softcap=softcap)

    if kernel == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=package))
    else:
        monkeypatch.setattr(module, "TORCH_2_12", version >= "2.12")
        monkeypatch.setattr(module, "_TORCH_2_13", version >= "2.13")
        kernels_of = {"2.11": torch_2_11, "2.12": torch_2_12, "2.13": torch_2_13}
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernels_of[version])
