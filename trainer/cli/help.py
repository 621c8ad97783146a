"""The text of `python -m trainer --help`."""

from trainer.config import choices_of, group_names

_HELP = """\
Fine-tune SDXL, full or LoRA, with low-memory optimizers.

The demo: a tiny SDXL learns 24 emoji, on a CPU, in minutes; as a full fine-tune and as a LoRA:
  python -m trainer optim=adafactor8bit
  python -m trainer method=lora optim=adamw optim.lr=5e-3
Your own model and pictures, as a LoRA and as a full fine-tune:
  python -m trainer experiment=sdxl_lora model.path=/models/sdxl.safetensors data.path=/pictures
  python -m trainer experiment=sdxl model.path=/models/sdxl.safetensors data.path=/pictures
From a command, or a .toml, of kohya's scripts:
  python -m trainer.kohya train.sh
Before a run: check the pictures, and whether there is enough memory:
  python -m trainer.doctor experiment=sdxl_lora data.path=/pictures
  python -m trainer.planner experiment=sdxl --card 8
Sweeps, with tables of the runs at the end: over seeds, over rates, and of the whole family; and the
tables of several sweeps together:
  python -m trainer -m optim=adafactor8bit,adamw seed=0,1
  python -m trainer -m optim=adamw,lion optim.lr=1e-4,3e-4,1e-3
  python -m trainer sweep=optimizers log=wandb
  python -m trainer.sweep runs/sweep-DATE1 runs/sweep-DATE2 --out compared
After a run: its results side by side, and converted to another format:
  python -m trainer.draw runs/DATE/TIME-NAME --all-results --prompt "a cat" --out cats.png
  python -m trainer.export runs/DATE/TIME-NAME cats.safetensors
Resuming the newest run with its options:
  python -m trainer resume=latest

Options to set first:
  data.path=/pictures       pictures and captions, with data=folder
  model.path=/models/sdxl   a .safetensors file, a diffusers folder or a name on the hub
  optim.lr=1e-5             the learning rate
  schedule.steps=2000       length in optimizer steps; or schedule.epochs=10
  data.batch_size=4         pictures per micro-batch; runtime.accumulation=2 doubles the effective
                            batch

Choices (group=choice; several experiments as experiment=[low_memory,smoke]):
{groups}
To explain a group, a choice or an option, and to print all options with their values:
  python -m trainer --help data
  python -m trainer --help optim=prodigy_factored
  python -m trainer --help experiment=sdxl schedule.steps runtime.on_divergence
  python -m trainer --cfg job
A run writes its checkpoints, pictures, metrics.jsonl and the trained model to runs/DATE/TIME-NAME.
"""


def page() -> str:
    """The text of `--help`.  Hydra's own would take seconds."""
    groups = "".join(f"  {group:<11}{', '.join(choices_of(group))}\n" for group in group_names())
    return _HELP.format(groups=groups)
