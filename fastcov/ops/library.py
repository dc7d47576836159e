"""Registration of every operator: schema, fake, dispatch. The only file to use torch.library.

A compiled library (ops/native.py) registers implementations for its dispatch keys when it is
opened, after the schemas are defined here. Dispatch keys without one get Triton on a GPU that can
run it, else plain torch. :func:`fastcov.backends` tells users which is active and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastcov.ops import aten, aten_eigen, native, vmapped
from fastcov.ops.backend import service_of

if TYPE_CHECKING:
    from fastcov.ops.covariance import MomentState, Precision

_LIBRARY = torch.library.Library("fastcov", "DEF")


def _define(schema: str, fake: Callable[..., Any] | None, tags: tuple[torch.Tag, ...] = ()) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tags)
    if fake is not None:
        torch.library.register_fake(f"fastcov::{name}", fake, lib=_LIBRARY)
    # No operator here has a derivative: statistics never enter the loss.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _no_result(*_: Any) -> None:
    return None


def _assign(to: Tensor, value: Tensor) -> None:
    to.copy_(value)


# Rows run over all dimensions but channel_dim, in order: hooks pass activations as they are,
# because a detached and permuted view costs as much host time as the call itself. Arguments that
# hooks leave out come last: every argument that is given takes 0.2 us.
_define(
    "accumulate_(Tensor(a!) moment, Tensor(b!) sum, Tensor(c!) shift, Tensor(d!) weight,"
    " Tensor(e!) count, Tensor rows, int channel_dim=-1, Tensor? row_weight=None,"
    " float row_scale=1, float decay=1) -> ()",
    _no_result,
)
# accumulate_ with a choice of the precision of products. A separate operator, because one
# more argument would cost every hook its conversion, and kernels that are compiled already would no
# longer fit the schema.
_define(
    "accumulate_at_precision_(Tensor(a!) moment, Tensor(b!) sum, Tensor(c!) shift,"
    " Tensor(d!) weight, Tensor(e!) count, Tensor rows, str precision, int channel_dim=-1,"
    " Tensor? row_weight=None, float row_scale=1, float decay=1) -> ()",
    _no_result,
)


def _affine_fake(moment: Tensor, *_: Any) -> Tensor:
    return moment.new_empty((), dtype=torch.bool)


# Adds rows y = matrix x + bias, given the second moments of the rows x. Returns False [], and adds
# nothing, where reading the rows y themselves would be more exact.
_define(
    "accumulate_affine_(Tensor(a!) moment, Tensor(b!) sum, Tensor shift, Tensor(c!) weight,"
    " Tensor(d!) count, Tensor input_moment, Tensor input_sum, Tensor input_shift, int rows,"
    " Tensor matrix, Tensor? bias, float row_scale, float decay) -> Tensor",
    _affine_fake,
)
_define(
    "gather_(Tensor(a!) buffer, Tensor rows, int buffer_row, int first_sample, int samples,"
    " int run_length, int phase, int channel_dim=-1) -> ()",
    _no_result,
)
# Tensor.copy_ of a tensor without a derivative: torch.func.grad and jvp refuse it where the target
# comes from outside of them, as a state does.
_define("assign_(Tensor(a!) to, Tensor value) -> ()", _no_result)
_LIBRARY.impl("assign_", _assign, "CompositeExplicitAutograd")
# All work of a call that has the layout of the last one (stats/cursor.py): counts the call, and
# reads the rows that are due, or every row. Returns -1, with nothing done, where Python decides:
# another layout, a full buffer. Host code, never traced.
_define("gather_again_(Tensor(a!) cursor, Tensor(b!) buffer, Tensor rows) -> int", None)
_define(
    "accumulate_again_(Tensor(a!) cursor, Tensor(b!) moment, Tensor(c!) sum, Tensor(d!) shift,"
    " Tensor(e!) weight, Tensor(f!) count, Tensor rows) -> int",
    None,
)
# Copies the rows that are due, by counters on the device (ops/counted.py). Returns 0, with nothing
# done, where the layout is not the prepared one, or the buffer is full. Host code, never traced.
_define("gather_counted_(Tensor(a!) prepared, Tensor rows) -> int", None)
# Rows on a device that nothing compiled serves, and sparse or nested ones, never have the layout of
# the last call, nor one that a gather was prepared for.
for _name, _refusal in (("gather_again_", -1), ("accumulate_again_", -1), ("gather_counted_", 0)):
    for _key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
        _LIBRARY.impl(_name, lambda *_, _refusal=_refusal: _refusal, _key)


def _eigvalsh_fake(matrices: list[Tensor], is_alone: bool = False) -> list[Tensor]:
    return [matrix.new_empty(matrix.shape[:-1]) for matrix in matrices]


def _eigh_fake(matrices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return _eigvalsh_fake(matrices), [matrix.new_empty(matrix.shape) for matrix in matrices]


def _count_above_fake(matrices: list[Tensor], thresholds: list[Tensor]) -> list[Tensor]:
    return [tau.new_empty((*tau.shape, 2), dtype=torch.int64) for tau in thresholds]


# Each entry is one matrix [n, n] or a batch [B, n, n]; sizes may differ between entries. is_alone
# solves matrices one by one, so that the bits of a result depend on its own matrix alone.
_define("eigvalsh(Tensor[] matrices, bool is_alone=False) -> Tensor[]", _eigvalsh_fake)
_define("eigh(Tensor[] matrices) -> (Tensor[], Tensor[])", _eigh_fake)
# Takes float64 alone: in float32 the bounds on the error of a count would be too wide to be of use.
_define("count_above(Tensor[] matrices, Tensor[] thresholds) -> Tensor[]", _count_above_fake)


def _vmapped(entry: Tensor, dim: int | None, size: int) -> Tensor:
    # Entry with the vmapped dimension in front: [size, ...].
    return entry.expand(size, *entry.shape) if dim is None else entry.movedim(dim, 0)


def _eigen_vmap(operator: str) -> Callable[..., Any]:
    # Merges the vmapped dimension with the batch's for the call, and splits both in the results.
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        lists = [
            [_vmapped(e, d, info.batch_size) for e, d in zip(entries, dims, strict=True)]
            for entries, dims in zip(arguments, in_dims, strict=False)
            if isinstance(entries, list)
        ]
        flat = [
            [
                entry.flatten(0, matrix.dim() - 3)
                for entry, matrix in zip(some, lists[0], strict=True)
            ]
            for some in lists
        ]
        results = getattr(torch.ops.fastcov, operator)(*flat, *arguments[len(lists) :])

        def restored(some: list[Tensor]) -> list[Tensor]:
            return [
                result.reshape(*matrix.shape[:-2], *result.shape[1:])
                for result, matrix in zip(some, lists[0], strict=True)
            ]

        if isinstance(results, tuple):
            return tuple(restored(some) for some in results), tuple([0] * len(r) for r in results)
        return restored(results), [0] * len(results)

    return rule


for _name in ("eigvalsh", "eigh", "count_above"):
    torch.library.register_vmap(f"fastcov::{_name}", _eigen_vmap(_name), lib=_LIBRARY)


class Observer(Protocol):
    """Receiver of the step operators' calls: a watcher, found by its number."""

    def begin_step(self) -> None:
        """Start of a step."""

    def take_mask(self, mask: object) -> None:
        """Mask of the step that has begun."""

    def observe(self, tap: int, activation: Tensor, batch_dims: int = 0) -> None:
        """Reading of one activation, which has ``batch_dims`` vmapped dimensions in front."""

    def observe_named(self, name: str, tensor: Tensor, channel_dim: int) -> None:
        """Reading of a tensor that the user's forward names, in compiled code."""

    def observe_gradient(self, tap: int, gradient: Tensor) -> None:
        """Reading of the gradient of one activation."""

    def refuse(self, tap: int, reason: str) -> None:
        """Note why an activation is not read."""

    def end_step(self) -> None:
        """End of a step."""


