"""What a shell offers where the reader of a command line presses the tab key, given the script of `catp completion`."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

ZSH = """\
PS1=ready; unsetopt beep; fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -d {functions}/dump
compadd() {{
  if (( ${{@[(I)-[AOD]*]}} )); then builtin compadd "$@"; return; fi
  local -a catp_found; builtin compadd -O catp_found "$@"; print -rl -- $catp_found >> {found}
  builtin compadd "$@"
}}
catp_end() {{ exit }}; zle -N catp_end; bindkey '^X' catp_end
"""
"""Start of a zsh that notes what is offered in a file; Ctrl-X ends it."""


def bash(script: Path, words: tuple[str, ...], folder: Path) -> list[str]:
    asked = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _shtab_catp; printf "%s\\n" "${COMPREPLY[@]}"'
    return list(filter(None, _printed(["bash", "--norc", "-c", asked, str(script), "catp", *words], folder)))


def fish(script: Path, words: tuple[str, ...], folder: Path) -> list[str]:
    asked, line = 'source $argv[1]; complete --do-complete "$argv[2]"', " ".join(("catp", *words))
    return [one.split("\t")[0] for one in _printed(["fish", "--no-config", "-c", asked, str(script), line], folder)]


def zsh(script: Path, words: tuple[str, ...], folder: Path) -> list[str]:
    """A zsh with a terminal: it completes for nobody else."""
    found, start, functions = script.with_name("found"), script.with_name("start"), script.with_name("functions")
    functions.mkdir(exist_ok=True)
    shutil.copy(script, functions / "_catp")
    found.write_text("")
    start.write_text(ZSH.format(functions=functions, found=found))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execve(str(shutil.which("zsh")), ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "HOME": str(folder)})
    try:
        os.write(terminal, f"source {start}\n".encode())
        _until(terminal, b"ready")
        os.write(terminal, f"catp {' '.join(words)}\t\x18".encode())
        _until(terminal, b"")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return found.read_text().split()


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def _printed(command: list[str], folder: Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=folder)
    assert not done.stderr
    return done.stdout.splitlines()


def _until(terminal: int, wanted: bytes, seconds: float = 60) -> None:
    """Read until the shell has written `wanted`; with b"" until it has ended."""
    read, end = b"", time.monotonic() + seconds
    while not wanted or wanted not in read:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"the shell is silent after {read[-2000:]!r}"
        try:
            more = os.read(terminal, 65536)
        except OSError:  # Linux says that the other end is closed
            more = b""
        if not more:
            assert not wanted, f"the shell ended after {read[-2000:]!r}"
            return
        read += more
