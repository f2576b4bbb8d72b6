"""The tokenizer of a source as transformers resolves it, in files that give the edge codec the same token ids.

transformers makes its tokenizer from more than tokenizer.json: special_tokens_map.json, the options of
tokenizer_config.json, the defaults of the tokenizer's class and five layouts of chat templates change the ids. The edge
half reads tokenizer.json, the tokens named in tokenizer_config.json, and one template. So this module loads the source
with transformers, writes what it resolved into those files where the source's own say something else, and compares the
codec made of them with transformers (token_ids.py). A tokenizer that cannot be matched is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tp_runtime.errors import ModelFormatError, library_errors
from tp_runtime.storage import StrictJSONError, check_name, parse_json_object, temporary_folder
from tp_runtime.text import SPECIAL_TOKENS, TOKENIZER_FILES, TOOL_TEMPLATE, Style, TextCodec

from .files import read_file
from .token_ids import Difference, first_change, first_difference, load_tokenizer, short

# The codec reads the ids that end a text from the files in `_ENDS`.
_TOKENIZER, _CONFIG, _TEMPLATE, *_ENDS = TOKENIZER_FILES
_TOKENS = "special_tokens_map.json"
_OWN = (_TOKENIZER, _CONFIG, _TEMPLATE, _TOKENS)
_ADDITIONAL = "additional_special_tokens"
# The class of transformers that takes tokenizer.json as it is, but for add_prefix_space.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
# Options that name other files or code, or rebuild the tokenizer from files that an export does not have.
_REBUILD = ("fast_tokenizer_files", "auto_map", "from_slow", "fix_mistral_regex", "tokenizer_file", "vocab_file")
_FIX = "save the tokenizer again with transformers' save_pretrained, and compare its ids with those of the training"


@dataclass(frozen=True)
class EffectiveTokenizer:
    """A source's tokenizer and chat template, as transformers resolves them.

    Attributes:
        files: the content of each tokenizer file of an exported folder, by name: the source's own bytes where they say
            the same as transformers.
        codec: the codec that these files give.
        before: the codec that the source's own files give without transformers; None if they give none.
        reason: why the base digest differs from that of earlier versions, which read the source's own files only; None
            if it does not, or if earlier versions refused the source.
    """

    files: Mapping[str, bytes]
    codec: TextCodec
    before: TextCodec | None
    reason: str | None
    _own_tokenizer: bytes

    @property
    def digest_text(self) -> dict[str, Any]:
        """How text reaches the model, as the base digest covers it.

        It covers the source's own tokenizer.json, unless that gives other ids than transformers. Then it covers the
        resolved tokenizer and special tokens.
        """
        if self.before is not None and self.reason is None:
            return _digest_text(self.before, self._own_tokenizer)
        tokens = _tokens_of(parse_json_object(self.files[_CONFIG], lenient=True))
        return {**_digest_text(self.codec, self.files[_TOKENIZER]), "special_tokens": tokens}

    @property
    def digest_text_before(self) -> dict[str, Any] | None:
        """The same as earlier versions covered it, if `reason` says that it differs; otherwise None."""
        if self.before is None or self.reason is None:
            return None
        return _digest_text(self.before, self._own_tokenizer)


def effective_tokenizer(path: Path, recorded_style: Style | None = None) -> EffectiveTokenizer:
    """Load a source's tokenizer with transformers and return it in files that the edge half reads.

    Args:
        path: the source, a Hugging Face folder with tokenizer.json and tokenizer_config.json.
        recorded_style: the style that the source's record names; None means "chat" if there is a chat template.

    Raises:
        ModelFormatError: a file is damaged; transformers cannot load the tokenizer; there are chat templates but no
            default; the ids are random; an added token has another id than tokenizer_config.json says; the ids that
            begin or end a text are out of the vocabulary; the config names a tokenizer in another place; or the edge
            half cannot give the ids of transformers.
        UnsafePathError: the config names a file for a version of transformers outside the folder.
    """
    own = {name: read_file(path / name) for name in _OWN if (path / name).is_file()}
    ends = {name: read_file(path / name) for name in _ENDS if (path / name).is_file()}
    config = _object(own[_CONFIG], path / _CONFIG)
    _check_places(config, path)
    loaded = load_tokenizer(path)
    _check_dropout(loaded, path)
    _check_added_ids(config, loaded, path)
    template, tool_template = _template(loaded, path), _tool_template(loaded)
    tokenizer = _tokenizer_json(own[_TOKENIZER], loaded, path)
    problem: ModelFormatError | None = None
    style: Style = recorded_style or ("completion" if template is None else "chat")
    for files in _candidates(own, config, tokenizer, template, tool_template, loaded):
        try:
            codec = TextCodec.from_files(files | ends, str(path), style)
        except ModelFormatError as error:
            problem = problem or error
            continue
        if style == "chat" and codec.tool_template_source != tool_template:
            continue  # the source has it in a folder of templates, and a later candidate in its config
        # The source's own files need not be loaded again: transformers has just loaded them.
        difference = first_difference(codec, loaded) or (None if files == own else _reloaded(files | ends, loaded))
        if difference is None:
            break
        problem = problem or _unmatched(difference, path)
    else:
        assert problem is not None  # there is always a candidate
        raise problem
    _check_vocabulary(codec, ends, path)
    if files == own:
        return EffectiveTokenizer(files, codec, codec, None, own[_TOKENIZER])
    reason, before = None, None
    with suppress(ModelFormatError):  # if earlier versions refused the source, no patch of it exists
        before = TextCodec.from_files(own | ends, str(path), recorded_style)
    if before is not None and (example := first_change(before, codec, loaded)):
        reason = f"the tokenizer's files were read without transformers, which gave other token ids for {example}"
    return EffectiveTokenizer(files, codec, before, reason, own[_TOKENIZER])


def _digest_text(codec: TextCodec, tokenizer: bytes) -> dict[str, Any]:
    parsed = parse_json_object(tokenizer, lenient=True)
    return {"style": codec.style, "template": codec.template_source, "tokenizer": parsed}


# -- what transformers resolved ------------------------------------------------------------------------------


def _template(loaded: Any, path: Path) -> str | None:
    """Return the chat template that `apply_chat_template` takes; None if there is none."""
    found = loaded.chat_template
    if found is None or found == {}:
        return None
    template = found.get("default") if isinstance(found, dict) else found
    if not isinstance(template, str):
        named = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ModelFormatError(
            "chat_template is malformed, or there are chat templates and none of them is the default",
            field=str(path / _CONFIG),
            got=short(named),
            wanted='a text, or templates by name with one named "default"',
            fix="write the template for ordinary chats to chat_template.jinja",
        )
    return template


def _tool_template(loaded: Any) -> str | None:
    """Return the chat template that `apply_chat_template` takes with tools; None if it is the same one as without."""
    found = loaded.chat_template
    template = found.get(TOOL_TEMPLATE) if isinstance(found, dict) else None
    return template if isinstance(template, str) else None


def _tokenizer_json(own: bytes, loaded: Any, path: Path) -> bytes:
    """Return `own` if it is transformers' tokenizer, apart from truncation and padding; otherwise that tokenizer."""
    backend = loaded.backend_tokenizer
    # Most files are as the library writes them. Then the source's vocabulary need not be parsed for the comparison.
    if backend.to_str(pretty=True).encode() == own.strip():
        return own
    with library_errors(ModelFormatError, "the file is not a tokenizer", field=str(path / _TOKENIZER), fix=_FIX):
        parsed = Tokenizer.from_buffer(own)
    # transformers sets truncation and padding again for each call.
    for tokenizer in (parsed, backend):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    resolved = backend.to_str()
    return own if parsed.to_str() == resolved else resolved.encode()


