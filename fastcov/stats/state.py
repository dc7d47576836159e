"""CovarianceState: running second moment of one layer, in tensors with a declaration each.

Sums over rows may be added only if they are about the same shift, so merging first translates both
states to a common shift (Chan, Golub, LeVeque 1983: parallel updating of variances).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor

from fastcov import ops
from fastcov.arguments import whole_number
from fastcov.ops import triangle
from fastcov.ops.covariance import Precision, accumulate_, are_read, check_rows, covariance_of
from fastcov.ops.library import operators
from fastcov.rows.mask import spread
from fastcov.spectra.sketched import squared_norm
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.directions import Directions, directions_of, inverse_of, whitening_of
from fastcov.stats.sketch import Sketch


class Declared(NamedTuple):
    """Declaration of one tensor of a state: shape, dtype, and the rules to merge and scale it.

    Attributes:
        shape: Sizes; "C" stands for the number of channels, "triangle" for the tiles of a
            symmetric matrix: see :mod:`fastcov.ops.triangle`.
        dtype: Dtype of the values.
        reduction: Rule that makes one tensor of two states about one shift: "sum", or "common",
            where both hold the same values.
        power: A factor f on every row's weight is a factor f**power on this tensor; a tuple gives
            one power for each entry.
    """

    shape: tuple[int | Literal["C"], ...] | Literal["triangle"]
    dtype: torch.dtype = torch.float64
    reduction: Literal["sum", "common"] = "sum"
    power: int | tuple[int, ...] = 1

    def zeros(self, channels: int, device: torch.device | str | None) -> Tensor:
        """Tensor of a state that has read no row."""
        if self.shape == "triangle":
            return triangle.zeros(channels, device)
        sizes = [channels if size == "C" else size for size in self.shape]
        return torch.zeros(sizes, dtype=self.dtype, device=device)

    def scaled(self, tensor: Tensor, factor: float) -> Tensor:
        """Tensor for rows whose weights are multiplied; the same object where nothing changes."""
        if isinstance(self.power, tuple):
            entries = zip(tensor.unbind(), self.power, strict=True)
            return torch.stack([entry * factor**power for entry, power in entries])
        return tensor * factor**self.power if self.power else tensor

    def scale_(self, tensor: Tensor, factor: float) -> None:
        """In-place form of :meth:`scaled`."""
        if isinstance(self.power, tuple):
            for entry, power in zip(tensor.unbind(), self.power, strict=True):
                entry.mul_(factor**power)
        elif self.power:
            tensor.mul_(factor**self.power)


class StateTensors(
    NamedTuple(
        "StateTensors",
        [
            ("moment", Annotated[Tensor, Declared("triangle")]),
            ("sum", Annotated[Tensor, Declared(("C",))]),
            ("shift", Annotated[Tensor, Declared(("C",), reduction="common", power=0)]),
            ("weight", Annotated[Tensor, Declared(())]),
            ("count", Annotated[Tensor, Declared((2,), torch.int64, power=0)]),
            ("excess", Annotated[Tensor, Declared((2,), power=(2, 0))]),
        ],
    )
):
    """Tensors of a running second moment; operators take the first five in this order.

    The properties of :class:`CovarianceState` describe them.
    """

    __slots__ = ()


DECLARED: dict[str, Declared] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(StateTensors, include_extras=True).items()
}
"""Declarations of a state's tensors by name, in the order of :class:`StateTensors`."""


class SpectralParts(NamedTuple):
    """Numbers of a state from which its spectrum is made.

    Attributes:
        matrix: Covariance, or that of the sketched rows. [n, n]
        total: Trace of the covariance. []
        squares: Estimate of the covariance's squared Frobenius norm from a sketch; else 0. []
    """

    matrix: Tensor
    total: Tensor
    squares: Tensor


