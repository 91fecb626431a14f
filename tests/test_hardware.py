"""The catalogue, the user's own parts, this machine's profile and its probes."""

import json

import pytest

from fewfire.errors import ConfigError, FormatError
from fewfire.plan import here, limits, plan, probe
from fewfire.plan.hardware import load_catalogue, parse_hardware
from fewfire.plan.machine import rank
from fewfire.plan.memory import choose_formats
from fewfire.plan.rates import STEP_S, KernelRates
from fewfire.plan.stream import expected_layer_s
from fewfire.plan.workload import Workload

CATALOGUE = load_catalogue()


def test_8xh200_is_the_sxm_part():
    system = parse_hardware("8xH200", CATALOGUE)
    assert (system.part.name, system.count, system.nodes) == ("H200 SXM 141GB", 8, 1)
    assert parse_hardware("16 x h100", CATALOGUE).nodes == 2
    assert parse_hardware("H100 PCIe", CATALOGUE).part.link_gbs == 64


@pytest.mark.parametrize("part", CATALOGUE.parts, ids=lambda part: part.name)
def test_every_part_is_complete_and_found_by_its_names(part):
    assert part.usable_bytes > 0 and part.bandwidth_gbs > 0 and part.sources
    for name in (part.name, *part.aliases):
        assert CATALOGUE.find(name) is part
    assert set(part.sources) <= set(CATALOGUE.sources)


def test_traps_of_other_tables_are_not_in_ours():
    assert CATALOGUE.find("B200").memory_gb == 180 and CATALOGUE.find("B200").bandwidth_gbs == 8000
    assert CATALOGUE.find("MI325X").memory_gb == 256 and CATALOGUE.find("MI300X").bandwidth_gbs == 5300
    assert CATALOGUE.find("H100").bf16_tflops == 989  # dense, not 1979
    assert CATALOGUE.find("H100").link_gbs == 450  # one direction, not 900
    assert CATALOGUE.find("RTX 4090").fp8_tflops == 330.3


@pytest.mark.parametrize("text, words", [("H1000", "h100"), ("0xH100", "1 to 100000"), ("999999999xH100", "1 to")])
def test_unknown_and_absurd_hardware(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_hardware(text, CATALOGUE)


def test_users_extend_and_override_the_catalogue(tmp_path, monkeypatch):
    own = tmp_path / "mine.toml"
    own.write_text(
        '[[part]]\nname = "H100 SXM 80GB"\nprice_usd_per_hour = 1.0\n'
        '[[part]]\nname = "Ours"\nkind = "gpu"\nmemory_gb = 40\nbandwidth_gbs = 900\n'
    )
    monkeypatch.setenv("FEWFIRE_HARDWARE", str(own))
    catalogue = load_catalogue(own)
    assert catalogue.find("h100").price_usd_per_hour == 1.0 and catalogue.find("h100").bandwidth_gbs == 3350
    assert catalogue.find("ours").memory_gb == 40


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[part]]\nkind = 'gpu'", "no name"),
        ("[[part]]\nname = 'X'", "lacks kind, memory_gb, bandwidth_gbs"),
        ("[[part]]\nname = 'X'\nmemory = 3", "memory"),
        ("[[part]]\nname = 'H100 SXM 80GB'\nprice_usd_per_hour = 0", "above zero"),
        ("[[part]]\nname = 'H100 SXM 80GB'\nbandwidth_gbs = 'fast'", "must be a number"),
        ("[[part]\n", "not a TOML"),
        ("[[part]]\nname = 'H100 SXM 80GB'\nkernels = 1", "unknown key kernels"),
    ],
)
def test_a_bad_catalogue_is_one_line(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(FormatError, match=words) as caught:
        load_catalogue(path)
    assert "\n" not in str(caught.value) and "bad.toml" in str(caught.value)


def test_the_ranking_is_cheapest_first_and_everything_in_it_fits():
    made = plan("mixtral-8x7b", quant="q4")
    fitting = [machine for machine in made.machines if machine.fits]
    prices = [machine.usd_per_hour for machine in fitting if machine.usd_per_hour is not None]
    assert prices == sorted(prices) and len(prices) > 15
    names = {machine.system.part.name for machine in made.machines}
    assert {"Laptop 16GB", "Laptop 32GB", "Laptop 64GB"} <= names


def test_the_smallest_set_is_found():
    from fewfire.families import published

    config = published.load("deepseek-v3")
    work = Workload.of(config, choose_formats(config), 4096)
    counts = {system.part.name: (system.count, system.nodes) for system in rank(work, CATALOGUE.parts)}
    assert counts["H200 SXM 141GB"] == (8, 1) and counts["H100 SXM 80GB"] == (16, 2)
    assert "RTX 4090" not in counts  # no link between nodes that would carry it


# --------------------------------------------------------------------------------------------- this machine


def profile(**changes):
    values = {
        "host": "h", "date": "2026-01-01", "cpu": "c", "isa": ("avx2",), "cores": 4, "threads": 8,
        "ram_bytes": 32 * 2**30, "memory_limit_bytes": None, "ram_read_bytes_per_s": 40e9,
        "disk_read_bytes_per_s": 2e9, "disk_path": "/", "disk_direct": True,
        "float_ops_per_s": 5e11, "int8_ops_per_s": None,
    }  # fmt: skip
    return here.MachineProfile(**{**values, **changes})


def test_hardware_here_uses_the_stored_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWFIRE_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="fewfire doctor"):
        plan("olmoe-1b-7b", hardware="here")
    here.store_profile(profile())
    machine = plan("olmoe-1b-7b", quant="q4", hardware="here").machines[0]
    assert machine.fits and machine.decode.tokens_per_s > 10
    here.profile_path().write_text("{")
    with pytest.raises(FormatError, match="again"):
        plan("olmoe-1b-7b", hardware="here")
    here.profile_path().write_text(json.dumps({"isa": []}))
    with pytest.raises(FormatError, match="another version"):
        plan("olmoe-1b-7b", hardware="here")


