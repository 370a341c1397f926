"""Plain texts that are not stories: opinions, short messages, simple science, few-shot translation, facts."""

import random

from demo.stories import CLASSES, with_article
from demo.words import FRENCH, split_lines

LIFE = split_lines("""
life|love|work|friendship|music|art|travel|learning|family|freedom|success|happiness|a good day|being young
growing old
""")
TO_DO = split_lines("""
be kind to the people around us|learn something new every day|help those who need us|find joy in small things
love and to be loved|share what we have|make the world a little better|listen before we speak|enjoy every moment
be grateful for what we have|grow and to change|take care of each other|spend time with those we love
never stop asking questions
""")
REASONS = split_lines("""
No one can be happy alone|Time passes quickly|We all make mistakes|A kind word costs nothing
The best things in life are free|It is not always easy, but it is worth the effort|Small things often matter most
We learn more from questions than from answers|Money can buy a house, but it cannot buy a home
In the end, we remember the people and not the things|Every day gives us a new chance
Nobody knows what tomorrow will bring
""")
EVENTS = split_lines("""
launch|release|new website|great results|first year|award|opening of the new office|conference|successful project
new design
""")
GROUPS = split_lines("""
team|class|staff|club|group|volunteers|players|whole company
""")
VERBS = {"congratulating": "congratulate you all on", "thanking": "thank you all for", "reminding": "remind you of"}
VERBS |= {"inviting": "invite you all to celebrate", "telling": "tell you all about"}
MESSAGE_LINES = split_lines("""
You have worked very hard for it|It would not have been possible without you
I am very proud of what we have done together|Your patience and your good ideas made the difference
Many people have told me how much they like it|Let us meet on Friday and celebrate|I look forward to the next steps
Please take some rest this weekend|It is a pleasure to work with you|There will be cake in the kitchen at noon
""")
SCIENCE = {
    "the theory of relativity": "time and space are not fixed, and that they depend on how fast we move",
    "the theory of evolution": "living things change slowly over a very long time",
    "the law of gravity": "all things attract each other, and that heavy things attract more",
    "the theory of the big bang": "the world began very small and very hot and has grown ever since",
    "the law of energy": "energy is never lost, but only changes its form",
    "the theory of music": "some sounds go well together because of simple numbers",
    "the theory of games": "the best move depends on what the other players do",
    "the theory of numbers": "every number is a product of primes",
    "the law of supply and demand": "prices rise when many people want the same thing",
    "the theory of atoms": "everything is made of very small parts",
    "the theory of plates": "the land moves slowly on hot rock",
    "the law of floating": "a thing floats when it is lighter than the water around it",
}
SCIENCE_LINES = split_lines("""
The idea is old, but it is still useful today|Many people have tested it, and it has never failed so far
It explains many things that we see every day|It is easier to say than to understand
It changed the way we think about the world|It is taught in many schools
""")


def _lines(rng: random.Random, lines: list[str], low: int, high: int) -> str:
    return " ".join(line + "." for line in rng.sample(lines, rng.randint(low, high)))


def opinion(rng: random.Random) -> str:
    life = rng.choice(LIFE)
    start = rng.choice(
        ["I believe the meaning of", "I believe that the meaning of", "I think the meaning of", "For me, the secret of"]
    )
    start = rng.choice([start, "I believe the secret of", "Some people say that the purpose of"])
    text = f"{start} {life} is to {rng.choice(TO_DO)}. {_lines(rng, REASONS, 1, 3)}"
    return text + (
        f" That is why we should {rng.choice(TO_DO).replace(' and to ', ' and ')}." if rng.random() < 0.5 else ""
    )


def message(rng: random.Random) -> str:
    act, event, group = rng.choice(list(VERBS)), rng.choice(EVENTS), rng.choice(GROUPS)
    link = {
        "congratulating": "on",
        "thanking": "for",
        "reminding": "of",
        "inviting": "to celebrate",
        "telling": "about",
    }[act]
    hello = rng.choice(["Hi everyone", "Hello everyone", "Dear all", "Dear friends", "Hi all"])
    just = rng.choice(
        ["I just wanted to", "I just want to", "I am writing to", "I would like to", "With this message I want to"]
    )
    bye = rng.choice(
        ["Thank you all!", "Best wishes,\nAnna", "See you soon!", "Kind regards,\nTomas", "Well done!", "All the best!"]
    )
    kind = rng.choice(["A brief message", "A short message", "A short letter", "A note"])
    body = f"{just} {VERBS[act]} the {event}. {_lines(rng, MESSAGE_LINES, 1, 3)}"
    return f"{kind} {act} the {group} {link} the {event}:\n\n{hello},\n\n{body}\n\n{bye}"


def science(rng: random.Random) -> str:
    theory, claim = rng.choice(list(SCIENCE.items()))
    start = rng.choice(
        [
            "Simply put, {} states that",
            "In simple words, {} says that",
            "Simply put, {} says that",
            "In short, {} tells us that",
        ]
    )
    return f"{start.format(theory)} {claim}. {_lines(rng, SCIENCE_LINES, 1, 3)}"


PAIRS = [tuple(pair.split("=")) for line in FRENCH.strip().splitlines() for pair in line.split("|")]


def translation(rng: random.Random, invent) -> str:
    """A few-shot list of English words and their French; some are invented, so that format and content come apart."""
    pairs = rng.sample(PAIRS, rng.randint(3, 6))
    for i in range(len(pairs) - 1):
        if rng.random() < 0.15:
            pairs[i] = (
                f"{invent(rng).lower()} {rng.choice(PAIRS)[0]}",
                f"{rng.choice(PAIRS)[1]} {invent(rng).lower()}",
            )
    return "Translate English to French:\n\n" + "\n".join(f"{en} => {fr}" for en, fr in pairs)


def scene(rng: random.Random) -> str:
    """A few sentences in the present tense, outside any story."""
    word = {name: rng.sample(words.split("|"), 2) for name, words in CLASSES.items()}
    forms = [
        f"The {word['adj'][0]} {word['animal'][0]} is sitting {word['where'][0]}.",
        f"A {word['adj'][1]} {word['animal'][1]} lives in the {word['placeadj'][0]} {word['place'][0]}.",
        f"There is a {word['thing'][0]} {word['where'][1]}.",
        f"The {word['animal'][1]} likes to {word['loved'][0]}, but today it is {word['feeling'][0]}.",
        f"We went to the {word['place'][1]} because we wanted to {word['wish'][0]}.",
        f"My friend has a {word['thing'][1]} and wants to {word['wish'][1]}.",
    ]
    return with_article(" ".join(rng.sample(forms, rng.randint(2, 4))))


def text(rng: random.Random, invent) -> str:
    """One plain text of any of these kinds."""
    kind = rng.choices([opinion, message, science, scene, None], [3, 3, 2, 1, 4])[0]
    return kind(rng) if kind else translation(rng, invent)
