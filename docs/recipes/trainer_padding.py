"""A transformers Trainer with padded batches: spectra of the tokens alone, beside a plain hook."""

import time

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from fastcov.integrations.transformers import FastcovCallback

torch.set_num_threads(1)
LAYER = "bert.encoder.layer.1.intermediate.dense"


def examples(count: int) -> list[dict[str, list[int]]]:
    """Sentences of 4 to 48 tokens; the label is the first token's parity."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 49, (count,), generator=generator).tolist()
    sentences = [torch.randint(5, 500, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": words, "labels": words[0] % 2} for words in sentences]


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Batch filled up to 48 tokens, with the mask that says which are real."""
    ids, mask = torch.zeros(2, len(batch), 48, dtype=torch.long)
    for row, example in enumerate(batch):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        mask[row, :length] = 1
    labels = torch.tensor([example["labels"] for example in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(*callbacks: FastcovCallback, hooks: bool = False) -> tuple[torch.Tensor, float]:
    """Seconds of a training, and the sums of hooks, which are zero without them."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=500,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=48,
        )
    )
    second_moment, masks = torch.zeros(256, 256, dtype=torch.float64), []

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor):
        rows = output[masks[-1]].detach().double()
        second_moment.addmm_(rows.T, rows)

    if hooks:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"].bool()),
            with_kwargs=True,
        )
        model.get_submodule(LAYER).register_forward_hook(add)
    arguments = TrainingArguments(
        "out", max_steps=20, per_device_train_batch_size=16, seed=0, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=padded, train_dataset=examples(320), callbacks=[*callbacks]
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return second_moment, time.perf_counter() - start


train()  # the first training pays for what others share
plain_s = train()[1]
masked = FastcovCallback(rows="all", mask="attention_mask")
masked_s = train(masked)[1]
with_padding = FastcovCallback(rows="all")
train(with_padding)
one_layer = FastcovCallback(rows="all", mask="attention_mask", include=[LAYER])
one_s = train(one_layer)[1]
summed, hooks_s = train(hooks=True)

tracker = masked.tracker
theirs = summed / tracker.count(LAYER)
difference = float((tracker.covariance(LAYER) - theirs).abs().max() / theirs.abs().max())
print(f"training alone             {plain_s:5.2f} s")
print(f"fastcov, all {len(tracker.names())} layers     {masked_s:5.2f} s")
print(f"fastcov, one layer         {one_s:5.2f} s")
print(f"float64 hook on that layer {hooks_s:5.2f} s")
print(f"the hook differs by {difference:.0e} of the largest entry")
assert difference < 1e-5

# What padding would do: its positions have features too, and are counted as rows.
unmasked = with_padding.tracker
changed = float((unmasked.covariance(LAYER) - theirs).abs().max() / theirs.abs().max())
print(f"rows: {tracker.count(LAYER)} of tokens, {unmasked.count(LAYER)} with padding")
print(f"padding would change the covariance by {changed:.0%} of the largest entry")
