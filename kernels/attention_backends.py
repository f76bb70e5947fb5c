"""Which kernel computes attention here, why not a faster one, and how is that said?

A back end is what computes the attention of packed documents and of windows (the table is in kernels/attention.py). When
"auto" chooses: flash-attn where it is installed, else varlen, both where they can run; sdpa elsewhere. Scores with a
softcap: flash-attn where it is installed, else flex, both where they can run; else plain PyTorch, which is "sdpa" as well.
"""

import importlib.metadata
import importlib.util

import torch
from torch.nn.attention import SDPBackend

from errors import UserError

ATTENTION_BACKENDS = ("auto", "sdpa", "varlen", "flash-attn", "fa3", "fa4", "flex")
HALF = (torch.float16, torch.bfloat16)

# On a CPU, rows from this many tokens are faster as one call a document: 1.06 to 15 times in the shapes tried with fp32,
# 0.98 to 8 with bf16; fp16 gains more
LOOP_FROM, LOOP_FROM_BF16 = 256, 512

TORCH_2_12 = torch.__version__ >= "2.12"  # varlen_attn learned enable_gqa, and FA4 learned windows


# -------------------------------------------------------------------------------------- what is here, and what is chosen


def why_not(
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    *,
    training: bool = True,
    softcap: bool = False,
) -> str | None:
    """None where the back end can compute attention of this dtype there, else the reason why not, in words.

    training=False: without gradients. softcap: whether the scores have one.
    """
    if backend not in ATTENTION_BACKENDS[1:]:
        raise ValueError(f"there is no attention back end {backend!r}")
    device = torch.device(device)
    if backend == "sdpa":
        return None
    if backend == "flex":
        return _why_not_flex(device, dtype, head_dim, training)
    if device.type != "cuda":
        return "varlen kernels need CUDA"
    if softcap and backend != "flash-attn":
        return "torch's varlen kernels know no softcap"
    if dtype not in HALF:
        return f"varlen kernels take fp16 or bf16, not {dtype}".replace("torch.", "")
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        return f"varlen kernels take heads up to 256 wide, in multiples of 8, not {head_dim}"
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "varlen kernels need compute capability 8.0"
    if backend == "flash-attn":  # the distribution: flash-attn-4 has a module of the same name without this function
        return None if _installed("flash-attn") else "flash-attn is not installed"
    if backend == "fa3":
        if capability[0] != 9:
            return f"FlashAttention-3 needs compute capability 9.0, not {capability[0]}.{capability[1]}"
        if importlib.util.find_spec("flash_attn_interface") is None:  # the module that torch looks for
            index = f"https://download.pytorch.org/whl/cu{(torch.version.cuda or '').replace('.', '')}"
            return f"flash-attn-3 is not installed (pip install flash-attn-3 --index-url {index})"
    if backend == "fa4":
        if capability[0] not in (9, 10):
            return f"FlashAttention-4 needs compute capability 9.0 or 10.0, not {capability[0]}.{capability[1]}"
        if not TORCH_2_12:
            return "FlashAttention-4 knows packed documents from torch 2.12 on"
        if not _installed("flash-attn-4"):
            return "flash-attn-4 is not installed (pip install flash-attn-4)"
    return None


def _why_not_flex(device: torch.device, dtype: torch.dtype, head_dim: int | None, training: bool) -> str | None:
    if device.type == "cpu":
        return "FlexAttention trains on CUDA only" if training else None
    if device.type != "cuda":
        return f"FlexAttention needs CUDA, not {device.type}"
    if dtype == torch.float64:
        return "FlexAttention takes fp32, fp16 and bf16 on CUDA"
    if head_dim is not None and head_dim < 16:
        return f"FlexAttention takes heads from 16 wide, not {head_dim}"
    return None if importlib.util.find_spec("triton") else "FlexAttention needs triton, which is not installed"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def attention_backends(device: str | torch.device) -> dict[str, str]:
    """Each back end of `attention` and "available", or the reason why it is not, for training on this device."""
    return {name: why_not(name, device, torch.bfloat16) or "available" for name in ATTENTION_BACKENDS[1:]}


def choose_attention(
    request: str,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    training: bool = True,
    softcap: bool = False,
) -> str:
    """The back end to use: one of ATTENTION_BACKENDS other than "auto". Pass it to the masks, and once to `activate`.

    dtype is the one that attention computes in. training=False: without gradients. softcap: whether the scores have one.
    UserError where `request` is unknown or cannot run.
    """
    if request not in ATTENTION_BACKENDS:
        raise UserError(f"there is no attention back end {request!r}; choose one of {', '.join(ATTENTION_BACKENDS)}")
    if request == "auto":
        fused = ("flash-attn", "flex" if softcap else "varlen")
        return next((name for name in fused if why_not(name, device, dtype, head_dim, softcap=softcap) is None), "sdpa")
    if reason := why_not(request, device, dtype, head_dim, training=training, softcap=softcap):
        raise UserError(f"attention cannot run on {request} here: {reason}; choose auto or sdpa")
    return request


def activate(backend: str) -> None:
    """Make FlashAttention-3 or -4 the flash kernel of this process where fa3 or fa4 was chosen; else do nothing.

    UserError where its package is there but does not load.
    """
    if backend not in ("fa3", "fa4"):
        return
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl(backend.upper())
    except Exception as error:  # whatever a compiled package of another torch or CUDA may raise when it is loaded
        raise UserError(
            f"{backend} does not load ({error}); reinstall flash-attn-{backend[2]} or choose auto"
        ) from error
    torch.backends.cuda.enable_cudnn_sdp(False)  # which SDPA would prefer on Hopper, to the one that was asked for


