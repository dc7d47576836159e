"""A file that is replaced is the old one or the new one, whole."""

import os
from pathlib import Path

import pytest

from fastcov.files import replacing


def test_the_file_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "page.html"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_of_one_number_on_two_machines_do_not_write_one_temporary_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.html"
    with replacing(path) as mine:
        mine.write_text("mine")
        with replacing(path) as theirs:  # the process number of this one
            theirs.write_text("theirs")
    assert mine != theirs
    assert path.read_text() == "mine"


def test_a_durable_file_is_flushed_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a)))
    for durable in (False, True):
        with replacing(tmp_path / "file", durable=durable) as temporary:
            temporary.write_bytes(b"content")
    assert calls == ["replace", "fsync", "replace", "fsync"]
