"""Print what each optimizer keeps between steps for the SDXL UNet: `python scripts/state_table.py`.

The state is laid out, not estimated: every optimizer allocates it (on torch's meta device, which
holds shapes and no numbers) for the UNet's 1680 bf16 tensors, at its default options.
"""

import json
from pathlib import Path

import torch
from torch.nn import Parameter

import optim

SHAPES = Path(__file__).parents[1] / "tests" / "data" / "sdxl_unet_shapes.json"


def state_bytes(name: str) -> int:
    """Bytes of state for the SDXL UNet."""
    number = torch.zeros((), dtype=torch.bfloat16, device="meta")
    params = [Parameter(number.expand(shape)) for _, shape in json.loads(SHAPES.read_text())]
    optimizer = optim.build(name, params)
    optimizer.init_state()
    return optimizer.state_bytes()


def table() -> str:
    """A Markdown table, smallest state first."""
    rows = ["| `optim=` | class | state on the SDXL UNet | what is kept |", "|---|---|--:|---|"]
    for size, name in sorted((state_bytes(name), name) for name in optim.FAMILY):
        cls = optim.FAMILY[name]
        kept = (cls.__doc__ or "").splitlines()[0]
        rows.append(f"| `{name}` | `{cls.__name__}` | {size / 1e6:,.1f} MB | {kept} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
