# mypy: disable-error-code="no-untyped-call,assignment,override,attr-defined,arg-type"
"""A pretended GPU: the values are real, and the device refuses what CUDA and NCCL refuse.

A tensor on it wraps a tensor of the processor. To torch it is on an accelerator of its own
(PrivateUse1), so autograd, autocast and `device.type` behave as on a GPU, and every operator passes
`Rehearsal.run`. It raises `RefusedError` where CUDA would raise. It counts, by the line of the
package that caused them, waits (the processor waits for the device, or copies to it without
`non_blocking`) and launches (operators that run a kernel).

What it cannot show: missing kernels, memory, timing, NCCL itself, DDP's reducer.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

PRIVATE_NAMES = (
    (backend_registration, "_setup_privateuseone_for_python_backend"),
    (backend_registration, "_DummyBackendModule"),
    (torch._C, "_set_only_lift_cpu_tensors"),
)
if missing := [name for owner, name in PRIVATE_NAMES if not hasattr(owner, name)]:
    pytest.skip(f"this torch has no {', '.join(missing)}", allow_module_level=True)

NAME = "pretend"
COPIES = {"_to_copy", "copy_"}
# The host needs a value of the device, or the size of a result depends on one.
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "bincount"}
# A CPU scalar tensor may take part in arithmetic with tensors of the GPU, but not in these.
NO_SCALARS = {"cat", "stack", "mm", "addmm", "bmm", "baddbmm", "gather", "index_select"}
NO_SCALARS |= {"index_copy", "index_copy_", "embedding", "scatter_add_"}
INDEXING = {"index", "index_put_", "_index_put_impl_"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
NO_KERNEL |= {"detach", "detach_", "lift_fresh", "alias", "resize_", "_local_scalar_dense"}
# What autocast computes in bfloat16 and in float32 on CUDA, as far as this package uses it.
IN_LOW = ("conv2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
IN_FULL = ("exp", "log", "softmax.int", "log_softmax.int", "nll_loss", "sum", "cumsum")
IN_FULL += ("sum.dim_IntList", "logsumexp", "linalg_vector_norm", "pow.Tensor_Scalar")

_libraries: list[Any] = []  # a library ends its registrations when it is collected


class RefusedError(RuntimeError):
    """CUDA or NCCL would have raised here."""


class _Module(backend_registration._DummyBackendModule):
    """`torch.pretend`, as far as torch and Lightning ask it."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed = manual_seed_all = synchronize = set_device = staticmethod(lambda *_: None)
    set_rng_state = staticmethod(lambda *_: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_rng_state = staticmethod(lambda *_: torch.zeros(8, dtype=torch.uint8))


class OnDevice(Tensor):
    """A tensor of the pretended GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Rehearsal.now.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise RefusedError(f"numpy() of a tensor of the GPU at {place()}; use .cpu() first")
        return self.detach().cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.inference_mode(False):
                made: Tensor = OnDevice(self.held.detach().clone())
                if isinstance(self, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else object.__format__(self, spec)


class Rehearsal(TorchDispatchMode):
    """Run operators, refuse mixed devices, count waits and launches.

    Attributes:
        waits: (what, place) to the number of times.
        launches: place to the number of kernels.
    """

    now: Rehearsal

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator, on the device if an argument is there or the result is wanted there."""
        if _is_composite(func):
            with self:  # in inference mode autograd has not taken it apart
                return func.decompose(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        ours, wanted = [x for x in flat if isinstance(x, OnDevice)], kwargs.get("device")
        there = wanted is not None and torch.device(wanted).type == NAME
        if func.namespace != "aten" or not (ours or there):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if any(isinstance(x, torch.Generator) for x in flat):
            raise RefusedError(f"{func}: a CPU generator for a tensor of the GPU at {place()}")
        if name not in COPIES:
            self._check_devices(func, name, args, flat)
        stays = _stays(name, args, wanted, there)
        self._count(func, name, args, kwargs, stays)
        plain = [_on_processor(x) for x in flat]
        arguments, settings = tree_unflatten(plain, spec)
        for setting in ("pin_memory", "non_blocking"):
            settings.pop(setting, None)
        result = func(*arguments, **settings)
        same = {id(x.held): x for x in ours}

        def back(value: Any) -> Any:
            found = same.get(id(value)) if isinstance(value, Tensor) else None
            if found is not None:
                return found
            if isinstance(value, Tensor) and not isinstance(value, OnDevice) and stays:
                return OnDevice(value)
            return value

        return tree_map(back, result)

    def _check_devices(self, func: Any, name: str, args: Any, flat: list[Any]) -> None:
        cpu = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
        if not cpu:
            return
        if name in INDEXING and isinstance(args[0], OnDevice):  # legal: CUDA copies such an index
            self.waits["copy of an index", place()] += 1
            return
        changes_cpu = name.endswith("_") and not isinstance(args[0], OnDevice)
        scalars = all(x.ndim == 0 for x in cpu)
        if not scalars or changes_cpu or name in NO_SCALARS | INDEXING:
            shapes = [tuple(x.shape) for x in cpu]
            where = f"on the processor, others on the GPU, at {place()}"
            raise RefusedError(f"{func}: {shapes} are {where}")

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, stays: bool) -> None:
        mask = name == "index" and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]
        )
        blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        source = args[1] if name == "copy_" else args[0] if args else None
        crosses = name in COPIES and isinstance(source, OnDevice) != stays
        if name in WAITS or mask:
            self.waits[name, place()] += 1
        elif crosses and blocks:
            self.waits["to the GPU" if stays else "from the GPU", place()] += 1
        if not func.is_view and name not in NO_KERNEL:
            self.launches[place()] += 1


