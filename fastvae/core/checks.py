"""Validation of arguments; messages name the argument, its value, the expected value and a fix."""

from __future__ import annotations

import math
import numbers
import operator
import os
from typing import Any

import torch
from torch import Tensor

from .hints import did_you_mean
from .torch_private import functorch_is_active

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Converted to int64, since torch has few operations for these.
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *UNSIGNED, torch.bool)


def checks_data() -> bool:
    """Return True if ``FASTVAE_CHECK=1`` enables checks of the data that synchronise a GPU."""
    return os.environ.get("FASTVAE_CHECK", "0") not in ("", "0")


def may_look(data: Tensor) -> bool:
    """Return True if reading the values is possible, and free of synchronisation or requested."""
    # The compiler first, since its tensors have no values.
    return not torch.compiler.is_compiling() and data.numel() > 0 and (data.is_cpu or checks_data())


def shape_of(tensor: Any) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def is_dense(value: Tensor) -> bool:
    """Return True unless a tensor is sparse, MKL-DNN or nested."""
    return value.layout is torch.strided and not value.is_nested


def check_dense(name: str, value: Tensor) -> None:
    """Reject a sparse, MKL-DNN or nested tensor."""
    if is_dense(value):
        return
    own = "it" if " " in name else name
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor ({value.layout}); expected a dense one: pad it with "
            f"torch.nested.to_padded_tensor({own}, 0.0), and leave the padding out with mask="
        )
    raise TypeError(f"{name} has layout {value.layout}; expected a dense tensor: pass {own}.to_dense()")


def check_tensor(name: str, value: Any, dims: int | None = None, axes: str = "") -> Tensor:
    """Validate a floating-point tensor with ``dims`` axes, if given, which ``axes`` describes as "[B, D]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor{' ' + axes if axes else ''}, got {type(value).__name__}")
    check_dense(name, value)
    if value.is_quantized:
        raise TypeError(
            f"{name} is quantised, of dtype {value.dtype}; pass {'it' if ' ' in name else name}.dequantize()"
        )
    if value.dtype not in FLOATING:
        hints = {True: "", False: f" (convert it with {name}.float())"}
        bytes_hint = f" (bytes become numbers in [0, 1] by {name}.float() / 255)"
        hint = bytes_hint if value.dtype == torch.uint8 else hints[value.is_complex() or " " in name]
        raise TypeError(
            f"{name} has dtype {value.dtype}; expected float32, float64, bfloat16 or float16{hint}"
        )
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name} has shape {shape_of(value)}; expected {axes}, that is {dims} axes")
    return value


def check_data(x: object, likelihood: Any, name: str = "x") -> Tensor:
    """Validate a floating-point tensor, or integers if the likelihood takes them; unsigned become int64."""
    if not (isinstance(x, Tensor) and x.dtype in FLOATING):
        if isinstance(x, Tensor) and x.dtype in INTEGERS and likelihood.takes_integers:
            check_dense(name, x)
            integers: Tensor = signed(x)
            return integers
        x = check_tensor(name, x)
    check_dense(name, x)
    if x.requires_grad and not likelihood.differentiable:
        raise ValueError(
            f"x requires a gradient, but a {type(likelihood).__name__} likelihood has none for x; pass "
            "x.detach()"
        )
    return x


def signed(x: Any) -> Any:
    """Return uint16, uint32 and uint64 as int64, anything else unchanged."""
    return x.long() if isinstance(x, Tensor) and x.dtype in UNSIGNED else x


def as_int64(x: Any) -> Any:
    """Return integers of any dtype as int64, anything else unchanged."""
    return x.long() if isinstance(x, Tensor) and x.dtype in INTEGERS else x


def on_same_device(device: torch.device, other: torch.device) -> bool:
    """Return True if the devices are equal; one without an index matches any of its type."""
    return device == other or (device.type == other.type and None in (device.index, other.index))


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if not on_same_device(value.device, other.device):
        example = "" if " " in name else f", for example {name}.to({str(other.device)!r})"
        raise ValueError(
            f"{name} is on {value.device} but {other_name} is on {other.device}; move one of them{example}"
        )


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {shape_of(value)} but {other_name} has shape {shape_of(other)}; they must be "
            "equal"
        )


def check_result(
    owner: Any,
    method: str,
    what: str,
    value: Any,
    axes: str,
    shape: tuple[int | str, ...],
    device: torch.device,
    fix: str,
) -> None:
    """Validate the result of a possibly user-written method: floating-point, of this shape and device."""
    is_tensor = isinstance(value, Tensor)
    if (
        is_tensor
        and value.shape == shape
        and value.is_floating_point()
        and on_same_device(value.device, device)
    ):
        return
    method = f"{type(owner).__name__}.{method}"
    expected = f"expected {what} {axes} = [{', '.join(map(str, shape))}]"
    if not is_tensor:
        raise TypeError(f"{method} returned {type(value).__name__}; {expected}, a floating-point tensor")
    if value.shape != shape:
        raise ValueError(f"{method} returned {shape_of(value)}; {expected}: {fix}")
    if not value.is_floating_point():
        raise TypeError(f"{method} returned a tensor of {value.dtype}; {expected}, of a floating-point dtype")
    raise ValueError(f"{method} returned a tensor on {value.device}; {expected}, on {device}")


def as_int(name: str, value: Any, meaning: str) -> int:
    """Validate a Python or NumPy integer; a tensor, whose value may be on a GPU, is rejected."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    fix = f"; pass {name}=int({name})" if isinstance(value, Tensor) else ""
    raise TypeError(f"{name} must be an int, {meaning}; got {value!r} ({type(value).__name__}){fix}")