# Hooks of a compiled model reach their watcher through these operators. They are opaque, so that
# sampling stays plain host code, and all claim to change the clock, so that they keep their order.
# Watcher and tap are numbers held in tensors: ints would be guarded by value, and blocks that share
# one compiled graph would be compiled one by one. Replays of a CUDA graph run no host code, so the
# tag has torch cut graphs around these operators.
_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)
_define("begin_step_(Tensor(a!) clock) -> ()", _no_result, _ON_THE_HOST)
_define("take_mask_(Tensor(a!) clock, Tensor mask) -> ()", _no_result, _ON_THE_HOST)
_define(
    "observe_(Tensor(a!) clock, Tensor tap, Tensor activation, int batch_dims=0) -> ()",
    _no_result,
    _ON_THE_HOST,
)
_define(
    "observe_named_(Tensor(a!) clock, str name, Tensor tensor, int channel_dim) -> ()",
    _no_result,
    _ON_THE_HOST,
)
_define(
    "observe_gradient_(Tensor(a!) clock, Tensor tap, Tensor gradient) -> ()",
    _no_result,
    _ON_THE_HOST,
)
_define("refuse_(Tensor(a!) clock, Tensor tap, str reason) -> ()", _no_result, _ON_THE_HOST)
_define("end_step_(Tensor(a!) clock) -> ()", _no_result, _ON_THE_HOST)

