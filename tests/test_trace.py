"""Traces: their file, the simulator beside its reference and beside the store, drawn ones, what is learned of them."""

import json
from itertools import pairwise

import pytest
import tiny_hub
import tiny_packs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewfire
from fewfire import kernels
from fewfire.checkpoints.pack import open_pack
from fewfire.checkpoints.shards import Outgoing, write_safetensors
from fewfire.cli.main import main
from fewfire.errors import ConfigError, FormatError
from fewfire.plan.profile import profile_json, read_profile
from fewfire.runtime.banks import StreamedExperts, Streaming
from fewfire.runtime.engine import NativeDecoder
from fewfire.tokenizer import train_bpe
from fewfire.trace import (
    POLICIES,
    Step,
    Trace,
    decode_steps,
    draw_trace,
    hot_set,
    profile_of,
    read_trace,
    reference,
    replay,
    simulate,
    steps_of,
    stretch_counts,
    write_trace,
)
from fewfire.trace.record import record_ids
from fewfire.trace.replay import replay_of

needs_native = pytest.mark.skipif(kernels.supported_isas() == ["reference"], reason="the extension is not built")
ONLINE = ("lru", "lfru", "s3fifo")
SKEWED = [[1000 / (1 + place) for place in range(16)]] * 3


def tiny(num_tokens=7, num_layers=2, width=2, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((num_tokens, num_layers, 6), generator=generator).argsort(dim=-1)[..., :width].to(torch.int16)
    base = dict(
        weights_TLK=torch.rand(ids.shape, generator=generator).half(),
        documents=(0, 3, num_tokens),
        layers=tuple(range(1, num_layers + 1)),
        num_experts=(6,) * num_layers,
        top_k=(width,) * num_layers,
    )
    return Trace(**{"ids_TLK": ids, **base, **changes})


def equal(one, other):
    tensors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids_TLK", "weights_TLK"))
    plain = ("documents", "layers", "num_experts", "top_k", "model", "sources")
    return tensors and all(getattr(one, name) == getattr(other, name) for name in plain)


# ------------------------------------------------------------------------------------------------------- the file


def test_a_trace_is_read_as_it_was_written(tmp_path):
    for number, more in enumerate([{}, {"tokens": torch.arange(7, dtype=torch.int32), "sources": ("a", "b")}]):
        trace = tiny(model="tiny", **more)
        write_trace(tmp_path / f"{number}.safetensors", trace)
        again = read_trace(tmp_path / f"{number}.safetensors")
        assert equal(trace, again)
        assert (trace.tokens is None) == (again.tokens is None)
        assert trace.tokens is None or torch.equal(trace.tokens, again.tokens)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"documents": (0, 7, 3)}, "documents must rise from 0 to 7"),
        ({"documents": (1, 7)}, "documents must rise"),
        ({"layers": (4, 4)}, "layers must be rising"),
        ({"num_experts": (6, 2)}, "an expert's id is outside its layer"),
        ({"num_experts": (6,)}, "num_experts has 1 entries for 2 layers"),
        ({"top_k": (2, 3)}, "top_k"),
        ({"sources": ("one",)}, "sources and documents differ"),
        ({"tokens": torch.full((7,), -1, dtype=torch.int32)}, "tokens must be int32"),
        ({"ids_TLK": torch.ones((7, 2, 2), dtype=torch.int16)}, "a token has an expert twice"),
        ({"weights_TLK": torch.full((7, 2, 2), float("nan")).half()}, "not finite"),
    ],
)
def test_parts_that_disagree_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def damaged(path, head=None, about=None, tensors=None):
    """A trace file by hand."""
    trace = tiny()
    facts = {"model": "", "layers": [1, 2], "num_experts": [6, 6], "top_k": [2, 2], "sources": []}
    metadata = {
        "format": "fewfire trace",
        "version": "1",
        "trace": json.dumps({**facts, **(about or {})}),
        **(head or {}),
    }
    values = {"ids": trace.ids_TLK, "weights": trace.weights_TLK, "documents": torch.tensor(trace.documents)}
    values = {name: each for name, each in {**values, **(tensors or {})}.items() if each is not None}
    write_safetensors(path, [Outgoing(n, v.dtype, tuple(v.shape), lambda v=v: v) for n, v in values.items()], metadata)
    return path


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"head": {"format": "pt"}}, "is no trace"),
        ({"head": {"version": "9"}}, "version"),
        ({"head": {"trace": "{"}}, "is no JSON"),
        ({"head": {"trace": "[" * 100_000}}, "is no JSON"),
        ({"head": {"trace": "[]"}}, "expected model"),
        ({"about": {"layers": "12"}}, "layers is not what it should be"),
        ({"about": {"num_experts": [6, 2**40]}}, "out of range"),
        ({"about": {"top_k": [2, True]}}, "top_k is not"),
        ({"tensors": {"ids": None}}, "ids: is missing"),
        ({"tensors": {"more": torch.zeros(1)}}, "more: is no part"),
        ({"tensors": {"ids": torch.zeros((7, 2, 2))}}, "ids: is F32, expected I16 or I32"),
        ({"tensors": {"ids": torch.zeros(7, dtype=torch.int16)}}, "expected 3 dimensions"),
        ({"tensors": {"documents": torch.tensor([0, 9])}}, "documents must rise from 0 to 7"),
        ({"tensors": {"ids": torch.full((7, 2, 2), 30000, dtype=torch.int16)}}, "outside its layer"),
        ({"tensors": {"ids": torch.zeros((0, 2, 2), dtype=torch.int16)}}, "needs a token"),
        ({"tensors": {"weights": torch.zeros((7, 2, 3)).half()}}, "differ in shape"),
    ],
)
def test_files_that_are_no_trace_are_refused(tmp_path, parts, message):
    path = damaged(tmp_path / "trace.safetensors", **parts)
    with pytest.raises(FormatError, match=message) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_ends_early_or_is_something_else_is_refused(tmp_path):
    write_trace(tmp_path / "whole", tiny())
    content = (tmp_path / "whole").read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(FormatError):
            read_trace(tmp_path / "cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "absent")


# -------------------------------------------------------------------------------------- the simulator, its reference

LAYERS = (3, 5, 4)


@st.composite
def step_lists(draw):
    def step():
        layer = draw(st.integers(0, len(LAYERS) - 1))
        experts = draw(st.sets(st.integers(0, LAYERS[layer] - 1), min_size=1))
        in_order = draw(st.booleans()) and draw(st.booleans())
        return Step(layer, tuple(sorted(experts)), in_order, in_order and draw(st.booleans()))

    return [step() for _ in range(draw(st.integers(1, 60)))]


@needs_native
@pytest.mark.parametrize("policy", POLICIES)
@given(steps=step_lists(), slots=st.integers(1, sum(LAYERS)))
@settings(max_examples=150, deadline=None)
def test_the_simulator_equals_its_reference(policy, steps, slots):
    made = simulate(LAYERS, steps, slots, policy)
    first_ids = [0, 3, 8, 12]
    assert (made.layers, made.evictions) == reference.simulate(policy, first_ids, slots, steps)


@needs_native
@pytest.mark.parametrize("policy", POLICIES)
def test_they_are_equal_over_a_long_trace(policy):
    trace = draw_trace(SKEWED, 4, 300, reuse=0.3, seed=1)
    first_ids = [0, 16, 32, 48]
    for slots in (8, 24):
        steps = steps_of(trace, [1] * 100 + [40, 1, 1, 130, 1] + [1] * 20)
        made = simulate(trace.num_experts, steps, slots, policy)
        assert (made.layers, made.evictions) == reference.simulate(policy, first_ids, slots, steps)
        assert made.hits + made.misses == sum(len(step.experts) for step in steps)


@needs_native
def test_a_prompt_leaves_each_layer_its_share_of_empty_slots():
    everything = [Step(layer, tuple(range(8)), in_order=True) for layer in range(3)]
    for slots, hits in ((12, (4, 4, 1)), (18, (4, 6, 4)), (24, (8, 8, 8))):  # less the slots of the window
        made = simulate((8, 8, 8), everything * 2, slots, "lru")
        assert tuple(layer.hits for layer in made.layers) == hits
        assert (made.layers, made.evictions) == reference.simulate("lru", [0, 8, 16, 24], slots, everything * 2)


def test_hand_counted():
    steps = [Step(0, (each,)) for each in (0, 1, 2, 0, 1, 3, 0, 1)]
    lru, belady = simulate([4], steps, 2, "lru"), simulate([4], steps, 2, "belady")
    assert (lru.hits, lru.misses, lru.evictions) == (0, 8, 6)
    assert (belady.hits, belady.misses) == (2, 6)  # 0 1 | 2 for 1 | 0 hits | 1 for 2 | 3 for 1 | 0 hits | 1 for 3
    assert simulate([4], steps, 4, "lfru").misses == 4


@needs_native
def test_nothing_hits_more_than_belady_and_the_default_hits_most_of_the_rest():
    for reuse in (0.0, 0.3):
        trace = draw_trace(SKEWED, 4, 800, reuse=reuse)
        steps = decode_steps(trace)
        for slots in (12, 18, 24, 36):
            rates = {policy: simulate(trace.num_experts, steps, slots, policy).hit_rate for policy in POLICIES}
            assert max(rates.values()) == rates["belady"]
            assert rates["lfru"] >= max(rates[policy] for policy in ONLINE) - 0.01, (reuse, slots, rates)


@needs_native
def test_a_policy_remembers_over_more_passes_than_its_numbers_hold():
    trace = draw_trace([[8.0, 4, 2, 1, 1, 1]], 2, 100, reuse=0.2)
    steps = decode_steps(trace)
    short, long = simulate([6], steps, 3, "lfru"), simulate([6], steps * 400, 3, "lfru")  # weights grow to 2^2500
    assert long.hit_rate > short.hit_rate - 0.02


def test_what_makes_no_sense_is_refused():
    for arguments, message in [
        (([4], [], 1, "fifo"), "not one of lru"),
        (([4], [], 0, "lru"), "slots"),
        (([4], [Step(1, (0,))], 1, "lru"), "layer 1"),
        (([4], [Step(0, (2, 1))], 1, "lru"), "not distinct and rising"),
        (([4], [Step(0, (4,))], 1, "lru"), "not distinct and rising"),
        (([4], [Step(0, ())], 1, "lru"), "not distinct and rising"),
    ]:
        with pytest.raises(ConfigError, match=message):
            simulate(*arguments)
    with pytest.raises(ConfigError, match="leaves the trace"):
        steps_of(tiny(), [4, 4])


# ------------------------------------------------------------------------------------------- the simulator, the store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


def with_slots(pack, slots, policy):
    """A decoder whose experts have so many slots whatever the budget."""
    decoder = NativeDecoder(pack)
    settings = Streaming(policy=policy, direct=False)
    experts = StreamedExperts(pack, slots * pack.layout.experts[0].record_bytes, settings)
    experts.fit = lambda num_bytes: None
    decoder.use(experts)
    return decoder


def trace_of(pack, tokens, seed=0):
    routers = [moe.router for _, _, moe in pack.config.moe_layers]
    counts = [[2.0 ** -(expert / 2) for expert in range(router.num_experts)] for router in routers]
    return draw_trace(counts, routers[0].top_k, tokens, reuse=0.3, seed=seed)


@needs_native
@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize("name", ("mixtral", "dbrx", "qwen3_moe"))
def test_the_store_hits_and_misses_what_the_simulator_says(folder, name, policy):
    """dbrx has top 3, so that 200 tokens go in order, and the next layer is read ahead."""
    pack = open_pack(tiny_packs.make(folder, name, "q4", times=4))
    trace = trace_of(pack, 252)
    for slots in (4, 7, 12, 23):
        for sizes in ([1] * 50, [30, 1, 1, 1, 9, 1, 1, 2, 1, 1], [200, 1, 1, 1, 1, 40, 1, 1, 1, 1, 1]):
            decoder = with_slots(pack, slots, policy)
            cache, start = decoder.new_cache(), 0
            for size in sizes:
                routing = replay_of(trace, start, start + size)
                decoder.run(cache.of(1), [torch.zeros(size, dtype=torch.int64)], replay=routing)
                start += size
            counts, made = decoder.experts.counts(), simulate(trace.num_experts, steps_of(trace, sizes), slots, policy)
            assert (counts.layers, counts.evictions) == (made.layers, made.evictions), (slots, sizes)


@needs_native
def test_replay_counts_what_the_simulator_says(folder):
    pack = open_pack(tiny_packs.make(folder, "mixtral", "q4", times=4))
    trace = trace_of(pack, 400)  # more than the context of 256
    decoder = with_slots(pack, 6, "lfru")
    done = replay(decoder, trace, warm_tokens=50, max_tokens=300)
    every, warm = (simulate(trace.num_experts, decode_steps(trace, end=end), 6) for end in (350, 50))
    assert (done.hits, done.misses) == (every.hits - warm.hits, every.misses - warm.misses)
    assert done.bytes_read == done.misses * pack.layout.experts[0].record_bytes
    assert done.tokens == 300 and done.decode_tokens_per_s > 0 and done.slots == 6 and done.records == 24
    assert set(done.to_json()) > {"decode_tokens_per_s", "hit_rate", "hits", "misses", "bytes_read", "stall_s"}


@needs_native
def test_traces_of_another_model_are_not_replayed(folder):
    pack = open_pack(tiny_packs.make(folder, "mixtral", "q4", times=4))
    decoder = with_slots(pack, 6, "lru")
    with pytest.raises(ConfigError, match="layers of 2 x 6 experts, the model has 4 x 6"):
        replay(decoder, tiny())
    with pytest.raises(ConfigError, match="the trace has 3 experts a token"):
        replay(decoder, tiny(num_layers=4, width=3))
    with pytest.raises(ConfigError, match="leaves nothing"):
        replay(decoder, trace_of(pack, 5), warm_tokens=5)


# ------------------------------------------------------------------------------------------------------ recording


@needs_native
def test_recorded_routing_is_the_models_own_in_any_chunks(folder, monkeypatch):
    path = tiny_packs.make(folder, "qwen2_moe", "q4", times=3)
    ids = torch.randint(0, tiny_packs.VOCAB, (90,), generator=torch.Generator().manual_seed(0))
    documents, steps = [ids[:50], ids[50:]], []
    decoder = NativeDecoder(open_pack(path))
    for part in documents:
        decoder.hidden(part[None], observe=lambda layer, routing: steps.append(routing.ids_TK))
    whole = record_ids(decoder, documents, model="m")
    assert torch.equal(whole.ids_TLK[:50].long(), torch.stack(steps[:3], dim=1))
    assert torch.equal(whole.ids_TLK[50:].long(), torch.stack(steps[3:], dim=1))
    assert whole.documents == (0, 50, 90) and torch.equal(whole.tokens.long(), ids)
    with monkeypatch.context() as patch:
        patch.setattr(NativeDecoder, "chunk_tokens", 7)
        assert equal(whole, record_ids(decoder, documents, model="m"))
    streamed = with_slots(open_pack(path), 4, "lfru")
    assert equal(whole, record_ids(streamed, documents, model="m"))
    assert decoder.account.taken_bytes == 0


def test_torch_models_are_recorded_too():
    module = tiny_packs.draw(tiny_packs.MODELS["glm4_moe"])
    ids = torch.randint(0, tiny_packs.VOCAB, (30,), generator=torch.Generator().manual_seed(0))
    trace = record_ids(module, [ids[:10], ids[10:]])
    chosen = []
    module.hidden(ids[None, 10:], observe=lambda layer, routing: chosen.append((layer, routing.ids_TK)))
    assert trace.layers == (1,) == (chosen[0][0],)
    assert torch.equal(trace.ids_TLK[10:, 0].long(), chosen[0][1])


# -------------------------------------------------------------------------------------------------- drawn, learned


def test_drawn_traces_follow_their_counts():
    counts = [[90.0, 40, 30, 20, 10, 5, 3, 2], [1.0] * 8]
    for reuse in (0.0, 0.4):
        trace = draw_trace(counts, 2, 6000, reuse=reuse, seed=3)
        for row, made in zip(counts, trace.counts(), strict=True):
            chances = torch.tensor(row) * 2 / sum(row)
            assert (made / 6000 - chances).abs().max() < 0.025  # four times what chance does to 6000 tokens
    again = draw_trace(counts, 2, 6000, reuse=0.4, seed=3)
    assert equal(trace, again) and not equal(trace, draw_trace(counts, 2, 6000, reuse=0.4, seed=4))
    common = [len(set(a) & set(b)) / 2 for a, b in pairwise(trace.ids_TLK[:, 1].tolist())]
    assert sum(common) / len(common) == pytest.approx(0.4 + 0.6 * 2 / 8, abs=0.04)


def test_counts_that_are_no_load_are_refused():
    sure = draw_trace([[100.0, 1, 1, 1]], 2, 50)  # its share would be above 1: it is always there
    assert bool((sure.ids_TLK == 0).any(dim=-1).all())
    for row in ([1.0, 0, 0], [1.0, -1, 1], [float("nan"), 1, 1]):
        with pytest.raises(ConfigError, match="counts need 2 experts above zero"):
            draw_trace([row], 2, 10)
    with pytest.raises(ConfigError, match="reuse"):
        draw_trace([[1.0, 1]], 1, 10, reuse=1.0)


def test_stretched_counts_are_as_skewed():
    rows = [[8.0, 4, 2, 1], [1.0, 1, 1, 1]]
    made = stretch_counts(rows, 4, 8)
    assert len(made) == 4 and all(len(row) == 8 for row in made)
    assert sorted(made[0]) == sorted(made[1]) and made[0] != made[1] and made[3] == [1.0] * 8
    assert sum(sorted(made[0])[4:]) / sum(made[0]) == pytest.approx(12 / 15, abs=0.03)
    assert sorted(stretch_counts(rows, 1, 4)[0]) == [1, 2, 4, 8]


def test_the_hot_set_is_what_was_used_most():
    ids = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[0, 1], [2, -1]]], dtype=torch.int16)
    trace = tiny(num_tokens=3, ids_TLK=ids, weights_TLK=torch.zeros(ids.shape).half(), documents=(0, 3))
    assert hot_set(trace, 4) == [(0, 0), (1, 2), (0, 1), (1, 3)]
    assert hot_set(trace, 100) == [(0, 0), (1, 2), (0, 1), (1, 3), (0, 2)] and hot_set(trace, 0) == []


