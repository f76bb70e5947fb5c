"""What does each kernel ask of a GPU? Compiled for sm_80 and sm_90 on any machine, read from the machine code.

    python bench/resources.py            compile everything, compare with kernels/RESOURCES.txt, exit 1 on a difference
    python bench/resources.py --write    write that file anew, to be reviewed like code
    python bench/resources.py --only rms_norm

Each case of CASES calls a kernel's launch function with tensors that have shapes and no memory. In place of a GPU stands
a driver that only names its architecture, so Triton compiles what it would launch there, specialised as it would be.

The rules: no stack (spilled registers), shared memory within the architecture's limit, tensor-core instructions in
kernels with matrix products, 16-byte loads or stores in kernels bound by memory. It must run without TRITON_INTERPRET.
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TABLE = ROOT / "kernels" / "RESOURCES.txt"
SHARED_MEMORY_LIMIT = {80: 166912, 90: 232448}  # bytes a block may have (CUDA programming guide, compute capabilities)


@dataclass(frozen=True)
class Case:
    """A launch to compile. Its kernels are bound by "memory" (16-byte loads wanted), by "stores" (they write more than
    they read: 16-byte stores) or by "products" (tensor cores)."""

    name: str
    bound: str
    launch: Callable[[], object]


def cases() -> list[Case]:
    """Every kernel file's own list: `resource_cases() -> [(name, bound, launch)]` with tensors on the meta device."""
    import kernels.linear_cross_entropy
    import kernels.lora_linear
    import kernels.nf4
    import kernels.nf4_linear
    import kernels.norm_lora
    import kernels.rms_norm
    import kernels.rope
    import kernels.swiglu

    modules = [
        kernels.linear_cross_entropy, kernels.lora_linear, kernels.nf4, kernels.nf4_linear, kernels.norm_lora,
        kernels.rms_norm, kernels.rope, kernels.swiglu,
    ]  # fmt: skip
    return [
        Case(f"{module.__name__.split('.')[1]}: {name}", bound, launch)
        for module in modules
        for name, bound, launch in module.resource_cases()
    ]


class NoGpu:
    """Triton's view of a GPU of which nothing is known but its architecture."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compiled_kernels(case: Case, capability: int) -> list:
    """What the launches of this case compile to, one CompiledKernel a launch; nothing runs."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        self.device_caches.clear()  # they are kept by device, and every architecture here is device 0
        found.append(run(self, *arguments, grid=grid, warmup=True, **settings))
        return found[-1]

    driver.set_active(NoGpu(capability))
    JITFunction.run = compile_only
    try:
        case.launch()
    finally:
        JITFunction.run = run
    if not found:
        raise RuntimeError(f"{case.name} launched no kernel")
    return found


def resources(kernel) -> dict[str, int]:
    """Registers, stack, shared memory and the counts of the instructions that matter, from a kernel's machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump says nothing of registers: {usage}"
    registers, stack = map(int, found.groups())
    return {
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"\bH?GMMA|\bHMMA", code)),
        "loads": len(re.findall(r"\bLDG\b|\bLDGSTS\b|\bUTMALDG\b", code)),
        "wide loads": len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128|\bUTMALDG\b", code)),
        "wide stores": len(re.findall(r"\bSTG\S*\.128|\bUTMASTG\b", code)),
    }


def broken_rules(case: Case, capability: int, used: dict[str, int]) -> list[str]:
    broken = []
    if used["stack"]:
        broken.append(f"{used['stack']} bytes of registers spill to the stack")
    if used["shared"] > SHARED_MEMORY_LIMIT[capability]:
        broken.append(f"{used['shared']} bytes of shared memory, the limit is {SHARED_MEMORY_LIMIT[capability]}")
    if case.bound == "products" and not used["products"]:
        broken.append("no tensor-core instruction")
    if case.bound == "memory" and not used["wide loads"]:
        broken.append("no 16-byte load")
    if case.bound == "stores" and not used["wide stores"]:
        broken.append("no 16-byte store")
    return [f"{case.name} on sm_{capability}: {sentence}" for sentence in broken]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write kernels/RESOURCES.txt")
    parser.add_argument("--only", default="", help="cases whose name contains this text; compares nothing")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    import triton

    # read from the machine code of another version, figures would differ with nothing changed here
    header = f"# triton {triton.__version__}; python bench/resources.py --write\n"
    columns = ["warps", "registers", "stack", "shared", "products", "loads", "wide loads", "wide stores"]
    lines = [f"{'kernel':<68}{'sm':>4}" + "".join(f"{name:>12}" for name in columns)]
    problems = []
    for case in cases():
        if args.only not in case.name:
            continue
        for capability in SHARED_MEMORY_LIMIT:
            for kernel in compiled_kernels(case, capability):
                used = resources(kernel)
                problems += broken_rules(case, capability, used)
                name = f"{case.name} {kernel.metadata.name.strip('_')}"
                lines.append(f"{name:<68}{capability:>4}" + "".join(f"{used[name]:>12}" for name in columns))
                print(lines[-1], flush=True)
    text = header + "\n".join(line.rstrip() for line in lines) + "\n"
    print("\n".join(problems), file=sys.stderr)
    if args.write:
        TABLE.write_text(text, encoding="utf-8")
    elif not args.only and (committed := TABLE.read_text(encoding="utf-8")).startswith(header) and committed != text:
        print(
            *difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "now", lineterm=""), sep="\n"
        )
        problems.append("changed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
