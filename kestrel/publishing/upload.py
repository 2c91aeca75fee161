"""What publishing asks of the Hugging Face Hub: access, a sound card, and one commit with all files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.adapter.source import ADAPTER_FILES
from kestrel.errors import KestrelError
from kestrel.hub import plain_hub_errors, use_cache_without_network
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST

CARD = "README.md"
PUBLISHED_FILES = (*ADAPTER_FILES, CARD, "config.yaml", "metrics.json")
_OF_AN_EMPTY_ONE = {
    ".gitattributes",
    ".gitignore",
    CARD,
    "LICENSE",
}  # what the Hub's page may put into a new repository
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Commit:
    """What a publication did.

    Attributes:
        url: of the repository.
        oid: of the repository's newest commit.
        is_new: False where the Hub had the same content already.
    """

    url: str
    oid: str
    is_new: bool


def base_config(name: str, revision: str | None, key: str = "model.name") -> dict[str, Any]:
    """A base model's config.json, from its folder or the Hub, read without what importing its architecture costs.

    Raises:
        KestrelError: not to be had.
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
    """Whether the token can publish there, asked before anything is sent.

    Returns:
        Who the token belongs to, and whether the repository is, or will be, private.

    Raises:
        KestrelError: no token, no answer, a public repository where a private one is asked for, or one with other things.
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
    there = {entry.rfilename for entry in found.siblings or []}
    others = sorted(there - _OF_AN_EMPTY_ONE)
    if others and MANIFEST not in there:
        raise KestrelError(
            f"hub.repo_id {repo_id}: the repository holds {', '.join(others[:3])} and nothing that was published from "
            "here; name another repository"
        )
    if private and not is_private:
        raise KestrelError(
            f"hub.repo_id {repo_id}: the repository is public and hub.private is true; set hub.private: false to publish "
            "there, or name another repository"
        )
    return user, is_private


def check_named(base: str, ours: Mapping[str, Any], datasets: Iterable[str]) -> None:
    """Whether the Hub has what a card names.

    Args:
        base: id of the base.
        ours: config.json of the base that the adapter was trained on.
        datasets: ids.

    Raises:
        KestrelError: it has not, or that base has another shape.
    """
    from huggingface_hub import HfApi

    theirs = base_config(base, None, "hub.base_model")
    for key in _SHAPE:
        if theirs.get(key) != ours.get(key) and None not in (theirs.get(key), ours.get(key)):
            raise KestrelError(
                f"hub.base_model {base}: its {key} is {theirs[key]!r} on the Hub, and {ours[key]!r} in model.name, which is "
                "therefore no copy of it"
            )
    for name in datasets:
        with plain_hub_errors(f"the data set {name} that the card would name (hub.datasets, or else data.source)"):
            HfApi().dataset_info(name)


def validate_card(content: str, repo_id: str) -> None:
    """Has the Hub itself look at a card's metadata.

    Raises:
        KestrelError: what it finds wrong.
    """
    from huggingface_hub import ModelCard

    with plain_hub_errors(f"hub.repo_id {repo_id}"):
        try:
            ModelCard(content, ignore_metadata_errors=False).validate()
        except ValueError as error:
            raise KestrelError(f"the Hub refuses the card's metadata: {_told_by_hub(str(error))}") from None


def _told_by_hub(answer: str) -> str:
    """What the check of the metadata found, out of the JSON that the client (2.4) hands on as it came."""
    try:
        return "; ".join(str(found["message"]) for found in json.loads(answer)["errors"]) or answer
    except (ValueError, KeyError, TypeError):
        return answer


def upload(repo_id: str, private: bool, files: Mapping[str, bytes | Path], message: str) -> Commit:
    """Makes one commit of all files; large ones that a former call brought there are not sent again.

    Files of `PUBLISHED_FILES` that are no longer among the given ones are removed; others are left alone.

    Args:
        repo_id: owner/name; made if need be, and left as it is otherwise.
        private: of a new repository.
        files: content or place, by name in the repository.
        message: of the commit.

    Raises:
        KestrelError: refused or interrupted; the same call goes on.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in sorted(files.items())
    ]
    with plain_hub_errors(f"hub.repo_id {repo_id}"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        before = api.model_info(repo_id)
        there = {entry.rfilename for entry in before.siblings or []}
        gone = sorted(there.intersection(PUBLISHED_FILES).difference(files))
        operations += [CommitOperationDelete(name) for name in gone]
        api.create_commit(repo_id, operations, commit_message=message, parent_commit=before.sha)
        after = api.model_info(repo_id).sha
    return Commit(str(url), str(after), after != before.sha)
