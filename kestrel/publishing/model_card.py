"""The card of a published adapter: metadata for the Hub, and the same facts for people.

Everything in it comes from manifests and metrics.json. The same facts give the same card, byte for byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.evaluation.metric_table import HEADLINES, METRICS
from kestrel.evaluation.tables import scores_table
from kestrel.publishing.run_records import RunRecords
from kestrel.publishing.usage import PromptExample, render

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def model_card(
    settings: Settings, records: RunRecords, datasets: list[str], is_falcon: bool, example: PromptExample
) -> str:
    """The content of README.md.

    Args:
        settings: from `public_settings`.
        datasets: the training data's ids on the Hub.
        is_falcon: whether the base has Falcon's architecture, which transformers cannot quantize by itself.

    Raises:
        KestrelError: the Hub would refuse the metadata.
    """
    from huggingface_hub import ModelCardData

    metrics, repo_id = records.metrics, str(settings.hub.repo_id)
    name = repo_id.partition("/")[2]
    data = ModelCardData(
        base_model=settings.model.name,
        datasets=datasets or None,
        eval_results=_eval_results(metrics, datasets, settings.data.source) if metrics else None,
        language=settings.hub.language or None,
        library_name="peft",
        license=settings.hub.license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=["lora", "persona", "dialogue", "kestrel"],
        base_model_relation="adapter",
    )
    try:
        body = render(
            "card.md",
            name=name,
            repo_id=repo_id,
            base=settings.model.name,
            data_name=settings.data.source,
            is_falcon=is_falcon,
            example=example,
            scores=scores_table(metrics) if metrics else None,
            headlines=HEADLINES,
            records=records,
            **records.adapter["settings"],
        )
    except (TypeError, ValueError, TemplateError) as error:
        raise KestrelError(
            f"the adapter's manifest lacks what the card says, or has it in another form ({error})"
        ) from None
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


def _eval_results(metrics: Mapping[str, Any], datasets: list[str], source: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    scores = metrics["systems"]["adapter"]
    trivial = {name: entry for name, entry in metrics["systems"].items() if entry["kind"] == "trivial"}
    dataset = {
        "dataset_type": datasets[0] if datasets else "other",
        "dataset_name": source,
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
