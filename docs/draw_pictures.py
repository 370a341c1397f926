"""Draws the pictures of docs/how_it_works.md: `python docs/draw_pictures.py`.

The house is read from the folders of `llama/`. The slots and the shared prefix come from real runs of the embedded
checkpoint, in float32, by the engine's own records; what a token costs is counted from the shapes of Llama 3.1 8B. So
the same pictures come out each time, and a test compares them with those in the repository.
"""

from pathlib import Path
from xml.sax.saxutils import escape

import torch

from llama import Llama, ModelArgs
from llama.engine import Engine
from llama.options import DecodingOptions
from llama.sampling import RandomStream
from llama.sequence import Sequence

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
DEMO = ROOT / "demo" / "checkpoint"

# From the ground up; the files of the course are on the landing, everything else has a house of its own.
FLOORS = [
    ["tokenizer/", "parallel/", "kv_cache.py", "sampling.py", "options.py", "sequence.py"],
    ["layers/"],
    ["model.py"],
    ["decode_step.py", "checkpoint/"],
    ["adapters/"],
    ["engine.py"],
    ["decoding/"],
    ["generation.py"],
    ["datasets/"],
    ["rejection_sampling/", "training/", "server/"],
    ["cli/"],
]
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#004488", "#997700", "#777777"]
INK, PALE, LINE = "#222222", "#eef2f6", "#9aa7b4"


class Drawing:
    """An SVG on white, in user units of one pixel."""

    def __init__(self, width: int, height: int, title: str):
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="13" role="img"><title>{escape(title)}</title>'
        )
        self.parts = [f'<rect width="{width}" height="{height}" fill="white"/>']

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{line}"/>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start", fill: str = INK, size: int = 13) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{escape(text)}</text>'
        )

    def path(self, points: list[tuple[float, float]], colour: str, dash: str = "none") -> None:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )

    def __str__(self) -> str:
        return "\n".join([self.head, *self.parts, "</svg>", ""])


def house() -> Drawing:
    """Who may import whom: each row only from the rows below it."""
    floors = [[room for room in floor if (ROOT / "llama" / room).exists()] for floor in FLOORS]
    drawing = Drawing(760, 40 * len(floors) + 50, "The houses of the package")
    drawing.text(
        20, 24, "Each row imports only from the rows below it. Filled: the course, on the landing of llama/.", size=14
    )
    for row, floor in enumerate(reversed(floors)):
        width = 720 / len(floor)
        for column, room in enumerate(floor):
            is_course = room.endswith(".py")
            x, y = 20 + column * width, 40 + 40 * row
            drawing.box(x + 2, y, width - 4, 34, COLOURS[0] if is_course else PALE, LINE)
            drawing.text(x + width / 2, y + 22, room, "middle", "white" if is_course else INK)
    return drawing


def sequence(llama: Llama, text: str, budget: int) -> Sequence:
    ids = llama.tokenizer.encode(text, bos=True)
    return Sequence(ids, budget, DecodingOptions(temperature=0), RandomStream(0, ids))


def slots() -> Drawing:
    """Eight prompts in four slots, step by step."""
    llama = Llama.build(DEMO, max_seq_len=128, max_batch_size=4, device="cpu", dtype="float32")
    engine = Engine(llama.model)
    texts = [
        "Once upon a time",
        "The fox",
        "One day",
        "In the forest",
        "A little bird",
        "The sun",
        "Far away",
        "The king",
    ]
    waiting = [sequence(llama, text, n) for text, n in zip(texts, [22, 5, 9, 14, 16, 6, 3, 10])]
    numbers = {s: i for i, s in enumerate(waiting)}
    for s in waiting:
        engine.add(s)
    history: list[list[tuple[int, bool]]] = []  # for each step and slot: whose token, and whether it is the first
    while engine.has_work:
        before = {s: len(s.tokens) for s in numbers}
        order: list[Sequence] = []
        decode = engine._decode
        engine._decode = lambda order=order, decode=decode: (order.extend(engine.running), decode())
        engine.step()
        del engine._decode
        history.append([(numbers[s], before[s] == 0) for s in order])
    cell, left, top = 24, 70, 50
    drawing = Drawing(
        left + cell * len(history) + 20, top + 4 * 34 + 60, "Continuous batching: eight prompts in four slots"
    )
    drawing.text(20, 26, "Eight prompts, four slots: a slot that is free is given to the next prompt at once.", size=14)
    for slot in range(4):
        drawing.text(20, top + 34 * slot + 20, f"slot {slot}")
    for step, row in enumerate(history):
        for slot, (number, is_first) in enumerate(row):
            x, y = left + cell * step, top + 34 * slot
            drawing.box(x, y, cell - 2, 28, COLOURS[number], INK if is_first else "none")
            drawing.text(x + cell / 2 - 1, y + 19, "P" if is_first else str(number + 1), "middle", "white")
    drawing.text(
        left,
        top + 4 * 34 + 22,
        "a column is a step of the engine; P: the prompt is run, and two tokens decided",
    )
    drawing.text(left, top + 4 * 34 + 42, f"{len(history)} steps for {sum(len(s.tokens) for s in numbers)} tokens")
    return drawing