def check_count(name: str, value: Any, meaning: str, least: int = 1) -> int:
    """Validate an integer of at least ``least``."""
    count = as_int(name, value, meaning)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, {meaning}; got {count}")
    return count


def check_choice(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}{did_you_mean(value, known)}"
        )
    return value


def check_number(name: str, value: Any, meaning: str, least: float = 0.0) -> float:
    if type(value) is float and least <= value < math.inf and value != -math.inf:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, {meaning}; got {value!r} ({type(value).__name__})")
    # math.isinf does not support the compiler's symbolic numbers.
    if not least <= value < math.inf or value == -math.inf:  # type: ignore[operator]
        at_least = "" if least == -math.inf else f" and at least {least:g}"
        raise ValueError(f"{name} must be finite{at_least}, {meaning}; got {value!r}")
    return float(value)


def check_weight(name: str, value: Any, meaning: str, q: Any, *, per_row: bool) -> float | Tensor:
    """Validate a finite number of at least 0, or a floating-point tensor, [] or, with ``per_row``, [B]."""
    if not isinstance(value, Tensor):
        return check_number(name, value, meaning)
    check_tensor(name, value)
    device = q.device
    if value.dim() and not (per_row and value.shape == (q.batch,)):
        expected = f"[] or [B] = [{q.batch}]" if per_row else "[]"
        raise ValueError(f"{name} has shape {shape_of(value)}; a tensor must be {expected}, {meaning}")
    # torch accepts a CPU scalar tensor on any device.
    if not on_same_device(value.device, device) and (value.dim() or value.device.type != "cpu"):
        raise ValueError(
            f"{name} is on {value.device} but q is on {device}; move it with {name}.to({str(device)!r})"
        )
    # On a GPU reading the values would synchronise.
    known = not torch.compiler.is_compiling() and not functorch_is_active()
    if known and (value.is_cpu or checks_data()):
        wrong = ~((value >= 0) & (value < math.inf)).detach()
        if bool(wrong.any()):
            raise ValueError(
                f"{name} must be finite and at least 0, {meaning}; got {value.detach()[wrong][:5].tolist()}"
            )
    return value


def check_logvar_range(value: Any) -> tuple[float, float]:
    """Validate a pair (lo, hi) with lo < hi; None becomes (-inf, inf), no clamp."""
    if value is None:
        return -math.inf, math.inf
    try:
        lo, hi = (float(v) for v in value)
    except (TypeError, ValueError):
        raise TypeError(f"logvar_range must be a pair of numbers (lo, hi) or None, got {value!r}") from None
    if not lo < hi:
        raise ValueError(f"logvar_range must be (lo, hi) with lo < hi, got ({lo}, {hi})")
    return lo, hi


def check_seed(seed: Any, device: torch.device | None = None) -> Tensor:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.dim() != 0:
        came = f"{seed.dtype} {shape_of(seed)}" if isinstance(seed, Tensor) else repr(seed)
        if isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.dim() == 1:
            raise TypeError(
                f"seed must be an int64 tensor of no dimensions, got {shape_of(seed)}. One with an axis "
                "stands for noise='qmc', which fastvae.random.normal(seed, ...) takes and the fused ops do "
                "not: make z of that, or use noise='philox'"
            )
        raise TypeError(
            "seed must be an int64 tensor of no dimensions, such as fastvae.random.draw_seed(device); got "
            f"{came}"
        )
    if device is not None and seed.device != device:
        raise ValueError(
            f"seed is on {seed.device} but the inputs are on {device}; draw it with "
            f"draw_seed({str(device)!r})"
        )
    return seed


# Row offset by which all rows share the noise of row 0.
SHARED = -1


def check_address(samples: int, rows: int, sample_offset: Any, row_offset: Any) -> tuple[int, int]:
    """Validate the offsets of samples and rows, 32-bit words of the noise's address; return them as ints.

    The row offset may be SHARED.
    """
    sample_offset = as_int("sample_offset", sample_offset, "where the samples start in the noise's address")
    row_offset = as_int("row_offset", row_offset, "where the rows start in the noise's address")
    for what, count, offset in (("sample", samples, sample_offset), ("row", rows, row_offset)):
        if count < 0:
            raise ValueError(f"the number of {what}s must be at least 0, got {count}")
        if what == "row" and offset == SHARED:
            continue
        if offset < 0 or offset + count > 2**32:
            raise ValueError(
                f"{what}_offset must lie in 0 … 2^32 − {count}, got {offset}: the noise address has "
                f"2^32 {what}s, and {count} {what}s are asked for"
            )
    return sample_offset, row_offset


def first_row(row_offset: Any, shared_noise: Any, samples: int, rows: int) -> int:
    """Validate an objective's row_offset and shared_noise, and return the offset of its rows.

    Raises:
        TypeError: if shared_noise is not a bool.
        ValueError: for a negative row_offset, or one next to shared_noise.
    """
    if type(shared_noise) is not bool:
        raise TypeError(f"shared_noise must be True or False, got {shared_noise!r}")
    if type(row_offset) is int and not row_offset:
        return SHARED if shared_noise else 0
    if shared_noise:
        raise ValueError(
            f"row_offset is {row_offset}, but with shared_noise=True all examples have the noise of row 0, "
            "on every process; leave row_offset out"
        )
    row_offset = as_int("row_offset", row_offset, "where the rows start in the noise's address")
    if row_offset == SHARED:
        raise ValueError(f"row_offset must be at least 0, got {row_offset}; did you mean shared_noise=True?")
    return check_address(samples, rows, 0, row_offset)[1]


def later_row(row_offset: int, rows: int) -> int:
    """Return the offset of the row that follows ``rows`` rows."""
    return row_offset if row_offset == SHARED else row_offset + rows
