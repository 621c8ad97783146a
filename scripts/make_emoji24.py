"""Render the 24 held-out emoji as an ordinary image folder: NAME.png beside NAME.txt, its caption.

    npm pack emojibase-data@17.0.0 && tar xf emojibase-data-17.0.0.tgz
    python scripts/make_emoji24.py --emojibase package --out trainer/assets/emoji24

The base model in trainer/assets/tiny_sdxl has never seen them: the demo trains on them.
"""

import argparse
import sys
from pathlib import Path

from tiny.noto import SourceError, add_source_arguments, read_emoji, slug, sources, split_held_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source_arguments(parser, bpe=False)
    parser.add_argument("--out", type=Path, default=Path("trainer/assets/emoji24"))
    args = parser.parse_args()
    try:
        _, held_out = split_held_out(read_emoji(sources(args)))
    except SourceError as error:
        sys.exit(f"make_emoji24: {error}")

    args.out.mkdir(parents=True, exist_ok=True)
    for emoji in held_out:
        name = slug(emoji.label)
        emoji.picture.save(args.out / f"{name}.png", optimize=True)
        (args.out / f"{name}.txt").write_text(emoji.label + "\n", encoding="utf-8")
    print(f"{len(held_out)} pictures with captions in {args.out}")


if __name__ == "__main__":
    main()
