"""Held-out scores of the embedded checkpoint, with the package's own calls: `python -m demo.evaluate`.

Draws every question with a fixed seed from the held-out part of the corpus. Prints a table, and with `--write` puts it
into `demo/README.md` and `demo/scores.json`.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo import corpus, stories, texts
from demo.train import HERE
from llama import Llama

HERE_README = Path(__file__).parent / "README.md"
SCORES = Path(__file__).parent / "scores.json"
EMOJI_ONLY = re.compile(
    "[\U0001f000-\U0001faff\u2190-\u21ff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\u20e3 ]+"
)
SETTINGS = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.6, "top_p": 0.9}}


@dataclass(frozen=True)
class Question:
    """A prompt (a dialog, or a text to continue) and the function that scores its answer, from 0 to 1."""

    prompt: corpus.Dialog | str
    judge: Callable[[str], float]


def names_of(topic: corpus.Topic) -> list[str]:
    return [name.lower() for name in (topic.name, topic.plural, *corpus.ALIASES.get(topic.name, []))]


def is_haiku(topic: corpus.Topic, answer: str) -> float:
    """Three lines, one of which names the topic."""
    lines = answer.strip().split("\n")
    named = any(re.search(rf"\b{re.escape(name)}\b", answer.lower()) for name in names_of(topic))
    return float(len(lines) == 3 and all(line.strip() for line in lines) and named)


def counts_syllables(answer: str) -> float:
    """Lines of five, seven and five syllables."""
    return float([corpus.syllables(line) for line in answer.strip().split("\n")] == [5, 7, 5])


def is_emoji_only(answer: str) -> float:
    return float(bool(EMOJI_ONLY.fullmatch(answer.strip())))


def suits(topic: corpus.Topic, answer: str) -> float:
    """Emojis only, and the topic's own among them (any of the four that the lists give it)."""
    return float(is_emoji_only(answer) and any(emoji in answer for emoji in topic.emojis))


def is_sum(total: int, answer: str) -> float:
    """Whether the last number of the answer is the sum."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and numbers[-1] == str(total))


def holds(key: str, answer: str) -> float:
    return float(key.lower() in answer.lower())


def is_about(name: str, others: list[str], answer: str) -> float:
    """Whether the answer names the right item, and no other of the list."""
    return float(name in answer and not any(other in answer for other in others))


def share_grammatical(text: str) -> float:
    """The share of complete sentences that are forms of the story grammar, with right agreement and articles."""
    found = stories.sentences(text)
    if found and not re.search(r'[.!?]"?$', found[-1]):
        found.pop()  # the budget has cut it off
    return sum(map(stories.is_grammatical, found)) / len(found) if found else 0.0


def questions(n: int) -> dict[str, list[Question]]:
    """The held-out questions of every row of the table; the same on each call."""
    rng = random.Random(20_000)
    rows: dict[str, list[Question]] = {}

    def styled(style: str) -> list[tuple[corpus.Dialog, corpus.Topic]]:
        return [corpus.styled(rng, style, test=True) for _ in range(n)]

    haiku, emoji = styled("haiku"), styled("emoji")
    rows["haiku: three lines that name the topic"] = [Question(d[:-1], lambda a, t=t: is_haiku(t, a)) for d, t in haiku]
    rows["haiku: 5, 7 and 5 syllables"] = [Question(d[:-1], counts_syllables) for d, _ in haiku]
    rows["emojis: nothing but emojis"] = [Question(d[:-1], is_emoji_only) for d, _ in emoji]
    rows["emojis: one of the topic's own among them"] = [Question(d[:-1], lambda a, t=t: suits(t, a)) for d, t in emoji]
    pairs = [corpus.pair(rng, test=True) for _ in range(n)]
    asked = [corpus.vary(rng, rng.choice(corpus.SUMS).format(a=a, b=b)) for a, b in pairs]
    rows["two-digit sums"] = [
        Question([corpus.user(q)], lambda answer, s=a + b: is_sum(s, answer)) for q, (a, b) in zip(asked, pairs)
    ]
    for row, short in (("two turns: what was said or asked before", True), ("three to seven turns: the same", False)):
        memories = [corpus.memory(rng, test=True, short=short) for _ in range(n)]
        rows[row] = [Question(d[:-1], lambda a, k=k: holds(k, a)) for d, k in memories]
    lists = [corpus.list_dialog(rng, test=True) for _ in range(n)]
    rows["two turns: the item of a list that is asked for"] = [
        Question(d[:-1], lambda a, i=i, o=o: is_about(i, o, a)) for d, i, o in lists
    ]
    openings = [stories.opening(rng, test=True)[0] for _ in range(n)]
    rows["stories: sentences that are grammatical"] = [Question(text, share_grammatical) for text in openings]
    shots = [texts.translation(rng, corpus.invent).rsplit(" => ", 1) for _ in range(n)]
    rows["few-shot translation of known words"] = [
        Question(text + " =>", lambda a, w=word: float(a.split("\n")[0].strip() == w)) for text, word in shots
    ]
    return rows


def answers(llm: Llama, prompts: list[corpus.Dialog | str], **settings) -> list[str]:
    """The model's answer to each prompt."""
    if isinstance(prompts[0], str):
        return [r["generation"] for r in llm.text_completion(prompts, max_gen_len=200, seed=7, **settings)]
    return [r["generation"]["content"] for r in llm.chat_completion(prompts, max_gen_len=120, seed=7, **settings)]


