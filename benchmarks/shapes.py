"""Writes a model folder of a well-known model's exact shape: random weights in NF4, as bitsandbytes saves them.

    python benchmarks/shapes.py --shape qwen2.5-7b --output FOLDER [--layers 28] [--text FILE ...]

Speed and memory of the folder are the real model's; what it says is noise. 7 billion parameters take 4 to 6 GB of disk.
The tokenizer is trained on the given text, or on the quickstart's dialogues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.falcon_7b_shape import write_tokenizer
from benchmarks.options import at_least_one, told

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_FALCON_7B = {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024,
              "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False,
              "new_decoder_architecture": False}  # fmt: skip
# transformers' name of the architecture, and the config's values that make the shape.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                             "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, **_ROPE}),
    "llama-3.1-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, **_ROPE}),
    "mistral-7b": ("mistral", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
                               "sliding_window": None, **_ROPE}),
    "gemma-2-9b": ("gemma2", {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
                              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
                              "query_pre_attn_scalar": 256, "vocab_size": 256000, "sliding_window": 4096}),
    "smollm2-135m": ("llama", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                               "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                               "tie_word_embeddings": True, **_ROPE}),
    "falcon-7b": ("falcon", _FALCON_7B),
    "falcon-40b": ("falcon", {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
                              "num_kv_heads": 8, "new_decoder_architecture": True, "vocab_size": 65024}),
    "tiny": ("qwen2", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192, **_ROPE}),
}  # fmt: skip

# The scale of a block of 64 weights. Larger ones would enlarge rounding from layer to layer until gradients are noise. So
# would scales of one sign: NF4's values have a mean, and a stream with a direction of its own hides the tokens.
_SCALE = 0.024
_LEVELS = 255  # what stands for a sign of 1 among the levels that scales are quantized to; 0 stands for -1


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The config of a shape, with as many layers as the real model has or as are given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, keys = SHAPES[shape]
    given = {"max_position_embeddings": 8192, "bos_token_id": 11, "eos_token_id": 11, "pad_token_id": None, **keys}
    config = AutoConfig.for_model(kind, **given | ({"num_hidden_layers": layers} if layers else {}))
    config.dtype, config.use_cache = torch.bfloat16, True
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def write_shape(folder: Path, shape: str, lines: Iterable[str], layers: int | None = None, seed: int = 0) -> int:
    """Writes config, tokenizer and weights; one layer is made and written at a time.

    Args:
        folder: of the model; it is made.
        shape: a name of `SHAPES`.
        lines: what the tokenizer is trained on.
        layers: decoder layers; None: the real model's.
        seed: of the weights.

    Returns:
        The bytes of all tensors.
    """
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    from kestrel.config.settings import Settings
    from kestrel.planning.random_base import random_base

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, lines)
    config = config_of(shape, layers)
    named = {"run_dir": str(folder), "data": {"source": "none"}, "model": {"name": str(folder)}}
    settings = Settings.model_validate({**named, "quantization": {"compute_dtype": "bfloat16"}})
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = random_base(settings, config_of(shape, layers=1), device)
    for layer in (part for part in model.modules() if hasattr(getattr(part, "weight", None), "quant_state")):
        state = layer.weight.quant_state
        state.offset = torch.zeros_like(state.offset)
        state.state2.absmax = torch.full_like(state.state2.absmax, _SCALE)
    first = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)) + ".0."
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    place, size = {}, 0
    for layer in range(-1, config.num_hidden_layers):  # -1: embedding, last norm and head
        tensors = {}
        for name, tensor in model.state_dict().items():
            if name.startswith(first) is (layer < 0) or name in tied:
                continue
            if tensor.dtype == torch.uint8 and name.endswith(".weight"):
                tensor.random_()  # all values of NF4 are equally likely
            if name.endswith(".absmax"):
                tensor.random_(0, 2).mul_(_LEVELS)
            tensors[name.replace(first, f"{first[:-2]}{layer}.")] = tensor.cpu().contiguous()
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        place.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(str(folder))
    return size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--layers", type=at_least_one, help="decoder layers (the real model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--text", type=Path, nargs="*", default=[ROOT / "quickstart" / "dialogues" / "train.jsonl"])
    options = parser.parse_args(argv)

    def work() -> int:
        lines = (line for path in options.text for line in path.read_text(encoding="utf-8").splitlines())
        size = write_shape(options.output, options.shape, lines, options.layers, options.seed)
        print(f"wrote {options.output}: {size / 1e9:.1f} GB")
        return 0

    return told(work)


if __name__ == "__main__":
    sys.exit(main())
