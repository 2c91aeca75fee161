"""The tokenizer of the base model, without torch where possible: preprocess.py needs nothing else of the model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.config.settings import Model
from kestrel.errors import KestrelError
from kestrel.hub import plain_loading_errors, refuse_pointers
from kestrel.runtime.manifest import sha256_of_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Markup such as <think> or [TOOL], which some tokenizers hold as an added token that is not special.
_MARKUP = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")

# Any file that a tokenizer is made from.
_IS_TOKENIZER = re.compile(
    r".*(?:tokenizer\.json|\.model|\.tiktoken|vocab\.(?:json|txt)|tekken\.json|tokenizer\.model\.v\d+)"
).fullmatch
# Words, digits, punctuation, line breaks and scripts that pipelines cut in different ways. No special token, no blank first.
_PROBE = "Hello there, I've 2 dogs & 12345 cats.\n\nYou: Zoë isn't here…  naïve 你好 :-)"


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model. Every script loads it first, so the warning about remote code is here.

    Raises:
        KestrelError: it cannot be found or loaded.
    """
    if settings.trust_remote_code:
        print(
            f"warning: model.trust_remote_code is true: Python code that comes with {settings.name} runs with your rights and "
            "can read, change and send whatever you can, including your token of the Hub",
            file=sys.stderr,
        )
    _require_tokenizer(Path(settings.name), settings.trust_remote_code)
    with plain_loading_errors("tokenizer", settings.name):
        if _is_plain_falcon(Path(settings.name)):
            from transformers import TokenizersBackend

            tokenizer = TokenizersBackend.from_pretrained(settings.name)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
            )
            tokenizer = _as_its_file_says(tokenizer, settings)
    # transformers (5.23) saves with a tokenizer whether the network was allowed; the adapter's files must not depend on it.
    tokenizer.init_kwargs["local_files_only"] = False
    return tokenizer


def _require_tokenizer(folder: Path, trust_remote_code: bool) -> None:
    """Refuses a local folder without a tokenizer, such as one to which a Trainer saved the model alone."""
    refuse_pointers(folder, "model.name")
    if folder.is_dir() and not trust_remote_code and not any(map(_IS_TOKENIZER, map(str, folder.iterdir()))):
        found = "".join(f", but {path.name}: name the model that it was made from" for path in folder.glob("*.gguf"))
        raise KestrelError(
            f"model.name {folder} holds no tokenizer (tokenizer.json or tokenizer.model)"
            + (found or "; copy its files from the model that this one was made from")
        )


def _as_its_file_says(tokenizer: PreTrainedTokenizerBase, settings: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json where the class that tokenizer_config.json names makes other ids, or none.

    transformers (since 5.0) builds a class's own pipeline around the vocabulary. Folders often name a class that is not
    theirs (DeepSeek's distilled models: LlamaTokenizerFast), and blanks are lost or words cut otherwise.
    """
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer
    from transformers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend) or type(tokenizer) is TokenizersBackend:
        return tokenizer
    path: Any = Path(settings.name) / "tokenizer.json"
    if not Path(settings.name).is_dir():  # on the Hub, from where the tokenizer was loaded just now
        path = try_to_load_from_cache(settings.name, "tokenizer.json", revision=settings.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return tokenizer
    expected = Tokenizer.from_file(str(path)).encode(_PROBE, add_special_tokens=False).ids
    try:
        if tokenizer(_PROBE, add_special_tokens=False)["input_ids"] == expected:
            return tokenizer
    except Exception as error:
        if type(error) is not Exception:  # what `tokenizers` raises: the class wants a token that is not there
            raise
    print(
        f"note: tokenizer_config.json of {settings.name} names {type(tokenizer).__name__}, which would cut texts otherwise "
        "than its tokenizer.json; tokenizer.json is used"
    )
    made: PreTrainedTokenizerBase = TokenizersBackend.from_pretrained(settings.name, revision=settings.revision)
    return made


def _is_plain_falcon(folder: Path) -> bool:
    """Whether this is a local Falcon, for which AutoTokenizer would choose the plain fast tokenizer.

    AutoTokenizer imports the models' configurations, and they import torch: two seconds and 200 MB that preprocess.py
    does not need (transformers 5.23; tests/chain/test_preprocess.py, test_torch_is_not_imported, fails when that changes).
    """
    try:
        files = (folder / name for name in ("config.json", "tokenizer_config.json"))
        model, tokenizer = (json.loads(path.read_text("utf-8")) for path in files)
        return (
            (folder / "tokenizer.json").is_file()
            and model["model_type"] == "falcon"
            and tokenizer["tokenizer_class"] in ("TokenizersBackend", "PreTrainedTokenizerFast")
            and "auto_map" not in {**model, **tokenizer}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the library reports what is wrong


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    # State of the last call, not part of the tokenizer.
    pipeline |= {"truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_of_json([pipeline, special])


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that control a model and that no text may spell: special tokens and added tokens that are markup.

    Added words, emoji and runs of spaces are text. So is the unknown token, unless it is also the end or the beginning of
    a text.
    """
    added = tokenizer.added_tokens_decoder.items()
    markup = {index for index, token in added if token.special or _MARKUP.fullmatch(token.content)}
    boundaries = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return frozenset({*markup, *tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - boundaries))
