"""`python -m fewfire`."""

from fewfire.cli.main import main

if __name__ == "__main__":
    main()
