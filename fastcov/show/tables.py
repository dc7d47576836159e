"""Tables of cells as text, and the table of a comparison."""

from collections.abc import Iterable, Sequence

from fastcov.spectra.compare import Comparison


def text_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells aligned under their headings: the first and a "note" to the left, numbers right.

    Args:
        headings: One a column.
        lines: Cells, as many as headings.

    Returns:
        Lines without trailing spaces.
    """
    cells = [[printable(cell) for cell in line] for line in lines]
    widths = [
        max(len(line[column]) for line in [headings, *cells]) for column in range(len(headings))
    ]
    is_left = [column == 0 or heading == "note" for column, heading in enumerate(headings)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_left, strict=True)
        ).rstrip()
        for line in [headings, ["-" * width for width in widths], *cells]
    )


def printable(text: str) -> str:
    """Text with its control characters escaped: those in a name must not reach a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def comparison_rows(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells of a comparison: dimensions at the end, and the distance of the spectra.

    One line a layer; layers that only one training has come last.
    """
    headings = ("layer", "width a", "width b", "dim a", "dim b", "dof a", "dof b", "distance")
    lines: list[tuple[str, ...]] = [
        (
            layer.name,
            str(layer.end_a.channels),
            str(layer.end_b.channels),
            str(layer.dims_a[-1]),
            str(layer.dims_b[-1]),
            f"{layer.end_a.dof():.1f}",
            f"{layer.end_b.dof():.1f}",
            f"{layer.distance:.3f}",
        )
        for layer in comparison.layers
    ]
    lines += [(name, *[""] * 6, "only in a") for name in comparison.only_a]
    lines += [(name, *[""] * 6, "only in b") for name in comparison.only_b]
    return headings, lines


def comparison_legend(comparison: Comparison) -> str:
    """Meaning of the columns of :func:`comparison_rows`, in two sentences."""
    return (
        "Distance: half the sum of |p - q| over the trace-normalised eigenvalues in descending "
        "order, the share of the variance that would have to change rank (0 same shape, 1 at "
        f"most). Dim: eigenvalues above {comparison.threshold:g} of the largest."
    )
