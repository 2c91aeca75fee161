"""Every key of an experiment: its type, default, meaning and limits. One YAML file serves all scripts.

The JSON Schema that editors use is made from this file: `python -m kestrel.config.settings > configs/schema.json`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Strict: a YAML `true` is not an integer and `"16"` is not a number. The loader handles numbers such as 2e-4.
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
MEMORY_FORM = "an amount of memory such as 24GiB"
# The names that transformers' Trainer knows (5.23); a test compares them.
Tracker = Literal[
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune",
    "swanlab", "tensorboard", "trackio", "wandb",
]  # fmt: skip


class Section(BaseModel):
    model_config = _STRICT


class Data(Section):
    """Where the dialogues come from."""

    source: Text = Field(description="Local file or folder, or a dataset id on the Hugging Face Hub (owner/name).")
    format: Literal["auto", "parlai", "huggingface", "truecased", "cynaptics", "synthetic", "kaggle", "kestrel"] = (
        Field("auto", description="Format of the source; auto recognizes it by its content.")
    )
    revision: Text | None = Field(None, description="Commit, tag or branch of a source on the Hub.")
    both_sides: bool = Field(
        True, description="If both personas are known, make two dialogues of each conversation, one per persona."
    )
    validation_fraction: Fraction = Field(
        0.05, description="Share of train's personas to split off for validation, if the source has no such split."
    )
    test_fraction: Fraction = Field(
        0.05,
        description="Share of train's personas to split off for test, if the source has neither test nor validation.",
    )
    max_dialogues: PositiveInt | None = Field(None, description="Use at most this many dialogues of each split.")


class Prompt(Section):
    """How a dialogue becomes tokens."""

    format: Literal["plain", "chat", "original"] = Field(
        "plain",
        description="plain: Kestrel's own prompt, for base models; chat: the tokenizer's chat template, for instruct models; "
        "original: the prompt of the original project, to score its adapter.",
    )
    max_length: Annotated[int, Field(ge=16)] = Field(
        1024, description="Longest training sequence in tokens; longer dialogues lose their oldest turns."
    )


class Model(Section):
    """The base model and the adapter to use with it."""

    name: Text = Field(description="Model id on the Hugging Face Hub, or a local folder.")
    revision: Text | None = Field(None, description="Commit, tag or branch of the model on the Hub.")
    adapter: Text | None = Field(
        None,
        description="Adapter to use: a folder, or an id on the Hugging Face Hub (owner/name, or owner/name@revision); "
        "null: the one in run_dir.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with the model. Set it only for authors you trust with your account.",
    )


class Quantization(Section):
    """How the frozen base is held in memory."""

    bits: Literal[4, 16] = Field(4, description="4: QLoRA; 16: plain LoRA on the base in compute_dtype.")
    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type.")
    double_quant: bool = Field(True, description="Quantize the quantization constants too; saves 0.37 bits per weight.")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Data type of activations and of everything that is not quantized. Use float32 on most CPUs.",
    )


class Lora(Section):
    """The low-rank adapter to train."""

    r: PositiveInt = Field(16, description="Rank of the update.")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="The update is multiplied by alpha / r.")
    dropout: Fraction = Field(0.05, description="Dropout on the adapter's input during training.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        ["query_key_value"],
        description="Names of the layers that get an adapter, or all-linear: every linear layer except the output head.",
    )


class Training(Section):
    """The optimization. Batch sizes count all processes together."""

    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the training dialogues.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps; overrides epochs.")
    batch_size: PositiveInt = Field(32, description="Dialogues per optimizer step.")
    tokens_per_step: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Most tokens in one forward pass on one device, padding included; affects only speed and memory. "
        "auto: as many as fit on the GPU, 4096 without one.",
    )
    device_memory: Text | None = Field(
        None, description="GPU memory to plan for and stay within, such as 24GiB; null: all of the GPU's."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate schedule after the warm-up."
    )
    warmup_ratio: Fraction = Field(
        0.03, description="Share of the steps over which the learning rate rises to its peak."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight decay of AdamW.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Norm to which gradients are clipped.")
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="Optimizer; paged_adamw_8bit needs a GPU."
    )
    recompute: Literal["auto", "none", "mlp", "full"] = Field(
        "auto",
        description="What the backward pass recomputes to save memory: none; mlp: the MLP's first product; "
        "full: each layer (gradient checkpointing). auto: as little as fits on the GPU.",
    )
    dense_weights: bool = Field(False, description="No longer has an effect; accepted so that older configs load.")
    evaluations: PositiveInt = Field(
        4, description="Evaluations on validation, evenly spaced over the run; each writes a checkpoint and samples."
    )
    early_stopping: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without a better validation loss; null: never."
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="Newest checkpoints to keep on disk; the best one is kept too."
    )
    logging_steps: PositiveInt = Field(10, description="Optimizer steps between two lines of the log.")
    samples: NonNegativeInt = Field(
        3, description="Validation contexts to answer at each evaluation; the answers go to samples.jsonl."
    )
    resume: Text = Field(
        "auto",
        description="auto: resume from the newest intact checkpoint; never: start over; or a checkpoint's folder.",
    )
    report_to: list[Tracker] = Field(["tensorboard"], description="Trackers of transformers' Trainer; [] for none.")


class Generation(Section):
    """Answers of the adapter and of the base to every context of a split."""

    split: Literal["train", "validation", "test"] = Field("test", description="Split to answer.")
    systems: list[Literal["adapter", "base"]] = Field(["adapter", "base"], description="Systems that answer.")
    max_dialogues: PositiveInt | None = Field(None, description="Answer only the first dialogues of the split.")
    max_new_tokens: PositiveInt = Field(64, description="Longest response in tokens.")
    do_sample: bool = Field(False, description="Sample instead of taking the likeliest token.")
    temperature: Annotated[float, Field(gt=0)] | None = Field(None, description="With do_sample: softmax temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="With do_sample: probability mass of nucleus sampling."
    )
    top_k: PositiveInt | None = Field(None, description="With do_sample: sample among the k likeliest tokens.")
    num_beams: PositiveInt = Field(1, description="Beams; 1 is greedy search.")
    length_penalty: float | None = Field(
        None, description="With num_beams: exponent of the length; above 0 prefers longer responses."
    )
    repetition_penalty: Annotated[float, Field(ge=1)] = Field(
        1.0, description="Penalty on repeated tokens; 1.0 is none."
    )
    no_repeat_ngram_size: NonNegativeInt = Field(
        0, description="Size of n-grams that may not occur twice; 0: no limit."
    )
    stop_strings: list[str] = Field(
        ["\n"],
        description="Strings that also end a response, for a base that never learned to stop.",
    )
    tokens_per_step: PositiveInt = Field(
        8192,
        description="Most tokens in one pass over dialogues, padding included; decoding their answers takes as much memory "
        "again. Affects only speed and memory.",
    )
    references: bool = Field(True, description="Score the likelihood of the references (perplexity).")
    candidates: bool = Field(False, description="Score the likelihood of each candidate reply (hits@1).")
    persona_orders: PositiveInt = Field(
        1, description="Number of orders of the persona's sentences to answer with: the given one and shuffles."
    )


class Evaluation(Section):
    """Scoring of generations. Needs no model."""

    generations: list[str] = Field(
        [], description="Files to score, from Kestrel or another tool; []: all in run_dir for generation.split."
    )
    normalization: Literal["raw", "lower", "parlai"] = Field(
        "raw", description="Normalization of both references and responses before BLEU and ROUGE-L."
    )
    stemmer: bool = Field(False, description="Use the Porter stemmer in ROUGE-L.")
    resamples: Annotated[int, Field(ge=100)] = Field(1000, description="Bootstrap resamples of the dialogues.")
    extra_metrics: list[str] = Field(
        [], description="More metrics from the evaluate library, by Hub id or local folder."
    )
    samples: NonNegativeInt = Field(100, description="Dialogues that can be browsed in the report.")


class Hub(Section):
    """What publish.py uploads to the Hugging Face Hub. The token comes only from HF_TOKEN or `hf auth login`."""

    repo_id: Text | None = Field(
        None, description="Repository to publish to (owner/name); created if it does not exist."
    )
    private: bool = Field(True, description="Make the repository visible only to you and your organization.")
    base_model: Text | None = Field(
        None, description="Id of the base on the Hub, if model.name is a local copy of it; null: model.name."
    )
    license: Text | None = Field(
        None, description="Licence of the adapter, as the Hub's identifier, such as apache-2.0 or cc-by-4.0."
    )
    language: list[str] = Field(["en"], description="Languages of the dialogues, as ISO 639 codes.")
    datasets: list[str] = Field(
        [], description="Ids of the training data on the Hub, for the card; []: data.source, if it is on the Hub."
    )


class Settings(Section):
    """One experiment."""

    run_dir: Text = Field(description="Folder for everything this experiment writes.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Seed of splits, initialization, shuffling, dropout and sampling."
    )
    data: Data
    prompt: Prompt = Prompt()
    model: Model
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    training: Training = Training()
    generation: Generation = Generation()
    evaluation: Evaluation = Evaluation()
    hub: Hub = Hub()


def memory_bytes(text: str | None) -> int | None:
    """Bytes of an amount such as 24GiB, 24 GB or 512MiB; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG])(i?)B", text or "")
    if match is None or float(match[1]) == 0:
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** {"M": 2, "G": 3}[match[2]])


