"""`python -m bitplan`: the same as the command `bitplan`."""

from bitplan.cli import main

if __name__ == "__main__":
    main(prog_name="bitplan")
