"""The commands that train: `llama finetune` and `llama merge`. Arguments become calls; nothing else happens here."""

from llama.training import Options
from llama.training.sft import finetune as run_finetuning


def finetune(
    data: str,
    out: str,
    *,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    learn: str = "answers",
    threshold: float | None = None,
    temperature: float = 1.0,
    long: str = "skip",
    head: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str | None = None,
    batch_tokens: int = 16384,
    pass_tokens: int | None = None,
    pack: bool = True,
    epochs: float = 1.0,
    steps: int | None = None,
    lr: float | None = None,
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    eval_share: float = 0.0,
    eval_every: int = 100,
    save_every: int = 100,
    dtype: str | None = None,
    recompute: bool = False,
    device: str | None = None,
    model_parallel_size: int = 1,
    seed: int = 1,
    to: str = "meta",
    force: bool = False,
) -> None:
    """Fine-tunes a checkpoint on a file of texts or dialogs. Killed and started again, it goes on.

    Under torchrun, the processes that the model is not split over are replicas.

    Args:
        data: JSON lines, CSV or Parquet with `messages`, `prompt` and `completion`, or `text`; or what `llama sample`
            wrote; with --head scalar, `chosen` and `rejected`.
        out: the directory to make. OUT.training beside it has the log, the curves and, meanwhile, the saves.
        ckpt_dir: the checkpoint to start from, Meta's or Hugging Face's; quantised ones with --lora_rank.
        tokenizer_path: the tokenizer's file; the directory's own when left out.
        max_seq_len: the most tokens of a document, and of a packed row.
        learn: what of a dialog is learned: "answers", "last" (the last answer) or "all".
        threshold: of what `llama sample` wrote, all answers with at least this score; the best when left out.
        temperature: what logits are divided by in the loss: that of the sampling that the answers are from.
        long: what becomes of longer documents: "skip" or "cut". Both are counted.
        head: "scalar" trains a reward model.
        lora_rank: trains an adapter of this rank, in PEFT's format, and not the weights.
        lora_alpha: its scale is lora_alpha / lora_rank; twice the rank when left out.
        lora_targets: the matrices that get one, such as wq,wv; all of wq, wk, wv, wo, w1, w2, w3 when left out.
        batch_tokens: the most tokens of a step.
        pass_tokens: the most tokens of one forward pass; as many as a step, but at most 8192, when left out.
        pack: whether documents share a row; they do not see each other.
        epochs: how often the data is gone through; may be a fraction.
        steps: at most so many.
        lr: the largest learning rate; 1e-5 when left out, 2e-4 with an adapter.
        warmup: the share of the steps in which it rises; then it falls as a cosine.
        weight_decay: of all but the norms.
        clip: the largest norm of a gradient; 0 for no limit.
        eval_share: the share of the examples that is held out.
        eval_every: steps from one evaluation to the next.
        save_every: steps from one save to the next.
        dtype: of the computation, such as "bfloat16"; the weights that learn are float32.
        recompute: computes activations twice, to save memory.
        device: "cuda", "mps" or "cpu"; the first of these that is there when left out.
        model_parallel_size: over how many processes the model is split.
        seed: of the order of the data and the first weights of an adapter or a head.
        to: the format of the weights written, "meta" or "hf".
        force: forgets a run that was started otherwise, and starts over.
    """
    given = dict(locals())
    places = ("data", "out", "ckpt_dir", "tokenizer_path", "device", "model_parallel_size", "force")
    where = {name: given.pop(name) for name in places}
    if isinstance(given["lora_targets"], (list, tuple)):  # fire reads wq,wv as a pair
        given["lora_targets"] = ",".join(given["lora_targets"])
    run_finetuning(where.pop("data"), where.pop("out"), where.pop("ckpt_dir"), Options(**given), **where)


def merge(
    src: str, adapter: str, dst: str, to: str = "meta", shards: int | None = None, dtype: str | None = None
) -> None:
    """Writes a checkpoint directory again with an adapter folded into its weights.

    Args:
        src: the directory that the adapter was trained on, of either format; not quantised.
        adapter: the adapter's directory, as `llama finetune` and PEFT write it.
        dst: the directory to make.
        to: "meta" or "hf".
        shards: into how many files the weights are cut.
        dtype: of the weights written; the source's when left out.
    """
    from llama.adapters import merge

    merge(src, adapter, dst, to, shards, dtype)
    print(f"wrote {dst}")
