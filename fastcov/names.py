"""Closest names, the end of every error about a name that is not known."""

import difflib
from collections.abc import Iterable


def closest(name: str, names: Iterable[str]) -> str:
    """End of an error's sentence with the known names most like an unknown one.

    Args:
        name: The unknown name.
        names: All names that are known.

    Returns:
        Up to three names after "; closest names: "; empty where none is alike.

    Example:
        >>> print("no layer 'cov1'" + closest("cov1", ["conv1", "conv2", "head"]))
        no layer 'cov1'; closest names: conv1, conv2
    """
    alike = difflib.get_close_matches(name, list(names), n=3, cutoff=0.3)
    return f"; closest names: {', '.join(alike)}" if alike else ""
