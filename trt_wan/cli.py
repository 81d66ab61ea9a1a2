"""The command line (being written)."""


def main() -> None:
    raise SystemExit(0)
