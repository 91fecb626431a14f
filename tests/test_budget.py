"""The memory budget: what the planner counts is what the engine takes, and no process goes beyond what it was given."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_packs
import torch

import fewfire
from fewfire import kernels
from fewfire.checkpoints.pack import open_pack
from fewfire.cli.main import main
from fewfire.errors import BudgetError
from fewfire.plan import limits, resident
from fewfire.runtime.banks import StreamedExperts
from fewfire.runtime.engine import NativeDecoder
from fewfire.sizes import format_bytes

if kernels.supported_isas() == ["reference"]:
    pytest.skip("the extension is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


@pytest.mark.parametrize("name", tiny_packs.MODELS)
@pytest.mark.parametrize("cache", ("bf16", "q8"))
def test_pages_and_scratch_are_what_the_planner_counts(folder, name, cache):
    """Pages to the byte; of the workspace at least what is used, and not much more."""
    pack = open_pack(tiny_packs.make(folder, name, "q4"))
    decoder = NativeDecoder(pack, cache=cache)
    element = {"bf16": 2, "q8": 1}[cache]
    assert decoder.engine.page_bytes == resident.page_bytes(pack.config, element_bytes=element)
    decoder.hidden(torch.randint(0, tiny_packs.VOCAB, (1, 100)), decoder.new_cache())
    counted = resident.workspace_bytes(pack.config, 100, 128)
    assert 0.6 * counted <= decoder.engine.workspace_bytes <= counted + 4096 * 24


# ------------------------------------------------------------------------------------------------ whole processes

RUN = """
import sys, warnings
warnings.simplefilter("ignore")
import fewfire
from fewfire.plan.limits import peak_rss_bytes
model = fewfire.load(sys.argv[1], memory=int(sys.argv[2]), context=int(sys.argv[3]), threads=2)
prompt = [(7 * i) % 1000 for i in range(int(sys.argv[3]) - 8)]
made = model.generate(prompt, max_tokens=8)
print(peak_rss_bytes(), made.experts.misses, *made.token_ids)
"""


def run_process(path, budget, context, before=()):
    command = [*before, sys.executable, "-c", RUN, str(path), str(budget), str(context)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{format_bytes(budget)}: {done.stderr[-400:]} ({done.returncode})"
    peak, misses, *tokens = map(int, done.stdout.split())
    assert peak <= budget, f"{format_bytes(peak)} of {format_bytes(budget)}, context {context}"
    return misses, tokens


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A pack of some 230 MB, most of it experts."""
    path = tmp_path_factory.mktemp("wide") / "pack"
    with pytest.raises(SystemExit) as ended:
        main(["init", "olmoe-1b-7b", str(path), "--quant", "q4", "--layers", "1", "--seed", "1", "--json"])
    assert ended.value.code == 0
    return path


def floor_of(path, context):
    return fewfire.plan(str(path), context=context).floor.total


def test_a_process_stays_below_its_budget(wide):
    floor, seen = floor_of(wide, 300), set()
    for budget in (floor, floor + 40 * 2**20, floor + 2**30):
        misses, tokens = run_process(wide, budget, 300)
        seen.add(tuple(tokens))
    assert len(seen) == 1, "the same tokens whatever the budget"
    assert misses == 0, "all fits"


