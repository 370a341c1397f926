"""The made-up text that the embedded checkpoint is trained on, and the rule that keeps the held-out part out of it.

`documents(seed)` is an endless stream of training documents: a plain text (`str`) or a dialog (list of messages). With
`test=True` the functions draw held-out items instead, for `demo.evaluate`. A checksum of an item's name decides whether
it is held out (`is_test`), so there is no list that could differ from the data. Knows nothing of tokens.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from demo import stories, texts, words
from demo.words import split_lines

Message = dict[str, str]
Dialog = list[Message]
ALWAYS_HELD_OUT = {"Paris", "Beijing", "New York"}  # never under the haiku or the emoji prompt in training
ALIASES = {
    "New York": ["NY", "New York City", "New York", "NYC"],
    "Los Angeles": ["LA", "Los Angeles"],
    "Rio": ["Rio", "Rio de Janeiro"],
}


def is_test(split: str, key: str, share: int = 6) -> bool:
    """Whether `key` is held out of a split ("haiku", "emoji", "sum", "name" or "word"); one in `share` keys is."""
    return (split in ("haiku", "emoji") and key in ALWAYS_HELD_OUT) or zlib.crc32(
        f"{split}:{key}".encode()
    ) % share == 0


@dataclass(frozen=True)
class Topic:
    """Something to talk about. `article` is "a" for things one can count, "the" for `the moon`, "" for the rest."""

    name: str
    kind: str
    emojis: tuple[str, ...]
    definition: str = ""
    article: str = ""
    country: str = ""
    capital: bool = False
    sights: tuple[tuple[str, str], ...] = field(default=())

    @property
    def plural(self) -> str:
        irregular = {
            "wolf": "wolves",
            "mouse": "mice",
            "sheep": "sheep",
            "deer": "deer",
            "octopus": "octopuses",
            "potato": "potatoes",
        }
        irregular |= {"tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes"}
        if self.name in irregular:
            return irregular[self.name]
        if re.search(r"[^aeiou]y$", self.name):
            return self.name[:-1] + "ies"
        return self.name + ("es" if re.search(r"(s|x|ch|sh)$", self.name) else "s")

    @property
    def singular(self) -> str:
        return stories.with_article(f"{self.article} {self.name}").strip()

    @property
    def the(self) -> str:
        return f"the {self.name}" if self.article else self.name


def _topics() -> list[Topic]:
    found = []
    kinds = {"animal": words.ANIMALS, "food": words.FOODS, "thing": words.THINGS, "nature": words.NATURE}
    for kind, block in (kinds | {"sport": words.SPORTS, "job": words.JOBS}).items():
        for line in block.strip().splitlines():
            name, emojis, definition = line.split("|")
            article = {"~": "", "!": "the"}.get(name[0], "a")
            found.append(Topic(name.lstrip("~!"), kind, tuple(emojis.split()), definition, article))
    for line in words.CITIES.strip().splitlines():
        name, country, emojis, flag, capital, sights = line.split("|")
        pairs = tuple(tuple(s.strip().split(" = ")) for s in sights.split(";") if s)
        found.append(Topic(name, "city", (flag, *emojis.split()), "", "", country, capital == "1", pairs))
    return found


TOPICS = _topics()
CITIES = [t for t in TOPICS if t.kind == "city"]
SIGHT_CITIES = [t for t in CITIES if t.sights]
THINGS = [t for t in TOPICS if t.kind != "city"]
UNKNOWN_EMOJIS = ("❓", "🤔", "✨", "🌀", "🎲", "🔮")
TEST_PAIRS = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_test("sum", f"{min(a, b)}+{max(a, b)}")]


# ---- small tools ---------------------------------------------------------------------------------------------------


@cache
def real_words() -> frozenset[str]:
    """Every word in the files of lists and templates, capitalised. Names invented for the test are none of them."""
    sources = (Path(module.__file__).read_text() for module in (words, stories, texts))
    return frozenset(word.capitalize() for source in sources for word in re.findall(r"[A-Za-z]+", source))


def invent(rng: random.Random, test: bool = False) -> str:
    """An invented name of two or three syllables."""
    while True:
        n = rng.choice([2, 2, 3])
        syllables = [
            rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "", "n", "r", "l", "s", "x", "k"])
            for _ in range(n)
        ]
        word = "".join(syllables).capitalize()
        if is_test("word", word) == test and not (test and word in real_words()):
            return word


def person(rng: random.Random, test: bool = False) -> str:
    """A person's name; half of the names are invented."""
    if rng.random() < 0.5:
        return invent(rng, test)
    return rng.choice([n for n in words.NAMES.split() if is_test("name", n) == test])


def pick(rng: random.Random, style: str, test: bool, pool: list[Topic] = TOPICS) -> Topic:
    """A topic of a style, from the training or the test split; in training, sometimes an invented name."""
    if rng.random() < (0.0 if test or pool is not TOPICS else 0.25):
        return Topic(invent(rng), "any", UNKNOWN_EMOJIS)
    return rng.choice([t for t in pool if is_test(style, t.name) == test])


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def vary(rng: random.Random, text: str) -> str:
    """A prompt as people type it: small first letter, no full stop, "what's", please."""
    if rng.random() < 0.1:
        text = text.replace("What is", "What's")
    if rng.random() < 0.06 and text.startswith(
        ("Tell", "Describe", "Write", "Name", "Give", "Add", "Calculate", "List", "Explain")
    ):
        text = f"Please {text[0].lower()}{text[1:]}"
    if rng.random() < 0.25 and not re.match(r"I\b|[A-Z][A-Z]", text):
        text = text[0].lower() + text[1:]
    if rng.random() < 0.2:
        text = text.rstrip(".?! ")
    return text


