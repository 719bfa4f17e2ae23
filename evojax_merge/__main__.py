"""`evojax-merge` and `python -m evojax_merge`: ready for signals before anything else is imported."""

from evojax_merge.system import interrupts


def main() -> None:
    interrupts.end_at_once(interrupts.INTERRUPTED, "interrupted\n")
    from evojax_merge import cli

    cli.main()


if __name__ == "__main__":
    main()
