"""Scores of what the toolkit is for: whether replies are true to the persona, and whether the model reads it.

Statistics of replies, as in `metrics`. Each docstring names the paper. `metric_table` has an entry for each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import Answers, Rarity, Rows, f_measure
from kestrel.evaluation.resampling import Array
from kestrel.evaluation.units import ENGLISH, Units

_QUESTION_MARK = re.compile("[?？؟՞፧⁇⁈⳺⸮꘏꛷]")


def rarity_of(replies: Iterable[str], units: Units = ENGLISH) -> Rarity:
    """The weight of each word that occurs n times in the replies: 1 / (1 + ln(1 + n)).

    The weights of Song et al., "Exploiting Persona Information for Diverse Generation of Conversational Responses"
    (IJCAI 2019), who take n from a general frequency list.
    """
    counts = Counter(word for reply in replies for word in units.words(reply))
    return Rarity({word: 1 / (1 + math.log1p(count)) for word, count in counts.items()})


@lru_cache(maxsize=1 << 15)
def words_of(text: str, units: Units = ENGLISH) -> frozenset[str]:
    """The words that F1 compares, each once."""
    return frozenset(units.words(text))


@lru_cache(maxsize=1 << 15)
def sentences_of(persona: tuple[str, ...], units: Units = ENGLISH) -> tuple[frozenset[str], ...]:
    """The words of each sentence that has some."""
    return tuple(words for sentence in persona if (words := words_of(sentence, units)))


@lru_cache(maxsize=1 << 15)
def words_of_persona(persona: tuple[str, ...], units: Units = ENGLISH) -> frozenset[str]:
    return frozenset().union(*sentences_of(persona, units))


@lru_cache(maxsize=1)
def _weights(answers: Answers) -> list[tuple[float, float, float]]:
    """Of the words that each response shares with its persona, of the response's, and of the persona's, each word once."""
    units, rarity = answers.choices.units, answers.choices.rarity
    of_persona: dict[frozenset[str], float] = {}
    rows = []
    for reply in answers.replies:
        said, known = words_of(reply.response, units), words_of_persona(reply.persona or (), units)
        if known not in of_persona:
            of_persona[known] = rarity.total(known)
        rows.append((rarity.total(said & known), rarity.total(said), of_persona[known]))
    return rows


def persona_f1(answers: Answers) -> Rows:
    """F1 between the words of the response and of the persona, each once and weighted by `rarity_of`.

    After the knowledge F1 of Lian et al., "Learning to Select Knowledge for Response Generation in Dialog Systems"
    (IJCAI 2019), who leave stop words out instead of weighting. Replies whose persona has no words do not count.
    """
    return [(f_measure(*weights), 1) if weights[2] else (0, 0) for weights in _weights(answers)]


def persona_recall(answers: Answers) -> Rows:
    """The share of the persona's words, by weight, that the response has: the recall in `persona_f1`."""
    return [(shared / known, 1) if known else (0, 0) for shared, _, known in _weights(answers)]


def persona_coverage(answers: Answers) -> Rows:
    """Persona coverage of Song et al. (IJCAI 2019): the mean weight of the words that the response shares with a sentence
    of the persona, for the sentence where it is greatest; 0 without a shared word."""
    units, rarity = answers.choices.units, answers.choices.rarity
    rows: list[tuple[float, float]] = []
    for reply in answers.replies:
        said, sentences = words_of(reply.response, units), sentences_of(reply.persona or (), units)
        shares = [rarity.total(shared) / len(shared) for sentence in sentences if (shared := said & sentence)]
        rows.append((max(shares, default=0.0), 1) if sentences else (0, 0))
    return rows


_COMMON = 60  # words; in a small corpus a tenth of all


def common_words(rarity: Mapping[str, float]) -> frozenset[str]:
    """The most frequent words, which say nothing about a persona."""
    return frozenset(sorted(rarity, key=lambda word: (rarity[word], word))[: min(_COMMON, len(rarity) // 10)])


# -- likelihoods under other personas -----------------------------------------------------------------------------------


def persona_gain(answers: Answers) -> Rows:
    """Nats per token that the persona adds to the likelihood of the reference, over another dialogue's persona.

    The mean over the other personas that generate.py tried (`generation.other_personas`). 0 says that the model does not
    read its persona.
    """
    return [
        (sum(others) / len(others) - (reply.reference_nll or 0.0), reply.reference_tokens or 0) if others else (0, 0)
        for reply in answers.replies
        for others in [reply.other_persona_nll]
    ]


def swap_accuracy(answers: Answers) -> Rows:
    """Whether the reference is likelier under its own persona than under each of k others; a tie is a miss.

    Chance is 1 / (k + 1).
    """
    return [
        ((reply.reference_nll or 0.0) < min(others), 1) if others else (0, 0)
        for reply in answers.replies
        for others in [reply.other_persona_nll]
    ]


def swap_details(replies: Sequence[Reply], sums: Array) -> dict[str, Any]:
    """How many other personas there were (one number, or the fewest and the most), and for how many replies."""
    sizes = {len(reply.other_persona_nll) for reply in replies if reply.other_persona_nll}
    return {"others": [min(sizes), max(sizes)] if len(sizes) > 1 else sizes.pop(), "replies": int(sums[1])}


# -- consistency, by the labels of an NLI model -----------------------------------------------------------------------


def consistency(answers: Answers) -> Rows:
    """C.Score of Madotto et al., "Personalizing Dialogue Agents via Meta-Learning" (ACL 2019): for each reply, how many
    sentences of the persona it entails less how many it contradicts."""
    return [(sum(reply.nli), 1) if reply.nli is not None else (0, 0) for reply in answers.replies]


def contradiction(answers: Answers) -> Rows:
    """Whether the reply contradicts a sentence of the persona (Welleck et al., "Dialogue Natural Language Inference",
    ACL 2019)."""
    return [(-1 in reply.nli, 1) if reply.nli is not None else (0, 0) for reply in answers.replies]


# -- what the replies of a dialogue are like, from See et al. -----------------------------------------------------------


def self_repetition(answers: Answers) -> Rows:
    """The share of a response's bigrams that the system has used before in the dialogue ("external repetition" of See et
    al., "What makes a good conversation?", NAACL 2019). A dialogue's first response does not count."""
    used: dict[str, set[tuple[str, str]]] = {}
    rows: list[tuple[float, float]] = [(0, 0)] * len(answers.replies)
    for index in sorted(range(len(rows)), key=lambda index: answers.replies[index].turn):
        reply = answers.replies[index]
        words, before = answers.choices.units.words(reply.response), used.get(reply.dialogue_id)
        bigrams = list(pairwise(words))
        if before is not None:
            rows[index] = (sum(bigram in before for bigram in bigrams), len(bigrams))
        used[reply.dialogue_id] = (before or set()) | set(bigrams)
    return rows


def is_question(reply: Reply) -> bool:
    """Whether the response has a question mark, of any script (See et al., NAACL 2019, control how often)."""
    return bool(_QUESTION_MARK.search(reply.response))
