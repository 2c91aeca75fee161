"""A model without adapter, for engines that take none: the adapter merged into the base it was trained on.

That base is the 4-bit one. Its weights are converted back to 16 bit and the adapter is added to those: merging into
4-bit weights rounds the update away, and the original 16-bit weights are another base.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kestrel.adapter.compute_dtype import with_compute_dtype
from kestrel.adapter.load import load_model
from kestrel.adapter.lora import adapter_config
from kestrel.adapter.open import open_adapter
from kestrel.config.settings import Settings
from kestrel.data.dataset import dialogue_of, load_split, open_dataset
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError, ProofError
from kestrel.generation.respond import generation_config, greedy, respond
from kestrel.hub import plain_loading_errors
from kestrel.model.base import base_identity, device, open_base, skeleton_of
from kestrel.model.loss import causal_lm_of
from kestrel.prompt.load import load_prompt
from kestrel.prompt.prompt import Prompt
from kestrel.publishing.ollama import modelfile
from kestrel.publishing.run_records import read_adapter_files
from kestrel.publishing.usage import example_prompt, render
from kestrel.runtime.atomic import clear_leftovers_of, folder_atomically
from kestrel.runtime.disk_space import model_bytes, room_for
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 16  # contexts that adapter and merged model answer
_POSITIONS = 32  # logits compared at the end of each context
_SHARD = "4GB"
_KIND = "merged model"
# Largest relative difference of logits. Rounding the sum to the compute type gives about 0.008 in bfloat16; a merge into
# 4-bit weights gives 0.08.
_LIMIT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
_QUESTIONS = ("hi ! how are you ?", "what do you do for a living ?", "any pets ?", "where do you live ?")


def merge(settings: Settings, folder: Path, again: str, dtype: str = "bfloat16") -> None:
    """Merges, saves, loads what was saved, and proves that it answers like the adapter.

    The folder appears whole or not at all. model.adapter may name another adapter than the run's own.

    Args:
        dtype: of the weights that are saved; both models compute in the type of the training.

    Raises:
        KestrelError: no adapter, one that does not fit, or a folder that holds something else.
        ProofError: the merged model computes something else.
    """
    clear_leftovers_of(folder)
    require_replaceable(folder)
    settings = with_compute_dtype(settings)
    prompt = load_prompt(settings)
    settings, config = open_base(settings, prompt)
    base_id = base_identity(settings.model, config)
    adapter_folder, manifest = open_adapter(settings, prompt, base_id, f"python train.py {again}")
    if manifest["kind"] == "adapter" and adapter_folder.parent.name != "snapshots":  # the Hub's cache is made of links
        read_adapter_files(adapter_folder, manifest["files"], "copy or train it again")
    weights = skeleton_of(config, settings.model.trust_remote_code).num_parameters()
    needed = model_bytes(weights, len(prompt.tokenizer), 4 if dtype == "float32" else 2)
    room = room_for("the merged model's files", needed, folder, "name another folder")
    with room, _advice_on_memory(needed), folder_atomically(folder) as target:
        contexts = sample_contexts(settings, prompt, again)
        adapted = load_model(settings, prompt, (adapter_folder, manifest))
        before = behaviour(adapted, prompt, contexts, settings)
        merged = _merged(adapted, adapter_folder, settings).to(getattr(torch, dtype))
        merged.generation_config = generation_config(settings.generation, prompt)
        merged.save_pretrained(str(target), max_shard_size=_SHARD)
        prompt.tokenizer.save_pretrained(str(target))
        _make_readable(target)
        del adapted, merged
        gc.collect()
        after = behaviour(_loaded(target, settings), prompt, contexts, settings)
        coarser = max(dtype, settings.quantization.compute_dtype, key=_LIMIT.__getitem__)
        difference = relative_difference(before[0], after[0], coarser)
        same = sum(a == b for a, b in zip(before[1], after[1], strict=True))
        proof = (
            f"the logits of adapter and merged model differ by {difference:.2%}, and {same} of {len(contexts)} greedy "
            "answers are the same"
        )
        if for_ollama := modelfile(prompt, settings.generation):
            (target / "Modelfile").write_text(for_ollama, encoding="utf-8")
        commands = serving_commands(".", dtype)
        example = example_prompt(prompt)
        readme = render("merged.md", example=example, proof=proof, commands=commands, for_ollama=bool(for_ollama))
        (target / "README.md").write_text(f"{readme}\n", encoding="utf-8")
        write_manifest(
            target,
            _KIND,
            settings={"quantization": settings.quantization.model_dump(), "dtype": dtype},
            made_from={"base": base_id, "adapter": identity_of(manifest), "prompt_sha256": prompt.identity()["sha256"]},
            logits_apart=difference,
            same_answers=same,
            answers=len(contexts),
        )
    print(f"proven on the saved model: {proof}")
    print(f"wrote {folder}; its README.md shows how to serve it")


def require_replaceable(folder: Path) -> None:
    """Refuses a folder that holds anything but an older merged model.

    Raises:
        KestrelError: naming what would be lost.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise KestrelError(f"--merge {folder}: {nearest} is a file; name a new or empty folder")
    if not (present := {path.name for path in folder.iterdir()} if folder.is_dir() else set()):
        return
    try:
        files = read_manifest(folder, _KIND, "", check_files=False)["files"]
    except KestrelError:
        raise KestrelError(f"--merge {folder}: the folder holds something else; name a new or empty one") from None
    if others := ", ".join(sorted(present - files.keys() - {MANIFEST})[:5]):
        raise KestrelError(f"--merge {folder}: besides a merged model, the folder holds {others}; move that away")


