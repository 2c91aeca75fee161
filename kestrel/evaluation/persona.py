"""Scores of what the toolkit is for: whether replies are true to the persona, and whether the model reads it.

Statistics of replies, as in `metrics`. Each docstring names the paper. `metric_table` has an entry for each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import Answers, Choices, Rows, f_measure
from kestrel.evaluation.resampling import Array
from kestrel.evaluation.units import ENGLISH, Units

_QUESTION_MARK = re.compile("[?？؟՞፧⁇⁈⳺⸮꘏꛷]")


def rarity_of(replies: Iterable[str], units: Units = ENGLISH) -> dict[str, float]:
    """The weight of each word that occurs n times in the replies: 1 / (1 + ln(1 + n)).

    The weights of Song et al., "Exploiting Persona Information for Diverse Generation of Conversational Responses"
    (IJCAI 2019), who take n from a general frequency list.
    """
    counts = Counter(word for reply in replies for word in units.words(reply))
    return {word: 1 / (1 + math.log1p(count)) for word, count in counts.items()}


@lru_cache(maxsize=1 << 18)
def words_of(text: str, units: Units = ENGLISH) -> frozenset[str]:
    """The words that F1 compares, each once."""
    return frozenset(units.words(text))


@lru_cache(maxsize=1 << 16)
def sentences_of(persona: tuple[str, ...], units: Units = ENGLISH) -> tuple[frozenset[str], ...]:
    """The words of each sentence that has some."""
    return tuple(words for sentence in persona if (words := words_of(sentence, units)))


@lru_cache(maxsize=1 << 16)
def words_of_persona(persona: tuple[str, ...], units: Units = ENGLISH) -> frozenset[str]:
    return frozenset().union(*sentences_of(persona, units))


def _weight(words: Iterable[str], rarity: Mapping[str, float]) -> float:
    return math.fsum(rarity.get(word, 1.0) for word in words)


def _of_persona(score: Callable[[Reply, tuple[str, ...], Choices], float]) -> Callable[[Answers], Rows]:
    """Statistics of a mean over the replies whose persona has words."""
    return lambda answers: [
        (score(reply, reply.persona, answers.choices), 1)
        if reply.persona and words_of_persona(reply.persona, answers.choices.units)
        else (0, 0)
        for reply in answers.replies
    ]


@_of_persona
def persona_f1(reply: Reply, persona: tuple[str, ...], choices: Choices) -> float:
    """F1 between the words of the response and of the persona, each once and weighted by `rarity_of`.

    After the knowledge F1 of Lian et al., "Learning to Select Knowledge for Response Generation in Dialog Systems"
    (IJCAI 2019), who leave stop words out instead of weighting.
    """
    said, known = words_of(reply.response, choices.units), words_of_persona(persona, choices.units)
    return f_measure(
        _weight(said & known, choices.rarity), _weight(said, choices.rarity), _weight(known, choices.rarity)
    )


@_of_persona
def persona_recall(reply: Reply, persona: tuple[str, ...], choices: Choices) -> float:
    """The share of the persona's words, by weight, that the response has: the recall in `persona_f1`."""
    known = words_of_persona(persona, choices.units)
    return _weight(words_of(reply.response, choices.units) & known, choices.rarity) / _weight(known, choices.rarity)


@_of_persona
def persona_coverage(reply: Reply, persona: tuple[str, ...], choices: Choices) -> float:
    """Persona coverage of Song et al. (IJCAI 2019): the mean weight of the words that the response shares with a sentence
    of the persona, for the sentence where it is greatest; 0 without a shared word."""
    said, sentences = words_of(reply.response, choices.units), sentences_of(persona, choices.units)
    return max(_weight(shared, choices.rarity) / len(shared) if (shared := said & s) else 0.0 for s in sentences)


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
