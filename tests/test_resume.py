"""Packs written over several runs: whatever stops one, the next gives the bytes of one that nothing stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from fewfire.checkpoints import pack_writer, unfinished
from fewfire.checkpoints.pack import EXPERTS, TRUNK, is_pack, open_pack, verify_pack
from fewfire.checkpoints.unfinished import JOURNAL
from fewfire.errors import BudgetError, ConfigError, FormatError
from fewfire.quantize import initialise, pack

HIDDEN = ".pack.unfinished"


class Stop(BaseException):
    """What no error handler takes for an error of its own."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    model = tiny_hub.make("qwen3_moe", num_experts=6)
    return tiny_hub.save(model, tmp_path_factory.mktemp("hub") / "qwen")


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory):
    """The pack of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "pack"
    return folder, pack(hub, folder)


@pytest.fixture(autouse=True)
def sync_at_once(monkeypatch):
    """Every part is noted when it is written; nobody waits for a disk."""
    monkeypatch.setattr(unfinished, "SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def contents(folder):
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def stop_after(monkeypatch, parts, error=Stop):
    """The write fails when it has noted `parts` parts."""
    note, noted = unfinished.Unfinished._note, []

    def counting(self, *arguments):
        note(self, *arguments)
        noted.append(arguments)
        if len(noted) == parts:
            raise error

    monkeypatch.setattr(unfinished.Unfinished, "_note", counting)


def interrupt(hub, out, parts, **options):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, parts)
        with pytest.raises(Stop):
            pack(hub, out, **options)
    assert not out.exists() and (out.parent / HIDDEN / JOURNAL).is_file()


def test_wherever_it_stops_the_next_run_gives_the_same_bytes(hub, whole, tmp_path):
    folder, expected = whole
    opened, before = open_pack(folder), 0
    num_parts = len(opened.trunk_headers) + sum(layer.num_experts for layer in opened.layout.experts)
    for parts in (*range(1, num_parts, 4), num_parts):
        out = tmp_path / str(parts) / "pack"
        interrupt(hub, out, parts)
        said = []
        result = pack(hub, out, say=said.append)
        assert contents(out) == contents(folder) and [each.name for each in out.parent.iterdir()] == ["pack"]
        assert result.resumed_bytes > before and len(said) == 1 and "goes on" in said[0]
        before = result.resumed_bytes
        assert result.losses.keys() == expected.losses.keys()
        for place, loss in result.losses.items():
            assert loss.relative == pytest.approx(expected.losses[place].relative, rel=1e-9)
            assert loss.values == expected.losses[place].values


def test_many_interruptions_add_up(hub, whole, tmp_path):
    for _ in range(5):
        interrupt(hub, tmp_path / "pack", 7)
    assert pack(hub, tmp_path / "pack").resumed_bytes > 0
    assert contents(tmp_path / "pack") == contents(whole[0])


KILLED = """
import os, signal, sys
from fewfire.checkpoints import pack_writer, unfinished
from fewfire.quantize import initialise, pack
unfinished.SYNC_BYTES = 1
make, made = pack_writer._Writer._record, []
def record(self, layer, expert):
    made.append(expert)
    if len(made) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(self, layer, expert)
