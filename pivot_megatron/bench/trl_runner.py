"""TRL's DPOTrainer over a job of `bench.peer_job`: `python -P trl_runner.py JOB.json`, in an environment that has TRL.

Imports nothing of this project, so that what it measures is TRL alone. Appends a line a step to the job's `metrics`, under the
names of this project's own metrics.jsonl, and says in the job's `environment` what it computed with.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "rewards/chosen": "chosen_rewards",
    "rewards/rejected": "rejected_rewards",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
}


class Lines(TrainerCallback):  # type: ignore[misc]
    """A step's seconds reach from the end of the step before to its own end, so the wait for data is in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended = 0.0
        self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.ended = now - self.ended, now

    def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        logs = context["logs"]
        if "loss" not in logs:
            return  # the summary after the last step
        line = {"step": state.global_step, "step_seconds": self.seconds, "tokens": int(logs["num_tokens"])}
        line |= {ours: logs[theirs] for theirs, ours in _NAMES.items()}
        if torch.accelerator.is_available():
            line["peak_bytes"] = torch.accelerator.max_memory_allocated()
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.ended = time.perf_counter()  # writing the line is no part of training


def dataset(pairs: Path) -> Dataset:
    """Pairs whose texts carry the chat template already, in the order they train in."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    return Dataset.from_list(rows).cast_column("image", Image())


def config(job: dict[str, Any]) -> DPOConfig:
    return DPOConfig(
        output_dir=job["scratch"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["pairs_a_step"] // job["micro_batch"],
        train_sampling_strategy="sequential",
        max_length=None,
        beta=job["beta"],
        loss_type=list(job["losses"]),
        loss_weights=list(job["losses"].values()),
        label_smoothing=job["label_smoothing"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=job["clip"],
        bf16=job["precision"] == "bf16",
        model_init_kwargs={"attn_implementation": job["trl_attention"]},
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
        use_cpu=not torch.accelerator.is_available(),
    )


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    trainer = DPOTrainer(
        model=job["model"],
        args=config(job),
        train_dataset=dataset(Path(job["pairs"])),
        callbacks=[Lines(Path(job["metrics"]))],
    )
    if job.get("batches"):
        trainer.data_collator = kept(trainer.data_collator, Path(job["batches"]))
    trainer.train()
    Path(job["environment"]).write_text(json.dumps(environment(trainer.model.config)) + "\n")


def environment(model: Any) -> dict[str, Any]:
    """`model`: the config of an image-text model."""
    parts = (model.vision_config, model.get_text_config())
    return {
        "threads": torch.get_num_threads(),
        "attention": ", ".join(sorted({part._attn_implementation for part in parts})),
    }


def kept(collate: Any, folder: Path) -> Any:
    """`collate`, with each batch it makes written to `folder`."""
    folder.mkdir(parents=True)

    def collate_and_keep(rows: Any) -> Any:
        batch = collate(rows)
        torch.save(dict(batch), folder / f"{len(list(folder.iterdir())):04d}.pt")
        return batch

    return collate_and_keep


if __name__ == "__main__":
    main(Path(sys.argv[1]))
