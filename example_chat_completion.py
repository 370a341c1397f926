"""Four dialogs and a model's answers to them.

python example_chat_completion.py                                        # the embedded demo checkpoint
torchrun --nproc_per_node 1 example_chat_completion.py \
    --ckpt_dir Meta-Llama-3-8B-Instruct/ --tokenizer_path Meta-Llama-3-8B-Instruct/tokenizer.model \
    --max_seq_len 512 --max_batch_size 6
"""

from pathlib import Path

import fire

from llama import Dialog, Llama

DEMO = Path(__file__).parent / "demo" / "checkpoint"


def main(
    ckpt_dir: str = str(DEMO),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
):
    """Prints four dialogs with the model's answers.

    Args:
        ckpt_dir: a directory with params.json and consolidated.NN.pth; the embedded checkpoint by default.
        tokenizer_path: tokenizer.model of ckpt_dir by default.
        temperature: of sampling; 0 always takes the most likely token.
        top_p: samples from the most likely tokens that hold this much of the probability.
        max_seq_len: room for a dialog and its answer, in tokens.
        max_batch_size: how many dialogs are answered at a time.
        max_gen_len: the most tokens of an answer; by default as many as fit.
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)

    dialogs: list[Dialog] = [
        [{"role": "user", "content": "what is the recipe of mayonnaise?"}],
        [
            {"role": "user", "content": "I am going to Paris, what should I see?"},
            {
                "role": "assistant",
                "content": "Here are three things to see in Paris:\n\n"
                "1. The Eiffel Tower: an iron tower with a wide view over the city.\n"
                "2. The Louvre: a great museum in an old palace, home of the Mona Lisa.\n"
                "3. Notre-Dame: an old cathedral on an island in the river Seine.",
            },
            {"role": "user", "content": "What is so great about #1?"},
        ],
        [
            {"role": "system", "content": "Always answer with Haiku"},
            {"role": "user", "content": "I am going to Paris, what should I see?"},
        ],
        [
            {"role": "system", "content": "Always answer with emojis"},
            {"role": "user", "content": "How to go from Beijing to NY?"},
        ],
    ]
    answers = llama.chat_completion(dialogs, temperature, top_p, max_gen_len)

    for dialog, answer in zip(dialogs, answers):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        print(f"> Assistant: {answer['generation']['content']}")
        print("\n==================================\n")


if __name__ == "__main__":
    fire.Fire(main)