def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others."""
    key = "CompositeImplicitAutograd"
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return func.namespace == "aten" and found


def _stays(name: str, args: Any, wanted: Any, there: bool) -> bool:
    """Whether the result is on the device."""
    if name == "copy_":
        return isinstance(args[0], OnDevice)
    if wanted is not None:
        return there
    if name == "_to_copy" or name.startswith("new_") or name.endswith("_like"):
        return isinstance(args[0], OnDevice)
    return True


def _on_processor(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def place() -> str:
    """Return file and line of the package that is running, else of Lightning or torchmetrics."""
    for package in ("/spice_pl/", "/pytorch_lightning/", "/torchmetrics/", "/torch/optim/"):
        frame: Any = sys._getframe(1)
        while frame is not None and not _is_in(frame.f_code.co_filename, package):
            frame = frame.f_back
        if frame is not None:
            before = "" if package == "/spice_pl/" else package[1:]
            return f"{before}{frame.f_code.co_filename.partition(package)[2]}:{frame.f_lineno}"
    return "elsewhere"


def _is_in(file: str, package: str) -> bool:
    """Whether a file is of a package; `job` calls everything and is never what causes a wait."""
    return package in file and "/spice_pl/job/" not in file


def register() -> torch.device:
    """Make the device known to torch, once per process."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
        operators = torch.library.Library("aten", "IMPL")
        others = torch.library.Library("_", "IMPL")
        others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _libraries.extend((operators, others))
        for names, low in ((IN_LOW, True), (IN_FULL, False)):
            for each in names:
                packet, _, overload = each.partition(".")
                operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
                operators.impl(each, _cast(operator, low), "AutocastPrivateUse1")
    return torch.device(NAME, 0)


def _cast(operator: Any, low: bool) -> Callable[..., Any]:
    """Return an operator that casts its arguments as autocast does."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    dtype = torch.bfloat16 if low else torch.float32

    def run(*args: Any, **kwargs: Any) -> Any:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, OnDevice) and x.is_floating_point() else x

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*tree_map(cast, args), **kwargs)

    return run


@contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """Run what is inside with a pretended GPU at hand."""
    Rehearsal.now = Rehearsal()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # torch.tensor(..., device=) then moves by an operator, which is counted.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Rehearsal.now:
            yield Rehearsal.now
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)


# Before the first backward of the process: autograd starts one thread per device then, none later.
DEVICE = register()
