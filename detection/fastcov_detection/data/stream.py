"""The lists of a JSON file, entry by entry: a file of any size takes the memory of one entry."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

_CHUNK = 1 << 22
_SPACE = " \t\n\r"
_decode = json.JSONDecoder().raw_decode


class Entries(Collection[Any]):
    """A list of a JSON file, read anew in every loop.

    Args:
        path: Of the file, in UTF-8.
        place: Bytes before the list's first entry.
        count: Number of entries.
    """

    def __init__(self, path: Path, place: int, count: int) -> None:
        self.path, self.place, self.count = path, place, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            file.seek(self.place)
            yield from _Reader(file, self.place).entries()

    def __contains__(self, entry: object) -> bool:
        return any(entry == one for one in self)


class Lists(NamedTuple):
    """Content of a file whose top level is an object."""

    lists: dict[str, Collection[Any]]
    """The lists that were asked for, where they are there."""
    digest: str
    """SHA-256 of the file."""


def read_lists(path: Path, see: Mapping[str, Callable[[Any], None]]) -> Lists:
    """Reads a whole JSON file once, and keeps where its lists are.

    Args:
        path: Of the file.
        see: Names of the wanted lists at the top level; each is called with every entry.

    Raises:
        ValueError: If the file is not JSON.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
        if not encoding.startswith("utf-8"):
            return _read_at_once(path, see)
        start = 3 if encoding == "utf-8-sig" else 0
        digest = hashlib.sha256()
        file.seek(0)
        digest.update(file.read(start))
        reader = _Reader(file, start, digest.update)
        lists: dict[str, Collection[Any]] = {}
        if reader.next() != "{":
            reader.value()
            reader.end()
            return Lists(lists, digest.hexdigest())
        reader.take("{")
        while reader.next() != "}":
            name = reader.value()
            if not isinstance(name, str):
                raise reader.error("expected a name")
            reader.take(":")
            lists.pop(name, None)
            if name in see and reader.next() == "[":
                reader.take("[")
                place, count = reader.place(), 0
                for entry in reader.entries():
                    see[name](entry)
                    count += 1
                lists[name] = Entries(path, place, count)
            else:
                reader.value()
            if reader.next() != "}":
                reader.take(",")
                if reader.next() == "}":
                    raise reader.error("a comma before '}'")
        reader.take("}")
        reader.end()
    return Lists(lists, digest.hexdigest())


def _read_at_once(path: Path, see: Mapping[str, Callable[[Any], None]]) -> Lists:
    """The same of a file in UTF-16 or UTF-32, in memory."""
    raw = path.read_bytes()
    content = json.loads(raw)
    found = content if isinstance(content, dict) else {}
    lists = {name: found[name] for name in see if isinstance(found.get(name), list)}
    for name, entries in lists.items():
        for entry in entries:
            see[name](entry)
    return Lists(lists, hashlib.sha256(raw).hexdigest())


class _Reader:
    """JSON values of a file in UTF-8, one after the other."""

    def __init__(
        self, file: IO[bytes], place: int, watch: Callable[[bytes], Any] | None = None
    ) -> None:
        self.file, self.watch = file, watch
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.before, self.is_all = "", 0, place, False

    def place(self) -> int:
        """Bytes of the file before the next character."""
        return self.before + len(self.text[: self.at].encode())

    def next(self) -> str:
        """The next character that is no space, left where it is; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Passes over a character."""
        if self.next() != character:
            raise self.error(f"expected {character!r}")
        self.at += 1

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                found, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise self.error(error.msg) from None
            # A number at the end of what was read may go on.
            if end == len(self.text) and self._more():
                continue
            self.at = end
            return found

    def entries(self) -> Iterator[Any]:
        """The entries of a list whose bracket was taken, to the bracket that closes it."""
        if self.next() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.next() == "]":
                self.at += 1
                return
            self.take(",")

    def end(self) -> None:
        """Refuses anything but spaces in the rest of the file."""
        if self.next():
            raise self.error("more text after the end")

    def error(self, reason: str) -> ValueError:
        """A failure with its place."""
        return ValueError(f"{reason}, at byte {self.place()}")

    def _more(self) -> bool:
        """Reads on; what was passed over is dropped."""
        if self.is_all:
            return False
        self.before = self.place()
        rest = self.text[self.at :]
        chunk = self.file.read(max(_CHUNK, len(rest)))
        if self.watch is not None:
            self.watch(chunk)
        self.is_all = not chunk
        self.text, self.at = rest + self.decoder.decode(chunk, final=not chunk), 0
        return True
