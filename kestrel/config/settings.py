"""Every key of an experiment: its type, default, meaning and limits. One YAML file serves all scripts.

The JSON Schema that editors use is made from this file: `python -m kestrel.config.settings > configs/schema.json`.
"""

from __future__ import annotations

import json
import os.path
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Strict: a YAML `true` is not an integer and `"16"` is not a number. The loader handles numbers such as 2e-4.
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
_MOST = 2**31 - 1  # of anything that is counted
PositiveInt = Annotated[int, Field(ge=1, le=_MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MOST)]


def _without_controls(text: str, but: str = "") -> str:
    if re.search("[\x00-\x1f\x7f]", text.translate(dict.fromkeys(map(ord, but)))):
        raise PydanticCustomError("control_character", "expected text without control characters")
    return text


# A path, an id or a name; no path that Linux opens is longer.
Text = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_without_controls)]
# Text that may have several lines, or none.
Prose = Annotated[str, Field(max_length=4095), AfterValidator(lambda text: _without_controls(text, "\n\t"))]
# A path, or an id on the Hub; ~ is the user's home.
Place = Annotated[Text, AfterValidator(os.path.expanduser)]
SYSTEM = "You are the following person. Answer as this person would."
LABELS = ("Persona", "Partner", "You")
# Of training.*, what shapes the weights. A resumed run and a published adapter must agree in these; others may change.
DECISIVE_TRAINING_SETTINGS = {
    "batch_size", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer",
}  # fmt: skip
MEMORY_FORM = "an amount of memory such as 24GiB"
# The names that transformers' Trainer knows (5.23); a test compares them.
Tracker = Literal[
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune",
    "swanlab", "tensorboard", "trackio", "wandb",
]  # fmt: skip


class Section(BaseModel):
    model_config = _STRICT


def _key(default: Any, description: str) -> Any:
    """A field of a section; `...` as default where a value is required."""
    return Field(default, description=description)


DataFormat = Literal[
    "auto", "parlai", "parlai_fields", "huggingface", "truecased", "cynaptics", "synthetic", "kaggle", "kestrel", "messages",
    "xpersona", "msc", "dnli", "wild", "realpersonachat", "whatsapp", "telegram", "discord", "messenger",
]  # fmt: skip


class Data(Section):
    """Where the dialogues come from."""

    source: Place = _key(..., "Local file or folder, or a dataset id on the Hugging Face Hub (owner/name).")
    format: DataFormat = _key("auto", "Format of the source; auto recognizes it by its content.")
    revision: Text | None = _key(None, "Commit, tag or branch of a source on the Hub.")
    both_sides: bool = _key(True, "Make two dialogues of a conversation, one per persona, if both are known.")
    validation_fraction: Fraction = _key(
        0.05, "Share of train's personas to split off for validation, if the source has no such split."
    )
    test_fraction: Fraction = _key(
        0.05, "Share of train's personas to split off for test, if the source has neither test nor validation."
    )
    max_dialogues: PositiveInt | None = _key(None, "Use at most this many dialogues of each split.")
    self: Text | None = _key(None, "Of a messenger's export: the name of the one who is learned.")
    persona: list[Text] = _key(
        [], "Persona of dialogues for which the source has none: its sentences, or a text file or a character card."
    )
    session_gap: Annotated[float, Field(gt=0, le=1e6)] = _key(
        6.0, "Of a messenger's export: hours of silence after which another dialogue begins."
    )
    earlier_sessions: bool = _key(False, "Of Multi-Session Chat: put the earlier sessions before each dialogue.")
    redact: list[Literal["email", "phone", "url"]] = _key(
        [], "What to replace in all texts: e-mail addresses, phone numbers, web addresses."
    )
    dataset: Place | None = _key(
        None,
        "Another run's data set to use, such as runs/a/dataset, made of the same source; null: the one in run_dir.",
    )


class Prompt(Section):
    """How a dialogue becomes tokens."""

    format: Literal["plain", "chat", "original"] = _key(
        "plain",
        "plain: Kestrel's own prompt, for base models; chat: the tokenizer's chat template, for instruct models; "
        "original: the prompt of the original project, to score its adapter.",
    )
    max_length: Annotated[int, Field(ge=16, le=_MOST)] = _key(
        1024, "Longest training sequence in tokens; longer dialogues lose their oldest turns."
    )
    chat_template: Place | None = _key(
        None, "File with a chat template (Jinja) to use instead of the tokenizer's, with format chat."
    )
    system: Prose = _key(SYSTEM, "Text before the persona in the system message, with format chat; may be empty.")
    labels: list[Text] = _key(
        [*LABELS], "Words before the persona, the partner's turns and the replies, with format plain."
    )


class Model(Section):
    """The base model and the adapter to use with it."""

    name: Place = _key(..., "Model id on the Hugging Face Hub, or a local folder.")
    revision: Text | None = _key(None, "Commit, tag or branch of the model on the Hub.")
    adapter: Place | None = _key(
        None,
        "Adapter to use: a folder, or an id on the Hugging Face Hub (owner/name, or owner/name@revision); "
        "null: the one in run_dir.",
    )
    trust_remote_code: bool = _key(
        False, "Run Python code that comes with the model. Set it only for authors you trust with your account."
    )


