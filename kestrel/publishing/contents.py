"""What is published of a run: an allow-list of files, freed of this machine's paths, and the card.

Dialogues, checkpoints, generations, reports and logs stay here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kestrel.adapter.source import ADAPTER_FILES, CONFIG, PROMPT
from kestrel.config.resolve import describe
from kestrel.config.settings import Settings, is_hub_id
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer
from kestrel.publishing.model_card import Facts, model_card
from kestrel.publishing.upload import CARD, base_config
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, require_equal, require_made, sealed

EXAMPLE = Dialogue("example", ("i have two dogs.", "i work nights."), (Turn("partner", "hi ! any pets ?"),))
# Of the settings, what decided the training and must be as it was then; the rest may have changed since.
_RECORDED = ("batch_size", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer")


def base_on_hub(settings: Settings) -> str:
    """The base's id on the Hub.

    Raises:
        KestrelError: it is a folder of this machine, which nobody else could load.
    """
    name = settings.hub.base_model or settings.model.name
    if is_hub_id(name) and not Path(name).exists() or settings.hub.base_model:
        return name
    raise KestrelError(
        f"model.name {name} is a folder of this machine; say which base on the Hub it is a copy of: "
        "--hub.base_model owner/name"
    )


def collect(settings: Settings, repo_id: str, again: str) -> dict[str, bytes | Path]:
    """The files to publish, by name, each as content or as the file it is read from.

    Args:
        settings: of the run; those that decided the training must be what they were then.
        repo_id: where to.
        again: the options of this call, for messages.

    Raises:
        KestrelError: no adapter, a damaged one, other settings, or an evaluation of another adapter.
    """
    run, base = Path(settings.run_dir), base_on_hub(settings)
    folder, remedy = run / "adapter", f"train it anew with: python train.py {again}"
    require_made(folder, "adapter", f"train it with: python train.py {again}")
    manifest = read_manifest(folder, "adapter", remedy)
    recorded = manifest["settings"]
    training = {name: recorded["training"].get(name) for name in _RECORDED}
    now = {name: getattr(settings.training, name) for name in _RECORDED}
    require_equal(
        f"the adapter in {folder}",
        {**{name: recorded.get(name) for name in ("quantization", "lora", "seed")}, "training": training},
        {**{name: settings.model_dump()[name] for name in ("quantization", "lora", "seed")}, "training": now},
        f"publish it with the settings it was trained with, or {remedy}",
    )
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    prompts = {"prompt": read_json(folder / PROMPT, remedy)}, {"prompt": prompt.identity()}
    require_equal(f"the adapter in {folder}", *prompts, remedy)

    files: dict[str, bytes | Path] = {}
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            files[name] = folder / name
    files[CONFIG] = _json({**read_json(folder / CONFIG, remedy), **_named_base(base, manifest)})
    described = {**manifest, "base_model": {**manifest["base_model"], "name": base}}
    described["files"] = {
        name: hashlib.sha256(content).hexdigest() if isinstance(content := files[name], bytes) else digest
        for name, digest in manifest["files"].items()
        if name in files
    }
    files[MANIFEST] = _json(sealed(described))
    # The same adapter, whether generate.py had it from here or, published before, from the Hub.
    metrics = evaluation_of(run, {identity_of(manifest), identity_of(described)}, f"python evaluate.py {again}")
    if metrics is not None:
        files["metrics.json"] = _json(metrics)
    public = public_settings(settings, base)
    files["config.yaml"] = describe(public, {}).encode()
    for name, content in files.items():
        if name.endswith((".json", ".jinja", ".yaml")):
            _refuse_paths(name, content.read_bytes() if isinstance(content, Path) else content)
    files[CARD] = model_card(card_facts(settings, public, prompt, repo_id, base, manifest, metrics)).encode()
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _named_base(base: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    recorded = manifest["made_from"].get("base") or {}
    return {"base_model_name_or_path": base, "revision": recorded.get("commit")}


def public_settings(settings: Settings, base: str) -> Settings:
    """The settings as others can use them: the base by its id, no path of this machine."""
    source = settings.data.source
    return settings.model_copy(
        update={
            "run_dir": f"runs/{Path(settings.run_dir).name}",
            "data": settings.data.model_copy(update={"source": Path(source).name if _is_local(source) else source}),
            "model": settings.model.model_copy(update={"name": base, "adapter": None}),
            "training": settings.training.model_copy(update={"resume": "auto"}),
            "evaluation": settings.evaluation.model_copy(update={"generations": [], "extra_metrics": []}),
        }
    )


def datasets_on_hub(settings: Settings) -> list[str]:
    """Ids of the training data."""
    source = settings.data.source
    return list(settings.hub.datasets) or ([] if _is_local(source) else [source])


def _is_local(source: str) -> bool:
    return Path(source).exists() or not is_hub_id(source)


def _refuse_paths(name: str, content: bytes | Path) -> None:
    """The last look: nothing that is published names this machine's folders or the Hub's token."""
    text = content if isinstance(content, bytes) else content.read_bytes()
    secrets = [os.environ.get(key, "") for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    if any(secret and secret.encode() in text for secret in secrets):
        raise KestrelError(f"{name} holds the Hub's token; take it out of the settings")
    for path in {str(Path.home()), os.getcwd()}:
        if len(path) > 1 and re.search(rb"[\"' ]" + re.escape(path.encode()) + rb"(?:/|\b)", text):
            raise KestrelError(f"{name} names a folder of this machine, {path}; it is not published")


def evaluation_of(run: Path, identities: set[str], command: str) -> dict[str, Any] | None:
    """The run's metrics without what was local about them; None where it was not evaluated.

    Args:
        run: its folder.
        identities: of the adapter that must have been evaluated.
        command: that evaluates, for messages.

    Raises:
        KestrelError: they are not of this adapter.
    """
    path = run / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    remedy = f"make them again: delete {path.parent}, or run generate.py and {command}"
    metrics = read_json(path, remedy)
    generations = read_manifest(run / "generations", "generations", remedy, check_files=False).get("generations", {})
    recorded = {facts["sha256"]: facts["made_from"] for facts in generations.values()}
    try:
        inputs = {entry["system"]: entry["sha256"] for entry in metrics["inputs"]}
        scored = recorded.get(inputs["adapter"])
        kept = ("signature", "split", "n_replies", "n_dialogues", "normalization", "paired_test", "paired", "verdicts")
        public = {name: metrics[name] for name in kept}
        public["systems"] = {
            name: {key: value for key, value in entry.items() if key != "made_by"}
            for name, entry in metrics["systems"].items()
        }
    except (KeyError, TypeError) as error:
        raise KestrelError(f"{path} is damaged or scores no adapter ({error}); {remedy}") from None
    if scored is None:
        raise KestrelError(f"{path} scores answers that generate.py has made anew or removed since; {remedy}")
    if scored.get("adapter") not in identities:
        raise KestrelError(f"{path} scores answers of another adapter than the one in {run / 'adapter'}; {remedy}")
    return public


def card_facts(
    settings: Settings,
    public: Settings,
    prompt: Prompt,
    repo_id: str,
    base: str,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
) -> Facts:
    """Gathers what the card says."""
    run, hub = Path(settings.run_dir), settings.hub
    pieces, beginning = example_prompt(prompt)
    is_falcon = base_config(settings.model.name, settings.model.revision).get("model_type") == "falcon"
    return Facts(
        repo_id=repo_id,
        base_model=base,
        license=hub.license,
        language=hub.language,
        datasets=datasets_on_hub(settings),
        data_name=public.data.source,
        adapter=manifest,
        statistics=_statistics(run, manifest),
        metrics=metrics,
        usage=usage(repo_id, base, manifest, pieces, beginning, prompt.end_id, is_falcon),
        prompt_format=prompt.format,
        prompt_text="".join(pieces),
    )


def _statistics(run: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counts of the train split, where the run still holds the data set that the adapter was trained on."""
    folder = run / "dataset"
    if not (folder / MANIFEST).is_file():
        return None
    dataset = read_manifest(folder, "dataset", "make it with preprocess.py", check_files=False)
    if identity_of(dataset) != manifest["made_from"].get("dataset"):
        return None
    counts: dict[str, Any] = read_json(folder / "statistics.json", "make it with preprocess.py")["splits"]["train"]
    return counts