def test_a_profile_holds_counts_and_a_curve(tmp_path):
    trace = draw_trace(SKEWED, 4, 400, reuse=0.3)
    profile = profile_of(trace)
    shares, rates = zip(*profile.cache_curve)
    assert list(rates) == sorted(rates) and rates[-1] == 1.0 and shares[-1] == 1.0
    assert sum(profile.counts[2]) == 4 * 400 and profile.num_tokens == 400
    assert profile.hit_rate(1.0) == 1.0 and profile.hit_rate(0.0) == 0.0
    assert rates[-3] < profile.hit_rate((shares[-3] + shares[-2]) / 2) < rates[-2]
    text = json.dumps(profile_json(profile))
    (tmp_path / "profile.json").write_text(text)
    write_trace(tmp_path / "trace.safetensors", trace, {"profile": text})
    assert read_profile(tmp_path / "profile.json") == read_profile(tmp_path / "trace.safetensors") == profile
    with pytest.raises(ConfigError, match="holds no routing profile"):
        write_trace(tmp_path / "bare.safetensors", trace)
        read_profile(tmp_path / "bare.safetensors")
    for curve in ([[0.5, 2]], [[0.5, 0.5], [0.4, 0.6]], [[0.5]], "x"):
        (tmp_path / "profile.json").write_text(json.dumps(profile_json(profile) | {"cache_curve": curve}))
        with pytest.raises(FormatError, match="cache_curve"):
            read_profile(tmp_path / "profile.json")
    assert fewfire.config.RoutingProfile(8, 2, 1, {}).hit_rate(0.5) is None


