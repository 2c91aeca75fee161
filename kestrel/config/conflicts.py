"""Values of the settings that are valid alone but not together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kestrel.config.settings import LABELS, MEMORY_FORM, SYSTEM, Settings, is_hub_id, memory_bytes


def conflicts(settings: Settings, options: Collection[str] = ()) -> list[tuple[str, str]]:
    """Values that are valid alone but not together: (dotted key, what is wrong). `options` were given on the command line."""
    found: list[tuple[str, str]] = _without_effect(settings, options)

    def refuse(condition: bool, key: str, problem: str) -> None:
        if condition:
            found.append((key, problem))

    data, training, generation, hub = settings.data, settings.training, settings.generation, settings.hub
    for key, name in (("hub.repo_id", hub.repo_id), ("hub.base_model", hub.base_model)):
        problem = f"expected an id on the Hub such as owner/name, found {name!r}"
        refuse(name is not None and not is_hub_id(name), key, problem)
    for name in hub.datasets:
        problem = f"expected ids on the Hub such as owner/name, found {name!r}"
        refuse(not (is_hub_id(name) or is_hub_id(f"owner/{name}")), "hub.datasets", problem)
    problem = "leaves nothing for training: with data.validation_fraction it makes 1 or more"
    refuse(data.validation_fraction + data.test_fraction >= 1, "data.test_fraction", problem)
    memory = training.device_memory
    problem = f"expected {MEMORY_FORM}, found {memory!r}"
    refuse(memory is not None and memory_bytes(memory) is None, "training.device_memory", problem)
    useless = training.early_stopping is not None and training.early_stopping >= training.evaluations
    refuse(useless, "training.early_stopping", "has no effect unless it is below training.evaluations")
    for key in ("temperature", "top_p", "top_k"):
        useless = getattr(generation, key) is not None and not generation.do_sample
        refuse(useless, f"generation.{key}", "has no effect without generation.do_sample: true")
    problem = "cannot be combined with generation.do_sample; remove one of them"
    refuse(generation.do_sample and generation.num_beams > 1, "generation.num_beams", problem)
    useless = generation.length_penalty is not None and generation.num_beams == 1
    refuse(useless, "generation.length_penalty", "has no effect without generation.num_beams above 1")
    problem = "must be below prompt.max_length, to leave space for a prompt"
    refuse(generation.max_new_tokens >= settings.prompt.max_length, "generation.max_new_tokens", problem)
    problem = "needs generation.references: true, because hits@1 ranks the reference too"
    refuse(generation.candidates and not generation.references, "generation.candidates", problem)
    problem = "cannot be combined with evaluation.generations; name files or run folders"
    refuse(bool(settings.evaluation.compare and settings.evaluation.generations), "evaluation.compare", problem)
    refuse(len(settings.evaluation.compare) == 1, "evaluation.compare", "needs two run folders or more")
    problem = "needs generation.references: true, because it compares their likelihoods"
    refuse(generation.other_personas > 0 and not generation.references, "generation.other_personas", problem)
    refuse(not generation.systems, "generation.systems", "is empty; name at least one system")
    repeats = len(set(generation.systems)) < len(generation.systems)
    refuse(repeats, "generation.systems", "names a system twice")
    problem = "contains an empty string, which would end every response at once"
    refuse("" in generation.stop_strings, "generation.stop_strings", problem)
    chosen = settings.prompt
    for key, default, form in (
        ("chat_template", None, "chat"),
        ("system", SYSTEM, "chat"),
        ("labels", [*LABELS], "plain"),
    ):
        useless = getattr(chosen, key) != default and chosen.format != form
        refuse(useless, f"prompt.{key}", f"has no effect without prompt.format: {form}")
    words = {*chosen.labels}
    wrong = (
        len(chosen.labels) != 3 or len(words) != 3 or any(not word.isprintable() or not word.strip() for word in words)
    )
    problem = f"expected three different words ([A, B, C] in YAML, A B C after the option), found {chosen.labels}"
    refuse(wrong, "prompt.labels", problem)
    refuse(settings.lora.target_modules == [], "lora.target_modules", "is empty, so nothing would be trained")
    return found


def _without_effect(settings: Settings, options: Collection[str]) -> list[tuple[str, str]]:
    """Keys that another key makes useless. A default is refused only as an option: config.yaml of a run has every key."""
    found = []
    held = settings.quantization
    for key, default in (("type", "nf4"), ("double_quant", True)):
        given = getattr(held, key) != default or f"quantization.{key}" in options
        if held.bits == 16 and given:
            found.append((f"quantization.{key}", "has no effect with quantization.bits: 16; leave one of them out"))
    model, training, generation = settings.model, settings.training, settings.generation
    if model.revision is not None and Path(model.name).is_dir():
        reason = f"has no effect: model.name {model.name} is a local folder; leave it out, or set it to null"
        found.append(("model.revision", reason))
    if training.recompute == "dense" and held.bits == 16:
        found.append(("training.recompute", "dense has no effect with quantization.bits: 16; take none"))
    if training.max_steps is not None and "training.epochs" in options:
        reason = f"has no effect with training.max_steps: {training.max_steps}; add --training.max_steps null"
        found.append(("training.epochs", reason))
    if model.adapter is not None and "model.adapter" in options and "adapter" not in generation.systems:
        found.append(("model.adapter", "has no effect without adapter in generation.systems"))
    evaluation = settings.evaluation
    named = "evaluation.generations" if evaluation.generations else "evaluation.compare"
    if evaluation.generations or (evaluation.compare and settings.run_dir not in evaluation.compare):
        if model.adapter is not None and "model.adapter" in options:
            found.append(("model.adapter", f"has no effect with {named}, whatever made the files; leave it out"))
        if evaluation.generations and "generation.split" in options:
            found.append(("generation.split", f"has no effect with {named}, which names the files; leave it out"))
    return found