class Quantization(Section):
    """How the frozen base is held in memory."""

    bits: Literal[4, 16] = _key(4, "4: QLoRA; 16: plain LoRA on the base in compute_dtype.")
    type: Literal["nf4", "fp4"] = _key("nf4", "4-bit data type.")
    double_quant: bool = _key(True, "Quantize the quantization constants too; saves 0.37 bits per weight.")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = _key(
        "auto",
        "Data type of activations and of everything that is not quantized. auto: bfloat16 on a GPU or CPU that computes in "
        "it, else float16 on a GPU and float32 on a CPU; what was trained keeps its type.",
    )


class Lora(Section):
    """The low-rank adapter to train."""

    r: Annotated[int, Field(ge=1, le=2**16)] = _key(16, "Rank of the update.")
    alpha: Annotated[float, Field(gt=0, le=1e6)] = _key(32, "The update is multiplied by alpha / r.")
    dropout: Fraction = _key(0.05, "Dropout on the adapter's input during training.")
    target_modules: list[Text] | Literal["auto", "all-linear"] = _key(
        "auto",
        "Names of the layers that get an adapter; all-linear: every linear layer except the output head; "
        "auto: query_key_value for Falcon, all-linear for others.",
    )


class Training(Section):
    """The optimization. Batch sizes count all processes together."""

    init_adapter: Place | None = _key(
        None,
        "Adapter to begin from: a folder, or an id on the Hub; its rank, alpha and layers are taken. null: a fresh one.",
    )
    epochs: Annotated[float, Field(gt=0, le=1e5)] = _key(
        1.0, "Passes over the training dialogues. More of them, or of max_steps, extend a finished run."
    )
    max_steps: PositiveInt | None = _key(None, "Stop after this many optimizer steps; overrides epochs.")
    batch_size: PositiveInt = _key(32, "Dialogues per optimizer step.")
    tokens_per_step: PositiveInt | Literal["auto"] = _key(
        "auto",
        "Most tokens in one forward pass on one device, padding included; affects only speed and memory. "
        "auto: as many as fit on the GPU and keep it busy, 4096 without one.",
    )
    device_memory: Text | None = _key(
        None, "GPU memory to stay within, such as 24GiB, or that --dry-run plans for; null: all of it."
    )
    learning_rate: Annotated[float, Field(gt=0, le=100)] = _key(2e-4, "Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = _key("cosine", "Learning rate schedule after the warm-up.")
    warmup_ratio: Fraction = _key(0.03, "Share of the steps over which the learning rate rises to its peak.")
    weight_decay: Annotated[float, Field(ge=0, le=100)] = _key(0.0, "Weight decay of AdamW.")
    max_grad_norm: Annotated[float, Field(gt=0, le=1e9)] = _key(1.0, "Norm to which gradients are clipped.")
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"] = _key(
        "adamw_torch", "Optimizer; paged_adamw_8bit needs a GPU."
    )
    recompute: Literal["auto", "dense", "none", "mlp", "full"] = _key(
        "auto",
        "What the backward pass recomputes to save memory: none; mlp: the MLP's first product; "
        "full: each layer (gradient checkpointing). dense: none, and the 4-bit weights are kept dense too, 2 bytes more for each "
        "in 16 bit. auto: what should be fastest, of what fits on the GPU.",
    )
    dense_weights: bool = _key(
        False, "No longer has an effect (recompute: dense does what it did); accepted so that older configs load."
    )
    evaluations: PositiveInt = _key(4, "Evaluations, evenly spaced over the run; each writes a checkpoint and samples.")
    early_stopping: PositiveInt | None = _key(None, "Stop after so many evaluations without a lower loss; null: never.")
    keep_checkpoints: PositiveInt = _key(2, "Newest checkpoints to keep on disk; the best one is kept too.")
    logging_steps: PositiveInt = _key(10, "Optimizer steps between two lines of the log.")
    samples: NonNegativeInt = _key(3, "Validation contexts to answer at each evaluation, for samples.jsonl.")
    resume: Place = _key(
        "auto", "auto: from the newest intact checkpoint; never: start over; or a checkpoint's folder."
    )
    report_to: list[Tracker] = _key(["tensorboard"], "Trackers of transformers' Trainer; [] for none.")