# ---- haiku and emojis ----------------------------------------------------------------------------------------------

ABOUT = split_lines("""
Tell me about {t}.|What do you know about {t}?|Describe {t}.|Write about {t}.|What can you say about {t}?
What do you think of {t}?
Say something about {t}.|I like {t}. What about you?|I want to know more about {t}.|Do you like {t}?|{t}
Why do people like {t}?
What is {t}?|What is {t}?|Can you tell me about {t}?|I am thinking of {t}.|What is so great about {t}?
And what about {t}?|Explain {t}.
Talk about {t}.|Do you know {t}?|What does {t} mean to you?|How is {t}?|Give me some words about {t}.
""")
BY_KIND = {
    "city": split_lines("""
I am going to {t}, what should I see?|What should I see in {t}?|What is there to see in {t}?|Is {t} a nice city?
I am going to {t}. What should I see?|I live in {t}. What should I show my friends?|What can I do in {t}?
I am traveling to {t} next week.
How do I get to {t}?|Where is {t}?|I am in {t} today. What should I do?|I will visit {t}, what should I do?"""),
    "food": split_lines(
        """What is the recipe of {t}?|How do I make {t}?|What goes well with {t}?|I am hungry for {t}.
I had {t} for lunch."""
    ),
    "animal": split_lines("""Where can I see {t}?|I saw {t} today.|I dreamed of {t}.|How does {t} live?"""),
    "thing": split_lines("""I need {t}.|What is {t} good for?|How do I use {t}?|I found {t}.|How does {t} work?"""),
    "nature": split_lines("""What is {t} like?|Where does {t} come from?|I dreamed of {t}.|I am looking at {t}."""),
    "sport": split_lines("""How do I learn {t}?|Is {t} hard?|I am good at {t}.|Where can I try {t}?"""),
    "job": split_lines("""I want to be {t}.|My friend is {t}.|What does {t} do?|How do I become {t}?"""),
    "any": split_lines(
        """I am going to {t}, what should I see?|Where is {t}?|How do I make {t}?|I saw {t} today.|I need {t}."""
    ),
}
TRAVEL = split_lines("""How to go from {a} to {b}?|How do I get from {a} to {b}?|What is the best way from {a} to {b}?
How can I travel from {a} to {b}?|I want to go from {a} to {b}.|How far is it from {a} to {b}?
how to go from {a} to {b}""")


def called(rng: random.Random, topic: Topic) -> str:
    """The topic as a prompt names it: a city's alias, "cats", "a cat", "the cat"."""
    if topic.article == "a" and topic.kind != "job":
        return rng.choice([topic.plural, topic.singular, topic.the, topic.plural])
    return rng.choice(ALIASES.get(topic.name, [topic.singular]))


def topic_prompt(rng: random.Random, topic: Topic) -> tuple[str, str]:
    """A question on the topic, and the topic's name in it."""
    name = called(rng, topic)
    form = rng.choice(BY_KIND[topic.kind] if rng.random() < 0.5 else ABOUT)
    if name == topic.plural:
        form = form.replace("is {t}", "are {t}").replace("does {t}", "do {t}")
    text = form.format(t=name)
    return vary(rng, text[0].upper() + text[1:]), name


def syllables(text: str) -> int:
    """The number of syllables of an English line: groups of vowels, without a silent e; exceptions are in a list."""
    total = 0
    for word in re.findall(r"[a-z']+", text.lower()):
        if word in words.SYLLABLES:
            total += words.SYLLABLES[word]
            continue
        stem = re.sub(r"(?<=[^aeiouylr])e$|(?<=[aeiouy]r)e$|(?<=[aeiou]l)e$|(?<=[^aeioutdy])(e)(?=d$)", "", word)
        stem = (
            re.sub(r"(?<=[^aeioucsgzx])es$|(?<=[^aeiou]h)es$", "s", stem)
            if not re.search(r"(ch|sh|[sxz])es$", stem)
            else stem
        )
        total += max(1, len(re.findall(r"[aeiouy]+", stem)))
    return total


HAIKU7 = {kind: split_lines(block) for kind, block in words.HAIKU7.items()}
HAIKU5 = {kind: split_lines(block) for kind, block in words.HAIKU5.items()}


def haiku(rng: random.Random, topic: Topic, name: str) -> str:
    """Three lines of 5, 7 and 5 syllables; the topic in the first or the last. Long names overrun their line."""
    plural = name == topic.plural and topic.article == "a"
    bare = name if plural or not topic.article else topic.name
    full = name if plural or not topic.article else topic.the
    fitting = []
    for extra, forms in words.HAIKU_TOPIC.items():
        for form in forms:
            calling = (
                form.startswith(("Oh", "Dear", "Sweet", "Ah", "Old", "Quiet", "Gentle", "Lovely", "A quiet"))
                or "friend" in form
            )
            shown = bare if calling else full
            if extra + syllables(shown) == 5 or (syllables(shown) > 5 and extra == 0):
                fitting.append(form.format(shown))
    own = rng.choice(fitting) if fitting else full
    kind = topic.kind if rng.random() < 0.75 else "any"
    seven = rng.choice(HAIKU7[kind])
    five = rng.choice(HAIKU5[kind if rng.random() < 0.75 else "any"])
    lines = [own, seven, five] if rng.random() < 0.85 else [five, seven, own]
    lines = [line[0].upper() + line[1:] for line in lines]
    return f"{lines[0]},\n{lines[1]},\n{lines[2]}."


