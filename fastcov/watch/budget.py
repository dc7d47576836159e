"""Memory budget: the width to which layers must be sketched, told from modules alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastcov.arguments import bytes_of
from fastcov.stats.buffering import sketch_for
from fastcov.watch.select import Tap


def sketch_of(
    model: nn.Module,
    taps: list[tuple[Tap, nn.Module]],
    memory: int | str | None,
    pairs: Sequence[tuple[str, str]] = (),
) -> int | None:
    """Channels of the sketch with which a model's layers fit into ``memory``; None for all.

    An upper bound: taps that turn out to share a tensor are counted each, and rows are taken to be
    of the parameters' dtype.
    """
    if memory is None:
        return None
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    row_bytes = max(2, max((each.element_size() for each in parameters), default=4))
    is_host = all(each.device.type == "cpu" for each in parameters)
    channels = [tap.channels for tap, _ in taps]
    widths = {tap.name: tap.channels for tap, _ in taps}
    joint = [sum(_known(name, widths, pair) for name in pair) for pair in pairs]
    return sketch_for(channels, bytes_of("memory", memory), row_bytes, is_host, joint)


def _known(name: str, widths: dict[str, int | None], pair: tuple[str, str]) -> int:
    width = widths.get(name)
    if width is None:
        raise ValueError(
            f"pairs holds {pair!r}: the width of {name!r} is known in the first forward only, too "
            "late for memory= to count it; pair layers whose modules tell their width, or leave "
            "memory= out"
        )
    return width
