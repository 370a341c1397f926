"""Short stories from a small grammar of sentences, and a recogniser of that same grammar.

A sentence form is text with `[this|that]` choices, `<class>` word classes, and the hero's slots: `{h}` the hero ("the
fox"), `{p} {o} {s}` he/him/his. `write` draws a story; `is_grammatical` says whether a sentence is one of the forms,
with any words of the right class in its slots. The evaluation uses it on what the model writes.
"""

import random
import re
import zlib
from functools import cache

CLASSES = {
    "animal": (
        "fox|rabbit|bear|mouse|owl|hedgehog|cat|dog|frog|duck|squirrel|turtle|wolf|goat|horse|pig|bee|snail"
        "|otter|penguin|robot|girl|boy|king|queen|baker|farmer|sailor|painter|teacher|wizard|fisherman|dragon"
        "|princess|giant"
    ),
    "adj": (
        "little|small|brave|clever|kind|young|old|shy|happy|quiet|curious|lonely|friendly|gentle|proud|sleepy"
        "|hungry|poor|funny|wise"
    ),
    "place": "forest|village|garden|valley|castle|town|meadow|harbor|house|farm|field|cave|city|mill",
    "placeadj": "green|quiet|dark|small|old|deep|sunny|cold|wide|beautiful|strange|faraway|busy|hidden",
    "thing": (
        "golden key|red ball|silver ring|map|lantern|blue stone|drum|wooden boat|book|letter|basket|warm coat"
        "|bell|kite|box|flute|feather|apple|cake|clock|crown|seed"
    ),
    "loved": (
        "sing|dance|read|swim|climb trees|count the stars|tell stories|bake bread|look at the moon"
        "|collect stones|draw pictures|sleep in the sun|listen to the rain|walk in the woods|help others"
        "|play with the wind|watch the birds|ride on the river"
    ),
    "wish": (
        "see the sea|find a friend|learn to fly|visit the moon|build a boat|climb the mountain"
        "|find a treasure|make a garden|hear the song of the whale|become a great singer|cross the river"
        "|see the world|find the way home|learn to read"
    ),
    "time": (
        "one day|one morning|one evening|one night|early in the morning|late in the evening|after a while|the next day"
    ),
    "weather": (
        "the sun was shining|the rain was falling|the wind was blowing|the snow was falling"
        "|the stars were bright|it was very cold|it was a warm day|the moon was full|the fog was thick"
    ),
    "feeling": "happy|sad|tired|afraid|proud|surprised|angry|lonely|calm|excited|worried",
    "help": (
        "help a friend|cross the river|find the old map|learn to listen|share your bread|rest a little"
        "|wait until morning"
    ),
    "where": (
        "under a tree|beside the river|behind a stone|on top of a hill|in the tall grass|near the old bridge"
        "|at the end of the road|between two rocks|in front of a small house|inside a hollow tree"
    ),
    "adv": (
        "slowly|quickly|quietly|carefully|happily|bravely|gently|sadly|all day long|through the night"
        "|without a sound|for a long time"
    ),
}
OPENINGS = (
    "Once upon a time, there was a <adj> <animal> who lived in a <placeadj> <place>.",
    "Once upon a time, there was a <adj> <animal> who loved to <loved>.",
    "Once upon a time, there was a <adj> <animal> who wanted to <wish>.",
    "Once upon a time, a <adj> <animal> lived in a <placeadj> <place>.",
    "Long ago, in a <placeadj> <place>, there lived a <adj> <animal>.",
    "There once was a <adj> <animal> who lived in a <placeadj> <place> and loved to <loved>.",
    "In a <placeadj> <place> there lived a <adj> <animal> who wanted to <wish>.",
)
HABITS = (
    "Every day {h} would <loved> and <loved>.",
    "{H} had many friends, but {p} liked the <animal> best.",
    "More than anything else, {h} wanted to <wish>.",
    "{P} loved to <loved>, and {p} never [wanted|asked for|needed] anything else.",
    "The other animals said that {h} was too <adj> to <wish>.",
    "{P} lived alone, but {p} was never <feeling>.",
    "In the evening {p} liked to <loved>.",
    "{S} house was small, but it was [warm|clean|full of light|full of books].",
)
TURNS = (
    "<Time>, when <weather>, {h} found a <thing> <where>.",
    "<Time>, {h} lost {s} <thing> <where>.",
    "<Time>, {h} met a <adj> <animal> <where>.",
    "<Time>, {h} heard a strange [sound|song|voice] <where>.",
    "<Time>, a <adj> <animal> came to the <place> and asked for help.",
    "<Time>, {h} decided to <wish>.",
    "<Time>, {h} woke up and saw that <weather>.",
)
MIDDLES = (
    "{P} looked at the <thing> and felt very <feeling>.",
    "{H} was <feeling>, because <weather>.",
    "{P} walked <adv> until {p} came to a <placeadj> <place>.",
    '"Do not be <feeling>," said the <animal>, "I will help you."',
    '"Where are you going?" asked the <animal>.',
    '"I want to <wish>," said {h}.',
    '"Who are you?" asked {h}.',
    '"I have lost my <thing>," said the <animal> <adv>.',
    "The <animal> gave {o} a <thing> and showed {o} the way.",
    "Together they walked <adv> to the <placeadj> <place>.",
    "{H} did not know what to do, so {p} sat down <where> and [waited|thought|cried|listened].",
    "They looked [everywhere|in the <place>|<where>], but they could not find the <thing>.",
    "Although {p} was <feeling>, {p} [went on|did not stop|kept walking|tried again].",
    "The <animal> laughed and [ran away|nodded|told {o} a secret|shook {s} hand].",
    "{P} held the <thing> and [smiled|wept|sang|laughed].",
    "When {h} saw the <animal>, {p} was no longer <feeling>.",
    "The way was long, and <weather>.",
    "{P} shared {s} [bread|soup|cake|apple] with the <animal>, who was very <feeling>.",
    "Suddenly a <adj> <animal> jumped out and asked {o} for the <thing>.",
    "If you want to <wish>, you must first <help>.",
)
ENDINGS = (
    "In the end, {h} went home and told everyone about the <thing>.",
    "From that day on, {h} and the <animal> were best friends.",
    "And so {h} learned that [a good friend is worth more than gold|it is good to share|even a small step can lead far|"
    "kindness is stronger than fear|it is never too late to try].",
    "That night {h} slept well and dreamed of the <placeadj> <place>.",
    "{H} was happy at last, and {p} lived in the <place> for many years.",
    "They danced and sang until the sun came up.",
)
FORMS = OPENINGS + HABITS + TURNS + MIDDLES + ENDINGS
HE, SHE = ("he", "him", "his"), ("she", "her", "her")
FEMALE = {"girl", "queen", "princess", "bee", "owl", "cat", "duck", "teacher", "painter"}