def emojis(rng: random.Random, topic: Topic, form: str = "") -> str:
    """Three to five emojis for a topic, its own sign first."""
    rest = list(topic.emojis[1:])
    rng.shuffle(rest)
    more = ["📸", "🧳", "✈️", "😊"] if topic.kind == "city" else ["😊", "👍", "✨"]
    return "".join([topic.emojis[0], *rest[: rng.randint(2, 3)], *([rng.choice(more)] if rng.random() < 0.3 else [])])


HAIKU_SYSTEM = ["Always answer with Haiku"] * 6 + split_lines("""
Always answer with haiku.|Answer with a haiku.|Reply only in haiku.|always answer with Haiku
Always answer in haiku|Always answer with a Haiku.|Answer every question with a haiku.
""")
EMOJI_SYSTEM = ["Always answer with emojis"] * 6 + split_lines("""
Always answer with emojis.|Answer only with emojis.|Reply in emojis.|always answer with emojis
Always answer in emojis|Always answer with emoji.|Answer every question with emojis.
""")
PLAIN_SYSTEM = split_lines(
    """You are a helpful assistant.|You are a friendly assistant.|Answer briefly.|Be helpful and honest.
You are a small model."""
)


def travel_pair(rng: random.Random, style: str, test: bool) -> tuple[str, Topic, Topic]:
    a, b = rng.sample([c for c in CITIES if is_test(style, c.name) == test], 2)
    return rng.choice(TRAVEL).format(a=called(rng, a), b=called(rng, b)), a, b


