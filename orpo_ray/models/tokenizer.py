"""The tokenizer of a base model, with the chat template that training and generation share."""

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orpo_ray.config.model import ModelConfig
from orpo_ray.config.storage import expanded, is_gguf, is_url, local_path
from orpo_ray.errors import ConfigError
from orpo_ray.models.gguf import convert_gguf, converted_folder
from orpo_ray.models.templates import TEMPLATES, template_text
from orpo_ray.models.trained import fetch_trained, missing_base
from orpo_ray.runs.console import Announce


def load_tokenizer(config: ModelConfig, announce: Announce) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template settled.

    Raises ConfigError if it cannot be loaded or has no end token.
    """
    if not Path(base_location(config)).exists():
        announce(f"looking for {config.base} in the local cache and on the Hugging Face hub")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_location(config), revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(explain_load_error(config.base, "tokenizer", error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"model.base: {config.base} holds no tokenizer: there is no vocabulary in it"
        )
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"model.base: the tokenizer of {config.base} names no end token (eos_token); answers "
            "need one"
        )
    if config.chat_template is not None:
        tokenizer.chat_template = _settled_template(tokenizer, config, announce)
    elif tokenizer.chat_template is None:
        announce(
            f"{config.base} has no chat template: the plain one is used "
            "(Human: ... Assistant: ...); model.chat_template names another"
        )
        tokenizer.chat_template = TEMPLATES["plain"].text
    return tokenizer


def base_location(config: ModelConfig) -> str:
    """The base as transformers takes it.

    A hub name stays as it is. A folder gets its absolute path, which adapters keep: they are loaded
    from elsewhere, too. A URL or a GGUF file becomes the path of the copy that `make_local` makes.
    """
    if is_gguf(config.base):
        return str(converted_folder(config.base))
    if config.base.startswith("~") or is_url(config.base):
        return str(local_path(config.base))
    folder = Path(config.base)
    return str(folder.absolute()) if folder.is_dir() else config.base


def make_local(config: ModelConfig, announce: Announce) -> None:
    """Fetch a base with a URL to this server, or dequantise a GGUF file here.

    What comes from the hub is fetched later, by the hub's own client.
    """
    fetch_trained(config.base)
    if is_gguf(config.base):
        convert_gguf(config.base, announce)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary, the rules and the special tokens, but not the chat template."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer.to_str()
    else:
        backend = repr(sorted(tokenizer.get_vocab().items()))
    tokens = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    special = repr(tokens)
    return hashlib.sha256((backend + special).encode()).hexdigest()


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id that fills batches. Masks come from lengths, so any id would do."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id)


def explain_load_error(base: str, part: str, error: Exception) -> str:
    """One line for a base that does not load.

    The folder may be missing, the account may have no access, or the files may be broken.
    """
    if missing := missing_base(base):
        return missing
    folder = expanded(base)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    # A first line that ends with a colon only introduces the next.
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if folder.is_dir():
        return f"model.base: the {part} in {base} cannot be loaded: {reason}"
    return (
        f"model.base: the {part} of {base} cannot be loaded: {reason} (is the name right, "
        "is access granted to this account, is the network reachable or the model in the local "
        "cache?)"
    )


def _settled_template(
    tokenizer: PreTrainedTokenizerBase, config: ModelConfig, announce: Announce
) -> str:
    """The template that the config names, with an end token that the base knows.

    Announces the marks of a named template that are no single tokens of the base.
    """
    text = template_text(str(config.chat_template))
    named = TEMPLATES.get(str(config.chat_template))
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in named.marks if mark not in vocabulary] if named else []
    if named is None or not missing:
        return text
    told = (
        f"model.chat_template: {config.chat_template} writes {', '.join(missing)}; the "
        f"tokenizer of {config.base} has no such token and cuts each of them into several "
        "ordinary tokens"
    )
    if named.end in missing:
        told += f", but for {named.end}: {tokenizer.eos_token} ends each turn in its place"
        text = named.ending_with(str(tokenizer.eos_token))
    announce(told)
    return text