observers: WeakValueDictionary[int, Observer] = WeakValueDictionary()
"""Open watchers by the number that their clock holds. Calls for a closed one do nothing."""


def _passed_on(method: str, has_tap: bool) -> Callable[..., None]:
    def call(clock: Tensor, *arguments: Any) -> None:
        if (target := observers.get(int(clock))) is not None:
            if has_tap:
                arguments = (int(arguments[0]), *arguments[1:])
            getattr(target, method)(*arguments)

    return call


for _method, _has_tap in (
    ("begin_step", False),
    ("take_mask", False),
    ("observe", True),
    ("observe_named", False),
    ("observe_gradient", True),
    ("refuse", True),
    ("end_step", False),
):
    _implementation = _passed_on(_method, _has_tap)
    _LIBRARY.impl(f"{_method}_", _implementation, "CompositeExplicitAutograd")


def _observe_vmapped(
    info: Any,
    in_dims: tuple[int | None, ...],
    clock: Tensor,
    tap: Tensor,
    activation: Tensor,
    batch_dims: int = 0,
) -> tuple[None, None]:
    # Clock and tap are never batched, so the activation is: else torch would not call the rule.
    moved = activation.movedim(in_dims[2] or 0, 0)
    torch.ops.fastcov.observe_(clock, tap, moved, batch_dims + 1)
    return None, None


torch.library.register_vmap("fastcov::observe_", _observe_vmapped, lib=_LIBRARY)
for _name, _rule in vmapped.RULES.items():
    torch.library.register_vmap(f"fastcov::{_name}", _rule, lib=_LIBRARY)


def _is_triton(rows: Tensor) -> bool:
    return service_of(rows.dtype, rows.device).kernels == "triton"


def _accumulate_cuda(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    channel_dim: int = -1,
    row_weight: Tensor | None = None,
    row_scale: float = 1.0,
    decay: float = 1.0,
    *,
    precision: Precision = "split",
) -> None:
    state = (moment, sum, shift, weight, count)
    if precision == "float64":
        aten.accumulate_in_float64_(
            accumulate_, *state, rows, channel_dim, row_weight, row_scale, decay
        )
    elif _is_triton(rows):
        from fastcov import kernels

        launch_ = kernels.launch_accumulate_
        launch_(
            *state,
            rows,
            row_weight,
            row_scale,
            decay,
            channel_dim=channel_dim,
            precision=precision,
        )
    else:
        aten.accumulate_(*state, rows, channel_dim, row_weight, row_scale, decay)


def accumulation_of(
    state: MomentState, rows: Tensor, channel_dim: int = -1
) -> Callable[[Tensor], None] | None:
    """Function that adds rows on a GPU without torch's dispatcher, which takes 4 us of every hook.

    Valid while the state's tensors stay the same, for rows of the given one's device and dtype; to
    be called outside of all modes and transforms. None where Triton does not serve, and the
    operator ``accumulate_`` must be called.
    """
    if not _is_triton(rows):
        return None
    from fastcov import kernels

    to = (state.moment, state.sum, state.shift, state.weight, state.count)
    return kernels.Accumulation(*to, channel_dim).add


