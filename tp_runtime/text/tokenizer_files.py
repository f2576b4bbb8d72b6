"""The tokenizer files of a model folder: the tokenizer, its special tokens, the template's text and the EOS ids.

The files are bytes by name: what is parsed here is what was read and, for an exported folder, hashed. A file that is
not in the mapping does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from ..errors import ModelFormatError, library_errors, shown
from ..session import ModelFolder
from ..storage import StrictJSONError, parse_json_object
from .table_tokenizer import TableTokenizer
from .tables import read_tables

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = "tool_use"  # the name that transformers gives the template for requests with tools
EOS_FILES = ("generation_config.json", "config.json")
TOKENIZER_FILES = (TOKENIZER, CONFIG, TEMPLATE, *EOS_FILES)
"""The names of the files that a codec reads; the first two must exist."""

TABLES = "tokenizer_tables.safetensors"
"""The name of the file with the tables of tokenizer.json, which a codec reads in its place where an export has it."""

AnyTokenizer: TypeAlias = "Tokenizer | TableTokenizer"

_FIX = "export the model again, or copy the file from its source"

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer of transformers has a name for; others are in extra_special_tokens.

They are variables of a template. A name that is not set stays undefined, here as in transformers.
"""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of one folder.

    Attributes:
        content: the bytes of each file by its name.
        where: the folder, for errors.
    """

    content: Mapping[str, bytes]
    where: str

    def path(self, name: str) -> str:
        """Return the path of a file, for errors."""
        return str(Path(self.where) / name)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ModelFormatError: there is no such file.
        """
        if name not in self.content:
            raise _broken(self.path(name), "the file is missing", got="no file", wanted="the file")
        return self.content[name]

    def json(self, name: str) -> dict[str, Any]:
        """Return the object of a JSON file of Hugging Face's tools.

        Raises:
            ModelFormatError: there is no such file, or it does not hold a JSON object.
        """
        try:
            return parse_json_object(self.read(name), lenient=True)
        except StrictJSONError as error:
            raise _broken(self.path(name), f"the file {error.problem}", error.got, error.wanted) from error


def read_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """Return the tokenizer of tokenizer.json, without its settings for truncation and padding.

    Raises:
        ModelFormatError: the file is missing or is not a tokenizer.
    """
    # The library gets bytes, because Gemma's 33 MB of text would be decoded here and encoded again.
    content = files.read(TOKENIZER)
    problem, wanted = "the file is not a tokenizer", "a file of the tokenizers library"
    with library_errors(ModelFormatError, problem, field=files.path(TOKENIZER), wanted=wanted, fix=_FIX):
        tokenizer = Tokenizer.from_buffer(content)
    # These settings are left over from training. transformers sets both again for each call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def table_tokenizer(folder: ModelFolder) -> TableTokenizer | None:
    """Return the tokenizer over the tables of an exported folder; None if the folder has none.

    Raises:
        ModelFormatError: the tables are damaged, are not the exported ones, or are those of another tokenizer.json.
        UnsafePathError: the path of the file leads outside the folder.
    """
    if not {TABLES, TOKENIZER} <= folder.files.keys():
        return None
    path = str(folder.path / TABLES)
    tables = read_tables(folder.read(TABLES), folder.files[TOKENIZER].sha256, path)
    with library_errors(ModelFormatError, "the tables are not those of a tokenizer", field=path, fix=_FIX):
        return TableTokenizer(
            tables, lambda: read_tokenizer(TokenizerFiles({TOKENIZER: folder.read(TOKENIZER)}, str(folder.path)))
        )


def check_added_tokens(tokenizer: AnyTokenizer, config: dict[str, Any], path: str) -> None:
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


def read_special_tokens(tokenizer: AnyTokenizer, config: dict[str, Any], path: str) -> dict[str, Any]:
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
    named = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    tokens: dict[str, Any] = {name: _token_text(value, name, path) for name, value in named.items()}
    name = "additional_special_tokens"
    if additional := config.get(name):
        if not isinstance(additional, list):
            raise _broken(path, f"{name} is malformed", got=shown(additional), wanted="a list")
        tokens[name] = [_token_text(value, name, path) for value in additional]
    for name in ("bos_token", "eos_token"):
        if name in tokens and tokenizer.token_to_id(tokens[name]) is None:
            raise _broken(path, f"{name} is not in tokenizer.json", got=tokens[name], wanted="a known token")
    return tokens


