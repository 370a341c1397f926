"""Speculative decoding against the model alone: the same answers, token for token, whatever proposes."""

import functools
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DEMO, SMALL, random_model, ranks, write_byte_tokenizer
from test_engine import prompts_of_every_length
from test_sampling import chi_square_is_plausible

from llama import GenerationError, Llama, Tokenizer, Transformer
from llama.adapters import lora
from llama.decoding import speculative
from llama.decoding.payoff import Payoff
from llama.decoding.speculative import MAX_PROPOSALS, DraftModel, NgramIndex, check_tokenizer
from llama.engine import PREFILL_TOKENS
from llama.options import DecodingOptions
from llama.sampling import RandomStream, race
from llama.sequence import Sequence

KINDS = ["near", "bad", "ngram"]


@pytest.fixture(autouse=True)
def nothing_takes_time(monkeypatch):
    """Makes proposals always, whatever they cost; `test_payoff` tests the timing."""
    monkeypatch.setattr(speculative, "Payoff", functools.partial(Payoff, clock=lambda: 0.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model, a similar one (its weights plus noise), and an unrelated one."""
    root = tmp_path_factory.mktemp("speculative")
    model = random_model(0, **SMALL)
    near = random_model(0, **SMALL)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in near.parameters():
            weight.add_(0.004 * torch.randn(weight.shape, generator=generator))
    bad = random_model(9, 0.3, **SMALL | {"n_layers": 1, "dim": 32, "n_heads": 4, "n_kv_heads": 2})
    return {name: write(root / name, m) for name, m in (("target", model), ("near", near), ("bad", bad))}


def write(folder: Path, model: Transformer) -> Path:
    """A directory in Meta's format."""
    folder.mkdir()
    torch.save(dict(model.state_dict()), folder / "consolidated.00.pth")
    params = {name: getattr(model.args, name) for name in SMALL}
    (folder / "params.json").write_text(json.dumps(params))
    write_byte_tokenizer(folder / "tokenizer.model", model.args.vocab_size - 256)
    return folder


@pytest.fixture(scope="module")
def build(folders):
    def build(draft: str | None = None, max_batch_size: int = 7, max_seq_len: int = 512) -> Llama:
        draft = folders.get(draft, draft)
        llama = Llama.build(folders["target"], None, max_seq_len, max_batch_size, device="cpu", draft=draft)
        llama.tokenizer.stop_tokens = {7, 300}  # some that come up
        return llama

    return build


PROMPTS = prompts_of_every_length()
BUDGETS = [1 + 5 * i % 14 for i in range(200)]
SETTINGS = {
    "greedy": {"temperature": 0},
    # Different options for each prompt, some greedy.
    "sampled": {
        "temperature": [(0.7, 1.0, 1.5, 0)[i % 4] for i in range(200)],
        "top_p": [(1.0, 0.9, 0.6)[i % 3] for i in range(200)],
        "top_k": [(None, 5, 50, 0, 2)[i % 5] for i in range(200)],
        "min_p": [(None, 0.1)[i % 7 == 0] for i in range(200)],
    },
}


@pytest.fixture(scope="module")
def alone(build) -> dict[str, list[list[int]]]:
    return {name: build().generate(PROMPTS, BUDGETS, seed=1, **setting)[0] for name, setting in SETTINGS.items()}


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_200_prompts_give_the_tokens_of_the_model_alone(alone, build, setting, kind, rows):
    llama = build(kind, rows)
    assert llama.generate(PROMPTS, BUDGETS, seed=1, **SETTINGS[setting])[0] == alone[setting]
    counts = llama._engine.counters.speculation
    rate = counts.accepted / counts.proposed
    assert {"near": 0.5 < rate < 0.99, "bad": rate < 0.1, "ngram": 0 < rate < 0.9}[kind], rate


def counts_of_pairs(answers: list[list[int]], states: list[int]) -> torch.Tensor:
    """How often each token followed each other token: [n, n]."""
    pairs = Counter(pair for answer in answers for pair in itertools.pairwise(answer))
    assert sum(pairs.values()) == sum(pairs[a, b] for a in states for b in states)
    return torch.tensor([[pairs[a, b] for b in states] for a in states], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["near", "bad"])
def test_100_000_sampled_tokens_have_the_models_distribution(kind):
    """Without layers, the distribution of a token depends only on the token before it, and is known."""
    generator = torch.Generator().manual_seed(0)
    shape = {"dim": 8, "n_layers": 1, "n_heads": 1, "multiple_of": 8, "vocab_size": 16}
    model, draft = (random_model(0, 0.5, **shape, max_seq_len=1024, max_batch_size=100) for _ in range(2))
    for m in (model, draft):
        m.layers[0].attention.wo.weight.zero_()
        m.layers[0].feed_forward.w2.weight.zero_()
    noise = 0.05 if kind == "near" else 3
    draft.output.weight.add_(noise * torch.randn(draft.output.weight.shape, generator=generator))
    llama = Llama(model, Bytes(), proposer=DraftModel(draft))
    answers, _ = llama.generate([[3]], 1001, 1.3, 1.0, num_return_sequences=100, seed=5)
    counts = counts_of_pairs(answers, list(range(16)))
    assert counts.sum() == 100_000
    for token in range(16):
        expected = torch.softmax(model(torch.tensor([[token]]))[0, -1].double() / 1.3, -1) * counts[token].sum()
        assert expected.min() > 5
        assert chi_square_is_plausible(counts[token], expected)
    speculation = llama._engine.counters.speculation
    rate = speculation.accepted / speculation.proposed
    assert (rate > 0.6) == (kind == "near"), rate


class Bytes:
    """The parts of a tokenizer that generating ids needs."""

    kind, stop_tokens, special_tokens, n_words = "llama3", frozenset(), {}, 16

    def token_bytes(self, token: int) -> bytes:
        return bytes([65 + token])

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(65 + token for token in ids)


def test_the_coupling_accepts_at_least_as_often_as_proved():
    """Two races with the same random numbers agree with probability at least (1 - d) / (1 + d); here once exactly."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(40_000, 8, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    for i in range(6):
        p, q = torch.rand(2, 8, generator=generator, dtype=torch.float64).pow(1 + i) + 1e-6
        if i == 0:  # each has a token that the other does not have
            p, q = torch.tensor([[1.0] * 7 + [1e-9], [1e-9] + [1.0] * 7], dtype=torch.float64)
        p, q = p / p.sum(), q / q.sum()
        d = 1 - torch.minimum(p, q).sum().item()
        agreed = (race(p.expand_as(uniform), uniform) == race(q.expand_as(uniform), uniform)).double().mean().item()
        assert agreed > (1 - d) / (1 + d) - 0.01
        assert i > 0 or agreed == pytest.approx((1 - d) / (1 + d), abs=0.01)


OPTIONS = {
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logit_bias": {5: 4.0, 6: -100.0}},
    "greedy penalties": {"temperature": 0, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "stops": {"stop": ["A", 100, "é"], "temperature": 1.5},
    "samples": {"num_return_sequences": 5, "temperature": 1.3},
    "details": {"logprobs": True, "echo": True, "top_logprobs": 3, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "temperature": 0},
    "nothing new": {"max_gen_len": 0, "echo": True, "logprobs": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_what_it_gives_alone(build, name, kind):
    options = {"max_gen_len": 25, "seed": 4} | OPTIONS[name]
    plain, llama = build(), build(kind)
    prompts = [*PROMPTS[:9], [65, 66, 67] * 12]
    expected, found = ([a for group in x.answer(prompts, **options) for a in group] for x in (plain, llama))
    for a, b in zip(expected, found, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        for values in ("token_logprobs", "prompt_token_logprobs"):
            assert getattr(b, values) == pytest.approx(getattr(a, values), abs=1e-4)
        for top in ("top_logprobs", "prompt_top_logprobs"):
            assert [[i for i, _ in row] for row in getattr(a, top)] == [[i for i, _ in row] for row in getattr(b, top)]
    if kind == "near":
        assert (llama._engine.counters.speculation.accepted > 0) == (name not in ("beams", "nothing new"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_is_called_as_without_proposals(build, kind):
    """Also a processor with state, which should see each token once."""

    def calls_of(llama: Llama) -> tuple[list, dict]:
        calls: dict[int, list] = {}

        def processor(ids, scores):
            calls.setdefault(ids[0, 0].item(), []).append(ids[0].tolist())
            scores[:, len(calls[ids[0, 0].item()]) * 7 % 512] += 20
            return scores

        return llama.generate(
            [[i, 5] for i in range(6)], 12, temperature=0.9, seed=1, logits_processor=processor
        ), calls

    assert calls_of(build(kind)) == calls_of(build())


def breaks(ids, scores):
    if ids[0, 0] == 2 and ids.shape[1] == 9:
        raise RuntimeError("by accident")
    return scores


def test_a_row_that_fails_ends_alone(build):
    expected, _ = build().generate([[1], [2], [3]], 20, temperature=0)
    for kind in KINDS:
        with pytest.raises(GenerationError, match="prompt 1: logits_processor breaks raised RuntimeError") as caught:
            build(kind).generate([[1], [2], [3]], 20, temperature=0, logits_processor=breaks)
        answers = [group[0].tokens for group in caught.value.answers]
        assert answers == [expected[0], expected[1][:8], expected[2]]


def keys_and_values(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Keys and values of some ids, computed by a separate pass: [2, n_layers, n_kv_heads, T, head_dim]."""
    fresh = Transformer(model.args)
    fresh.load_state_dict(model.state_dict())
    fresh.allocate_cache()
    with torch.inference_mode():
        fresh.hidden_states(torch.tensor([ids]), 0)
    return torch.stack([*fresh.cache.keys, *fresh.cache.values])[:, 0, :, : len(ids)]


@pytest.mark.parametrize("kind", ["near", "bad"])
def test_both_caches_hold_what_their_records_say(build, kind):
    """Prompts of every length come and go, some fill the context, and a stream is closed."""
    llama = build(kind, 4, max_seq_len=320)
    draft = llama._engine.proposer
    stream = llama.stream_text("a stream that is open meanwhile", temperature=1.0, seed=1)
    next(stream)
    llama.generate(PROMPTS[:12], [None if i % 3 == 0 else i for i in range(12)], temperature=0.7, seed=3)
    stream.close()
    llama.generate(PROMPTS[:3], 9, num_return_sequences=3, temperature=1.0, seed=3)
    for model, slots in ((llama.model, llama._engine.slots), (draft.model, draft.slots)):
        assert sum(len(ids) > 0 for ids in slots.tokens) == 4
        for slot, ids in enumerate(slots.tokens):
            held = torch.stack([*model.cache.keys, *model.cache.values])[:, slot, :, : len(ids)]
            torch.testing.assert_close(held, keys_and_values(model, ids), atol=1e-4, rtol=1e-4)


def test_after_a_pause_a_draft_holds_what_its_record_says(build):
    """Steps without proposals move sequences: a sequence that the draft never saw may come before others."""
    draft = build("near", 4)._engine.proposer
    a, b, c, d, e = (
        Sequence([i] * 40, 90, DecodingOptions(temperature=0), RandomStream(1, [i] * 40)) for i in range(5)
    )
    # The last but one time, b was used least recently; then d comes before it.
    for sequences, limits in (([a, b, c, e], [2, 2, 2, 2]), ([a, b, c, e], [2, 0, 2, 2]), ([d, b, a], [2, 2, 2])):
        draft.propose(sequences, limits)
        for slot, sequence in enumerate(sequences):
            text, ids = sequence.prompt + sequence.tokens, draft.slots.tokens[slot]
            assert ids[: len(text)] == text[: len(ids)] and len(ids) >= len(text) - 1
            held = torch.stack([*draft.model.cache.keys, *draft.model.cache.values])[:, slot, :, : len(ids)]
            torch.testing.assert_close(held, keys_and_values(draft.model, ids), atol=1e-4, rtol=1e-4)
            if sequence is not b:
                sequence.tokens += [7]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_to_the_end_of_the_context_beside_others(build, kind):
    prompts = [[9] * 126, [1, 2, 3] * 30, [4], list(range(120))]
    options = {"temperature": 0.8, "seed": 2, "max_gen_len": [None, None, 60, None]}
    plain = build(None, 4, 128)
    plain.tokenizer.stop_tokens = set()
    llama = build(kind, 4, 128)
    llama.tokenizer.stop_tokens = set()
    answers = llama.generate(prompts, **options)
    assert answers == plain.generate(prompts, **options)
    assert [len(answer) for answer in answers[0]] == [2, 38, 60, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_give_the_same_pieces_joined_and_interleave(build, kind):
    texts = ["the one, the one, the one", "and another"]
    options = {"temperature": 0.9, "seed": 3, "max_gen_len": 40, "stop": "zz"}
    expected = [p["generation"] for t in texts for p in build().text_completion([t], **options)]
    llama = build(kind)
    one, two = (llama.stream_text(t, **options) for t in texts)
    pieces = [next(one), next(two), next(one)]
    assert pieces[0] + pieces[2] + "".join(one) == expected[0]
    assert pieces[1] + "".join(two) == expected[1]


def test_a_draft_does_not_run_what_it_has_run(build, monkeypatch):
    """The draft runs each prompt once, each token it proposes except the last, and one or two tokens to catch up."""
    llama = build("near", 4)
    llama.tokenizer.stop_tokens = set()
    prompts = [[i] * 100 for i in range(8)]
    recorded = []
    record = llama._engine.proposer.slots.record
    monkeypatch.setattr(
        llama._engine.proposer.slots, "record", lambda slot, at, ids: (recorded.append(len(ids)), record(slot, at, ids))
    )
    llama.generate(prompts, 30, temperature=0)
    counts = llama._engine.counters.speculation
    assert sum(recorded) <= sum(map(len, prompts)) + counts.proposed + counts.steps
    recorded.clear()
    llama.generate([[*[7] * 100, 4]], 3, temperature=0)  # shares its beginning with one that is still in the cache
    assert sum(recorded) < 10


def test_a_long_prompt_reaches_the_draft_in_pieces(build):
    """Until the whole prompt has run, it has no proposals; the other sequences keep theirs."""
    prompts = [torch.randint(0, 256, (PREFILL_TOKENS + 900,)).tolist(), [1, 2, 3]]
    expected, _ = build(None, 2, 6000).generate(prompts, 20, temperature=0)
    llama = build("target", 2, 6000)
    draft = llama._engine.proposer.model
    hidden_states, sizes = draft.hidden_states, []
    draft.hidden_states = lambda tokens, *where: (sizes.append(tokens.numel()), hidden_states(tokens, *where))[1]
    assert llama.generate(prompts, 20, temperature=0)[0] == expected
    assert llama._engine.counters.speculation.accepted > 10
    assert max(sizes) <= PREFILL_TOKENS


def test_the_model_as_its_own_draft_has_every_proposal_accepted(build):
    llama = build("target")
    llama.tokenizer.stop_tokens = set()
    (answer,) = llama.answer([[1, 2, 3]], max_gen_len=40, temperature=1.0, seed=0)[0]
    counts = answer.speculation
    assert counts.accepted == counts.proposed > 0
    # The prefill gives a token, the first step another (proposals begin then); then 4 + 1, 6 + 1 and 8 + 1 a step.
    assert counts.steps == 1 + 1 + 1 + 3
    assert counts.proposed + counts.steps == 39


def test_a_row_with_bad_proposals_gets_one_and_a_row_with_good_ones_eight(build):
    asked = []

    class Half:
        """The first row's proposals are its own answer; the other row's are always wrong."""

        def propose(self, sequences, limits):
            asked.append(limits)
            return [expected[0][len(s.tokens) :][:n] if s.prompt == [1] else [6] * n for s, n in zip(sequences, limits)]

    plain, llama = build(), build()
    for x in (plain, llama):
        x.tokenizer.stop_tokens = set()
    options = {"max_gen_len": 60, "temperature": 1.0, "seed": 0, "logit_bias": {6: float("-inf")}}
    expected, _ = plain.generate([[1], [2]], **options)
    proposing = Llama(llama.model, llama.tokenizer, proposer=Half())
    assert proposing.generate([[1], [2]], **options)[0] == expected
    assert asked[:5] == [[4, 4], [6, 3], [MAX_PROPOSALS, 2], [MAX_PROPOSALS, 1], [MAX_PROPOSALS, 1]]


def test_ngrams_are_looked_up_longest_and_latest_first():
    index = NgramIndex([1, 2, 3, 10, 9, 2, 3, 20, 8, 3, 30, 1, 2, 3])
    assert index.following(4) == [10, 9, 2, 3]  # after 1 2 3, not after the later 2 3 or 3
    index.extend([4])
    assert index.following(4) == []
    index.extend([2, 3])
    assert index.following(2) == [4, 2]  # 2 3: the latest
    index.extend([3])
    assert index.following(5) == [3, 3, 3, 3, 3]  # after 3 came 3: read on into what is proposed
    assert NgramIndex([5]).following(3) == []
    assert NgramIndex([5, 6, 5, 6, 5]).following(4) == [6, 5, 6, 5]


def test_a_draft_of_nans_changes_nothing(build):
    llama = build("near")
    for weight in llama._engine.proposer.model.parameters():
        weight.fill_(torch.nan)
    for options in ({"temperature": 0}, {"top_p": 0.5, "seed": 1}, {"temperature": 1.0, "top_p": 1.0, "seed": 1}):
        assert llama.generate(PROMPTS[:9], 9, **options) == build().generate(PROMPTS[:9], 9, **options)


@pytest.mark.parametrize("which", ["model", "draft"])
def test_a_step_that_breaks_off_leaves_the_next_call_right(build, which):
    llama = build("near")
    broken = llama.model if which == "model" else llama._engine.proposer.model
    expected = build().generate(PROMPTS[:5], 12, temperature=0)
    llama.generate(PROMPTS[:2], 12, temperature=0)
    hidden_states, calls = broken.hidden_states, []

    def fails(*args):
        calls.append(args)
        if len(calls) > 4:
            raise MemoryError("none left")
        return hidden_states(*args)

    broken.hidden_states = fails
    with pytest.raises(MemoryError, match="none left"):
        llama.generate(PROMPTS[:5], 12, temperature=0)
    assert not any(llama._engine.slots.tokens + llama._engine.proposer.slots.tokens)  # may be half written
    broken.hidden_states = hidden_states
    assert llama.generate(PROMPTS[:5], 12, temperature=0) == expected


def test_a_missing_draft_directory_is_named():
    with pytest.raises(
        FileNotFoundError, match="draft = 'ngrams': expected the directory of a smaller model, or 'ngram'"
    ):
        Llama.build(DEMO, draft="ngrams", device="cpu")


def test_the_counts_are_in_the_predictions_of_a_model_with_a_draft_alone(build):
    ((plain,), (drafted,)) = (x.text_completion(["abcabcabc"], 0, max_gen_len=20) for x in (build(), build("ngram")))
    assert set(plain) == {"generation", "finish_reason"}
    assert plain["generation"] == drafted["generation"]
    assert set(drafted) == {"generation", "finish_reason", "speculation"}
    assert set(drafted["speculation"]) == {"steps", "proposed", "accepted"}
    chat = build("ngram").chat_completion([[{"role": "user", "content": "ab"}]] * 2, max_gen_len=5)
    assert all("speculation" in prediction for prediction in chat)


SCRIPT = """
import json, sys
import torch.distributed as dist
from llama import Llama
from llama.decoding.payoff import Trials
target, draft, odd, model_parallel_size, prompts, out = sys.argv[1:]
options = {"max_batch_size": 4, "model_parallel_size": int(model_parallel_size), "device": "cpu"}
refused = ""
try:
    Llama.build(target, draft=odd, **options)
except ValueError as error:
    refused = str(error)
llama = Llama.build(target, draft=draft, **options)
llama.tokenizer.stop_tokens = {7, 300}
prompts = json.load(open(prompts))
answers = [llama.generate(prompts, 8, seed=1, temperature=t, num_return_sequences=2)[0] for t in (0, 1.0)]
accepted = llama._engine.counters.speculation.accepted
# The ranks' clocks disagree from now on: after its next window, the first would go on without proposals.
decision = [False, 1000] if dist.get_rank() == 0 else [True, 16]
Trials._decide = lambda self: decision
llama._engine.payoff._trials.clear()
answers.append(llama.generate(prompts, 40, seed=1, temperature=0)[0])
stopped = [not trials.proposing for trials in llama._engine.payoff._trials.values()]
json.dump([answers, accepted, any(stopped), refused], open(f"{out}.{dist.get_rank()}", "w"))
"""


@pytest.mark.parametrize("kind, model_parallel_size", [("near", 2), ("ngram", 1)])
def test_two_processes_give_the_same_tokens_split_or_as_replicas(build, folders, tmp_path, kind, model_parallel_size):
    llama = build()
    prompts = [*PROMPTS[:10], [65, 66] * 10]
    expected = [llama.generate(prompts, 8, seed=1, temperature=t, num_return_sequences=2)[0] for t in (0, 1.0)]
    expected.append(llama.generate(prompts, 40, seed=1, temperature=0)[0])
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "script.py").write_text(SCRIPT)
    odd = write(tmp_path / "odd", random_model(0, **SMALL | {"n_heads": 1, "n_kv_heads": 1}))
    drafts = [folders.get(kind, kind), odd]
    arguments = [folders["target"], *drafts, model_parallel_size, tmp_path / "prompts.json", tmp_path / "out"]
    result = ranks(2, tmp_path / "script.py", *arguments)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        answers, accepted, stopped, refused = json.loads((tmp_path / f"out.{rank}").read_text())
        assert answers == expected
        assert accepted > 0
        assert stopped == (rank == 0 or model_parallel_size == 2)
        assert (": 1 heads with 1 of keys and values cannot be shared out" in refused) == (model_parallel_size == 2)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for module in (lora, speculative):
        monkeypatch.setattr(module, "build_model", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_draft_with_another_tokenizer_is_refused(build, folders, tmp_path):
    larger = write(tmp_path / "larger", random_model(0, **SMALL | {"vocab_size": 513}))
    with pytest.raises(ValueError, match=r"draft .*larger cannot propose.*n_words = 513: expected the model's, 512"):
        build(str(larger))
    other = shutil.copytree(folders["target"], tmp_path / "other")
    lines = (other / "tokenizer.model").read_text().splitlines()
    lines[65], lines[66] = f"{lines[66].split()[0]} 65", f"{lines[65].split()[0]} 66"
    (other / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"token 65 is b'B' in the draft's tokenizer: expected the model's, b'A'"):
        build(str(other))


def test_which_differences_of_tokenizers_count(folders):
    path = folders["target"] / "tokenizer.model"
    target, draft = Tokenizer(path), Tokenizer(path)
    draft._model.token_bytes[260] = b"<|another_name|>"  # of a reserved token
    check_tokenizer(draft, target)
    draft.special_tokens.popitem()
    with pytest.raises(ValueError, match="token 511 is special in the model's tokenizer alone"):
        check_tokenizer(draft, target)
    draft.eot_id = 300
    with pytest.raises(ValueError, match="the draft's tokenizer has eot_id = 300: expected the model's, 265"):
        check_tokenizer(draft, target)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_invalid_draft_is_refused(build, folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="draft = 3: expected a directory, 'ngram' or None"):
        Llama.build(folders["target"], draft=3, device="cpu")


def test_the_terminal_prints_how_many_proposals_were_accepted(capsys):
    from llama.cli.commands import main

    options = ["--temperature", "0", "--max_gen_len", "30", "--device", "cpu", "--dtype", "float32"]
    said = []
    for draft in ([], ["--draft", "ngram"], ["--draft", str(DEMO)]):
        main(["complete", "One day", *options, *draft])
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out == said[2].out
    assert "tokens a step" not in said[0].err
    assert re.search(r"\(1\.\d\d tokens a step: \d+ of \d+ proposals accepted\)\n$", said[1].err)
    per_step, accepted, proposed = re.findall(r"[\d.]+", said[2].err.splitlines()[-1])
    assert accepted == proposed
    assert float(per_step) > 4
