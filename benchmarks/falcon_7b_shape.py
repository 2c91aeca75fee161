"""Writes a model folder of Falcon-7B's exact shape with random weights, where the real one is not at hand.

    python benchmarks/falcon_7b_shape.py --output FOLDER [--layers 32] [--text FILE ...]

Speed and memory of the folder are Falcon-7B's (6,921,720,704 parameters, 13.8 GB in bf16); what it says is noise. The
tokenizer is trained on the given text, or on the quickstart's dialogues, and has Falcon's special tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = [
    f">>{name}<<"
    for name in (
        "TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION", "DOMAIN", "PREFIX", "SUFFIX",
        "MIDDLE",
    )
] + ["<|endoftext|>"]  # fmt: skip
SHARD_BYTES = 2 * 2**30


def write_tokenizer(folder: Path, lines: Iterable[str], vocabulary: int = 8192) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(str(folder))


def write_weights(folder: Path, layers: int, seed: int, **shape: int) -> int:
    """Sharded safetensors of normal(0, 0.02) weights, norms at one. Returns the number of parameters.

    Args:
        folder: of the model.
        layers: decoder layers.
        seed: of the weights.
        shape: what of FalconConfig is to differ from Falcon-7B, such as hidden_size.
    """
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(num_hidden_layers=layers, bos_token_id=11, eos_token_id=11, dtype="bfloat16", **shape)
    with torch.device("meta"):
        skeleton = FalconForCausalLM(config)
    skeleton.tie_weights()
    config.architectures = ["FalconForCausalLM"]
    config.save_pretrained(str(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    place: dict[str, str] = {}
    number = total = 0

    def flush() -> None:
        nonlocal number, shard
        if shard:
            number += 1
            name = f"model-{number:05d}.safetensors"
            save_file(shard, str(folder / name), metadata={"format": "pt"})
            place.update(dict.fromkeys(shard, name))
            shard = {}

    for name, parameter in skeleton.named_parameters():  # tied weights are named once
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if tensor.dim() > 1:
            tensor.normal_(0, config.initializer_range)
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        shard[name] = tensor.cpu()
        total += tensor.numel()
        if sum(t.numel() * 2 for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total * 2}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def write_folder(
    doc: str | None, layers: int, weights: Callable[[Path, int, int], str], argv: list[str] | None = None
) -> int:
    """The program of a shape: reads the options, writes tokenizer and weights.

    Args:
        doc: of the program, for --help.
        layers: of the real model.
        weights: writes them, for a folder, a number of layers and a seed; returns how many, in words.
        argv: of the program.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, nargs="*", default=[ROOT / "quickstart" / "dialogues" / "train.jsonl"])
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    lines = (line for path in options.text for line in path.read_text(encoding="utf-8").splitlines())
    write_tokenizer(options.output, lines)
    print(f"wrote {options.output}: {weights(options.output, options.layers, options.seed)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return write_folder(__doc__, 32, lambda *given: f"{write_weights(*given):,} parameters", argv)


if __name__ == "__main__":
    sys.exit(main())