def is_hub_id(text: str) -> bool:
    """Whether a text has the form owner/name of the Hub. `./name` and `/name` are paths."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(f"{part}/{part}", text) is not None and not re.search(r"\.\.|--|\.git$", text)


def _generation_conflicts(settings: Settings) -> list[tuple[str, str]]:
    found = []
    generation = settings.generation
    if not generation.do_sample:
        for key in ("temperature", "top_p", "top_k"):
            if getattr(generation, key) is not None:
                found.append((f"generation.{key}", "has no effect without generation.do_sample: true"))
    if generation.do_sample and generation.num_beams > 1:
        found.append(("generation.num_beams", "cannot be combined with generation.do_sample; remove one of them"))
    if generation.length_penalty is not None and generation.num_beams == 1:
        found.append(("generation.length_penalty", "has no effect without generation.num_beams above 1"))
    if generation.max_new_tokens >= settings.prompt.max_length:
        found.append(("generation.max_new_tokens", "must be below prompt.max_length, to leave space for a prompt"))
    if generation.candidates and not generation.references:
        found.append(
            ("generation.candidates", "needs generation.references: true, because hits@1 ranks the reference too")
        )
    if not generation.systems:
        found.append(("generation.systems", "is empty; name at least one system"))
    if len(set(generation.systems)) < len(generation.systems):
        found.append(("generation.systems", "names a system twice"))
    if any(not text for text in generation.stop_strings):
        found.append(("generation.stop_strings", "contains an empty string, which would end every response at once"))
    return found


def conflicts(settings: Settings) -> list[tuple[str, str]]:
    """Values that are valid alone but not together: (dotted key, what is wrong)."""
    found = []
    for key in ("repo_id", "base_model"):
        if (value := getattr(settings.hub, key)) is not None and not is_hub_id(value):
            found.append((f"hub.{key}", f"expected an id on the Hub such as owner/name, found {value!r}"))
    for name in settings.hub.datasets:
        if not (is_hub_id(name) or is_hub_id(f"owner/{name}")):
            found.append(("hub.datasets", f"expected ids on the Hub such as owner/name, found {name!r}"))
    if settings.data.validation_fraction + settings.data.test_fraction >= 1:
        found.append(
            ("data.test_fraction", "leaves nothing for training: with data.validation_fraction it makes 1 or more")
        )
    if memory_bytes(settings.training.device_memory) is None and settings.training.device_memory is not None:
        found.append(("training.device_memory", f"expected {MEMORY_FORM}, found {settings.training.device_memory!r}"))
    patience = settings.training.early_stopping
    if patience is not None and patience >= settings.training.evaluations:
        found.append(("training.early_stopping", "has no effect unless it is below training.evaluations"))
    found += _generation_conflicts(settings)
    if settings.lora.target_modules == []:
        found.append(("lora.target_modules", "is empty, so nothing would be trained"))
    return found


def json_schema() -> str:
    """The settings as JSON Schema, for editors."""
    schema: dict[str, Any] = Settings.model_json_schema()
    schema["title"] = "Kestrel experiment"
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
