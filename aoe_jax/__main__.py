"""`python -m aoe_jax` lists the commands."""

import ast
from configparser import ConfigParser
from pathlib import Path

from tabulate import tabulate

from aoe_jax import cli

_FOLDER = Path(__file__).parent


def commands():
    """The commands in `commands.ini`: `[(console script, module, description)]`."""
    parser = ConfigParser()
    parser.read(_FOLDER / "commands.ini")
    found = []
    for script, function in parser["console_scripts"].items():
        module = function.partition(":")[0]
        file = _FOLDER.joinpath(*module.split(".")[1:]).with_suffix(".py")
        about = ast.get_docstring(ast.parse(file.read_text())).splitlines()[0]
        found.append((script, module.removesuffix(".__main__"), about))
    return found


def main():
    """Prints a table of the commands."""
    print(tabulate(commands(), ["command", "or python -m", ""], "plain"))
    print("\nThe --help of a command shows its flags.")


if __name__ == "__main__":
    cli.run(main)
