"""Serves a merged model with llama.cpp and compares its greedy answers with transformers'.

    python publish.py --config configs/quickstart.yaml --merge merged
    python tools/try_llama_cpp.py merged runs/quickstart/generations/test.adapter.jsonl --llama-cpp ~/llama.cpp

Needs llama.cpp's source, for its converter, and the package xllamacpp, which runs llama.cpp's server. For models with
Falcon's tokenizer and the plain prompt.
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

_TOKENS = 32
# The converter recognizes tokenizers by how they split one text: Falcon's, but not the toy's, which works the same way.
_CONVERT = """
import runpy, sys
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "falcon"
sys.argv[0] = "convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def contexts(generations: Path, most: int) -> list[str]:
    """Prompts of a generations file, as text."""
    prompts = []
    for line in generations.read_text(encoding="utf-8").splitlines()[:most]:
        row = json.loads(line)
        turns = [f"{'Partner' if turn['speaker'] == 'partner' else 'You'}: {turn['text']}" for turn in row["history"]]
        prompts.append("\n".join([f"Persona: {' '.join(row['persona'])}", *turns, "You:"]))
    return prompts


def expected(folder: Path, texts: list[str]) -> list[str]:
    """Greedy answers of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        made = model.generate(torch.tensor([ids]), max_new_tokens=_TOKENS, do_sample=False)[0, len(ids) :]
        answers.append(tokenizer.decode(made, skip_special_tokens=True))
    return answers


def served(model: Path, texts: list[str]) -> list[str]:
    """Greedy answers of llama.cpp's server."""
    library: Any = importlib.import_module("xllamacpp")
    parameters = library.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(model), 2048, False
    server = library.Server(parameters)
    requests = [{"prompt": text, "n_predict": _TOKENS, "temperature": 0, "top_k": 1} for text in texts]
    return [server.handle_completions(request)["choices"][0]["text"] for request in requests]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path, help="folder that publish.py --merge wrote")
    parser.add_argument("generations", type=Path, help="a generations file, for its contexts")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER", help="llama.cpp's source")
    parser.add_argument("--contexts", type=int, default=50, help="how many to compare")
    options = parser.parse_args()
    texts = contexts(options.generations, options.contexts)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "model.gguf"
        given = [str(options.merged.resolve()), "--outfile", str(converted), "--outtype", "f32"]
        subprocess.run([sys.executable, "-c", _CONVERT, *given], cwd=options.llama_cpp, check=True)
        pairs = list(zip(expected(options.merged, texts), served(converted, texts), strict=True))
    for ours, theirs in pairs:
        if ours != theirs:
            print(f"transformers: {ours!r}\n   llama.cpp: {theirs!r}")
    same = sum(ours == theirs for ours, theirs in pairs)
    print(f"{same} of {len(pairs)} greedy answers of llama.cpp equal those of transformers")
    return 0 if same >= 0.9 * len(pairs) else 1  # rounding decides where two words are equally likely


if __name__ == "__main__":
    sys.exit(main())
