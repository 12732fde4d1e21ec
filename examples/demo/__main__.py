"""`python -m examples.demo`: apart from what it runs, which processes of its own import by name."""

from examples.demo.compare import main

if __name__ == "__main__":
    main()
