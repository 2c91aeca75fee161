"""Tiny random models of several architectures, a tokenizer like Falcon's, and a miniature corpus. Made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from kestrel.config.settings import Data, Lora, Model, Quantization, Settings

# Falcon's spare special tokens and, as id 11, its only end and padding token.
SPECIAL = [
    ">>TITLE<<", ">>ABSTRACT<<", ">>INTRODUCTION<<", ">>SUMMARY<<", ">>COMMENT<<", ">>ANSWER<<", ">>QUESTION<<",
    ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>",
]  # fmt: skip
VOCABULARY = 384
_ANIMALS = ["dog", "cat", "horse", "parrot", "rabbit", "turtle"]
_FOODS = ["pizza", "soup", "bread", "rice", "cake", "fish"]
_TOWNS = ["paris", "oslo", "rome", "lima", "cairo", "quito"]


def words(persona: list[str]) -> list[dict[str, str]]:
    """A conversation about a persona."""
    animal, food, town = (sentence.split()[-2] for sentence in persona)
    return [
        {"speaker": "partner", "text": "hi ! do you have a pet ?"},
        {"speaker": "self", "text": f"yes , i have a {animal} ."},
        {"speaker": "partner", "text": "nice . what do you eat ?"},
        {"speaker": "self", "text": f"i love {food} the most . and you ?"},
        {"speaker": "partner", "text": "the same . where do you live ?"},
        {"speaker": "self", "text": f"in {town} , with my {animal} ."},
    ]


def write_corpus(
    folder: Path, dialogues: int, seed: int = 0, candidates: bool = False, test: int | None = None
) -> Path:
    """Train, validation and test in Kestrel's own JSON lines; dialogues of 2, 4 or 6 turns, no two personas alike."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    personas = [(a, f, t) for a in _ANIMALS for f in _FOODS for t in _TOWNS]
    draw.shuffle(personas)
    counts = {"train": dialogues, "validation": max(2, dialogues // 6), "test": test or max(3, dialogues // 4)}
    for split, count in counts.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for index in range(count):
                animal, food, town = personas.pop()
                persona = [f"i have a {animal} .", f"my favorite food is {food} .", f"i live in {town} ."]
                turns = words(persona)[: draw.choice([2, 4, 6])]
                row: dict[str, Any] = {"dialogue_id": f"{split}-{index}", "persona": persona, "turns": turns}
                if candidates:
                    replies = len(turns) // 2
                    row["candidates"] = [[f"i hate {draw.choice(_FOODS)} .", "no ."] for _ in range(replies)]
                file.write(json.dumps(row) + "\n")
    return folder


def make_tokenizer(vocabulary: int = VOCABULARY, lines: list[str] | None = None) -> Any:
    """Byte-level BPE with Falcon's special tokens at ids 0 to 11; no token begins or pads a text.

    Of given lines its tokens reach across words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=lines is None)
    tokenizer.decoder = decoders.ByteLevel()
    if lines is None:
        persona = ["i have a dog .", "my favorite food is soup .", "i live in rome ."]
        lines = ["Persona: " + " ".join(persona), *(f"You: {turn['text']}" for turn in words(persona)), "\nPartner: hi"]
        lines += [f"a {word} ." for word in (*_ANIMALS, *_FOODS, *_TOWNS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines * 3,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_config(architecture: str, hidden: int = 64, layers: int = 2) -> Any:
    """The configuration of a tiny model: llama, gpt_neox, qwen2, gpt2, mistral, bloom, or a Falcon.

    falcon has Falcon-7B's flags, falcon-alibi Falcon-RW's, falcon-new Falcon-40B's.
    """
    import transformers
    from transformers import FalconConfig

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 11, "eos_token_id": 11}
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    if architecture == "falcon":
        flags = {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False}
        return FalconConfig(**common, **shape, **flags, alibi=False)
    if architecture == "falcon-alibi":
        flags = {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "bias": True}
        return FalconConfig(**common, **shape, **flags, alibi=True)
    if architecture == "falcon-new":
        return FalconConfig(**common, **shape, num_kv_heads=2, new_decoder_architecture=True, bias=False, alibi=False)
    if architecture == "bloom":
        return transformers.BloomConfig(**common, **shape)
    if architecture == "gpt2":
        return transformers.GPT2Config(**common, n_embd=hidden, n_layer=layers, n_head=4, n_positions=512)
    wide = {**common, **shape, "intermediate_size": 2 * hidden}
    if architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(**wide)
    if architecture in ("mistral", "mistral-wide"):
        window = 16 if architecture == "mistral" else 300
        return transformers.MistralConfig(**wide, num_key_value_heads=2, sliding_window=window)
    if architecture == "gemma3":
        shape = {"head_dim": 16, "sliding_window": 300, "layer_types": ["sliding_attention", "full_attention"]}
        return transformers.Gemma3TextConfig(**{**wide, "pad_token_id": 11}, num_key_value_heads=2, **shape)
    if architecture == "llama":
        return transformers.LlamaConfig(**wide, num_key_value_heads=2)
    return transformers.Qwen2Config(**wide, num_key_value_heads=2, tie_word_embeddings=True)


def make_model(
    architecture: str = "falcon", hidden: int = 64, layers: int = 2, seed: int = 0, tokenizer: Any = None
) -> Any:
    """A random causal LM in float32, for make_tokenizer's tokens or those of another one; its weights are wide enough that
    its choices are no ties."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = make_config(architecture, hidden, layers)
    if tokenizer is not None:
        config.vocab_size, config.eos_token_id = max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
    config.initializer_range = 0.15
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class AdaptedModels(dict[str, torch.nn.Module]):
    """By architecture, with an adapter that does something and prepared for likelihoods; made when first asked for."""

    def __missing__(self, architecture: str) -> torch.nn.Module:
        from kestrel.adapter.lora import add_lora
        from kestrel.model.loss import attach_token_nll

        target: Any = ["c_attn"] if architecture == "gpt2" else "all-linear"
        model = add_lora(make_model(architecture), Lora(r=4, target_modules=target), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        attach_token_nll(model)
        self[architecture] = model.eval()
        return self[architecture]


def write_base(folder: Path, architecture: str = "falcon", tokenizer: Any = None, **shape: int) -> Path:
    """A base model's folder as one downloads it: weights, configuration, tokenizer."""
    make_model(architecture, tokenizer=tokenizer, **shape).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def settings_of(base: Path | str = "unused", **sections: Any) -> Settings:
    """Settings for a base, with other sections as given; in bfloat16 on every machine."""
    sections = {"quantization": Quantization(compute_dtype="bfloat16"), **sections}
    return Settings(run_dir="unused", data=Data(source="unused"), model=Model(name=str(base)), **sections)


def write_config(path: Path, base: Path, source: Path, run_dir: Path, extra: str = "") -> Path:
    """An experiment on the tiny model that a CPU runs in seconds."""
    path.write_text(
        f"""run_dir: {run_dir}
data:
  source: {source}
prompt:
  max_length: 160
model:
  name: {base}
quantization:
  compute_dtype: float32
lora:
  r: 4
  alpha: 8
  dropout: 0.1
training:
  max_steps: 8
  batch_size: 4
  learning_rate: 1e-2
  evaluations: 4
  logging_steps: 1
  samples: 1
generation:
  max_new_tokens: 8
{extra}""",
        encoding="utf-8",
    )
    return path
