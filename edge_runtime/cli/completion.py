"""``edgert completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click

from edge_runtime.errors import DependencyError

_WHERE = {
    "bash": 'eval "$(edgert completion bash)"     # in ~/.bashrc; needs bash 4.4 or newer',
    "zsh": 'eval "$(edgert completion zsh)"      # in ~/.zshrc, after compinit',
    "fish": "edgert completion fish > ~/.config/fish/completions/edgert.fish",
}
_EPILOG = "\b\nTo have it in every new shell:\n" + "\n".join(f"  {line}" for line in _WHERE.values())


@click.command("completion", epilog=_EPILOG)
@click.argument("shell", type=click.Choice(list(_WHERE)))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in a shell."""
    from click.shell_completion import get_completion_class

    root = context.find_root()
    name = root.info_name or "edgert"
    kind = get_completion_class(shell)
    if kind is None:
        raise DependencyError(f"this version of click knows no completion for {shell}; update click")
    click.echo(kind(root.command, {}, name, f"_{name}_COMPLETE".replace("-", "_").upper()).source())
