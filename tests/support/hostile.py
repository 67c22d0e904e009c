"""Names that try to act where they are shown."""

from typing import Any

HOSTILE = {
    "clears the screen": "\x1b[2J\x1b]0;owned\x07",
    "one byte escape": "\x9b2Ja\x85b",
    "overwrites the line": "fine\rcatp: saved",
    "writes a line of its own": "x\ncatp: error: all is well\u2028y\u2029z",
    "right to left": "\u202egnp.exe\u2066\u200f\u200b\ufeff\U000e0041",
    "half a character": "\ud800 and \udfff",
    "Rich's end tag": "mine [/]",
    "Rich's link": "[link=https://evil.example]x[/link][blink]\\[bold]",
    "emoji code": "a:skull:b",
    "table": "a|b\\|c||",
    "html": '<img src=https://evil.example/x.png onerror="alert(1)"></td><script>x</script>&lt;&#60;',
    "image": "![x](https://evil.example/x.png) [y](javascript:x) [z]: <https://evil.example>",
    "emphasis": "**b** *i* _u_ __v__ ~~s~~ `c` ``d`` a_b_c snake_case",
    "address": "https://evil.example www.evil.example me@evil.example",
    "formula": r"$\frac{$ $x$ \$ $$",
    "TeX": r"\input{/etc/passwd} 100% #1 ^_",
    "hidden from a legend": "_nolegend_",
    "no glyph": "猫 👩\u200d👧",
    "long": "x" * 5000,
}


def other_names(value: Any, text: str, named: int = 0) -> Any:
    """Evidence in which names, and the keys of the `named` outermost dictionaries, hold `text`."""
    if isinstance(value, dict):
        return {
            f"{key} {text}" if named or (isinstance(inner, dict) and "layer_steps" in inner) else key:
            f"{inner} {text}" if key in ("name", "chosen", "type")
            else other_names(inner, text, 2 if key == "perturbed" else max(0, named - 1))
            for key, inner in value.items()
        }  # fmt: skip
    return [other_names(item, text) for item in value] if isinstance(value, list) else value
