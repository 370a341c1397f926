"""Names that only scripts written against Meta's code need; nothing of the package uses them itself.

They are importable from where those scripts look for them: `llama.generation` and `llama`.
"""

import torch

from llama.sampling import filtered

# The tags of Llama 2's chat format.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"


def sample_top_p(probs: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws from the nucleus: the smallest set of most likely tokens that holds at least `p` of the probability.

    Tokens of equal probability enter in the order of their ids. (Meta's function of this name also keeps the next
    token when the set holds exactly `p`.) Holtzman et al. 2019, arXiv 1904.09751.

    Args:
        probs: probabilities, [..., vocab_size].
        p: in (0, 1].
        generator: PyTorch's global one when None.

    Returns:
        ids, int64 [..., 1].

    Raises:
        ValueError: `p` outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p = {p}: expected a number in (0, 1]")
    if probs.device.type == "mps":  # which has no float64
        return sample_top_p(probs.cpu(), p, generator).to(probs.device)
    rows = probs.reshape(-1, probs.shape[-1])
    weights, ids = filtered(rows, *torch.tensor([[0.0], [p], [0.0]], dtype=torch.float64, device=probs.device))
    drawn = torch.multinomial(weights, num_samples=1, generator=generator)
    return ids.gather(-1, drawn).reshape(*probs.shape[:-1], 1)