def _accumulate_at_precision_cuda(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    precision: Precision,
    *options: Any,
) -> None:
    state = (moment, sum, shift, weight, count)
    _accumulate_cuda(*state, rows, *options, precision=precision)


def _accumulate_at_precision_cpu(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    precision: Precision,
    *options: Any,
) -> None:
    # The CPU ignores the precisions of float32: its products always have as much.
    state = (moment, sum, shift, weight, count)
    if precision == "float64":
        aten.accumulate_in_float64_(accumulate_, *state, rows, *options)
    else:
        accumulate_(*state, rows, *options)


def _gather_cuda(
    buffer: Tensor,
    rows: Tensor,
    buffer_row: int,
    first_sample: int,
    samples: int,
    run_length: int,
    phase: int,
    channel_dim: int = -1,
) -> None:
    rows = aten.channels_to_end(rows, channel_dim)
    if _is_triton(rows):
        from fastcov import kernels

        gather_ = kernels.launch_gather_
        gather_(buffer, rows, buffer_row, first_sample, samples, run_length, phase)
    else:
        aten.gather_(buffer, rows, buffer_row, first_sample, samples, run_length, phase)


_FALLBACKS: dict[tuple[str, str], Callable[..., Any]] = {
    ("accumulate_", "CPU"): aten.accumulate_,
    ("gather_", "CPU"): aten.gather_,
    ("accumulate_", "CUDA"): _accumulate_cuda,
    ("accumulate_at_precision_", "CPU"): _accumulate_at_precision_cpu,
    ("accumulate_at_precision_", "CUDA"): _accumulate_at_precision_cuda,
    ("accumulate_affine_", "CPU"): aten.accumulate_affine_,
    ("gather_", "CUDA"): _gather_cuda,
    **{
        (operator.__name__, key): operator
        for operator in (aten_eigen.eigvalsh, aten_eigen.eigh, aten_eigen.count_above)
        for key in ("CPU", "CUDA")
    },
}


def has_kernel(name: str, key: str) -> bool:
    """True if an operator has an implementation of its own for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcov::{name}", key)


native.load()
for (_name, _key), _implementation in _FALLBACKS.items():
    if not has_kernel(_name, _key):
        _LIBRARY.impl(_name, _implementation, _key)

operators = torch.ops.fastcov
"""Registered operators. Public functions take them from here: importing registers them."""

# Functions that hooks and ops/eigen.py call. `operators.NAME` would look for the overload in every
# call, 0.2 to 1.8 us, and the overload's __call__ only passes its arguments on to `_op`, 0.3 us.
accumulate_: Callable[..., None] = operators.accumulate_.default._op
accumulate_at_precision_: Callable[..., None] = operators.accumulate_at_precision_.default._op
accumulate_affine_: Callable[..., Tensor] = operators.accumulate_affine_.default._op
gather_: Callable[..., None] = operators.gather_.default._op
gather_again_: Callable[..., int] = operators.gather_again_.default._op
gather_counted_: Callable[..., int] = operators.gather_counted_.default._op
accumulate_again_: Callable[..., int] = operators.accumulate_again_.default._op
eigvalsh: Callable[..., list[Tensor]] = operators.eigvalsh.default._op
eigh: Callable[..., tuple[list[Tensor], list[Tensor]]] = operators.eigh.default._op
count_above: Callable[..., list[Tensor]] = operators.count_above.default._op

ACCUMULATE: dict[str, Callable[..., None]] = {
    "native": accumulate_,
    "torch": accumulate_,
    "triton": _accumulate_cuda,
}
"""Function that adds rows, by :attr:`Service.kernels`; Triton's launch needs no dispatcher."""

GATHER: dict[str, Callable[..., None]] = {
    "native": gather_,
    "torch": gather_,
    "triton": _gather_cuda,
}
"""Function that copies sampled rows, by :attr:`Service.kernels`."""
