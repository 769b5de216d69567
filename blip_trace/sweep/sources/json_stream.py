"""Big JSON files, read one entry after another with the standard library's decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

CHUNK = 2**20
MAX_ENTRY = 2**24
"""Characters of one entry: an entry is held as a whole."""

_SPACE = " \t\n\r"


class JsonReader:
    """Reads an open file from its beginning to its end, forwards only.

    Raises ValueError, naming the file and the place in it, where it is no JSON.
    """

    def __init__(self, file: TextIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._passed = 0
        self._values = 0
        """How many were begun, to know whether one was read."""

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def value(self) -> Any:
        """The value that comes next, as a whole."""
        self._values += 1
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise self._broken() from error
                continue
            # A number that ends with what was read may go on.
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; after each its value may be read, or is passed over."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise self._broken()
            self._take(":")
            before = self._values
            yield key
            if self._values == before:
                self._skip()
            if self._take(",}") == "}":
                return

    def elements(self) -> Iterator[Any]:
        """The values in the list that comes next."""
        self._values += 1
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def _skip(self) -> None:
        if self.peek() == "[":
            for _ in self.elements():
                pass
        elif self.peek() == "{":
            for _ in self.members():
                self.value()
        else:
            self.value()

    def _take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            raise self._broken()
        self._at += 1
        return found

    def _more(self) -> bool:
        """Read on; as much again as is held, so that an entry is not tried too often."""
        held = len(self._text) - self._at
        if held > MAX_ENTRY:
            raise ValueError(f"{self._name} is no JSON of entries of at most {MAX_ENTRY / 2**20:g} MiB each")
        more = self._file.read(max(CHUNK, held))
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _broken(self) -> ValueError:
        place = self._passed + self._at
        return ValueError(f"{self._name} is no JSON, or ends too early (from character {place:,} on)")


def list_entries(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """The objects in the list that stands under a key of a JSON file's object.

    Raises ValueError for no JSON, for no such list, and for an entry that is no object.
    """
    with _opened(path) as file:
        reader = JsonReader(file, str(path))
        for name in reader.members() if reader.peek() == "{" else ():
            if name == key and reader.peek() == "[":
                for number, entry in enumerate(reader.elements()):
                    if not isinstance(entry, dict):
                        raise ValueError(f"{path} has an entry {number} of {key!r} that is no object")
                    yield entry
                return
    raise ValueError(f"{path} has no list {key!r}")


def object_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a JSON file's object. Raises ValueError for anything else."""
    with _opened(path) as file:
        reader = JsonReader(file, str(path))
        if reader.peek() != "{":
            raise ValueError(f"{path} holds no JSON object")
        for key in reader.members():
            yield key, reader.value()


def first_entry(path: Path) -> tuple[str, Mapping[str, Any]]:
    """What a JSON file holds, by its beginning: the key of its object's first list of objects and the first
    of these; or "" and an object's first value, where that is an object with an image. "" and nothing where
    it holds neither or is broken."""
    try:
        with _opened(path) as file:
            reader = JsonReader(file, str(path))
            for key in reader.members() if reader.peek() == "{" else ():
                if reader.peek() == "[":
                    entry = next(reader.elements(), None)
                    return (key, entry) if isinstance(entry, dict) else ("", {})
                value = reader.value()
                if isinstance(value, dict) and "imageId" in value:
                    return "", value
    except ValueError:
        pass
    return "", {}


def _opened(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="surrogateescape")
