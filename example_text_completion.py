"""Four openings and how a model continues them.

python example_text_completion.py                                        # the embedded demo checkpoint
torchrun --nproc_per_node 1 example_text_completion.py \
    --ckpt_dir Meta-Llama-3-8B/ --tokenizer_path Meta-Llama-3-8B/tokenizer.model \
    --max_seq_len 128 --max_batch_size 4
"""

from pathlib import Path

import fire

from llama import Llama

DEMO = Path(__file__).parent / "demo" / "checkpoint"


def main(
    ckpt_dir: str = str(DEMO),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
):
    """Prints four openings with the model's continuations.

    Args:
        ckpt_dir: a directory with params.json and consolidated.NN.pth; the embedded checkpoint by default.
        tokenizer_path: tokenizer.model of ckpt_dir by default.
        temperature: of sampling; 0 always takes the most likely token.
        top_p: samples from the most likely tokens that hold this much of the probability.
        max_seq_len: room for an opening and its continuation, in tokens.
        max_gen_len: the most tokens of a continuation.
        max_batch_size: how many openings are continued at a time.
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)

    # No space at the end of an opening: a token usually begins with its space.
    prompts = [
        "I believe the meaning of life is",
        # A task shown by examples, which the model continues.
        "Translate English to French:\n\nhouse => maison\nbread => pain\nwater => eau\ncheese =>",
        "A brief message congratulating the team on the launch:\n\nHi everyone,\n\nI just",
        "Once upon a time, there was a little fox who",
    ]
    answers = llama.text_completion(prompts, temperature, top_p, max_gen_len)

    for prompt, answer in zip(prompts, answers):
        print(prompt)
        print(f"> {answer['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    fire.Fire(main)
