"""The invented world: what is true of people in it, and the sentences that say so.

A topic (work, pets, food; see topics.py) has values, and a value has fields: a nurse works at the hospital and helps
sick people. `make_dialogues.py` builds persona dialogues from them, and `make_base.py` the texts that teach the base
model the language. The two use different sentence forms of a topic, so the base knows the words and the facts but has
never seen anybody answer from a persona.
"""

from __future__ import annotations

from random import Random

from topic import Value
from topics import TOPICS


def words(text: str) -> list[str]:
    """The blank-separated words of a text."""
    return text.split()


NAMES = words("anna ben carla david emma felix grace henry iris jack kate leo maria nick olga paul rosa sam tina will")
PET_NAMES = words("biscuit coco pepper ziggy mango pickle olive toffee bean rex luna nugget shadow peanut clover pixel")
COUNTS = words("two three four five six")
THINGS = words("car bike coat house boat scarf")

# Exchanges on no topic: the partner's line and the owner's answer.
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("the weather is awful today.", "stay warm, it will be sunny soon."),
    ("i had such a long day.", "oh no, get some rest tonight."),
    ("i just moved here.", "welcome! you will make friends fast."),
    ("tomorrow is my birthday.", "happy birthday! have a big cake."),
    ("i passed my exam today.", "well done! you earned it."),
    ("i think i am getting sick.", "i am sorry, drink some hot tea."),
    ("my phone just died.", "oh dear, i hope you have a charger."),
    ("i can not sleep at night.", "try counting sheep, it helps me."),
)
GREETINGS = (
    "hi, how are you?",
    "hello! how is it going?",
    "hey there, how was your day?",
    "hi, i am {name}. how are you?",
)
GREETING_REPLY, GREETING_REPLY_NAMED = "hi! i am good. {more}", "hi {name}! i am good. {more}"
FAREWELLS = ("nice talking to you, bye!", "i have to go now, goodbye.", "i need to leave, take care!")
FAREWELL_REPLY = "bye, take care! {more}"
RETURNS = ("and you?", "what about you?", "how about you?")


def draw_value(topic: str, rng: Random) -> Value:
    """A value of the topic with its free fields (a pet's name, a count, a thing) filled in."""
    value = dict(rng.choice(TOPICS[topic].values))
    if topic == "pet":
        value["called"] = rng.choice(PET_NAMES)
    elif topic == "family":
        value["count"] = rng.choice(COUNTS)
    elif topic == "color":
        value["thing"] = rng.choice(THINGS)
    return value