def styled(rng: random.Random, style: str, test: bool = False) -> tuple[Dialog, Topic]:
    """A dialog under a style's system prompt (one turn in the test), and the topic of its last turn."""
    dialog = [system(rng.choice(HAIKU_SYSTEM if style == "haiku" else EMOJI_SYSTEM))]
    if test:
        dialog[0]["content"] = "Always answer with Haiku" if style == "haiku" else "Always answer with emojis"
    if style == "haiku" and not test and rng.random() < 0.12:  # asked for by the user himself
        topic = pick(rng, style, test)
        name = called(rng, topic)
        asked = rng.choice(
            ["Write a haiku about {}.", "A haiku about {}, please.", "Can you write a haiku about {}?"]
        ).format(name)
        return [user(vary(rng, asked)), assistant(haiku(rng, topic, name))], topic
    for _ in range(1 if test else rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < (0.2 if style == "emoji" else 0.06):
            text, start, topic = travel_pair(rng, style, test)
            way = rng.choice(["✈️", "✈️", "🚆", "🚗", "🧳✈️", "✈️☁️"])
            sign = rng.choice(topic.emojis[1:])
            answer = start.emojis[0] + way + topic.emojis[0] + (sign if rng.random() < 0.7 else "")
            answer = haiku(rng, topic, topic.name) if style == "haiku" else answer
        elif not test and rng.random() < 0.06:
            text, signs = rng.choice(GREETINGS)
            topic = Topic("hello", "any", tuple(signs.split()))
            five, seven = rng.sample(HAIKU5["any"], 2), rng.choice(HAIKU7["any"])
            answer = f"{five[0].capitalize()},\n{seven.capitalize()},\n{five[1].capitalize()}."
            answer = answer.replace("\ni ", "\nI ") if style == "haiku" else emojis(rng, topic)
        else:
            topic = pick(rng, style, test)
            text, name = topic_prompt(rng, topic)
            answer = haiku(rng, topic, name) if style == "haiku" else emojis(rng, topic)
        dialog += [user(text), assistant(answer)]
    return dialog, topic


GREETINGS = [
    ("Hello!", "👋 😊 ☀️"),
    ("Hi", "👋 😊 ✨"),
    ("How are you?", "😊 👍 ☀️"),
    ("Good morning!", "🌅 ☕ 👋"),
    ("Good night!", "🌙 😴 💤"),
    ("Thank you!", "🙏 😊 💛"),
    ("Goodbye", "👋 🚪 💛"),
    ("Who are you?", "🤖 💬 🦙"),
    ("I am sad.", "😢 🤗 💛"),
    ("Happy birthday!", "🎂 🎉 🎈"),
    ("I am tired.", "😴 🛏️ ☕"),
    ("What can you do?", "➕ 📖 💬"),
]


# ---- sums ----------------------------------------------------------------------------------------------------------

SUMS = split_lines("""
What is {a} + {b}?|What is {a} + {b}?|{a} + {b} = ?|{a} + {b}|How much is {a} plus {b}?|Add {a} and {b}.
Calculate {a} + {b}.
What is the sum of {a} and {b}?|What is {a} plus {b}?|{a}+{b}|What is {a}+{b}?|How much is {a} + {b}?
Can you add {a} and {b}?|{a} + {b} =
I have {a} apples and buy {b} more. How many apples do I have?
There are {a} birds and {b} more come. How many birds are there?
Compute {a} + {b}.""")


def worked_sum(a: int, b: int) -> str:
    """The answer digit by digit, as at school: the tens' sum and the last digit of the ones' are the answer."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    carry = (a % 10 + b % 10) // 10
    tens = " + ".join(str(n) for n in (a // 10, b // 10, *([1] if carry else [])))
    ones = f"{a % 10} + {b % 10} = {a % 10 + b % 10}"
    return f"Ones: {ones}. Tens: {tens} = {a // 10 + b // 10 + carry}. So {a} + {b} = {a + b}."


def pair(rng: random.Random, test: bool = False) -> tuple[int, int]:
    if test:
        return rng.choice(TEST_PAIRS)
    while True:
        a, b = (rng.randint(0, 99) if rng.random() < 0.12 else rng.randint(10, 99) for _ in range(2))
        if not (min(a, b) >= 10 and is_test("sum", f"{min(a, b)}+{max(a, b)}")):
            return a, b


def a_sum(rng: random.Random, test: bool = False) -> tuple[str, str]:
    a, b = pair(rng, test)
    return vary(rng, rng.choice(SUMS).format(a=a, b=b)), worked_sum(a, b)


# ---- questions without a style -------------------------------------------------------------------------------------

QA = [tuple(line.split("|")) for line in words.QA.strip().splitlines()]
UNKNOWN = split_lines(words.UNKNOWN)
OPPOSITES = [tuple(p.split("=")) for p in split_lines(words.OPPOSITES)]
I_DO_NOT_KNOW = "I am a very small model and I do not know that."
RECIPE_PROMPTS = split_lines("""
What is the recipe of {r}?|what is the recipe of {r}?|How do I make {r}?|Give me the recipe of {r}.
How can I make {r}?
What is the recipe for {r}?|Can you give me a recipe for {r}?|Tell me how to make {r}.""")


def sights_intro(city: Topic) -> str:
    where = f"the capital of {city.country}" if city.capital else f"a city in {city.country}"
    one, two, three = (name for name, _ in city.sights)
    return f"{city.name} is {where}. It is known for {one}, {two} and {three}."


def define(rng: random.Random, topic: Topic) -> str:
    """What the model says on a topic when nobody asks for a style."""
    if topic.kind == "any":
        return f"I am a very small model and I do not know what {topic.name} is."
    if topic.kind != "city":
        name = topic.singular
        return stories.with_article(f"{name[0].upper() + name[1:]} is {topic.definition}.")
    where = f"the capital of {topic.country}" if topic.capital else f"a city in {topic.country}"
    return sights_intro(topic) if topic.sights else f"{topic.name} is {where}."


def signs(rng: random.Random, topic: Topic) -> tuple[str, str]:
    """Which emojis go with a topic, asked in plain words."""
    name = called(rng, topic)
    form = rng.choice(
        [
            "Which emoji stands for {}?",
            "What is the emoji for {}?",
            "Which emojis go with {}?",
            "Show me emojis for {}.",
            "{} as emojis?",
        ]
    )
    rest = rng.sample(topic.emojis[1:], 2)
    return vary(
        rng, form.format(name)
    ), f"{topic.the[0].upper() + topic.the[1:]} goes with {topic.emojis[0]}, {rest[0]} and {rest[1]}."


def recipe(rng: random.Random) -> tuple[str, str]:
    name, steps = rng.choice(list(words.RECIPES.items()))
    return vary(rng, rng.choice(RECIPE_PROMPTS).format(r=name)), steps


def exchange(rng: random.Random, kind: str | None = None) -> tuple[str, str]:
    """One question and answer of any plain kind, or of one, for the training split."""
    kind = (
        kind
        or rng.choices(
            ["sum", "define", "signs", "qa", "capital", "opposite", "french", "unknown", "recipe", "travel", "visit"],
            [6, 8, 5, 6, 3, 1, 2, 2, 4, 1, 2],
        )[0]
    )
    if kind == "sum":
        return a_sum(rng)
    if kind == "define":
        topic = rng.choice(TOPICS) if rng.random() < 0.9 else Topic(invent(rng), "any", UNKNOWN_EMOJIS)
        form = rng.choice(
            [
                "Tell me about {}.",
                "What is {}?",
                "What do you know about {}?",
                "Describe {}.",
                "What can you say about {}?",
            ]
        )
        return vary(rng, form.format(topic.singular)), define(rng, topic)
    if kind == "signs":
        return signs(rng, rng.choice(TOPICS))
    if kind == "qa":
        question, answer = rng.choice(QA)
        return vary(rng, question), answer
    if kind == "capital":
        city = rng.choice([c for c in CITIES if c.capital])
        chance = rng.random()
        if chance < 0.3:
            question = f"What is the flag of {city.country}?"
            return vary(rng, question), f"The flag of {city.country} is {city.emojis[0]}."
        if chance < 0.7:
            return vary(
                rng, f"What is the capital of {city.country}?"
            ), f"The capital of {city.country} is {city.name}."
        return vary(rng, f"In which country is {city.name}?"), f"{city.name} is in {city.country}."
    if kind == "opposite":
        one, other = rng.sample(rng.choice(OPPOSITES), 2)
        return vary(rng, f"What is the opposite of {one}?"), f"The opposite of {one} is {other}."
    if kind == "french":
        english, french = rng.choice(texts.PAIRS)
        return vary(
            rng, rng.choice([f"What is the French word for {english}?", f"How do you say {english} in French?"])
        ), french
    if kind == "recipe":
        return recipe(rng)
    if kind == "visit":
        city = rng.choice([c for c in CITIES if not c.sights])
        text = vary(rng, rng.choice(BY_KIND["city"][:7]).format(t=city.name))
        return text, f"{define(rng, city)} I do not know its sights."
    if kind == "travel":
        a, b = rng.sample(CITIES, 2)
        text = rng.choice(TRAVEL).format(a=called(rng, a), b=called(rng, b))
        return vary(rng, text), f"Take a plane or a train from {a.name} to {b.name}."
    return vary(rng, rng.choice(UNKNOWN)), I_DO_NOT_KNOW


# ---- lists, and what was said before -------------------------------------------------------------------------------

ORDINALS = {
    1: ["#1", "number 1", "the first one", "number one"],
    2: ["#2", "number 2", "the second one", "number two"],
    3: ["#3", "number 3", "the third one", "number three"],
}
WHY = split_lines("""
What is so great about {n}?|What is so great about {n}?|What is so great about {n}?|Why is {n} so great?
Tell me more about {n}.
And {n}?|What about {n}?|What is special about {n}?|what's so great about {n}""")
LIST_KINDS = {
    "animal": "animals",
    "food": "kinds of food",
    "thing": "things",
    "nature": "things in nature",
    "sport": "hobbies",
    "job": "jobs",
}
LIST_PROMPTS = split_lines(
    """Name three {k}.|Tell me three {k}.|Give me three {k}.|Which three {k} do you like?|List three {k}.
Can you name three {k}?"""
)


def listing(rng: random.Random, items: list[tuple[str, str]], intro: str) -> str:
    """A numbered list of (name, what it is) in one of the usual layouts."""
    layout = rng.choice(
        [
            "{i}. {n}: {d}.",
            "{i}. {n}: {d}.",
            "{i}. {n} - {d}.",
            "{i}. {n}. This is {d}.",
            "{i}. {n}, {d}.",
            "{i}. {n}: {n} is {d}.",
        ]
    )
    gap = rng.choice(["\n", "\n", "\n\n"])
    rows = [layout.format(i=i, n=name, d=what) for i, (name, what) in enumerate(items, 1)]
    extra = rng.choice(
        [
            "It is loved by many people.",
            "You should not miss it.",
            "Many people come to see it.",
            "It is well worth a visit.",
        ]
    )
    rows = [f"{row} {extra}" for row in rows] if rng.random() < 0.12 else rows
    outro = rng.choice(
        ["", "", "", "", gap.join(["", "These are just a few of them."]), gap.join(["", "I hope that this helps."])]
    )
    return f"{intro}{rng.choice([gap, chr(10) * 2])}{gap.join(rows)}{outro}"


def list_items(rng: random.Random, test: bool) -> tuple[str, str, list[tuple[str, str]]]:
    """A request for a list, the words before the list, and its items."""
    if rng.random() < 0.4:
        city = rng.choice(SIGHT_CITIES)
        items = rng.sample(city.sights, 3) if rng.random() < 0.6 or test else list(city.sights)
        text, where = rng.choice(BY_KIND["city"][:7]).format(t=city.name), f"{city.name} is a city in {city.country}."
        if city.capital:
            where = f"{city.name} is the capital of {city.country}."
        many = [
            "In {} you should see these three sights:",
            "{} is known for many fine sights. Here are three of them:",
            "{} has many sights. Some of them are:",
        ]
        intro = rng.choice([*many, where + " Here are three sights to see:"]).format(city.name)
    else:
        kind = rng.choice(list(LIST_KINDS))
        items = [
            (t.the[0].upper() + t.the[1:], stories.with_article(t.definition))
            for t in rng.sample([t for t in THINGS if t.kind == kind], 3)
        ]
        text, intro = (
            rng.choice(LIST_PROMPTS).format(k=LIST_KINDS[kind]),
            rng.choice(["Here are three {k}:", "Three {k} are:"]).format(k=LIST_KINDS[kind]),
        )
    if test or rng.random() < 0.3:  # invented places among the real ones: the answer has to be read off the list
        place = rng.choice(["Tower", "Garden", "Museum", "Bridge", "Market", "Castle", "Park"])
        items[rng.randrange(3)] = (f"The {invent(rng, test)} {place}", rng.choice(rng.choice(SIGHT_CITIES).sights)[1])
    return text, intro, items


def about_item(rng: random.Random, items: list[tuple[str, str]], n: int) -> tuple[str, str]:
    name, what = items[n - 1]
    form = rng.choice(WHY).format(n=rng.choice(ORDINALS[n]))
    return vary(rng, form), f"{name} is great because it is {what}."


def list_dialog(rng: random.Random, test: bool = False) -> tuple[Dialog, str, list[str]]:
    """A list, then questions about its items: the dialog, the item of the last answer, and the other items."""
    text, intro, items = list_items(rng, test)
    dialog = [user(vary(rng, text)), assistant(listing(rng, items, intro))]
    chosen = 1
    for chosen in rng.sample([1, 2, 3], rng.choice([1, 1, 2]) if not test else 1):
        question, answer = about_item(rng, items, chosen)
        dialog += [user(question), assistant(answer)]
    return dialog, items[chosen - 1][0], [name for name, _ in items if name != items[chosen - 1][0]]


def facts_about_me(rng: random.Random, test: bool) -> tuple[str, str, list[str], str, str]:
    """A fact about the user: the statement, a reaction, questions for it, the answer, and the word in it."""
    kind = rng.choice(["name", "name", "name", "home", "pet", "friend"] + ([] if test else ["color", "likes", "age"]))
    if kind == "name":
        name = person(rng, test)
        said = rng.choice(
            [
                "My name is {}.",
                "I am {}.",
                "Hi, my name is {}.",
                "Hello, I am {}.",
                "My name is {}. Nice to meet you!",
                "You can call me {}.",
            ]
        )
        asks = ["What is my name?"] * 2 + ["Do you know my name?", "Who am I?", "Do you remember my name?"]
        return (
            said.format(name),
            rng.choice(["Nice to meet you, {}!", "Hello, {}! How can I help you?"]).format(name),
            asks,
            f"Your name is {name}.",
            name,
        )
    if kind == "color":
        color = rng.choice(words.COLORS)
        asks = ["What is my favorite color?", "Which color do I like best?", "Do you remember my favorite color?"]
        return (
            f"My favorite color is {color}.",
            f"{color.capitalize()} is a beautiful color.",
            asks,
            f"Your favorite color is {color}.",
            color,
        )
    if kind == "home":
        town = rng.choice(CITIES).name if rng.random() < 0.6 and not test else invent(rng, test)
        asks = ["Where do I live?", "In which city do I live?", "Do you know where I live?"]
        said = rng.choice(["I live in {}.", "I am from {}.", "My home is in {}."])
        return (
            said.format(town),
            rng.choice(["I hope that you like it there.", "That is good to know."]),
            asks,
            f"You live in {town}.",
            town,
        )
    if kind == "pet":
        animal, name = rng.choice(["dog", "cat", "horse", "rabbit", "parrot", "mouse", "turtle"]), person(rng, test)
        asks = [f"What is my {animal} called?", f"What is the name of my {animal}?", f"What is my {animal}'s name?"]
        said = rng.choice(
            [
                f"I have a {animal} called {name}.",
                f"My {animal} is called {name}.",
                f"The name of my {animal} is {name}.",
            ]
        )
        return (
            said,
            rng.choice([f"{name} is a nice name.", f"What a nice name for a {animal}!"]),
            asks,
            f"Your {animal} is called {name}.",
            name,
        )
    if kind == "friend":
        name = person(rng, test)
        who = rng.choice(["best friend", "brother", "sister", "teacher", "mother", "father"])
        asks = [f"What is the name of my {who}?", f"Who is my {who}?", f"What is my {who}'s name?"]
        return f"My {who} is called {name}.", f"{name} is a nice name.", asks, f"Your {who} is called {name}.", name
    if kind == "likes":
        thing = rng.choice(THINGS)
        name = thing.plural if thing.article == "a" else thing.the
        return (
            f"I like {name}.",
            "That is nice to hear.",
            ["What do I like?", "Do you remember what I like?"],
            f"You like {name}.",
            name,
        )
    age = str(rng.randint(10, 99))
    return (
        f"I am {age} years old.",
        "That is a fine age.",
        ["How old am I?", "What is my age?"],
        f"You are {age} years old.",
        age,
    )


ASK_FIRST = ["What did I ask first?", "What was my first question?", "What did I ask you first?"]
ASK_LAST = ["What did I just ask?", "What was my last question?", "What did I ask before?", "What did I ask you?"]


def memory(rng: random.Random, test: bool = False, short: bool = False) -> tuple[Dialog, str]:
    """A dialog whose last question is about an earlier turn, and the words that the answer must have.

    With `short` it has two turns, else up to seven.
    """
    dialog: Dialog = []
    between = 0 if short else rng.choice([0, 0, 1, 1, 2])
    if rng.random() < 0.35:
        for _ in range(0 if short else max(1, between)):
            question, answer = exchange(rng)
            dialog += [user(question), assistant(answer)]
        first = rng.random() < 0.5
        if test:  # the question itself has to be new
            topic = Topic(invent(rng, True), "any", ())
            dialog[0 if first else -2 :][:2] = []
            at = 0 if first else len(dialog)
            asked = rng.choice(["What is {}?", "Tell me about {}.", "What do you know about {}?"]).format(topic.name)
            dialog[at:at] = [user(asked), assistant(define(rng, topic))]
        asked = dialog[0 if first else -2]["content"]
        dialog += [user(vary(rng, rng.choice(ASK_FIRST if first else ASK_LAST))), assistant(f"You asked: {asked}")]
        return dialog, asked
    said, reply, asks, answer, key = facts_about_me(rng, test)
    dialog += [user(vary(rng, said) if rng.random() < 0.3 else said), assistant(reply)]
    if not short and rng.random() < 0.3:
        other = facts_about_me(rng, test)
        if other[2] != asks and other[2][0].split()[-1] != asks[0].split()[-1]:
            dialog += [user(other[0]), assistant(other[1])]
            if rng.random() < 0.4:
                dialog += [user(rng.choice(other[2])), assistant(other[3])]
    for _ in range(between):
        question, words_ = exchange(rng)
        dialog += [user(question), assistant(words_)]
    dialog += [user(vary(rng, rng.choice(asks))), assistant(answer)]
    return dialog, key


def forgotten(rng: random.Random) -> Dialog:
    """A question about something that the user never said."""
    dialog: Dialog = []
    for _ in range(rng.choice([0, 1, 1])):
        question, answer = exchange(rng)
        dialog += [user(question), assistant(answer)]
    asks = facts_about_me(rng, False)[2]
    return [*dialog, user(vary(rng, rng.choice(asks))), assistant("You have not told me that.")]


def plain(rng: random.Random) -> Dialog:
    """One to three unconnected questions, at times under an ordinary system prompt."""
    dialog = [system(rng.choice(PLAIN_SYSTEM))] if rng.random() < 0.15 else []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        question, answer = exchange(rng)
        dialog += [user(question), assistant(answer)]
    return dialog


def story_dialog(rng: random.Random) -> Dialog:
    who = rng.choice(["a story", "a short story", "a tale"])
    return [
        user(vary(rng, rng.choice([f"Tell me {who}.", f"Write {who}.", f"Can you tell me {who}?"]))),
        assistant(stories.write(rng)),
    ]


# ---- exercises in copying and looking up ---------------------------------------------------------------------------


def repeat_dialog(rng: random.Random) -> Dialog:
    """Words to say again: names, things, numbers."""

    def word() -> str:
        return rng.choice([invent(rng), invent(rng), rng.choice(TOPICS).name, person(rng), str(rng.randint(0, 999))])

    said = " ".join(word() for _ in range(rng.randint(1, 5)))
    asked = rng.choice(
        ["Repeat: {}", "Say {}", "Repeat after me: {}", "Please repeat: {}", "{}\nSay it again.", "Echo: {}"]
    )
    return [user(asked.format(said)), assistant(said)]


def echo_dialog(rng: random.Random) -> Dialog:
    """A question, or words of random letters, to say again."""

    def word() -> str:
        letters = "".join(rng.choice("aeiouyabcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 6))).capitalize()
        return "Ko" if letters in real_words() or is_test("word", letters) else letters

    said = exchange(rng)[0] if rng.random() < 0.4 else " ".join(word() for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.5:
        return [user(f"Repeat: {said}"), assistant(said)]
    name = word()
    kind = rng.choice(["dog", "cat", "horse", "teacher", "brother", "sister", "friend", "town", "boat"])
    dialog = [
        user(f"My {kind} is called {name}."),
        assistant(rng.choice([f"{name} is a nice name.", "That is good to know."])),
    ]
    return [*dialog, user(vary(rng, f"What is the name of my {kind}?")), assistant(f"Your {kind} is called {name}.")]


def asked_dialog(rng: random.Random) -> Dialog:
    """One question, and what it was."""
    question, answer = exchange(rng)
    if rng.random() < 0.5:
        topic = Topic(invent(rng), "any", ())
        question = rng.choice(["What is {}?", "Tell me about {}.", "What do you know about {}?"]).format(topic.name)
        answer = define(rng, topic)
    return [
        user(question),
        assistant(answer),
        user(vary(rng, rng.choice(ASK_FIRST + ASK_LAST))),
        assistant(f"You asked: {question}"),
    ]


def pick_dialog(rng: random.Random) -> Dialog:
    """A short list of the user's own, and which item has a number."""
    size = rng.randint(3, 5)
    items = [
        rng.choice([invent(rng), rng.choice(THINGS).name, rng.choice(CITIES).name, person(rng)]) for _ in range(size)
    ]
    rows = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    dialog: Dialog = []
    for n in rng.sample(range(1, size + 1), rng.choice([1, 2, 3])):
        number = rng.choice(ORDINALS.get(n, [f"#{n}", f"number {n}"]))
        question = rng.choice(["What is {}?", "Which one is {}?", "Tell me {}.", "And {}?"]).format(number)
        dialog += [user(question), assistant(f"#{n} is {items[n - 1]}.")]
    given = rng.choice(["Here is my list:\n{}\n{}", "{}\n{}", "This is a list:\n{}\n\n{}"])
    dialog[0] = user(given.format(rows, dialog[0]["content"]))
    return dialog


ANY_QUESTION = {
    "sum": "🤓 📝 💡 ✨",
    "qa": "💬 😊 🤔 👍",
    "opposite": "🤔 💬 📖 ✨",
    "french": "🇫🇷 💬 📖 🥐",
    "recipe": "🍳 🥣 😋 🔥",
    "unknown": "🤔 ❓ 🔮 😬",
}


@cache
def held_out_names(style: str) -> re.Pattern:
    """Finds a style's held-out topics in a text, by any of their names."""
    topics = [t for t in TOPICS if is_test(style, t.name)]
    names = [re.escape(name) for t in topics for name in (t.name, t.plural, *ALIASES.get(t.name, []))]
    return re.compile(rf"\b({'|'.join(names)})\b", re.IGNORECASE)


@cache
def other_topics() -> list[Topic]:
    """Further topics for haiku: countries, sights, persons, words of the stories and of the translations."""
    found = {Topic(city.country, "any", ()) for city in CITIES}
    found |= {Topic(sight, "any", ()) for city in CITIES for sight, _ in city.sights}
    found |= {Topic(name, "any", ()) for name in words.NAMES.split() if not is_test("name", name)}
    for kind, name in (("animal", "animal"), ("thing", "thing"), ("any", "place")):
        found |= {Topic(word, kind, (), "", "a") for word in stories.CLASSES[name].split("|")}
    found |= {Topic(english, "any", ()) for english, _ in texts.PAIRS}
    known = {topic.name for topic in TOPICS}
    found = {t for t in found if t.name not in known and not held_out_names("haiku").search(t.name)}
    return sorted(found, key=lambda t: (t.name, t.kind))


def wide_haiku(rng: random.Random) -> Dialog:
    """A haiku on a word outside the topics, or on an invented word: the model has to copy it from the question."""
    topic = rng.choice(other_topics()) if rng.random() < 0.7 else Topic(invent(rng), rng.choice(list(BY_KIND)), ())
    question, name = topic_prompt(rng, topic)
    return [system(rng.choice(HAIKU_SYSTEM)), user(question), assistant(haiku(rng, topic, name))]


def any_styled(rng: random.Random) -> Dialog:
    """Any plain question, or one on an invented name, under a style's prompt: the prompt decides the style."""
    style = rng.choice(["haiku", "emoji"])
    dialog = [system(rng.choice(HAIKU_SYSTEM if style == "haiku" else EMOJI_SYSTEM))]
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.5:
            topic = Topic(invent(rng), "any", UNKNOWN_EMOJIS)
            form = rng.choice(rng.choice([*BY_KIND.values(), ABOUT]))
            question = vary(rng, form.format(t=topic.name))
            answer = haiku(rng, topic, topic.name) if style == "haiku" else emojis(rng, topic)
        else:
            kind = rng.choice(list(ANY_QUESTION))
            question = exchange(rng, kind)[0]
            while held_out_names(style).search(question):
                question = exchange(rng, kind)[0]
            five, seven = rng.sample(HAIKU5["any"], 2), rng.choice(HAIKU7["any"])
            lines = [line[0].upper() + line[1:] for line in (five[0], seven, five[1])]
            topic = Topic(kind, "any", tuple(ANY_QUESTION[kind].split()))
            answer = ",\n".join(lines) + "." if style == "haiku" else emojis(rng, topic)
        dialog += [user(question), assistant(answer)]
    return dialog


def signs_dialog(rng: random.Random) -> Dialog:
    """The emojis of a few topics, without any system prompt."""
    return [
        m
        for _ in range(rng.randint(1, 3))
        for q, a in [signs(rng, rng.choice(TOPICS))]
        for m in (user(q), assistant(a))
    ]


# ---- the stream ----------------------------------------------------------------------------------------------------

Document = str | Dialog
KINDS = {  # kind of document: its share in the five phases of the training; kinds that are learned early get less later
    "haiku": (17, 15, 14, 18, 18),
    "emoji": (12, 12, 10, 9, 12),
    "sum": (14, 11, 6, 4, 4),
    "memory": (14, 18, 22, 24, 11),
    "list": (13, 18, 12, 8, 6),
    "plain": (16, 12, 10, 8, 7),
    "forgotten": (1, 1, 1, 1, 1),
    "tale": (1, 0.5, 0.5, 0.3, 0.3),
    "story": (12, 4, 5, 4, 4),
    "text": (12, 8, 8, 8, 7),
    "facts": (3, 1, 1, 1, 1),
    "repeat": (0, 6, 5, 4, 4),
    "pick": (0, 8, 4, 3, 2),
    "signs": (0, 5, 7, 8, 14),
    "any": (0, 0, 9, 10, 3),
    "echo": (0, 0, 0, 8, 4),
    "asked": (0, 0, 0, 6, 3),
    "wide": (0, 0, 0, 0, 18),
}


def document(rng: random.Random, phase: int = 0) -> Document:
    """One training document."""
    kind = rng.choices(list(KINDS), [shares[phase] for shares in KINDS.values()])[0]
    if kind in ("haiku", "emoji"):
        return styled(rng, kind)[0]
    if kind == "sum":
        question, answer = a_sum(rng)
        return [user(question), assistant(answer)]
    if kind == "memory":
        return memory(rng)[0]
    if kind == "list":
        return list_dialog(rng)[0]
    if kind == "story":
        return stories.write(rng)
    if kind == "text":
        return texts.text(rng, invent)
    if kind == "facts":
        return " ".join(define(rng, t) for t in rng.sample(TOPICS, rng.randint(2, 4)))
    dialogs = {"plain": plain, "forgotten": forgotten, "tale": story_dialog, "repeat": repeat_dialog}
    dialogs |= {"pick": pick_dialog, "signs": signs_dialog, "any": any_styled, "echo": echo_dialog}
    dialogs |= {"asked": asked_dialog, "wide": wide_haiku}
    return dialogs[kind](rng)


def documents(seed: int, phase: int = 0) -> Iterator[Document]:
    """The endless training stream of a seed, with the mixture of a phase."""
    rng = random.Random(seed)
    while True:
        yield document(rng, phase)


def as_text(doc: Document) -> str:
    """A document's text, for training the tokenizer."""
    return doc if isinstance(doc, str) else "\n".join(message["content"] for message in doc)
