import errno
import os
import subprocess
import sys

import pytest

from fuseformer.files import write_atomically


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, lambda file: file.write(b"first"))
    seen = []

    def write(file):
        file.write(b"second")
        file.flush()
        seen.append(path.read_bytes())

    write_atomically(str(path), write)
    assert seen == [b"first"]
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_previous_file_and_no_partial_one(tmp_path, error):
    path = tmp_path / "state"
    path.write_bytes(b"first")

    def write(file):
        file.write(b"sec")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_disk_that_fills_up_at_the_end_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_bytes(b"first")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_killed_writer_leaves_the_previous_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"first")
    code = (
        "import os, sys; from fuseformer.files import write_atomically\n"
        "write_atomically(sys.argv[1], lambda f: (f.write(b'sec'), f.flush(), os._exit(9)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == b"first"
    write_atomically(path, lambda file: file.write(b"third"))  # the stale partial file is no hurdle
    assert path.read_bytes() == b"third"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
