"""Names of torch that are not public, collected here because any release of torch may change them."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import _C, nn
from torch import distributions as td
from torch._functorch.utils import enable_single_level_autograd_function as single_level_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes

__all__ = [
    "AnyBatchNorm",
    "BelowAutograd",
    "SingleLevelFunction",
    "any_requires_grad",
    "break_graph",
    "changes_what_it_reads",
    "dirichlet_grad",
    "dispatch_mode_depth",
    "forward_ad_is_active",
    "from_handles",
    "functorch_is_active",
    "gradient_dtypes",
    "handle_of",
    "has_hooks",
    "is_functorch_wrapped",
    "is_legacy_batched",
    "is_torchs",
    "is_traced_on_gpu",
    "kl_applies",
    "named_in_trace",
    "runs_torchs_call",
    "sample_dirichlet",
    "single_level_autograd",
    "standard_gamma",
    "standard_gamma_grad",
    "torch_function_depth",
    "tracing_state",
    "without_dispatch_modes",
]

BelowAutograd = _C._AutoDispatchBelowAutograd
any_requires_grad = _C._any_requires_grad
dispatch_mode_depth = _C._len_torch_dispatch_stack
functorch_is_active = _C._are_functorch_transforms_active
is_functorch_wrapped = _C._functorch.is_functorch_wrapped_tensor
# Of torch.autograd.grad(is_grads_batched=True), whose vmap is older than functorch.
is_legacy_batched = _C._functorch.is_legacy_batchedtensor
torch_function_depth = _C._len_torch_function_stack
tracing_state = _C._get_tracing_state
_data_of: Any = _C._autograd._get_data_attr  # type: ignore[attr-defined]
# Tensors as addresses, for kernels that C++ registers without linking libtorch. The variant for one tensor
# leaks (torch 2.13).
from_handles = _C._aoti.alloc_tensors_by_stealing_from_void_ptrs
handle_of = _C._aoti.unsafe_alloc_void_ptr_from_tensor
# Torch's own samplers and their implicit gradients.
standard_gamma = torch._standard_gamma
standard_gamma_grad = torch._standard_gamma_grad
sample_dirichlet = torch._sample_dirichlet
dirichlet_grad = torch._dirichlet_grad

_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "forward")


def forward_ad_is_active() -> bool:
    """Return True inside ``torch.autograd.forward_ad.dual_level``."""
    return bool(forward_ad._current_level >= 0)


def is_traced_on_gpu(tensor: torch.Tensor) -> bool:
    """Return True for a GPU's tensor in Inductor's trace of the operations below autograd and transforms."""
    if not tensor.is_cuda or _C._get_dispatch_mode(_C._TorchDispatchModeKey.FUNCTIONAL) is None:
        return False
    if functorch_is_active():
        return False
    virtualized: Any = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and isinstance(virtualized.V.fake_mode, FakeTensorMode)


def named_in_trace(op: Any) -> contextlib.AbstractContextManager[Any]:
    """Name the operations that Inductor's trace records after ``op``, in kernels' names and in profiles.

    Names of all operations would be too long for Inductor's fast launcher.
    """
    tracing: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    named = getattr(tracing, "set_original_aten_op", None)
    return contextlib.nullcontext() if named is None else named(op)


def gradient_dtypes(outputs: list[torch.Tensor], begin: torch.Tensor) -> set[torch.dtype]:
    """Return the dtypes of all gradients on the way from ``outputs`` back to ``begin`` and to leaves."""
    found: set[torch.dtype] = set()
    done = {begin.grad_fn}
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None and t.grad_fn not in done]
    done.update(todo)
    while todo:
        node = todo.pop()
        assert node is not None
        found.update(m.dtype for m in getattr(node, "_input_metadata", ()))
        parents = {p for p, _ in node.next_functions if p is not None} - done
        done |= parents
        todo.extend(parents)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Return True if a call of the module, or of any module, runs hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


def runs_torchs_call(module: nn.Module) -> bool:
    """Return True if a call of the module object itself is neither compiled nor replaced."""
    return module._compiled_call_impl is None and not any([name in module.__dict__ for name in _CALLED])


def is_torchs(kind: type[nn.Module]) -> bool:
    """Return True if none of the functions that a call of the class runs has been replaced."""
    forward = vars(sys.modules[kind.__module__])
    others = vars(torch.nn.modules.module)
    return functional.linear is _C._nn.linear and all(
        [
            getattr(getattr(kind, name), "__globals__", None) is (forward if name == "forward" else others)
            for name in _CALLED
        ]
    )


def kl_applies(d: td.Distribution, side: int) -> bool:
    """Return True if torch's KL of the family of d, the first (0) or second (1) argument, is that of d.

    It is not where a subclass replaces the density or the draws, unless a KL is registered for itself.
    """
    kind = type(d)
    modules = [getattr(getattr(kind, name), "__module__", "") for name in ("log_prob", "rsample")]
    own = any(not name.startswith(("torch.distributions.", "fastvae.")) for name in modules)
    if own and all(pair[side] is not kind for pair in td.kl._KL_REGISTRY):
        return False
    base = getattr(d, "base_dist", None)
    return not isinstance(base, td.Distribution) or kl_applies(base, side)


def break_graph(reason: str) -> None:
    """Break the graph that Dynamo traces, or raise with ``fullgraph=True``."""
    torch._dynamo.graph_break(msg=reason)


def changes_what_it_reads() -> bool:
    """Return True if the function that Dynamo traces for checkpoint changes an input that it also reads.

    Also where this version of Dynamo does not tell.
    """
    translator: Any = sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator
    tracer = translator.current_tx().output.current_tracer
    inputs = [n for n in tracer.graph.nodes if n.op == "placeholder" and _version(n) is not None]
    versions = getattr(tracer, "_input_versions_at_beginning", ())
    if len(versions) != len(inputs):
        return True
    changed = [node for node, version in zip(inputs, versions, strict=True) if _version(node) != version]
    return any(not _only_changes(node, user) for node in changed for user in node.users) or any(
        node.target is _data_of and _version(node) for node in tracer.graph.nodes
    )


def _version(node: Any) -> int | None:
    """Return the in-place version of a tensor in Dynamo's graph."""
    value = node.meta.get("example_value")
    return value._version if isinstance(value, torch.Tensor) else None


def _only_changes(node: Any, user: Any) -> bool:
    """Return True if an operation changes the tensor in place and does nothing else, as counters do."""
    in_place = user.op == "call_method" and user.target.endswith("_")
    return in_place and not user.users and user.args[0] is node


# Set here because torch.compiler.assume_constant_result would import the whole compiler.
for _marked in (is_torchs, changes_what_it_reads):
    _marked.__dict__["_dynamo_marked_constant"] = True
