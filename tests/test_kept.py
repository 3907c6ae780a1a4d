"""Kernels kept in files: found by later processes, and nothing but what was written under that name."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from seedlm import kept

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner there")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLM_CACHE", str(tmp_path / "cache"))
    assert kept.read("name") is None
    kept.write("name", b"content")
    assert kept.read("name") == b"content"
    assert [path.name for path in kept.folder().iterdir()] == ["name"]
    return kept.folder() / "name"


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: b"",
        lambda found: found[:-1],
        lambda found: found[1:],
        lambda found: found + b"\0",
        lambda found: found[:20],
        lambda found: b"C" + found[1:],
        lambda found: found[:-1] + bytes([found[-1] ^ 1]),
        lambda found: b"\x7fELF" + bytes(1000),
    ],
)
def test_damage_is_as_if_there_were_nothing(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    assert kept.read("name") is None
    kept.write("name", b"again")
    assert kept.read("name") == b"again"


def test_what_was_written_under_another_name_is_not_believed(file):
    file.rename(file.with_name("other"))
    assert kept.read("other") is None


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_what_others_may_write_is_not_believed(file, mode):
    file.chmod(mode)
    assert kept.read("name") is None
    kept.write("name", b"again")
    assert kept.read("name") == b"again"
    assert file.stat().st_mode & 0o777 == 0o644


@POSIX
def test_what_another_user_wrote_is_not_believed(file, monkeypatch):
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert kept.read("name") is None


@POSIX
def test_what_is_no_plain_file_of_this_name_is_not_believed(file):
    """A link of somebody else's may lead to a file that this user fetched; to open a pipe waits for who writes to it."""
    file.rename(elsewhere := file.with_name("fetched"))
    file.symlink_to(elsewhere)
    assert kept.read("name") is None
    file.unlink()
    os.mkfifo(file)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(kept.read, "name")
        try:
            assert found.result(5) is None
        finally:
            os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))  # which lets go whoever waits
    kept.write("name", b"again")
    assert kept.read("name") == b"again"


@POSIX
def test_a_write_that_fails_leaves_nothing(file):
    """Disks that are full would fill with what did not fit."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        kept.write("other", bytes(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [path.name for path in file.parent.iterdir()] == ["name"]


def test_writers_at_once_leave_what_one_of_them_wrote(file):
    """Also for whoever reads meanwhile."""
    contents = [bytes([number]) * (1 << 20) for number in range(4)]
    kept.write("name", contents[0])
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(lambda each=each: [kept.write("name", each) for _ in range(20)]) for each in contents]
        while not all(writer.done() for writer in writers):
            assert kept.read("name") in contents
    assert kept.read("name") in contents
    assert [path.name for path in file.parent.iterdir()] == ["name"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_takes_nothing_is_no_error(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEEDLM_CACHE", str(tmp_path / place))
    kept.write("name", b"content")
    assert kept.read("name") is None


def test_a_folder_may_begin_with_the_home(tmp_path, monkeypatch):
    """As in files of settings, which no shell reads."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("SEEDLM_CACHE", "~/chosen")
    assert kept.folder() == tmp_path / "chosen" / "kernels"


def test_nobody_needs_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SEEDLM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kept.Path, "home", no_home)
    kept.write("name", b"content")
    assert kept.read("name") is None
