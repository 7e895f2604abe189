"""``python -m sfumato.cli``, as ``accelerate launch -m sfumato.cli`` calls it."""

from sfumato.cli import main

if __name__ == "__main__":
    main()
