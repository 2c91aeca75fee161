"""The card of a published adapter: metadata that the Hub reads, and the same facts for people.

Everything in it comes from manifests and metrics.json; what those do not say, the card does not say either. The same
facts make the same card, to the byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError
from kestrel.evaluation.tables import scores_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_METRICS = (("bleu", "bleu", "BLEU"), ("rouge_l", "rouge", "ROUGE-L"), ("f1", "f1", "F1"))  # ours, the Hub's, shown
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#&~])")


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Attributes:
        repo_id: where it is published.
        base_model: the base's id on the Hub.
        license: the Hub's identifier, or None.
        language: ISO 639 codes.
        datasets: ids of the training data on the Hub.
        data_name: what the training data is called, for people.
        adapter: the adapter's manifest.
        statistics: of the train split, as in the dataset's statistics.json, or None.
        metrics: as evaluate.py wrote them, or None.
        usage: a Python program that answers one context, and the pieces of its prompt.
        prompt_format: plain, chat or original.
        prompt_text: the prompt of that context.
    """

    repo_id: str
    base_model: str
    license: str | None
    language: Sequence[str]
    datasets: Sequence[str]
    data_name: str
    adapter: Mapping[str, Any]
    statistics: Mapping[str, Any] | None
    metrics: Mapping[str, Any] | None
    usage: str
    prompt_format: str
    prompt_text: str


def model_card(facts: Facts) -> str:
    """The content of README.md.

    Raises:
        KestrelError: the metadata is not what the Hub reads.
    """
    from huggingface_hub import ModelCardData

    name = facts.repo_id.partition("/")[2]
    data = ModelCardData(
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        eval_results=_results(facts) or None,
        language=list(facts.language) or None,
        library_name="peft",
        license=facts.license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=["lora", "persona", "dialogue", "kestrel", f"base_model:adapter:{facts.base_model}"],
    )
    content = f"---\n{data.to_yaml()}\n---\n\n{_body(name, facts)}"
    check_metadata(content)
    return content


def check_metadata(content: str) -> None:
    """Reads a card back as the Hub's client does and looks at what the Hub would refuse, without asking it.

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
        problems.append("hub.license other: the Hub asks for a name too; choose one of its identifiers")
    languages = [data.language] if isinstance(data.language, str) else data.language or []
    for code in languages:
        if not re.fullmatch(r"[a-z]{2,3}", code):
            problems.append(f"hub.language {code!r}: expected an ISO 639 code such as en")
    for result in data.eval_results or []:
        if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
            problems.append(f"{result.metric_name} is {result.metric_value!r}, no number")
    if problems:
        raise KestrelError("the card's metadata is not what the Hub reads:\n  " + "\n  ".join(problems))


def _results(facts: Facts) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    if facts.metrics is None:
        return []
    scores = facts.metrics["systems"]["adapter"]
    common: dict[str, Any] = {
        "task_type": "text-generation",
        "task_name": "Persona dialogue",
        "dataset_type": facts.datasets[0] if facts.datasets else "other",
        "dataset_name": facts.data_name,
        "dataset_split": facts.metrics["split"],
    }
    found = [(kind, shown, scores[key]["score"], scores[key]) for key, kind, shown in _METRICS if key in scores]
    trivial = {name: entry for name, entry in facts.metrics["systems"].items() if entry["kind"] == "trivial"}
    beside = {
        shown: {name: round(float(entry[key]["score"]), 4) for name, entry in trivial.items()}
        for key, _, shown in _METRICS
    }
    if perplexity := scores.get("perplexity"):
        signature = {"signature": "per reply token, end included", "ci95": perplexity["ci95"]["token"]}
        found.append(("perplexity", "Perplexity per token", perplexity["token"], signature))
    return [
        EvalResult(
            **common,
            metric_type=kind,
            metric_name=shown,
            metric_value=round(float(value), 4),
            metric_args={
                "signature": entry["signature"],
                "ci95": [round(float(end), 4) for end in entry["ci95"] or []],
                "evaluation": facts.metrics["signature"],
                **({"trivial_systems": beside[shown]} if beside.get(shown) else {}),
            },
        )
        for kind, shown, value, entry in found
    ]


def plain(value: Any) -> str:
    """A value as Markdown that shows it and does nothing else."""
    return _MARKUP.sub(r"\\\1", " ".join(str(value).split()))


def _code(text: str, language: str = "") -> str:
    """A fenced block that its content cannot leave."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(plain, columns)) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(plain, row)) + " |" for row in rows)])