def test_measured_kernels_take_the_place_of_peaks(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWFIRE_CACHE", str(tmp_path))
    slow = KernelRates({"bf16": ((1, 1e9),), "q4": ((1, 2e9), (64, 4e9))}, float_ops_per_s=1e10, fork_join_s=1e-5)
    made = {}
    for name, kernels in (("peaks", None), ("measured", slow)):
        here.store_profile(profile(kernels=kernels))
        assert here.load_profile() == profile(kernels=kernels)
        made[name] = plan("olmoe-1b-7b", quant="q4", hardware="here", memory="2GiB")
    measured, peaks = made["measured"].machines[0], made["peaks"].machines[0]
    for machine in (measured, peaks):
        assert machine.decode_range[0] <= machine.decode.tokens_per_s <= machine.decode_range[1] * (1 + 1e-9)
    assert measured.decode.seconds > peaks.decode.seconds and measured.decode.bound == "compute"
    assert measured.decode.launch_s == pytest.approx(16 * 10 * 1e-5 + STEP_S)
    assert measured.prefill.seconds > 512 / measured.prefill.tokens_per_s > 0
    # kernels so slow hide all reading
    assert made["measured"].budget_streaming.seconds == pytest.approx(measured.decode.seconds)
    here.store_profile(profile(kernels=slow))
    document = json.loads(here.profile_path().read_text())
    del document["kernels"]["product_ops_per_s"]["bf16"]
    here.profile_path().write_text(json.dumps(document))
    with pytest.raises(FormatError, match="another version"):
        here.load_profile()


def test_reads_of_a_layer_hide_behind_its_work():
    assert expected_layer_s(8, 0.0, 1.0, 3.0) == 3.0
    all_miss = expected_layer_s(8, 1.0, 1.0, 2.0)  # the disk, then down of the last one
    assert all_miss == pytest.approx(8 + 2 / 8 / 3)
    assert 3.0 < expected_layer_s(8, 0.5, 1.0, 3.0) < 8


def test_a_cgroup_limit_bounds_this_machine():
    part = profile(memory_limit_bytes=8 * 2**30).part()
    assert part.usable_bytes == 8 * 2**30


def test_the_tightest_cgroup_limit_counts(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for folder, text in (("a", "1000000"), ("a/b", "max")):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "memory.max").write_text(text)
    assert limits.memory_limit(tmp_path) == 1_000_000
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n")
    (tmp_path / "sys/fs/cgroup/memory/c").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/c/memory.limit_in_bytes").write_text("9223372036854771712")
    assert limits.memory_limit(tmp_path) is None
    assert limits.memory_limit(tmp_path / "nowhere") is None


def test_what_a_cgroup_leaves_is_free_but_for_file_pages(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 5000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    assert limits.free_bytes(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("3000000")
    (group / "memory.current").write_text("2000000")
    (group / "memory.stat").write_text("anon 1500000\nfile 500000\n")
    assert limits.free_bytes(tmp_path) == 1_500_000
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/c\n")
    old = tmp_path / "sys/fs/cgroup/memory/c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000000")
    (old / "memory.usage_in_bytes").write_text("1900000")
    (old / "memory.stat").write_text("total_inactive_file 400000\ntotal_active_file 100000\n")
    assert limits.free_bytes(tmp_path) == 600_000


def test_cpuinfo_is_read_by_our_names():
    text = (
        "model name : Some CPU\nflags : fpu avx2 fma avx512f avx512_vnni\nphysical id : 0\ncore id : 0\n\n"
        "model name : Some CPU\nflags : fpu\nphysical id : 0\ncore id : 1\n"
    )
    assert probe.read_cpuinfo(text) == ("Some CPU", ("avx2", "fma", "avx512", "avx512_vnni"), 2)


def test_probes_give_sane_figures(tmp_path):
    assert 1e8 < probe.probe_ram(1, 64 * 2**20, seconds=0.1) < 1e13
    assert probe.probe_float(1, seconds=0.1) > 1e7
    disk = probe.probe_disk(tmp_path, seconds=0.2)
    assert disk is not None and disk[0] > 1e6
    assert probe.probe_disk(tmp_path / "absent", seconds=0.1) is None
    assert list(tmp_path.iterdir()) == []
