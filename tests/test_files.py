"""Files from outside: regular ones only, of no more than they can have."""

import os
import subprocess
import sys

import pytest
import tiny_packs

import fewfire
from fewfire.checkpoints.pack import open_pack
from fewfire.cli.main import main
from fewfire.errors import ConfigError, FewfireError, FormatError
from fewfire.files import open_regular, read_regular

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@needs_pipes
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="no regular file|directory"):
            open_regular(path)


def test_a_file_is_read_up_to_what_it_can_have(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_regular(path, most=3) == b"abc"
    with pytest.raises(OSError, match="3 bytes are more"):
        read_regular(path, most=2)


@needs_pipes
@pytest.mark.parametrize("name", ["fewfire.json", "config.json", "trunk.safetensors", "experts.bin"])
def test_a_pack_with_a_pipe_in_it_is_refused(tmp_path, name):
    path = tiny_packs.make(tmp_path, "mixtral", "q4")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(FewfireError):
        open_pack(path)


@needs_pipes
@pytest.mark.parametrize("arguments", [["plan", "PIPE.gguf"], ["plan", "30b-a3b", "--routing", "PIPE.gguf"]])
def test_commands_end_beside_pipes(tmp_path, arguments, capsys):
    os.mkfifo(tmp_path / "PIPE.gguf")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / each) if each.startswith("PIPE") else each for each in arguments])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_large_file_in_place_of_a_small_one_is_not_read(tmp_path):
    path = tiny_packs.make(tmp_path, "mixtral", "q4")
    os.truncate(path / "config.json", 2**33)  # takes no place on the disk
    with pytest.raises(FormatError, match="8589934592 bytes long"):
        open_pack(path)
    os.truncate(path / "fewfire.json", 2**33)
    with pytest.raises(ConfigError, match="more than such a file can have"):
        open_pack(path)


def test_a_gguf_that_is_not_there_is_no_hub_id():
    with pytest.raises(ConfigError, match=r"models/absent.gguf is no folder or .gguf file here"):
        fewfire.load("models/absent.gguf")


@pytest.mark.parametrize("count", ["100000", "9999999999999"])
def test_too_many_threads_are_refused_in_one_line(tmp_path, count):
    path = tiny_packs.make(tmp_path, "mixtral", "q4")
    command = [sys.executable, "-m", "fewfire", "bench", str(path), "--threads", count]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "from 1 to 1024" in refused.stderr
