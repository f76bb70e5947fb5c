"""How does Triton's interpreter compute in bfloat16 as a GPU does?

It keeps bf16 as the bits in a uint16 and then does integer arithmetic on them: sums and products come out wrong, without
an error, and conversions truncate (triton issues 4972 and 11584; a fix was declined in pull request 11585). `patch`
makes each operation on bf16 operands run in fp32 and rounds its result to nearest even, which is what one operation
does on a GPU. Holds for Triton 3.6 to 3.9.

    TRITON_INTERPRET=1 python -m tests.interpreter_bf16 train.py --kernels triton ...   runs a script with it
"""

import runpy
import sys

import numpy as np
import torch

# operations of the interpreter's builder that take and return floats
# fmt: off
_FLOAT_OPS = {
    "fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "approx_divf", "fma", "fneg", "minimumf", "minnumf",
    "maximumf", "maxnumf", "clampf", "cos", "sin", "exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt",
    "erf", "floor", "ceil",
}
# fmt: on


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def _narrow(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, rounded by torch to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy().reshape(values.shape)


def patch() -> None:
    """Replace the interpreter's float operations, once in a process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "bf16_is_patched", False):
        return
    builder.bf16_is_patched = True

    def is_bf16(x) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def up(x):
        return handle(_widen(x.data), tl.float32) if is_bf16(x) else x

    def down(x):
        return handle(_narrow(x.data), tl.bfloat16)

    def widened(operation):
        def compute(self, *operands):
            if not any(map(is_bf16, operands)):
                return operation(self, *operands)
            out = operation(self, *map(up, operands))
            return down(out) if out.dtype.scalar == tl.float32 else out

        return compute

    def compared(operation):
        def compute(self, a, b):
            return handle(operation(self, up(a), up(b)).data.astype(bool), tl.int1)

        return compute

    for name in dir(builder):
        if name.removeprefix("create_") in _FLOAT_OPS:
            setattr(builder, name, widened(getattr(builder, name)))
        elif name.startswith("create_fcmp"):
            setattr(builder, name, compared(getattr(builder, name)))

    _patch_casts(tl, interpreter, up, is_bf16)
    _patch_reductions(tl, interpreter, up, down, is_bf16)
    _patch_range(interpreter)


def _patch_casts(tl, interpreter, up, is_bf16) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, fp_to_fp, dot, atomic = (
        getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "create_atomic_rmw")
    )

    def cast_impl(self, source, to):
        if is_bf16(source) and to.scalar != tl.bfloat16:
            return up(source) if to.scalar == tl.float32 else cast(self, up(source), to)
        if to.scalar == tl.bfloat16 and not is_bf16(source):
            return handle(_narrow(source.data), tl.bfloat16)
        return cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if nearest and tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return cast_impl(self, source, to)
        return fp_to_fp(self, source, to, rounding)

    def atomic_add(self, op, pointer, value, mask, *order):
        if is_bf16(value):
            raise NotImplementedError("the kernels use no atomics: their sums must have the same bits each time")
        return atomic(self, op, pointer, value, mask, *order)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_atomic_rmw = cast_impl, create_fp_to_fp, atomic_add
    builder.create_dot = lambda self, a, b, c, *rest: dot(self, up(a), up(b), c, *rest)
    builder.get_bf16 = lambda self, value: handle(_narrow(np.array([value])), tl.bfloat16)


def _patch_reductions(tl, interpreter, up, down, is_bf16) -> None:
    def tensor(value, dtype, shape):
        return tl.core.tensor(value, tl.block_type(dtype, list(shape)) if shape else dtype)

    def widened(reduction):
        def reduce(self, x, *arguments, **settings):
            value = x[0] if isinstance(x, tuple) else x
            if not is_bf16(value.handle):
                return reduction(self, x, *arguments, **settings)
            wide = tensor(up(value.handle), tl.float32, value.shape)
            out = reduction(self, (wide, *x[1:]) if isinstance(x, tuple) else wide, *arguments, **settings)
            parts = out if isinstance(out, tuple) else (out,)
            parts = tuple(
                tensor(down(part.handle), tl.bfloat16, part.shape if part.type.is_block() else ())
                if part.dtype == tl.float32 else part
                for part in parts
            )  # fmt: skip
            return parts if isinstance(out, tuple) else parts[0]

        return reduce

    operations = interpreter.ReduceOps
    operations.min_max, operations.sum = widened(operations.min_max), widened(operations.sum)


def _patch_range(interpreter) -> None:
    """NumPy 2.4 refuses int() of a one-element array, which Triton 3.6 asks for in `for i in range(tensor)`."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, *arguments):
        result = patch_tensor(tensor, *arguments)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    patch()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