def _check_places(config: Mapping[str, Any], path: Path) -> None:
    """Check that transformers reads the source's own tokenizer.json: its config can name a file anywhere.

    Such a path is relative to the working folder, so one source would have other ids in every place it is read from.
    """
    if config.get("tokenizer_file") is not None:
        raise ModelFormatError(
            "the config of the tokenizer names a tokenizer in another place",
            field=f"{path / _CONFIG} tokenizer_file",
            got=short(repr(config["tokenizer_file"])),
            wanted=f"the folder's own {_TOKENIZER}",
            fix=f"copy that tokenizer to {_TOKENIZER} if it is the model's, and remove tokenizer_file from {_CONFIG}",
        )
    versions = config.get("fast_tokenizer_files")
    for name in versions if isinstance(versions, list) else ():
        check_name(str(name), f"{_CONFIG} fast_tokenizer_files")


def _check_dropout(loaded: Any, path: Path) -> None:
    """Check that equal texts get equal ids: a tokenizer made for training may leave out merges at random."""
    if dropout := getattr(loaded.backend_tokenizer.model, "dropout", None):
        raise ModelFormatError(
            "the tokenizer leaves out merges at random, so that one text has several token ids",
            field=str(path / _TOKENIZER),
            got=f"a dropout of {dropout:g}",
            wanted="a tokenizer without dropout",
            fix="set model.dropout in tokenizer.json to null",
        )