def backend_that_runs(backend: str, device: torch.device, dtype: torch.dtype, softcap: bool = False) -> str:
    """The kernel that computes documents and windows: "sdpa", "varlen", "flash-attn" or "flex".

    ValueError where `backend` cannot run.
    """
    if backend == "auto":
        return choose_attention("auto", device, dtype, softcap=softcap)
    if reason := why_not(backend, device, dtype, training=False, softcap=softcap):
        raise ValueError(f"attention back end {backend}: {reason}")
    return "varlen" if backend in ("fa3", "fa4") else backend


# what torch.compiler.assume_constant_result sets; calling it would import the compiler, a second at every start
backend_that_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def loop_pays(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether rows of this length are computed one document at a time where sdpa was chosen."""
    return device.type == "cpu" and length >= (LOOP_FROM_BF16 if dtype == torch.bfloat16 else LOOP_FROM)


# ------------------------------------------------------------------------------------------------------------- in words


def sdpa_kernel_taken(
    device: str | torch.device, dtype: torch.dtype, head_dim: int | None = None, *, masked: bool = False
) -> str:
    """The kernel that torch takes for SDPA there, causal or with a boolean mask, asked of torch itself.

    On Hopper and later a cuDNN older than 9.15.1 makes torch fall back to FlashAttention-2, about half as fast. Mostly
    the cause is another cuDNN in LD_LIBRARY_PATH, found before the one of torch's wheel; so that is said.
    """
    device = torch.device(device)
    x = torch.empty(1, 2, 128, head_dim or 64, dtype=dtype, device=device, requires_grad=True)
    visible = torch.ones(128, 128, dtype=torch.bool, device=device) if masked else None
    taken = SDPBackend(torch._fused_sdp_choice(x, x, x, attn_mask=visible, is_causal=not masked))
    if device.type != "cuda":
        return f"the {taken.name.lower().replace('_', ' ')} kernel for {device.type}"
    cudnn = torch.backends.cudnn.version() or 0
    cudnn_name = f"cuDNN {cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}"
    if taken == SDPBackend.CUDNN_ATTENTION:
        return cudnn_name
    names = {SDPBackend.EFFICIENT_ATTENTION: "memory-efficient", SDPBackend.MATH: "math"}
    name = names.get(taken, taken.name)
    if taken == SDPBackend.FLASH_ATTENTION:
        name = f"FlashAttention-{(torch.nn.attention.current_flash_attention_impl() or 'FA2')[2:]}"
    hopper = torch.cuda.get_device_capability(device) >= (9, 0) and dtype in HALF
    if hopper and 0 < cudnn < 91501 and torch.backends.cuda.cudnn_sdp_enabled():
        name += f", as {cudnn_name} is too old: is one in LD_LIBRARY_PATH found before torch's?"
    return name


def describe_attention(
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    softcap: bool = False,
) -> str:
    """What a chosen back end means, in words for a start-up line: kernels, versions, and why not a faster one."""
    version = torch.__version__
    if backend == "flex":
        faster = why_not("flash-attn", device, dtype, head_dim) if softcap else None
        return f"FlexAttention of torch {version}" + (f" ({faster or 'as asked'})" if softcap else "")
    if softcap:
        return _describe_softcapped(backend, device, dtype, head_dim)
    plain = sdpa_kernel_taken(device, dtype, head_dim)
    if backend == "sdpa":
        if torch.device(device).type == "cpu":
            documents = _one_by_one(dtype)
        else:
            documents = f"documents by a mask on {sdpa_kernel_taken(device, dtype, head_dim, masked=True)}"
        return f"SDPA on {plain}; {documents} ({why_not('varlen', device, dtype, head_dim) or 'as asked'})"
    if backend == "flash-attn":
        name = f"flash-attn {importlib.metadata.version('flash-attn')}"
    elif backend == "varlen":
        name = f"torch {version} varlen ({why_not('flash-attn', device, dtype, head_dim) or 'as asked'})"
    else:
        name = f"FlashAttention-{backend[2]} in torch {version}"
    return f"{name} for documents and windows; SDPA on {plain} for the rest"


def _describe_softcapped(backend: str, device: str | torch.device, dtype: torch.dtype, head_dim: int | None) -> str:
    """`describe_attention` of scores with a softcap on flash-attn or in plain PyTorch."""
    if backend == "flash-attn":
        return f"flash-attn {importlib.metadata.version('flash-attn')}; plain PyTorch after a cache"
    if torch.device(device).type == "cpu":
        return f"plain PyTorch, as SDPA knows no softcap; {_one_by_one(dtype)}"
    fused = [why_not(name, device, dtype, head_dim, softcap=True) for name in ("flash-attn", "flex")]
    reasons = [reason for reason in fused if reason is not None]
    why = "; ".join(reasons) if len(reasons) == len(fused) else "as asked"
    return f"plain PyTorch with all scores in memory, as SDPA knows no softcap ({why})"


def _one_by_one(dtype: torch.dtype) -> str:
    least = LOOP_FROM_BF16 if dtype == torch.bfloat16 else LOOP_FROM
    return f"documents one by one in rows of {least} tokens and more"


def chosen_backend(device: str | torch.device, dtype: torch.dtype) -> str:
    """`describe_attention` of what "auto" chooses."""
    return describe_attention(choose_attention("auto", device, dtype), device, dtype)
