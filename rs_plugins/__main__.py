"""``python -m rs_plugins``: the command line, for launchers that take a module, as ``torchrun -m`` does."""

from rs_plugins.cli import main

if __name__ == "__main__":
    main(prog_name="rs-plugins")