def _body(name: str, facts: Facts) -> str:
    settings = facts.adapter["settings"]
    parts = [
        f"# {plain(name)}",
        (
            f"A LoRA adapter on `{facts.base_model}` that answers as the owner of a persona, trained on "
            f"{plain(facts.data_name)} with Kestrel."
        ),
        _belongs(facts, settings["quantization"]),
        "## Use",
        _code(facts.usage, "python"),
        "With Kestrel, which also proves that base, prompt and adapter are the ones that were trained:",
        _code(
            f"python generate.py --config configs/NAME.yaml --model.name {facts.base_model} "
            f"--model.adapter {facts.repo_id}",
            "bash",
        ),
        "## Prompt",
        f"The format is Kestrel's `{facts.prompt_format}`. The model answers after this, and ends with its end token:",
        _code(facts.prompt_text, "text"),
        "## Evaluation",
        _evaluation(facts.metrics),
        "## Training",
        _table(("fact", "value"), _training(facts, settings)),
        "## Limits",
        (
            "The adapter learned the manner of one data set, in its language. It may say what is wrong or hurtful, and it "
            "takes on any persona that it is given. Scores by overlap with one reference say little about how good a "
            "conversation is."
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _belongs(facts: Facts, quantization: Mapping[str, Any]) -> str:
    base = facts.adapter["made_from"].get("base") or {}
    commit = f", commit `{base['commit']}`" if base.get("commit") else ""
    if quantization["bits"] == 16:
        return f"It belongs to the base in {quantization['compute_dtype']}{commit}."
    nested = " with double quantization" if quantization["double_quant"] else ""
    return (
        f"It belongs to the base in 4-bit {quantization['type'].upper()}{nested}{commit}, computed in "
        f"{quantization['compute_dtype']}: over a base in 16 bit its logits are other ones."
    )


def _evaluation(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "None was published with this adapter."
    table = scores_table(metrics)
    systems = metrics["systems"]
    signatures = [f"{shown}: `{systems['adapter'][key]['signature']}`" for key, _, shown in _METRICS]
    parts = [
        (
            f"Split {plain(metrics['split'])}: {metrics['n_replies']:,} replies of {metrics['n_dialogues']:,} dialogues. "
            "Intervals are of a bootstrap over dialogues. Below the models stand systems that need none: what does not beat "
            "them has learned little."
        ),
        _table(table.columns, table.rows),
        "  \n".join([f"Evaluation: `{metrics['signature']}`", *signatures]),
        "\n".join(f"- {plain(verdict)}" for verdict in metrics["verdicts"]),
    ]
    return "\n\n".join(parts)


def _training(facts: Facts, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    adapter, lora, training = facts.adapter, settings["lora"], settings["training"]
    targets = lora["target_modules"]
    rows = [("data", facts.data_name)]
    if facts.statistics is not None:
        seen = facts.statistics
        rows.append(
            ("dialogues in train", f"{seen['dialogues']:,}, {seen['replies']:,} replies, {seen['tokens']:,} tokens")
        )
    rows += [
        (
            "LoRA",
            (
                f"rank {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on "
                f"{targets if isinstance(targets, str) else ', '.join(targets)}; {adapter['trainable_parameters']:,} "
                "trained parameters"
            ),
        ),
        (
            "optimization",
            (
                f"{adapter['steps']:,} steps of up to {training['batch_size']} dialogues, {training['optimizer']}, learning "
                f"rate {training['learning_rate']:g}, {training['lr_schedule']}; seed {settings['seed']}"
            ),
        ),
        ("tokens seen", f"{adapter['tokens']:,}"),
        (
            "kept",
            (
                f"step {adapter['best_step']}, validation loss {adapter['eval_loss']:.4f} (perplexity "
                f"{math.exp(adapter['eval_loss']):.2f} per reply token)"
            ),
        ),
        ("versions", ", ".join(f"{library} {version}" for library, version in adapter["versions"].items())),
    ]
    if adapter.get("git_commit"):
        rows.append(("Kestrel's commit", adapter["git_commit"]))
    return rows