def _check_added_ids(config: dict[str, Any], loaded: Any, path: Path) -> None:
    """Check that the added tokens have the ids that tokenizer_config.json says: transformers appends unknown ones."""
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        text = _text_of(token)
        known = loaded.backend_tokenizer.token_to_id(text) if isinstance(text, str) else None
        if str(known) != index:
            raise ModelFormatError(
                f"the added token {short(repr(text), 60)} has another id in transformers' tokenizer",
                field=str(path / _CONFIG),
                got=f"id {index}",
                wanted=f"id {known}",
                fix="restore tokenizer.json and tokenizer_config.json from the model's source",
            )


def _check_vocabulary(codec: TextCodec, ends: Mapping[str, bytes], path: Path) -> None:
    """Check that the model has embeddings for the ids that begin and end a text."""
    config = _object(ends["config.json"], path / "config.json")
    text_config = config.get("text_config")
    size = config.get("vocab_size", text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if type(size) is not int:  # transformers has the architecture's own default, and reports a value that is no integer
        return
    named = {"BOS": set() if codec.bos_id is None else {codec.bos_id}, "EOS": codec.eos_ids}
    for name, ids in named.items():
        if beyond := sorted(index for index in ids if index >= size):
            raise ModelFormatError(
                f"the {name} token is not in the model's vocabulary",
                field=str(path),
                got=f"id {beyond[0]}",
                wanted=f"an id below {size}",
                fix="correct eos_token_id in config.json and generation_config.json, or restore the tokenizer's files",
            )


# -- files that say it ---------------------------------------------------------------------------------------


def _candidates(
    own: Mapping[str, bytes],
    config: dict[str, Any],
    tokenizer: bytes,
    template: str | None,
    tool_template: str | None,
    loaded: Any,
) -> Iterator[dict[str, bytes]]:
    """Yield sets of files that could give transformers' ids, the ones nearest to the source's own first."""
    tokens = loaded.special_tokens_map
    files = {**own, _TOKENIZER: tokenizer}
    if _TOKENS in own and not _agrees(own[_TOKENS], tokens):
        files[_TOKENS] = _json(tokens)
    if _tokens_of(config) == tokens:
        yield files
    resolved = {key: value for key, value in config.items() if key not in ("chat_template", _ADDITIONAL)}
    resolved |= {name: tokens.get(name) for name in SPECIAL_TOKENS if name in tokens or name in config}
    if _ADDITIONAL in tokens:
        resolved[_ADDITIONAL] = tokens[_ADDITIONAL]
    if extra := {name: text for name, text in tokens.items() if name not in (*SPECIAL_TOKENS, _ADDITIONAL)}:
        resolved["extra_special_tokens"] = extra
    added = loaded.added_tokens_decoder
    resolved["added_tokens_decoder"] = {str(index): _flags(token) for index, token in sorted(added.items())}
    if template is not None and tool_template is not None:
        files.pop(_TEMPLATE, None)
        named = {"default": template, TOOL_TEMPLATE: tool_template}
        resolved["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif template is not None:
        files[_TEMPLATE] = template.encode()
    yield {**files, _CONFIG: _json(resolved)}
    # Some classes change the tokenizer when they are loaded. The last candidate names the class that does not.
    plain = {key: value for key, value in resolved.items() if key not in _REBUILD}
    plain |= {"tokenizer_class": _PLAIN_CLASS, "add_prefix_space": _adds_prefix_space(loaded)}
    plain |= {name: getattr(loaded, name) for name in ("clean_up_tokenization_spaces", "padding_side")}
    yield {**files, _CONFIG: _json(plain)}


def _adds_prefix_space(loaded: Any) -> bool:
    """Return the option with which the plain class leaves the pre-tokenizer as it is."""
    pre_tokenizer = loaded.backend_tokenizer.pre_tokenizer
    state = {} if pre_tokenizer is None else json.loads(pre_tokenizer.__getstate__())
    return bool(state.get("add_prefix_space", False))


def _flags(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _tokens_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens of a tokenizer_config.json as the codec reads them: texts by name."""
    tokens = {name: _text_of(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        tokens |= {name: _text_of(value) for name, value in extra.items()}
    if isinstance(additional := config.get(_ADDITIONAL), list) and additional:
        tokens[_ADDITIONAL] = [_text_of(value) for value in additional]
    return tokens


def _agrees(content: bytes, tokens: Mapping[str, Any]) -> bool:
    """Return whether a special_tokens_map.json says nothing that contradicts the resolved tokens."""
    try:
        named = parse_json_object(content, lenient=True)
    except StrictJSONError:
        return False
    texts = {key: [*map(_text_of, v)] if isinstance(v, list) else _text_of(v) for key, v in named.items()}
    return all(tokens.get(key) == text for key, text in texts.items() if text)


def _text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _object(content: bytes, file: Path) -> dict[str, Any]:
    try:
        return parse_json_object(content, lenient=True)
    except StrictJSONError as error:
        raise ModelFormatError(
            f"the file {error.problem}",
            field=str(file),
            got=error.got,
            wanted=error.wanted,
            fix="fetch the model again",
        ) from error


# -- trying them ---------------------------------------------------------------------------------------------


def _reloaded(files: Mapping[str, bytes], loaded: Any) -> Difference | None:
    """Return how the tokenizer differs that transformers loads from these files; None if it does not."""
    with temporary_folder(prefix="tp-tokenizer-") as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            again = load_tokenizer(folder)
        except ModelFormatError as error:
            return Difference("loading the exported files", error.problem, "the tokenizer of the source")
    for tokenizer in (again, loaded):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    if again.special_tokens_map != loaded.special_tokens_map:
        got, wanted = (short(str(tokenizer.special_tokens_map), 300) for tokenizer in (again, loaded))
        return Difference("loading the exported files", got, wanted)
    if again.backend_tokenizer.to_str() != loaded.backend_tokenizer.to_str():
        return Difference("loading the exported files", "another tokenizer", "the tokenizer of the source")
    return None


def _unmatched(difference: Difference, path: Path) -> ModelFormatError:
    return ModelFormatError(
        "the edge tokenizer cannot give the token ids that transformers gives",
        field=str(path),
        got=f"{difference.got} for {difference.text}",
        wanted=difference.wanted,
        fix=_FIX,
    )
