"""llama.cpp's side of perplexity_peer.py: run by a Python that has llama-cpp-python; needs nothing of fewfire.

Reads {model, text, context, threads, windows: [[ids, scored], ...]} on stdin; writes {ids, nats, seconds, version} on
stdout: its own token ids of the text, and the nats of each target that counts, from its own logits.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy


def main() -> None:
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(
        model_path=asked["model"],
        n_ctx=max(asked["context"], 8),
        n_batch=asked["context"],
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        logits_all=True,
        verbose=False,
    )
    ids = model.tokenize(asked["text"].encode(), add_bos=False, special=False)
    nats: list[float] = []
    begin = time.perf_counter()
    for window, scored in asked["windows"]:
        model.reset()
        model.eval(window[:-1])
        logits = numpy.array(model.scores[len(window) - 1 - scored : len(window) - 1], dtype=numpy.float64)
        highest = logits.max(axis=1)
        normaliser = highest + numpy.log(numpy.exp(logits - highest[:, None]).sum(axis=1))
        nats += (normaliser - logits[numpy.arange(scored), window[-scored:]]).tolist()
    seconds = time.perf_counter() - begin
    json.dump({"ids": ids, "nats": nats, "seconds": seconds, "version": llama_cpp.__version__}, sys.stdout)


if __name__ == "__main__":
    main()
