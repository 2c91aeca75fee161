"""What publishing needs from the Hugging Face Hub: access, a valid card, and one commit with all files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kestrel.adapter.source import ADAPTER_FILES
from kestrel.errors import KestrelError
from kestrel.hub import plain_hub_errors, use_cache_without_network
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST

CARD = "README.md"
PUBLISHED_FILES = (*ADAPTER_FILES, CARD, "config.yaml", "metrics.json")
_EMPTY_REPOSITORY = {".gitattributes", ".gitignore", CARD, "LICENSE"}  # the Hub's page creates new ones with these
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def base_config(name: str, revision: str | None, key: str = "model.name") -> dict[str, Any]:
    """A base model's config.json, from its folder or from the Hub.

    Raises:
        KestrelError: it cannot be read or downloaded.
    """
    from huggingface_hub import hf_hub_download

    path = Path(name) / "config.json"
    if not path.parent.is_dir():
        use_cache_without_network()
        with plain_hub_errors(f"{key} {name}"):
            path = Path(hf_hub_download(name, "config.json", revision=revision))
    config: dict[str, Any] = read_json(path, f"check {key}")
    return config


def check_access(repo_id: str, private: bool) -> tuple[str, bool]:
    """Checks, before anything is sent, that the token and the repository fit.

    Returns:
        The token's owner, and whether the repository is, or will be, private.

    Raises:
        KestrelError: no token, no connection, or a repository that is public against hub.private or holds something else.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    with plain_hub_errors(f"hub.repo_id {repo_id}"):
        user = str(api.whoami()["name"])
        try:
            found = api.model_info(repo_id)
        except errors.RepositoryNotFoundError:
            return user, private
    is_private = bool(found.private)
    present = {entry.rfilename for entry in found.siblings or []}
    others = sorted(present - _EMPTY_REPOSITORY)
    problem = ""
    if others and MANIFEST not in present:
        problem = f"holds {', '.join(others[:3])} but no adapter of Kestrel;"
    elif private and not is_private:
        problem = "is public and hub.private is true; set hub.private: false to publish there, or"
    if problem:
        raise KestrelError(f"hub.repo_id {repo_id}: the repository {problem} name another repository")
    return user, is_private


def check_card_links(base: str, ours: Mapping[str, Any], datasets: Iterable[str]) -> None:
    """Checks that the Hub has the base and the data sets that the card names.

    Args:
        base, datasets: their ids.
        ours: config.json of the base that the adapter was trained on.

    Raises:
        KestrelError: one does not exist, or that base has another shape than ours.
    """
    from huggingface_hub import HfApi

    theirs = base_config(base, None, "hub.base_model")
    for key in _SHAPE:
        if theirs.get(key) != ours.get(key) and None not in (theirs.get(key), ours.get(key)):
            raise KestrelError(
                f"hub.base_model {base}: its {key} is {theirs[key]!r} on the Hub but {ours[key]!r} in model.name, which "
                "therefore is not a copy of it"
            )
    for name in datasets:
        with plain_hub_errors(f"the data set {name} that the card would name (hub.datasets, or else data.source)"):
            HfApi().dataset_info(name)


def validate_card(content: str, repo_id: str) -> None:
    """Lets the Hub check a card's metadata.

    Raises:
        KestrelError: it refuses them, with its reasons.
    """
    from huggingface_hub import ModelCard

    with plain_hub_errors(f"hub.repo_id {repo_id}"):
        try:
            ModelCard(content, ignore_metadata_errors=False).validate()
        except ValueError as error:
            raise KestrelError(f"the Hub refuses the card's metadata: {_reasons(str(error))}") from None


def _reasons(answer: str) -> str:
    """The reasons in the JSON answer, which the client (huggingface_hub 2.4) passes on unread."""
    try:
        return "; ".join(str(found["message"]) for found in json.loads(answer)["errors"]) or answer
    except (ValueError, KeyError, TypeError):
        return answer


def upload(repo_id: str, private: bool, files: Mapping[str, bytes]) -> tuple[str, bool]:
    """Makes one commit of all files. Large files that an earlier call sent are not sent again.

    Files of `PUBLISHED_FILES` that are not given are deleted from the repository; its other files stay.

    Args:
        repo_id: created if it does not exist.
        private: whether a new repository is.
        files: content by name.

    Returns:
        The repository's URL, and whether its content changed.

    Raises:
        KestrelError: refused or interrupted; the same call continues.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in sorted(files.items())
    ]
    with plain_hub_errors(f"hub.repo_id {repo_id}"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        before = api.model_info(repo_id)
        present = {entry.rfilename for entry in before.siblings or []}
        outdated = sorted(present.intersection(PUBLISHED_FILES).difference(files))
        operations += [CommitOperationDelete(name) for name in outdated]
        api.create_commit(repo_id, operations, commit_message="Adapter, evaluation and card", parent_commit=before.sha)
        return str(url), api.model_info(repo_id).sha != before.sha
