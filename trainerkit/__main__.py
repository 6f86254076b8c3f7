"""`python -m trainerkit`: the same as the console script `trainerkit`."""

from trainerkit.cli import main

if __name__ == "__main__":
    main()