class Generation(Section):
    """Answers of the adapter and of the base to every context of a split."""

    split: Literal["train", "validation", "test"] = _key("test", "Split to answer.")
    systems: list[Literal["adapter", "base"]] = _key(["adapter", "base"], "Systems that answer.")
    max_dialogues: PositiveInt | None = _key(None, "Answer only the first dialogues of the split.")
    max_new_tokens: PositiveInt = _key(64, "Longest response in tokens.")
    do_sample: bool = _key(False, "Sample instead of taking the likeliest token.")
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = _key(None, "With do_sample: softmax temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = _key(None, "With do_sample: probability mass of the nucleus.")
    top_k: PositiveInt | None = _key(None, "With do_sample: sample among the k likeliest tokens.")
    num_beams: PositiveInt = _key(1, "Beams; 1 is greedy search.")
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = _key(
        None, "With num_beams: exponent of the length; above 0 favours long responses."
    )
    repetition_penalty: Annotated[float, Field(ge=1, le=1e3)] = _key(1.0, "Penalty on repeated tokens; 1.0 is none.")
    no_repeat_ngram_size: NonNegativeInt = _key(0, "Size of n-grams that may not occur twice; 0: no limit.")
    stop_strings: list[Annotated[str, Field(max_length=1000)]] = _key(
        ["\n"], "Strings that also end a response, for a base that never learned to stop."
    )
    tokens_per_step: PositiveInt | Literal["auto"] = _key(
        "auto",
        "Most tokens in one pass over dialogues, padding included; decoding their answers takes as much memory again. "
        "Affects only speed and memory. auto: passes and batches of answers as large as the free memory holds.",
    )
    references: bool = _key(True, "Score the likelihood of the references (perplexity).")
    candidates: bool = _key(False, "Score the likelihood of each candidate reply (hits@1).")
    other_personas: NonNegativeInt = _key(
        0, "Personas of other dialogues to score each reference under (persona likelihood gain, swap accuracy)."
    )
    persona_orders: PositiveInt = _key(
        1, "Number of orders of the persona's sentences to answer with: the given one and shuffles."
    )


class Evaluation(Section):
    """Scoring of generations. Needs no model."""

    generations: list[Place] = _key([], "Files to score, of any tool; []: all in run_dir for generation.split.")
    fields: list[Annotated[str, Field(pattern=r"^(response|reference|dialogue_id|turn|persona|history)=.")]] = _key(
        [], "Keys of the files under other names than ours, such as response=text; usual names are recognized."
    )
    compare: list[Place] = _key([], "Run folders to compare in generation.split; the report is RUN_DIR/comparison.")
    normalization: Literal["raw", "lower", "parlai"] = _key(
        "raw", "Normalization of both references and responses before BLEU and ROUGE-L."
    )
    stemmer: bool = _key(False, "Use the Porter stemmer in ROUGE-L of English.")
    tokenize: Literal["auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores200"] = _key(
        "auto", "Tokenizer of BLEU, by sacreBLEU's name; auto: the one that fits the script of the references."
    )
    resamples: Annotated[int, Field(ge=100, le=10**6)] = _key(1000, "Bootstrap resamples of the dialogues.")
    output: Place | None = _key(
        None, "Folder to write; null: evaluation in run_dir, or evaluation-NAMES beside it for files that are named."
    )
    nli: Place | None = _key(
        None,
        "Model of natural language inference, by Hub id or local folder, that finds contradictions of the persona.",
    )
    extra_metrics: list[Text] = _key([], "More metrics from the evaluate library, by Hub id or local folder.")
    samples: NonNegativeInt = _key(100, "Dialogues that can be browsed in the report.")
    conventions: list[Literal["parlai_bleu4", "nltk_sentence_bleu", "nltk_corpus_bleu", "meteor", "bertscore"]] = _key(
        [], "Scores by other definitions that papers use, shown beside ours."
    )
    sheet: NonNegativeInt = _key(0, "Pairs of replies for a blind sheet on which people judge two systems; 0: none.")
    judgements: list[Text] = _key([], "Filled-in sheets to read: JSON files of the page, or CSV.")


class Hub(Section):
    """What publish.py uploads to the Hugging Face Hub. The token comes only from HF_TOKEN or `hf auth login`."""

    repo_id: Text | None = _key(None, "Repository to publish to (owner/name); created if it does not exist.")
    private: bool = _key(True, "Make the repository visible only to you and your organization.")
    base_model: Text | None = _key(None, "Id of the base on the Hub, if model.name is a copy; null: model.name.")
    license: Text | None = _key(None, "Licence of the adapter by the Hub's identifier, such as apache-2.0.")
    language: list[Text] = _key(["en"], "Languages of the dialogues, as ISO 639 codes.")
    datasets: list[Text] = _key(
        [], "Ids of the training data on the Hub, for the card; []: data.source, if on the Hub."
    )


class Settings(Section):
    """One experiment."""

    run_dir: Place = _key(..., "Folder for everything this experiment writes.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = _key(
        0, "Seed of splits, initial weights, shuffles, dropout, samples."
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

    @property
    def dataset_dir(self) -> Path:
        """The folder of the data set."""
        return Path(self.data.dataset or Path(self.run_dir, "dataset"))


def memory_bytes(text: str | None) -> int | None:
    """Bytes of an amount such as 24GiB, 24 GB or 512MiB; None for anything else."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([MG])(i?)B", text or "")
    if match is None or float(match[1]) == 0:
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** {"M": 2, "G": 3}[match[2]])


def is_hub_id(text: str) -> bool:
    """Whether a text has the form owner/name of the Hub. `./name` and `/name` are paths."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(f"{part}/{part}", text) is not None and not re.search(r"\.\.|--|\.git$", text)


def json_schema() -> str:
    """The settings as JSON Schema, for editors."""
    schema: dict[str, Any] = Settings.model_json_schema()
    schema["title"] = "Kestrel experiment"
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