def example_prompt(prompt: Prompt) -> tuple[list[str], list[int]]:
    """An example's prompt as pieces that are tokenized one by one, and the ids that stand before them.

    Raises:
        KestrelError: the tokenizer does not make of the pieces what the prompt's room makes of them.
    """
    turns = (*EXAMPLE.turns, Turn("self", "ok"))
    segments = prompt.segments(Dialogue(EXAMPLE.dialogue_id, EXAMPLE.persona, turns))
    pieces = [segment.text for segment in segments[:-2]]
    ids = prompt.open_context(EXAMPLE)
    made = [
        token
        for piece in pieces
        for token in prompt.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    beginning = ids[: len(ids) - len(made)]
    if beginning + made != ids:
        raise KestrelError(
            "the example in the card would not be tokenized as in training; report it with the tokenizer"
        )
    return pieces, beginning


def usage(
    repo_id: str,
    base: str,
    manifest: Mapping[str, Any],
    pieces: list[str],
    beginning: list[int],
    end_id: int,
    is_falcon: bool,
) -> str:
    """A program that loads base and adapter as they were trained and answers the example."""
    quantization, recorded = manifest["settings"]["quantization"], manifest["made_from"].get("base") or {}
    four_bit = quantization["bits"] == 4
    dtype = f"torch.{quantization['compute_dtype']}"
    revision = f', revision="{recorded["commit"]}"' if recorded.get("commit") else ""
    lines = ["import torch"]
    if four_bit:
        lines.append("import bitsandbytes  # holds the base in 4 bit")
    lines.append("from peft import PeftModel")
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if four_bit else "")
    lines.append(f"from transformers import {names}")
    if four_bit and is_falcon:
        lines += [
            "from transformers.models.falcon import modeling_falcon",
            "",
            "# transformers 5.5 and later leaves Falcon's own layer class in 16 bit, and does not say so.",
            "modeling_falcon.FalconLinear = torch.nn.Linear",
        ]
    lines += ["", f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")']
    if four_bit:
        lines += [
            "quantization = BitsAndBytesConfig(",
            "    load_in_4bit=True,",
            f'    bnb_4bit_quant_type="{quantization["type"]}",',
            f"    bnb_4bit_use_double_quant={quantization['double_quant']},",
            f"    bnb_4bit_compute_dtype={dtype},",
            ")",
        ]
    given = ", quantization_config=quantization" if four_bit else ""
    first = f"{beginning} + " if beginning else ""
    lines += [
        "base = AutoModelForCausalLM.from_pretrained(",
        f'    "{base}"{revision}, dtype={dtype}, device_map="auto"{given}',
        ")",
        f'model = PeftModel.from_pretrained(base, "{repo_id}").eval()',
        "",
        "# Each piece is tokenized on its own, as in training.",
        f"pieces = {json.dumps(pieces, ensure_ascii=False)}",
        f"ids = {first}[i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]",
        "answer = model.generate(",
        "    input_ids=torch.tensor([ids], device=model.device),",
        "    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),",
        f"    max_new_tokens=64, do_sample=False, eos_token_id={end_id}, pad_token_id={end_id},",
        ")",
        "print(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True).strip())",
    ]
    return "\n".join(lines)
