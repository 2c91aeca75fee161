"""Writes a model folder of Falcon-40B's exact shape, its random weights in NF4 as bitsandbytes saves them.

    python benchmarks/falcon_40b_shape.py --output FOLDER [--layers 60] [--text FILE ...]

41.3 billion parameters take 22 GB of disk; made dense, they would take 83. One layer is made and written at a time. The
tokenizer is that of falcon_7b_shape.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.falcon_7b_shape import write_folder

SHAPE: dict[str, Any] = {
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
}


def write_weights(folder: Path, layers: int, seed: int, **shape: Any) -> int:
    """One safetensors file for each layer, one for the rest. Returns the bytes of all tensors.

    Args:
        folder: of the model.
        layers: decoder layers.
        seed: of the weights.
        shape: of FalconConfig.
    """
    from transformers import BitsAndBytesConfig, FalconConfig

    from kestrel.config.settings import Settings
    from kestrel.planning.random_base import random_base

    config = FalconConfig(num_hidden_layers=1, bos_token_id=11, eos_token_id=11, dtype="bfloat16", **shape)
    named = {"run_dir": str(folder), "data": {"source": "none"}, "model": {"name": str(folder)}}
    settings = Settings.model_validate({**named, "quantization": {"compute_dtype": "bfloat16"}})
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_base(settings, config, device)
    place, size = {}, 0
    for layer in range(-1, layers):  # -1: embedding and last norm
        tensors = {}
        for name, tensor in model.state_dict().items():
            if name.startswith("transformer.h.0.") is (layer < 0) or name == "lm_head.weight":  # the head is tied
                continue
            if tensor.dtype == torch.uint8 and name.endswith(".weight"):
                tensor.random_()  # all values of NF4 are equally likely
            tensors[name.replace(".h.0.", f".h.{layer}.")] = tensor.cpu().contiguous()
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        place.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.num_hidden_layers, config.architectures = layers, ["FalconForCausalLM"]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    config.save_pretrained(str(folder))
    return size


def main(argv: list[str] | None = None) -> int:
    return write_folder(__doc__, 60, lambda *given: f"{write_weights(*given, **SHAPE) / 1e9:.1f} GB", argv)


if __name__ == "__main__":
    sys.exit(main())
