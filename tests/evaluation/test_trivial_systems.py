"""The systems that take no model answer as they say, and never from the references that they are scored on."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.dialogue import Turn
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import f1_score
from kestrel.evaluation.trivial_systems import TRIVIAL, best_constant, best_words, trivial_systems

WORDS = ["i", "am", "you", "like", "dogs", "cats", "the", "a", ".", "and", "fun"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)


def context(dialogue: int, turn: int, reference: str, **fields) -> Reply:
    persona = (f"persona {dialogue} one", f"persona {dialogue} two")
    history = (Turn("partner", "first"), Turn("self", "mine"), Turn("partner", f"asked {dialogue} {turn}"))
    whole = {"persona": persona, "history": history} | fields
    return Reply(f"d{dialogue}", turn, reference, "response of a model", 1, stopped_by="eos", **whole)


CONTEXTS = [context(d, t, f"i am word{d}x{t} you") for d in range(12) for t in (1, 3, 5)]


def mean_f1(response: str, references: list[str]) -> float:
    return sum(f1_score(response, reference) for reference in references) / len(references)


def test_each_answers_as_it_says():
    made, notes = trivial_systems(CONTEXTS, seed=0, search=["i am fine", "i am fine", "you too"])
    assert list(made) == list(TRIVIAL) and not notes
    for system, replies in ((name, system.replies) for name, system in made.items()):
        assert [(r.key, r.reference) for r in replies] == [(c.key, c.reference) for c in CONTEXTS], system
        assert all(r.stopped_by is None and r.response != "response of a model" for r in replies)
    references = {c.dialogue_id: [x.reference for x in CONTEXTS if x.dialogue_id == c.dialogue_id] for c in CONTEXTS}
    everything = {c.reference for c in CONTEXTS}
    for reply in made["copy_partner"].replies:
        assert reply.response == reply.history[-1].text
    for reply in made["random_persona"].replies:
        assert reply.response in reply.persona
    for reply in made["random_reply"].replies:
        assert reply.response in everything and reply.response not in references[reply.dialogue_id]
    assert {r.response for r in made["constant_reply"].replies} == {"i am fine"}
    assert len({r.response for r in made["constant_words"].replies}) == 1
    assert "'i am fine'" in made["constant_reply"].made_by


def test_seed_decides_the_draws():
    made = [trivial_systems(CONTEXTS, seed, ["a b"])[0] for seed in (1, 1, 2)]
    first, again, other = ({name: list(system.responses) for name, system in systems.items()} for systems in made)
    assert first == again
    assert first["random_reply"] != other["random_reply"] and first["random_persona"] != other["random_persona"]


def test_constants_have_not_seen_what_they_are_scored_on():
    """Without another split, every word of a constant comes from the other half of the dialogues."""
    contexts = [context(d, t, f"only{d} here{d}") for d in range(12) for t in (1, 3, 5)]
    made, _ = trivial_systems(contexts, seed=0, search=None)
    for system in ("constant_reply", "constant_words"):
        halves: dict[str, set[str]] = {}
        for reply in made[system].replies:
            halves.setdefault(reply.response, set()).add(reply.dialogue_id)
        assert sorted(len(ids) for ids in halves.values()) == [6, 6]
        for constant, ids in halves.items():
            seen = {word for c in contexts if c.dialogue_id in ids for word in c.reference.split()}
            assert constant and not seen & set(constant.split())


def test_what_cannot_be_made_is_told():
    bare = [context(0, t, "hello you", persona=None, history=None) for t in (1, 3)]
    made, notes = trivial_systems(bare, seed=0, search=None)
    assert made == {}
    assert [note.split()[0] for note in notes] == ["copy_partner", "random_persona", "random_reply", "constant_reply"]
    made, _ = trivial_systems([context(d, 0, "hello", history=()) for d in range(2)], seed=0, search=["x"])
    assert {reply.response for reply in made["copy_partner"].replies} == {""}  # an opening reply has nothing to copy


@given(st.lists(TEXTS, min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_constants_are_the_best_by_brute_force(references):
    best = best_constant(references)
    assert best in references
    assert mean_f1(best, references) >= max(mean_f1(text, references) for text in references) - 1e-12
    best = best_words(references)  # no further word helps
    score = mean_f1(best, references)
    assert score >= max(mean_f1(word, references) for word in WORDS) - 1e-12
    assert all(mean_f1(f"{best} {word}", references) <= score + 1e-12 for word in WORDS)
