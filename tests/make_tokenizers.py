"""Small tokenizers of different kinds, trained in a moment, for tests of everything that renders dialogues."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Persona: i have two dogs. i like cars. my name is Zoë. i was born in 1987.",
    "\nPartner: hi ! how are you ?",
    "\nYou: great , and you ? i have 2 dogs and 1234 books .",
    "You are the following person. Answer as this person would.",
    "that is nice , i love dogs too ! what do you do for a living ?",
    "i'm a teacher . i've been one for 12 years , it's fun :-)",
    "<s> and </s> or <|endoftext|> are not what people say [SEP]",
]

SPARE_TOKENS = [
    f">>{name}<<"
    for name in (
        "TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER",
        "QUESTION", "DOMAIN", "PREFIX", "SUFFIX", "MIDDLE",
    )
]  # fmt: skip

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Llama 2: the system message stands within the first user message, a reply begins and ends with a blank.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WITHOUT_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Writes an empty thought before the last reply and takes it back when another message follows.
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
UNCLOSED = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML


def falcon_like(texts: Iterable[str] = TEXTS, vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Falcon's chain of pre-tokenizers; special ids 0-11, <|endoftext|> last; no bos, no pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, texts, [*SPARE_TOKENS, "<|endoftext|>"], vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=SPARE_TOKENS
    )


def byte_level(
    texts: Iterable[str] = TEXTS, chat_template: str | None = CHATML, vocabulary: int = 600
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2, with <|im_start|> and <|im_end|>, which is its eos, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _train_bpe(tokenizer, texts, specials, vocabulary)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=specials[:2],
    )
    made.chat_template = chat_template
    return made


def sentencepiece_like(
    texts: Iterable[str] = TEXTS,
    model: Literal["bpe", "unigram"] = "bpe",
    chat_template: str | None = None,
    vocabulary: int = 700,
) -> PreTrainedTokenizerFast:
    """Blanks as ▁ and one before each text, unknown characters as bytes, <s> before and </s> after: as Llama 2 has it."""
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = space
        # Bytes are vocabulary, not special: text may be made of them.
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[*specials, *bytes_], show_progress=False, initial_alphabet=["▁"]
        )
        tokenizer.train_from_iterator(texts, trainer)
        trained = Tokenizer.from_str(tokenizer.to_str())
        vocab = trained.get_vocab()
        merges = [tuple(pair) for pair in _model_of(trained)["merges"]]
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = space
        tokenizer.train_from_iterator(
            texts,
            trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False),
        )
        pieces = [(piece, score) for piece, score in _model_of(tokenizer)["vocab"]]
        known = {piece for piece, _ in pieces}
        pieces += [(byte, -20.0) for byte in bytes_ if byte not in known]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


def unigram(texts: Iterable[str] = TEXTS) -> PreTrainedTokenizerFast:
    """Unigram after NFKC, with an unknown token and its special tokens in the vocabulary, as T5 and XLNet have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<pad>", "<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def wordpiece(texts: Iterable[str] = TEXTS) -> PreTrainedTokenizerFast:
    """WordPiece in the manner of BERT: lower case, no accents, [CLS] before and [SEP], its eos, after."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", eos_token="[SEP]"
    )


def _train_bpe(tokenizer: Tokenizer, texts: Iterable[str], specials: list[str], vocabulary: int) -> None:
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )


def _model_of(tokenizer: Tokenizer) -> dict[str, list]:
    import json

    return json.loads(tokenizer.to_str())["model"]
