"""GGUF headers: equal to what the reference library reads, and hostile bytes give FormatError, never anything else."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewfire.errors import ConfigError, FewfireError, FormatError
from fewfire.headers import GGML_BLOCKS, read_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(5000)])
    writer.add_array("some.floats", [0.5, 1.5])
    writer.add_tensor("token_embd.weight", np.zeros((6, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float16))
    blocks = np.zeros((3, 2 * 18), np.uint8)  # three rows of 64 values as q4_0
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_header_equals_the_reference_reader(gguf_file):
    gguf = pytest.importorskip("gguf")
    ours, theirs = read_gguf(gguf_file), gguf.GGUFReader(gguf_file)
    assert ours.architecture == "qwen3moe" and ours.metadata["qwen3moe.block_count"] == 2
    assert ours.metadata["some.floats"] == [0.5, 1.5]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)
    assert ours.tensors["blk.0.ffn_up.weight"].type == "q4_0"


def test_long_arrays_are_kept_only_when_asked_for(gguf_file):
    assert "tokenizer.ggml.tokens" not in read_gguf(gguf_file).metadata
    assert len(read_gguf(gguf_file, long_arrays=True).metadata["tokenizer.ggml.tokens"]) == 5000


def test_block_table_equals_the_reference():
    gguf = pytest.importorskip("gguf")
    for kind, (name, block, size) in GGML_BLOCKS.items():
        reference = gguf.GGMLQuantizationType(kind)
        assert reference.name.lower() == name
        assert gguf.GGML_QUANT_SIZES[reference] == (block, size)


def test_every_truncation_is_a_format_error(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 8, 23, 24, 60, 200, 1000, len(whole) // 2, len(whole) - 200]:
        cut.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="cut.gguf"):
            read_gguf(cut)


def test_a_missing_file_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("position, value", [(8, 2**63), (16, 2**63), (24, 2**64 - 1)])
def test_huge_counts_are_refused_at_once(gguf_file, tmp_path, position, value):
    data = bytearray(gguf_file.read_bytes())
    data[position : position + 8] = struct.pack("<Q", value)
    path = tmp_path / "huge.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="download it again"):
        read_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_raise_anything_else(gguf_file, tmp_path, edits):
    data = bytearray(gguf_file.read_bytes())
    # the interesting bytes are the header's ends: before and after the long vocabulary
    for position, value in edits:
        data[position if position < 150 else -position] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    try:
        read_gguf(path)
    except FewfireError:
        pass
