"""What the tests say about each system, in sentences that tell what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kestrel.evaluation.comparisons import advantage, is_significant
from kestrel.evaluation.metric_table import BY_NAME
from kestrel.evaluation.resampling import FEWEST
from kestrel.evaluation.systems import System

WORSE = "WORSE than"  # marks the sentences that are printed in red
_SURPRISE = BY_NAME["perplexity.bits_per_byte"]  # of all units of the likelihood, the one that is tested


def verdicts(systems: Mapping[str, System], paired: Sequence[Mapping[str, Any]], dialogues: int) -> list[str]:
    """One or more sentences for each system but the base: better than base, than what needs no model, and what next."""
    tuned = [name for name, system in systems.items() if system.kind == "system"]
    if dialogues < FEWEST:
        count = "One dialogue is" if dialogues == 1 else f"{dialogues} dialogues are"
        reason = f"with fewer than {FEWEST}, every difference can be chance. No intervals, tests or verdicts."
        return [f"{count} too few to tell systems apart: {reason}"]
    sentences = []
    for name in tuned:
        own = [test for test in paired if test["system"] == name]
        against_base = [test for test in own if systems[test["against"]].kind == "base"]
        if against_base:  # the base of the same run comes first
            base = against_base[0]["against"]
            against_base = [test for test in against_base if test["against"] == base]
            sentences += _against_base(systems[name], name, systems[base], base, against_base)
        for rival in (
            other for other in tuned if systems[other].group != systems[name].group
        ):  # not another seed of it
            sentences += _against(name, rival, [test for test in own if test["against"] == rival])
        trivial = [test for test in own if systems[test["against"]].kind == "trivial"]
        sentences += _against_trivial(name, trivial)
    return sentences


def _against(name: str, rival: str, tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which headline scores it is better, worse or neither."""
    tests = [test for test in tests if BY_NAME[test["metric"]].headline]
    won = [test for test in tests if is_significant(test) and advantage(test) > 0]
    lost = [test for test in tests if is_significant(test) and advantage(test) < 0]
    neither = [test for test in tests if test not in won and test not in lost]
    found = {"beats": won, f"is {WORSE}": lost, "does NOT beat": neither}
    return [f"{name} {verb} {rival} in {_describe(some)}." for verb, some in found.items() if some]


def _against_base(
    system: System, name: str, base: System, base_name: str, tests: Sequence[Mapping[str, Any]]
) -> list[str]:
    sentences = _against(name, base_name, tests)
    won = bool(sentences) and sentences[0].startswith(f"{name} beats")
    surprise = next((test for test in tests if test["metric"] == _SURPRISE.name), None)
    if surprise is not None:
        learned = is_significant(surprise) and advantage(surprise) > 0
        perplexity = f"perplexity {system.point['perplexity.token']:,.1f} against {base.point['perplexity.token']:,.1f}"
        perplexity += f", {_p(surprise)}"
        if is_significant(surprise) and not learned:
            sentences.append(
                f"{name} is {WORSE} {base_name} at predicting the references ({perplexity}): training did harm. Lower "
                "training.learning_rate, and look at the loss curve for the step at which it rose."
            )
        elif not learned and won:
            sentences.append(f"{name} predicts the references no better than {base_name} ({perplexity}).")
        elif not learned:
            sentences.append(
                f"{name} did not learn what {base_name} does not know ({perplexity}: not significant). Train longer "
                "(training.epochs) or with more dialogues, or raise training.learning_rate."
            )
        elif not won:
            sentences.append(
                f"{name} learned ({perplexity}), but its replies do not show it: decoding or length hides it. "
                f"{_how_it_replies(system)} Try generation.max_new_tokens, generation.num_beams, or "
                "generation.do_sample with another temperature."
            )
        else:
            sentences.append(f"{name} also predicts the references better than {base_name} ({perplexity}).")
    return sentences


def _how_it_replies(system: System) -> str:
    parts = [f"Its replies are {system.point['length_ratio']:.1f} times as long as the references"]
    if "stopped_by_eos" in system.point:
        parts.append(f"{system.point['stopped_by_eos']:.0%} end by themselves")
    return ", and ".join(parts) + "."


def _against_trivial(name: str, tests: Sequence[Mapping[str, Any]]) -> list[str]:
    sentences = []
    won = [test for test in tests if is_significant(test) and advantage(test) > 0]
    lost = [test for test in tests if test not in won]
    if won:
        sentences.append(f"{name} beats the best trivial system in {_describe(won, name_rival=True)}.")
    if lost:
        sentences.append(
            f"{name} does NOT beat the best trivial system in {_describe(lost, name_rival=True)}: a score that a reply "
            "without a model reaches says nothing about the model. Compare perplexity and hits@1, and read the dialogues."
        )
    return sentences


def _describe(tests: Sequence[Mapping[str, Any]], name_rival: bool = False) -> str:
    parts = []
    for test in tests:
        against = f" against {test['against']}" if name_rival else ""
        certainty = _p(test) + ("" if is_significant(test) else ": not significant")
        if name_rival and is_significant(test) and advantage(test) < 0:
            certainty += ": significantly worse"
        difference = f"{test['difference']:+.2f}".replace("-", "−")
        parts.append(f"{BY_NAME[test['metric']].label} ({difference}{against}, {certainty})")
    return ", ".join(parts)


def _p(test: Mapping[str, Any]) -> str:
    """The p-value adjusted for all tests of the report."""
    return "p < 0.001" if test["p_holm"] < 0.001 else f"p = {test['p_holm']:.3f}"
