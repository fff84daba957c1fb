"""Folders: writes that are whole or not there, and errors of one line that name the place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from eat_dist.errors import ConfigError, StorageError
from eat_dist.registry import Registry
from eat_dist.storage import Folder

running_as_root = hasattr(os, "geteuid") and os.geteuid() == 0


def everything_below(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_what_is_written_is_read_back_and_folders_are_made_on_the_way(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "run")
    assert not folder.exists()
    folder.write("a/b/c.bin", b"\x00one")
    folder.write("a/b/c.bin", b"two")
    assert folder.read("a/b/c.bin") == b"two"
    assert folder.child("a").read("b/c.bin") == b"two"
    assert folder.exists()
    assert folder.exists("a/b")
    assert everything_below(tmp_path) == ["run", "run/a", "run/a/b", "run/a/b/c.bin"]  # no temporary file left


def test_a_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.write("target/inside.txt", b"old")  # a folder cannot be replaced by a file
    with pytest.raises(StorageError, match=rf"^cannot write '{tmp_path}/target': Is a directory$"):
        folder.write("target", b"new")
    assert everything_below(tmp_path) == ["target", "target/inside.txt"]
    assert folder.read("target/inside.txt") == b"old"


def test_a_reader_sees_the_old_content_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    contents = {bytes([letter]) * 2_000_000 for letter in b"ab"}
    folder.write("file", min(contents))

    def rewrite() -> None:
        for _ in range(10):
            for content in contents:
                folder.write("file", content)

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = {folder.read("file")}
    while writer.is_alive():
        seen.add(folder.read("file"))
    writer.join()
    assert seen <= contents
    assert everything_below(tmp_path) == ["file"]


CALLS: dict[str, Callable[[Folder], None]] = {
    "create": lambda folder: folder.create(),
    "write": lambda folder: folder.write("x.txt", b"1"),
    "write_json": lambda folder: folder.write_json("x.json", {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path: Path, call: str) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=rf"cannot write .*{tmp_path}/file/sub.*: Not a directory") as caught:
        CALLS[call](Folder.at(tmp_path / "file" / "sub"))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"in the way"


@pytest.mark.skipif(running_as_root, reason="permission bits mean nothing to root")
@pytest.mark.parametrize("call", CALLS)
def test_missing_permission_is_named_in_one_line(tmp_path: Path, call: str) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(StorageError, match=rf"cannot write .*{tmp_path}/closed.*: Permission denied"):
        CALLS[call](Folder.at(tmp_path / "closed"))


def test_creating_a_folder_tries_a_write_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for _ in range(2):  # an existing folder is fine
        Folder.at(tmp_path / "a" / "b").create()
    assert everything_below(tmp_path) == ["a", "a/b"]


def test_a_missing_file_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"^cannot read '{tmp_path}/absent': No such file or directory$"):
        Folder.at(tmp_path).read("absent")


def test_json_comes_back_and_keeps_its_order(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None, True], "a": {"ε": "8/255"}}
    folder = Folder.at(tmp_path)
    folder.write_json("x.json", content)
    assert folder.read_json("x.json") == content
    assert list(folder.read_json("x.json")) == ["b", "a"]
    assert "ε" in folder.read("x.json").decode()
    assert folder.read("x.json").endswith(b"}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_it_cannot_hold_and_keeps_the_old_file(tmp_path: Path, value: float) -> None:
    folder = Folder.at(tmp_path)
    folder.write_json("x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("x.json", {"a": [value]})
    assert folder.read_json("x.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe\x00"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StorageError, match=rf"^'{tmp_path}/x\.json' is not valid JSON: .+$"):
        Folder.at(tmp_path).read_json("x.json")


def test_names_are_sorted_and_empty_where_there_is_no_folder(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "run")
    assert folder.names() == []
    for name in ("b", "a/inside", "c"):
        folder.write(name, b"")
    assert folder.names() == ["a", "b", "c"]


def test_names_of_a_file_are_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"{tmp_path}/file"):
        Folder.at(tmp_path / "file").names()


@pytest.mark.parametrize("listing", [Folder.names, Folder.files])
def test_a_file_name_that_is_not_utf_8_is_an_error_of_one_line(
    tmp_path: Path, listing: Callable[[Folder], object]
) -> None:
    Path(os.fsdecode(bytes(tmp_path / "gr") + b"\xfc\xdf.png")).write_bytes(b"")  # as Latin-1 writes it
    with pytest.raises(StorageError, match=f"^cannot list '{tmp_path}': a file name in it is not UTF-8") as caught:
        listing(Folder.at(tmp_path))
    assert "\n" not in str(caught.value)


def test_deleting_takes_files_and_whole_folders_and_does_not_mind_missing_ones(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "run")
    for name in ("a/one", "a/two", "b", "c"):
        folder.write(name, b"")
    folder.delete("absent")
    folder.delete("b")
    folder.delete("a")
    assert folder.names() == ["c"]
    folder.delete()
    folder.delete()
    assert not folder.exists()
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("url", ["foo://bucket/x", "http://example.invalid/x", "file://relative"])
def test_a_url_that_leads_nowhere_is_a_storage_error_of_one_line(url: str) -> None:
    with pytest.raises(StorageError, match=f"^cannot open '{url}': .+$") as caught:
        Folder.at(url)
    assert "\n" not in str(caught.value)


def test_a_file_url_is_the_folder_it_names(tmp_path: Path) -> None:
    folder = Folder.at(f"file://{tmp_path}/run/")
    folder.write("a", b"1")
    assert folder.is_local
    assert str(folder) == str(tmp_path / "run")
    assert (tmp_path / "run" / "a").read_bytes() == b"1"
    assert Folder.at(tmp_path / "run").names() == ["a"]


def test_paths_are_made_absolute_and_the_home_folder_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Folder.at("runs/a").path == str(tmp_path / "runs" / "a")
    assert Folder.at("~/runs").path == str(tmp_path / "home" / "runs")


def table() -> Registry[int]:
    registry: Registry[int] = Registry("attack")
    registry.register("pgd")(1)
    registry.register("fgsm")(2)
    return registry


def test_an_unknown_component_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        table()["pdg"]
    assert str(caught.value) == "no attack is called 'pdg'; known: fgsm, pgd. Did you mean 'pgd'?"
    with pytest.raises(ConfigError) as caught:
        table()["zzzz"]
    assert str(caught.value) == "no attack is called 'zzzz'; known: fgsm, pgd."


def test_a_registry_holds_what_was_registered_and_each_name_once() -> None:
    registry = table()
    assert list(registry) == ["fgsm", "pgd"]
    assert registry["pgd"] == 1
    assert "pgd" in registry
    assert "pdg" not in registry
    with pytest.raises(AssertionError, match="attack 'pgd' is registered twice"):
        registry.register("pgd")(3)
    assert registry["pgd"] == 1
