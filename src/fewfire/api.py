"""What users call: `load` a model by path or name, then generate text, stream it, or read its logits.

Composes what lies below; the command line and the server call only this. Owns text: prompts, stop strings, pieces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fewfire.checkpoints.pack import is_pack
from fewfire.checkpoints.source import locate, read_eos_ids, read_tokenizer
from fewfire.config import ModelConfig, check
from fewfire.errors import ConfigError
from fewfire.evaluate import Evaluation, Windowing
from fewfire.evaluate import evaluate as evaluate_module
from fewfire.evaluate.perplexity import Progress
from fewfire.export import Exported, export, torch_dtype
from fewfire.model.encoder_decoder import EncoderDecoder
from fewfire.plan import plan
from fewfire.plan.limits import peak_rss_bytes
from fewfire.runtime.agreement import Agreement, LossyGeneration
from fewfire.runtime.banks import ExpertCounts, LayerCounts, ResidentExperts, StreamedExperts, Streaming
from fewfire.runtime.engine import CACHE_ELEMENT_BYTES, NativeDecoder
from fewfire.runtime.generate import Generation, Limits, Measured
from fewfire.runtime.load import load_module
from fewfire.runtime.lossy import Lossy
from fewfire.runtime.packed import account_of, experts_of, load_pack
from fewfire.runtime.predict import predict_decode
from fewfire.runtime.sampling import Sampling
from fewfire.runtime.threads import use_threads
from fewfire.sizes import parse_bytes
from fewfire.tokenizer import StreamDecoder, Tokenizer
from fewfire.trace import Trace, record, save_trace
from fewfire.trace.record import MAX_TOKENS

__all__ = [
    "Agreement",
    "Experts",
    "Exported",
    "Generated",
    "Lossy",
    "Model",
    "Stream",
    "Streaming",
    "export",
    "load",
    "locate",
    "plan",
]


@dataclass(frozen=True)
class Experts:
    """Where routed experts were found: `hits` in memory, `misses` on disk, summed over `layers`. `budget_bytes`: memory
    that experts may use. `access`: how misses are read. `substituted`: run from low-precision copies. Resident models
    hit always."""

    budget_bytes: int
    hits: int
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    evictions: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    access: str = "resident"
    layers: tuple[LayerCounts, ...] = ()
    substituted: int = 0

    @property
    def hit_rate(self) -> float:
        calls = self.hits + self.misses
        return self.hits / calls if calls else 1.0

    @property
    def streamed(self) -> bool:
        """Whether some come from disk."""
        return self.access != "resident"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hit_rate": self.hit_rate}

    @staticmethod
    def of(bank: ResidentExperts | StreamedExperts, counts: ExpertCounts) -> Experts:
        """What a pack's experts counted."""
        total = counts.total
        return Experts(
            bank.num_bytes,
            total.hits,
            total.misses,
            counts.bytes_read,
            counts.stall_s,
            counts.evictions,
            total.prefetch_useful,
            counts.prefetch_late,
            total.prefetch_wasted,
            "resident" if bank.access is None else str(bank.access),
            counts.layers,
            counts.substituted,
        )


