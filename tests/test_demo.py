"""The embedded checkpoint and the program that trains it: what is held out, what is on disk, what the card says."""

import hashlib
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from demo import corpus, evaluate, stories, train, train_tokenizer, words
from llama import Llama, Tokenizer
from llama.training.examples import Reader

CHECKPOINT = Path(train.__file__).parent / "checkpoint"
N_DOCS = 6000


@pytest.fixture(scope="module")
def training_docs() -> list[corpus.Document]:
    phases = (itertools.islice(corpus.documents(seed=11, phase=phase), N_DOCS // 5) for phase in range(5))
    return list(itertools.chain(*phases))


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.build(str(CHECKPOINT), max_seq_len=512, max_batch_size=16)


def user_turns(doc: corpus.Document) -> list[str]:
    return [] if isinstance(doc, str) else [m["content"] for m in doc if m["role"] == "user"]


def test_no_held_out_topic_is_trained_under_the_prompt_of_its_style(training_docs):
    seen = 0
    for doc in training_docs:
        for style, systems in (("haiku", corpus.HAIKU_SYSTEM), ("emoji", corpus.EMOJI_SYSTEM)):
            asked_by_user = style == "haiku" and any("haiku about" in turn.lower() for turn in user_turns(doc))
            if isinstance(doc, str) or not (doc[0]["content"] in systems or asked_by_user):
                continue
            seen += 1
            text = "\n".join(user_turns(doc))
            assert not corpus.held_out_names(style).search(text), (style, doc)
    assert seen > N_DOCS / 5
    assert corpus.held_out_names("haiku").search("to paris") and corpus.held_out_names("emoji").search("from NY?")


def test_no_held_out_sum_is_trained(training_docs):
    held_out = set(corpus.TEST_PAIRS)
    seen = set()
    for doc in training_docs:
        text = corpus.as_text(doc)
        seen |= {(int(a), int(b)) for a, b in re.findall(r"\b(\d\d)(?: ?\+ ?| plus | and )(\d\d)\b", text)}
    assert len(seen) > 500 and not seen & held_out
    assert 0.1 < len(held_out) / 8100 < 0.25 and all((b, a) in held_out for a, b in held_out)


def test_no_held_out_name_invented_word_or_hero_is_trained(training_docs):
    rng = random.Random(3)
    text = "\n".join(map(corpus.as_text, training_docs))
    trained_words = set(re.findall(r"\w+", text))
    names = {name for name in words.NAMES.split() if corpus.is_test("name", name)}
    invented = {corpus.invent(rng, test=True) for _ in range(3000)}
    assert names and not trained_words & names
    assert len(trained_words & {corpus.invent(rng) for _ in range(3000)}) > 4  # of the trained ones, some do occur
    assert not trained_words & invented
    heroes = re.findall(r"(?:there was an?|there lived an?|Once upon a time, an?|There once was an?) (\w+) (\w+)", text)
    assert len(heroes) > 300 and not any(stories.is_test(*hero) for hero in heroes)


def test_training_haiku_have_five_seven_and_five_syllables():
    rng = random.Random(0)
    for _ in range(500):
        topic = rng.choice([t for t in corpus.TOPICS if corpus.syllables(t.the) <= 5])
        assert evaluate.counts_syllables(corpus.haiku(rng, topic, topic.the)), topic.name


def test_every_story_is_in_its_own_grammar_and_broken_english_is_not():
    rng = random.Random(0)
    assert all(evaluate.share_grammatical(stories.write(rng)) == 1 for _ in range(200))
    for wrong in (
        "The fox walk slowly.",
        "Him looked at the map and felt very sad.",
        "In the evening he liked to sings.",
    ):
        assert not stories.is_grammatical(wrong)


def test_the_stream_is_a_function_of_its_seed():
    one, same, other = (list(itertools.islice(corpus.documents(seed), 50)) for seed in (1, 1, 2))
    assert one == same != other


def test_the_tokenizer_trainer_spells_every_text_and_never_merges_digits(tmp_path):
    texts = list(map(corpus.as_text, itertools.islice(corpus.documents(1), 300)))
    train_tokenizer.write(train_tokenizer.learn(train_tokenizer.count_words(texts), 500), tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    for text in [*texts[:50], "naïve 数 🏴‍☠️ \x00"]:
        assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    assert len(tokenizer.encode("4738", bos=False, eos=False)) == 4
    assert tokenizer.n_words == 500 + 256


def test_only_answers_are_learned_from_a_dialog():
    tokenizer = Tokenizer(CHECKPOINT / "tokenizer.model")
    dialog = [corpus.system("Be kind."), corpus.user("Hi"), corpus.assistant("Hello!")]
    reader = Reader(tokenizer, train.MAX_LEN)
    for document, expected in (
        (reader.dialog(dialog), "Hello!<|eot_id|>"),
        (reader.text("A story."), "A story.<|end_of_text|>"),
    ):
        assert tokenizer.decode([i for i, yes in zip(document.ids, document.learned) if yes]) == expected


def test_the_training_goes_on_where_it_was_killed_and_writes_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STEP_TOKENS", 700)
    monkeypatch.setattr(train, "CHUNK_STEPS", 4)
    for name in ("whole", "twice"):  # the tokenizer takes minutes to learn: the committed one's vocabulary is the same
        (tmp_path / name).mkdir()
        shutil.copyfile(CHECKPOINT / "tokenizer.model", tmp_path / name / "tokenizer.model")
    train.train(tmp_path / "a", tmp_path / "whole", 6 * 700, 3e-3, 100)
    plain = train.Trainer.step

    def killed(self, number, passes):
        if number == 5:
            raise KeyboardInterrupt
        return plain(self, number, passes)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.Trainer, "step", killed)
        train.train(tmp_path / "b", tmp_path / "twice", 6 * 700, 3e-3, 2)
    train.train(tmp_path / "b", tmp_path / "twice", 6 * 700, 3e-3, 2)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "twice" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    a, b = (torch.load(tmp_path / name / "consolidated.00.pth", weights_only=True) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert Llama.build(tmp_path / "b", max_seq_len=64).generate([[1, 2]], 4)[0]


def test_the_checkpoint_is_small_whole_and_tied():
    tensors = torch.load(CHECKPOINT / "consolidated.00.pth", weights_only=True, mmap=True)
    assert (CHECKPOINT / "consolidated.00.pth").stat().st_size <= 13_000_000
    assert sum(t.numel() for t in tensors.values()) <= 6_000_000
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} and "output.weight" not in tensors
    assert json.loads((CHECKPOINT / "params.json").read_text()) == train.PARAMS
    listed = [line.split() for line in (CHECKPOINT / "checklist.chk").read_text().splitlines()]
    assert {name for _, name in listed} == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert all(hashlib.md5((CHECKPOINT / name).read_bytes()).hexdigest() == md5 for md5, name in listed)


def test_its_tokenizer_round_trips_and_has_one_token_a_digit():
    tokenizer = Tokenizer(CHECKPOINT / "tokenizer.model")
    assert 2000 <= tokenizer.n_words - 256 <= 4000
    for text in ["Héllo, 世界! 🇨🇳✈️🗽", *map(corpus.as_text, itertools.islice(corpus.documents(5), 200))]:
        assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    assert len(tokenizer.encode("4738", bos=False, eos=False)) == 4


def test_the_card_says_what_was_measured_and_every_score_asked_for_is_at_least_90():
    scores = json.loads(evaluate.SCORES.read_text())
    assert evaluate.table(scores) in evaluate.HERE_README.read_text()
    asked = [row for row in scores if row.startswith(("haiku: three", "emojis: nothing", "two", "stories"))]
    assert len(asked) == 6
    assert all(
        scores[row][setting] >= 90 and scores[row]["n"] >= 200 for row in asked for setting in ("greedy", "sampled")
    )


ASKED_FOR = [row for row in evaluate.questions(1) if "syllables" not in row and "own among" not in row]


@pytest.mark.parametrize("row", ASKED_FOR)
def test_a_few_held_out_questions_are_answered(llm, row):
    asked = evaluate.questions(12)[row]
    answers = evaluate.answers(llm, [q.prompt for q in asked], temperature=0.0)
    scores = [question.judge(answer) for question, answer in zip(asked, answers)]
    assert sum(scores) / len(scores) >= 0.75, answers
