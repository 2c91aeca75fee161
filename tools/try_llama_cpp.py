"""Serves a model with llama.cpp and compares its greedy answers with transformers': a merged one, or base and adapter.

    python publish.py --config configs/quickstart.yaml --merge merged
    python tools/try_llama_cpp.py merged runs/quickstart/generations/test.adapter.jsonl --llama-cpp ../llama.cpp
    python tools/try_llama_cpp.py BASE runs/NAME/generations/test.adapter.jsonl --llama-cpp ../llama.cpp --adapter runs/NAME/adapter

Needs llama.cpp's source, for its converters, and the package xllamacpp, which runs llama.cpp's server. An adapter's file
is also read back with llama.cpp's own reader and compared with the weights that PEFT saved.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kestrel.dialogue import Dialogue, Turn
from kestrel.prompt.prompt import Prompt

_TOKENS = 32
# The converter recognizes tokenizers by how they split one text: Falcon's, but not the toy's, which works the same way.
_CONVERT = """
import runpy, sys
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
TextModel.get_vocab_base_pre = lambda self, *given: "falcon" if self.hf_arch.startswith("Falcon") else known(self, *given)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(llama_cpp: Path, program: str, *given: str) -> None:
    """Runs a converter of llama.cpp in float32."""
    subprocess.run([sys.executable, "-c", _CONVERT, program, *given, "--outtype", "f32"], cwd=llama_cpp, check=True)


def contexts(prompt: Prompt, generations: Path, most: int) -> list[str]:
    """Prompts of a generations file, as text."""
    found = []
    for line in generations.read_text(encoding="utf-8").splitlines()[:most]:
        row = json.loads(line)
        turns = [Turn(turn["speaker"], turn["text"]) for turn in row["history"]]
        dialogue = Dialogue(row["dialogue_id"], tuple(row["persona"]), (*turns, Turn("self", "ok")))
        found.append("".join(segment.text for segment in prompt.segments(dialogue)[:-2]))
    return found


def expected(folder: Path, adapter: Path | None, tokenizer: Any, texts: list[str]) -> list[str]:
    """Greedy answers of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    answers = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=_TOKENS, do_sample=False)[0, len(ids) :]
        answers.append(tokenizer.decode(made, skip_special_tokens=True))
    return answers


def served(model: Path, adapter: Path | None, texts: list[str]) -> list[str]:
    """Greedy answers of llama.cpp's server, with as many threads as torch has."""
    import torch

    library: Any = importlib.import_module("xllamacpp")
    parameters = library.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(model), 2048, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    if adapter is not None:
        given = library.CommonAdapterLoraInfo()
        given.path, given.scale = str(adapter), 1.0
        parameters.lora_adapters = [given]
    server = library.Server(parameters)
    requests = [{"prompt": text, "n_predict": _TOKENS, "temperature": 0, "top_k": 1} for text in texts]
    return [server.handle_completions(request)["choices"][0]["text"] for request in requests]


def check_adapter(llama_cpp: Path, converted: Path, adapter: Path) -> str:
    """Compares the converted adapter, as llama.cpp's reader finds it, with PEFT's. Rows may be in another order: llama.cpp
    keeps queries and keys of a Llama so."""
    from safetensors.numpy import load_file

    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    library: Any = importlib.import_module("gguf")
    reader = library.GGUFReader(converted)
    facts = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert facts == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": config["lora_alpha"]}, (
        facts
    )
    saved = load_file(adapter / "adapter_model.safetensors")
    assert len(saved) == len(reader.tensors), f"{len(reader.tensors)} tensors, and PEFT saved {len(saved)}"

    def known(tensors: Any) -> list[bytes]:
        return sorted(b"".join(sorted(row.tobytes() for row in np.asarray(tensor, np.float32))) for tensor in tensors)

    assert known(saved.values()) == known(tensor.data for tensor in reader.tensors), "other weights than PEFT's"
    return f"{len(saved)} tensors of the adapter are PEFT's, alpha {facts['adapter.lora.alpha']:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that publish.py --merge wrote, or with --adapter the base")
    parser.add_argument("generations", type=Path, help="a generations file, for its contexts")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER", help="llama.cpp's source")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="an adapter to serve on the base, not merged")
    parser.add_argument("--contexts", type=int, default=50, help="how many to compare")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.adapter or options.model)
    prompt = Prompt(tokenizer, "chat" if tokenizer.chat_template else "plain", 2**20)
    texts = contexts(prompt, options.generations, options.contexts)
    model, source = str(options.model.resolve()), options.llama_cpp.resolve()
    with tempfile.TemporaryDirectory() as folder:
        converted, adapter = Path(folder) / "model.gguf", Path(folder) / "adapter.gguf" if options.adapter else None
        convert(source, "convert_hf_to_gguf.py", model, "--outfile", str(converted))
        if adapter is not None:
            given = [str(options.adapter.resolve()), "--base", model, "--outfile", str(adapter)]
            convert(source, "convert_lora_to_gguf.py", *given)
            print(check_adapter(source, adapter, options.adapter))
        answers = expected(options.model, options.adapter, tokenizer, texts)
        pairs = list(zip(answers, served(converted, adapter, texts), strict=True))
    for ours, theirs in pairs:
        if ours != theirs:
            print(f"transformers: {ours!r}\n   llama.cpp: {theirs!r}")
    same = sum(ours == theirs for ours, theirs in pairs)
    print(f"{same} of {len(pairs)} greedy answers of llama.cpp equal those of transformers")
    return 0 if same >= 0.9 * len(pairs) else 1  # rounding decides where two words are equally likely


if __name__ == "__main__":
    sys.exit(main())
