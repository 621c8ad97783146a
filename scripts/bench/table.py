"""The rows as a Markdown table."""

from bench.measure import Row

HEAD = (
    "optimizer | engine or version | x torch fused AdamW | best | ms | state B/param | state MB"
    " | ideal B/param | GB/s | of stream | temporary MB | tiny tensors, x torch"
)


def markdown(rows: list[Row], threads: int) -> str:
    """One line an optimizer; MB are 1e6 bytes, ours are bold."""
    head = HEAD.split(" | ")
    lines = [_cells(row) for row in rows]
    if threads > 1:
        head.append(f"1 to {threads} threads")
        for row, line in zip(rows, lines, strict=True):
            line.append("-" if row.scaling is None else f"{row.scaling:.2f}x")
    rule = ["---", "---", *["--:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _cells(row: Row) -> list[str]:
    return [
        f"**{row.name}**" if row.ours else row.name,
        row.engine,
        f"{row.ratio:.2f}",
        f"{row.ratio_best:.2f}",
        f"{row.seconds * 1e3:,.1f}",
        f"{row.state_per_param:.3f}",
        f"{row.state_bytes / 1e6:,.2f}",
        f"{row.ideal_per_param:.2f}",
        f"{row.bandwidth / 1e9:.2f}",
        f"{row.stream_share:.1%}",
        "n/a" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:,.1f}",
        f"{row.tiny_ratio:.2f}",
    ]
