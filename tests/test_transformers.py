"""The optimizers in transformers' Trainer, as docs/library.md says."""

import copy

import pytest
import torch
import transformers

import optim


class Regression(torch.nn.Sequential):
    """A model as transformers' Trainer wants it."""

    def forward(self, x, labels=None):
        return {"loss": (super().forward(x) - labels).square().mean()}


@pytest.mark.parametrize("fused", [False, True])
def test_transformers_trainer_steps_as_a_plain_loop_does(tmp_path, fused):
    """With the fused backward as docs/library.md says: without its measuring of the norm."""
    torch.manual_seed(0)
    data = [{"x": torch.randn(8), "labels": torch.randn(4)} for _ in range(8)]
    model = Regression(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    twin = copy.deepcopy(model)
    optimizer, plain = (optim.AdamW(each.parameters(), lr=1e-2) for each in (model, twin))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None)
    )
    if fused:
        optim.fuse_backward(optimizer, bucket_bytes=1)
        trainer.accelerator.clip_grad_norm_ = lambda *_, **__: None
    trainer.train()
    batch = {key: torch.stack([row[key] for row in data]) for key in ("x", "labels")}
    for _ in range(3):
        twin(**batch)["loss"].backward()
        plain.step()
        plain.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
