"""Puts the adapter on the Hugging Face Hub with a card that says what is known, or merges it into its base.

    python publish.py --config configs/falcon-7b.yaml --hub.repo_id me/falcon-7b-persona --dry-run
    python publish.py --config configs/falcon-7b.yaml --hub.repo_id me/falcon-7b-persona --hub.license apache-2.0
    python publish.py --config configs/falcon-7b.yaml --merge runs/falcon-7b/merged

Publishes adapter, tokenizer, prompt, settings, metrics and card, and nothing else of the run; private unless told
otherwise. --dry-run shows all of it and sends nothing. The token comes from HF_TOKEN or `hf auth login`. --merge makes
a model without adapter for engines that take none, and proves that it answers like the adapter; it sends nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kestrel.config.settings import Settings
from kestrel.errors import UsageError
from kestrel.runtime.command_line import run_script

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--dry-run", {"action": "store_true", "help": "show the files and the card, send nothing"}),
    ("--merge", {"metavar": "FOLDER", "help": "write the merged model here instead of publishing"}),
]


def publish(settings: Settings, options: argparse.Namespace) -> None:
    if options.merge is not None:
        if options.dry_run:
            raise UsageError(["--merge: sends nothing, so there is no --dry-run of it; leave one out"])
        from kestrel.publishing.merge import merge

        merge(settings, Path(options.merge), options.again)
        return
    repo_id, adapter = settings.hub.repo_id, settings.model.adapter
    if repo_id is None:
        raise UsageError(["--hub.repo_id: needs the repository to publish to, such as owner/name"])
    if adapter is not None and Path(adapter).resolve() != (Path(settings.run_dir) / "adapter").resolve():
        raise UsageError(
            [f"model.adapter: publishes the run's own adapter, not {adapter}; leave it out: --model.adapter null"]
        )

    from kestrel.publishing.contents import base_on_hub, collect, datasets_on_hub
    from kestrel.publishing.upload import CARD, base_config, check_access, check_named, upload, validate_card

    files = collect(settings, repo_id, options.again)
    card = files[CARD]
    assert isinstance(card, bytes)
    print(f"{repo_id}, {'private' if settings.hub.private else 'public'}:")
    for name in sorted(files):
        content = files[name]
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"  {size:>13,}  {name}")
    if "metrics.json" not in files:
        print("warning: there is no evaluation of this adapter, and the card says so", file=sys.stderr)
    if settings.hub.license is None:
        print("warning: hub.license names no licence, so nobody may use the adapter", file=sys.stderr)
    if options.dry_run:
        print(f"\n{card.decode()}\nnothing was sent")
        return

    user, private = check_access(repo_id, settings.hub.private)
    print(f"publishing as {user}")
    if private and not settings.hub.private:
        print("note: the repository is private and stays so; its page on the Hub can change that", file=sys.stderr)
    ours = base_config(settings.model.name, settings.model.revision)
    check_named(base_on_hub(settings), ours, datasets_on_hub(settings))
    validate_card(card.decode(), repo_id)
    commit = upload(repo_id, settings.hub.private, files, "Adapter, evaluation and card")
    print(f"wrote {commit.url}" if commit.is_new else f"{commit.url} has all of it already; no commit was made")


def main(argv: list[str] | None = None) -> int:
    return run_script("publish.py", __doc__, publish, argv, OPTIONS, writes=False)


if __name__ == "__main__":
    sys.exit(main())