def read_template(files: TokenizerFiles, config: dict[str, Any]) -> str | None:
    """Return the text of the chat template, from chat_template.jinja or else from tokenizer_config.json.

    Args:
        files: the tokenizer files.
        config: the content of tokenizer_config.json.

    Returns:
        The text; None if there is no chat template.

    Raises:
        ModelFormatError: chat_template.jinja is not UTF-8, or the entry of the config is malformed.
    """
    if TEMPLATE in files.content:
        try:
            # The ends of lines become "\n", as in a text file that transformers reads.
            return files.content[TEMPLATE].decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise _broken(files.path(TEMPLATE), "the file cannot be read", got=error, wanted="UTF-8 text") from None
    template = value = config.get("chat_template")
    if isinstance(value, list):
        template = _named_template(value, "default")
    if value is not None and not isinstance(template, str):
        got, wanted = shown(value), 'str, or a list with a template named "default"'
        raise _broken(files.path(CONFIG), "chat_template is malformed", got, wanted)
    return template


def read_tool_template(files: TokenizerFiles, config: dict[str, Any]) -> str | None:
    """Return the text of the chat template for requests with tools; None if they have the same one as all others.

    Args:
        files: the tokenizer files.
        config: the content of tokenizer_config.json.

    Raises:
        ModelFormatError: the entry of the config is malformed.
    """
    value = config.get("chat_template")
    if TEMPLATE in files.content or not isinstance(value, list):
        return None
    template = _named_template(value, TOOL_TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise _broken(files.path(CONFIG), "the template named tool_use is malformed", shown(template), "str")
    return template


def _named_template(templates: list[Any], name: str) -> Any:
    named = [item.get("template") for item in templates if isinstance(item, dict) and item.get("name") == name]
    return named[-1] if named else None


def read_eos_ids(files: TokenizerFiles, tokenizer: AnyTokenizer, special_tokens: Mapping[str, Any]) -> frozenset[int]:
    """Return every token id that ends a completion.

    These are the EOS token, the ids of generation_config.json, and those of config.json. The files of real models
    disagree, and a completion that runs past an end does more harm than one that stops at a second end token. But
    where generation_config.json names ids, an id that only config.json names counts if it is an added token, and not
    if it is an ordinary one: an ordinary token is part of texts, and transformers does not stop at it.

    Args:
        files: the tokenizer files.
        tokenizer: the tokenizer of the folder.
        special_tokens: the tokens that `read_special_tokens` returned.

    Raises:
        ModelFormatError: a file is malformed, or no file names an end-of-sequence token.
    """
    ids: set[int] = set()
    if "eos_token" in special_tokens:
        eos = tokenizer.token_to_id(special_tokens["eos_token"])
        assert eos is not None  # read_special_tokens found it
        ids.add(eos)
    generation, config = (_named_eos_ids(files, name) for name in EOS_FILES)
    if generation:
        config &= tokenizer.get_added_tokens_decoder().keys()
    ids |= generation | config
    if not ids:
        problem, wanted = "the folder names no end-of-sequence token", "eos_token_id or eos_token"
        raise _broken(files.where, problem, got="none", wanted=wanted)
    return frozenset(ids)


def read_sampling(files: TokenizerFiles) -> dict[str, Any]:
    """Return the model's own sampling settings, by their names in `Sampling`, as transformers' generate takes them.

    They are those of generation_config.json. `do_sample` decides whether the model samples; where it is missing, a
    temperature, top_k or top_p says so. A model that samples has transformers' defaults for what it does not state.

    Raises:
        ModelFormatError: the file is malformed, or a setting is not a number.
    """
    name = EOS_FILES[0]
    stated = files.json(name) if name in files.content else {}
    stated = {key: stated[key] for key in ("do_sample", *_SAMPLING) if stated.get(key) is not None}
    found = {"repetition_penalty": stated.pop("repetition_penalty")} if "repetition_penalty" in stated else {}
    if stated.pop("do_sample", bool(stated)):
        found |= {"temperature": 1.0, "top_k": 50, **stated}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _broken(files.path(name), f"{key} is not a number", got=shown(value), wanted="a number")
    return found


def _named_eos_ids(files: TokenizerFiles, name: str) -> set[int]:
    value = files.json(name).get("eos_token_id") if name in files.content else None
    found = [] if value is None else value if isinstance(value, list) else [value]
    for eos in found:
        if type(eos) is not int or not 0 <= eos < 2**31:
            wanted = "an id or a list of ids"
            raise _broken(files.path(name), "eos_token_id is malformed", got=shown(value), wanted=wanted)
    return set(found)


def _token_text(value: Any, name: str, path: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise _broken(path, f"{name} is not a token", got=shown(value), wanted='str or {"content": str}')
    return text


def _broken(path: str, problem: str, got: object, wanted: str) -> ModelFormatError:
    return ModelFormatError(problem, field=path, got=got, wanted=wanted, fix=_FIX)
