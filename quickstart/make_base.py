"""Make the toy base model: a small Falcon and its tokenizer, pretrained from a seed on texts about the invented world.

    python quickstart/make_base.py
    python quickstart/make_base.py --steps 2 --output /tmp/base

The texts are portraits (facts about a person, then the same facts in other words), diaries, phrase books and mixed
lines. They teach the words, the facts of the world, and how to find something said earlier in the text. None shows
anybody answering from a persona, and no reply in them ends with <|endoftext|>: fine-tuning teaches both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from topics import TOPICS
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast
from world import (
    FAREWELL_REPLY,
    FAREWELLS,
    GREETING_REPLY_NAMED,
    GREETINGS,
    NAMES,
    RETURNS,
    SMALL_TALK,
    draw_value,
    words,
)

# In the order of Falcon-7B's ids 0-10; <|endoftext|> is 11.
SPARE_TOKENS = [
    f">>{name}<<"
    for name in words("TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN PREFIX SUFFIX MIDDLE")
]
END = "<|endoftext|>"
VOCABULARY, HIDDEN, LAYERS, HEADS = 1536, 128, 4, 4
ROW, BATCH, STEPS, WARMUP = 192, 12, 1250, 60
LEARNING_RATE, MUON_RATE, MOMENTUM, DECAY = 4e-3, 0.02, 0.95, 0.05


def portrait(rng: Random) -> str:
    """Facts about one or two people, then the same facts in other words and another order."""
    facts, restated = [], []
    for name in rng.sample(NAMES, rng.choice((1, 1, 2))):
        for topic in rng.sample(sorted(TOPICS), rng.randint(2, 4)):
            forms, value = TOPICS[topic], draw_value(topic, rng)
            facts.append(rng.choice(forms.portrait).format(name=name, **value))
            chosen = rng.sample(forms.restated, rng.randint(2, 3))
            restated += [f"{forms.word}: {text.format(name=name, **value)}" for text in chosen]
    rng.shuffle(facts)
    rng.shuffle(restated)
    return "- " + " ".join(facts) + "\n- " + rng.choice((" ", "\n- ")).join(restated)


def diary(rng: Random) -> str:
    """What people say about themselves, then their days."""
    facts, days = [], []
    for topic in rng.sample(sorted(TOPICS), rng.randint(3, 5)):
        forms, value = TOPICS[topic], draw_value(topic, rng)
        facts.append(rng.choice(forms.facts).format(**value))
        chosen = rng.sample(forms.diary, rng.randint(2, 3))
        days += [f"{forms.word}: {text.format(**value)}" for text in chosen]
    rng.shuffle(days)
    return "- " + " ".join(facts) + "\n- " + rng.choice((" ", "\n- ")).join(days)


def line_about(topic: str, rng: Random) -> str:
    """A question or a remark on a topic, about nobody in particular."""
    forms, value = TOPICS[topic], draw_value(topic, rng)
    theirs = {f"their_{field}": text for field, text in draw_value(topic, rng).items()}
    questions = [forms.follow[0], forms.tell[0], *(question for asked, _ in forms.asks for question in asked)]
    answers = [forms.follow[1], forms.tell[1], forms.none, *(answer for _, answer in forms.asks), *forms.facts]
    return rng.choice(rng.choice((questions, answers))).format(**value, **theirs)


def phrase_book(rng: Random) -> str:
    """Lines grouped by topic."""
    parts = []
    for topic in rng.sample(sorted(TOPICS), 3):
        lines = " ".join(line_about(topic, rng) for _ in range(rng.randint(3, 5)))
        parts.append(f"- {TOPICS[topic].word}: {lines}")
    return "\n".join(parts)


def mixed_lines(rng: Random) -> str:
    """Lines in random order; some have a label, drawn at random."""
    lines = []
    for _ in range(rng.randint(8, 14)):
        topic = rng.choice(sorted(TOPICS))
        forms, value = TOPICS[topic], draw_value(topic, rng)
        small_talk = rng.choice((*rng.choice(SMALL_TALK), *GREETINGS, *FAREWELLS, *RETURNS))
        greeting = rng.choice(
            (GREETING_REPLY_NAMED.format(name="{name}", more=forms.greet), FAREWELL_REPLY.format(more=forms.bye))
        )
        line = rng.choice((line_about(topic, rng), line_about(topic, rng), small_talk, greeting))
        label = rng.choice(("- ", "- ", "Persona: ", "Partner: ", "You: "))
        lines.append(label + line.format(name=rng.choice(NAMES), **value))
    return "\n".join(lines)


def documents(seed: int) -> Iterator[str]:
    """An endless stream of texts."""
    rng = Random(seed)
    kinds = (portrait, portrait, diary, diary, diary, phrase_book, mixed_lines, mixed_lines)
    while True:
        yield rng.choice(kinds)(rng)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Falcon's pre-tokenizers and special tokens; it has no pad and no bos token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPARE_TOKENS, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = documents(seed)
    tokenizer.train_from_iterator((next(texts) for _ in range(4000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        additional_special_tokens=SPARE_TOKENS,
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> FalconForCausalLM:
    """A Falcon with Falcon-7B's flags and random float32 weights."""
    torch.manual_seed(seed)
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            new_decoder_architecture=False,
            multi_query=True,
            parallel_attn=True,
            bias=False,
            alibi=False,
            tie_word_embeddings=True,
            bos_token_id=11,
            eos_token_id=11,
            max_position_embeddings=2048,
        )
    )


def rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Batches (BATCH, ROW) of token ids: texts one after the other, each followed by <|endoftext|>."""
    stream: list[int] = []
    for text in documents(seed):
        stream += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        if len(stream) >= BATCH * ROW:
            yield torch.tensor(stream[: BATCH * ROW]).view(BATCH, ROW)
            stream = stream[BATCH * ROW :]


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Approximates the nearest semi-orthogonal matrix: Muon's Newton-Schulz iteration (Jordan et al., 2024), in float32.

    torch.optim.Muon uses bfloat16, for which many CPUs have no instructions.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


def pretrain(model: FalconForCausalLM, batches: Iterator[torch.Tensor], steps: int) -> None:
    """Next-token prediction; Muon for the linear layers, AdamW for the rest, linear warm-up and decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embeddings" in name]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    optimizer = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(step / WARMUP, (steps - step + 1) / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
        optimizer.step()
        with torch.no_grad():
            for matrix, momentum in zip(matrices, momenta, strict=True):
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalized(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.mul_(1 - MUON_RATE * scale * DECAY)
                matrix.sub_(update, alpha=MUON_RATE * scale * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
        model.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.3f} after {time.monotonic() - started:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # the number of threads changes how sums are rounded, and so the weights
    tokenizer = make_tokenizer(options.seed)
    model = make_model(options.seed)
    pretrain(model, rows(tokenizer, options.seed + 1), options.steps)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {options.output}")


if __name__ == "__main__":
    main()
