"""What every format makes of its files: samples in the normal form, bad rows among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..media import Media
from ..sample import Sample

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class DataSet:
    """A published set as it lies on disk.

    name: its format's. path: what it was opened from. media: what its references to images mean.
    """

    name: str
    path: str
    media: Media
    read: Callable[[], Iterator[Sample]] = field(repr=False)

    def samples(self) -> Iterator[Sample]:
        """All samples in the order of the files, read as they are asked for; each call begins anew.

        A row that is no question about an image is a sample with a `problem`. Raises ValueError, naming the
        file, for files that are foreign or broken as a whole.
        """
        return self.read()


@dataclass(frozen=True)
class Asked:
    """What `open_data` was asked for: a file or folder, the folder of its images, one of its splits."""

    path: Path
    images: Path | None
    split: str | None

    @property
    def folder(self) -> Path:
        """The folder that is the path, or that the file lies in."""
        return self.path if self.path.is_dir() else self.path.parent

    def media(self, folder: Path) -> Media:
        """Images are looked for in the folder that was named for them, else in this one."""
        return Media(self.images or folder, absolute=self.images is None)

    def parts(self, found: Mapping[str, Sequence[Path]]) -> dict[str, Sequence[Path]]:
        """The files of the split that is asked for, or of all, by split. Raises ValueError for an unknown."""
        if self.split is None:
            return dict(found)
        if self.split not in found:
            there = ", ".join(sorted(filter(None, found)))
            raise ValueError(
                f"{self.path} has no split {self.split!r}; "
                + (f"it has {there}" if there else "it has no splits: leave out --split")
            )
        return {self.split: found[self.split]}

    def no_split(self) -> None:
        """Raises ValueError if a split is asked for, of what has none."""
        self.parts({})


@dataclass(frozen=True)
class Format:
    """A format: its name, what it looks like on disk (for a message that lists them all), whether a path
    looks so, and what opens it. `open` raises ValueError, naming the file, for anything else."""

    name: str
    looks: str
    recognizes: Callable[[Path], bool]
    open: Callable[[Asked], DataSet]


def make_sample(
    where: str,
    id: str,
    image: str,
    question: str,
    *,
    problem: str = "",
    answers: Iterable[str] = (),
    type: str = "",
    corrupt_image: str | None = None,
    corrupt_question: str | None = None,
    foil: str | None = None,
    subject: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Sample:
    """A sample of texts as the data has them: trimmed, empty ones left out, answers once each.

    where: the file and line, which the sample's problem begins with, be it the one given or that something
    is missing.
    """
    unclean: list[str] = []

    def clean(text: str | None) -> str:
        text = (text or "").strip()
        if text.isascii():
            return text
        readable = text.encode("utf-8", "replace").decode()
        if readable != text:
            unclean.append(readable)
        return readable

    sample = Sample(
        id=clean(id),
        image=clean(image),
        question=clean(question),
        answers=tuple(dict.fromkeys(filter(None, map(clean, answers)))),
        type=clean(type),
        corrupt_image=clean(corrupt_image) or None,
        corrupt_question=clean(corrupt_question) or None,
        foil=clean(foil) or None,
        subject=clean(subject) or None,
        extra={clean(name): clean(value) for name, value in (extra or {}).items()},
    )
    if not problem:
        if unclean:
            problem = "it is not UTF-8"
        elif not sample.question:
            problem = "the question is empty"
        elif not sample.image:
            problem = "no image is named"
    return replace(sample, problem=f"{clean(where)}: {clean(problem)}") if problem else sample


def files_in(folder: Path, *patterns: str) -> list[Path]:
    """The files of these names, sorted; hidden ones, and those in hidden folders, are not seen."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    )


def pictures_in(folder: Path) -> list[str]:
    """The names of the pictures in a folder, sorted."""
    return [name for name in names_in(folder) if name.lower().endswith(PICTURE_SUFFIXES)]


def names_in(folder: Path) -> list[str]:
    """The names of what lies in a folder, sorted; none of a missing one."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []
