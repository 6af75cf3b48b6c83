"""``python -m nanoflow``."""

from nanoflow.cli import main

if __name__ == "__main__":
    main()
