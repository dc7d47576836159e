"""Tools of a release: tags, and what keeps a wheel from an older platform."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastcov

ROOT = Path(__file__).resolve().parents[2]
# As auditwheel writes it, on one line.
SHOWN = (
    "The wheel references external versioned symbols in these system-provided shared libraries: "
    "libgcc_s.so.1 with versions {'GCC_3.0'}, libstdc++.so.6 with versions {'CXXABI_1.3.9', "
    "'GLIBCXX_3.4.21', 'GLIBCXX_3.4.29', 'GLIBCXX_3.4'}, libc.so.6 with versions {'GLIBC_2.14', "
    "'GLIBC_2.28', 'GLIBC_2.34'} This constrains the platform tag to \"manylinux_2_34_x86_64\"."
)


@pytest.fixture(scope="module")
def build_release() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_release", ROOT / "tools" / "build_release.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_missing_for_an_older_platform_is_named(build_release: ModuleType) -> None:
    wanted = build_release.policy("manylinux_2_28")
    assert build_release.too_new(SHOWN, wanted) == [
        "libc.so.6: GLIBC_2.34",
        "libstdc++.so.6: GLIBCXX_3.4.29",
    ]
    assert build_release.too_new(SHOWN, build_release.policy("manylinux_2_34")) == []


def test_a_tag_must_be_the_version() -> None:
    def check(tag: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "check_tag.py"), tag]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert check(f"v{fastcov.__version__}").returncode == 0
    wrong = check("v99.0.0")
    assert wrong.returncode == 1
    assert f"fastcov/version.py has {fastcov.__version__}" in wrong.stdout