@contextmanager
def _advice_on_memory(needed: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise KestrelError(
            f"out of memory: the merged model alone takes {needed / 2**30:.1f} GiB. If the GPU is too small, merge in main "
            "memory, which is slower: put CUDA_VISIBLE_DEVICES= before the same command"
        ) from None


def _make_readable(folder: Path) -> None:
    """Gives the weights the permissions of the other files: safetensors (0.8) lets only the owner read them, and
    servers often run as another user."""
    permissions = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(permissions)


def sample_contexts(settings: Settings, prompt: Prompt, again: str) -> list[list[int]]:
    """Prompts of the run's validation or test dialogues, or of a few invented ones if the run has no data set."""
    try:
        folder, _ = open_dataset(settings, prompt, f"python preprocess.py {again}")
    except KestrelError:
        invented = [Dialogue("sample", ("i have two dogs.",), (Turn("partner", text),)) for text in _QUESTIONS]
        return [prompt.open_context(dialogue) for dialogue in invented]
    name = next((split for split in ("validation", "test") if (folder / split).is_dir()), "train")
    rows = load_split(folder, name, "make it with preprocess.py")
    dialogues = [dialogue_of(row) for row in rows.select(range(min(SAMPLES, len(rows))))]
    return [prompt.context(dialogue, next(dialogue.replies())[0]) for dialogue in dialogues]


def behaviour(
    model: torch.nn.Module, prompt: Prompt, contexts: Sequence[Sequence[int]], settings: Settings
) -> tuple[torch.Tensor, list[str]]:
    """Logits at the end of each context, float32 (positions, vocabulary) on the CPU, and greedy answers."""
    device = next(model.parameters()).device
    chosen = greedy(settings.generation)
    model.eval()
    with torch.no_grad():
        logits = [
            causal_lm_of(model)(input_ids=torch.tensor([ids], device=device)).logits[0, -_POSITIONS:].float().cpu()
            for ids in contexts
        ]
    return torch.cat(logits), [respond(model, prompt, [ids], chosen)[0].text for ids in contexts]


def relative_difference(before: torch.Tensor, after: torch.Tensor, dtype: str) -> float:
    """How far the logits after merging are from those before.

    Raises:
        ProofError: further than rounding to this type explains.
    """
    difference = ((after - before).norm() / before.norm()).item()
    if not difference <= _LIMIT[dtype]:
        raise ProofError(
            f"the merged model does not compute what the adapter on its base does: their logits differ by {difference:.2%}, "
            f"more than the {_LIMIT[dtype]:.1%} that rounding explains; nothing was written"
        )
    return difference


def _merged(adapted: Any, adapter_folder: Path, settings: Settings) -> PreTrainedModel:
    """The adapter added to the 16-bit values of its base."""
    from peft import PeftModel

    base = adapted.unload()
    if settings.quantization.bits == 4:
        base = base.dequantize()
        # transformers (5.23) would undo what it did to read files in 4 bit, and cannot.
        done = getattr(base, "_weight_conversions", None) or []
        of_4bit = [each for each in done if "Deserialize" in str(getattr(each, "operations", ""))]
        base._weight_conversions = [each for each in done if each not in of_4bit] or None
        _transpose_back(base, settings.model.trust_remote_code)
        base.to(getattr(torch, settings.quantization.compute_dtype))
    again = PeftModel.from_pretrained(base, str(adapter_folder), config=adapter_config(adapter_folder))
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.tie_word_embeddings and (hasattr(embedding, "lora_A") or hasattr(head, "lora_A")):
        # The update is for one of two layers that share their weights, so each gets its own.
        head = getattr(head, "base_layer", head)
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    merged: PreTrainedModel = again.merge_and_unload(safe_merge=True)
    config = merged.config
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        # transformers (5.23) sets this to the number of query heads and never reads it; llama.cpp's converter does.
        config.num_kv_heads = 1
    return merged


def _transpose_back(base: PreTrainedModel, trust_remote_code: bool) -> None:
    """Makes GPT-2's transposed layers (Conv1D) again, which are plain linear layers after 4 bit."""
    from transformers.pytorch_utils import Conv1D

    for name, module in skeleton_of(base.config, trust_remote_code).named_modules():
        if isinstance(module, Conv1D):
            linear: Any = base.get_submodule(name)
            module.weight = torch.nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
            module.bias = linear.bias
            base.set_submodule(name, module)


def _loaded(folder: Path, settings: Settings) -> PreTrainedModel:
    """The saved model, loaded as anybody would load it, in the type of the training."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, settings.quantization.compute_dtype)
    loaded: PreTrainedModel
    with plain_loading_errors("merged weights", str(folder)):
        loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, device_map={"": str(device())})
    return loaded


def serving_commands(folder: str, dtype: str) -> str:
    """The commands that serve a merged model."""
    return f"""vllm serve {folder} --dtype {dtype}
text-generation-launcher --model-id {folder} --dtype {dtype}
python convert_hf_to_gguf.py {folder} --outfile {folder}/model.gguf && llama-server -m {folder}/model.gguf
ollama create persona -f {folder}/Modelfile && ollama run persona"""