def test_what_the_planner_calls_the_floor_is_what_is_refused_below(wide, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(wide), "--context", "300", "--json"])
    assert ended.value.code == 0
    floor = json.loads(capsys.readouterr().out)["memory"]["floor_bytes"]
    command = [sys.executable, "-m", "fewfire", "generate", str(wide), "--prompt", "a", "--max-tokens", "1"]
    command += ["--threads", str(limits.usable_threads())]
    refused = subprocess.run([*command, "--context", "300", "--memory", str(floor - 1)], capture_output=True, text=True)
    assert refused.returncode == 1 and f"below the floor of {format_bytes(floor)} ({floor} bytes)" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "experts in flight" in refused.stderr
    subprocess.run([*command, "--context", "300", "--memory", str(floor)], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_budgets(wide):
    expected = {}
    for number in range(100):
        context = (40, 300, 1200)[number % 3]
        budget = floor_of(wide, context) + (number // 3) ** 2 * 400_000
        _, tokens = run_process(wide, budget, context)
        assert expected.setdefault(context, tokens) == tokens


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_large_vocabulary_stays_below_its_budget(tmp_path):
    """150,000 tokens: their tables must not come after the experts have taken what is left."""
    path, seen = tmp_path / "pack", set()
    with pytest.raises(SystemExit):
        main(["init", "qwen3-30b-a3b", str(path), "--quant", "q4", "--layers", "1", "--seed", "1", "--json"])
    command = [sys.executable, "-m", "fewfire", "generate", str(path), "--max-tokens", "8", "--json", "--threads", "2"]
    for more in (0, 8 * 2**20, 40 * 2**20):
        budget = floor_of(path, 4096) + more
        asked = [*command, "--prompt", "the router picks " * 150, "--memory", str(budget)]
        made = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        assert made["peak_rss_bytes"] <= budget
        seen.add(tuple(made["token_ids"]))
    assert len(seen) == 1


CGROUP = Path("/sys/fs/cgroup")


@pytest.fixture
def cgroup(request):
    """A memory cgroup of our own (v1 or v2), as a function that sets its limit and gives the command's beginning."""
    parent = CGROUP / "memory" if (CGROUP / "memory").is_dir() else CGROUP
    group = parent / f"fewfire-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if parent.name == "memory" else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(2**30))
    except OSError as error:
        shutil.rmtree(group, ignore_errors=True)
        pytest.skip(f"no memory cgroup can be made here ({error.strerror})")

    def enter(num_bytes):
        (group / limit).write_text(str(num_bytes))
        return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]

    yield enter
    group.rmdir()


def test_a_cgroup_a_tenth_larger_does_not_kill_it(wide, cgroup):
    floor = floor_of(wide, 300)
    for budget in (floor, floor + 60 * 2**20):
        run_process(wide, budget, 300, before=cgroup(budget * 11 // 10))


def test_the_default_budget_is_what_the_cgroup_leaves(wide, cgroup):
    limit = floor_of(wide, 300) + 200 * 2**20
    code = "from fewfire.runtime.budget import default_budget; print(default_budget())"
    done = subprocess.run([*cgroup(limit), sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.8 * limit <= int(done.stdout) <= 0.9 * limit


def test_experts_that_do_not_fit_stay_on_disk_and_a_text_too_long_is_refused(folder):
    pack = open_pack(tiny_packs.make(folder, "olmoe", "q4", times=6))
    decoder = NativeDecoder(pack)
    decoder.account.fixed_bytes = 2**20  # as if this process held nothing else
    decoder.set_budget(2**20 + resident.page_bytes(pack.config) + StreamedExperts.least_bytes_of(pack))
    assert isinstance(decoder.experts, StreamedExperts)
    cache = decoder.new_cache()
    with pytest.raises(BudgetError, match="take a shorter text"):
        decoder.hidden(torch.zeros(1, 2 * 64, dtype=torch.long), cache)


def test_pages_of_a_text_serve_the_next_one(folder):
    decoder = NativeDecoder(open_pack(tiny_packs.make(folder, "olmoe", "q4", times=6)))
    account, page = decoder.account, decoder.engine.page_bytes
    ids, expected = torch.randint(0, 100, (1, 100)), []
    for _ in range(2):
        cache = decoder.new_cache()
        expected.append(decoder(ids, cache))
        addresses = {each.data_ptr() for each in cache.sequences[0].pages}
        for each in cache.sequences[0].pages:
            each.fill_(0xFF)  # NaN: the next text must not see what this one left
        del cache
        assert account.taken_bytes == 0 and account.spare.num_bytes == 2 * page
    again = decoder.new_cache()
    assert torch.equal(decoder(ids, again), expected[0]) and torch.equal(*expected)
    assert {each.data_ptr() for each in again.sequences[0].pages} == addresses and account.spare.num_bytes == 0
    del again
    account.take(account.unused_bytes - page, "a test")
    assert account.spare.num_bytes == page, "what is taken is not kept twice"
    account.budget_bytes -= page
    account.take(0, "a test")
    assert account.spare.num_bytes == 0


def test_scratch_of_a_long_prompt_is_taken_from_experts_when_it_comes(wide):
    pack, least = open_pack(wide), resident.CHUNKS[-1]
    decoder = NativeDecoder(pack, budget_bytes=limits.rss_bytes() + pack.layout.trunk_bytes + 160 * 2**20)
    account, decoder._planned_chunk = decoder.account, 4 * least
    assert isinstance(decoder.experts, StreamedExperts) and decoder.chunk_tokens == 4 * least
    ids, cache = torch.randint(0, 1000, (1, 2 * least)), decoder.new_cache()
    decoder.hidden(ids[:, :least], cache)
    pages, before, wanted = account.taken_bytes, account.expert_bytes, decoder._missing_scratch(2 * least)
    assert pages == cache.sequences[0].num_bytes, "a small step has its scratch"
    del cache
    states = decoder.hidden(ids)
    assert account.taken_bytes == wanted > 0 and account.expert_bytes == before + pages - wanted
    decoder.logits(states)
    assert account.taken_bytes == wanted, "taken once"
    account.take(account.room, "a test")
    assert decoder.chunk_tokens == 2 * least, "for a longer step there is no room any more"