# ---------------------------------------------------------------------------------------------------- the command

TEXT = "A router sends each token to a few experts - näive, 日本語, 🙂🙃 and back.\n" * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny qwen3_moe in hub layout, with a tokenizer, and the pack of it."""
    tokenizer = train_bpe([TEXT], 300)
    made = tiny_hub.make("qwen3_moe", vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    folder = tiny_hub.save(made, tmp_path_factory.mktemp("model"))
    tokenizer.save(folder)
    fewfire_command("pack", str(folder), str(folder / "pack"), "--quant", "f32")
    return folder


def fewfire_command(*words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code or 0


def test_trace_records_texts_and_says_what_it_did(model, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "trace.safetensors"
    data.mkdir()
    (data / "a.txt").write_text(TEXT)
    (data / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "two words")))
    traces = []
    for path in (model, model / "pack") if kernels.supported_isas() != ["reference"] else (model,):
        capsys.readouterr()
        assert fewfire_command("trace", str(path), str(data), str(out), "--json") == 0
        said, made = json.loads(capsys.readouterr().out), read_trace(out)
        assert said == {
            "tokens": made.num_tokens,
            "documents": made.num_documents,
            "layers": len(made.layers),
            "path": str(out),
        }
        assert made.num_documents == len(made.sources) > 4 and made.sources[-1].endswith("b.jsonl:3")
        assert max(b - a for a, b in pairwise(made.documents)) == 64 and f"{data / 'a.txt'}@64" in made.sources
        assert read_profile(out).num_tokens == made.num_tokens
        traces.append(made)
    agree = (traces[0].ids_TLK.sort(dim=-1).values == traces[-1].ids_TLK.sort(dim=-1).values).float().mean()
    assert agree > 0.98  # int8 activations move what is nearly a tie
    assert fewfire_command("trace", str(model), str(data), str(out), "--max-tokens", "70") == 0
    shown = capsys.readouterr().out
    assert "70 tokens of 2 documents" in shown and str(out) in shown and read_trace(out).num_tokens == 70


def test_what_cannot_be_traced_is_said_in_one_line(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("hello")
    text, out = str(tmp_path / "text.txt"), str(tmp_path / "out.safetensors")
    for words, message in [
        ((str(model), str(tmp_path / "absent"), out), "no such file"),
        ((str(model), text, str(tmp_path)), "is a folder; name a file in it"),
        ((str(model), text, out, "--context", "65"), "between 1 and 64"),
        ((str(model), text, out, "--max-tokens", "0"), "max-tokens"),
        ((str(model), text, out, "--memory", "1MiB"), "below the floor"),
        ((str(model), text, text + "/out"), "cannot be written"),
    ]:
        assert fewfire_command("trace", *words) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said, said
    with pytest.raises(ConfigError, match="has no MoE layer"):
        dense = tiny_packs.draw(tiny_packs.MODELS["llama"])
        fewfire.api.Model(dense, tokenizer=train_bpe([TEXT], 300)).trace(text)
    assert not (tmp_path / "out.safetensors").exists()
