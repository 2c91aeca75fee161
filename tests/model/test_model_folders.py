"""Model folders as people bring them: what is wrong is named before training. docs/faq.md names the public reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_tokenizers as make
import pytest
import torch
from make_models import settings_of, write_base
from safetensors.torch import load_file, save_file
from tokenizers import processors

from kestrel.adapter.source import find_adapter
from kestrel.config.settings import Prompt as PromptSettings
from kestrel.config.settings import Quantization
from kestrel.errors import KestrelError
from kestrel.model.base import load_base, note_on_untrained_end, open_base
from kestrel.prompt.load import load_prompt
from kestrel.prompt.prompt import Prompt

IN_16_BIT = Quantization(bits=16, compute_dtype="float32")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9976578928\n"
CHAT = PromptSettings(format="chat")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", "llama", make.byte_level())


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def weights(folder: Path, changed: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(changed(load_file(path)), path, metadata={"format": "pt"})


def as_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda f: weights(f, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}),
                "lack 1 of the model's weights, such as lm_head.weight"),
    "a prefix": (lambda f: weights(f, lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}),
                 "they hold _orig_mod.lm_head.weight, which no llama model has"),
    "parts of ZeRO-3": (lambda f: weights(f, lambda t: {k: torch.empty(0) if "mlp" in k else v for k, v in t.items()}),
                        "is empty, as when one process of several"),
    "another vocabulary": (lambda f: change(f / "config.json", vocab_size=900), "asks for \\[900, 64\\]"),
    "a pointer": (lambda f: (f / "generation_config.json").write_text(POINTER), "is a Git LFS pointer.* git lfs pull"),
    "pickles": (as_pickle, "no weights in safetensors, but pytorch_model.bin, a pickle"),
    "GGUF": (as_gguf, "but model-q4.gguf, a form for inference"),
    "a lost index": (as_shards, "and no model.safetensors.index.json"),
    "half a file": (cut_off, "is damaged or cut off"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no tokenizer": (without_tokenizer, "holds no tokenizer .* copy its files"),
    "a damaged tokenizer": (lambda f: rewrite(f / "tokenizer.json", '"special"', '"speciah"'), "cannot load the tokenizer"),
    "SentencePiece's file alone": (sentencepiece_only, "pip install sentencepiece"),
    "an encoder": (lambda f: change(f / "config.json", architectures=["LlamaForMaskedLM"]), "from left to right"),
    "encoder and decoder": (lambda f: change(f / "config.json", is_encoder_decoder=True), "from left to right"),
    "a model of embeddings": (lambda f: change(f / "config.json", is_causal=False), "each token sees the later ones"),
    "images": (lambda f: change(f / "config.json", vision_config={"a": 1}), "with vision, .* docs/faq.md"),
    "code": (lambda f: change(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
             "set model.trust_remote_code: true"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_a_folder_that_is_no_whole_language_model_is_refused(base: Path, how: str) -> None:
    spoil, message = SPOILT[how]
    spoil(base)
    settings = settings_of(base, quantization=IN_16_BIT)
    with pytest.raises(KestrelError, match=message) as refused:
        load_base(open_base(settings, load_prompt(settings))[0])
    assert "\n" not in str(refused.value)


def test_weights_without_a_place_are_named_and_left_out(base: Path, capsys) -> None:
    weights(base, lambda t: t | {"v_head.weight": torch.zeros(1, 64)})
    load_base(settings_of(base, quantization=IN_16_BIT))
    assert "1 weights in the files" in (said := capsys.readouterr().out) and "v_head.weight" in said


@pytest.mark.parametrize("row", ["zero", "another's"])
def test_an_end_that_the_base_was_never_trained_on_is_named(base: Path, row: str) -> None:
    settings = settings_of(base, quantization=IN_16_BIT, prompt=CHAT)
    prompt, (model, _) = load_prompt(settings), load_base(settings)
    assert note_on_untrained_end(model, prompt) is None
    head = model.get_output_embeddings().weight
    head[prompt.end_id] = 0 if row == "zero" else head[prompt.end_id - 1]
    assert "never trained on <|im_end|>" in str(note_on_untrained_end(model, prompt))


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizerFast"])
@pytest.mark.parametrize("kind", [make.byte_level, make.sentencepiece_like, make.falcon_like])
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(kind, named: str, tmp_path: Path) -> None:
    made = kind()
    made.save_pretrained(tmp_path)
    change(tmp_path / "tokenizer_config.json", tokenizer_class=named)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    prompt = load_prompt(settings_of(tmp_path))
    for text in ("hi there, i've 2 dogs\nYou: Zoë", "1234 books :-)"):
        assert (
            prompt.tokenizer(text, add_special_tokens=False)["input_ids"]
            == made(text, add_special_tokens=False)["input_ids"]
        )
    assert prompt.tokenizer.eos_token == made.eos_token


def test_of_several_chat_templates_the_default_is_used(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    several = {"default": make.CHATML, "tool_use": "{{ tools }}"}
    for chosen in ({**several}, {"rag": "", "tool_use": ""}):
        named = [{"name": name, "template": text} for name, text in chosen.items()]
        change(base / "tokenizer_config.json", chat_template=named)
        settings = settings_of(base, prompt=CHAT)
        if "default" in chosen:
            assert load_prompt(settings).end_id == make.byte_level().eos_token_id
        else:
            with pytest.raises(KestrelError, match="several chat templates .rag, tool_use. and no default"):
                load_prompt(settings)


def test_an_end_that_the_tokenizer_appends_is_no_beginning() -> None:
    made = make.byte_level(chat_template=None)
    made.bos_token = made.eos_token
    end = [(made.eos_token, made.eos_token_id)]
    made._tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {made.eos_token}", special_tokens=end)
    assert Prompt(made, "plain", 100).identity()["canary_ids"][0] != made.eos_token_id


def test_an_adapter_in_a_checkpoint_or_behind_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "adapter_config.json").write_text("{}")
    with pytest.raises(KestrelError, match="did you mean .*checkpoint-500"):
        find_adapter(str(tmp_path))
    (tmp_path / "checkpoint-500" / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(KestrelError, match="is a Git LFS pointer"):
        find_adapter(str(tmp_path / "checkpoint-500"))
