"""Print each optimizer's state size for the SDXL UNet, and its step time relative to torch's:
`python scripts/optimizer_table.py`.

The state size is exact: every optimizer allocates its state (on torch's meta device, shapes only)
for the UNet's 1680 bf16 tensors, at its default options.  Step times are not measured here but
taken from the first table of docs/benchmarks.md.
"""

import json
import re
from pathlib import Path

import torch
from torch.nn import Parameter

import optim

REPOSITORY = Path(__file__).parents[1]
SHAPES = REPOSITORY / "tests" / "data" / "sdxl_unet_shapes.json"
BENCHMARKS = REPOSITORY / "docs" / "benchmarks.md"


def state_bytes(name: str) -> int:
    """Bytes of state for the SDXL UNet."""
    number = torch.zeros((), dtype=torch.bfloat16, device="meta")
    params = [Parameter(number.expand(shape)) for _, shape in json.loads(SHAPES.read_text())]
    optimizer = optim.build(name, params)
    optimizer.init_state()
    return optimizer.state_bytes()


def ratios() -> dict[str, str]:
    """Step times relative to torch's fused AdamW, on one thread with AVX-512."""
    text = BENCHMARKS.read_text(encoding="utf-8")
    table = text.split("### One thread, AVX-512")[1].split("###")[0]
    return dict(re.findall(r"^\| \*\*([\w ]+)\*\* \| native \| ([\d.]+) \|", table, re.MULTILINE))


def table() -> str:
    """A Markdown table, smallest state first."""
    steps = ratios()
    rows = [
        "| `optim=` | class | lr | state on the SDXL UNet | step, x torch fused AdamW "
        "| what is kept |",
        "|---|---|--:|--:|--:|---|",
    ]
    for size, name in sorted((state_bytes(name), name) for name in optim.FAMILY):
        cls = optim.FAMILY[name]
        kept = (cls.__doc__ or "").splitlines()[0]
        took = steps.get(name, "")  # a new one has not been measured
        _, lr = optim.options_of(name)["lr"]
        names = f"`{name}` | `{cls.__name__}` | {lr:g}"
        rows.append(f"| {names} | {size / 1e6:,.1f} MB | {took} | {kept} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
