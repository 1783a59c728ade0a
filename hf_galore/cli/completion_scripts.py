"""What bash, zsh and fish are told to complete: a script each, made of the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple


class Words(NamedTuple):
    """What is completed."""

    commands: Mapping[str, str]
    """Each command, and what it does."""
    options: Mapping[str, tuple[str, ...]]
    """Of each command its options, without dashes."""
    values: Mapping[str, tuple[str, ...]]
    """Of each option its values, where they are known."""
    files: tuple[str, ...]
    """The options that take a file."""
    folders: tuple[str, ...]
    """Those that take a folder."""


_BASH = r"""# bash completion for hf-galore, made by `hf-galore completion bash`.
_hf_galore() {
    local current previous command options values
    COMPREPLY=()
    current=${COMP_WORDS[COMP_CWORD]}
    previous=${COMP_WORDS[COMP_CWORD-1]}
    # bash takes --optim=galore apart: the words are --optim, = and galore.
    if [[ $current == "=" ]]; then
        current=
    elif [[ $previous == "=" ]]; then
        previous=${COMP_WORDS[COMP_CWORD-2]}
    fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "@COMMANDS@ --help --version" -- "$current"))
        return
    fi
    command=${COMP_WORDS[1]}
    values=
    case ${previous#--} in
@VALUES@
    esac
    if [[ $previous == --* && -n $values ]]; then
        COMPREPLY=($(compgen -W "$values" -- "$current"))
        [[ $previous == --config ]] && _hf_galore_files "$current"
        return
    fi
    if [[ $current != -* ]]; then
        case $previous in
            @FILES@) _hf_galore_files "$current"; return ;;
            @FOLDERS@) _hf_galore_folders "$current"; return ;;
        esac
        case $command in
            chat|compare) _hf_galore_folders "$current"; return ;;
            completion) COMPREPLY=($(compgen -W "bash zsh fish" -- "$current")); return ;;
        esac
    fi
    case $command in
@OPTIONS@
        *) return ;;
    esac
    COMPREPLY=($(compgen -W "$options" -- "$current"))
}
_hf_galore_files() {
    compopt -o filenames 2> /dev/null
    local IFS=$'\n' name
    for name in $(compgen -f -- "$1"); do
        [[ -d $name || $name == *.yaml || $name == *.yml || $previous != --config ]] && COMPREPLY+=("$name")
    done
}
_hf_galore_folders() {
    compopt -o filenames 2> /dev/null
    local IFS=$'\n'
    COMPREPLY=($(compgen -d -- "$1"))
}
complete -F _hf_galore hf-galore
"""

_ZSH = r"""#compdef hf-galore
# zsh completion for hf-galore, made by `hf-galore completion zsh`.
_hf_galore() {
    local previous=${words[CURRENT-1]} current=${words[CURRENT]}
    local -a commands options values
    if (( CURRENT == 2 )); then
        commands=(
@COMMANDS@
        )
        _describe command commands
        return
    fi
    if [[ $current == --*=* ]]; then
        previous=${current%%=*}
        compset -P '*='
    fi
    values=()
    case ${previous#--} in
@VALUES@
    esac
    if [[ $previous == --* && ${#values} -gt 0 ]]; then
        compadd -a values
        [[ $previous == --config ]] && _files -g '*.(yaml|yml)'
        return
    fi
    if [[ $current != -* ]]; then
        case $previous in
            @FILES@) _files; return ;;
            @FOLDERS@) _files -/; return ;;
        esac
        case ${words[2]} in
            chat|compare) _files -/; return ;;
            completion) compadd bash zsh fish; return ;;
        esac
    fi
    case ${words[2]} in
@OPTIONS@
        *) return ;;
    esac
    compadd -a options
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _hf_galore "$@"
else
    compdef _hf_galore hf-galore
fi
"""

_FISH = r"""# fish completion for hf-galore, made by `hf-galore completion fish`.
function __hf_galore_command
    set -l words (commandline -opc)
    test (count $words) -ge 2; and contains -- $words[2] $argv
end
function __hf_galore_no_command
    test (count (commandline -opc)) -lt 2
end
complete -c hf-galore -f
@LINES@
"""


def bash(words: Words) -> str:
    """The script for bash."""
    options = _cases(_grouped(words.options), lambda names: f'options="{_flags(names)}"')
    values = _cases(_grouped(words.values), lambda names: f'values="{" ".join(names)}"')
    return _filled(_BASH, COMMANDS=" ".join(words.commands), OPTIONS=options, VALUES=values, **_paths(words))


def zsh(words: Words) -> str:
    """The script for zsh."""
    options = _cases(_grouped(words.options), lambda names: f"options=({_flags(names)})")
    values = _cases(_grouped(words.values), lambda names: f"values=({' '.join(names)})")
    commands = "\n".join(f"            {_quoted(f'{name}:{text}')}" for name, text in words.commands.items())
    return _filled(_ZSH, COMMANDS=commands, OPTIONS=options, VALUES=values, **_paths(words))


def fish(words: Words) -> str:
    """The script for fish."""
    lines = [
        f"complete -c hf-galore -n __hf_galore_no_command -a {name} -d {_quoted(text)}"
        for name, text in words.commands.items()
    ]
    commands_of: dict[str, list[str]] = {}
    for command, names in words.options.items():
        for name in names:
            commands_of.setdefault(name, []).append(command)
    for name, commands in commands_of.items():
        line = f"complete -c hf-galore -n '__hf_galore_command {' '.join(commands)}' -l {name}"
        lines.append(line + _fish_values(name, words))
    lines.append("complete -c hf-galore -n '__hf_galore_command chat compare' -a '(__fish_complete_directories)'")
    lines.append("complete -c hf-galore -n '__hf_galore_command completion' -a 'bash zsh fish'")
    return _filled(_FISH, LINES="\n".join(lines))


def _fish_values(name: str, words: Words) -> str:
    """The end of an option's line: -x where it takes one of these values, -r -F where it may be a file."""
    values = f" -a {_quoted(' '.join(words.values[name]))}" if name in words.values else ""
    if name in words.folders:
        values = " -a '(__fish_complete_directories)'"
    if name in words.files:
        return f" -r -F{values}"
    return f" -x{values}" if values else ""


def _grouped(lists: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, ...], list[str]]:
    """Names by their lists: several commands have the same options, and most options the values true and false."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, items in lists.items():
        found.setdefault(items, []).append(name)
    return found


def _cases(groups: Mapping[tuple[str, ...], Iterable[str]], line: Callable[[tuple[str, ...]], str]) -> str:
    return "\n".join(f"        {'|'.join(keys)}) {line(items)} ;;" for items, keys in groups.items())


def _flags(names: Iterable[str]) -> str:
    return " ".join(f"--{name}" for name in names)


def _paths(words: Words) -> dict[str, str]:
    return {"FILES": _either(words.files), "FOLDERS": _either(words.folders)}


def _either(names: Iterable[str]) -> str:
    return "|".join(f"--{name}" for name in names)


def _filled(script: str, **parts: str) -> str:
    for name, text in parts.items():
        script = script.replace(f"@{name}@", text)
    return script


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
