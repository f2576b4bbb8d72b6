"""Small tokenizers of the kinds that models have, with tokens of several bytes, made without any file."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END, TURN = "<|end|>", "<|turn|>"  # the special tokens; both end a completion

_CORPUS = [
    '{"name": "Ann", "size": 12, "tags": ["red", "blue"], "open": true, "notes": null}',
    '{"children": [{"children": []}], "title": "a b c", "price": 0.25, "count": -17}',
    "größe 名前 цена café 🙂 the quick brown fox jumps over the lazy dog, 2024-02-29T12:30:00Z",
    'v1.2.3 user@example.com http://example.org/a?b=c 192.168.0.1 ": ", ", " }, {"',
] * 4


def byte_level() -> Tokenizer:
    """Return a tokenizer as GPT-2, Llama 3, Qwen and SmolLM have it: merges over the bytes of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=alphabet, special_tokens=[END, TURN], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Return a tokenizer as Gemma and Llama 2 have it: pieces of text with "▁" for a space, and a token per byte."""
    pieces = sorted({character for text in _CORPUS for character in text.replace(" ", "▁")})
    words = [
        "▁a",
        "th",
        "the",
        "▁the",
        '":',
        '▁"',
        '",',
        "en",
        "re",
        "00",
        "[]",
        "{}",
        '{"',
        "},",
        "▁▁",
        "tr",
        "ue",
        "nu",
        "ll",
    ]
    names = [END, TURN, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *words]
    merges = [(word[:1], word[1:]) if word != "the" else ("th", "e") for word in words]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(TURN, special=True)])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback}