@dataclass(frozen=True)
class Generated:
    """One generated text. `token_ids` are all tokens the model gave, an end token and those of a stop string included;
    `text` ends before either. `finish_reason`: `stop`, `length` (max_tokens) or `context`. `lossy`: how far from
    exact results, once the text has ended; None where no lossy mode was on."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    finish_reason: str | None
    seed: int
    peak_rss_bytes: int
    experts: Experts
    invariant: bool = False
    invariant_reason: str | None = "torch does the arithmetic: results depend on how tokens are batched"
    lossy: Agreement | None = None


class Model:
    """A loaded model. `config`, `tokenizer` (None where the checkpoint has none), `module`, `eos_ids`.

    Threads: one generation at a time for each Model; several Models do not disturb one another.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Sequence[int] | None = None,
        folder: Path | None = None,
    ):
        self.module, self.tokenizer, self.folder = module, tokenizer, folder
        config = module.config
        assert isinstance(config, ModelConfig)
        self.config = config
        self.eos_ids = tuple(config.eos_token_ids if eos_ids is None else eos_ids)
        self.experts = experts_of(module)
        self._torch_expert_bytes = sum(
            values.numel() * values.element_size() for name, values in module.named_parameters() if ".experts." in name
        )

    def set_memory(self, memory: str | int) -> None:
        """Another budget for the whole process from now on, e.g. "6GiB"; between generations, or between tokens of one.

        Raises: BudgetError, and nothing changes, where more than that is held already; ConfigError for what is no pack.
        """
        budget, account = parse_bytes(memory, name="memory"), account_of(self.module)
        if account is None:
            raise ConfigError("this model's weights are all in memory; `fewfire pack` it to run it in a budget")
        if isinstance(self.module, NativeDecoder):
            self.module.set_budget(budget)
            self.experts = self.module.experts
        else:
            account.change(budget)

    def predict_decode(self, *, context: int, hit_rate: float | None = None) -> float | None:
        """Tokens/s of one text behind `context` cached tokens, by the planner's formulas and this machine as it is now.

        Measures for some tenths of a second. `hit_rate` of experts that stream (default: the share that memory holds).
        None for what torch runs.
        """
        return predict_decode(self.module, context=context, hit_rate=hit_rate)

    def _experts_used(self, measured: Measured) -> Experts:
        if self.experts is None or measured.experts is None:
            return Experts(self._torch_expert_bytes, measured.expert_calls)
        return Experts.of(self.experts, measured.experts)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; a text gets what the tokenizer puts around texts. Ids are returned as they are.

        Raises: ConfigError for a text where there is no tokenizer, and for what is neither a text nor ids.
        """
        if not isinstance(prompt, str):
            wrong = next((each for each in prompt if not isinstance(each, SupportsIndex)), None)
            what = type(wrong).__name__
            check(
                wrong is None, f"a prompt is one text or its token ids, not a list of {what}; call once for each text"
            )
            return [int(each) for each in prompt]
        return self._text_side().encode(prompt, add_special=True)

    def encode_chat(self, messages: str | Sequence[Mapping[str, Any]], system: str | None = None) -> list[int]:
        """Token ids of a conversation by the model's own chat template, up to where its answer begins.

        `messages` as in the chat completions API; a text is the user's one turn. `system` goes before them.
        Raises: ConfigError where there is no template, or it refuses these messages; FormatError where it fails.
        """
        tokenizer = self._text_side()
        check(
            tokenizer.chat_template is not None,
            "this model has no chat template; prompt it with plain text, or put chat_template.jinja into its folder",
        )
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return tokenizer.encode_chat(turns if system is None else [{"role": "system", "content": system}, *turns])

    def _text_side(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError("this model has no tokenizer; give token ids, or put its tokenizer.json into its folder")
        return self.tokenizer

    def stream(
        self,
        prompt: Any,
        *,
        chat: bool = False,
        system: str | None = None,
        stop: str | Sequence[str] = (),
        max_tokens: int = 256,
        **options: Any,
    ) -> Stream:
        """The new text in pieces, as it is generated; joined they are `generate`'s text.

        `prompt`: a text, or token ids; with `chat` what `encode_chat` takes, and the answer ends at the tokenizer's
        ends of turns too. `stop`: strings that end the text and are not part of it. Options: `context`,
        `prefill_chunk` and the fields of `Sampling` (temperature, top_k, top_p, min_p, repetition_penalty, seed).
        `Stream.result()` has the rest.
        Raises: ConfigError for options that make no sense, or a prompt longer than the context.
        """
        check(chat or system is None, "a system prompt is part of a conversation; ask for chat too")
        limits = {key: options.pop(key) for key in ("context", "prefill_chunk") if key in options}
        unknown = sorted(options.keys() - Sampling.__dataclass_fields__.keys())
        known = ["chat", "system", "stop", "max_tokens", "context", "prefill_chunk", *Sampling.__dataclass_fields__]
        check(not unknown, f"option {', '.join(unknown)} is not known; expected one of {', '.join(known)}")
        ids = self.encode_chat(prompt, system) if chat else self.encode(prompt)
        ends = self._text_side().end_token_ids if chat else ()
        lossy = isinstance(self.module, NativeDecoder) and self.module.lossy is not None
        generation = (LossyGeneration if lossy else Generation)(
            self.module,  # type: ignore[arg-type]
            ids,
            sampling=Sampling(**options),
            limits=Limits(max_tokens, **limits),
            eos_ids=(*self.eos_ids, *ends),
        )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        check(all(stops), "a stop string is empty; leave it out")
        check(not stops or self.tokenizer is not None, "stop strings need a tokenizer; this model has none")
        return Stream(self, generation, stops)

    def generate(self, prompt: Any, **options: Any) -> Generated:
        """`stream` to its end. The same options."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result()

    @torch.inference_mode()
    def logits(self, ids_BT: Any, decoder_ids_BT: Any = None) -> Tensor:
        """Float32 (B, T, V) of token ids (nested lists or a tensor) without padding, no cache involved.

        An encoder-decoder reads `ids_BT` and gives logits of `decoder_ids_BT`.
        Raises: ConfigError for ids of another shape or outside the vocabulary.
        """
        ids_BT = self._checked_ids(ids_BT, "ids_BT")
        encodes = isinstance(self.module, EncoderDecoder)
        check(
            encodes == (decoder_ids_BT is not None),
            "an encoder-decoder needs decoder_ids_BT" if encodes else "decoder_ids_BT is for an encoder-decoder only",
        )
        if decoder_ids_BT is None:
            return self.module(ids_BT)
        assert isinstance(self.module, EncoderDecoder)
        return self.module.teacher_forced(ids_BT, self._checked_ids(decoder_ids_BT, "decoder_ids_BT"))

    def evaluate(
        self,
        data: str | Path | Sequence[str | Path],
        *,
        field: str = "text",
        progress: Progress | None = None,
        **windowing: Any,
    ) -> Evaluation:
        """Perplexity and bits per byte on text files, folders and JSONL (`field`); accuracy where it holds choices.

        Options: the fields of `Windowing` (context, stride, max_tokens, like), which says what each figure counts.
        `progress` receives tokens scored and their nats so far.
        Raises: ConfigError for a model or data that cannot be evaluated, FormatError for malformed lines.
        """
        return evaluate_module(
            self.module, self.tokenizer, data, field=field, windowing=Windowing(**windowing), progress=progress
        )

    def trace(
        self,
        data: str | Path | Sequence[str | Path],
        out: str | Path | None = None,
        *,
        field: str = "text",
        max_tokens: int = MAX_TOKENS,
        context: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Trace:
        """What the routers choose on texts (files, folders, JSONL: as `evaluate` reads them), written to `out` if any.

        A text of more than `context` tokens (default: 2048) is cut into several documents; each begins with an empty
        cache. `max_tokens` in all. `progress` receives tokens read, and in all. docs/trace.md describes the file.
        Raises: ConfigError for a model or data that cannot be traced, or a place that cannot be written; BudgetError
        where the trace does not fit the memory budget; FormatError for malformed lines.
        """
        name = "" if self.folder is None else self.folder.name
        made = record(
            self.module,
            self.tokenizer,
            data,
            field=field,
            max_tokens=max_tokens,
            context=context,
            model=name,
            progress=progress,
        )
        if out is not None:
            save_trace(out, made)
        return made

    def _checked_ids(self, ids: Any, name: str) -> Tensor:
        try:
            tensor = torch.as_tensor(ids, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{name} is no rectangle of whole numbers; give (batch, tokens)") from error
        check(tensor.dim() == 2, f"{name} has shape {list(tensor.shape)}; expected (batch, tokens)")
        if tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            size = self.config.vocab_size
            check(0 <= low and high < size, f"{name} holds ids from {low} to {high}; the vocabulary has {size}")
        return tensor


@dataclass
class Stream(Iterator[str]):
    """Pieces of one generated text: whole UTF-8 characters only, and nothing of a stop string.

    What could be the start of a stop string is held back until it is known not to be.
    """

    model: Model
    generation: Generation
    stops: tuple[str, ...] = ()
    text: str = ""
    _held: str = ""
    _over: bool = False
    _decoder: StreamDecoder | None = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.model.tokenizer
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)

    @property
    def measured(self) -> Measured:
        return self.generation.measured

    def __next__(self) -> str:
        while not self._over:
            token = next(self.generation, None)
            if token is None:
                self._over, piece = True, "" if self._decoder is None else self._decoder.flush()
            elif token in self.generation.eos_ids or self._decoder is None:
                continue
            else:
                piece = self._decoder.push(token)
            piece = self._release(piece)
            if piece:
                self.text += piece
                return piece
        raise StopIteration

    def _release(self, piece: str) -> str:
        """What of the text so far can be given out."""
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self._over = True
            self.generation.stop()
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = 0 if self._over else max((_overlap(self._held, stop) for stop in self.stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def result(self) -> Generated:
        """What was generated so far; complete when the stream has ended."""
        measured, lossy = self.measured, self._agreement()
        return Generated(
            text=self.text,
            token_ids=list(measured.token_ids),
            prompt_tokens=measured.prompt_tokens,
            prefill_tokens_per_s=measured.prefill_tokens_per_s,
            decode_tokens_per_s=measured.decode_tokens_per_s,
            finish_reason=measured.finish_reason,
            seed=self.generation.sampler.seed,
            peak_rss_bytes=peak_rss_bytes(),
            experts=self.model._experts_used(measured),
            **_invariance(self.model.module),
            lossy=lossy,
        )

    def _agreement(self) -> Agreement | None:
        if not isinstance(self.generation, LossyGeneration):
            return None
        return self.generation.compare() if self._over else Agreement(self.generation.modes)


def _invariance(module: torch.nn.Module) -> dict[str, Any]:
    """Of the native engine: sums have one order for each token, whatever else runs (runtime/engine.py)."""
    if not isinstance(module, NativeDecoder):
        return {}
    return {"invariant": module.invariant_reason is None, "invariant_reason": module.invariant_reason}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, and not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    context: int | None = None,
    cache: str = "bf16",
    streaming: Streaming | None = None,
    lossy: Lossy | None = None,
    ignore_keys: Sequence[str] = (),
    show_progress: bool = False,
) -> Model:
    """A model with its tokenizer, where it has one: from a pack, a hub-layout folder, the folder of a training run, a
    .gguf file, a hub id (org/name, org/name@revision, org/name/file.gguf; downloaded once) or `demo`.

    `dtype`: f32, bf16 or fp16 instead of the checkpoint's own. `threads`: what torch may use, in the whole process.
    `memory` ("8GiB", or bytes) bounds the resident memory of the whole process (default: what the machine or its cgroup
    has left, less an eighth); experts of a pack that do not fit stay on disk, and `streaming` says how they are read.
    `context`: tokens of a text that memory is planned for (default 4096 or the model's most). `cache`: format of a
    pack's keys and values, bf16 or q8.
    `lossy`: what may leave exact routing to wait less for the disk (docs/lossy.md); how far is measured in each run.
    `ignore_keys`: keys of config.json or of GGUF metadata to leave aside. `show_progress`: of a download, on stderr.
    Raises: ConfigError for a name that is no model or a config that is not understood, FormatError for damaged files,
    BudgetError, with the table of what is needed, where `memory` does not suffice.
    """
    if threads is not None:
        use_threads(threads)
    wanted = torch_dtype(dtype)
    path = locate(model, show_progress=show_progress)
    check(cache in CACHE_ELEMENT_BYTES, f"cache ({cache}) is not one of {', '.join(CACHE_ELEMENT_BYTES)}")
    budget = None if memory is None else parse_bytes(memory, name="memory")
    tokenizer = read_tokenizer(path)  # before anything large: it takes memory while it is read
    if tokenizer is not None:
        tokenizer.prepare()
    module: torch.nn.Module
    if is_pack(path):
        module = load_pack(
            path, dtype=wanted, memory=budget, context=context, cache=cache, streaming=streaming, lossy=lossy
        )
    elif lossy is not None and lossy.modes:
        raise ConfigError("lossy modes need a pack; make one with `fewfire pack`")
    else:
        module = load_module(path, dtype=wanted, ignore=ignore_keys, memory=budget)
    idle = [] if streaming is None else streaming.changed
    if idle and not isinstance(experts_of(module), StreamedExperts):
        warnings.warn(f"no experts are on disk: {', '.join(idle)} has no effect", stacklevel=2)
    return Model(module, tokenizer=tokenizer, eos_ids=read_eos_ids(path, module.config), folder=path)
