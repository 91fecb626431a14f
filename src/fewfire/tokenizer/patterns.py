"""How byte-level vocabularies cut text into words before merging, by the names that GGUF and tiktoken files go under.

Each entry is a chain: a pattern's matches become words of their own, what lies between goes to the next pattern.
They are facts of published tokenizers, spelled for the regular expressions of the `tokenizers` library.
"""

from __future__ import annotations

_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"


def _cased(suffixes: str, digits: str, *, marks: str = r"[\r\n/]*", without: str = "") -> str:
    """Words split where lower case meets upper case (o200k and its kin)."""
    upper, lower = rf"\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}", rf"\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}"
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}[{upper}]*[{lower}]+{suffixes}|{first}[{upper}]+[{lower}]*{suffixes}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{marks}" + _SPACES
    )


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _SPACES
QWEN2 = rf"{_SUFFIXES}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _SPACES
O200K = _cased(_SUFFIXES + "?", r"\p{N}{1,3}")
TEKKEN = _cased("", r"\p{N}")
KIMI = r"\p{Han}+|" + _cased(_SUFFIXES + "?", r"\p{N}{1,3}", marks=r"[\r\n]*", without=r"&&[^\p{Han}]")
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
)
# Cased letters as of an old Unicode: without those that joined (or were cased) later.
_OLD_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c88}\x{2d00}-\x{2d2d}\x{a790}-\x{a7fa}"
    r"\x{ab30}-\x{ab6f}\x{10570}-\x{105bc}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df1e}]]"
)
_CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (GPT2,),
    "digits": (r"\p{N}", GPT2),
    "llama3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "o200k": (O200K,),
    "tekken": (TEKKEN,),
    "kimi": (KIMI,),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _PUNCTUATED + _SPACES),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{_OLD_CASED}+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CJK_HANGUL,
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

# GGUF's `tokenizer.ggml.pre` -> a chain above. Sources: llama.cpp's documentation of its pre-tokenizers and the
# tokenizer.json of each family.
GGUF_PRE: dict[str, str] = {
    **dict.fromkeys(("default",), "default"),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "exaone4", "a.x-4.0", "mellum"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits"),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), "llama3"),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"), "qwen2"),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), "o200k"),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), "deepseek-v3"),
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
    "falcon": "falcon",
    "tekken": "tekken",
    "kimi-k2": "kimi",
}
# Vocabularies that take a word which is a token as it is, whatever the merges say; and those that begin with bos.
GGUF_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"})
GGUF_BEGINS = GGUF_WHOLE_WORDS