class CovarianceState:
    """Running second moment of feature rows about a fixed shift.

    Args:
        channels: Length of a row, C.
        device: Device of the tensors.
        sketch: Width r of a random projection of the rows, for rows that are too wide for a [C, C]
            matrix: the state then takes about 4 r^2 bytes, and has a :meth:`spectrum` alone, whose
            trace is exact (docs/memory.md). None keeps all channels.

    Raises:
        ValueError: If ``channels`` is no whole number of at least 1, or ``sketch`` none from 2 to
            C - 1.

    Attributes:
        sketch: Projection of the rows; None where all channels are kept. The tensors are then those
            of the projected rows, and have r + 1 channels.
        tensors: Tensors of the state; each field is an attribute of the state too.

    Example:
        >>> state = CovarianceState(2)
        >>> state.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> state.mean()
        tensor([2., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        *,
        sketch: int | None = None,
    ) -> None:
        length = whole_number(channels)
        if length is None or length < 1:
            raise ValueError(
                f"channels={channels!r}: expected the length of a row, a whole number of at least 1"
            )
        self.sketch = None if sketch is None else Sketch(length, sketch)
        order = length if self.sketch is None else self.sketch.width + 1
        # Tensors made under inference_mode could not be updated in training later.
        with torch.inference_mode(False):
            self.tensors = StateTensors._make(
                declared.zeros(order, device) for declared in DECLARED.values()
            )
        self._lock = threading.RLock()

    @property
    def moment(self) -> Tensor:
        """Weighted second moment of the shifted rows, float64: its lower triangle, in tiles.

        :func:`fastcov.ops.triangle.unpack` makes a matrix of it. [tiles, 32, 32]
        """
        return self.tensors.moment

    @property
    def sum(self) -> Tensor:
        """Weighted sum of the shifted rows, float64. [C]"""
        return self.tensors.sum

    @property
    def shift(self) -> Tensor:
        """Vector subtracted from every row, fixed by the first finite rows, float64. [C]"""
        return self.tensors.shift

    @property
    def weight(self) -> Tensor:
        """Sum of the rows' weights, float64: the divisor. []"""
        return self.tensors.weight

    @property
    def count(self) -> Tensor:
        """Rows read and rows skipped as non-finite, int64. [2]"""
        return self.tensors.count

    @property
    def excess(self) -> Tensor:
        """Sum of squared weights, and number, of the rows not simply added with weight 1, float64.

        Rows of weight 1 do not change ``excess``, so that they cost nothing more. [2]
        """
        return self.tensors.excess

    @property
    def channels(self) -> int:
        """Length of a row."""
        return len(self.tensors.sum) if self.sketch is None else self.sketch.channels

    @property
    def sketch_width(self) -> int | None:
        """Channels that a row is projected to; None where all are kept."""
        return None if self.sketch is None else self.sketch.width

    @property
    def squared_weight(self) -> Tensor:
        """Sum of the rows' squared weights; decay d multiplies it by d^2. []"""
        with self._locked():
            squares, rows = self.excess.unbind()
            return squares + (self.count[0] - rows)

    @property
    def effective_count(self) -> Tensor:
        r"""Kish's effective number of rows; the number of rows where all weigh the same.

        .. math:: \Bigl(\sum_r w_r\Bigr)^2 / \sum_r w_r^2

        float64, at most the number of rows; NaN where no row was read. Valid for weights from
        1e-150 to 1e150. []
        """
        # The quotient comes before the product: a square of large weights could overflow.
        with self._locked():
            return torch.minimum(self.weight * (self.weight / self.squared_weight), self.count[0])

    def covariance(self, centered: bool = False, correction: float = 0) -> Tensor:
        r"""Second-moment matrix of the rows read; the covariance if ``centered``.

        Args:
            centered: True subtracts the mean.
            correction: Number c of degrees of freedom to take off the divisor: the matrix is
                multiplied by n / (n - c), n the effective number of rows. 1 gives the unbiased
                covariance, as :func:`torch.cov` does with ``aweights``.

        Returns:
            float64, symmetric; NaN where no more than ``correction`` rows were read. [C, C]

        Raises:
            ValueError: If ``correction`` is negative or not finite, or the state is sketched.
        """
        self._refuse_sketch("covariance")
        with self._locked():
            matrix = covariance_of(self, centered)
            return matrix if correction == 0 else matrix * self._correcting(correction)

    def _correcting(self, correction: float) -> Tensor:
        """Factor on a covariance whose divisor is the weight."""
        if not (math.isfinite(correction) and correction >= 0):
            raise ValueError(f"correction={correction}: expected a finite number of at least 0")
        left = 1 - correction / self.effective_count
        return 1 / torch.where(left > 0, left, torch.nan)

    def _refuse_sketch(self, wanted: str) -> None:
        if self.sketch is not None:
            raise ValueError(
                f"the state is sketched, {self.channels} channels to {self.sketch.width}: it has a "
                f"spectrum, but no {wanted}; keep all channels (more memory) for that"
            )

    def spectral_parts(self, centered: bool = False) -> SpectralParts:
        """Matrix whose eigenvalues give the spectrum, trace and squares, without waiting."""
        with self._locked():
            matrix = covariance_of(self, centered)
        if self.sketch is None:
            return SpectralParts(matrix, matrix.trace(), matrix.new_zeros(()))
        width = self.sketch.width
        sketch = matrix[:width, :width]
        # The rows' norms tell nothing of the mean: a centred trace is the sketch's own estimate.
        total = sketch.trace() if centered else matrix[width, width]
        return SpectralParts(sketch, total, squared_norm(sketch))

    def spectrum(self, centered: bool = False, correction: float = 0) -> Spectrum:
        """Eigenvalues of :meth:`covariance`, whose arguments these are.

        Raises:
            ValueError: If no more than ``correction`` rows were read.

        Example:
            >>> state = CovarianceState(2)
            >>> state.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
            >>> state.spectrum().eigenvalues
            tensor([4.5000, 0.5000], dtype=torch.float64)
        """
        with self._locked():
            self._refuse_few_rows(correction)
            parts = self.spectral_parts(centered)
            factor = 1.0 if correction == 0 else float(self._correcting(correction))
            count = min(int(self.count[0]), round(float(self.effective_count)))
        return Spectrum.of(
            ops.eigvalsh(parts.matrix) * factor,
            count=count,
            total=float(parts.total) * factor,
            squares=float(parts.squares) * factor**2,
            channels=self.channels,
        )

    def directions(
        self, k: int | None = None, centered: bool = False, correction: float = 0
    ) -> Directions:
        """Eigenvalues and eigenvectors of :meth:`covariance`, the largest first.

        Args:
            k: Number of directions; None for all.
            centered: See :meth:`covariance`: True for principal components.
            correction: See :meth:`covariance`.

        Returns:
            ``eigenvalues`` [k] and ``vectors`` [C, k], float64 on the state's device.

        Raises:
            ValueError: If ``k`` is out of range, or no more than ``correction`` rows were read.
        """
        return directions_of(self._known_covariance(centered, correction), k)

    def whitening(self, eps: float = 0.0, centered: bool = True) -> Tensor:
        """Symmetric matrix that makes the rows' covariance the identity (ZCA).

        White rows are ``(x - state.mean()) @ state.whitening()``.

        Args:
            eps: Added to every eigenvalue before the inverse root.
            centered: False whitens the uncentred second moment: white rows are then ``x @ W``.

        Returns:
            float64. [C, C]

        Raises:
            ValueError: If no row was read, or the covariance is singular and ``eps`` too small.
        """
        return whitening_of(self._known_covariance(centered), eps)

    def inverse(self, damping: float = 0.0, centered: bool = False) -> Tensor:
        """Inverse of :meth:`covariance` with a number added to its diagonal.

        Args:
            damping: The number; a share of the mean diagonal entry is usual.
            centered: See :meth:`covariance`.

        Returns:
            float64, symmetric. [C, C]

        Raises:
            ValueError: If no row was read, or the covariance is singular and ``damping`` too small.
        """
        return inverse_of(self._known_covariance(centered), damping)

    def _known_covariance(self, centered: bool, correction: float = 0) -> Tensor:
        matrix = self.covariance(centered, correction)
        self._refuse_few_rows(correction)
        return matrix

    def _refuse_few_rows(self, correction: float) -> None:
        if not float(self.effective_count) > correction:  # NaN without a row
            raise ValueError(
                f"the state has read {int(self.count[0])} rows, worth "
                f"{float(self.effective_count):g}: more than correction={correction} are needed"
            )

    def mean(self) -> Tensor:
        """Mean of the rows read, float64; a ValueError refuses a sketched state. [C]"""
        self._refuse_sketch("mean")
        with self._locked():
            return self.sum / self.weight + self.shift

    def _locked(self) -> AbstractContextManager[object]:
        # Without the lock a reader could see a row's moment before its weight. torch.compile traces
        # no lock.
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def update(
        self,
        rows: Tensor,
        row_weight: Tensor | None = None,
        *,
        row_scale: float = 1.0,
        decay: float = 1.0,
        precision: Precision = "split",
    ) -> None:
        """Update with rows, as by :func:`fastcov.ops.accumulate_`; threads may call it at once.

        Threads may also read, save, load and merge the state meanwhile.

        Args:
            rows: Rows, last dimension channels. [..., C]
            row_weight: One weight a row, bool or floating point; or one for each index of the
                rows' leading sizes, such as a mask [B, T] of rows [B, T, C] or [B, T, H, C]. [N]
                or [B, ...]
            row_scale: Factor on every row's weight, above 0.
            decay: Factor on the sums that the state holds, at least 0.
            precision: Precision of the products.
        """
        # Weights of leading sizes, unless there is one for each row.
        if row_weight is not None and row_weight.numel() * rows.shape[-1] != rows.numel():
            spread_weight = spread(row_weight, rows.shape[:-1])
            row_weight = row_weight if spread_weight is None else spread_weight
        with self._locked():
            self._add(rows, row_weight, row_scale, decay, precision)

    def _add(
        self,
        rows: Tensor,
        row_weight: Tensor | None,
        row_scale: float,
        decay: float,
        precision: Precision,
    ) -> None:
        if self.sketch is not None:
            rows = self._projected(rows, precision)
            row_weight = None if row_weight is None else row_weight.reshape(-1)
        if row_weight is None and row_scale == 1.0 and decay == 1.0:
            accumulate_(self, rows, precision=precision)
            return
        with self.weighing(rows, row_weight, row_scale, decay):
            accumulate_(
                self, rows, row_weight, row_scale=row_scale, decay=decay, precision=precision
            )

    def _projected(self, rows: Tensor, precision: Precision) -> Tensor:
        check_rows(rows)
        assert self.sketch is not None
        if rows.shape[-1] != self.channels:
            raise ValueError(
                f"rows have {rows.shape[-1]} channels (shape {tuple(rows.shape)}), the state has "
                f"{self.channels}: channels must be the last dimension"
            )
        return self.sketch.project(rows.double() if precision == "float64" else rows)

    @contextmanager
    def weighing(
        self, rows: Tensor, row_weight: Tensor | None, row_scale: float, decay: float
    ) -> Iterator[None]:
        """Context of one call of an operator that adds rows: keeps ``excess`` right.

        Needed where a row may weigh other than 1, or decay is applied. No host synchronisation.

        Args:
            rows: Rows that the operator adds; with ``row_weight``, channels last. [..., C]
            row_weight: Weights that the operator is given. [N]
            row_scale: Factor on every row's weight that the operator is given.
            decay: Factor on the state that the operator is given.
        """
        squares, rows_before = self.squared_weight * decay**2, self.count[0].clone()
        yield
        if row_weight is None:
            added = (self.count[0] - rows_before).double() * row_scale**2
        else:
            weights = row_weight.detach().flatten().double() * row_scale
            is_read, _ = are_read(rows.detach(), weights)
            added = torch.where(is_read, weights, 0.0).square().sum()
        operators.assign_(self.excess, torch.stack([squares + added, self.count[0].double()]))

    def translate_(self, shift: Tensor) -> None:
        """Replacement of the shift [C], and of the sums by those about the new shift."""
        with self._lock:
            moment, sum = _about(self.tensors, shift)
            self.moment.copy_(moment)
            self.sum.copy_(sum)
            self.shift.copy_(shift)

    def scale_(self, factor: float) -> None:
        """Multiplication of every row's weight."""
        with self._lock:
            for declared, tensor, settled in self._declared(_settled(self.tensors)):
                if settled is not tensor:
                    tensor.copy_(settled)
                declared.scale_(tensor, factor)  # in place: moments are large

    def merge(self, other: CovarianceState, scale: float = 1.0) -> None:
        """Addition of the rows of another state, which stays as it is.

        Args:
            other: State of as many channels, on any device.
            scale: Factor on the weights of the other state's rows.

        Raises:
            ValueError: If the numbers of channels differ.
        """
        if other.channels != self.channels:
            raise ValueError(
                f"cannot merge a state of {other.channels} channels into one of {self.channels}: "
                "merge states of the same layer"
            )
        if other.sketch != self.sketch:
            raise ValueError(
                f"cannot merge a state sketched to {other.sketch_width} channels into one of "
                f"{self.sketch_width} (None: all channels kept): make both with the same sketch, "
                "or track with the same memory="
            )
        device = self.moment.device
        # Locks in one order for all: two threads may merge two states into each other.
        first, second = sorted((self, other), key=id)
        with first._lock, second._lock:
            added = _settled(StateTensors._make(tensor.to(device) for tensor in other.tensors))
            # An empty state takes the other's shift; torch.where needs no host synchronisation. New
            # tensors then hold the other's sums about the common shift.
            self.shift.copy_(torch.where(self.count[0] == 0, added.shift, self.shift))
            moment, sum = _about(added, self.shift)
            added = added._replace(moment=moment, sum=sum)
            for declared, own, part in self._declared(added):
                if declared.reduction == "sum":
                    own.add_(declared.scaled(part, scale))

    def _declared(self, others: StateTensors) -> Iterator[tuple[Declared, Tensor, Tensor]]:
        """Triples of declaration, own tensor and the tensor of another state."""
        return zip(DECLARED.values(), self.tensors, others, strict=True)

    def reset(self) -> None:
        """Removal of every row."""
        with self._lock:
            for tensor in self.tensors:
                tensor.zero_()

    def to(self, device: torch.device | str) -> CovarianceState:
        """Move of the tensors, in place."""
        # Tensors made under inference_mode could not be updated in training later.
        with self._lock, torch.inference_mode(False):
            self.tensors = StateTensors._make(tensor.to(device) for tensor in self.tensors)
        return self

    def copy(self) -> CovarianceState:
        """Independent state of the same rows."""
        with self._lock, torch.inference_mode(False):
            copied = StateTensors._make(tensor.clone() for tensor in self.tensors)
            return _state_of(copied, self.sketch)

    def __reduce__(self) -> tuple[Callable[..., CovarianceState], tuple[Any, ...]]:
        # A lock can be neither copied nor pickled.
        return _state_of, (self.tensors, self.sketch)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors, by name; of a sketched state, also the sizes of its sketch.

        ``moment`` is the lower triangle, in the tiles of :mod:`fastcov.ops.triangle`.
        """
        with self._lock:
            saved = {name: tensor.clone() for name, tensor in self.tensors._asdict().items()}
        if self.sketch is not None:
            saved["sketch"] = torch.tensor(self.sketch.sizes, dtype=torch.int64, device="cpu")
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Return to a :meth:`state_dict`, whole or not at all: everything is checked before.

        Files of older versions load too: they hold ``moment`` as a square, of which the lower half
        is read. Where they hold no ``excess``, the rows are taken to weigh the same, so that
        :attr:`effective_count` is ``count[0]``.

        Raises:
            KeyError: If a tensor is missing.
            TypeError: If a value is not a plain tensor of its dtype.
            ValueError: If a shape differs, or values cannot be those of a state.
        """
        saved = _saved_sketch(state_dict)
        own_sizes = None if self.sketch is None else self.sketch.sizes
        if saved != own_sizes:
            raise ValueError(
                f"the file holds a sketch of sizes {saved}, this state {own_sizes} (channels of a "
                "row and of the sketch; None: all channels kept): make the state as the saved one"
            )
        loaded = _checked(state_dict, self.tensors)
        with self._lock:
            for own, tensor in zip(self.tensors, loaded, strict=True):
                own.copy_(tensor)


def _state_of(tensors: StateTensors, sketch: Sketch | None = None) -> CovarianceState:
    state = CovarianceState(1)
    state.tensors, state.sketch = tensors, sketch
    return state


def _about(tensors: StateTensors, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment and sum of the same rows about another shift, as new tensors."""
    step = tensors.shift - shift
    moment = tensors.moment + triangle.translation(step, tensors.sum, tensors.weight)
    triangle.clamp_diagonal_(moment, len(step))
    return moment, tensors.sum + tensors.weight * step


def _settled(tensors: StateTensors) -> StateTensors:
    # The same rows, all of them counted in `excess`: each tensor may then be scaled by itself.
    squares, rows = tensors.excess.unbind()
    count = tensors.count[0]
    return tensors._replace(excess=torch.stack([squares + (count - rows), count.double()]))


def _checked(state_dict: Mapping[str, Any], own: StateTensors) -> StateTensors:
    """Tensors of a saved state, from a file of any origin, moved to the devices of `own`."""
    given = dict(state_dict)
    if "excess" not in given:
        given["excess"] = None
    elif given["excess"] is None:
        raise TypeError("excess is a NoneType, expected a tensor")
    loaded: dict[str, Tensor] = {}
    for name, tensor in own._asdict().items():
        if name not in given:
            raise KeyError(f"state has no tensor {name!r}; it holds {sorted(state_dict)}")
        if name == "excess":
            given[name] = _modern_excess(given[name], loaded["weight"], loaded["count"][0])
        loaded[name] = _checked_tensor(name, given[name], tensor, len(own.sum))
    tensors = StateTensors._make(loaded.values())
    problem = _contradiction(tensors)
    if problem:
        raise ValueError(f"{problem}: the file is damaged, or no state of fastcov")
    return StateTensors._make(
        tensor.to(place.device) for tensor, place in zip(tensors, own, strict=True)
    )


def _saved_sketch(state_dict: Any) -> tuple[int, ...] | None:
    """Sizes of a saved state's sketch; None where all channels were kept."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}, expected a dict of tensors")
    if "sketch" not in state_dict:
        return None
    sizes = state_dict["sketch"]
    if not isinstance(sizes, Tensor):
        raise TypeError(f"sketch is a {type(sizes).__name__}, expected a tensor")
    if sizes.layout != torch.strided or sizes.is_nested or sizes.is_meta:
        raise TypeError("sketch is no dense tensor that holds values: the file is damaged")
    if sizes.dtype != torch.int64 or sizes.shape != (2,):
        raise TypeError(
            f"sketch is {sizes.dtype} of shape {tuple(sizes.shape)}, expected two sizes, "
            "torch.int64: the file is damaged"
        )
    return tuple(sizes.tolist())


def _modern_excess(excess: Any, weight: Tensor, count: Tensor) -> Any:
    # Files of earlier versions hold no squared weights, or (a single number) the sum of squared
    # weights less the sum of weights.
    if excess is None:
        return torch.stack([weight * (weight / count.clamp(min=1)), count.double()])
    is_single = isinstance(excess, Tensor) and not excess.is_nested and excess.dim() == 0
    if is_single and excess.dtype == torch.float64 and not excess.is_meta:
        return torch.stack([(weight + excess.to(weight)).clamp(min=0), count.double()])
    return excess


def _checked_tensor(name: str, tensor: Any, own: Tensor, channels: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one that holds values")
    is_triangle = DECLARED[name].shape == "triangle"
    is_square = is_triangle and tensor.dim() == 2  # of a version that kept the whole matrix
    expected = (channels, channels) if is_square else tuple(own.shape)
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {expected}: "
            "the file belongs to a layer of another width"
        )
    if tensor.dtype != own.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {own.dtype}: save states unconverted")
    if tensor.requires_grad:
        raise TypeError(f"{name} requires a gradient, which statistics do not have: detach it")
    values: Tensor = tensor
    if is_square:
        values = triangle.pack(tensor.tril())
    elif is_triangle:
        values = triangle.cleared(tensor, channels)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds a NaN or an infinity: the file is damaged")
    return values


# Share of the largest diagonal entry: float32's rounding may leave a channel without variance this
# far below 0.
_ROUNDING = 1e-5


def _contradiction(tensors: StateTensors) -> str:
    """Reason why these cannot be sums of any rows; empty where they can."""
    rows, skipped = tensors.count.tolist()
    weight = float(tensors.weight)
    squares, settled = tensors.excess.tolist()
    diagonal = triangle.diagonal(tensors.moment, len(tensors.sum))
    if rows < 0 or skipped < 0:
        return f"count is {[rows, skipped]}, expected numbers of rows of at least 0"
    if weight < 0 or squares < 0:
        return f"weight is {weight}, its squares' sum {squares}, expected at least 0"
    if not 0 <= settled <= rows or settled % 1:
        return f"excess counts {settled:g} of {rows} rows"
    if rows == 0 and (weight or squares or tensors.moment.any() or tensors.sum.any()):
        return "sums without a row that was read"
    if weight == 0 and (diagonal.any() or tensors.sum.any()):
        return "sums of rows whose weight is 0"
    if diagonal.numel() and float(diagonal.min()) < -_ROUNDING * float(diagonal.max().clamp(min=0)):
        return f"moment has {float(diagonal.min())} on its diagonal, a sum of squares"
    return ""