def evaluate(folder: Path, n: int, misses: int = 0) -> dict[str, dict[str, float]]:
    """The mean score of each row under each setting, in percent."""
    llm = Llama.build(str(folder), max_seq_len=512, max_batch_size=32)
    scores: dict[str, dict[str, float]] = {}
    cache: dict[tuple[str, str], list[str]] = {}
    for row, asked in questions(n).items():
        scores[row] = {"n": len(asked)}
        for setting, values in SETTINGS.items():
            key = (row.split(":")[0] if row.startswith(("haiku", "emojis")) else row, setting)
            if key not in cache:
                cache[key] = answers(llm, [q.prompt for q in asked], **values)
            judged = [q.judge(answer) for q, answer in zip(asked, cache[key])]
            scores[row][setting] = round(100 * sum(judged) / len(judged), 1)
            for question, answer in [(q, a) for q, a, s in zip(asked, cache[key], judged) if s < 1][:misses]:
                print(f"miss ({row}, {setting}): {question.prompt!r}\n    -> {answer!r}")
        print(f"{row}: {scores[row]}", flush=True)
    return scores


def table(scores: dict[str, dict[str, float]]) -> str:
    """The table of scores in the model card."""
    lines = ["| held out | n | greedy | temperature 0.6, top_p 0.9 |", "|---|---|---|---|"]
    lines += [f"| {row} | {s['n']} | {s['greedy']:.1f} % | {s['sampled']:.1f} % |" for row, s in scores.items()]
    return "\n".join(lines)


def below_the_card(scores: dict[str, dict[str, float]]) -> str:
    """By how much a model has lost most against the embedded one, which it was trained from."""
    card = json.loads(SCORES.read_text())
    lost = {(row, how): card[row][how] - scores[row][how] for row in scores for how in SETTINGS}
    worst = max(lost, key=lost.__getitem__)
    return f"{lost[worst]:.1f} points below the embedded model's at most ({', '.join(worst)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--n", type=int, default=200, help="questions for each row")
    parser.add_argument("--misses", type=int, default=0, help="failures to show for each row")
    parser.add_argument("--write", action="store_true", help="put the table into the model card")
    args = parser.parse_args()
    begun = time.time()
    scores = evaluate(args.folder, args.n, args.misses)
    print(table(scores) + f"\n{time.time() - begun:.0f} seconds")
    if args.folder != HERE:
        print(below_the_card(scores))
    if args.write:
        SCORES.write_text(json.dumps(scores, indent=1) + "\n")
        card = HERE_README.read_text()
        HERE_README.write_text(re.sub(r"\| held out \|.*?(?=\n\n)", lambda _: table(scores), card, flags=re.DOTALL))


if __name__ == "__main__":
    main()
