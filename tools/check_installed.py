"""Check of the installed fastcov: fails unless it is the wheel with its CPU library."""

from __future__ import annotations

import sys

import fastcov


def main() -> None:
    """Command line: prints one line a backend."""
    if "site-packages" not in fastcov.__file__:
        sys.exit(f"fastcov is imported from {fastcov.__file__}, not from the installed wheel")
    for name, backend in fastcov.backends().items():
        print(f"{name}: {'active' if backend.active else 'off'}, {backend.reason}")
    if not fastcov.backends()["cpu"].active:
        sys.exit("the compiled CPU library is not in use; its reason is above")


if __name__ == "__main__":
    main()