pack_writer._Writer._record = record
{call}
"""


@pytest.mark.parametrize("kind", ["pack", "init"])
def test_a_killed_process_is_gone_on_with(hub, whole, tmp_path, kind):
    out = tmp_path / "pack"
    calls = {
        "pack": f"pack({str(hub)!r}, {str(out)!r})",
        "init": f"initialise('granite-3.0-1b-a400m', {str(out)!r}, layers=1, seed=3)",
    }
    killed = subprocess.run([sys.executable, "-c", KILLED.format(call=calls[kind])], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and (tmp_path / HIDDEN / EXPERTS).stat().st_size > 0
    if kind == "pack":
        result, reference = pack(hub, out), whole[0]
    else:
        reference = tmp_path / "reference"
        initialise("granite-3.0-1b-a400m", reference, layers=1, seed=3)
        result = initialise("granite-3.0-1b-a400m", out, layers=1, seed=3)
    assert 0 < result.resumed_bytes < result.num_bytes
    assert contents(out) == contents(reference) and not (tmp_path / HIDDEN).exists()
    verify_pack(out)


@settings(max_examples=15)
@given(cut=st.integers(0, 6000), junk=st.binary(max_size=40))
def test_a_torn_journal_costs_work_and_nothing_else(hub, whole, tmp_path_factory, cut, junk):
    out = tmp_path_factory.mktemp("torn") / "pack"
    interrupt(hub, out, 40)
    journal = out.parent / HIDDEN / JOURNAL
    raw = journal.read_bytes()
    journal.write_bytes(raw[: min(cut, len(raw))] + junk)
    pack(hub, out)
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize("name", [TRUNK, EXPERTS])
@pytest.mark.parametrize("damage", ["short", "long", "last part", "head", "gone"])
def test_data_that_is_not_what_the_journal_says_is_written_again(hub, whole, tmp_path, name, damage):
    interrupt(hub, tmp_path / "pack", 40)
    path, said = tmp_path / HIDDEN / name, []
    raw = bytearray(path.read_bytes())
    if damage == "long":  # written, and not yet in the journal
        raw += b"x" * 5000
    elif damage == "short":
        raw = raw[:-1]
    elif damage == "last part":
        raw[-1] ^= 1
    elif damage == "head":
        raw[9] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw)
    result = pack(hub, tmp_path / "pack", say=said.append)
    is_kept = damage == "long" or (name, damage) == (EXPERTS, "head")
    if (name, damage) == (EXPERTS, "head"):  # an older record, which is not looked at: its checksum stays true
        with pytest.raises(FormatError, match=r"experts\[0\]: byte 0: is not what was written"):
            verify_pack(tmp_path / "pack")
    else:
        assert contents(tmp_path / "pack") == contents(whole[0])
    assert (result.resumed_bytes > 0) == is_kept and len(said) == 1
    assert ("goes on" if is_kept else f"discarded: its {name}") in said[0]


def test_data_is_on_the_disk_before_the_journal_speaks_of_it(hub, tmp_path, monkeypatch):
    """At every wait for the disk: the journal names no part whose file had not been waited for before."""
    synced: dict[str, int] = {}
    hidden = tmp_path / HIDDEN

    def fsync(handle):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        if name in (TRUNK, EXPERTS):
            synced[name] = os.fstat(handle).st_size
        elif name == JOURNAL:
            entries = [json.loads(line.rpartition(b"\t")[0]) for line in (hidden / JOURNAL).read_bytes().splitlines()]
            for file in (TRUNK, EXPERTS):
                named = sum(1 for entry in entries[1:] if entry[0] == file)
                assert named == 0 or synced[file] >= writers[0].end(named, file)

    class Watched(pack_writer._Writer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            writers.append(self)

        def end(self, count, file):
            return (self.trunk if file == TRUNK else self.experts).end(count)

    writers: list[Watched] = []
    monkeypatch.setattr(pack_writer, "_Writer", Watched)
    monkeypatch.setattr(os, "fsync", fsync)
    pack(hub, tmp_path / "pack")
    assert synced == {name: (tmp_path / "pack" / name).stat().st_size for name in (TRUNK, EXPERTS)}


def test_what_would_give_other_bytes_is_discarded(hub, whole, tmp_path, monkeypatch):
    other = shutil.copytree(hub, tmp_path / "other")  # another path
    weights = next(other.glob("*.safetensors"))
    for options, change, why in [
        ({"quant": "q8"}, None, "formats"),
        ({"layers": 1}, None, "model settings"),
        ({}, "hub", "source files"),
        ({}, "code", "versions"),
    ]:
        interrupt(hub if change != "hub" else other, tmp_path / "pack", 20)
        if change == "hub":
            os.utime(weights, ns=(1, 1))
        said = []
        with pytest.MonkeyPatch.context() as patch:
            if change == "code":
                patch.setattr(pack_writer, "code_version", lambda: "another")
            result = pack(other if change == "hub" else hub, tmp_path / "pack", say=said.append, **options)
        assert result.resumed_bytes == 0 and len(said) == 1 and f"discarded: its {why} differ" in said[0]
        verify_pack(tmp_path / "pack")
        if not options:
            assert contents(tmp_path / "pack") == contents(whole[0]) or change == "hub"
        shutil.rmtree(tmp_path / "pack")


def test_a_write_of_an_unknown_source_is_never_resumed(tmp_path):
    import tiny_packs

    from fewfire.checkpoints.pack_writer import write_pack
    from fewfire.plan.memory import choose_formats

    module = tiny_packs.draw(tiny_packs.MODELS["olmoe"])
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stop):
            write_pack(tmp_path / "pack", tiny_packs.ModuleSource(module), choose_formats(module.config, "q4"))
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_one_pack(hub, whole, tmp_path):
    """The second is told in one line; the first does not notice."""
    make, told = pack_writer._Writer._record, []

    def record(self, layer, expert):
        if not told:
            with pytest.raises(ConfigError, match="is being written by another process; wait for it") as caught:
                pack(hub, tmp_path / "pack", quant="q8")
            told.append(str(caught.value))
        return make(self, layer, expert)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_writer._Writer, "_record", record)
        pack(hub, tmp_path / "pack")
    assert told and "\n" not in told[0]
    assert contents(tmp_path / "pack") == contents(whole[0])
    with pytest.raises(ConfigError, match="not empty"):
        pack(hub, tmp_path / "pack")


def test_many_processes_at_once_leave_one_sound_pack(hub, whole, tmp_path):
    command = [sys.executable, "-m", "fewfire", "pack", str(hub), str(tmp_path / "pack"), "--json"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(*each.communicate(timeout=120), each.returncode) for each in running]
    assert sorted(code for _, _, code in ended) == [0, 2, 2]
    for _, err, code in ended:
        assert code == 0 or err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert contents(tmp_path / "pack") == contents(whole[0]) and [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_a_full_disk_keeps_what_is_there(hub, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 30, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(BudgetError, match=r"disk is full .* run the same again to go on, or remove .*unfinished"):
            pack(hub, tmp_path / "pack")
    assert pack(hub, tmp_path / "pack").resumed_bytes > 0
    assert contents(tmp_path / "pack") == contents(whole[0])


def test_what_is_written_again_is_not_counted_as_taken(hub, whole, tmp_path, monkeypatch):
    """Room is compared with what is left to write when all that no journal names has been given back."""
    interrupt(hub, tmp_path / "pack", 40)
    with open(tmp_path / HIDDEN / EXPERTS, "ab") as file:
        file.write(bytes(10**7))
    whole_bytes = 2**16 + sum(each.stat().st_size for each in whole[0].iterdir())  # and the journal

    def disk_usage(folder):
        taken = sum(each.stat().st_size for each in folder.iterdir())
        return shutil._ntuple_diskusage(whole_bytes, taken, whole_bytes - taken)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert pack(hub, tmp_path / "pack").resumed_bytes > 0


def test_a_disk_that_is_seen_to_be_too_small_is_said_first(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(BudgetError, match=r"needs .* and the disk has 1000 bytes|needs .* disk has"):
        pack(hub, tmp_path / "pack")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_leave_nothing_to_resume(tmp_path):
    import torch

    model = tiny_hub.make("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("inf")
    folder = tiny_hub.save(model, tmp_path / "hub")
    with pytest.raises(FormatError, match="inf"):
        pack(folder, tmp_path / "pack")
    assert [each.name for each in tmp_path.iterdir()] == ["hub"]


def test_nothing_is_left_where_nothing_was_finished(hub, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_writer._Writer, "write_trunk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(hub, tmp_path / "pack")
    assert not list(tmp_path.iterdir())


def test_a_crash_just_after_the_rename_leaves_a_whole_pack(hub, whole, tmp_path):
    rename = os.rename

    def crash(old, new):
        rename(old, new)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(Stop):
            pack(hub, tmp_path / "pack")
    assert is_pack(tmp_path / "pack") and [each.name for each in tmp_path.iterdir()] == ["pack"]
    verify_pack(tmp_path / "pack")


def test_ctrl_c_says_how_to_go_on_and_json_how_much_was_there(hub, tmp_path):
    """The command is stopped by the signal itself, while it waits for an expert."""
    script = (
        "import os, signal, threading\nfrom fewfire.checkpoints import pack_writer, unfinished\n"
        "unfinished.SYNC_BYTES = 1\n"
        "stopped = threading.Event()\n"
        "signal.signal(signal.SIGINT, lambda *at: stopped.set() or signal.default_int_handler(*at))\n"
        "pack_writer._Writer._record = lambda *_: os.write(1, b'here\\n') and stopped.wait(60)\n"
        f"from fewfire.cli.main import main\nmain(['pack', {str(hub)!r}, {str(tmp_path / 'pack')!r}])\n"
    )
    command = [sys.executable, "-c", script]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "here\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command goes on from here" in err and "Traceback" not in err, err
    command = [sys.executable, "-m", "fewfire", "pack", str(hub), str(tmp_path / "pack"), "--json"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(made.stdout)["resumed_bytes"] > 0 and "goes on where an earlier write stopped" in made.stderr
