"""The tokenizer files of a model folder: the tokenizer, its special tokens, the template's text and the EOS ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from ..errors import ModelFormatError
from ..storage import read_json_object

_T = TypeVar("_T")

_FIX = "export the model again, or copy the file from its source"

# The names that transformers passes to a template. A name that is not set stays undefined, here as in transformers.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of Hugging Face's tools.

    Raises:
        ModelFormatError: the file is missing, cannot be read, or does not hold a JSON object.
    """
    return read_json_object(path, ModelFormatError, _FIX, lenient=True)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json, without its settings for truncation and padding.

    Raises:
        ModelFormatError: the file is missing, cannot be read, or is not a tokenizer.
    """
    # This reads bytes, because Gemma's 33 MB of text would be decoded here and encoded again.
    content = _read(path, path.read_bytes)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise _broken(
            path, "the file is not a tokenizer", got=error, wanted="a file of the tokenizers library"
        ) from None
    # These settings are left over from training. transformers sets both again for each call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_added_tokens(tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Check that the tokenizer knows every added token of tokenizer_config.json under the same id.

    transformers would append a token that only the config has, and return ids that this tokenizer does not have.

    Args:
        tokenizer: the tokenizer of the folder.
        config: the content of tokenizer_config.json.
        path: the path of tokenizer_config.json, for errors.

    Raises:
        ModelFormatError: the added tokens are malformed, or one has another id in the tokenizer or is missing there.
    """
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise _broken(path, "added_tokens_decoder is malformed", got=type(added).__name__, wanted="an object")
    for index, value in added.items():
        text = _token_text(value, f"added_tokens_decoder[{index}]", path)
        known = tokenizer.token_to_id(text)
        if str(known) != index:
            raise _broken(path, f"{text!r} has another id in tokenizer.json", got=index, wanted=str(known))


def read_special_tokens(tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the special tokens of tokenizer_config.json, which are the variables of a template.

    Args:
        tokenizer: the tokenizer of the folder.
        config: the content of tokenizer_config.json.
        path: the path of tokenizer_config.json, for errors.

    Returns:
        The text of each token by its name; for additional_special_tokens a list of texts.

    Raises:
        ModelFormatError: a token is malformed, or the tokenizer does not know the BOS or the EOS token.
    """
    named = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    tokens: dict[str, Any] = {name: _token_text(value, name, path) for name, value in named.items()}
    name = "additional_special_tokens"
    if additional := config.get(name):
        if not isinstance(additional, list):
            raise _broken(path, f"{name} is malformed", got=additional, wanted="a list")
        tokens[name] = [_token_text(value, name, path) for value in additional]
    for name in ("bos_token", "eos_token"):
        if name in tokens and tokenizer.token_to_id(tokens[name]) is None:
            raise _broken(path, f"{name} is not in tokenizer.json", got=tokens[name], wanted="a known token")
    return tokens


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the text of the chat template, from chat_template.jinja or else from tokenizer_config.json.

    Args:
        folder: the model folder.
        config: the content of tokenizer_config.json.

    Returns:
        The text; None if the folder has no chat template.

    Raises:
        ModelFormatError: chat_template.jinja cannot be read, or the entry of the config is malformed.
    """
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        return _read_text(template_file)
    template = value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        template = named.get("default")
    if value is not None and not isinstance(template, str):
        got, wanted = str(value)[:60], 'str, or a list with a template named "default"'
        raise _broken(folder / "tokenizer_config.json", "chat_template is malformed", got, wanted)
    return template


def read_eos_ids(folder: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, Any]) -> frozenset[int]:
    """Return every token id that ends a completion.

    These are the EOS token, the ids of generation_config.json, and those of config.json. The files of real models
    disagree, and a completion that runs past an end does more harm than one that stops at a second end token. But
    where generation_config.json names ids, an id that only config.json names counts if it is an added token, and not
    if it is an ordinary one: an ordinary token is part of texts, and transformers does not stop at it.

    Args:
        folder: the model folder.
        tokenizer: the tokenizer of the folder.
        special_tokens: the tokens that `read_special_tokens` returned.

    Raises:
        ModelFormatError: a file is malformed, or no file names an end-of-sequence token.
    """
    ids: set[int] = set()
    if "eos_token" in special_tokens:
        ids.add(tokenizer.token_to_id(special_tokens["eos_token"]))
    generation, config = (_read_eos_ids(folder / name) for name in ("generation_config.json", "config.json"))
    if generation:
        config &= tokenizer.get_added_tokens_decoder().keys()
    ids |= generation | config
    if not ids:
        raise _broken(
            folder, "the folder names no end-of-sequence token", got="none", wanted="eos_token_id or eos_token"
        )
    return frozenset(ids)


def _read_eos_ids(path: Path) -> set[int]:
    value = read_json(path).get("eos_token_id") if path.exists() else None
    found = [] if value is None else value if isinstance(value, list) else [value]
    for eos in found:
        if type(eos) is not int or eos < 0:
            raise _broken(path, "eos_token_id is malformed", got=value, wanted="an id or a list of ids")
    return set(found)


def _token_text(value: Any, name: str, path: Path) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise _broken(path, f"{name} is not a token", got=value, wanted='str or {"content": str}')
    return text


def _read_text(path: Path) -> str:
    return _read(path, lambda: path.read_text(encoding="utf-8"))


def _read(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except FileNotFoundError:
        raise _broken(path, "the file is missing", got="no file", wanted="the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, "the file cannot be read", got=error, wanted="UTF-8 text") from None


def _broken(path: Path, problem: str, got: object, wanted: str) -> ModelFormatError:
    return ModelFormatError(problem, field=str(path), got=got, wanted=wanted, fix=_FIX)
