"""A strict reader of a hub config.json: every key is used, asserted or listed as ignored; an unknown one is an error.

Owns types, aliases and error messages. Knows no family: what a key means is said in the family's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewfire.errors import ConfigError

_MISSING: Any = object()

# Keys that never change the mathematics of a forward pass: bookkeeping, training, generation and serving settings.
NEUTRAL = frozenset(
    """
    architectures transformers_version auto_map _name_or_path use_cache initializer_range initializer_factor
    attention_dropout attn_pdrop resid_pdrop embd_pdrop emb_pdrop dropout dropout_rate classifier_dropout hidden_dropout
    output_router_logits router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux ep_size pretraining_tp
    output_attentions output_hidden_states return_dict chunk_size_feed_forward id2label label2id num_labels problem_type
    finetuning_task task_specific_params tokenizer_class torchscript use_bfloat16 tf_legacy_loss prefix sep_token_id
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation
    attn_implementation remove_invalid_values max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    keys_to_ignore_at_inference cross_attention_hidden_size tie_encoder_decoder unsloth_version unsloth_fixed
    """.split()
)

_LARGEST = 1e30  # beyond it arithmetic on a broken file's numbers overflows

_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "fp16"}
_QUANTIZED = {"fp8": "fp8", "mxfp4": "mxfp4"}


class Reader:
    """One JSON object of a hub config. A getter marks its key as used; `close` refuses what nobody asked for.

    Getters take aliases ("num_experts", "num_local_experts"): at most one may be present, or they must agree. A key
    whose value is null counts as absent. Without `default` an absent key is an error.

    Raises: ConfigError that names the key, its value and what is expected.
    """

    def __init__(self, hub: Mapping[str, Any], *, ignore: tuple[str, ...] = (), prefix: str = ""):
        if not isinstance(hub, Mapping):
            raise ConfigError(f"{prefix or 'config.json'} is not a JSON object; expected keys and values in braces")
        self.hub = {key: value for key, value in hub.items() if prefix + key not in ignore}
        self.ignore, self.prefix = tuple(ignore), prefix
        self.ignored = tuple(sorted(prefix + key for key in hub if prefix + key in ignore))
        self._used: set[str] = set()

    # ------------------------------------------------------------------------------------------------- getters

    def get(self, *names: str, default: Any = _MISSING, expected: str = "a value") -> Any:
        """The raw value of the first of `names` that is present and not null."""
        self._used.update(names)
        present = [name for name in names if self.hub.get(name) is not None]
        if not present:
            if default is _MISSING:
                raise ConfigError(f"config.json lacks {self.prefix}{names[0]}; expected {expected}: add it")
            return default
        values = [self.hub[name] for name in present]
        if any(value != values[0] for value in values[1:]):
            pairs = ", ".join(f"{self.prefix}{name} {value!r}" for name, value in zip(present, values, strict=True))
            raise ConfigError(f"config.json contradicts itself ({pairs}); keep one, or --ignore-key the wrong one")
        return values[0]

    def has(self, name: str) -> bool:
        """Whether `name` is present and not null (does not mark it as used)."""
        return self.hub.get(name) is not None

    def integer(self, *names: str, default: Any = _MISSING, minimum: int = 0, maximum: int = 2**40) -> Any:
        """A whole number from `minimum` to `maximum` (a default is returned as it is, None included)."""
        expected = f"a whole number of at least {minimum} and at most {maximum}"
        value = self.get(*names, default=default, expected=expected)
        if value is default and default is not _MISSING:
            return value
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float) and value.is_integer():
            value, whole = int(value), True
        if not whole or not minimum <= value <= maximum:
            self._refuse(names, value, expected)
        return value

    def number(self, *names: str, default: Any = _MISSING) -> Any:
        """A finite number of sane size, as float (a default is returned as it is, None included)."""
        value = self.get(*names, default=default, expected="a number")
        if value is default and default is not _MISSING:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            self._refuse(names, value, "a finite number")
        return float(value)

    def boolean(self, *names: str, default: Any = _MISSING) -> bool:
        value = self.get(*names, default=default, expected="true or false")
        if not isinstance(value, bool):
            self._refuse(names, value, "true or false")
        return value

    def string(self, *names: str, default: Any = _MISSING) -> Any:
        value = self.get(*names, default=default, expected="a string")
        if value is not default and not isinstance(value, str):
            self._refuse(names, value, "a string")
        return value

    def items(self, *names: str, kind: type, length: int | None = None, default: Any = _MISSING) -> Any:
        """A list of `kind` (int, float or str), as a tuple; of `length` items where that is given."""
        of = {int: "whole numbers", float: "numbers", str: "strings"}[kind]
        expected = f"a list of {of}" if length is None else f"a list of {length} {of}"
        value = self.get(*names, default=default, expected=expected)
        if value is default and default is not _MISSING:
            return value
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            self._refuse(names, value, expected)
        if any(isinstance(item, bool) or not isinstance(item, accepted) for item in value):
            self._refuse(names, value, expected)
        return tuple(kind(item) for item in value)

    def section(self, name: str, *, default: Any = _MISSING) -> Any:
        """The nested object `name` as a Reader of its own; the caller closes it."""
        value = self.get(name, default=default, expected="an object")
        if value is default and default is not _MISSING:
            return value
        if not isinstance(value, Mapping):
            self._refuse((name,), value, "an object")
        return Reader(value, ignore=self.ignore, prefix=f"{self.prefix}{name}.")

    # ------------------------------------------------------------------------------------- asserted and ignored

    def expect(self, name: str, *allowed: Any, why: str = "fewfire implements nothing else") -> None:
        """Assert that `name` is absent, null or one of `allowed`."""
        value = self.get(name, default=None)
        if value is not None and not any(_same(value, item) for item in allowed):
            self._refuse((name,), value, f"{' or '.join(repr(item) for item in allowed)}: {why}")

    def skip(self, *names: str) -> None:
        """List `names` as ignored: they do not change the mathematics of this family."""
        self._used.update(names)

    def close(self) -> None:
        """Raise ConfigError on the first key that nobody used, asserted or listed as ignored."""
        unknown = sorted(key for key in self.hub if key not in self._used and key not in NEUTRAL)
        if unknown:
            names = ", ".join(self.prefix + key for key in unknown)
            raise ConfigError(
                f"config.json has keys that fewfire does not know: {names}; if they do not change the mathematics, "
                f"say so with --ignore-key {self.prefix}{unknown[0]}"
            )

    def _refuse(self, names: tuple[str, ...], value: Any, expected: str) -> None:
        name = next((name for name in names if self.hub.get(name) is not None), names[0])
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ConfigError(f"{self.prefix}{name} is {shown} in config.json; expected {expected}")


def _same(value: Any, item: Any) -> bool:
    """Equality of JSON values in which true is not 1."""
    return value is item if isinstance(value, bool) or isinstance(item, bool) else bool(value == item)


# ------------------------------------------------------------------------------------------ what all families share


def read_format(hub: Reader, default: str | None = None) -> str:
    """The native format of the weights: f32, bf16, fp16, or fp8 / mxfp4 where a quantization_config says so.

    `default`: what an absent dtype means (None: f32, torch's own default).
    """
    dtype = hub.string("dtype", "torch_dtype", default=None)
    quantization = hub.section("quantization_config", default=None)
    if quantization is not None:
        method = quantization.string("quant_method")
        if method not in _QUANTIZED:
            raise ConfigError(
                f"quantization_config.quant_method is {method!r} in config.json; expected fp8 or mxfp4, "
                "or the unquantized checkpoint (plan only: --ignore-key quantization_config)"
            )
        if method == "fp8" and quantization.get("weight_block_size", default=[128, 128]) != [128, 128]:
            raise ConfigError("quantization_config.weight_block_size must be [128, 128], the only block fewfire reads")
        return _QUANTIZED[method]
    if dtype is None:
        return default or "f32"
    dtype = dtype.removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r} in config.json; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def write_format(native_format: str) -> dict[str, Any]:
    """The keys that say `native_format`. Who writes other weights than the native ones replaces the field first."""
    if native_format == "fp8":
        block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        return {"dtype": "bfloat16", "quantization_config": block}
    if native_format == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}
    names = {ours: theirs for theirs, ours in _DTYPES.items()}
    if native_format not in names:
        raise ConfigError(f"native_format is {native_format!r}; the hub spells f32, bf16, fp16, fp8 and mxfp4 only")
    return {"dtype": names[native_format]}


def read_tokens(hub: Reader) -> dict[str, Any]:
    """bos, eos (one id or several) and pad, as ModelConfig's fields."""
    eos = hub.get("eos_token_id", default=())
    single = isinstance(eos, int) and not isinstance(eos, bool)
    ids = (eos,) if single else hub.items("eos_token_id", kind=int, default=())
    pad = hub.integer("pad_token_id", default=None, minimum=-1)
    return {
        "bos_token_id": hub.integer("bos_token_id", default=None),
        "eos_token_ids": ids,
        "pad_token_id": None if pad == -1 else pad,  # old Llama files say -1 for none
    }


def write_tokens(config: Any) -> dict[str, Any]:
    """bos, eos and pad as the hub spells them: eos is null, one id or a list."""
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }
