"""Do shapes, dtypes and devices fit together on a GPU, where there is none? Forward passes on fake CUDA tensors.

They need a torch that was built with CUDA: the CPU build refuses every index into a CUDA tensor. torch's autograd engine
asks the driver, so backward passes stay untraced; under Triton's interpreter, and compiled (bench/resources.py), they run.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adapters.lora import LoraLinear, add_adapters, join_projections
from batches.micro_batch import IGNORE_INDEX
from batches.packing import Sequence, pack
from errors import UserError
from generation.rollouts import response_statistics
from generation.sampling import choose
from kernels.attention_backends import choose_attention
from kernels.choice import KernelChoice, choose_kernels
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lora_linear import PATHS
from model import KVCache, Transformer
from model_config import ModelConfig
from training.optimizers import OPTIMIZERS, build_optimizers
from training.precision import LossScaler, Precision, choose_precision

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
CUDA = torch.device("cuda", 0)
SHAPE = ModelConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, qk_norm=True,
)  # fmt: skip
GPUS = {"T4": (7, 5), "A100": (8, 0), "H100": (9, 0), "B200": (10, 0)}


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    """What torch says of a GPU; the name of one that is not there."""
    about = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: GPUS[request.param])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: f"NVIDIA {request.param}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: GPUS[request.param] >= (8, 0))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which no fake tensor knows
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return request.param


def to_cuda(model: nn.Module) -> None:
    """Fake weights on the GPU in place of the others; `Module.to` cannot swap fake tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)


def a_batch():
    sequences = [Sequence(np.arange(length) % 250, np.arange(length) > 2) for length in (5, 17, 9, 30, 12)]
    [batch] = pack([[one] for one in sequences], max_length=32, micro_batch_size=4)
    return batch


def a_model(kernels: KernelChoice, adapters: str) -> Transformer:
    """Made on the CPU, with numbers: 4 bits are made of them."""
    model = Transformer(SHAPE, kernels)
    model.init_weights(seed=0, zero_residual=False)
    if adapters != "none":
        add_adapters(
            model, rank=8, dropout=0.1 if adapters == "torch" else 0.0, quantise="nf4" if adapters == "4 bits" else None
        )
    return model


def take_path(model: Transformer, adapters: str) -> None:
    """On the GPU: a path may lay weights together anew."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and adapters in PATHS:
            layer.take_path(adapters)
    if adapters == "joint":
        join_projections(model, model.kernels.lora)


def choices(attention: str, kernels: str) -> tuple[Precision, KernelChoice]:
    precision = choose_precision("auto", CUDA)
    back_end = choose_attention(attention, CUDA, precision.dtype, head_dim=SHAPE.head_dim)
    return precision, choose_kernels([kernels], CUDA, False, back_end)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "varlen", "flex"])
@pytest.mark.parametrize("adapters", ["none", "torch", "augmented", "joint", "one_pass", "4 bits"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_packed_batch_goes_through_the_model_and_its_losses(kernels, adapters, attention, gpu):
    if attention == "varlen" and GPUS[gpu] < (8, 0):
        with pytest.raises(UserError, match="capability"):
            choices(attention, kernels)
        return
    precision, chosen = choices(attention, kernels)
    assert chosen.rms_norm == ("triton" if kernels == "auto" and GPUS[gpu] >= (8, 0) else "torch")
    model, batch = a_model(chosen, adapters), a_batch()
    # flex's autograd formula would be traced, and its kernel be compiled, which both ask the driver
    learning, stance = torch.set_grad_enabled(attention != "flex"), torch.compiler.set_stance("force_eager")
    with FakeTensorMode(allow_non_fake_inputs=True), learning, stance, precision.autocast(CUDA):
        to_cuda(model)
        take_path(model, adapters)
        batch = batch.to(CUDA)
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens, batch.input_ids.shape[1])
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), ignore_index=IGNORE_INDEX,
            implementation=chosen.linear_cross_entropy,
        )  # fmt: skip
        drawn = response_statistics(hidden, model, batch.targets, temperature=0.7, vocab_size=250)
    assert hidden.device == loss.total.device == drawn.logprobs.device == CUDA
    assert (hidden.dtype, loss.total.dtype, drawn.logprobs.dtype) == (precision.dtype, torch.float32, torch.float32)
    assert hidden.shape == (*batch.input_ids.shape, SHAPE.hidden_size)
    assert loss.total.requires_grad == (attention != "flex")


def test_a_token_is_drawn_over_a_cache(gpu):
    """As stream_ids does, which is under inference_mode, and that fake tensors refuse."""
    precision, chosen = choices("auto", "auto")
    model = a_model(chosen, "none").eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), precision.autocast(CUDA):
        to_cuda(model)
        cache = KVCache(SHAPE, batch_size=2, max_length=8, device=CUDA, dtype=precision.dtype)
        for length in (5, 1):
            hidden = model(torch.zeros(2, length, dtype=torch.int64, device=CUDA), cache=cache)
        token = choose(model.logits(hidden[:, -1]), 0.8, top_k=20, top_p=0.9, min_p=0.1, generator=None)
    assert cache.length == 6 and token.device == CUDA and token.shape == (2,)


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name != "adamw8bit"]
)  # its codes are numbers, which fake tensors have not
def test_optimizers_and_the_scaler_stay_on_the_device(name, gpu):
    model = a_model(choices("auto", "auto")[1], "none")
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cuda(model)
        optimizers = build_optimizers(model, name=name, learning_rate=1e-3, weight_decay=0.1)
        scaler = LossScaler(CUDA, enabled=True)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        finite = torch.isfinite(norm)
        for optimizer in optimizers:
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        scaler.update(finite)
    state = [value for optimizer in optimizers for one in optimizer.state.values() for value in one.values()]
    assert norm.device == scaler.scale.device == CUDA
    assert state and all(value.device == CUDA for value in state)
