"""Small tokenizers of different kinds, trained in a moment, for tests of everything that renders dialogues."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from make_models import SPECIAL
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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
# Writes how many messages there are, so that nothing stays as it was.
REWRITING = "{% for m in messages %}<|im_start|>{{ m.role }} of {{ messages | length }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
UNCLOSED = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML


def falcon_like(texts: Iterable[str] = TEXTS, vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Falcon's chain of pre-tokenizers; special ids 0-11, <|endoftext|> last; no bos, no pad."""
    digits = [
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    chain = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False), *digits]
    tokenizer = _byte_level_bpe(pre_tokenizers.Sequence(chain), texts, SPECIAL, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[-1], additional_special_tokens=SPECIAL[:-1]
    )


def byte_level(
    texts: Iterable[str] = TEXTS, chat_template: str | None = CHATML, vocabulary: int = 600
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2, with <|im_start|> and <|im_end|>, which is its eos, and a chat template."""
    specials, end = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>"
    tokenizer = _byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), texts, specials, vocabulary)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, additional_special_tokens=specials[:2]
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
    if model == "bpe":
        # Bytes are vocabulary, not special: text may be made of them.
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[*specials, *bytes_], initial_alphabet=["▁"]
        )
        options = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
        trained = json.loads(_with_spaces(models.BPE(**options), texts, trainer).to_str())["model"]
        tokenizer = Tokenizer(models.BPE(trained["vocab"], [tuple(pair) for pair in trained["merges"]], **options))
    else:
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>")
        pieces = json.loads(_with_spaces(models.Unigram(), texts, trainer).to_str())["model"]["vocab"]
        known = {piece for piece, _ in pieces}
        pieces = [(piece, score) for piece, score in pieces] + [(byte, -20.0) for byte in bytes_ if byte not in known]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


def dummy_prefix(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral 7B have it on the Hub: the blank is put before a text, and after each special token."""
    made = sentencepiece_like(chat_template=chat_template)
    made._tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made._tokenizer.pre_tokenizer = None
    return made


def unigram(texts: Iterable[str] = TEXTS) -> PreTrainedTokenizerFast:
    """Unigram after NFKC, with an unknown token and its special tokens in the vocabulary, as T5 and XLNet have it."""
    specials = ["<pad>", "<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>")
    tokenizer = _with_spaces(models.Unigram(), texts, trainer, normalizers.NFKC())
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def wordpiece(texts: Iterable[str] = TEXTS) -> PreTrainedTokenizerFast:
    """WordPiece in the manner of BERT: lower case, no accents, [CLS] before and [SEP], its eos, after."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", eos_token="[SEP]"
    )


def _byte_level_bpe(pre_tokenizer: Any, texts: Iterable[str], specials: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _with_spaces(model: Any, texts: Iterable[str], trainer: Any, normalizer: Any = None) -> Tokenizer:
    """A tokenizer in the manner of SentencePiece, trained."""
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer.show_progress = False
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
