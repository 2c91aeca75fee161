"""The card of a published adapter: metadata for the Hub, and the same facts for people.

Everything in it comes from manifests and metrics.json. The same facts give the same card, byte for byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.evaluation.metric_table import HEADLINES, METRICS
from kestrel.evaluation.tables import Table, scores_table
from kestrel.publishing.run_records import PublicEvaluation, base_commit
from kestrel.publishing.usage import PromptExample, render

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        settings: from `public_settings`.
        is_falcon: whether the base has Falcon's architecture, which transformers cannot quantize by itself.
        datasets: the training data's ids on the Hub.
        manifest: of the adapter.
        statistics: of the train split, as in the data set's statistics.json.
        evaluation: None if the adapter was not evaluated.
    """

    settings: Settings
    is_falcon: bool
    datasets: list[str]
    manifest: Mapping[str, Any]
    statistics: Mapping[str, Any]
    evaluation: PublicEvaluation | None
    example: PromptExample


def model_card(facts: CardFacts) -> str:
    """The content of README.md.

    Raises:
        KestrelError: the Hub would refuse the metadata.
    """
    from huggingface_hub import ModelCardData

    settings, trained, evaluation = facts.settings, facts.manifest["settings"], facts.evaluation
    metrics = evaluation.metrics if evaluation else None
    base, repo_id = settings.model.name, str(settings.hub.repo_id)
    name = repo_id.partition("/")[2]
    data = ModelCardData(
        base_model=base,
        datasets=facts.datasets or None,
        eval_results=_eval_results(facts, metrics) if metrics else None,
        language=settings.hub.language or None,
        library_name="peft",
        license=settings.hub.license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=["lora", "persona", "dialogue", "kestrel", f"base_model:adapter:{base}"],
    )
    body = render(
        "card.md",
        name=name,
        repo_id=repo_id,
        base=base,
        commit=base_commit(facts.manifest),
        data_name=settings.data.source,
        quantization=trained["quantization"],
        is_falcon=facts.is_falcon,
        example=facts.example,
        metrics=metrics,
        decoding=_decoding(evaluation.generation) if evaluation else "",
        scores=scores_table(metrics) if metrics else None,
        headlines=HEADLINES,
        training=_training_table(facts, trained),
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    check_metadata(content)
    return content


def check_metadata(content: str) -> None:
    """Reads a card as the Hub's client does, and looks for what the Hub would refuse, without asking it.

    Raises:
        KestrelError: naming the field.
    """
    from huggingface_hub import ModelCard

    try:
        data: Any = ModelCard(content, ignore_metadata_errors=False).data
    except Exception as error:  # noqa: BLE001  YAML and the client raise many types
        raise KestrelError(f"the card's metadata cannot be read back: {error}") from None
    problems = []
    if data.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data.license):
        problems.append(f"hub.license {data.license!r}: the Hub's identifiers are lower case, such as apache-2.0")
    if data.license == "other":
        problems.append("hub.license other: the Hub also wants a name; choose one of its identifiers")
    for code in [data.language] if isinstance(data.language, str) else data.language or []:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            problems.append(f"hub.language {code!r}: expected an ISO 639 code such as en")
    for result in data.eval_results or []:
        if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
            problems.append(f"{result.metric_name} is {result.metric_value!r}, not a number")
    if problems:
        raise KestrelError("the Hub would refuse the card's metadata:\n  " + "\n  ".join(problems))


def _eval_results(facts: CardFacts, metrics: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    scores = metrics["systems"]["adapter"]
    trivial = {name: entry for name, entry in metrics["systems"].items() if entry["kind"] == "trivial"}
    dataset = {
        "dataset_type": facts.datasets[0] if facts.datasets else "other",
        "dataset_name": facts.settings.data.source,
        "dataset_split": metrics["split"],
    }
    results = []
    for metric in METRICS:
        value, interval = metric.read(scores)
        if not metric.hub_type or value is None:
            continue
        arguments = {
            "signature": metric.signature_in(scores),
            "ci95": [round(float(end), 4) for end in interval or []],
            "evaluation": metrics["signature"],
        }
        beside = {name: score for name, entry in trivial.items() if (score := metric.read(entry)[0]) is not None}
        if beside:
            arguments["trivial_systems"] = {name: round(float(score), 4) for name, score in beside.items()}
        result = EvalResult(
            task_type="text-generation",
            task_name="Persona dialogue",
            **dataset,
            metric_type=metric.hub_type,
            metric_name=metric.label[:1].upper() + metric.label[1:],
            metric_value=round(float(value), 4),
            metric_args=arguments,
        )
        results.append(result)
    return results


def _decoding(generation: Mapping[str, Any]) -> str:
    """How the answers were made, in words."""
    if generation["do_sample"]:
        sampling = [f"{key} {generation[key]}" for key in ("temperature", "top_p", "top_k") if generation[key]]
        how = ", ".join(["sampled", *sampling])
    else:
        how = "greedy search" if generation["num_beams"] == 1 else f"{generation['num_beams']} beams"
    words = [how, f"at most {generation['max_new_tokens']} tokens"]
    if generation["repetition_penalty"] != 1:
        words.append(f"repetition penalty {generation['repetition_penalty']:g}")
    if generation["no_repeat_ngram_size"]:
        words.append(f"no repeated {generation['no_repeat_ngram_size']}-grams")
    if generation["stop_strings"]:
        words.append(f"stop strings {', '.join(map(repr, generation['stop_strings']))}")
    return "; ".join(words)


def _training_table(facts: CardFacts, settings: Mapping[str, Any]) -> Table:
    manifest, lora, training, counts = facts.manifest, settings["lora"], settings["training"], facts.statistics
    targets, loss = lora["target_modules"], manifest["eval_loss"]
    rows = {
        "data": f"{facts.settings.data.source}, as dataset {manifest['made_from']['dataset']} of Kestrel",
        "dialogues in train": f"{counts['dialogues']:,} with {counts['replies']:,} replies and {counts['tokens']:,} tokens",
        "LoRA": f"rank {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on "
        f"{targets if isinstance(targets, str) else ', '.join(targets)}; {manifest['trainable_parameters']:,} "
        "trained parameters",
        "optimization": f"{manifest['steps']:,} steps of up to {training['batch_size']} dialogues, "
        f"{training['optimizer']}, learning rate {training['learning_rate']:g}, {training['lr_schedule']}; seed "
        f"{settings['seed']}",
        "tokens seen": f"{manifest['tokens']:,}",
        "kept": f"step {manifest['best_step']}, validation loss {loss:.4f} (perplexity {math.exp(loss):.2f} per reply "
        "token)",
        "versions": ", ".join(f"{library} {version}" for library, version in manifest["versions"].items()),
        "Kestrel's commit": manifest.get("git_commit"),
    }
    cells = tuple((name, str(value)) for name, value in rows.items() if value)
    return Table("Training", ("fact", "value"), cells)
