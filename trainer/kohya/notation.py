"""Values in Hydra's notation."""

import re
from typing import Any

_SAFE = re.compile(r"[\w./:@%+-]+")  # what Hydra takes for a text without quotes


def written(value: Any) -> str:
    """A value in Hydra's notation."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {written(x)}' for key, x in value.items())}}}"
    text = str(value)
    if _SAFE.fullmatch(text):
        return text
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)  # a backslash is only special before a quote
    at_the_end = escaped[len(escaped.rstrip("\\")) :]
    return f'"{escaped}{at_the_end}"'
