"""Experts on disk: the same values whatever is in memory, faults named, a budget that is kept."""

import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_packs
import torch

import fewfire
from fewfire import kernels
from fewfire.checkpoints.pack import EXPERTS, TRUNK, open_pack
from fewfire.errors import BudgetError, ConfigError, FormatError
from fewfire.runtime.banks import ResidentExperts, StreamedExperts, Streaming
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.packed import experts_of, load_pack, load_packed_module

if kernels.supported_isas() == ["reference"]:
    pytest.skip("the extension is not built", allow_module_level=True)

MOES = [name for name, config in tiny_packs.MODELS.items() if config.moe_layers]
POLICIES = ("lru", "lfru", "s3fifo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


def draw_ids(*shape, seed=0):
    return torch.randint(0, tiny_packs.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def streamed(pack, slots, **settings):
    """A decoder whose experts have so many slots."""
    decoder = NativeDecoder(pack)
    records = max(layer.record_bytes for layer in pack.layout.experts)
    decoder.lowered.leave_embedding_on_disk()
    decoder.use(StreamedExperts(pack, slots * records, Streaming(**settings)))
    decoder.account.experts = None  # what texts need is not taken from these slots
    return decoder


def run(decoder, ids, parts=(40, 1, 1, 1, 30, 1, 1, 5)):
    cache = decoder.new_cache()
    return torch.cat([decoder(part, cache) for part in ids.split(parts, dim=1)], dim=1)


@pytest.mark.parametrize("name", MOES)
def test_values_do_not_depend_on_where_experts_are(folder, name):
    pack = open_pack(tiny_packs.make(folder, name, "q4", times=3))
    ids, records = draw_ids(2, 80), sum(layer.num_experts for layer in pack.layout.experts)
    resident = NativeDecoder(pack)
    assert isinstance(resident.experts, ResidentExperts)
    expected = run(resident, ids)
    for number, slots in enumerate((2, 3, 5, records // 2, records)):
        settings = dict(policy=POLICIES[number % 3], num_readers=1 + number % 3, lookahead=number % 2 == 1)
        decoder = streamed(pack, slots, **settings, direct=None if number else False)
        assert torch.equal(run(decoder, ids), expected), (slots, settings)
        counts = decoder.experts.counts()
        wanted = resident.experts.counts().total.hits
        assert counts.total.hits + counts.total.misses == wanted
        assert slots < records or counts.total.misses == counts.bytes_read // pack.layout.experts[0].record_bytes


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_values_do_not_depend_on_threads(folder, threads):
    pack = open_pack(tiny_packs.make(folder, "qwen3_moe", "q4", times=3))
    ids, before = draw_ids(1, 80), torch.get_num_threads()
    expected = run(NativeDecoder(pack), ids)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(run(streamed(pack, 3), ids), expected)
    finally:
        torch.set_num_threads(before)


def test_the_number_of_slots_changes_while_running(folder):
    pack = open_pack(tiny_packs.make(folder, "mixtral", "q4", times=3))
    ids, decoder = draw_ids(1, 80), streamed(pack, 4, lookahead=True)
    expected, cache = NativeDecoder(pack)(ids), decoder.new_cache()
    made = []
    for number, part in enumerate(ids.split(4, dim=1)):
        made.append(decoder(part, cache))
        decoder.experts.fit((2, 6, 3, 5)[number % 4] * decoder.experts.slot_bytes)
    assert torch.equal(torch.cat(made, dim=1), expected)


def resident_bytes(memory):
    """What the mapping of a tensor's memory holds, by the kernel's account."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= memory.data_ptr() < end
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is not listed")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_slots_get_their_pages_ahead_of_use_and_give_them_back(folder):
    pack = open_pack(tiny_packs.make(folder, MOES[0], "f32", times=3))
    records = sum(layer.num_experts for layer in pack.layout.experts)
    decoder = streamed(pack, records)
    experts = decoder.experts
    probed = resident_bytes(experts._memory)  # where reads went when the file was opened
    assert experts.untouched_bytes <= experts.num_bytes <= experts.untouched_bytes + probed <= experts.num_bytes + 2**21
    decoder(draw_ids(1, 1))
    until = time.monotonic() + 20
    while experts.untouched_bytes > 0 and time.monotonic() < until:
        time.sleep(0.01)
    if experts.untouched_bytes > 0:
        pytest.skip("this kernel makes no pages ahead")
    assert experts.has_empty_slots and resident_bytes(experts._memory) >= experts.num_bytes
    experts.fit(experts.least_bytes)
    assert resident_bytes(experts._memory) <= experts.num_bytes + 2 * 2**21
    assert experts.untouched_bytes == 0


def test_a_hot_set_is_there_from_the_start(folder):
    pack = open_pack(tiny_packs.make(folder, "olmoe", "q4", times=3))
    every = [(0, expert) for expert in range(6)]
    decoder = streamed(pack, 12, hot=every)
    assert torch.equal(decoder(draw_ids(1, 80)), NativeDecoder(pack)(draw_ids(1, 80)))
    counts = decoder.experts.counts()
    assert [layer.misses for layer in counts.layers] == [0, 6, 6]


def test_a_hot_set_of_another_model_is_refused(folder):
    pack = open_pack(tiny_packs.make(folder, "olmoe"))
    for wrong in ((0, pack.layout.experts[0].num_experts), (len(pack.layout.experts), 0), (-1, 0)):
        with pytest.raises(ConfigError, match=f"expert {wrong[1]} of layer {wrong[0]}"):
            streamed(pack, 12, hot=[(0, 0), wrong])


@pytest.mark.parametrize("name", tiny_packs.HYBRIDS)
def test_torch_runs_around_native_experts(folder, name):
    path, ids = tiny_packs.make(folder, name), draw_ids(1, 40)

    def run_it(module):
        with torch.inference_mode():
            return module.teacher_forced(ids, draw_ids(1, 9, seed=1)) if name == "switch" else module(ids)

    with pytest.warns(UserWarning, match="runs on torch, but for its experts"):
        module = load_pack(path)
    assert isinstance(experts_of(module), ResidentExperts)
    ours, expected = run_it(module), run_it(load_packed_module(path))
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 1e-2
    pack = open_pack(path)
    few = StreamedExperts(pack, 3 * pack.layout.experts[0].record_bytes)
    layers = dict(module.named_modules())
    for number, held in enumerate(pack.layout.experts):
        layer = layers[held.prefix.removesuffix(".experts.")]
        on_input = layer.config.router.weight_on == "input"
        layer.experts = few.bank(number, layer.config.expert, weight_on_input=on_input)
    assert torch.equal(run_it(module), ours) and few.counts().total.misses > 3


# ------------------------------------------------------------------------------------------- the embedding's rows


@pytest.mark.parametrize("quant", ("q4", "bf16", "f32"))
@pytest.mark.parametrize("name", tiny_packs.MODELS)
def test_an_embedding_on_disk_gives_the_same(folder, name, quant):
    pack = open_pack(tiny_packs.make(folder, name, quant))
    ids, decoder = draw_ids(1, 80), NativeDecoder(pack)
    expected, trunk = run(decoder, ids), decoder.lowered.trunk
    freed = decoder.lowered.leave_embedding_on_disk()
    assert (freed == 0) == pack.config.tied_head and freed % 4096 == 0
    assert trunk.in_memory.numel() + freed <= trunk.memory.numel()
    assert decoder.lowered.leave_embedding_on_disk() == 0, "once"
    decoder.use(decoder.experts)
    assert torch.equal(run(decoder, ids), expected)
    if freed:
        assert trunk.memory[trunk.on_disk.start : trunk.on_disk.stop].count_nonzero() == 0, "no one reads it in memory"


@pytest.mark.parametrize("quant", ("q4", "f32"))
def test_rows_that_are_damaged_or_gone_are_named(folder, tmp_path, quant):
    path = shutil.copytree(tiny_packs.make(folder, "olmoe", quant), tmp_path / "pack")
    decoder = streamed(open_pack(path), 3)
    decoder(torch.tensor([[21, 40]]))
    row, file = decoder.lowered.trunk.on_disk.spec, path / TRUNK
    at = row["codes"] + 21 // row["block_rows"] * row["code_bytes"] + 5
    with file.open("r+b") as damaged:
        damaged.seek(at)
        byte = damaged.read(1)
        damaged.seek(at)
        damaged.write(bytes([byte[0] ^ 4]))
    decoder(torch.tensor([[40]]))
    with pytest.raises(FormatError, match="embed.weight, row 21") as found:
        decoder(torch.tensor([[40, 21]]))
    assert found.value.offset == at - 5 and str(file) in str(found.value)
    with file.open("r+b") as cut:
        cut.truncate(at)
    with pytest.raises(FormatError, match="the file ends here"):
        decoder(torch.tensor([[21]]))


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def copy(folder, tmp_path):
    """A pack of its own, to be damaged."""
    return shutil.copytree(tiny_packs.make(folder, "mixtral", "q4", times=3), tmp_path / "pack")


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("slots", (3, 6))  # in order, through a window; and as they come, `down` last
@pytest.mark.parametrize("part", (("gate", "codes"), ("down", "codes"), ("down", "scales")))
def test_a_flipped_bit_is_named(copy, slots, part):
    pack = open_pack(copy)
    layer = pack.layout.experts[0]
    at = next(each.offset for each in layer.parts if (each.name, each.kind) == part)
    flip(copy / EXPERTS, layer.record_offset(2) + at + 100)
    decoder = streamed(pack, slots)
    for _ in range(2):  # the model stays usable, and the record stays refused
        with pytest.raises(FormatError, match=r"experts.bin: layers.0.ffn.experts\[2\]: byte \d+: is not what was"):
            decoder(draw_ids(1, 60))


def test_a_file_that_ends_early_is_named(copy):
    pack = open_pack(copy)
    decoder, last = streamed(pack, 3), pack.layout.experts[-1]
    with open(copy / EXPERTS, "r+b") as file:
        file.truncate(last.record_offset(last.num_experts - 1) + 10)
    with pytest.raises(FormatError, match=r"experts.bin: layers.\d.ffn.experts\[5\]: byte \d+: the file ends here"):
        decoder(draw_ids(1, 60))


def test_a_file_that_is_written_to_while_it_is_used_gives_no_wrong_token(copy):
    pack = open_pack(copy)
    decoder = streamed(pack, 2)
    expected = decoder(draw_ids(1, 60))  # every record was read, and compared
    assert torch.equal(decoder(draw_ids(1, 60)), expected)
    flip(copy / EXPERTS, pack.layout.experts[0].record_offset(0) + 5)
    with pytest.raises(FormatError, match=r"experts\[0\].*is not what was written"):
        decoder(draw_ids(1, 60))
    flip(copy / EXPERTS, pack.layout.experts[0].record_offset(0) + 5)
    assert torch.equal(decoder(draw_ids(1, 60)), expected), "as it was: it may be used"


def test_another_file_in_its_place_changes_nothing(copy):
    pack = open_pack(copy)
    decoder, expected = streamed(pack, 2), NativeDecoder(pack)(draw_ids(1, 60))
    (copy / "other").write_bytes(bytes(pack.layout.expert_bytes))
    (copy / "other").replace(copy / EXPERTS)
    assert torch.equal(decoder(draw_ids(1, 60)), expected)


FAULTY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
typedef ssize_t (*Pread)(int, void*, size_t, off_t);
static ssize_t faulty(const char* name, int file, void* to, size_t count, off_t offset) {
    static int calls;
    Pread real = (Pread)dlsym(RTLD_NEXT, name);
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) < 0) path[0] = 0;
    if (!strstr(path, getenv("FAULT_FILE"))) return real(file, to, count, offset);
    int call = __sync_fetch_and_add(&calls, 1);
    if (getenv("FAULT_EINTR") && call % 3 == 0) { errno = EINTR; return -1; }
    size_t some = call % 4 == 0 ? 1000 : 4096 + call % 5 * 777;
    if (getenv("FAULT_SHORT") && some < count) count = some;
    if (getenv("FAULT_EIO") && call > atoi(getenv("FAULT_EIO"))) { errno = EIO; return -1; }
    return real(file, to, count, offset);
}
ssize_t pread(int file, void* to, size_t count, off_t offset) { return faulty("pread", file, to, count, offset); }
ssize_t pread64(int file, void* to, size_t count, off_t offset) { return faulty("pread64", file, to, count, offset); }
"""
FAULTY_RUN = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import test_streaming as t
from fewfire.checkpoints.pack import open_pack
from fewfire.errors import FormatError
pack = open_pack(sys.argv[1])
direct = {"direct": True, "buffered": False}[sys.argv[3]]
try:
    made = t.run(t.streamed(pack, 3, direct=direct), t.draw_ids(1, 80))
    torch.save(made, sys.argv[4])
except FormatError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler, and LD_PRELOAD")
@pytest.mark.parametrize("access", ("direct", "buffered"))
@pytest.mark.parametrize("fault", ("FAULT_SHORT", "FAULT_EINTR", "FAULT_EIO"))
@pytest.mark.parametrize(
    ("file", "good_reads", "record"), [(EXPERTS, 40, "experts["), (TRUNK, 150, "embed.weight, row")]
)
def test_readers_that_fall_short_or_fail(folder, tmp_path, file, good_reads, record, fault, access):
    """Short and interrupted reads are gone on with; an error of the disk is named."""
    (tmp_path / "faulty.c").write_text(FAULTY)
    library = tmp_path / "faulty.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "faulty.c", "-ldl"], check=True)
    path = tiny_packs.make(folder, "mixtral", "q4", times=3)
    here = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", FAULTY_RUN, str(path), here, access, str(tmp_path / "made.pt")]
    environment = {"PATH": "/usr/bin:/bin", "LD_PRELOAD": str(library), fault: str(good_reads), "FAULT_FILE": file}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if fault == "FAULT_EIO":
        assert record in done.stdout and f"({errno_text()}); check the disk" in done.stdout
    else:
        assert torch.equal(torch.load(tmp_path / "made.pt"), run(NativeDecoder(open_pack(path)), draw_ids(1, 80)))


def errno_text():
    import os

    return os.strerror(errno.EIO)


# ---------------------------------------------------------------------------------------------------------- budget


def test_below_the_floor_is_refused_with_the_table(folder):
    path = tiny_packs.make(folder, "olmoe", "q4", times=3)
    with pytest.raises(BudgetError, match=r"below the floor of .* \(\d+ bytes\): process") as caught:
        fewfire.load(path, memory="64MiB")
    assert set(caught.value.needs) == {"process", "tokenizer", "trunk", "kv cache", "experts in flight", "scratch"}
    assert fewfire.plan(path, quant="q4").floor.total > 200 * 2**20


def test_what_makes_no_sense_is_refused(folder):
    path = tiny_packs.make(folder, "olmoe", "q4", times=3)
    for options, message in [
        ({"memory": "8G"}, "8GiB, 512MB"),
        ({"cache": "q4"}, "not one of bf16, q8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fewfire.load(path, **options)
    with pytest.raises(ConfigError, match="not one of lru"):
        Streaming(policy="fifo")
    with pytest.raises(ConfigError, match="num_readers"):
        Streaming(num_readers=0)


def test_texts_take_memory_from_experts_and_give_it_back(folder):
    pack = open_pack(tiny_packs.make(folder, "mixtral", "q4", times=3))
    decoder = streamed(pack, 12)
    account, page = decoder.account, decoder.engine.page_bytes
    account.experts = decoder.experts
    account.fixed_bytes = account.budget_bytes - 12 * decoder.experts.slot_bytes
    cache = decoder.new_cache()
    decoder.hidden(draw_ids(1, 100), cache)
    assert account.taken_bytes == 2 * page and decoder.experts.slots == 12 - -(-2 * page // decoder.experts.slot_bytes)
    with pytest.raises(BudgetError, match="the cache of a text of 10000 tokens needs"):
        cache.sequences[0].reserve(10_000)
    del cache
    assert account.taken_bytes == 0
    decoder(draw_ids(1, 1))
    assert account.spare.num_bytes <= account.unused_bytes
    assert decoder.experts.slots >= 4


def test_settings_without_effect_are_named(folder, recwarn):
    path = tiny_packs.make(folder, "mixtral", "q4", times=3)
    fewfire.load(path, streaming=Streaming())
    assert not recwarn
    with pytest.warns(UserWarning, match="no experts are on disk: policy, lookahead has no effect"):
        fewfire.load(path, streaming=Streaming(policy="lru", lookahead=True))


def test_the_budget_changes_while_running(folder):
    model = fewfire.load(tiny_packs.make(folder, "mixtral", "q4", times=3))
    expected = model.generate([1, 2, 3], max_tokens=8).token_ids
    account, record = model.module.account, model.module.pack.layout.experts[0].record_bytes
    held, page = account.fixed_bytes + account.taken_bytes, model.module.engine.page_bytes
    embedding = 2 * 4096  # goes to disk, which leaves room for experts
    model.set_memory(held + page + 5 * record - embedding)
    assert isinstance(model.module.experts, StreamedExperts) and 5 <= model.module.experts.slots < 9
    used = model.generate([1, 2, 3], max_tokens=8)
    assert used.token_ids == expected and used.experts.misses > 0 and used.experts.bytes_read > 0
    with pytest.raises(BudgetError, match="below the floor"):
        model.set_memory(held)
    model.set_memory(held + 2**30)
    model.generate([1, 2, 3], max_tokens=8)
    again = model.generate([1, 2, 3], max_tokens=8)
    assert again.token_ids == expected and again.experts.hit_rate == 1.0