def with_article(text: str) -> str:
    """Turns `a` into `an` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def expand(form: str, rng: random.Random, given: dict[str, str] | None = None) -> str:
    """One sentence of a form; `given` fixes the words of some classes."""
    form = re.sub(r"\[([^\]]*)\]", lambda m: rng.choice(m[1].split("|")), form)

    def word(m: re.Match) -> str:
        name = m[1].lower()
        drawn = (given or {}).get(name) or rng.choice(CLASSES[name].split("|"))
        return drawn[0].upper() + drawn[1:] if m[1][0].isupper() else drawn

    return with_article(re.sub(r"<(\w+)>", word, form))


def is_test(adjective: str, animal: str) -> bool:
    """Which heroes are held out."""
    return zlib.crc32(f"story:{adjective} {animal}".encode()) % 8 == 0


def hero(rng: random.Random, test: bool) -> tuple[str, str]:
    """A hero (adjective, animal) of the asked split."""
    while True:
        pair = rng.choice(CLASSES["adj"].split("|")), rng.choice(CLASSES["animal"].split("|"))
        if is_test(*pair) == test:
            return pair


def opening(rng: random.Random, test: bool = False) -> tuple[str, dict[str, str]]:
    """The first sentence of a story, and the hero's slots."""
    adjective, animal = hero(rng, test)
    he, him, his = SHE if animal in FEMALE else HE
    slots = {
        "h": f"the {animal}",
        "H": f"The {animal}",
        "p": he,
        "P": he.capitalize(),
        "o": him,
        "s": his,
        "S": his.capitalize(),
    }
    return expand(rng.choice(OPENINGS), rng, {"adj": adjective, "animal": animal}), slots


def write(rng: random.Random) -> str:
    """A whole story of the training split."""
    first, slots = opening(rng)
    forms = [*rng.sample(HABITS, rng.randint(0, 2)), rng.choice(TURNS), *rng.sample(MIDDLES, rng.randint(2, 5))]
    again = [rng.choice(TURNS), *rng.sample(MIDDLES, rng.randint(1, 3))] if rng.random() < 0.25 else []
    told = [first]
    given: dict[str, str] = {}  # one friend, one thing, one place in each part of the story
    for part in (forms, [*again, rng.choice(ENDINGS)]):
        drawn = {name: rng.choice(CLASSES[name].split("|")) for name in ("animal", "thing", "wish", "place")}
        while drawn["animal"] in slots["h"]:
            drawn["animal"] = rng.choice(CLASSES["animal"].split("|"))
        given = drawn if part is forms or again else given
        told += [expand(form.format_map(slots), rng, given) for form in part]
    cut = rng.randint(2, len(told) - 1)
    return " ".join(told) if rng.random() < 0.6 else " ".join(told[:cut]) + "\n\n" + " ".join(told[cut:])


@cache
def _patterns() -> re.Pattern:
    slots = {"h": "the <animal>", "H": "The <animal>", "p": "(?:he|she)", "P": "(?:He|She)", "o": "(?:him|her)"}
    slots |= {"s": "(?:his|her)", "S": "(?:His|Her)"}
    parts = []
    for form in FORMS:
        text = form.replace("?", r"\?").replace(".", r"\.").replace("[", "(?:").replace("]", ")")
        text = re.sub(r"\{(\w)\}", lambda m: slots[m[1]], text)
        text = re.sub(r"\b([Aa]) (?=<)", r"\1n? ", text)
        text = re.sub(r"<([A-Z]\w+)>", lambda m: "(?:" + _capitals(CLASSES[m[1].lower()]) + ")", text)
        parts.append(re.sub(r"<(\w+)>", lambda m: "(?:" + CLASSES[m[1]] + ")", text))
    return re.compile("|".join(f"(?:{part})" for part in parts))


def _capitals(words: str) -> str:
    return "|".join(w[0].upper() + w[1:] for w in words.split("|"))


def sentences(text: str) -> list[str]:
    """A text's sentences; a question in quotes goes on to its `asked ...`."""
    return [s for s in re.split(r"(?<=[.!?])\s+|(?<=[.]\")\s+", text.strip()) if s]


def is_grammatical(sentence: str) -> bool:
    """Whether the sentence is one of the grammar's forms, articles (a, an) right too."""
    return (
        bool(_patterns().fullmatch(sentence))
        and with_article(sentence) == sentence
        and not re.search(r"\b[Aa]n (?![aeiou])", sentence)
    )


if __name__ == "__main__":
    print(write(random.Random()))
