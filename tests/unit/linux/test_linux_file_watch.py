"""Files that change under us, in all the ways programs do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fz_core.linux import FileWatch
from tests.readiness import readable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    return path


@pytest.fixture
def watch(path: Path) -> Iterator[FileWatch]:
    watch = FileWatch([path, path.with_name("backup")])
    yield watch
    watch.close()


def replace(path: Path) -> None:
    path.with_name("new").write_text("x")
    path.with_name("new").rename(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("other"),
        lambda path: path.unlink(),
        lambda path: path.with_name("backup").write_text("new here"),
        replace,
    ],
    ids=["written", "removed", "appeared", "replaced"],
)
def test_every_way_to_change_a_file(watch: FileWatch, path: Path, change: Callable[[Path], object]) -> None:
    assert not watch.drain()
    change(path)
    assert readable(watch)
    assert watch.drain()
    assert not watch.drain()


def test_a_replaced_file_goes_on_being_watched(watch: FileWatch, path: Path) -> None:
    for _ in range(3):
        replace(path)
        assert watch.drain()
        with path.open("a") as file:
            file.write("more")
        assert watch.drain()


def test_a_neighbour_is_no_news(watch: FileWatch, path: Path) -> None:
    path.with_name("hosts").write_text("x")
    path.read_text()
    assert not watch.drain()


def test_a_link_is_followed_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    target = tmp_path / "run" / "stub"
    target.write_text("a")
    link = tmp_path / "resolv.conf"
    link.symlink_to(target)
    watch = FileWatch([link])
    replace(target)
    assert watch.drain()
    os.unlink(link)
    assert watch.drain()
    link.write_text("b")
    assert watch.drain()
    watch.close()


def test_a_folder_that_does_not_exist_is_no_error(tmp_path: Path) -> None:
    watch = FileWatch([tmp_path / "nowhere" / "file"])
    assert not watch.drain()
    watch.close()
