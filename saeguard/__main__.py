"""Let ``python -m saeguard`` be the ``saeguard`` command."""

from saeguard.cli import app

if __name__ == "__main__":
    app(prog_name="saeguard")