def prefix() -> Drawing:
    """Three questions behind one system prompt: what runs, and what is taken from the cache."""
    llama = Llama.build(DEMO, max_seq_len=256, max_batch_size=4, device="cpu", dtype="float32")
    system = {"role": "system", "content": "You are a helpful assistant. Always answer with emojis."}
    questions = ["How are you?", "What is the sun?", "Tell me about the sea."]
    rows = []
    for question in questions:
        counters = llama._engine.counters
        before = counters.reused, counters.prefilled
        llama.chat_completion([[system, {"role": "user", "content": question}]], temperature=0, max_gen_len=1)
        rows.append((question, counters.reused - before[0], counters.prefilled - before[1]))
    scale, left = 12, 190
    widest = max(reused + run for _, reused, run in rows)
    drawing = Drawing(left + scale * widest + 60, 190, "The cache with a shared prefix")
    drawing.text(20, 26, "Three dialogs with the same system prompt: what they share is run once.", size=14)
    for i, (question, reused, run) in enumerate(rows):
        y = 50 + 34 * i
        drawing.text(20, y + 19, question)
        drawing.box(left, y, scale * reused, 28, PALE, LINE)
        drawing.box(left + scale * reused, y, scale * run, 28, COLOURS[0])
        if reused:
            drawing.text(left + scale * reused / 2, y + 19, f"{reused} tokens from the cache", "middle")
        drawing.text(left + scale * (reused + run / 2), y + 19, f"{run} run", "middle", "white")
    drawing.text(left, 172, "tokens of the prompt, by the engine's own counters")
    return drawing


def cost() -> Drawing:
    """Gigabytes that are read for one token of each sequence, against how many sequences share a step."""
    args = ModelArgs(4096, 32, 32, 8, 128256, 1024, 1.3)
    matrices = args.dim * args.dim * 2 + 2 * args.dim * args.n_kv_heads * args.head_dim + 3 * args.dim * args.hidden_dim
    weights = 2 * (args.n_layers * matrices + args.vocab_size * args.dim)  # bfloat16; of the embedding, single rows
    keys = 2 * 2 * args.n_layers * args.n_kv_heads * args.head_dim  # of one position
    batches, left, top, width, height = [1, 2, 4, 8, 16, 32, 64], 70, 50, 560, 240
    drawing = Drawing(780, 350, "What a token costs")
    drawing.text(20, 26, "Gigabytes read for one token, Llama 3.1 8B in bfloat16", size=14)
    for tick in range(0, 21, 4):
        y = top + height * (1 - tick / 20)
        drawing.path([(left, y), (left + width, y)], "#dddddd")
        drawing.text(left - 10, y + 5, str(tick), "end")
    for i, (length, colour) in enumerate(zip((128, 4096, 32768), COLOURS)):
        points = []
        for k, batch in enumerate(batches):
            gigabytes = (weights / batch + keys * length) / 1e9
            points.append((left + width * k / (len(batches) - 1), top + height * (1 - gigabytes / 20)))
        drawing.path(points, colour)
        drawing.path([(560, 66 + 22 * i), (590, 66 + 22 * i)], colour)
        drawing.text(600, 70 + 22 * i, f"after {length:,} tokens")
    for k, batch in enumerate(batches):
        drawing.text(left + width * k / (len(batches) - 1), top + height + 20, str(batch), "middle")
    drawing.text(left + width / 2, top + height + 44, "sequences that share a step", "middle")
    return drawing


PICTURES_DRAWN = (house, slots, prefix, cost)


def main() -> None:
    torch.set_num_threads(1)
    for draw in PICTURES_DRAWN:
        (PICTURES / f"{draw.__name__}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
