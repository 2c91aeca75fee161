"""Publishes the adapter on the Hugging Face Hub with a card, or merges it into its base.

    python publish.py --config configs/falcon-7b.yaml --hub.repo_id me/falcon-7b-persona --dry-run
    python publish.py --config configs/falcon-7b.yaml --hub.repo_id me/falcon-7b-persona --hub.license apache-2.0
    python publish.py --config configs/falcon-7b.yaml --merge runs/falcon-7b/merged

Publishes adapter, tokenizer, prompt, settings, metrics and card, and nothing else of the run. A new repository is
private unless hub.private is false. --dry-run shows everything and sends nothing. The token comes from HF_TOKEN or
`hf auth login`. --merge writes a model without adapter, for engines that take none, and proves that it answers like the
adapter; it sends nothing.
"""

from __future__ import annotations

import kestrel.interrupts  # noqa: F401  before all others: from here on Ctrl-C is quiet

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.errors import UsageError
from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.config.settings import Settings

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--dry-run", {"action": "store_true", "help": "show the files and the card, send nothing"}),
    ("--merge", {"metavar": "FOLDER", "help": "write the merged model to this folder instead of publishing"}),
    (
        "--merge-dtype",
        {"choices": ["bfloat16", "float16", "float32"], "help": "type of the merged weights (default: bfloat16)"},
    ),
]


def publish(settings: Settings, options: argparse.Namespace) -> None:
    if options.merge is not None:
        if options.dry_run:
            raise UsageError(["--merge: sends nothing, so --dry-run has no effect; leave one out"])
        if "hub.repo_id" in options:
            print("note: --merge sends nothing; hub.repo_id is not used", file=sys.stderr)
        from kestrel.publishing.merge import merge

        merge(settings, Path(options.merge), options.again, options.merge_dtype or "bfloat16")
        return
    if options.merge_dtype is not None:
        raise UsageError(["--merge-dtype: has no effect without --merge"])
    repo_id = checked_repo_id(settings)

    from kestrel.publishing.contents import base_on_hub, datasets_on_hub, files_to_publish
    from kestrel.publishing.upload import CARD, base_config, check_access, check_card_links, upload, validate_card

    files = files_to_publish(settings, options.again)
    card = files[CARD].decode()
    show(settings, files)
    if options.dry_run:
        print(f"\n{card}\nnothing was sent")
        return

    user, private = check_access(repo_id, settings.hub.private)
    print(f"publishing as {user}")
    if private and not settings.hub.private:
        print("note: the repository is private and stays so; its page on the Hub can change that", file=sys.stderr)
    ours = base_config(settings.model.name, settings.model.revision)
    check_card_links(base_on_hub(settings), ours, datasets_on_hub(settings))
    validate_card(card, repo_id)
    url, is_new = upload(repo_id, settings.hub.private, files)
    print(f"wrote {url}" if is_new else f"{url} already has the same content; no commit was made")


def checked_repo_id(settings: Settings) -> str:
    """The repository to publish to.

    Raises:
        UsageError: none is set, or model.adapter names another adapter than the run's own.
    """
    adapter = settings.model.adapter
    if settings.hub.repo_id is None:
        raise UsageError(["--hub.repo_id: name the repository to publish to, such as owner/name"])
    if adapter is not None and Path(adapter).resolve() != (Path(settings.run_dir) / "adapter").resolve():
        problem = f"only the run's own adapter is published, not {adapter}; leave it out: --model.adapter null"
        raise UsageError([f"model.adapter: {problem}"])
    return settings.hub.repo_id


def show(settings: Settings, files: Mapping[str, bytes]) -> None:
    """Prints each file with its size in bytes and its sha256, and warnings."""
    print(f"{settings.hub.repo_id}, {'private' if settings.hub.private else 'public'}:")
    for name, content in sorted(files.items()):
        print(f"  {len(content):>13,}  {hashlib.sha256(content).hexdigest()}  {name}")
    if "metrics.json" not in files:
        print("warning: this adapter has no evaluation, and the card says so", file=sys.stderr)
    if settings.hub.license is None:
        print("warning: hub.license names no licence, so nobody may use the adapter", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return run_script("publish.py", __doc__, publish, argv, OPTIONS, writes=False)


if __name__ == "__main__":
    sys.exit(main())
