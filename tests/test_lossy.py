"""Lossy modes: nothing changes without them, each follows its plain definition, and what they cost is measured."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiny_packs
import torch

import fewfire
from fewfire import kernels
from fewfire.checkpoints.pack import EXPERTS, open_pack
from fewfire.checkpoints.pack_writer import write_pack
from fewfire.cli.main import main
from fewfire.config import MoEConfig
from fewfire.errors import BudgetError, ConfigError, FormatError
from fewfire.model.router import route
from fewfire.plan.memory import choose_formats
from fewfire.runtime.agreement import MOST_POSITIONS, Agreement, LossyGeneration
from fewfire.runtime.banks import StreamedExperts, Streaming
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.generate import Generation, Limits
from fewfire.runtime.lossy import Lossy, MeanRange, keep_top_p, route_cached_first
from fewfire.runtime.low import LowPrecision
from fewfire.runtime.packed import load_pack
from fewfire.tokenizer import train_bpe

if kernels.supported_isas() == ["reference"]:
    pytest.skip("the extension is not built", allow_module_level=True)

MOES = [name for name, config in tiny_packs.MODELS.items() if config.moe_layers]
ONE_LAYER = ("olmoe", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4", "dbrx")
LOW = ("olmoe", "gpt_oss", "deepseek_v3", "relu")
LOSSLESS = Lossy(prefer_cached=0.0, top_p=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


def draw_ids(*shape, seed=0):
    return torch.randint(0, tiny_packs.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def streamed(pack, slots, lossy=None, **settings):
    decoder = NativeDecoder(pack, lossy=lossy)
    decoder.account.experts = None
    if lossy is not None and lossy.low_precision is not None:
        decoder._open_low()
    records = max(layer.record_bytes for layer in pack.layout.experts)
    settings.setdefault("direct", False)  # no probe of the disk
    decoder.use(StreamedExperts(pack, slots * records, Streaming(**settings)))
    decoder.account.experts = None
    return decoder


def decode(decoder, ids, prompt=8, observe=None):
    """Logits of all tokens: a prompt, then one token at a time."""
    cache = decoder.new_cache()
    parts = ids.split([prompt, *[1] * (ids.shape[1] - prompt)], dim=1)
    return torch.cat([decoder(part, cache, observe=observe) for part in parts], dim=1)


def routers(decoder):
    """(RouterConfig, select_bias) of each MoE layer."""
    found = {}
    for number, layer in enumerate(decoder.config.layers):
        if isinstance(layer.ffn, MoEConfig):
            name, trunk = f"layers.{number}.ffn.router.select_bias", decoder.lowered.trunk
            found[number] = layer.ffn.router, trunk.values(name) if name in trunk else None
    return found


# -------------------------------------------------------------------------------------------------------------- off


@pytest.mark.parametrize("name", ("olmoe", "deepseek_v3", "gpt_oss"))
def test_off_is_exact(folder, name):
    pack, ids = open_pack(tiny_packs.make(folder, name, "q4", times=3)), draw_ids(1, 40)
    expected = decode(NativeDecoder(pack), ids)
    for slots in (4, 9):
        decoder = streamed(pack, slots, LOSSLESS)
        assert decoder.lossy is None and decoder.invariant_reason is None
        assert torch.equal(decode(decoder, ids), expected)
    everything = Lossy(prefer_cached=0.7, top_p=0.4)
    decoder = streamed(pack, 4, everything)
    with decoder.exactly():
        assert torch.equal(decode(decoder, ids), expected), "modes that rest change nothing"
    assert not torch.equal(decode(decoder, ids), expected)


def test_off_says_nothing(folder):
    model = fewfire.load(tiny_packs.make(folder, "olmoe", "q4", times=3), lossy=LOSSLESS)
    result = model.generate([1, 2, 3], max_tokens=4)
    assert result.lossy is None and result.invariant and result.invariant_reason is None
    assert type(model.stream([1], max_tokens=1).generation) is Generation


# ------------------------------------------------------------------------------------------------------------ top-p


@pytest.mark.parametrize("top_p", (1e-6, 0.5, 0.8, 0.99))
@pytest.mark.parametrize("name", MOES)
def test_top_p_is_its_definition(folder, name, top_p):
    pack, ids = open_pack(tiny_packs.make(folder, name, "q4")), draw_ids(1, 24)
    decoder, seen = NativeDecoder(pack, lossy=Lossy(top_p=top_p)), []
    logits = decode(decoder, ids, observe=lambda layer, routing: seen.append((layer, routing)))
    for layer, routing in seen:
        router, bias = routers(decoder)[layer]
        expected = keep_top_p(route(routing.logits_TE, router, bias), router, top_p)
        assert torch.equal(routing.ids_TK, expected.ids_TK) and torch.equal(routing.kept_TK, expected.kept_TK)
        # The sum of K weights and one division: a few roundings of float32.
        torch.testing.assert_close(routing.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-6)
        if top_p < 0.01:
            assert bool((routing.kept_TK.sum(dim=1) == 1).all())
        if router.renormalize or router.score == "softmax_selected":
            total = torch.full((len(routing.ids_TK),), router.scale)
            torch.testing.assert_close(routing.weights_TK.sum(dim=1), total, rtol=1e-5, atol=1e-6)
    if top_p == 0.5:  # a rule of the token alone: neither chunks, nor batches, nor where experts are change it
        assert torch.equal(NativeDecoder(pack, lossy=Lossy(top_p=top_p))(ids), logits)
        records = pack.layout.experts[0].num_experts
        assert torch.equal(decode(streamed(pack, records // 2, Lossy(top_p=top_p), lookahead=True), ids), logits)


def test_top_p_runs_fewer_experts(folder):
    pack = open_pack(tiny_packs.make(folder, "dbrx", "q4"))
    calls = []
    for top_p in (1.0, 0.6, 1e-6):
        decoder = NativeDecoder(pack, lossy=Lossy(top_p=top_p))
        decode(decoder, draw_ids(1, 48))
        calls.append(decoder.experts.counts().total.hits)
    assert calls[0] > calls[1] > calls[2]


# --------------------------------------------------------------------------------------------------- cached experts


@pytest.mark.parametrize("strength", (0.05, 0.3, 1.0))
@pytest.mark.parametrize("name", ONE_LAYER)
def test_preferring_cached_experts_is_its_definition(folder, name, strength):
    pack, ids = open_pack(tiny_packs.make(folder, name, "q4")), draw_ids(1, 40)
    router_layers = [number for number, layer in enumerate(pack.config.layers) if isinstance(layer.ffn, MoEConfig)]
    assert len(router_layers) == 1, "what is in memory before a step is what the router sees"
    decoder = streamed(pack, 3, Lossy(prefer_cached=strength))
    router, bias = routers(decoder)[router_layers[0]]
    mean, cache, changed = MeanRange(), decoder.new_cache(), 0
    decoder(ids[:, :8], cache, observe=lambda layer, made: check_exact(made, router, bias))
    for token in ids[:, 8:].split(1, dim=1):
        cached = torch.zeros(router.num_experts, dtype=torch.bool)
        cached[[expert for _, expert in decoder.experts.source.residents()]] = True
        seen = []
        decoder(token, cache, observe=lambda layer, routing, seen=seen: seen.append(routing))
        expected = route_cached_first(seen[0].logits_TE, router, cached, strength, mean, bias)
        assert torch.equal(seen[0].ids_TK, expected.ids_TK)
        torch.testing.assert_close(seen[0].weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-6)
        exact = route(seen[0].logits_TE, router, bias)
        assert int(exact.ids_TK[0, 0]) in seen[0].ids_TK[0].tolist(), "the best expert stays"
        changed += not torch.equal(seen[0].ids_TK.sort().values, exact.ids_TK.sort().values)
    assert changed > 0 or router.top_k == 1 or strength < 0.3


def check_exact(routing, router, bias):
    expected = route(routing.logits_TE, router, bias)
    assert torch.equal(routing.ids_TK, expected.ids_TK), "prompts are read exactly"


@pytest.mark.parametrize("name", ("olmoe", "mixtral", "deepseek_v3"))
def test_preferring_cached_experts_raises_the_hit_rate(folder, name):
    pack, ids = open_pack(tiny_packs.make(folder, name, "q4", times=3)), draw_ids(1, 80)
    rates = []
    for strength in (None, 0.2, 1.0):
        decoder = streamed(pack, 9, None if strength is None else Lossy(prefer_cached=strength))
        decode(decoder, ids)
        total = decoder.experts.counts().total
        rates.append(total.hits / (total.hits + total.misses))
    assert rates[0] < rates[1] < rates[2]


def test_preferring_cached_experts_is_deterministic_and_per_text(folder):
    """The same calls give the same values on any number of threads, batches of texts included."""
    pack, ids, before = (
        open_pack(tiny_packs.make(folder, "olmoe", "q4", times=3)),
        draw_ids(3, 40),
        torch.get_num_threads(),
    )
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(decode(streamed(pack, 9, Lossy(prefer_cached=0.5), num_readers=threads), ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], decode(NativeDecoder(pack), ids))


def test_where_all_experts_are_in_memory_there_is_nothing_to_prefer(folder):
    pack, ids = open_pack(tiny_packs.make(folder, "olmoe", "q4", times=3)), draw_ids(1, 30)
    assert torch.equal(
        decode(NativeDecoder(pack, lossy=Lossy(prefer_cached=1.0)), ids), decode(NativeDecoder(pack), ids)
    )


# ---------------------------------------------------------------------------------------------------- low precision


def both(folder, name, times=3):
    """A q8 pack and a q4 one of the same model."""
    high, low = folder / f"{name}-high-{times}", tiny_packs.make(folder, name, "q4", times=times)
    if not high.exists():
        config = tiny_packs.MODELS[name]
        module = tiny_packs.draw(replace(config, layers=times * config.layers))
        write_pack(high, tiny_packs.ModuleSource(module), choose_formats(module.config, "q4", experts="q8"))
    return open_pack(high), low


def settle(decoder):
    """Wait until all that is being read is there."""
    before = -1
    while before != (before := decoder.experts.counts().bytes_read):
        time.sleep(0.02)


BLOCKING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>
volatile int blocks = 0;
typedef ssize_t (*Pread)(int, void*, size_t, off_t);
static ssize_t wait_for(const char* name, int file, void* to, size_t count, off_t offset) {
    while (blocks) usleep(1000);
    return ((Pread)dlsym(RTLD_NEXT, name))(file, to, count, offset);
}
ssize_t pread(int file, void* to, size_t count, off_t offset) { return wait_for("pread", file, to, count, offset); }
ssize_t pread64(int file, void* to, size_t count, off_t offset) { return wait_for("pread64", file, to, count, offset); }
"""
BLOCKED_RUN = """
import ctypes, sys, torch
sys.path.insert(0, sys.argv[1])
import test_lossy as t
blocks = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[2]), "blocks")
for high, low in zip(sys.argv[3::2], sys.argv[4::2]):
    decoder = t.streamed(t.open_pack(high), 5, t.Lossy(low_precision=low), num_readers=1)
    expected = t.decode(t.NativeDecoder(t.open_pack(low)), t.draw_ids(1, 30), prompt=1)
    blocks.value = 1
    made = t.decode(decoder, t.draw_ids(1, 30), prompt=1)
    counts = decoder.experts.counts()
    blocks.value = 0
    assert torch.equal(made, expected), high
    assert counts.total.hits == 0 and counts.substituted == counts.total.misses > 0, counts
    assert counts.bytes_read == 0 and counts.stall_s == 0, counts
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler, and LD_PRELOAD")
def test_with_a_disk_that_does_not_answer_the_low_pack_runs(folder, tmp_path):
    """The same trunk with the low pack's experts is what a decoder runs that finds none of its own; it never waits."""
    (tmp_path / "blocking.c").write_text(BLOCKING)
    library = tmp_path / "blocking.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "blocking.c", "-ldl"], check=True)
    packs = [str(path) for name in LOW for path in (both(folder, name)[0].folder, both(folder, name)[1])]
    command = [sys.executable, "-c", BLOCKED_RUN, __file__.rpartition("/")[0], str(library), *packs]
    environment = {"PATH": "/usr/bin:/bin", "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_what_was_missing_is_there_the_next_time(folder):
    """One token again and again: first from copies, then, once read, from the pack's own records."""
    high, low = both(folder, "olmoe")
    decoder = streamed(high, 18, Lossy(low_precision=low))
    ids, expected = draw_ids(1, 1), NativeDecoder(high)(draw_ids(1, 1))
    first = decoder(ids)
    assert torch.equal(first, NativeDecoder(open_pack(low))(ids)) or decoder.experts.counts().substituted < 6
    for _ in range(8):
        settle(decoder)
        made = decoder(ids)
    assert torch.equal(made, expected)
    before = decoder.experts.counts()
    assert torch.equal(decoder(ids), expected)
    after = decoder.experts.counts().since(before)
    assert after.substituted == 0 and after.total.misses == 0 and after.bytes_read == 0


@pytest.mark.parametrize("slots", (4, 7, 11))
def test_copies_and_records_mix_and_prompts_stay_exact(folder, slots):
    high, low = both(folder, "qwen3_moe")
    ids, exact = draw_ids(1, 120), NativeDecoder(high)
    decoder = streamed(high, slots, Lossy(low_precision=low), num_readers=2)
    assert torch.equal(decoder(ids[:, :40]), exact(ids[:, :40]))
    assert decoder.experts.counts().substituted == 0
    made, expected = decode(decoder, ids, prompt=40), decode(exact, ids, prompt=40)
    coarse = decode(NativeDecoder(open_pack(low)), ids, prompt=40)
    counts = decoder.experts.counts()
    assert torch.equal(made[:, :40], expected[:, :40]) and counts.substituted > 0
    assert counts.total.hits + counts.total.misses == sum(2 for _ in range(80)) * 3 + distinct(exact, ids[:, :40])
    assert float((made - expected).norm()) < 1.5 * float((coarse - expected).norm())
    with decoder.exactly():
        assert torch.equal(decode(decoder, ids, prompt=40), expected)


def distinct(decoder, ids):
    """Experts that two readings of a prompt want."""
    before = decoder.experts.counts()
    decoder(ids)
    return 2 * decoder.experts.counts().since(before).total.hits


def test_a_damaged_record_is_named_though_a_copy_stood_in(folder, tmp_path):
    high, low = both(folder, "olmoe")
    copy = open_pack(shutil.copytree(high.folder, tmp_path / "pack"))
    layer = copy.layout.experts[0]  # of one layer only: reads race with copies, any layer could be found first
    for expert in range(layer.num_experts):
        with open(copy.folder / EXPERTS, "r+b") as file:
            file.seek(layer.record_offset(expert) + 9)
            byte = file.read(1)[0]
            file.seek(layer.record_offset(expert) + 9)
            file.write(bytes([byte ^ 1]))
    decoder, ids = streamed(copy, 18, Lossy(low_precision=low)), draw_ids(1, 1)
    with pytest.raises(FormatError, match=r"pack/experts.bin: layers.0.ffn.experts\[\d\]: byte \d+: is not what was"):
        for _ in range(4):
            decoder(ids)
            settle(decoder)


def test_a_low_precision_pack_of_another_model_is_refused(folder, tmp_path):
    high, low = both(folder, "olmoe")
    other = tiny_packs.make(folder, "mixtral", "q4", times=3)
    with pytest.raises(ConfigError, match="is not a pack of the same model: its config.json differs"):
        fewfire.load(high.folder, lossy=Lossy(low_precision=other))
    module = tiny_packs.draw(replace(tiny_packs.MODELS["olmoe"], layers=3 * tiny_packs.MODELS["olmoe"].layers))
    with torch.no_grad():
        module.get_parameter("layers.0.ffn.router.weight").mul_(-1)
    write_pack(tmp_path / "tuned", tiny_packs.ModuleSource(module), choose_formats(module.config, "q4"))
    with pytest.raises(ConfigError, match="not a pack of the same model: layers.0.ffn.router.weight differs"):
        fewfire.load(high.folder, lossy=Lossy(low_precision=tmp_path / "tuned"))
    with pytest.raises(ConfigError, match="make a smaller one"):
        fewfire.load(low, lossy=Lossy(low_precision=high.folder))


def test_low_precision_experts_are_part_of_the_budget(folder):
    high, low = both(folder, "olmoe")
    with pytest.raises(BudgetError, match="below the floor") as caught:
        fewfire.load(high.folder, memory="64MiB", lossy=Lossy(low_precision=low))
    assert caught.value.needs["low-precision experts"] == open_pack(low).layout.expert_bytes
    decoder = NativeDecoder(high)
    room = decoder.account.expert_bytes - decoder.experts.least_bytes
    decoder.account.take(room - 1000, "a text")
    with pytest.raises(BudgetError, match="low-precision experts needs"):
        LowPrecision(low, high, decoder.account)


def test_a_budget_that_shrinks_brings_copies_in(folder):
    high, low = both(folder, "mixtral", times=6)
    model = fewfire.load(high.folder, lossy=Lossy(low_precision=low))
    decoder, account = model.module, model.module.account
    model.generate([1, 2, 3], max_tokens=2)
    assert decoder.low is None, "all experts are in memory: no copy is needed"
    held, record = account.fixed_bytes + account.taken_bytes, high.layout.experts[0].record_bytes
    copies = open_pack(low).layout.expert_bytes
    room = 5 * record + 2 * decoder.engine.page_bytes
    assert copies + room < high.layout.expert_bytes
    model.set_memory(held + copies + room)
    assert decoder.low is not None and account.taken_bytes >= copies
    result = model.generate([1, 2, 3], max_tokens=12)
    assert result.experts.substituted > 0 and result.lossy.positions == 11 and not result.invariant


# -------------------------------------------------------------------------------------------------------- agreement


def test_agreement_and_kl_are_those_of_a_plain_comparison(folder):
    pack = open_pack(tiny_packs.make(folder, "olmoe", "q4", times=3))
    lossy, prompt = Lossy(top_p=0.5), draw_ids(6).tolist()
    decoder = NativeDecoder(pack, lossy=lossy)
    generation = LossyGeneration(decoder, prompt, limits=Limits(20))
    new = list(generation)
    held = decoder.account.taken_bytes
    made = generation.compare()
    ids = torch.tensor([prompt + new])
    exact = NativeDecoder(pack)(ids)[0, 5:-1]
    coarse = NativeDecoder(pack, lossy=lossy)(ids)[0, 5:-1]
    kl = torch.nn.functional.kl_div(coarse.log_softmax(-1), exact.log_softmax(-1), reduction="none", log_target=True)
    assert made.positions == 20 and made.modes == ("top_p=0.5",)
    same = exact.argmax(-1) == coarse.argmax(-1)
    assert made.agreement == int(same.sum()) / 20 < 1
    # Logits were kept as float16: 11 bits each.
    assert made.kl == pytest.approx(float(kl.sum(-1).mean()), rel=0.01) and made.kl > 0
    assert generation.compare() is made and decoder.account.taken_bytes < held


def test_at_most_64_positions_evenly_spread_are_compared(folder):
    pack = open_pack(tiny_packs.make(folder, "olmoe", "q4", times=3))
    decoder = NativeDecoder(pack, lossy=Lossy(prefer_cached=0.5))
    generation = LossyGeneration(decoder, [1, 2], limits=Limits(150))
    for _ in generation:
        pass
    assert sorted(generation._kept) == list(range(4, 150, 4)) and len(generation._kept) <= MOST_POSITIONS
    made = generation.compare()
    assert (made.agreement, made.kl, made.positions) == (1.0, 0.0, 37), "all in memory: nothing differs"
    assert decoder.account.taken_bytes == 0


def test_a_generation_says_what_was_on(folder):
    path = tiny_packs.make(folder, "olmoe", "q4", times=3)
    result = fewfire.load(path, lossy=Lossy(top_p=0.5)).generate([1, 2, 3], max_tokens=8)
    assert not result.invariant and result.invariant_reason == "lossy modes are on: top_p=0.5"
    assert result.lossy.positions == 8 and 0 <= result.lossy.agreement <= 1 and result.lossy.kl > 0
    stream = fewfire.load(path, lossy=Lossy(top_p=0.5)).stream([1, 2, 3], max_tokens=8)
    next(stream.generation)
    assert stream.result().lossy == Agreement(("top_p=0.5",)), "not at its end"


def call(*words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code


def test_the_command_warns_and_prints_what_it_cost(folder, tmp_path, capsys):
    tokenizer = train_bpe(["A router sends each token to a few experts. " * 8], 280)
    config = replace(tiny_packs.MODELS["olmoe"], vocab_size=tokenizer.vocab_size)
    module = tiny_packs.draw(replace(config, layers=3 * config.layers))
    write_pack(tmp_path / "pack", tiny_packs.ModuleSource(module), choose_formats(module.config, "q4"))
    tokenizer.save(tmp_path / "pack")
    words = ("generate", tmp_path / "pack", "--prompt", "A router", "--max-tokens", 9)
    assert call(*words, "--expert-top-p", 0.5, "--prefer-cached", 0.25, "--json") == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert "warning: results are not exact: prefer_cached=0.25, top_p=0.5" in err
    assert made["lossy"].keys() == {"modes", "agreement", "kl", "positions"} and made["lossy"]["positions"] == 9
    assert made["lossy"]["modes"] == ["prefer_cached=0.25", "top_p=0.5"] and made["lossy"]["kl"] > 0
    assert not made["invariant"] and "prefer_cached=0.25" in made["invariant_reason"]
    assert call(*words, "--expert-top-p", 0.5) == 0
    err = capsys.readouterr().err
    assert "warning" in err and "of 9 new tokens, KL" in err
    assert call(*words, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["lossy"] is None and "lossy" not in err and "warning" not in err
    other = tiny_packs.make(folder, "olmoe", "q4", times=3)
    for wrong in (("--expert-top-p", 0), ("--prefer-cached", 2), ("--low-precision", other)):
        assert call(*words, *wrong) == 2
        assert capsys.readouterr().err.strip()


def test_what_makes_no_sense_is_refused(folder):
    for options in ({"prefer_cached": -0.1}, {"prefer_cached": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ConfigError, match="must be"):
            Lossy(**options)
    with pytest.raises(ConfigError, match="chosen in rounds"):
        load_pack(tiny_packs.make(folder, "phimoe", "q4"), lossy=Lossy(prefer_cached=0.5))
    with pytest.raises(ConfigError, match="this model has none"):
        load_pack(tiny_packs.make(folder, "llama", "q4"), lossy=Lossy(top_p=0.5))
    with pytest.raises(ConfigError, match="need the native engine"):
        load_pack(tiny_packs.make(folder, "qwen3_next"), lossy=Lossy(top_p=0.5))
