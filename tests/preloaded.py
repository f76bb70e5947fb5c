"""What the server of tests/processes.py imports before any process is asked of it."""

import os

import torch
import torch._dynamo  # DDP imports it, as the last evaluation does the plots: each process would spend seconds on them
import torch.distributed.fsdp  # and so with these where ranks share a model
import torch.distributed.tensor

import training.plots  # noqa: F401
from tests import interpreter_bf16

torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter_bf16.patch()
