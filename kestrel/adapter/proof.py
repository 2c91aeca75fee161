"""Proofs that the saved adapter is the trained one, and that a loaded adapter computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kestrel.adapter.source import PROMPT, WEIGHTS
from kestrel.config.settings import Settings
from kestrel.errors import ProofError
from kestrel.model.likelihood import SpanRequest, span_nll
from kestrel.prompt.prompt import Prompt
from kestrel.runtime.atomic import folder_atomically, write_json
from kestrel.runtime.disk_space import model_bytes, room_for
from kestrel.runtime.manifest import write_manifest

if TYPE_CHECKING:
    from peft import PeftModel

# Relative difference of the canary's likelihood between two machines; float32 on one machine agrees to the bit.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}


def canary_nll(model: torch.nn.Module, identity: dict[str, Any]) -> float:
    """Negative log-likelihood, in nats, of the prompt's fixed dialogue: a fingerprint of base and adapter."""
    spans = [(int(start), int(end)) for start, end in identity["canary_spans"]]
    scores = span_nll(model, [SpanRequest(identity["canary_ids"], spans)], budget=1)
    return sum(nll for nll, _ in scores[0])


def save_and_prove(
    model: PeftModel,
    prompt: Prompt,
    settings: Settings,
    folder: Path,
    fingerprint: dict[str, Any],
    facts: dict[str, Any],
) -> str:
    """Writes the adapter's folder, loads it again beside the trained adapter, and compares the two.

    Args:
        model: prepared by `loss.attach_token_nll`.
        folder: RUN/adapter, replaced as a whole.
        fingerprint, facts: what decided the training and what was measured in it, for the manifest.

    Returns:
        What was proven, for the terminal.

    Raises:
        ProofError: other keys, weights or logits than trained, or logits that do not differ from the base's.
    """
    identity = prompt.identity()
    ids = torch.tensor([identity["canary_ids"]], device=next(model.parameters()).device)
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        nll = canary_nll(model, identity)
    if torch.equal(trained, base):
        raise ProofError("the trained adapter changes no logit: it is the base; look at training.learning_rate")
    weights, _ = model.get_nb_trainable_parameters()
    room = room_for("the adapter's files", model_bytes(weights, len(prompt.tokenizer)), folder)
    with room, folder_atomically(folder) as target:
        model.save_pretrained(str(target), save_embedding_layers=False)
        (target / "README.md").unlink(missing_ok=True)  # peft's empty card would be mistaken for ours
        prompt.tokenizer.save_pretrained(str(target))
        write_json(target / PROMPT, identity)
        _prove_reload(model, target, ids, trained)
        write_manifest(
            target,
            "adapter",
            settings={name: fingerprint[name] for name in ("quantization", "lora", "training", "seed")},
            made_from={name: fingerprint[name] for name in ("dataset", "base", "prompt_sha256")},
            base_model={"name": settings.model.name, "revision": settings.model.revision},
            canary_nll=nll,
            **facts,
        )
    difference = ((trained - base).norm() / base.norm()).item()
    return f"saved and loaded adapter agree to the bit; its logits differ from the base's by {difference:.1%}"


@torch.no_grad()
def _prove_reload(model: PeftModel, folder: Path, ids: torch.Tensor, trained: torch.Tensor) -> None:
    """Loads the saved adapter under a second name on the same base and compares weights and logits."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved, kept = load_file(str(folder / WEIGHTS)), get_peft_model_state_dict(model, save_embedding_layers=False)
    if saved.keys() != kept.keys():
        raise ProofError(f"the saved and the trained adapter differ in keys, such as {min(saved.keys() ^ kept.keys())}")
    for name, tensor in saved.items():
        if not torch.equal(tensor, kept[name].cpu()):
            raise ProofError(f"{name} was saved with other values than trained")
    model.load_adapter(str(folder), adapter_name="reloaded")
    model.set_adapter("reloaded")
    model.eval()
    reloaded = model(input_ids=ids).logits
    model.set_adapter("default")
    model.delete_adapter("reloaded")
    if not torch.equal(reloaded, trained):
        difference = ((reloaded - trained).norm() / trained.norm()).item()
        raise ProofError(f"the saved adapter gives other logits than the trained one (they differ by {difference:.2%})")


def prove_loaded(model: PeftModel, manifest: dict[str, Any], identity: dict[str, Any], compute_dtype: str) -> str:
    """Compares a fixed dialogue's likelihood with the recorded one. Returns what was proven, for the terminal.

    Raises:
        ProofError: they differ by more than two machines would.
    """
    if manifest["kind"] != "adapter":
        return (
            "not proven: this adapter was not made by Kestrel and records neither its prompt nor what it computes; only "
            "the name of its base and the names and shapes of its weights were checked"
        )
    recorded, now = float(manifest["canary_nll"]), canary_nll(model, identity)
    if not abs(now - recorded) <= _TOLERANCE[compute_dtype] * abs(recorded):
        raise ProofError(
            f"the loaded adapter computes something else than the trained one: the negative log-likelihood of a fixed "
            f"dialogue is {now:.4f} nats, and was {recorded:.4f}"
        )
    return "proven: it computes what the trained adapter did, over the same prompt"
