"""Processors without AVX-512 or AVX2, emulated: nothing they lack is ever run, and the bits are the same."""

import shutil
import subprocess
import sys

import pytest
import tiny_packs

from fewfire import kernels

EMULATOR = shutil.which("qemu-x86_64")
RUN = """
import sys, torch
from fewfire import kernels
from fewfire.runtime.packed import load_pack
model, ids = load_pack(sys.argv[1]), torch.arange(1, 20)[None]
with torch.inference_mode():
    cache = model.new_cache()
    logits = torch.cat([model(part, cache) for part in ids.split((12, 1, 6), dim=1)], dim=1)
print(kernels.supported_isas()[-1], *logits.flatten().tolist()[::7])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 is not installed")
@pytest.mark.skipif(kernels.supported_isas() == ["reference"], reason="the extension is not built")
@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_a_model_runs_on(tmp_path, processor, isa):
    pack = tiny_packs.make(tmp_path, "olmoe", "q4")
    command = [sys.executable, "-c", RUN, str(pack)]
    here = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    there = subprocess.run([EMULATOR, "-cpu", processor, *command], check=True, capture_output=True, text=True)
    found, *values = there.stdout.split()
    assert found == isa and values == here[1:]
